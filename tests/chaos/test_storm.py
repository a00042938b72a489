"""Many uploads over several workers of both pools, one of which dies every second or so: all end truthfully."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest

from producer import Courier
from sandbox.synthetic import new_uid
from tests.chaos.crew import QUICK, children_of, send
from tests.chaos.judge import Picture, check_invariant

POOLS = ("threads", "threads", "threads", "processes")
IMAGES_PER_STUDY = 5
TIMES = {**QUICK, "lease_s": 3}
#: What may pass between the last death and the last end: a lease, or the grace period of a message that died with its
#: worker, and a sweep; then the wait of those that may not die again, and the work that is left.
AFTERWARDS_S = max(TIMES["lease_s"], TIMES["grace_s"]) + TIMES["sweep_s"] + 8
#: For a machine that has other things to do.
ROOM_S = 40


class Storm:
    """Four workers, of which one ends every second or so, if half of them are ready, and is started again."""

    def __init__(self, crew, rng):
        self._crew, self._rng = crew, rng
        self._workers = [self._start(pool) for pool in POOLS]
        self._next_s = time.monotonic()
        self.ends: Counter[str] = Counter()
        self.last_s = time.monotonic()

    def _start(self, pool):
        return self._crew.start(pool=pool, concurrency=4, wait=False, jobs=TIMES, routing={"policy": "balanced"})

    def blow(self):
        """Start again what has ended; let one end, if it is time."""
        for place, worker in enumerate(self._workers):
            if not worker.alive:
                self._workers[place] = self._start(POOLS[place])
        ready = [place for place, worker in enumerate(self._workers) if f"{worker.name}@courier ready." in worker.log]
        if len(ready) >= len(POOLS) // 2 and time.monotonic() >= self._next_s:
            self._strike(self._rng.choice(ready))
            self._next_s = time.monotonic() + self._rng.uniform(0.5, 1.5)

    def calm(self):
        """Nobody else dies; workers that have are started again."""
        self._next_s = float("inf")
        self.blow()

    def _strike(self, place):
        worker, kind = self._workers[place], self._rng.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGKILL of a child"])
        children = children_of(worker.pid)
        if kind == "SIGKILL of a child" and children:
            send(self._rng.choice(children), signal.SIGKILL)
        elif kind == "SIGTERM":
            send(worker.pid, signal.SIGTERM)
        else:
            kind = "SIGKILL"
            worker.signal(signal.SIGKILL)
        self.ends[kind] += 1
        self.last_s = time.monotonic()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_uploads_in_a_storm_of_dying_workers_all_end_once(crew, sandbox, image_server, guarantee, full, seed):
    count, rng = 1000 if full else 200, random.Random(seed)
    sandbox.set_fault("msdicom", "*", latency_ms=[5, 60])
    sandbox.set_fault("dcm4chee", "*", latency_ms=[5, 60])
    orders = {}
    with Courier(crew.loaded(jobs=TIMES)) as courier:
        for number in range(count // IMAGES_PER_STUDY):
            study = new_uid()
            for image in range(IMAGES_PER_STUDY):
                picture = Picture.new(study)
                orders[courier.upload(image_server.put(f"{number}/{image}.dcm", picture.body))] = picture
        begun_s = time.monotonic()
        storm, still_open = Storm(crew, rng), {handle.id for handle in orders}
        while len(still_open) > count // 20:
            assert time.monotonic() - begun_s < (600 if full else 150), f"{len(still_open)} of {count} are open"
            storm.blow()
            still_open = {job_id for job_id, report in courier.reports(still_open).items() if not report.over}
            time.sleep(0.2)
        storm.calm()
        reports = check_invariant(orders, courier, sandbox, timeout_s=AFTERWARDS_S + ROOM_S, dead=["poisoned"])
        ended_s = time.monotonic()
    ends = Counter(report.error.code if report.error else "stored" for report in reports.values())
    attempts = Counter(report.result["attempts"] for report in reports.values() if report.result)
    print(ends, attempts, storm.ends, f"{ended_s - begun_s:.0f} s")
    assert sum(storm.ends.values()) >= count / 50
    assert max(attempts) > 1, "nobody died at work"
    assert ends["poisoned"] <= count // 10, "none of them killed a worker"
    fault = f"{count} uploads, 4 workers, {sum(storm.ends.values())} deaths"
    outcome = ", ".join(f"{number} {end}" for end, number in sorted(ends.items(), reverse=True))
    area = "workers die all the time"
    guarantee.row(area=area, fault=fault, point="all of it", outcome=outcome, recovery_s=ended_s - begun_s)
    tail_s = ended_s - storm.last_s
    guarantee.row(area=area, fault=fault, point="after the last death", outcome="the rest ended", recovery_s=tail_s)
