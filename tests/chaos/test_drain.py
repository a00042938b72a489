"""Jobs that waited for servers are released in line: a look-up comes in between, and a worker is killed."""

from __future__ import annotations

import time

import pytest

from producer import Courier
from producer.errors import NotFound
from sandbox.processes import poll
from sandbox.synthetic import new_uid
from tests.chaos.crew import QUICK
from tests.chaos.judge import DIALECTS, Picture, check_invariant

TIMES = {**QUICK, "max_attempts": 100}
BREAKER = {"failures": 2, "pause_s": 0.3, "pause_cap_s": 0.3}
SLOTS = 4
#: For a machine that has other things to do.
ROOM_S = 90


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_is_killed_while_waiting_jobs_are_released(crew, sandbox, image_server, guarantee, full):
    count = 1000 if full else 80
    for dialect in DIALECTS:
        sandbox.set_fault(dialect, "*", refuse=True)
    workers = [crew.start(concurrency=SLOTS, jobs=TIMES, breaker=BREAKER) for _ in range(2)]
    most, orders = 0, {}
    with Courier(crew.loaded(jobs=TIMES)) as courier:
        ledger = courier.ledger
        for number in range(count):
            picture = Picture.new()
            orders[courier.upload(image_server.put(f"{number}.dcm", picture.body))] = picture
        ids = [handle.id for handle in orders]

        def states(state):
            return [job_id for job_id, one in ledger.standing(ids).items() if one.state == state]

        def some_are_done():
            nonlocal most
            most = max(most, courier.queue_depths()["pacs.due"])
            return len(states("done")) >= 5

        assert poll(lambda: len(states("waiting")) > 0.9 * count, timeout_s=ROOM_S), "not all of them wait"
        sandbox.reset_faults()
        assert poll(some_are_done, timeout_s=ROOM_S)
        with pytest.raises(NotFound):
            courier.exists("study", new_uid()).result(timeout_s=ROOM_S)
        still_open = count - len(states("done"))
        assert still_open > 0, "the look-up waited for the end of the line"
        workers[0].kill()
        begun_s = time.monotonic()
        check_invariant(orders, courier, sandbox, timeout_s=ROOM_S + count / 5)
        ended_s = time.monotonic()
        assert most <= 2 * SLOTS
        assert ledger.waiting_in_line() == 0
    fault = f"{count} uploads that waited for both servers are released; one of two workers is killed"
    outcome = (
        f"each stored once, {most} messages in their queue at most; a look-up was answered before the last {still_open}"
    )
    print(outcome, f"{ended_s - begun_s:.1f} s")
    guarantee.row(
        area="workers die all the time",
        fault=fault,
        point="in the middle",
        outcome=outcome,
        recovery_s=ended_s - begun_s,
    )
