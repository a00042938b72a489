"""What the ledger keeps of a job's follow-ups, and how they are sent: on fakeredis and kombu's memory transport."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from celery import Celery, chain, chord, group, signature
from celery.app.task import Context
from celery.exceptions import ImproperlyConfigured

from courier.errors import NotFound
from courier.ledger.jobs import Attachment, HandedBack, LeaseLost, Ledger, PendingFollowUps, TakeState
from worker.runtime import envelope, follow_ups
from worker.runtime.follow_ups import End

TASK = "pacs.upload"
JOB = {"image_url": "https://x/1.dcm"}
PAYLOAD = {"status": "stored"}
DONE = {"outcome": {"payload": PAYLOAD}, "code": "done", "task": TASK, "job": JOB}
DEAD = {"outcome": {"error": {"code": "poisoned"}}, "code": "poisoned", "task": TASK, "job": JOB}
ONE = Attachment('{"callbacks": [1]}', "1" * 16, '{"group": "g"}')
OTHER = Attachment('{"callbacks": [2]}', "2" * 16)


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def ledger(client: fakeredis.FakeRedis) -> Ledger:
    return Ledger(client, lease_s=30, grace_s=60, keep_s=3600)


def take_job(ledger: Ledger, attached: Attachment = ONE) -> Any:
    return ledger.take("j1", task=TASK, job=JOB, attached=attached)


def finished(ledger: Ledger) -> PendingFollowUps:
    pending = ledger.finish("j1", take_job(ledger).fence, **DONE)
    assert pending is not None
    return pending


def let_the_time_to_send_pass(client: fakeredis.FakeRedis) -> None:
    client.hset("courier:job:j1", "telling_ms", 0)


def test_who_ends_a_job_has_to_send_its_follow_ups_whichever_message_they_came_with(ledger: Ledger) -> None:
    first = take_job(ledger)
    ledger.park("j1", first.fence, delay_s=0, code="waiting", message="")
    woken = take_job(ledger, Attachment())
    assert woken.attachments.follow_ups == ONE.follow_ups + "\n"
    assert ledger.finish("j1", woken.fence, **DONE) == PendingFollowUps(ONE.follow_ups + "\n", woken.fence)


def test_a_job_without_follow_ups_has_nothing_pending(ledger: Ledger) -> None:
    assert ledger.finish("j1", take_job(ledger, Attachment()).fence, **DONE) is None
    assert take_job(ledger, Attachment()).pending is None


def test_a_job_is_not_told_before_its_follow_ups_are_sent(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    pending = finished(ledger)
    ledger.published("j1")
    assert client.zscore("courier:due", "j1"), "or nobody would look whether they have been sent"
    ledger.followed("j1", pending, sent=1, all_of_them=True)
    ledger.published("j1")
    assert client.zscore("courier:due", "j1") is None
    assert not client.hexists("courier:job:j1", "follow_ups")


def test_nobody_else_sends_them_meanwhile_and_another_one_the_rest_afterwards(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    pending = finished(ledger)
    assert take_job(ledger).state is TakeState.HELD
    ledger.followed("j1", pending, sent=1)
    let_the_time_to_send_pass(client)
    next_one = take_job(ledger, Attachment())
    assert (next_one.state, next_one.outcome, next_one.pending.sent) == (TakeState.DONE, DONE["outcome"], 1)
    assert take_job(ledger).state is TakeState.HELD
    with pytest.raises(LeaseLost):
        ledger.followed("j1", pending, sent=2)
    ledger.followed("j1", next_one.pending, sent=2, all_of_them=True)
    assert take_job(ledger).pending is None, "they are not sent again"


def test_the_time_to_send_them_is_renewed_by_a_heartbeat(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    pending = finished(ledger)
    let_the_time_to_send_pass(client)
    assert ledger.heartbeat("j1", pending.fence)
    assert take_job(ledger).state is TakeState.HELD
    ledger.followed("j1", pending, sent=1, all_of_them=True)
    assert not ledger.heartbeat("j1", pending.fence)


def test_the_same_follow_ups_are_kept_once_and_others_beside_them(ledger: Ledger) -> None:
    take_job(ledger)
    assert take_job(ledger).state is TakeState.HELD
    assert take_job(ledger, OTHER).state is TakeState.HELD
    fence = int(ledger.read_record("j1")["fence"])
    pending = ledger.finish("j1", fence, **DONE)
    assert pending is not None
    assert pending.follow_ups.splitlines() == [ONE.follow_ups, OTHER.follow_ups]


def test_others_that_come_after_the_end_are_sent_too(ledger: Ledger) -> None:
    pending = finished(ledger)
    ledger.followed("j1", pending, sent=1, all_of_them=True)
    late = take_job(ledger, OTHER)
    assert (late.state, late.pending.follow_ups, late.pending.sent) == (TakeState.DONE, OTHER.follow_ups + "\n", 0)


def test_others_that_come_while_the_first_ones_are_sent_are_sent_next(ledger: Ledger) -> None:
    pending = finished(ledger)
    assert take_job(ledger, OTHER).state is TakeState.HELD
    ledger.followed("j1", pending, sent=1, all_of_them=True)
    ledger.published("j1")
    assert [due.job_id for due in ledger.sweep()] == ["j1"]
    left = take_job(ledger, Attachment()).pending
    assert (left.follow_ups.split("\n")[1], left.sent) == (OTHER.follow_ups, 1)


def test_too_many_of_them_are_refused_and_the_job_goes_on(ledger: Ledger) -> None:
    take_job(ledger)
    refused = take_job(ledger, Attachment("x" * 600_000, "3" * 16))
    assert (refused.state, refused.attachments.headers) == (TakeState.FULL, ONE.headers)
    assert ledger.read_record("j1")["state"] == "running"


def test_a_dead_letter_keeps_its_follow_ups_to_be_replayed_with_them(ledger: Ledger) -> None:
    first = take_job(ledger)
    pending = ledger.end_as_dead_letter("j1", first.fence, **DEAD)
    assert pending is not None
    ledger.followed("j1", pending, sent=1, all_of_them=True)
    assert take_job(ledger).pending is None
    due = ledger.replay("j1")
    assert due is not None
    assert due.headers == {"group": "g"}
    again = ledger.finish("j1", take_job(ledger, Attachment()).fence, **DONE)
    assert again is not None
    assert (again.follow_ups, again.sent) == (pending.follow_ups, 0)


def test_a_dead_letter_that_is_purged_drops_them(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    pending = ledger.end_as_dead_letter("j1", take_job(ledger).fence, **DEAD)
    assert pending is not None
    ledger.followed("j1", pending, sent=1, all_of_them=True)
    assert ledger.purge("j1")
    assert not client.hexists("courier:job:j1", "follow_ups")


def test_they_are_written_down_again_with_a_record_that_redis_has_lost(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    first = take_job(ledger)
    client.flushall()
    given = {"task": TASK, "job": JOB, "attempt": 1, "attachments": first.attachments}
    assert ledger.hand_back("j1", first.fence, **given) is HandedBack.RESTORED
    assert take_job(ledger).attachments == first.attachments


def test_messages_that_wake_a_job_have_the_headers_that_belong_to_it(ledger: Ledger) -> None:
    first = take_job(ledger)
    ledger.park("j1", first.fence, delay_s=0, code="waiting", message="")
    assert [due.headers for due in ledger.sweep()] == [{"group": "g"}]
    woken = ledger.wake_now("j1")
    assert woken is not None
    assert woken.headers == {"group": "g"}


def test_who_looks_at_a_job_sees_none_of_them(ledger: Ledger) -> None:
    take_job(ledger)
    assert not {"follow_ups", "headers", "job"} & set(ledger.read_record("j1"))


# --- what they are --------------------------------------------------------------------------------------------------


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_create_missing_queues = True
    yield app
    app.close()


def sent(app: Celery, queue: str) -> list[Any]:
    """All messages in ``queue``, taken from it."""
    with app.connection_for_read() as connection, connection.SimpleQueue(queue) as waiting:
        found = []
        while waiting.qsize():
            message = waiting.get(block=False)
            message.ack()
            found.append(message)
        return found


def as_message(*signatures: Any) -> list[Any]:
    return list(json.loads(json.dumps(signatures)))


def ids(value: Any) -> list[str]:
    if isinstance(value, list):
        return [one for item in value for one in ids(item)]
    if not isinstance(value, dict):
        return []
    inside = [one for item in value.values() for one in ids(item)]
    return inside + ([value["task_id"]] if "task_id" in value else [])


def test_each_task_in_a_follow_up_has_an_id_before_it_is_sent_and_keeps_one_that_it_has(app: Celery) -> None:
    def after(**options: Any) -> Any:
        return signature("mine.after", app=app, queue="mine", **options)

    nested = chord(group([after(), chain(after(), after())]), after(task_id="body"))
    linked = after()
    linked.link(after())
    embedded = {"callbacks": as_message(linked, nested, after(task_id="mine"))}
    attached = follow_ups.attachment(embedded, {})
    found = ids(json.loads(attached.follow_ups)["callbacks"])
    assert {"body", "mine"} <= set(found)
    assert len(set(found)) == 8, "one for each of seven tasks, and one for the header"
    again = follow_ups.attachment(embedded, {})
    assert again.digest == attached.digest
    assert follow_ups.attachment({"callbacks": as_message(linked)}, {}).digest != attached.digest


def test_no_argument_of_a_follow_up_is_shown_to_who_watches(app: Celery) -> None:
    secret = "https://host/1.dcm?sig=SECRET"
    ours = signature("pacs.upload", kwargs={"job": {"image_url": secret}}, app=app)
    theirs = signature("mine.after", kwargs={"job": {"image_url": secret}}, args=(secret,), app=app)
    attached = follow_ups.attachment({"callbacks": as_message(ours, group([theirs]))}, {})
    first, second = json.loads(attached.follow_ups)["callbacks"]
    assert first["options"]["kwargsrepr"] == '{"image_url": "https://host/1.dcm"}'
    shown = second["kwargs"]["tasks"][0]["options"]
    assert (shown["argsrepr"], shown["kwargsrepr"]) == ("(...)", "{...}")


def test_celery_finds_nothing_to_send_in_a_request_whose_follow_ups_the_ledger_has(app: Celery) -> None:
    after = signature("mine.after", app=app)
    fields = {"callbacks": as_message(after), "errbacks": as_message(after), "chain": as_message(after)}
    request = Context({"id": "j1", "root_id": "j1", "group": "g", "group_index": 0, "chord": dict(after), **fields})
    attached = follow_ups.detach(request)
    assert [getattr(request, name) for name in follow_ups.EMBEDDED] == [None] * 4
    assert json.loads(attached.headers) == {"group": "g", "group_index": 0}
    assert json.loads(attached.follow_ups)["group_index"] == 0
    assert follow_ups.detach(request) == Attachment(headers=attached.headers)


def pending_of(app: Celery, **embedded: Any) -> PendingFollowUps:
    return PendingFollowUps(follow_ups.attachment(embedded, {}).follow_ups + "\n")


def test_success_is_followed_by_links_and_the_chain_with_the_payload(app: Celery) -> None:
    first, second, third = (signature("mine.after", app=app, queue="mine", task_id=name) for name in "abc")
    noted: list[int] = []
    pending = pending_of(app, callbacks=as_message(first), chain=as_message(third, second), errbacks=as_message(first))
    assert follow_ups.send(app, End("j1", TASK, PAYLOAD), pending, noted.append) == 2
    assert noted == [1, 2]
    messages = sent(app, "mine")
    assert [message.headers["id"] for message in messages] == ["a", "b"]
    assert [message.payload[0] for message in messages] == [[PAYLOAD], [PAYLOAD]]
    assert [one["options"]["task_id"] for one in messages[1].payload[2]["chain"]] == ["c"]
    assert app.backend.get_task_meta("j1")["status"] == "SUCCESS"


def test_failure_is_followed_by_errbacks_with_the_id_and_fails_what_was_chained(app: Celery) -> None:
    first, second = (signature("mine.after", app=app, queue="mine", task_id=name) for name in "ab")
    pending = pending_of(app, callbacks=as_message(second), chain=as_message(second), errbacks=as_message(first))
    assert follow_ups.send(app, End("failed", TASK, NotFound("gone")), pending, lambda _: None) == 1
    (message,) = sent(app, "mine")
    assert (message.headers["id"], message.payload[0]) == ("a", ["failed"])
    assert (message.headers["parent_id"], message.headers["root_id"]) == ("failed", "failed")
    assert [app.backend.get_task_meta(name)["status"] for name in ("failed", "b")] == ["FAILURE", "FAILURE"]


def test_what_is_sent_already_is_not_sent_again(app: Celery) -> None:
    three = as_message(*(signature("mine.after", app=app, queue="mine", task_id=name) for name in "abc"))
    pending = PendingFollowUps(pending_of(app, callbacks=three).follow_ups, fence=1, sent=2)
    assert follow_ups.send(app, End("j1", TASK, PAYLOAD), pending, lambda _: None) == 3
    assert [message.headers["id"] for message in sent(app, "mine")] == ["c"]


@pytest.mark.parametrize(
    "options",
    [{"countdown": "soon"}, {"countdown": 1e12}, {"expires": 2**53}, {"retry_policy": 7}, {"headers": "none"}],
)
def test_one_that_cannot_be_sent_ends_as_invalid_request_and_the_others_follow(
    app: Celery, options: dict[str, Any]
) -> None:
    bad = signature("mine.after", app=app, queue="mine", task_id="bad", **options)
    good = signature("mine.after", app=app, queue="mine", task_id="good")
    pending = pending_of(app, callbacks=as_message(bad, good))
    assert follow_ups.send(app, End("j1", TASK, PAYLOAD), pending, lambda _: None) == 2
    assert [message.headers["id"] for message in sent(app, "mine")] == ["good"]
    assert app.backend.get_task_meta("bad")["status"] == "FAILURE"
    assert app.backend.get_task_meta("j1")["status"] == "SUCCESS"


def raised(error: Exception) -> Any:
    def signature(*_: object, **__: object) -> Any:
        raise error

    return signature


@pytest.mark.parametrize(
    "error", [RuntimeError("Recursive result parents"), RecursionError(), ImproperlyConfigured("x")]
)
def test_whatever_celery_says_of_one_that_cannot_be_sent_the_job_is_not_failed_by_it(
    app: Celery, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(follow_ups, "signature", raised(error))
    pending = PendingFollowUps('{"callbacks": [{"options": {}}]}')
    assert follow_ups.send(app, End("odd", TASK, PAYLOAD), pending, lambda _: None) == 1
    assert app.backend.get_task_meta("odd")["status"] == "SUCCESS"


def test_a_worker_that_gets_no_thread_leaves_a_follow_up_to_another_one(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_ups, "signature", raised(RuntimeError("can't start new thread")))
    pending = PendingFollowUps('{"callbacks": [{"options": {}}]}')
    with pytest.raises(RuntimeError):
        follow_ups.send(app, End("starved", TASK, PAYLOAD), pending, lambda _: None)


def test_follow_ups_and_stamps_that_are_too_large_are_refused() -> None:
    large = {"task": "mine.after", "args": ["x" * envelope.FOLLOW_UP_BYTES], "kwargs": {}, "options": {}}
    assert "more than 131072 bytes" in str(envelope.wrong_follow_up({"callbacks": [large]}))
    headers = {"id": "j1", "task": TASK, "stamped_headers": ["a"], "stamps": {"a": "x" * envelope.STAMP_BYTES}}
    assert "its stamps take more than 16384 bytes" in str(envelope.wrong_header(headers))


def test_of_a_refused_message_what_is_sound_follows_and_nothing_else() -> None:
    after = {"task": "mine.after", "args": [], "kwargs": {}, "options": {}}
    embed = {"callbacks": "none", "errbacks": [after], "chain": [{"task": 5}], "chord": after}
    assert envelope.sound_follow_ups(embed) == {"errbacks": [after], "chord": after}
    assert envelope.sound_follow_ups("nothing") == {}
    assert envelope.sound_place({"group": "g", "group_index": "1", "root_id": 7, "shadow": 5}) == {"group": "g"}
