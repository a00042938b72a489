"""A server that asks for fewer requests, through each door of a real worker: all ends well, without an attempt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from courier.ledger.jobs import Ledger
from courier.settings import Settings
from producer import Courier, doctor
from producer.errors import PacsUnavailable
from sandbox import processes as parts
from sandbox.processes import Child, Processes, SandboxPart, poll
from sandbox.synthetic import image, new_uid
from tests.stow import stow
from worker.pacs.server_rates import SLOWED, ServerRates

WAIT_S = 60
#: More answers "fewer requests" than a job has attempts.
ATTEMPTS, TIMES = 2, 3
MAX_WAIT_S = 25


@dataclass
class SlowDownSite:
    courier: Courier
    ledger: Ledger
    settings: Settings
    sandbox: SandboxPart
    images: Any
    out: Path
    child: Child

    def rate(self, server: str) -> Any:
        return ServerRates(self.ledger.client).read([server])[server]

    def put(self, server: str, count: int = 2) -> str:
        study = new_uid()
        stow(getattr(self.sandbox, server), *(image(study, side=8) for _ in range(count)))
        return study

    def url(self) -> str:
        return str(self.images.put(f"{new_uid()}.dcm", image(new_uid(), side=8)))


@pytest.fixture(scope="module")
def running(redis_server, sandbox_server, tmp_path_factory) -> Iterator[tuple[Settings, Path, Child]]:
    redis_server.flush()
    out = tmp_path_factory.mktemp("out")
    with Processes(tmp_path_factory.mktemp("slow")) as processes:
        tree = {
            "servers": sandbox_server.servers(),
            "queue": parts.queue_settings(redis_server),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "downloads": {"folders": [str(out)]},
            "jobs": {
                "sweep_s": 0.2,
                "backoff_base_s": 0.1,
                "backoff_cap_s": 0.2,
                "max_attempts": ATTEMPTS,
                "max_wait_s": MAX_WAIT_S,
            },
        }
        config = parts.write_settings(processes.folder / "pacs.toml", tree)
        child = parts.worker(processes, config, name="slow")
        child.wait_ready()
        yield Settings.load({"PACS_CONFIG": str(config)}), out, child
        child.stop(grace_s=15)
        assert "Traceback (most recent call last)" not in child.log, child.log_tail(60)


@pytest.fixture
def site(running, sandbox, image_server) -> Iterator[SlowDownSite]:
    settings, out, child = running
    ledger = Ledger.connect(settings.queue.ledger_url)
    for key in ledger.client.scan_iter(f"*{SLOWED}*"):
        ledger.client.delete(key)
    time.sleep(0.6)  # by now all threads of the worker know
    with Courier(settings) as courier:
        yield SlowDownSite(courier, ledger, settings, sandbox, image_server, out, child)
    ledger.close()


def uploads(site: SlowDownSite) -> Any:
    return site.courier.upload(site.url(), server="msdicom")


def lookup(site: SlowDownSite) -> Any:
    return site.courier.exists("study", site.put("msdicom"), mode="msdicom")


def metadata(site: SlowDownSite) -> Any:
    return site.courier.metadata("study", site.put("msdicom"), mode="msdicom")


def listing(site: SlowDownSite) -> Any:
    site.put("msdicom")
    return site.courier.studies(mode="msdicom")


def deletion(site: SlowDownSite) -> Any:
    return site.courier.delete("study", site.put("msdicom"), servers=["msdicom"])


def download(site: SlowDownSite) -> Any:
    return site.courier.download(site.put("msdicom"), (site.out / f"{new_uid()}.zip").as_uri(), mode="msdicom")


def batch_upload(site: SlowDownSite) -> Any:
    return site.courier.batch.upload([site.url() for _ in range(3)], server="msdicom")


def migration(site: SlowDownSite) -> Any:
    studies = [site.put("dcm4chee"), site.put("dcm4chee")]
    return site.courier.batch.migrate(studies, from_server="dcm4chee", to_server="msdicom")


DOORS: dict[str, tuple[Callable[[SlowDownSite], Any], str]] = {
    "an upload's questions": (uploads, "query"),
    "an upload": (uploads, "store"),
    "an upload's metadata": (uploads, "metadata"),
    "a lookup": (lookup, "query"),
    "metadata": (metadata, "metadata"),
    "a list": (listing, "query"),
    "a deletion": (deletion, "delete"),
    "a download": (download, "retrieve"),
    "a batch of uploads": (batch_upload, "store"),
    "a migration": (migration, "store"),
}


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503, "retry_after_s": 1}], ids=["429", "503"])
@pytest.mark.parametrize("door", DOORS)
def test_a_request_to_slow_down_uses_up_no_attempt(site: SlowDownSite, door: str, fault: dict[str, Any]) -> None:
    order, operation = DOORS[door]
    site.sandbox.set_fault("msdicom", operation, times=TIMES, **fault)
    handle = order(site)
    payload = handle.result(timeout_s=WAIT_S)
    assert payload.get("status", "done") in ("stored", "done", "downloaded", "deleted")
    jobs = [record for job_id in (handle.id, f"{handle.id}.apply.0") if (record := site.ledger.read_record(job_id))]
    assert {record["attempts"] for record in jobs} == {"1"}
    passes = payload.get("passes", {})
    assert "failed" not in passes.get("apply", {}).get("totals", {})
    rate = site.rate("msdicom")
    assert (rate.cuts > 0, rate.status) == (True, fault["status"])


def test_an_undo_waits_too(site: SlowDownSite) -> None:
    batch = site.courier.batch.upload([site.url() for _ in range(3)], server="msdicom")
    batch.result(timeout_s=WAIT_S)
    site.sandbox.set_fault("msdicom", "delete", status=429, times=TIMES)
    undone = site.courier.batch.undo(batch.id).result(timeout_s=WAIT_S)
    assert undone["passes"]["undo"]["totals"] == {"undone": 3}


def test_a_job_that_waits_says_for_which_server_why_and_until_when(site: SlowDownSite) -> None:
    site.sandbox.set_fault("msdicom", "query", status=429, retry_after_s=20)
    handle = uploads(site)
    assert poll(lambda: handle.status() == "waiting", timeout_s=WAIT_S)
    waiting = handle.waiting()
    assert (waiting["code"], waiting["server_name"]) == ("pacs_unavailable", "msdicom")
    assert "fewer requests" in waiting["message"]
    assert waiting["next_try"] is not None
    site.sandbox.reset_faults()
    assert handle.result(timeout_s=WAIT_S)["attempts"] == 1


def test_nothing_is_fetched_or_sent_to_a_server_before_the_time_it_named(site: SlowDownSite) -> None:
    site.sandbox.set_fault("msdicom", "query", status=429, retry_after_s=15, times=1)
    first = uploads(site)
    assert poll(lambda: site.rate("msdicom").held_s > 0, timeout_s=WAIT_S)
    time.sleep(1)
    site.sandbox.load(anew=True)
    others = [uploads(site) for _ in range(5)]
    time.sleep(2)
    assert site.sandbox.load()["msdicom"]["total"] == 0
    for handle in (first, *others):
        assert handle.result(timeout_s=WAIT_S)["attempts"] == 1


def test_a_server_that_never_stops_asking_ends_its_jobs_after_max_wait(site: SlowDownSite) -> None:
    site.sandbox.set_fault("msdicom", "query", status=429, retry_after_s=15)
    with pytest.raises(PacsUnavailable) as end:
        lookup(site).result(timeout_s=WAIT_S + MAX_WAIT_S)
    assert "429" in str(end.value)


def test_jobs_for_other_servers_go_on(site: SlowDownSite) -> None:
    study = site.put("dcm4chee")
    site.sandbox.set_fault("msdicom", "*", status=429, retry_after_s=20)
    waits = lookup_of_nothing(site)
    assert poll(lambda: site.rate("msdicom").held_s > 0, timeout_s=WAIT_S)
    begun_s = time.monotonic()
    assert site.courier.exists("study", study, mode="dcm4chee").result(timeout_s=WAIT_S)["server_name"] == "dcm4chee"
    assert time.monotonic() - begun_s < 5
    waits.cancel()


def lookup_of_nothing(site: SlowDownSite) -> Any:
    return site.courier.exists("study", new_uid(), mode="msdicom")


def test_status_and_doctor_say_how_fast_a_server_is_asked(site: SlowDownSite) -> None:
    site.sandbox.set_fault("msdicom", "query", status=429, times=1)
    lookup(site).result(timeout_s=WAIT_S)
    entry = site.courier.status().result(timeout_s=WAIT_S)["servers"][0]
    assert (entry["server_name"], entry["status"], entry["rate_limit"]["status"]) == ("msdicom", "up", 429)
    assert 7 < entry["rate_limit"]["per_s"] < 15
    assert "asked for fewer requests" in entry["note"]
    findings = {finding.check: finding for finding in doctor.examine(lambda: site.settings)}
    assert findings["server msdicom"].state == "warning"
    assert "asked for fewer requests" in json.dumps(findings["server msdicom"].as_json())
    assert findings["server dcm4chee"].state == "ok"
