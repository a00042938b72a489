"""When a worker gets nowhere, and when it only looks so. No Celery is here."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from worker.runtime.health import verdict
from worker.runtime.watchdog import Complaint, HealthReport, Progress, Signs, Watchdog, times_woken, write

LIMIT_S, HUNG_S, EVERY_S = 60.0, 600.0, 10.0


def signs(**changed: object) -> Signs:
    usual: dict[str, object] = {"turns": 1, "taken": 5, "worked": 9, "slots": 2, "busy": 0, "waiting": 0}
    return Signs(**(usual | changed))  # type: ignore[arg-type]


def find_last_complaint(story: list[Signs]) -> Complaint | None:
    progress = Progress(LIMIT_S, HUNG_S, gap_s=20.0)
    complaint = None
    for number, look in enumerate(story):
        complaint = progress.find_complaint(look, now_s=number * EVERY_S)
    return complaint


def turning(count: int, **changed: object) -> list[Signs]:
    return [signs(turns=number, **changed) for number in range(count)]


@pytest.mark.parametrize(
    "story",
    [
        turning(100),
        turning(100, busy=2, waiting=50, worked=None),
        [signs(turns=n, busy=2, waiting=50, worked=n) for n in range(100)],
        [signs(turns=n, busy=1, waiting=50, taken=n // 3) for n in range(100)],
        [signs(turns=None) for _ in range(100)],
        [signs(waiting=None) for _ in range(100)],
        [signs(stopping=True, waiting=3) for _ in range(100)],
        [signs(turns=n, waiting=n % 3) for n in range(100)],
        turning(50, busy=2, worked=7),
    ],
    ids=[
        "idle",
        "all slots busy, where nobody counts what they do",
        "all slots at work",
        "slow, but it takes some",
        "no loop",
        "the broker is away for all",
        "it stops",
        "its queue is empty now and then",
        "its slots wait for a slow server",
    ],
)
def test_a_worker_that_gets_on_or_has_an_excuse_is_never_ended(story: list[Signs]) -> None:
    complaint = find_last_complaint(story)
    assert complaint is None or not complaint.fatal


@pytest.mark.parametrize(
    ("story", "words"),
    [
        ([signs() for _ in range(7)], "loop has not turned for 60 s"),
        (turning(7, waiting=1, busy=1), "taken no message"),
        (turning(61, busy=2), "none of its slots"),
    ],
)
def test_each_way_to_be_stuck_is_found_after_its_own_time_and_not_before(story: list[Signs], words: str) -> None:
    complaint, earlier = find_last_complaint(story), find_last_complaint(story[:-1])
    assert complaint is not None
    assert complaint.fatal
    assert words in str(complaint)
    assert earlier is not None
    assert not earlier.fatal


def test_what_was_missing_while_the_broker_was_away_is_not_held_against_the_worker() -> None:
    story = [*([signs()] * 6), signs(waiting=None), *([signs()] * 6)]
    complaint = find_last_complaint(story)
    assert complaint is not None
    assert not complaint.fatal


def test_a_process_that_was_suspended_begins_anew() -> None:
    progress = Progress(LIMIT_S, HUNG_S, gap_s=20.0)
    for now_s in (0.0, 10.0, 20.0, 5000.0):
        complaint = progress.find_complaint(signs(), now_s=now_s)
    assert complaint is None


def test_the_watchdog_ends_a_stuck_process_and_says_so_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[HealthReport] = []
    ended: list[bool] = []
    monkeypatch.setattr("worker.runtime.watchdog.faulthandler.dump_traceback_later", lambda *_, **__: None)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("worker.runtime.watchdog.time.monotonic", lambda: next(clock))
    for watchdog_s in (60.0, 0.0):
        told.clear()
        dog = Watchdog(signs, watchdog_s=watchdog_s, hung_s=1, publish=told.append, end=lambda: ended.append(True))
        dog._progress.gap_s = 1000
        for _ in range(15):
            dog._once()
        assert told[0].ok
        assert not told[-1].ok
    assert ended, "with watchdog_s = 60"
    assert len(ended) < 15, "and never with 0"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts how often a thread wakes")
def test_a_thread_that_works_is_told_from_one_that_hangs() -> None:
    release, go_on = threading.Event(), threading.Event()
    hanging = threading.Thread(target=release.wait, name="ThreadPoolExecutor-0_0", daemon=True)

    def turn() -> None:
        while not go_on.wait(0.01):
            pass

    background = threading.Thread(target=turn, name="sweeper", daemon=True)
    hanging.start()
    background.start()
    others = {thread.native_id for thread in threading.enumerate()}
    assert others

    def woken() -> int:
        return times_woken() or 0

    try:
        counts = set()
        for _ in range(5):
            threading.Event().wait(0.05)
            counts.add(woken())
        assert len(counts) <= 2, "the background turns all the time"
        before = woken()
        release.set()
        hanging.join(5)
        working = threading.Thread(target=turn, name="ThreadPoolExecutor-0_1", daemon=True)
        working.start()
        threading.Event().wait(0.2)
        first = woken()
        threading.Event().wait(0.2)
        assert woken() > first
        assert before
    finally:
        release.set()
        go_on.set()


def test_a_health_check_judges_what_the_worker_said_last(tmp_path: Path) -> None:
    path = tmp_path / "health"
    assert verdict(path, now_s=0)[0] is False
    write(path, HealthReport(True, "", 10.0))
    at = json.loads(path.read_text())["at"]
    assert verdict(path, now_s=at + 20)[0] is True
    assert verdict(path, now_s=at + 100) == (
        False,
        "The worker said nothing for 100 s: it is gone, or its process is stuck.",
    )
    write(path, HealthReport(False, "its loop has not turned for 130 s", 10.0))
    ok, sentence = verdict(path, now_s=at)
    assert not ok
    assert "its loop has not turned" in sentence
    path.write_text("?")
    assert verdict(path, now_s=0)[0] is False
    assert list(tmp_path.iterdir()) == [path], "nothing half-written stays"
