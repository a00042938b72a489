"""Three worker processes and two servers: the bound on requests in flight, and a server that all leave alone."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import requests

from courier.ledger.breakers import Breakers
from courier.ledger.jobs import Ledger
from courier.settings import Settings
from producer import Courier
from producer.errors import Cancelled, PacsUnavailable
from sandbox import processes as parts
from sandbox.processes import Child, Processes, poll
from sandbox.synthetic import image, new_uid
from worker.pacs.server_rates import ServerRates

WAIT_S = 60
LIMIT = 3
PAUSE_S = 0.5


@dataclass
class GuardedWorkers:
    courier: Courier
    ledger: Ledger
    children: list[Child]

    def state(self, server: str) -> str:
        return Breakers(self.ledger.client).states([server])[server].name


@pytest.fixture(scope="module")
def three_workers(redis_server, sandbox_server, tmp_path_factory) -> Iterator[GuardedWorkers]:
    redis_server.flush()
    with Processes(tmp_path_factory.mktemp("three")) as running:
        tree = {
            "servers": [{**server, "max_concurrency": LIMIT} for server in sandbox_server.servers()],
            "queue": parts.queue_settings(redis_server),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": {"sweep_s": 0.2, "backoff_base_s": 0.2, "backoff_cap_s": 0.5, "max_attempts": 6, "lease_s": 4},
            "breaker": {"pause_s": PAUSE_S, "pause_cap_s": PAUSE_S},
        }
        config = parts.write_settings(running.folder / "pacs.toml", tree)
        children = [parts.worker(running, config, name=f"worker{number}") for number in range(3)]
        for child in children:
            child.wait_ready()
        settings = Settings.load({"PACS_CONFIG": str(config)})
        with Courier(settings) as courier:
            yield GuardedWorkers(courier, Ledger.connect(settings.queue.ledger_url), children)
        for child in children:
            child.signal(signal.SIGTERM)
        for child in children:
            child.stop(grace_s=15)
            assert "Traceback (most recent call last)" not in child.log, child.log_tail(60)


@pytest.fixture
def fleet(three_workers, sandbox) -> GuardedWorkers:
    return three_workers


def images_on(url: str) -> int:
    answer = requests.get(f"{url}/instances?limit=200", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def test_no_more_requests_are_in_flight_than_all_workers_together_may_have(fleet, sandbox, image_server):
    for dialect in ("msdicom", "dcm4chee"):
        sandbox.set_fault(dialect, "*", latency_ms=60)
    sandbox.load(anew=True)
    payloads, at_work = [], []
    while len(at_work) < 3 and len(payloads) < 400:  # on a busy machine the first forty may all be done by two of them
        urls = [image_server.put(f"{number}.dcm", image(new_uid())) for number in range(40)]
        handles = [fleet.courier.upload(url) for url in urls]
        payloads += [handle.result(timeout_s=WAIT_S) for handle in handles]
        at_work = [child for child in fleet.children if "Done after" in child.log]
    assert len(at_work) == 3
    assert {payload["status"] for payload in payloads} == {"stored"}
    most = {name: load["most"] for name, load in sandbox.load().items()}
    assert most == {"msdicom": LIMIT, "dcm4chee": LIMIT}
    sandbox.reset_faults()
    assert images_on(sandbox.msdicom) == min(len(payloads), 200), "a page of MSDICOM's has no more"


def test_a_stream_holds_its_place_until_it_is_closed(fleet, sandbox, put):
    study = new_uid()
    put(sandbox.msdicom, image(study))
    sandbox.set_fault("msdicom", "metadata", drip_bytes_per_s=1500)
    sandbox.load(anew=True)
    handles = [fleet.courier.metadata("study", study, mode="msdicom") for _ in range(8)]
    assert {handle.result(timeout_s=WAIT_S)["server_name"] for handle in handles} == {"msdicom"}
    assert sandbox.load()["msdicom"]["most"] == LIMIT


def test_the_circuit_of_a_sick_server_is_open_for_all_and_its_jobs_go_on_when_it_is_well(
    fleet, sandbox, image_server, put
):
    elsewhere = new_uid()
    put(sandbox.dcm4chee, image(elsewhere))
    sandbox.set_fault("msdicom", "*", status=503)
    handles = [fleet.courier.upload(image_server.put(f"{number}.dcm", image(new_uid()))) for number in range(12)]
    assert poll(lambda: fleet.ledger.parked() == {"msdicom": 12}, timeout_s=WAIT_S), fleet.ledger.parked()
    report = next(iter(fleet.courier.watch(handles[:1], timeout_s=WAIT_S)))[1]
    assert (handles[0].status(), report.stage) == ("waiting", "waiting")

    sandbox.load(anew=True)
    begun = time.monotonic()
    found = fleet.courier.exists("study", elsewhere).result(timeout_s=WAIT_S)
    assert [entry["status"] for entry in found["servers"]] == ["unavailable", "found"]
    with pytest.raises(PacsUnavailable):
        fleet.courier.exists("study", new_uid()).result(timeout_s=WAIT_S)
    time.sleep(2)
    load, lasted_s = sandbox.load()["msdicom"], time.monotonic() - begun
    assert load["most"] == 1, "one probe over all workers"
    assert 1 <= load["total"] <= lasted_s / (0.75 * PAUSE_S) + 1

    handles[0].cancel()
    with pytest.raises(Cancelled):
        handles[0].result(timeout_s=WAIT_S)

    sandbox.reset_faults()
    payloads = [handle.result(timeout_s=WAIT_S) for handle in handles[1:]]
    assert {payload["server_name"] for payload in payloads} == {"msdicom"}
    assert max(payload["attempts"] for payload in payloads) <= 3
    assert (images_on(sandbox.msdicom), fleet.ledger.parked(), fleet.state("msdicom")) == (11, {}, "closed")


def test_a_killed_worker_neither_keeps_its_places_nor_lets_others_exceed_the_bound(fleet, sandbox, image_server):
    """It leaves two workers."""
    for dialect in ("msdicom", "dcm4chee"):
        sandbox.set_fault(dialect, "*", latency_ms=100)
    sandbox.load(anew=True)
    handles = [fleet.courier.upload(image_server.put(f"{number}.dcm", image(new_uid()))) for number in range(30)]
    assert poll(lambda: sandbox.load()["msdicom"]["now"] == LIMIT, timeout_s=WAIT_S)
    fleet.children[0].kill()
    assert {handle.result(timeout_s=WAIT_S)["status"] for handle in handles} == {"stored"}
    assert {load["most"] for load in sandbox.load().values()} == {LIMIT}

    def most_at_once() -> int:
        sandbox.load(anew=True)
        more = [fleet.courier.upload(image_server.put(f"{new_uid()}.dcm", image(new_uid()))) for _ in range(12)]
        assert {handle.result(timeout_s=WAIT_S)["status"] for handle in more} == {"stored"}
        return int(sandbox.load()["msdicom"]["most"])

    # All places are free again once the lease of the dead one is over, and never more than all.
    rounds: list[int] = []
    assert poll(lambda: rounds.append(most_at_once()) or rounds[-1] == LIMIT, timeout_s=WAIT_S), rounds
    assert max(rounds) == LIMIT


def test_slow_down_is_heeded_by_all(fleet, sandbox, image_server):
    """The last test here: for a while the server gets fewer requests than it could take at once."""
    sandbox.set_fault("msdicom", "query", status=429, retry_after_s=3, times=1)
    first = fleet.courier.upload(image_server.put("first.dcm", image(new_uid())))
    rates = ServerRates(fleet.ledger.client)
    assert poll(lambda: rates.read(["msdicom"])["msdicom"].held_s > 0, timeout_s=WAIT_S)
    assert fleet.state("msdicom") == "closed"
    sandbox.load(anew=True)
    time.sleep(1)  # by now all processes know
    others = [fleet.courier.upload(image_server.put(f"{number}.dcm", image(new_uid()))) for number in range(6)]
    time.sleep(1)
    assert sandbox.load()["msdicom"]["total"] == 0
    for handle in (first, *others):
        assert handle.result(timeout_s=WAIT_S)["attempts"] == 1
