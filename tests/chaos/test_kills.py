"""A worker dies, in every way and at every point of an upload: the job ends once and truthfully, in bounded time."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from courier.ledger.jobs import job_id_for
from producer import Courier
from sandbox.processes import poll
from tests.chaos.crew import children_of, send
from tests.chaos.judge import DIALECTS, Picture, check_invariant, kept
from tests.chaos.points import ANSWER_UNREAD, IDLE, STOPS

WAIT_S = 90
#: Larger than what is read or sent at a time, so that there is a middle.
SIDE = 700


@dataclass(frozen=True)
class KillFault:
    """How a worker ends. ``strike`` gets its pid and those of the processes that do the stopped jobs."""

    name: str
    pool: str
    strike: Callable[[int, set[int]], None]
    goes_on: bool = False  # the stopped jobs may end where they are
    survives: bool = False  # the worker starts other children
    seldom: bool = False  # in `make chaos` alone


def kill_children(_: int, pids: set[int]) -> None:
    for pid in pids:
        send(pid, signal.SIGKILL)


def kill_all(main: int, _: set[int]) -> None:
    """The machine is gone: the main process first, or it would start new children."""
    children = children_of(main)
    for pid in (main, *children):
        send(pid, signal.SIGKILL)


def kill_main(main: int, _: set[int]) -> None:
    send(main, signal.SIGKILL)


def ask(main: int, _: set[int]) -> None:
    send(main, signal.SIGTERM)


def ask_all(main: int, _: set[int]) -> None:
    """As a service manager does that signals all processes of a unit."""
    for pid in (*children_of(main), main):
        send(pid, signal.SIGTERM)


def hurry(main: int, _: set[int]) -> None:
    send(main, signal.SIGQUIT)


FAULTS = (
    KillFault("SIGKILL of the child (prefork)", "processes", kill_children, survives=True),
    KillFault("SIGKILL of the worker (threads)", "threads", kill_main),
    KillFault("SIGKILL of all its processes (prefork)", "processes", kill_all, seldom=True),
    KillFault("SIGKILL of the main process alone (prefork)", "processes", kill_main, goes_on=True),
    KillFault("SIGTERM (threads)", "threads", ask, goes_on=True, seldom=True),
    KillFault("SIGTERM (prefork)", "processes", ask, goes_on=True, seldom=True),
    KillFault("SIGTERM to every process (prefork)", "processes", ask_all, goes_on=True),
    KillFault("soft shutdown that is too short (threads)", "threads", hurry),
    KillFault("soft shutdown that is too short (prefork)", "processes", hurry, seldom=True),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=[pytest.mark.full] if fault.seldom else []) for fault in FAULTS],
)
def test_a_worker_that_ends_at_any_point_of_an_upload_leaves_a_job_that_ends_once(
    fault, crew, stops, sandbox, image_server, guarantee, is_running
):
    doomed = crew.start(pool=fault.pool, concurrency=len(STOPS), stops=True, environ={"CHAOS_SOFT_SHUTDOWN_S": "1"})
    orders, points = {}, {}
    with Courier(crew.loaded()) as courier:
        for number, point in enumerate(STOPS):
            picture = Picture.new(side=SIDE)
            key = picture.sop
            stops.at(job_id_for(key), point)
            url = image_server.put(f"{number}.dcm", picture.body)
            server = DIALECTS[(number + FAULTS.index(fault)) % 2]
            handle = courier.upload(url, idempotency_key=key, server=server)
            orders[handle], points[handle.id] = picture, point
        reached = stops.reached(count=len(STOPS), timeout_s=WAIT_S)
        answered = next(picture.sop for handle, picture in orders.items() if points[handle.id] == ANSWER_UNREAD)
        assert poll(lambda: answered in {one.sop for one in kept(sandbox)}, timeout_s=WAIT_S)
        crew.start()
        children = children_of(doomed.pid)
        fault.strike(doomed.pid, {one.pid for one in reached})
        struck_s = time.monotonic()
        picture = Picture.new()
        handle = courier.upload(image_server.put("idle.dcm", picture.body))
        orders[handle], points[handle.id] = picture, IDLE
        if fault.goes_on:
            time.sleep(0.5)
            stops.go(points)
        ended_s = {handle.id: time.monotonic() for handle, _ in courier.as_completed(orders, timeout_s=WAIT_S)}
        assert {points[i] for i in points} == {points[i] for i in ended_s}
        print({points[i]: round(t - struck_s, 2) for i, t in ended_s.items()})
        reports = check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
    assert poll(lambda: doomed.alive is fault.survives, timeout_s=WAIT_S)
    assert poll(lambda: not any(map(is_running, children)), timeout_s=WAIT_S), "its children outlive it"
    for handle in orders:
        guarantee.row(
            area="a worker ends",
            fault=fault.name,
            point=points[handle.id],
            outcome=reports[handle].result["status"],
            recovery_s=ended_s[handle.id] - struck_s,
        )
