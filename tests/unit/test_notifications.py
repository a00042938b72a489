"""Waiting for what a Redis publishes of results, one Redis that is a fake and one that says nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from celery import Celery

from producer import notifications
from producer.notifications import MOST_JOBS, POLL_S, Notifications, Rotation


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = fakeredis.FakeServer()
    with Celery("results", set_as_current=False, broker="memory://", backend="redis://results.invalid") as app:
        monkeypatch.setattr(app.backend, "_create_client", lambda **_: fakeredis.FakeRedis(server=server))
        yield app.backend


def soon() -> float:
    return time.monotonic() + 5


def confirmed(notified: Notifications, jobs: dict[str, None]) -> Any:
    """A subscription to the jobs, which Redis has confirmed."""
    subscription = notified.subscription()
    told: set[str] = set()
    while told != set(jobs):
        told.update(subscription.wait(jobs, (), until=soon()) or ())
    return subscription


def publish(backend: Any, job_id: str) -> int:
    return int(backend.client.publish(backend.get_key_for_task(job_id), "stored"))


def test_everything_gets_its_turn_and_what_has_ended_gets_none() -> None:
    jobs = {str(number): None for number in range(5000)}
    turns = Rotation(jobs)
    rounds = [turns.next() for _ in range(5)]
    assert [len(one) for one in rounds] == [MOST_JOBS] * 5
    assert {job_id for one in rounds[:3] for job_id in one} == set(jobs)
    for job_id in list(jobs)[2:]:
        del jobs[job_id]
    for _ in range(3):
        turns.next()
    assert sorted(turns.next()) == ["0", "1"]
    jobs.clear()
    assert turns.next() == turns.next() == []


def test_the_confirmation_of_a_subscription_is_a_reason_to_read_and_so_is_each_message(backend: Any) -> None:
    jobs = dict.fromkeys(("a", "b", "c"))
    subscription = confirmed(Notifications(lambda: backend), jobs)
    publish(backend, "b")
    publish(backend, "b")
    assert subscription.wait(jobs, (), until=soon()) == {"b"}
    assert subscription.wait(jobs, (), until=time.monotonic() + 0.05) == set()
    subscription.close()


def test_a_job_that_has_ended_is_heard_of_no_more(backend: Any) -> None:
    jobs = dict.fromkeys(("a", "b"))
    subscription = confirmed(Notifications(lambda: backend), jobs)
    publish(backend, "a")
    publish(backend, "b")
    del jobs["a"]
    assert subscription.wait(jobs, ["a", "b"], until=soon()) == {"b"}
    assert publish(backend, "a") == 0
    subscription.close()
    assert publish(backend, "b") == 0


def test_the_next_wait_hears_nothing_of_what_the_last_one_waited_for(backend: Any) -> None:
    notified = Notifications(lambda: backend)
    first = confirmed(notified, {"a": None})
    publish(backend, "a")
    first.close()
    second = confirmed(notified, {"b": None})
    publish(backend, "a")
    assert second.wait({"b": None}, (), until=time.monotonic() + 0.05) == set()
    again = confirmed(notified, {"a": None})
    publish(backend, "a")
    assert again.wait({"a": None}, (), until=soon()) == {"a"}
    second.close()
    again.close()
    assert len(notified._idle) == 1


def test_a_connection_that_was_idle_for_long_is_not_used_again(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notified = Notifications(lambda: backend)
    confirmed(notified, {"a": None}).close()
    ((kept, _, _),) = notified._idle
    assert notified.connect() is kept
    notified.give_back(kept)
    monkeypatch.setattr(notifications, "_IDLE_S", 0.0)
    assert notified.connect() is not kept
    assert kept.connection is None


def test_of_several_waits_that_end_together_one_connection_is_kept(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    notified = Notifications(lambda: backend)
    one, other = (confirmed(notified, {name: None}) for name in ("a", "b"))
    unsubscribed = notifications._unsubscribed

    def meanwhile(pubsub: Any) -> bool:
        monkeypatch.setattr(notifications, "_unsubscribed", unsubscribed)
        other.close()
        return unsubscribed(pubsub)

    monkeypatch.setattr(notifications, "_unsubscribed", meanwhile)
    one.close()
    assert len(notified._idle) == 1


class Silent:
    """A connection on which nothing is ever answered."""

    subscribed = True
    closed = False

    def subscribe(self, *_: Any) -> None:
        pass

    def get_message(self, *, timeout: float) -> None:
        time.sleep(timeout)

    def close(self) -> None:
        self.closed = True


def test_while_a_subscription_is_not_confirmed_results_are_polled_and_at_last_it_is_given_up(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "_CONFIRM_S", 0.25)
    notified, silent = Notifications(lambda: backend), Silent()
    monkeypatch.setattr(notified, "connect", lambda: silent)
    subscription = notified.subscription()
    rounds = 0
    while not silent.closed:
        begun = time.monotonic()
        assert subscription.wait({"a": None}, (), until=soon()) is None
        assert time.monotonic() - begun < POLL_S + 1
        rounds += 1
    assert 2 <= rounds <= 4
    subscription.close()


def test_a_back_end_that_publishes_nothing_is_polled() -> None:
    with Celery("results", set_as_current=False, broker="memory://", backend="cache+memory://") as app:
        subscription = Notifications(lambda: app.backend).subscription()
        for _ in range(2):
            assert subscription.wait({"a": None}, (), until=soon()) is None
        subscription.close()
