"""What a Redis is reached by, and those that cannot be worked with: one sentence each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from redis import Redis

from courier.settings import Settings
from producer import Courier
from producer.cli import main
from producer.doctor import Finding, examine
from sandbox import processes as parts
from sandbox.processes import HOST, Processes, RedisPart, poll
from sandbox.synthetic import image, new_uid

WAIT_S = 30
SERVER = {"name": "a", "type": "dicomweb", "url": f"http://{HOST}:9/dicom-web"}
#: Broker, results and ledger, in this order.
Urls = tuple[str, str, str]


@pytest.fixture(scope="module")
def redises(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RedisPart]]:
    """One as it should be, on a Unix socket as well; a replica of it; one in cluster mode."""
    with Processes(tmp_path_factory.mktemp("redises")) as running:
        good = parts.redis(running, name="good", options=["--unixsocket", str(running.folder / "redis.sock")])
        replica = parts.redis(running, name="replica", options=["--replicaof", f"{HOST} {good.port}"])
        # Else its second port is one of those that outgoing connections take.
        in_cluster = ["--cluster-enabled", "yes", "--cluster-port", str(parts.free_port())]
        cluster = parts.redis(running, name="cluster", options=in_cluster)
        with Redis(port=cluster.port) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        with Redis(port=good.port) as client:
            client.execute_command("ACL SETUSER reader on >pw ~* +@read +ping +info +time +hello +client +select")
        yield {"good": good, "replica": replica, "cluster": cluster}


@pytest.fixture
def socket(redises: dict[str, RedisPart]) -> Path:
    return redises["good"].child.out_path.parent / "redis.sock"


def urls_of(part: RedisPart, user: str = "") -> Urls:
    return tuple(part.url(number).replace("://", f"://{user}") for number in range(3))  # type: ignore[return-value]


def tree_of(urls: Urls) -> dict[str, Any]:
    return {"servers": [SERVER], "queue": dict(zip(("broker_url", "result_backend", "ledger_url"), urls, strict=True))}


@pytest.mark.parametrize("form", ["unix://{}?db={}", "redis+socket://{}?virtual_host={}", "UNIX://{}?virtual_host={}"])
def test_an_upload_goes_through_a_redis_on_a_unix_socket(
    socket: Path, worker: Callable[..., Any], image_server: Any, form: str
) -> None:
    urls = [form.format(socket, number) for number in range(3)]
    running = worker(queue=dict(zip(("broker_url", "result_backend", "ledger_url"), urls, strict=True)))
    with Courier(running.settings) as courier:
        stored = courier.upload(image_server.put("a.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
        assert stored["status"] == "stored"
        assert [finding for finding in examine(lambda: running.settings) if finding.state == "unavailable"] == []
    running.stop()


def test_a_database_may_be_named_in_the_query(
    redises: dict[str, RedisPart], worker: Callable[..., Any], image_server: Any
) -> None:
    base = f"redis://{HOST}:{redises['good'].port}"
    running = worker(
        queue={"broker_url": f"{base}?db=5", "result_backend": f"{base}?db=6", "ledger_url": f"{base}?db=7"}
    )
    with Courier(running.settings) as courier:
        assert (
            courier.upload(image_server.put("a.dcm", image(new_uid()))).result(timeout_s=WAIT_S)["status"] == "stored"
        )
    running.stop()


@pytest.mark.parametrize("form", ["redis://{1}?db={2}", "redis://{1}/?db={2}", "unix://{0}?db={2}"])
def test_a_worker_reads_urls_in_variables_as_those_in_the_file(
    redises: dict[str, RedisPart], socket: Path, worker: Callable[..., Any], image_server: Any, form: str
) -> None:
    """The command `celery` takes two of these variables for options of its own."""
    urls = [form.format(socket, f"{HOST}:{redises['good'].port}", number) for number in (8, 9, 10)]
    variables = dict(zip(("BROKER_URL", "RESULT_BACKEND", "LEDGER_URL"), urls, strict=True))
    running = worker(environ=variables)
    with Courier(Settings.load({"PACS_CONFIG": str(running.config), **variables})) as courier:
        stored = courier.upload(image_server.put("a.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
        assert stored["status"] == "stored"
    running.stop()


CASES: dict[str, tuple[Callable[[dict[str, RedisPart]], Urls], str, bool]] = {
    "no such database": (
        lambda all_: (*urls_of(all_["good"])[:2], all_["good"].url(99)),
        "DB index is out of range",
        True,
    ),
    "cluster mode": (lambda all_: (*urls_of(all_["good"])[:2], all_["cluster"].url(0)), "cluster mode", True),
    "a user who may only read": (lambda all_: urls_of(all_["good"], "reader:pw@"), "no permissions", True),
    "results that may only be read": (
        lambda all_: (all_["good"].url(0), urls_of(all_["good"], "reader:pw@")[1], all_["good"].url(2)),
        "no permissions",
        True,
    ),
    "a wrong password": (
        lambda all_: (*urls_of(all_["good"])[:2], urls_of(all_["good"], "reader:no@")[2]),
        "invalid username-password pair",
        True,
    ),
    "a replica": (lambda all_: urls_of(all_["replica"]), "replica", False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_redis_that_cannot_be_worked_with_is_told_in_one_sentence(
    redises: dict[str, RedisPart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    urls_for, says, ends = CASES[case]
    config = parts.write_settings(tmp_path / "pacs.toml", tree_of(urls_for(redises)))
    monkeypatch.setenv("PACS_CONFIG", str(config))
    found: list[Finding] = list(examine())
    trouble = [finding for finding in found if finding.state == "unavailable"]
    assert trouble, found
    assert any(says in finding.found for finding in trouble), trouble
    doctor = CliRunner().invoke(main, ["doctor", "--json"])
    assert (doctor.exit_code, bool(json.loads(doctor.stdout))) == (3, True)
    if case != "results that may only be read":  # then a job can be sent, and its result is told by the ledger
        sent = CliRunner().invoke(main, ["upload", "https://host.example/a.dcm", "--timeout", "1"])
        assert (sent.exit_code, says in sent.stderr, "Traceback" in sent.stderr) == (3, True, False)
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--concurrency", "1"]
    with Processes(tmp_path / "worker") as running:
        child = running.start(
            "worker", command, environ={"PACS_CONFIG": str(config)}, ready=lambda one: says in one.log
        )
        assert poll(lambda: says in child.log and not (ends and child.alive), timeout_s=WAIT_S), child.log
        assert "Traceback (most recent call last)" not in child.log
        assert not ends or child.kill() == 1
