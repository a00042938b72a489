"""How many calls to the ledger's Redis one upload costs its worker: counted with MONITOR on a real Redis.

Celery's own calls (queue, acknowledgement, result, events) go to other databases. What a worker does at intervals,
whether or not it has jobs, falls into some of the uploads' windows and not into others: the quietest one counts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from courier.ledger.breakers import Breakers
from courier.ledger.jobs import Ledger
from courier.ledger.slots import Slots
from producer import Courier
from sandbox.images import ImageServer
from sandbox.processes import HOST, RedisPart, poll
from sandbox.synthetic import image, new_uid
from tests.journey.conftest import Steady
from worker.pacs.server_rates import ServerRates

WAIT_S = 30
UPLOADS = 8
#: What an upload may cost a busy worker. One that was idle leases slots of its servers first, by one call.
MOST_CALLS = 6
#: The sweeper's, ten times a second.
SWEEP = {"Ledger.wake", "Ledger.sweep", "Ledger.in_hand", "ZCARD", "ZRANGE", "TIME"}


class Monitor:
    """Every command that a Redis is sent while it runs, as (port of the client, database, name, arguments)."""

    def __init__(self, redis: RedisPart) -> None:
        self._redis, self._seen, self._ready = redis, [], threading.Event()
        self._names = _names(redis)
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        with Redis(host=HOST, port=self._redis.port) as client:
            client.echo("the end")
        self._thread.join(WAIT_S)

    def _listen(self) -> None:
        with Redis(host=HOST, port=self._redis.port, decode_responses=True) as client, client.monitor() as monitor:
            self._ready.set()
            for said in monitor.listen():
                words = said["command"].split(" ")
                if words[:3] == ["ECHO", "the", "end"]:
                    return
                if said["client_type"] != "lua":
                    name = self._names.get(words[1], words[1]) if words[0] == "EVALSHA" else words[0]
                    self._seen.append((said["client_port"], int(said["db"]), name, said["command"]))

    def commands(self) -> list[tuple[str, int, str, str]]:
        return list(self._seen)


def _names(redis: RedisPart) -> dict[str, str]:
    """The scripts of the ledger by their digests, each called as the method that runs it."""
    ledger = Ledger.connect(redis.ledger_url)
    owners: list[Any] = [ledger, Breakers(ledger.client), Slots(ledger.client), ServerRates(ledger.client)]
    return {
        script.sha: f"{type(owner).__name__}.{name.strip('_')}"
        for owner in owners
        for name, script in vars(owner).items()
        if hasattr(script, "sha")
    }


def database(url: str) -> int:
    return int(url.rpartition("/")[2])


def calls_of(job_id: str, monitor: Monitor, ledger: int) -> list[str]:
    """What the worker asked of the ledger from the moment in which it took the job until it had noted its end; [] until
    Redis has said so.
    """
    commands = [one for one in monitor.commands() if one[1] == ledger]
    ours = [number for number, one in enumerate(commands) if job_id in one[3]]
    program = {commands[number][0] for number in ours if commands[number][2] == "Ledger.submit"}
    begun = next((number for number in ours if commands[number][2] == "Ledger.take"), 0)
    ended = next((number for number in ours if commands[number][2] == "Ledger.finish"), None)
    if ended is None:
        return []
    window = [one for one in commands[begun : ended + 1] if one[0] not in program and one[2] not in SWEEP]
    told = [commands[number] for number in ours if number > ended and commands[number][2] == "Ledger.published"]
    return [name for _, _, name, _ in window + told]


@pytest.fixture
def run(
    steady: Steady, courier: Courier, image_server: ImageServer, redis_server: RedisPart
) -> Callable[[str], list[list[str]]]:
    """Uploads images one after another; the calls of each. ``study``: that of all of them, or "" for one each."""

    def upload_all(study: str) -> list[list[str]]:
        ledger = database(redis_server.ledger_url)
        with Monitor(redis_server) as monitor:
            handles = []
            for number in range(UPLOADS):
                url = image_server.put(f"{number}.dcm", image(study or new_uid()))
                handles.append(courier.upload(url))
                handles[-1].result(timeout_s=WAIT_S)
            last = handles[-1].id
            assert poll(lambda: "Ledger.published" in calls_of(last, monitor, ledger), timeout_s=WAIT_S)
            counted = [calls_of(handle.id, monitor, ledger) for handle in handles]
        results = database(redis_server.result_backend)
        pings = [name for _, db, name, _ in monitor.commands() if db == results and name == "PING"]
        assert not pings, "each result is stored without asking first whether Redis is there"
        return counted

    for _ in range(8):  # connections of all threads
        courier.upload(image_server.put("first.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
    return upload_all


@pytest.mark.parametrize("known", [False, True], ids=["new study", "known study"])
def test_an_upload_costs_no_more_calls_to_the_ledger_than_it_has_steps_to_guard(run, known):
    study = new_uid() if known else ""
    if known:
        run(study)
    uploads = run(study)
    print({name: count for name, count in Counter(min(uploads, key=len)).items()})
    assert len(min(uploads, key=len)) <= MOST_CALLS, uploads
