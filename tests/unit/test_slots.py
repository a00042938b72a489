"""Slots that several processes share: each `Slots` below stands for a process, on one fakeredis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import fakeredis
import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from courier.ledger.jobs import PREFIX
from courier.ledger.slots import SLOTS, NoSlot, Slots
from sandbox.processes import poll


class CountingSlots(Slots):
    """Counts what it asks of Redis."""

    turns = 0

    def turn(self, *args: object, **kwargs: object) -> tuple[int, int, int]:
        self.turns += 1
        return super().turn(*args, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def process(client: fakeredis.FakeRedis) -> Callable[[], CountingSlots]:
    return lambda: CountingSlots(client)


def use(slots: Slots, *, limit: int, wait_s: float = 0) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(slots.slot("a", limit=limit, wait_s=wait_s))
    return stack


def can_use(slots: Slots, *, limit: int) -> bool:
    try:
        use(slots, limit=limit).close()
    except NoSlot:
        return False
    return True


def test_the_limit_holds_over_all_processes(process: Callable[[], CountingSlots]) -> None:
    one, two = process(), process()
    with use(one, limit=3), use(one, limit=3), use(two, limit=3):
        assert not can_use(one, limit=3)
        assert not can_use(two, limit=3)


def test_a_busy_process_asks_redis_for_nothing(process: Callable[[], CountingSlots]) -> None:
    one = process()
    for _ in range(500):
        use(one, limit=4).close()
    assert one.turns == 1


def test_what_is_idle_is_given_back(process: Callable[[], CountingSlots], client: fakeredis.FakeRedis) -> None:
    one, two = process(), process()
    stacks = [use(one, limit=4) for _ in range(4)]
    for stack in stacks:
        stack.close()
    one.tend()
    one.tend()
    assert client.hgetall(f"{PREFIX}{SLOTS}a") == {}
    assert can_use(two, limit=4)


def test_a_newcomer_waits_until_the_others_have_shrunk(process: Callable[[], CountingSlots]) -> None:
    one, two = process(), process()
    stacks = [use(one, limit=4) for _ in range(4)]
    entered = threading.Event()
    leave = threading.Event()

    def newcomer() -> None:
        with two.slot("a", limit=4, wait_s=20):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=newcomer)
    thread.start()
    try:
        assert not entered.wait(0.3)
        one.tend()  # once a second: now it knows that somebody waits
        stacks.pop().close()
        assert entered.wait(10)
        assert not can_use(one, limit=4)
    finally:
        leave.set()
        thread.join()
        for stack in stacks:
            stack.close()


def test_with_more_processes_than_slots_everybody_has_a_turn(process: Callable[[], CountingSlots]) -> None:
    slots = [process() for _ in range(3)]
    turns = [0, 0, 0]
    over = threading.Event()

    def work(number: int) -> None:
        while not over.is_set():
            with slots[number].slot("a", limit=1, wait_s=30):
                turns[number] += 1
            slots[number].tend()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert poll(lambda: min(turns) >= 2, timeout_s=30)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_dead_processs_slots_expire(client: fakeredis.FakeRedis) -> None:
    dead = Slots(client, lease_s=0.2)
    held = use(dead, limit=1)
    other = Slots(client)
    assert not can_use(other, limit=1)
    assert poll(lambda: can_use(other, limit=1), timeout_s=10)
    held.close()


def test_a_process_that_was_taken_for_dead_comes_back_with_what_it_uses(client: fakeredis.FakeRedis) -> None:
    one, two = Slots(client), Slots(client)
    with use(one, limit=2):
        client.delete(f"{PREFIX}{SLOTS}a")
        one.tend()
        with use(two, limit=2):
            assert not can_use(two, limit=2)


def test_work_that_is_done_stays_done_when_redis_cannot_be_told(
    process: Callable[[], CountingSlots], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = process(), process()
    stacks = [use(one, limit=2) for _ in range(2)]
    assert not can_use(two, limit=2)
    one.tend()

    def away(*_: object, **__: object) -> tuple[int, int, int]:
        raise redis.ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(one, "turn", away)
        stacks.pop().close()
    assert not can_use(two, limit=2)
    one.tend()
    assert poll(lambda: can_use(two, limit=2), timeout_s=10)
    stacks.pop().close()


class ManyProcesses(RuleBasedStateMachine):
    """Whatever they do, and whoever dies: no more are in use than there may be."""

    LIMIT = 3

    def __init__(self) -> None:
        super().__init__()
        self.client = fakeredis.FakeRedis(decode_responses=True)
        self.processes = [Slots(self.client) for _ in range(3)]
        self.held: list[ExitStack] = []

    def teardown(self) -> None:
        for stack in self.held:
            stack.close()
        self.client.close()

    @rule(number=st.integers(0, 2))
    def take(self, number: int) -> None:
        with suppress(NoSlot):
            self.held.append(use(self.processes[number], limit=self.LIMIT))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1))).close()

    @rule(number=st.integers(0, 2))
    def tend(self, number: int) -> None:
        self.processes[number].tend()

    @invariant()
    def the_limit_holds(self) -> None:
        assert len(self.held) <= self.LIMIT
        leased = [int(str(value).split(":")[0]) for value in self.client.hvals(f"{PREFIX}{SLOTS}a")]
        assert len(self.held) <= sum(leased) <= self.LIMIT


ManyProcesses.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
test_no_sequence_of_events_exceeds_the_limit = ManyProcesses.TestCase


class Exchanges(Slots):
    """Counts every exchange with Redis."""

    exchanges = 0

    def _exchange(self, wishes: Any) -> Any:
        self.exchanges += 1
        return super()._exchange(wishes)


def test_slots_of_several_servers_are_leased_in_one_exchange(client: fakeredis.FakeRedis) -> None:
    slots = Exchanges(client)
    slots.reserve({"a": 8, "b": 2, "c": 1}, 2)
    assert slots.exchanges == 1
    with ExitStack() as calls:
        for name, limit in (("a", 8), ("a", 8), ("b", 2), ("b", 2), ("c", 1)):
            calls.enter_context(slots.slot(name, limit=limit, wait_s=0))
    assert slots.exchanges == 1
    slots.reserve({"a": 8, "b": 2, "c": 1}, 2)
    assert slots.exchanges == 1, "what is held and not in use need not be leased"


def test_reserved_slots_count_for_the_limit_and_nothing_waits_in_line_for_those_that_are_not_free(
    client: fakeredis.FakeRedis,
) -> None:
    one, two = Exchanges(client), Slots(client)
    with use(two, limit=2):
        one.reserve({"a": 2}, 2)
        assert client.zcard(f"{PREFIX}slotqueue:a") == 0
        assert not can_use(two, limit=2), "one has reserved what was left"
        assert can_use(one, limit=2)
    one.tend()
    one.tend()
    assert can_use(two, limit=2)


def test_a_reservation_for_which_nothing_is_free_takes_nothing_and_keeps_a_place_in_line(
    client: fakeredis.FakeRedis,
) -> None:
    one, two = Slots(client), Slots(client)
    with use(two, limit=1):
        one.reserve({"a": 1, "b": 1}, 2)
        assert not can_use(one, limit=1)
        waiting = client.zrange(f"{PREFIX}slotqueue:a", 0, -1)
        one.tend()
        assert client.zrange(f"{PREFIX}slotqueue:a", 0, -1) in (waiting, [])
    assert poll(lambda: can_use(one, limit=1), timeout_s=10)


def test_slots_that_were_to_be_given_back_are_so_when_a_reservation_did_not_reach_redis(
    client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: Any) -> None:
        raise redis.ConnectionError

    one = Slots(client)
    with use(one, limit=4), use(one, limit=4):
        pass
    one.tend()
    with monkeypatch.context() as while_away:
        while_away.setattr(one, "_exchange", away)
        with suppress(redis.ConnectionError):
            one.tend()
        with pytest.raises(redis.ConnectionError):
            one.reserve({"a": 4}, 4)
    one.tend()
    assert client.hvals(f"{PREFIX}{SLOTS}a") == []
