"""What a trace shows on a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from producer.cli.tables import console
from producer.cli.trace import show_trace

JOB = {"task": "pacs.delete", "state": "done", "attempts": 1, "code": "done", "message": None, "created_at": None}


def shown(*jobs: dict[str, Any]) -> str:
    payload: dict[str, Any] = {name: [] for name in ("servers", "storing", "timeline", "pushes")}
    payload |= {"uid": "1.2", "level": "study", "why": "", "viewer_url": "", "claim": None, "receipt": None}
    with console.capture() as printed:
        show_trace({**payload, "held_by": None, "jobs": list(jobs)})
    return printed.get()


def test_who_requested_a_job_and_why_are_shown_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 300)
    stated = shown({**JOB, "job_id": "j1", "requested_by": "Dr. Who", "reason": "[red]twice[/red]"})
    assert "job done, attempts: 1, requested by: Dr. Who, reason: [red]twice[/red]" in stated
    assert "requested by" not in shown({**JOB, "job_id": "j2", "requested_by": None, "reason": None})


@pytest.mark.parametrize("name", ["order[/b]", "[red]order[/red]", "order\\", "[link=x]order[/link]"])
def test_ids_of_jobs_and_names_of_servers_are_shown_as_they_were_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", 300)
    push = {"kind": "copy", "server_name": name, "at": None, "job_id": name, "images": 2, "state": "there"}
    event = {"at": "", "event": "stored", "text": name, "details": {}, "job_id": name}
    payload: dict[str, Any] = {"uid": "1.2", "level": "study", "why": name, "viewer_url": "", "storing": []}
    payload |= {"servers": [{"server_name": name, "error": {"message": name}}], "held_by": name, "pushes": [push]}
    payload["claim"] = {"server_name": name, "claimed_by": name, "claimed_at": None}
    payload["receipt"] = {"server_name": name, "stored_at": None, "job_id": name, "state": "there"}
    with console.capture() as printed:
        show_trace({**payload, "jobs": [{**JOB, "job_id": name}], "timeline": [event]})
    assert printed.get().count(name) == 13
