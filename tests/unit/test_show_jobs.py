"""How `pacs jobs` and `pacs top` show what the ledger says, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from courier.ledger.breakers import BreakerState
from courier.ledger.suspensions import Suspension
from courier.overview import JobList, JobRow, OpenJobs, ServerLoad, WaitingCount
from courier.queues import QUEUE_OF
from producer.cli import main
from producer.cli.jobs import KINDS, duration, jobs_table, summary
from producer.cli.top import LivePicture, drawn
from producer.terminal import Terminal

ROW = JobRow("j1", "pacs.upload", "upload http://host/a.dcm", "waiting", created_ms=0, now_ms=90_000)
WAITING = WaitingCount("waiting", "pacs_unavailable", "msdicom", 1200)
OPEN = OpenJobs(1300, 1300, True, (WAITING, WaitingCount("queued", "queued", "", 100)))


def shown(*things: Any, width: int = 200) -> str:
    terminal = Terminal(width=width, record=True, file=None)
    with terminal.capture() as captured:
        for thing in things:
            terminal.print(thing)
    return captured.get()


def test_a_row_shows_what_a_job_is_why_it_waits_where_and_for_how_long() -> None:
    row = replace(ROW, code="pacs_unavailable", message="msdicom is down", servers=("msdicom",))
    text = shown(jobs_table(JobList((row,), OPEN, 90_000)))
    for words in ("j1", "upload http://host/a.dcm", "waiting", "pacs_unavailable: msdicom is down", "msdicom", "90 s"):
        assert words in text


def test_an_ended_job_shows_how_long_ago_that_was() -> None:
    row = replace(ROW, state="failed", ended_ms=60_000, now_ms=600_000, code="not_found", message="gone")
    assert "ended 9 min ago" in shown(jobs_table(JobList((row,), OPEN, 600_000)))


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_a_length_of_time_is_said_in_its_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_in_what_others_sent_are_shown_as_escapes() -> None:
    row = replace(ROW, job_id="j\x1b[2J", what="upload \u202eevil", message="a\x07b", code="x")
    text = shown(jobs_table(JobList((row,), OPEN, 0)))
    assert not any(sign in text for sign in ("\x1b[2J", "\x07", "\u202e"))
    assert "\\x1b[2J" in text


def test_the_summary_counts_states_and_names_what_jobs_wait_for() -> None:
    assert summary(OPEN) == "0 running, 1,200 waiting, 100 queued (waiting: 1,200 pacs_unavailable msdicom)"


def test_the_kinds_are_those_of_the_tasks() -> None:
    assert {"upload", "delete", "batch", "batch.chunk", "list_studies"} <= set(KINDS)
    assert all(task.removeprefix("pacs.") in KINDS for task in QUEUE_OF)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("jobs", "--kind", "uplod"), "did you mean upload?"),
        (("jobs", "--state", "done-ish"), "'done-ish'"),
        (("jobs", "--since", "yesterday"), "12h"),
        (("jobs", "--limit", "0"), "0"),
        (("cancel",), "pacs jobs has them"),
        (("cancel", ""), "pacs jobs has them"),
        (("top", "--every", "0"), "0"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_asked(words: tuple[str, ...], said: str) -> None:
    ended = CliRunner().invoke(main, list(words))
    assert (ended.exit_code, said in ended.stderr) == (2, True), ended.stderr


@pytest.mark.parametrize(
    ("piped", "said"),
    [("\n# none\n", "No id was given"), ('{"id": 1}\n', "job_id"), ("{broken\n", "job_id"), ("[1]\n{\n", "job_id")],
)
def test_what_is_piped_has_to_be_ids(piped: str, said: str) -> None:
    ended = CliRunner().invoke(main, ["cancel", "-"], input=piped)
    assert (ended.exit_code, said in ended.stderr) == (2, True), ended.stderr


def picture(**changed: Any) -> LivePicture:
    servers = [
        ServerLoad("msdicom", BreakerState("msdicom", 5, 1.0, 12.0), 0, 8, 1200),
        ServerLoad("dcm4chee", BreakerState("dcm4chee"), 3, 8, 0, latency_ms=41.7),
        ServerLoad(
            "orthanc", BreakerState("orthanc:credential", 1, 1.0, 0.0, reason="check its auth settings"), 1, None, 0
        ),
    ]
    workers = {"w1@host": {"ok": True, "complaint": "", "at": 1000.0}}
    known = LivePicture(1001.0, OPEN, 0, 0, {"pacs": 7, "pacs.batches": 0}, workers, servers, [])
    return replace(known, **changed)


def test_a_picture_names_the_sick_server_its_jobs_the_slots_and_the_queues() -> None:
    text = shown(drawn(picture()))
    for words in (
        "msdicom",
        "open",
        "tested again in 12 s",
        "1,200",
        "3/8",
        "pacs 7",
        "workers: 1",
        "pacs_unavailable",
    ):
        assert words in text
    assert "of its credential; check its auth settings; is tested now" in text
    assert "dead letters" not in text


def test_a_picture_names_a_server_that_an_operator_has_paused_and_who_did() -> None:
    paused = Suspension("dcm4chee", "paused", "1", "r.lee", 1000, "disk")
    servers = [replace(one, suspension=paused) for one in picture().servers if one.name == "dcm4chee"]
    text = shown(drawn(picture(servers=servers)))
    assert "dcm4chee is paused, set by r.lee" in text
    assert "closed" not in text


def test_a_picture_tells_of_silent_workers_overdue_jobs_and_dead_letters() -> None:
    workers = {
        "w1@host": {"ok": True, "complaint": "", "at": 1000.0},
        "w2@host": {"ok": True, "complaint": "", "at": 1.0},
    }
    text = shown(drawn(picture(workers=workers, overdue=3, dead=2)))
    assert "workers: 1; silent: w2@host" in text
    assert "3 are overdue" in text
    assert "2 dead letters: pacs dead list" in text


def test_a_picture_says_when_not_all_jobs_were_counted() -> None:
    partly = replace(OPEN, open=100_000, looked_at=10_000, complete=False)
    assert "10,000 of 100,000" in shown(drawn(picture(jobs=partly)))


def test_a_picture_as_json_has_the_same() -> None:
    document = picture().as_json()
    assert document["jobs"]["by_reason"][0] == {
        "state": "waiting",
        "code": "pacs_unavailable",
        "server_name": "msdicom",
        "jobs": 1200,
    }
    assert [one["circuit"] for one in document["servers"]] == ["open", "closed", "half-open"]
    assert document["workers"][0]["silent"] is False
