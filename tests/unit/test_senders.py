"""Which certificates may send orders that delete: whose order a job is, which orders delete, who is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.store import Batches
from courier.errors import InvalidRequest
from courier.ledger.jobs import HandedBack, Ledger, Sender
from courier.queues import QUEUE_OF
from courier.settings import Settings, SettingsError
from worker.batches import senders
from worker.jobs.attempt import Attempt
from worker.jobs.services import Services

TASK, JOB = "pacs.delete", {"level": "study", "uid": "1.2.3"}
DESK, CLERK = Sender("desk", may_delete=True), Sender("clerk")


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Ledger(client, grace_s=60)


def sender_of(ledger: Ledger, *messages: Sender, job_id: str = "j1") -> str:
    """Whose order the job is after these messages; each attempt but the last is put aside."""
    name = ""
    for sender in messages:
        taken = ledger.take(job_id, task=TASK, job=JOB, sender=sender)
        name = taken.sender
        ledger.park(job_id, taken.fence, delay_s=0, code="other_job", message="m", wait="steady")
    return name


def test_a_job_is_the_order_of_its_first_sender_whoever_wakes_it_later(ledger: Ledger) -> None:
    assert sender_of(ledger, DESK, Sender("worker"), CLERK) == "desk"
    assert sender_of(ledger, CLERK, Sender("worker"), job_id="j2") == "clerk"


def test_a_sender_that_may_delete_vouches_for_an_order_that_another_has_sent(ledger: Ledger) -> None:
    assert sender_of(ledger, CLERK, DESK, CLERK) == "desk"


def test_a_message_of_another_order_under_the_same_id_is_not_vouched_for(ledger: Ledger) -> None:
    sender_of(ledger, CLERK)
    ledger.take("j1", task=TASK, job={**JOB, "uid": "9.9"}, sender=DESK)
    assert ledger.read_record("j1")["sender"] == "clerk"


def test_a_replayed_dead_letter_is_the_order_of_who_replays_it(ledger: Ledger) -> None:
    taken = ledger.take("j1", task=TASK, job=JOB, sender=DESK)
    outcome = {"error": {"code": "poisoned", "message": "m"}}
    ledger.end_as_dead_letter("j1", taken.fence, outcome=outcome, code="poisoned", task=TASK, job=JOB)
    ledger.replay("j1")
    assert sender_of(ledger, CLERK) == "clerk"


def test_a_job_that_another_leaves_behind_is_the_order_of_the_same_sender(ledger: Ledger) -> None:
    ledger.submit("j1", task=TASK, job=JOB, due_in_s=0, sender="desk")
    assert sender_of(ledger, Sender("worker")) == "desk"


def test_a_record_that_redis_has_lost_keeps_its_sender(ledger: Ledger) -> None:
    taken = ledger.take("j1", task=TASK, job=JOB, sender=DESK)
    ledger.client.flushall()
    became = ledger.hand_back("j1", taken.fence, task=TASK, job=JOB, attempt=1, sender=taken.sender)
    assert became is HandedBack.RESTORED
    assert sender_of(ledger, Sender("worker")) == "desk"


def test_each_task_is_one_that_deletes_or_one_that_never_does() -> None:
    classes = (senders.ALWAYS, senders.MOVES, frozenset(senders.GO_ON), senders.NEVER)
    assert set().union(*classes) == set(QUEUE_OF)
    assert sum(map(len, classes)) == len(QUEUE_OF)


@pytest.mark.parametrize(
    ("task", "message", "deletes"),
    [
        ("pacs.delete", {}, True),
        ("pacs.delete", {"dry_run": True}, False),
        ("pacs.delete", {"dry_run": "yes"}, True),
        ("pacs.delete", {"permanent": False}, True),
        ("pacs.delete_all", {"confirm": ""}, True),
        ("pacs.batch.delete", {}, True),
        ("pacs.batch.migrate", {"delete_source": True}, True),
        ("pacs.batch.migrate", {"delete_source": 1}, True),
        ("pacs.batch.migrate", {}, False),
        ("pacs.batch.migrate", {"delete_source": True, "dry_run": True}, False),
        ("pacs.upload", {}, False),
        ("pacs.batch.repair_it", {}, True),
    ],
)
def test_an_order_deletes_unless_it_is_known_not_to(
    ledger: Ledger, task: str, message: Mapping[str, Any], deletes: bool
) -> None:
    assert senders.deletes(task, message, "j1", Batches(ledger)) is deletes


@pytest.mark.parametrize(
    ("kind", "order", "commands"),
    [
        ("delete", {}, {"apply", "retry"}),
        ("migrate", {"delete_source": True}, {"apply", "retry", "verify", "undo"}),
        ("migrate", {}, {"undo"}),
        ("upload", {}, {"undo"}),
        ("download", {}, set()),
    ],
)
def test_whether_a_batch_goes_on_deleting_its_kind_says(
    ledger: Ledger, kind: str, order: dict[str, Any], commands: set[str]
) -> None:
    batches = Batches(ledger)
    batches.open("b1", kind=kind, order=order, concurrency=1)
    found = {
        command for task, command in senders.GO_ON.items() if senders.deletes(task, {"batch_id": "b1"}, "j", batches)
    }
    assert found == commands


@pytest.mark.parametrize("message", [{"planned": True}, {"planned": True, "dry_run": True}])
def test_of_a_batch_that_a_program_has_planned_the_ledger_has_the_order(
    ledger: Ledger, message: dict[str, Any]
) -> None:
    batches = Batches(ledger)
    batches.open("b1", kind="migrate", order={"delete_source": True}, concurrency=1)
    assert senders.deletes("pacs.batch.migrate", message, "b1", batches)


def carried_out(
    ledger: Ledger, sender: Sender, *, task: str = TASK, checkpoint: dict[str, Any] | None = None
) -> list[Any]:
    """What the work was given, if it was begun."""
    begun: list[Any] = []

    def work(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
        begun.append(message)
        return {}

    signing = SimpleNamespace(destructive_senders=("desk",))
    settings = SimpleNamespace(queue=SimpleNamespace(signing=signing))
    taken = ledger.take("j1", task=task, job=JOB, sender=sender)
    attempt = Attempt("j1", taken.fence, 1, last=False, ledger=ledger, checkpoint=checkpoint, sender=taken.sender)
    senders.checked(work, task)(JOB, attempt, cast(Services, SimpleNamespace(ledger=ledger, settings=settings)))
    return begun


def test_an_order_that_deletes_is_begun_for_a_sender_that_is_named(ledger: Ledger) -> None:
    assert carried_out(ledger, DESK) == [JOB]


@pytest.mark.parametrize("sender", [CLERK, Sender("worker"), Sender(), Sender("Desk"), Sender("desk.crt")])
def test_an_order_that_deletes_is_refused_from_anyone_else_with_the_reason(ledger: Ledger, sender: Sender) -> None:
    with pytest.raises(InvalidRequest, match="destructive_senders") as refused:
        carried_out(ledger, sender)
    assert refused.value.details == {"reason": "sender_not_allowed", "sender": sender.name or None}


def test_an_order_that_does_not_delete_is_begun_for_every_sender(ledger: Ledger) -> None:
    assert carried_out(ledger, CLERK, task="pacs.upload") == [JOB]


def test_a_deletion_that_has_begun_comes_to_its_end(ledger: Ledger) -> None:
    assert carried_out(ledger, CLERK, checkpoint={"begun": {}}) == [JOB]


def test_a_refused_order_gives_up_the_plan_that_a_program_has_written_for_it(ledger: Ledger) -> None:
    batches = Batches(ledger)
    batches.open("j1", kind="delete", order={}, concurrency=1)
    with pytest.raises(InvalidRequest):
        carried_out(ledger, CLERK, task="pacs.batch.delete")
    assert batches.state("j1") == "cancelled"


def test_the_setting_needs_signing_and_a_name() -> None:
    for signing in ({"destructive_senders": ["desk"]}, {"destructive_senders": []}):
        with pytest.raises((SettingsError, ValueError), match="destructive_senders"):
            Settings.model_validate({"queue": {"signing": signing}})
