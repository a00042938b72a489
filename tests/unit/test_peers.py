"""Which releases may work on one ledger, and what a worker or a program says that may not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest

import worker
from courier.ledger import peers
from courier.ledger.jobs import PREFIX, SCHEMA, Ledger
from courier.settings import Settings
from producer import Courier, doctor
from producer.errors import BrokerUnavailable

CHANGELOG = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Ledger(client)


def of_version_0_1(ledger: Ledger, name: str = "old@host", *, ago_s: float = 0, every_s: float = 10.0) -> None:
    """What worker/runtime/watchdog.py of 0a602a5 writes."""
    said = {"ok": True, "complaint": "", "every_s": every_s, "at": ledger.clock_s() - ago_s}
    ledger.client.hset(f"{PREFIX}workers", name, json.dumps(said))


def says(ledger: Ledger, name: str = "new@host", **more: Any) -> int:
    told = {"ok": True, "complaint": "", "every_s": 10.0, **more}
    return ledger.report_health(name, peers.entry_of(told, at_s=ledger.clock_s()))


def test_the_first_worker_notes_the_schema_on_an_empty_ledger(ledger: Ledger) -> None:
    assert ledger.schema() == 1, "as version 0.1 left it"
    assert peers.objection(ledger) == ""
    assert says(ledger) == SCHEMA
    assert ledger.client.get(f"{PREFIX}schema") == str(SCHEMA)
    assert ledger.client.ttl(f"{PREFIX}schema") == -1
    assert peers.objection(ledger) == "", "another worker of this release may begin"


def test_a_ledger_that_was_emptied_gets_its_schema_again(ledger: Ledger) -> None:
    says(ledger)
    ledger.client.flushall()
    says(ledger)
    assert ledger.schema() == SCHEMA


def test_a_worker_says_its_version_and_the_newest_schema_that_it_reads(ledger: Ledger) -> None:
    says(ledger)
    (said,) = ledger.workers().values()
    assert (said["version"], said["schema"]) == (worker.__version__, SCHEMA)
    assert (peers.release_of(said), peers.schema_of(said)) == (worker.__version__, SCHEMA)


@pytest.mark.parametrize("every_s", [1.5, 10.0])
def test_a_worker_does_not_begin_beside_one_of_0_1_that_runs(ledger: Ledger, every_s: float) -> None:
    of_version_0_1(ledger, every_s=every_s)
    looks = []

    def speaks(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            of_version_0_1(ledger, every_s=every_s)

    reason = peers.objection(ledger, sleep=speaks)
    assert reason.startswith("Worker old@host of version 0.1 still runs on this ledger")
    assert "stop all workers of that version" in reason
    assert len(looks) == 3, "it does not wait any longer"
    assert ledger.schema() == 1, "and changes nothing"


@pytest.mark.parametrize("ago_s", [0, 30, 86_000, -3600])
def test_a_worker_of_0_1_that_has_ended_is_waited_for_once(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, ago_s: float
) -> None:
    monkeypatch.setattr(peers, "_MARGIN_S", 0.1)
    of_version_0_1(ledger, ago_s=ago_s, every_s=0.1)
    looks: list[float] = []
    assert peers.objection(ledger, sleep=looks.append) == ""
    assert looks
    looks.clear()
    assert peers.objection(ledger, sleep=looks.append) == ""
    assert not looks
    assert ledger.workers() == {}


def test_one_of_several_old_workers_is_enough(ledger: Ledger) -> None:
    for name in ("a@host", "b@host"):
        of_version_0_1(ledger, name)
    says(ledger, "new@host")
    reason = peers.objection(ledger, sleep=lambda _: of_version_0_1(ledger, "b@host", ago_s=-1))
    assert reason.startswith("Worker b@host of version 0.1")
    assert set(ledger.workers()) == {"a@host", "b@host", "new@host"}


def test_a_worker_that_was_upgraded_meanwhile_under_its_name_is_no_old_one(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_MARGIN_S", 0.1)
    of_version_0_1(ledger, "w@host", every_s=0.1)
    assert peers.objection(ledger, sleep=lambda _: says(ledger, "w@host") and None) == ""


@pytest.mark.parametrize("schema", [SCHEMA + 1, 99])
def test_a_newer_ledger_is_refused_and_not_written_to(ledger: Ledger, schema: int) -> None:
    ledger.client.set(f"{PREFIX}schema", schema)
    reason = peers.objection(ledger)
    assert reason.startswith(f"The ledger has schema {schema}, and version {worker.__version__} reads up to {SCHEMA};")
    assert says(ledger) == schema
    assert ledger.workers() == {}
    assert ledger.schema() == schema


@pytest.mark.parametrize("text", ["abc", "", "0", "-1", "2.5", " 2", "02", "1e1", "nan", "٢", "9" * 30])
def test_a_ledger_whose_schema_is_none_is_refused_and_not_written_to(ledger: Ledger, text: str) -> None:
    ledger.client.set(f"{PREFIX}schema", text)
    assert_refused(ledger)
    assert ledger.client.get(f"{PREFIX}schema") == text


def test_a_ledger_whose_schema_is_a_key_of_another_kind_is_refused_and_not_written_to(ledger: Ledger) -> None:
    ledger.client.hset(f"{PREFIX}schema", "a", "1")
    assert_refused(ledger)
    assert ledger.client.type(f"{PREFIX}schema") == "hash"


@pytest.mark.parametrize(
    "row", ["", "text", "[]", "1", "null", "{}", '{"at": 1}', '{"ok": 1, "complaint": "", "at": "x", "every_s": 1}']
)
def test_a_row_that_no_worker_wrote_keeps_none_from_finding_an_older_worker(ledger: Ledger, row: str) -> None:
    ledger.client.hset(f"{PREFIX}workers", "odd", row)
    said = {"ok": True, "complaint": "", "every_s": 10.0}
    assert peers.begin(ledger, "new@host", said) == ""
    assert list(ledger.workers()) == ["new@host"]
    assert [finding.state for finding in doctor._progress(ledger, set())] == ["ok"]
    of_version_0_1(ledger)
    assert "still runs" in peers.objection(ledger, sleep=lambda _: of_version_0_1(ledger))


def assert_refused(ledger: Ledger) -> None:
    """By a worker that starts, by one that runs, by a program that enqueues, and by ``pacs doctor``."""
    said = {"ok": True, "complaint": "", "every_s": 10.0}
    reasons = [peers.begin(ledger, "new@host", said), peers.say(ledger, "new@host", said)]
    assert len(set(reasons)) == 1
    assert "holds no number of a schema" in reasons[0]
    assert (says(ledger), ledger.workers()) == (0, {})
    courier = Courier(Settings(), broker_url="memory://", result_backend="cache+memory://")
    courier._ledger = ledger
    with pytest.raises(BrokerUnavailable, match="no number of a schema"):
        courier.upload("https://host/a.dcm")
    (finding,) = doctor._ledger(ledger)
    assert (finding.state, finding.found) == ("unavailable", reasons[0])


def test_a_program_that_enqueues_refuses_a_newer_ledger_in_one_sentence(ledger: Ledger) -> None:
    ledger.client.set(f"{PREFIX}schema", SCHEMA + 1)
    courier = Courier(Settings(), broker_url="memory://", result_backend="cache+memory://")
    courier._ledger = ledger
    asks = [
        lambda: courier.upload("https://host/a.dcm"),
        lambda: courier.batch,
        lambda: courier.dead,
        lambda: courier.cancel("j"),
        lambda: courier._ledger_reports(["j"]),
    ]
    for ask in asks:
        with pytest.raises(BrokerUnavailable, match=f"The ledger has schema {SCHEMA + 1}"):
            ask()
    assert ledger.client.keys(f"{PREFIX}job:*") == []


def test_a_program_looks_again_whether_it_can_read_the_ledger(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.client._SCHEMA_S", 0)
    courier = Courier(Settings(), broker_url="memory://", result_backend="cache+memory://")
    courier._ledger = ledger
    assert not courier.cancel("j")
    ledger.client.set(f"{PREFIX}schema", SCHEMA + 1)
    with pytest.raises(BrokerUnavailable, match="install the release"):
        courier.cancel("j")


def test_doctor_names_versions_old_workers_and_a_newer_ledger(ledger: Ledger) -> None:
    says(ledger)
    of_version_0_1(ledger)
    found = {finding.check: finding for finding in doctor._progress(ledger, set())}
    assert found["worker new@host"].found == f"gets on; version {worker.__version__}"
    assert found["worker old@host"].state == "failed"
    assert "version 0.1" in found["worker old@host"].found
    ledger.client.set(f"{PREFIX}schema", SCHEMA + 1)
    (finding,) = doctor._ledger(ledger)
    assert (finding.state, finding.check) == ("unavailable", "ledger")
    assert "docs/upgrade.md" in finding.advice


def test_the_version_is_that_of_the_changelogs_first_heading() -> None:
    heading = next(line for line in CHANGELOG.splitlines() if line.startswith("## "))
    assert worker.__version__.removesuffix(".dev0") in heading
    assert worker.__version__.endswith(".dev0") == heading.startswith("## Unreleased")
