"""What stands before each call to a server, with two processes' guards on one fakeredis."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import pytest
import redis

from courier.errors import CourierError, PacsMisanswered, PacsRejected, PacsUnauthorized, PacsUnavailable
from courier.ledger.breakers import BREAKER, CHANGES, Breakers, BreakerState
from courier.ledger.jobs import PREFIX
from courier.ledger.latencies import Latencies
from courier.ledger.slots import Slots
from courier.redaction import job_lines
from courier.settings import BreakerSettings, ServerSettings
from sandbox.processes import poll
from worker.pacs.guard import FRESH_S, Guard
from worker.pacs.server_rates import ServerRates

SERVER = ServerSettings(name="a", type="dicomweb", url="http://a", max_concurrency=4, read_timeout_s=5)
OTHER = ServerSettings(name="b", type="dicomweb", url="http://b")
SETTINGS = BreakerSettings(failures=3, pause_s=60, pause_cap_s=600)


class CountingBreakers(Breakers):
    """Counts what is asked of Redis."""

    asked = 0

    def read(self, *args: Any) -> dict[str, BreakerState]:
        self.asked += 1
        return super().read(*args)

    def succeeded(self, *args: Any, **kwargs: Any) -> BreakerState:
        self.asked += 1
        return super().succeeded(*args, **kwargs)


@dataclass
class Process:
    """A worker process, as far as its calls to servers go."""

    client: fakeredis.FakeRedis
    breakers: CountingBreakers = field(init=False)
    guard: Guard = field(init=False)
    rates: ServerRates = field(init=False)
    reached: int = 0
    slept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breakers, self.rates = CountingBreakers(self.client, SETTINGS), ServerRates(self.client)
        servers = [SERVER, OTHER]
        self.guard = Guard(self.breakers, Slots(self.client), servers, rates=self.rates, sleep=self.slept.append)

    def call(
        self, error: CourierError | None = None, *, changes: bool = False, during: Callable[[], object] | None = None
    ) -> CourierError | None:
        """One call that ends with ``error``; what came of it."""
        try:
            with self.guard.call(SERVER, changes=changes):
                self.reached += 1
                if during:
                    during()
                if error:
                    raise error
        except CourierError as raised:
            return raised
        return None

    def state(self, breaker: str = "a") -> str:
        return self.breakers.read([breaker])[breaker].name


def failure(**more: Any) -> PacsUnavailable:
    return PacsUnavailable("No.", server_name="a", **{"details": {"phase": "answer"}, **more})


def open_circuit_error(error: CourierError | None) -> str | None:
    assert isinstance(error, PacsUnavailable)
    return error.open_circuit


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def one(client: fakeredis.FakeRedis) -> Process:
    return Process(client)


@pytest.fixture
def two(client: fakeredis.FakeRedis) -> Process:
    return Process(client)


def open_it(process: Process, client: fakeredis.FakeRedis, *, half: bool = False) -> None:
    for _ in range(SETTINGS.failures):
        process.call(failure())
    if half:
        client.hset(f"{PREFIX}{BREAKER}a", "until_ms", 0)


def test_calls_to_a_server_that_is_well_ask_redis_for_nothing(one: Process) -> None:
    one.call()
    asked = one.breakers.asked
    for _ in range(100):
        assert one.call(changes=True) is None
    assert one.breakers.asked == asked


def test_after_enough_failures_the_server_is_not_asked_and_its_jobs_rest(
    one: Process, two: Process, client: fakeredis.FakeRedis
) -> None:
    assert [open_circuit_error(one.call(failure())) for _ in range(3)] == [None, None, "a"]
    assert open_circuit_error(refused := one.call()) == "a"
    assert not refused.is_attempt
    assert one.reached == 3
    assert open_circuit_error(two.call()) == "a"
    assert two.reached == 0


def test_the_one_that_knew_of_nothing_learns_it_within_a_second(
    one: Process, two: Process, client: fakeredis.FakeRedis
) -> None:
    two.call()
    open_it(one, client)
    assert poll(lambda: open_circuit_error(two.call(failure())) == "a" and two.call(None) is not None, timeout_s=10)


@pytest.mark.parametrize(
    "error",
    [
        PacsRejected("No.", server_name="a"),
        PacsUnauthorized("No.", server_name="a"),
        PacsMisanswered("No.", server_name="a"),
        PacsUnavailable("No.", server_name="b"),
    ],
    ids=lambda error: f"{error.code} of {error.server_name}",
)
def test_what_is_no_failure_of_the_server_leaves_it_closed(one: Process, error: CourierError) -> None:
    for _ in range(5):
        assert one.call(error) is error
    assert one.state() == "closed"


def test_a_refusal_is_an_answer_and_begins_the_count_anew(one: Process) -> None:
    one.call(failure())
    one.call(failure())
    one.call(PacsRejected("No.", server_name="a"))
    assert open_circuit_error(one.call(failure())) is None


def test_a_server_that_takes_no_changes_still_answers_questions(one: Process) -> None:
    for _ in range(3):
        one.call()
        one.call(failure(details={"status": 503}), changes=True)
    assert open_circuit_error(one.call(changes=True)) == "a" + CHANGES
    assert one.call() is None


def test_a_change_that_does_not_even_connect_speaks_of_the_server(one: Process) -> None:
    assert [open_circuit_error(one.call(failure(details={"phase": "connect"}), changes=True)) for _ in range(3)][
        -1
    ] == "a"
    assert open_circuit_error(one.call()) == "a"


def test_a_failure_that_names_a_time_is_heeded_at_once(one: Process) -> None:
    assert open_circuit_error(one.call(failure(details={"status": 500}, retry_after_s=30), changes=True)) == "a"
    assert open_circuit_error(one.call()) == "a"


def too_fast(status: int = 429, after_s: float | None = None) -> PacsUnavailable:
    error = failure(details={"status": status}, retry_after_s=after_s)
    error.slow_down = True
    return error


def waits_s(error: CourierError | None) -> float:
    """How long the job of a call waits that was kept from its server, or answered "fewer requests"."""
    assert isinstance(error, PacsUnavailable)
    assert (error.slow_down, error.open_circuit) == (True, None)
    return error.retry_after_s or 0


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("status", [429, 503])
def test_a_request_to_slow_down_is_heeded_by_all_and_is_no_failure(
    one: Process, two: Process, status: int, changes: bool
) -> None:
    answer = one.call(too_fast(status, 30), changes=changes)
    assert 30 <= waits_s(answer) < 32
    assert waits_s(one.call()) > 29
    two.guard.refresh()
    kept = two.call(changes=True)
    assert waits_s(kept) > 29
    assert (kept.details["phase"], two.reached) == ("resting", 0), "nothing was sent"
    assert one.breakers.read(["a"])["a"].failures == 0


def test_without_a_time_the_next_requests_go_out_one_by_one(one: Process) -> None:
    one.call(too_fast())
    for _ in range(3):
        assert one.call() is None
    assert one.slept == sorted(one.slept)
    assert 0.2 < one.slept[-1] < 0.6
    assert one.reached == 4


def test_many_answers_to_what_was_under_way_lower_the_rate_once(one: Process) -> None:
    def under_way(left: int) -> None:
        if left:
            one.call(too_fast(), during=lambda: under_way(left - 1))

    under_way(4)
    rate = one.rates.read(["a"])["a"]
    assert (rate.cuts, rate.per_s) == (1, pytest.approx(8, rel=0.05))
    one.call(too_fast())
    assert one.rates.read(["a"])["a"].cuts == 2


def test_a_server_that_was_asked_fast_goes_on_at_half_that_speed(one: Process) -> None:
    for _ in range(100):
        one.call()
    one.call(too_fast())
    assert one.rates.read(["a"])["a"].per_s == pytest.approx(101 / 2 / 2, rel=0.1)


def test_a_probe_that_is_answered_so_says_nothing_of_the_server(one: Process, client: fakeredis.FakeRedis) -> None:
    open_it(one, client, half=True)
    one.guard.refresh()
    assert one.call(too_fast()).open_circuit is None
    assert one.state() == "half-open"
    assert one.call() is None
    assert one.state() == "closed"


def test_other_servers_go_on(one: Process) -> None:
    one.call(too_fast(after_s=30))
    with one.guard.call(OTHER, changes=True):
        pass
    assert one.slept == []


def test_where_redis_is_away_the_answer_itself_says_how_long_to_wait(
    one: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError

    monkeypatch.setattr(one.rates, "lower", lost)
    assert waits_s(one.call(too_fast(after_s=30))) == 30


def test_a_guard_asks_redis_for_no_turn_until_a_server_asks_for_fewer_requests(
    one: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.call()
    taken: list[str] = []
    monkeypatch.setattr(one.rates, "take", taken.append)
    for _ in range(10):
        one.call()
    assert taken == []


def test_one_probe_over_all_processes_closes_it(one: Process, two: Process, client: fakeredis.FakeRedis) -> None:
    open_it(one, client, half=True)
    one.guard.refresh()
    others: list[str | None] = []
    assert (
        one.call(during=lambda: others.extend([open_circuit_error(two.call()), open_circuit_error(one.call())])) is None
    )
    assert others == ["a", "a"]
    assert one.state() == "closed"
    two.guard.refresh()
    assert two.call() is None


def test_a_probe_that_fails_costs_its_job_nothing_either(one: Process, client: fakeredis.FakeRedis) -> None:
    open_it(one, client, half=True)
    one.guard.refresh()
    verdict = one.call(failure())
    assert open_circuit_error(verdict) == "a"
    assert not verdict.is_attempt
    assert one.state() == "open"


def test_a_probe_that_says_nothing_makes_room_for_the_next(one: Process, client: fakeredis.FakeRedis) -> None:
    open_it(one, client, half=True)
    one.guard.refresh()
    one.call(PacsMisanswered("Cut off.", server_name="a"))
    assert one.state() == "half-open"
    assert one.call() is None
    assert one.state() == "closed"


@pytest.mark.parametrize(("verdict", "expected"), [(None, None), (failure(), "a")], ids=["well", "not well"])
def test_the_probes_own_job_waits_for_the_verdict_and_no_other_does(
    one: Process, client: fakeredis.FakeRedis, verdict: CourierError | None, expected: str | None
) -> None:
    open_it(one, client, half=True)
    one.guard.refresh()
    reached, leave = threading.Event(), threading.Event()
    ends: dict[str, CourierError | None] = {}

    def probe() -> None:
        with job_lines("j1"):
            ends["probe"] = one.call(verdict, during=lambda: (reached.set(), leave.wait(10)))

    def second() -> None:
        with job_lines("j1"):
            ends["second"] = one.call()

    threads = [threading.Thread(target=probe), threading.Thread(target=second)]
    threads[0].start()
    assert reached.wait(10)
    threads[1].start()
    with job_lines("j2"):
        assert open_circuit_error(one.call()) == "a"
    assert "second" not in ends
    leave.set()
    for thread in threads:
        thread.join()
    assert (ends["second"] and open_circuit_error(ends["second"])) == expected


STATES = ("closed", "open", "half-open", "another process tests it", "another job tests it")
PASSABLE = ("closed", "half-open")


def put_into(state: str, breaker: str, *, mine: Process, other: Process, client: fakeredis.FakeRedis) -> None:
    if state == "closed":
        return
    for _ in range(SETTINGS.failures):
        mine.breakers.failed(breaker)
    if state != "open":
        client.hset(PREFIX + BREAKER + breaker, "until_ms", 0)
    if state == "another process tests it":
        assert other.breakers.probe(breaker, "other process", for_s=60)[0]
    if state == "another job tests it":
        mine.guard.refresh()
        with job_lines("other job"):
            assert mine.guard.admit(SERVER, breaker) is not None


@pytest.mark.parametrize("changes", STATES)
@pytest.mark.parametrize("server", STATES)
def test_of_two_breakers_each_probe_is_released_when_the_other_refuses(
    one: Process, two: Process, client: fakeredis.FakeRedis, server: str, changes: str
) -> None:
    states = {"a": server, "a" + CHANGES: changes}
    for breaker, state in states.items():
        put_into(state, breaker, mine=one, other=two, client=client)
    one.guard.refresh()
    before = dict(one.guard._probes)
    with job_lines("j1"):
        refused = one.call(changes=True)
    passes = server in PASSABLE and changes in PASSABLE
    assert one.reached == int(passes)
    assert (refused is None) == passes
    assert one.guard._probes == before, "a probe of this call is still registered"
    for breaker, state in states.items():
        if state == "half-open" and not passes:
            assert two.breakers.probe(breaker, "next", for_s=60)[0], f"{breaker} admits no other probe"
    if passes:
        assert (one.state("a"), one.state("a" + CHANGES)) == ("closed", "closed")


@pytest.mark.parametrize("state", STATES)
def test_a_question_does_not_care_whether_the_server_takes_changes(
    one: Process, two: Process, client: fakeredis.FakeRedis, state: str
) -> None:
    put_into(state, "a" + CHANGES, mine=one, other=two, client=client)
    one.guard.refresh()
    assert one.call() is None


class CutOff(CountingBreakers):
    """Redis goes away just as the second breaker is asked."""

    def probe(self, breaker: str, *args: Any, **kwargs: Any) -> tuple[bool, BreakerState]:
        if breaker.endswith(CHANGES):
            raise redis.ConnectionError
        return super().probe(breaker, *args, **kwargs)


def test_the_first_probe_is_released_when_redis_fails_on_the_second(
    one: Process, two: Process, client: fakeredis.FakeRedis
) -> None:
    for breaker in ("a", "a" + CHANGES):
        put_into("half-open", breaker, mine=one, other=two, client=client)
    guard = Guard(CutOff(client, SETTINGS), Slots(client), [SERVER])
    with pytest.raises(redis.ConnectionError), guard.call(SERVER, changes=True):
        pass
    assert two.breakers.probe("a", "next", for_s=60)[0]


def test_more_calls_than_there_are_slots_wait_and_then_rest(client: fakeredis.FakeRedis) -> None:
    server = SERVER.model_copy(update={"max_concurrency": 1, "read_timeout_s": 0.1})
    guard = Guard(Breakers(client), Slots(client), [server])
    with (
        guard.call(server, changes=False),
        pytest.raises(PacsUnavailable, match="1 requests in flight") as raised,
        guard.call(server, changes=False),
    ):
        pass
    assert raised.value.open_circuit == "a"


def unauthorized(*, scope: Any = "credential", server: str = "a") -> PacsUnauthorized:
    return PacsUnauthorized("a answered 401.", server_name=server, scope=scope, details={"status": 401})


def test_a_refused_credential_lets_no_process_ask_until_the_server_accepts_it(
    one: Process, two: Process, client: fakeredis.FakeRedis
) -> None:
    refused = one.call(unauthorized())
    assert refused is not None
    assert refused.open_circuit == "a:credential"
    for process in (one, two):
        waiting = process.call()
        assert isinstance(waiting, PacsUnauthorized)
        assert waiting.open_circuit == "a:credential"
        assert waiting.message.endswith("(circuit breaker of the credential open): a answered 401.")
    assert (one.reached, two.reached) == (1, 0)
    assert one.breakers.states(["a"])["a"].name == "open"
    client.hset(f"{PREFIX}{BREAKER}a:credential", "until_ms", 0)
    two.guard.refresh()
    assert two.call() is None
    assert one.state("a:credential") == "closed"


def test_a_right_that_is_missing_for_one_request_stops_no_other(one: Process) -> None:
    for _ in range(SETTINGS.failures + 1):
        error = one.call(unauthorized(scope="request"), changes=True)
        assert error is not None
        assert error.open_circuit is None
    assert one.call(changes=True) is None


def test_the_credential_of_one_server_is_not_that_of_another(one: Process) -> None:
    one.call(unauthorized(server="b"))
    assert one.call() is None


def test_a_server_that_does_not_answer_says_nothing_of_its_credential(
    one: Process, client: fakeredis.FakeRedis
) -> None:
    one.call(unauthorized())
    client.hset(f"{PREFIX}{BREAKER}a:credential", "until_ms", 0)
    one.guard.refresh()
    assert open_circuit_error(one.call(failure())) is None
    assert one.state("a:credential") == "half-open"
    one.guard.refresh()
    assert one.call() is None
    assert one.state("a:credential") == "closed"


def test_servers_seem_well_while_nothing_is_known_against_any_of_them(
    client: fakeredis.FakeRedis, one: Process, two: Process
) -> None:
    assert not one.guard.seem_well(["a", "b"]), "nothing is known before the first look"
    one.call()
    asked = one.breakers.asked
    assert one.guard.seem_well(["a", "b"])
    assert one.breakers.asked == asked
    assert not one.guard.seem_well(["a", "another"])
    one.call(failure())
    assert (one.guard.seem_well(["b"]), one.guard.seem_well(["a", "b"])) == (True, False)


@pytest.mark.parametrize("what", ["failure", "credential", "changes", "slowed"])
def test_servers_do_not_seem_well_once_another_process_has_found_something_against_one(
    one: Process, two: Process, what: str
) -> None:
    one.call()
    if what == "credential":
        refusal = PacsUnauthorized("No.", server_name="a")
        refusal.scope = "credential"
        two.call(refusal)
    elif what == "slowed":
        two.rates.lower("a", status=429, retry_after_s=None, cuts=0, measured_per_s=1)
    else:
        two.call(failure(), changes=what == "changes")
    one.guard.refresh()
    assert (one.guard.seem_well(["b"]), one.guard.seem_well(["a"])) == (True, False)


def test_old_good_news_is_no_news(client: fakeredis.FakeRedis) -> None:
    now = [100.0]
    guard = Guard(Breakers(client), Slots(client), [SERVER], clock=lambda: now[0])
    guard.refresh()
    assert guard.seem_well(["a"])
    now[0] += FRESH_S + 0.1
    assert not guard.seem_well(["a"])


def test_what_questions_took_is_written_down_by_server_and_what_pushes_took_is_not(client: fakeredis.FakeRedis) -> None:
    clock = [0.0]
    latencies = Latencies(client)
    guard = Guard(Breakers(client), Slots(client), [SERVER], latencies=latencies, clock=lambda: clock[0])
    for took_s, changes in ((0.010, False), (0.030, False), (9.0, True)):
        with guard.call(SERVER, changes=changes):
            clock[0] += took_s
    with contextlib.suppress(PacsUnavailable), guard.call(SERVER, changes=False):
        clock[0] += 5.0
        raise PacsUnavailable("No.", server_name="a", details={"phase": "answer"})
    guard._beat()
    assert latencies.read([SERVER.name, "other"]) == {SERVER.name: pytest.approx(20.0)}


def test_a_latency_that_no_worker_has_measured_lately_is_not_told(client: fakeredis.FakeRedis) -> None:
    latencies = Latencies(client)
    latencies.note({"a": 7.0})
    client.hset("courier:latency", "a", "7.0 1000")
    assert latencies.read(["a"]) == {}


def test_a_stream_took_as_long_as_until_it_began(client: fakeredis.FakeRedis) -> None:
    clock = [0.0]
    latencies = Latencies(client)
    guard = Guard(Breakers(client), Slots(client), [SERVER], latencies=latencies, clock=lambda: clock[0])
    with guard.call(SERVER, changes=False) as call:
        clock[0] += 0.050
        call.answered()
        clock[0] += 60
    guard._beat()
    assert latencies.read([SERVER.name]) == {SERVER.name: pytest.approx(50.0)}
