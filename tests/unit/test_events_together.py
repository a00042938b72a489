"""A worker's events for Flower leave together, and none stays behind. Celery's own parts are stood in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from worker.app import EVENTS_S, EventsTogether


class Hub:
    """Calls at once what is for its own thread, and keeps what is for later."""

    def __init__(self) -> None:
        self.later: list[tuple[float, Callable[[], None]]] = []

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        callback(*args)

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> None:
        self.later.append((delay_s, lambda: callback(*args)))


class Dispatcher:
    on_send_buffered: Callable[[], None]

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.messages: list[list[str]] = []

    def send(self, event: str) -> None:
        self.waiting.append(event)
        self.on_send_buffered()

    def flush(self) -> None:
        if self.waiting:
            self.messages.append(self.waiting)
            self.waiting = []


class Consumer:
    """What a step is handed of Celery's consumer."""

    steps: list[Any]

    def __init__(self) -> None:
        self.steps = []
        self.hub, self.event_dispatcher = Hub(), Dispatcher()


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


@pytest.fixture
def step(consumer: Consumer) -> EventsTogether:
    started = EventsTogether(consumer)
    started.start(consumer)
    return started


@pytest.mark.usefixtures("step")
def test_events_of_a_tenth_of_a_second_are_one_message(consumer: Consumer) -> None:
    for event in ("received", "started", "succeeded"):
        consumer.event_dispatcher.send(event)
    ((delay_s, send),) = consumer.hub.later
    send()
    assert delay_s == EVENTS_S
    assert consumer.event_dispatcher.messages == [["received", "started", "succeeded"]]


@pytest.mark.usefixtures("step")
def test_an_event_after_a_message_is_in_the_next(consumer: Consumer) -> None:
    for event in ("received", "started"):
        consumer.event_dispatcher.send(event)
        consumer.hub.later.pop()[1]()
    assert consumer.event_dispatcher.messages == [["received"], ["started"]]


def test_a_worker_that_stops_sends_what_it_has_gathered(consumer: Consumer, step: EventsTogether) -> None:
    consumer.event_dispatcher.send("succeeded")
    step.stop(consumer)
    assert consumer.event_dispatcher.messages == [["succeeded"]]


def test_a_worker_whose_connection_was_lost_gathers_anew(consumer: Consumer, step: EventsTogether) -> None:
    consumer.event_dispatcher.send("received")
    consumer.hub, consumer.event_dispatcher = Hub(), Dispatcher()
    step.start(consumer)
    consumer.event_dispatcher.send("started")
    assert len(consumer.hub.later) == 1
