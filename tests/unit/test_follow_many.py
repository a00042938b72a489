"""What is shown of many jobs while a command waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest

from producer.cli import tables
from producer.errors import CourierError
from producer.handle import Handle, Report


class Jobs:
    """A courier that answers at once: each job is fetched, then done, or it failed."""

    def __init__(self, count: int) -> None:
        self.handles = {Handle(str(number), cast(Any, self)): "url" for number in range(count)}

    def watch(self, jobs: Mapping[Handle, str], timeout_s: float | None) -> Iterator[tuple[Handle, Report]]:
        for handle in jobs:
            yield handle, Report("running", "fetch")
        for number, handle in enumerate(jobs):
            failed = number % 3 == 0
            yield handle, Report("failed", "failed", error=CourierError("No.")) if failed else Report("done", "done")


def test_the_last_report_of_each_is_given_back_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr(tables.Progress, "update", lambda *_, **line: lines.append(tuple(line.values())))
    jobs = Jobs(3)
    last = tables.follow(cast(Any, jobs), jobs.handles, timeout_s=None, quiet=True)
    assert [report.status for report in last.values()] == ["failed", "done", "done"]
    assert lines == [
        (0, "2 queued, 1 fetch"),
        (0, "1 queued, 2 fetch"),
        (0, "3 fetch"),
        (1, "2 fetch"),
        (2, "1 fetch"),
        (3, "done"),
    ]


def test_ten_times_as_many_jobs_take_about_ten_times_as_long_to_show() -> None:
    def took_s(count: int) -> float:
        jobs = Jobs(count)
        begun = time.process_time()
        tables.follow(cast(Any, jobs), jobs.handles, timeout_s=None, quiet=True)
        return time.process_time() - begun

    assert took_s(5000) < 30 * max(took_s(500), 0.005)


class Scattered(Jobs):
    """Each job is at a stage of its own before it ends."""

    def watch(self, jobs: Mapping[Handle, str], timeout_s: float | None) -> Iterator[tuple[Handle, Report]]:
        for number, handle in enumerate(jobs):
            yield handle, Report("running", f"stage {number}")
            yield handle, Report("done", "done")


def test_stages_that_no_job_is_at_any_more_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = []
    monkeypatch.setattr(tables, "_stages", lambda stages: labels.append(len(stages)) or "")
    jobs = Scattered(50)
    last = tables.follow(cast(Any, jobs), jobs.handles, timeout_s=None, quiet=True)
    assert {report.status for report in last.values()} == {"done"}
    assert max(labels) == 2
