"""A worker that gives its jobs to others does not look for jobs any more."""

from __future__ import annotations

import threading

import pytest

from sandbox.processes import poll
from worker import app


def test_a_worker_that_has_let_go_of_its_jobs_wakes_nobody_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps: list[int] = []
    monkeypatch.setattr(app, "_sweeping", threading.Lock())
    monkeypatch.setattr(app, "_ledger", lambda: None)
    monkeypatch.setattr(
        app,
        "settings",
        app.settings.model_copy(update={"jobs": app.settings.jobs.model_copy(update={"sweep_s": 0.01})}),
    )
    monkeypatch.setattr(app, "sweep", lambda *_: sweeps.append(1))
    sweeper = app.Sweeper(None)
    sweeper.start(None)
    try:
        assert poll(lambda: len(sweeps) > 1, timeout_s=10)
        assert app.release_jobs() == 0
        before = len(sweeps)
        assert not poll(lambda: len(sweeps) > before, timeout_s=0.3)
    finally:
        sweeper.stop(None)
        app._sweeping.release()
