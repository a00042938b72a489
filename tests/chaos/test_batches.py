"""Batches whose workers, planners and Redis are killed again and again: each item is done once, and none is forgotten.

The items are those of ``benchmarks/noop.py``: what is done to one is a line in a file, so twice would be two lines. As
a real kind asks its server, it looks there whether what an earlier attempt may have done has been done.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter

import pytest

from benchmarks.listing import listed
from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches
from courier.messages import BatchOrderJob
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes

WAIT_S = 120
ITEMS = 5_000
JOBS = {"lease_s": 1, "grace_s": 1, "sweep_s": 0.1, "max_deaths": 40, "backoff_base_s": 0.1, "backoff_cap_s": 0.5}
#: Plans slowly, as one who reads a long list over a slow line.
PLANNER = """
import sys, time
from benchmarks.listing import listed
from producer import Courier
from courier.batches.store import Batches
from courier.batches.planner import Planned, Planner
with Courier() as courier, Planner(Batches(courier.ledger), sys.argv[1]) as planner:
    for number in range(int(sys.argv[2])):
        planner.add(Planned(listed(number)))
        time.sleep(0.0002)
    planner.freeze()
"""


class Field:
    """A Redis and workers that know the kind that does nothing; all of them can be killed and come back."""

    def __init__(self, children, folder, **jobs):
        self.children, self.folder = children, folder
        self.log = folder / "done"
        self.redis = parts.redis(children)
        self.jobs = {**JOBS, **jobs}
        self.config = self.configure("here", "there")
        self.environ = {"NOOP_LOG": str(self.log), "NOOP_GROUP": "10", "NOOP_SLEEP_S": "0.06"}
        self.workers = {}

    def configure(self, *servers):
        tree = {
            "servers": [{"name": name, "type": "dicomweb", "url": "http://127.0.0.1:9/dicom-web"} for name in servers],
            "queue": parts.queue_settings(self.redis),
            "jobs": self.jobs,
        }
        return parts.write_settings(self.folder / "pacs.toml", tree)

    @property
    def settings(self):
        return Settings.load({"PACS_CONFIG": str(self.config)})

    def work(self, name, **environ):
        """Start a worker, or another one of that name."""
        environ = {**self.environ, **environ}
        options = ["-I", "benchmarks.noop"]
        self.workers[name] = parts.worker(
            self.children, self.config, name=name, concurrency=4, options=options, environ=environ
        )
        return self.workers[name]

    def kill(self, name):
        self.workers[name].kill()

    def kill_redis(self):
        self.redis.child.kill()
        self.redis = parts.redis(self.children, port=self.redis.port)

    def plan(self, courier, batch_id, items, *, concurrency=4, **order):
        batches = Batches(courier.ledger)
        batches.open(batch_id, kind="noop", order=order, concurrency=concurrency)
        with Planner(batches, batch_id) as planner:
            planner.add_all(items)
            planner.freeze()
        return courier.enqueue("pacs.batch.noop", BatchOrderJob, {"planned": True}, job_id=batch_id)

    def done(self):
        return Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter()


@pytest.fixture
def field(tmp_path):
    with Processes(tmp_path / "children") as children:
        yield Field(children, tmp_path)


def until(condition, timeout_s=WAIT_S):
    assert parts.poll(condition, timeout_s=timeout_s, every_s=0.05)


def kill_a_planner(field, courier, batch_id):
    """One that has written a part of its plan."""
    Batches(courier.ledger).open(batch_id, kind="noop", order={}, concurrency=4)
    environ = {**os.environ, "PACS_CONFIG": str(field.config)}
    planner = subprocess.Popen([sys.executable, "-c", PLANNER, batch_id, str(ITEMS)], env=environ)
    until(lambda: courier.ledger.client.keys(f"courier:batch:{batch_id}:plan:*"))
    planner.send_signal(signal.SIGKILL)
    planner.wait()
    assert not courier.batch.get(batch_id).frozen


def kill_until_applied(field, courier, batch_id, dice):
    """Kill somebody each time 400 more items are done; how often."""
    kills = 0
    while courier.batch.get(batch_id).of("apply").ended_ms is None:
        enough = min(ITEMS, len(field.done()) + 400)
        until(lambda enough=enough: len(field.done()) >= enough)
        time.sleep(dice.uniform(0, 0.3))
        victim = dice.choice(["one", "other", "redis"]) if kills % 4 else "redis"
        if victim == "redis":
            field.kill_redis()
        else:
            field.kill(victim)
            field.work(victim).wait_ready()
        kills += 1
    return kills


def test_a_batch_whose_planner_workers_and_redis_are_killed_again_and_again_does_each_item_once(field, guarantee, seed):
    batch_id = str(uuid.uuid4())
    begun_s = time.monotonic()
    with Courier(field.settings) as courier:
        kill_a_planner(field, courier, batch_id)
        handle = field.plan(courier, batch_id, (Planned(listed(number)) for number in range(ITEMS)))
        for name in ("one", "other"):
            field.work(name)
        kills = kill_until_applied(field, courier, batch_id, random.Random(seed))
        end = handle.result(timeout_s=WAIT_S)
        assert (end["state"], end["totals"]) == ("done", {"stored": ITEMS})
        assert end["passes"]["verify"]["totals"] == {"verified": ITEMS}
        rows = list(courier.batch.report(batch_id))
    assert [row["item"] for row in rows] == [listed(number) for number in range(ITEMS)]
    done = field.done()
    assert (len(done), set(done.values())) == (ITEMS, {1})
    assert kills >= 4
    assert not any("Unrecoverable error" in worker.log for worker in field.workers.values())
    guarantee.row(
        area="batch",
        fault=f"the planner is killed once, then workers and Redis {kills} times",
        point=f"a batch of {ITEMS:,} items",
        outcome="each item is done once, none is forgotten",
        recovery_s=time.monotonic() - begun_s,
    )


def test_a_worker_killed_while_it_lists_leaves_the_plan_to_the_next_and_no_item_comes_twice(field, guarantee):
    field.work("one", NOOP_LISTS="3000", NOOP_LIST_S="0.5", NOOP_SLEEP_S="0")
    with Courier(field.settings) as courier:
        handle = courier.enqueue("pacs.batch.noop", BatchOrderJob, {"verify": False})
        until(lambda: courier.ledger.client.keys(f"courier:batch:{handle.id}:plan:*"))
        field.kill("one")
        begun_s = time.monotonic()
        assert not courier.batch.get(handle.id).frozen
        field.work("other", NOOP_LISTS="3000", NOOP_SLEEP_S="0")
        end = handle.result(timeout_s=WAIT_S)
        assert (end["items"], end["totals"]) == (3000, {"stored": 3000})
        assert len(courier.ledger.client.keys(f"courier:batch:{handle.id}:plan:*")) == 1
    assert set(field.done().values()) == {1}
    guarantee.row(
        area="batch",
        fault="the worker that lists is killed",
        point="a third of the plan is written",
        outcome="the next worker lists anew, no item comes twice",
        recovery_s=time.monotonic() - begun_s,
    )


def test_an_item_that_kills_its_worker_and_a_server_that_is_gone_cost_nobody_else(tmp_path, guarantee):
    with Processes(tmp_path / "children") as children:
        field = Field(children, tmp_path, max_deaths=3)
        items = [Planned(f"{number}", "there" if number % 2 else "here") for number in range(300)]
        items[106] = Planned("106!kill", "here")
        begun_s = time.monotonic()
        with Courier(field.settings) as courier:
            handle = field.plan(courier, str(uuid.uuid4()), items, verify=False, concurrency=1)
            for deaths in range(4):
                field.work("one")
                if deaths < 3:
                    until(lambda: not field.workers["one"].alive)
                if deaths == 2:
                    field.config = field.configure("here")
                    courier.ledger.client.zrem(courier.ledger.key("servers"), "there")  # as a minute does
            end = handle.result(timeout_s=WAIT_S)
            assert (end["state"], end["totals"]) == ("done", {"stored": 249, "failed": 51})
            failed = [row for row in courier.batch.report(handle.id) if row["status"] == "failed"]
            (poisoned,) = [row for row in failed if row["code"] == "poisoned"]
            assert poisoned["item"] == "106!kill"
            gone = [row for row in failed if row is not poisoned]
            assert {(row["code"], row["server_name"]) for row in gone} == {("invalid_request", "there")}
            assert all("put it back into the settings, then retry the batch" in row["message"] for row in gone)
            assert [int(row["item"]) for row in gone] == list(range(201, 300, 2))
            assert set(field.done().values()) == {1}
    guarantee.row(
        area="batch",
        fault="an item kills three workers; a server is taken out of the settings",
        point="a batch of 300 items (max_deaths = 3)",
        outcome="that item, and what is open of that server, fail with code and sentence; the batch goes on",
        recovery_s=time.monotonic() - begun_s,
    )
