"""Each order to delete, to hide or to show again leaves one line: who, what, where, outcome; and never a patient."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.store import Batches
from courier.errors import CourierError, PacsRejected, PacsUnauthorized, PacsUnavailable
from courier.ledger.jobs import Ledger, Sender
from worker.jobs.attempt import Attempt
from worker.jobs.receipts import Receipts
from worker.observability import log_format
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs

STUDY = Found("study", "1.2.3", attributes={"00100010": {"vr": "PN", "Value": [{"Alphabetic": "PLANTED^PATIENT"}]}})
DELETED = Deletion(DeletionFate.DELETED)
IMAGE = Found("image", "1.2.3", "1.2.3.4", "1.2.3.4.5")
ORDER = {"level": "study", "uid": "1.2.3", "requested_by": "r.lee", "reason": "ticket 7"}


@dataclass
class AnsweringPacs:
    """A server that answers a deletion with ``answer``."""

    answer: Deletion | BaseException
    server: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="msdicom"))

    @property
    def hiding(self) -> AnsweringPacs:
        return self

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        if isinstance(self.answer, Deletion):
            return self.answer
        raise self.answer

    def delete_hidden(self, study_instance_uid: str) -> Deletion:
        return self.delete(STUDY, permanent=True)

    def revoke(self, found: Found) -> int:
        return 1


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Ledger(client)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    caplog.set_level(logging.INFO, logger="courier.audit")
    return cast(list[dict[str, Any]], _Audits(caplog))


class _Audits:
    """The audit fields of the lines so far."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __getitem__(self, at: int) -> Any:
        return self.all()[at]

    def __len__(self) -> int:
        return len(self.all())

    def all(self) -> list[Any]:
        return [record.audit for record in self._caplog.records if record.name == "courier.audit"]  # type: ignore[attr-defined]


def attempt_at(
    ledger: Ledger, job: dict[str, Any], *, sender: str = "", job_id: str = "j1", task: str = "pacs.delete"
) -> Attempt:
    taken = ledger.take(job_id, task=task, job=job, sender=Sender(sender))
    return Attempt(job_id, taken.fence, taken.attempt, last=False, ledger=ledger, task=task, sender=taken.sender)


def receipts(ledger: Ledger, **order: Any) -> Receipts:
    return Receipts.of(attempt_at(ledger, ORDER, **order))


def pacs(answer: Deletion | BaseException = DELETED) -> Pacs:
    return cast(Pacs, AnsweringPacs(answer))


def test_a_deletion_says_who_what_where_and_outcome(ledger: Ledger, lines: list[dict[str, Any]]) -> None:
    receipts(ledger, sender="archive-desk").delete(pacs(), STUDY, permanent=True)
    assert len(lines) == 1
    assert lines[0] == {
        "action": "delete",
        "level": "study",
        "study_uid": "1.2.3",
        "server_name": "msdicom",
        "outcome": "deleted",
        "job_id": "j1",
        "task": "pacs.delete",
        "attempt": 1,
        "requested_by": "r.lee",
        "reason": "ticket 7",
        "sender": "archive-desk",
    }


@pytest.mark.parametrize(
    ("answer", "outcome", "code"),
    [
        (Deletion(DeletionFate.HIDDEN), "hidden", None),
        (Deletion(DeletionFate.NOT_THERE), "not_there", None),
        (Deletion(DeletionFate.REFUSED, "no", code="invalid_request"), "refused", "invalid_request"),
        (PacsRejected("no"), "refused", "pacs_rejected"),
        (PacsUnauthorized("no"), "refused", "pacs_unauthorized"),
        (PacsUnavailable("the answer did not come"), "unknown", "pacs_unavailable"),
        (KeyboardInterrupt(), "unknown", None),
        (RuntimeError("can't start new thread"), "unknown", None),
    ],
)
def test_the_outcome_is_what_the_server_made_of_it_or_unknown_where_it_may_have_happened(
    ledger: Ledger, lines: list[dict[str, Any]], answer: Deletion | BaseException, outcome: str, code: str | None
) -> None:
    with contextlib.suppress(CourierError, KeyboardInterrupt, RuntimeError):
        receipts(ledger).delete(pacs(answer), IMAGE, permanent=True)
    assert [(line["outcome"], line.get("code")) for line in (lines[0],)] == [(outcome, code)]
    assert (lines[0]["image_uid"], lines[0]["series_uid"]) == ("1.2.3.4.5", "1.2.3.4")


@pytest.mark.parametrize("kind", [PacsUnavailable, PacsUnauthorized])
def test_what_was_not_sent_leaves_no_line(
    ledger: Ledger, lines: list[dict[str, Any]], kind: type[CourierError]
) -> None:
    resting = kind("circuit open", details={"phase": "resting"})
    with pytest.raises(kind):
        receipts(ledger).delete(pacs(resting), STUDY, permanent=True)
    assert len(lines) == 0


def test_hiding_deleting_what_is_hidden_and_showing_again_are_told_apart(
    ledger: Ledger, lines: list[dict[str, Any]]
) -> None:
    one = receipts(ledger)
    one.delete(pacs(), STUDY, permanent=False)
    one.delete_hidden(pacs(), "1.2.3")
    one.show_again(pacs(), IMAGE)
    assert [line["action"] for line in (lines[0], lines[1], lines[2])] == ["hide", "delete_hidden", "show_again"]
    assert lines[2]["outcome"] == "shown"


def test_a_piece_of_a_batch_names_who_ordered_its_pass_the_batch_and_where_it_moves(
    ledger: Ledger, lines: list[dict[str, Any]]
) -> None:
    batches = Batches(ledger)
    order = {"delete_source": True, "from_server": "msdicom", "to_server": "dcm4chee", "requested_by": "planner"}
    batches.open("b1", kind="migrate", order=order, concurrency=1)
    token = batches.begin_plan("b1")
    batches.plan_chunks("b1", token, {0: "-\t-\t1.2.3"})
    batches.freeze("b1", token, items=1, planned={}, servers={"msdicom": "msdicom"})
    ledger.take("retry", task="pacs.batch.retry", job={"batch_id": "b1", **ORDER}, sender=Sender("archive-desk"))
    batches.take("b1", "retry")
    batches.begin("b1", "apply", job_id="retry", out_of=["planning"])
    piece = attempt_at(ledger, {"batch_id": "b1"}, job_id="b1.apply.0", task="pacs.batch.chunk", sender="worker")
    Receipts.of(piece).delete(pacs(), STUDY, permanent=True)
    line = lines[0]
    assert (line["requested_by"], line["reason"], line["sender"]) == ("r.lee", "ticket 7", "archive-desk")
    assert (line["batch_id"], line["batch_kind"], line["batch_pass"], line["moved_to"]) == (
        "b1",
        "migrate",
        "apply",
        "dcm4chee",
    )


def test_where_the_ledger_does_not_say_who_ordered_it_nothing_is_deleted(
    ledger: Ledger, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = receipts(ledger)
    monkeypatch.setattr(ledger, "read_record", _away)
    with pytest.raises(ConnectionError):
        one.delete(pacs(AssertionError("it was asked")), STUDY, permanent=True)
    assert len(lines) == 0


def _away(_: str) -> dict[str, str]:
    raise ConnectionError


@pytest.fixture
def log_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What reaches standard error of a worker that logs in a shape and at a level."""
    root = logging.getLogger()
    before = (
        root.handlers[:],
        root.level,
        {name: logging.getLogger(name).level for name in (*log_format.OURS, log_format.AUDIT)},
    )
    stream = io.StringIO()

    def configured(shape: log_format.Shape, level: int) -> io.StringIO:
        monkeypatch.setattr("sys.stderr", stream)
        log_format.configure(level, shape=shape)
        return stream

    yield configured
    root.handlers[:], root.level = before[0], before[1]
    for name, number in before[2].items():
        logging.getLogger(name).setLevel(number)


def told(**audit: str) -> None:
    logging.getLogger("courier.audit").info("delete study 1.2.3 on msdicom: deleted", extra={"audit": audit})


def test_an_audit_line_is_an_object_of_its_own_in_json_also_where_only_warnings_are_logged(log_of: Any) -> None:
    stream = log_of("json", logging.WARNING)
    told(requested_by="r.lee", reason="see https://desk/7?token=SECRET", outcome="deleted")
    line = json.loads(stream.getvalue())
    assert (line["logger"], line["audit"]["requested_by"], line["audit"]["outcome"]) == (
        "courier.audit",
        "r.lee",
        "deleted",
    )
    assert "SECRET" not in stream.getvalue()


def test_an_audit_line_is_one_line_of_text(log_of: Any) -> None:
    stream = log_of("text", logging.INFO)
    told(requested_by="r.lee\n2026-01-01 INFO j2 courier.audit: forged", outcome="deleted")
    (line,) = stream.getvalue().splitlines()
    assert "outcome=deleted" in line
    assert "\\n2026" in line


def test_only_the_audit_logger_says_what_hangs_on_a_record(log_of: Any) -> None:
    stream = log_of("json", logging.INFO)
    logging.getLogger("worker.jobs.runner").info("Done", extra={"audit": {"reason": "PLANTED"}})
    assert "PLANTED" not in stream.getvalue()
