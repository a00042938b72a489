"""What stands before every call to a server in this process: an operator's order to leave the server alone, its circuit
breakers, its rate if it has asked for fewer requests, and its slots, all workers' alike.

The states of orders, breakers and rates are read twice a second for all servers together, and after a failure of one's
own; a call to a server that is well asks Redis for nothing. What is sent over the wire is none of this module's
business.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import redis

from courier.errors import CourierError, PacsUnauthorized, PacsUnavailable, TryAgain
from courier.ledger.breakers import CHANGES, CREDENTIAL, Breakers, BreakerState, breakers_of, circuit_open
from courier.ledger.latencies import Latencies
from courier.ledger.slots import NoSlot, Slots
from courier.ledger.suspensions import Suspensions
from courier.redaction import job_in_hand
from courier.settings import ServerSettings
from courier.waits import SERVER_BUSY, WaitReason, waiting_for
from worker.pacs.in_service import suspended, suspended_error
from worker.pacs.server_rates import ServerRate, ServerRates

log = logging.getLogger(__name__)

BEAT_S = 0.5
#: So long after a beat that brought good news no job asks for itself.
FRESH_S = 2 * BEAT_S
#: How often a process writes down how fast the servers have answered.
LATENCIES_S = 5.0
#: A probe whose process has died is given up after this.
PROBE_S = 10.0
#: How fast a server was asked is measured over so many seconds, and at most so many requests.
_MEASURED_S = 2.0
_REMEMBERED = 2000


@dataclass
class _Probe:
    """The one call that was let through a half-open breaker, while it is this process's."""

    breaker: str
    job: str | None
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _CircuitSnapshot:
    """A state, and when by this process's clock it was read."""

    state: BreakerState
    at: float


class Call:
    """One call on its way. `answered` says that the server is well, before all of its answer has come."""

    def __init__(self, guard: Guard, breakers: Sequence[str], cuts: int = 0) -> None:
        """``cuts``: how often the server's rate had been lowered when the call went out."""
        self._guard, self._breakers, self._cuts = guard, breakers, cuts
        self._probes: dict[str, _Probe] = {}
        self._sent_at: float | None = None

    def admit(self, server: ServerSettings) -> None:
        """Pass all breakers, as the probe of each that is half-open.

        Raises
        ------
        PacsUnavailable, PacsUnauthorized
            One of them refuses. `over` releases the probes of those that were passed before it.
        """
        for breaker in self._breakers:
            probe = self._guard.admit(server, breaker)
            if probe is not None:
                self._probes[breaker] = probe
        self._sent_at = self._guard.now()

    def answered(self) -> None:
        if self._sent_at is not None and not self._breakers[-1].endswith(CHANGES):  # a question, not the time of a push
            self._guard.measured(self._breakers[0], self._sent_at)
            self._sent_at = None
        for breaker in self._breakers:
            self._guard.succeeded(breaker, self._probes.pop(breaker, None))

    def failed(self, error: PacsUnavailable) -> None:
        """A breaker that is open now keeps the job from being tried again before the server is well."""
        changes = self._breakers[-1].endswith(CHANGES)
        breaker = self._breakers[-1] if changes and not _is_down(error) else self._breakers[0]
        probe = self._probes.pop(breaker, None)
        if not self._guard.failed(breaker, probe, error.retry_after_s).closed:
            error.open_circuit, error.is_attempt = breaker, probe is None

    def unauthorized(self, error: PacsUnauthorized) -> None:
        """The server is well. The breaker of the credential opens at once if the credential as such is refused; a
        right that is missing for one request opens nothing.
        """
        if error.scope == "request":
            self.answered()
            return
        server, credential, *_ = self._breakers
        self._guard.succeeded(server, self._probes.pop(server, None))
        probe = self._probes.pop(credential, None)
        if not self._guard.failed(credential, probe, at_once=True, reason=error.message).closed:
            error.open_circuit = credential

    def slowed(self, server: ServerSettings, error: PacsUnavailable) -> None:
        """The server asks for fewer requests, which says neither that it is well nor that it is not."""
        self._guard.slow_down(server, error, self._cuts)

    def over(self) -> None:
        """Nothing is known of the server by this call: another one may be the probe."""
        for probe in self._probes.values():
            self._guard.give_up(probe)


class Guard:
    """The breakers, rates and slots as one process sees them. Safe for threads; made after a fork."""

    def __init__(  # noqa: PLR0913 - all that stands before a call
        self,
        breakers: Breakers,
        slots: Slots,
        servers: Sequence[ServerSettings],
        *,
        rates: ServerRates | None = None,
        suspensions: Suspensions | None = None,
        latencies: Latencies | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._breakers, self._slots, self._clock = breakers, slots, clock
        self._rates, self._sleep = rates, sleep
        self._suspensions, self._latencies = suspensions, latencies
        #: Of the questions since the last report: how many each server has answered, and how long that took (s).
        self._measured: dict[str, tuple[int, float]] = {}
        self._reported_at = clock()
        self._servers = [server.name for server in servers]
        #: The servers that have asked for fewer requests, and when each was asked lately.
        self._slowed: frozenset[str] = frozenset()
        self._asked: dict[str, deque[float]] = {name: deque(maxlen=_REMEMBERED) for name in self._servers}
        self._names = [name for server in servers for name in breakers_of(server.name)]
        self._seen: dict[str, _CircuitSnapshot] = {}
        self._probes: dict[str, _Probe] = {}
        self._half_open = threading.Lock()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._looked = False

    @contextmanager
    def call(self, server: ServerSettings, *, changes: bool) -> Iterator[Call]:
        """Stand guard over one call to ``server``. What is raised inside is judged and goes on.

        Raises
        ------
        PacsUnavailable
            An operator has taken the server out of service, the circuit is open, or the server has no room for one
            more request; ``open_circuit`` says so.
        PacsUnauthorized
            It refuses the worker's credential at present.
        """
        self._wake_up()
        if (suspension := suspended(self._suspensions).get(server.name)) is not None:
            raise suspended_error(server, suspension)
        names = breakers_of(server.name) if changes else breakers_of(server.name)[:-1]
        for name in names:
            self._refuse_if_open(server, name)
        cuts = self._wait_for_turn(server)
        with self._slot(server):
            call = Call(self, names, cuts)
            try:
                call.admit(server)
                yield call
                call.answered()
            except CourierError as error:
                _record_error(call, server, error)
                raise
            finally:
                call.over()

    @contextmanager
    def _slot(self, server: ServerSettings) -> Iterator[None]:
        limit, wait_s = server.max_concurrency, server.read_timeout_s
        taken = False
        try:
            busy = WaitReason(
                SERVER_BUSY, f"{server.name} has {limit} requests in flight (max_concurrency)", server.name
            )
            with self._slots.slot(server.name, limit=limit, wait_s=wait_s, meanwhile=waiting_for(busy)):
                taken = True
                yield
        except NoSlot:
            if taken:
                raise
            sentence = f"{server.name} has {limit} requests in flight and took no further one within {wait_s:g} s."
            raise _not_sent_error(server, server.name, sentence) from None

    def reserve(self, servers: Iterable[ServerSettings], each: int) -> None:
        """Have slots ready for ``each`` calls to these servers, as far as they are free; with one exchange for all."""
        self._slots.reserve({server.name: server.max_concurrency for server in servers}, each)

    # --- latencies ----------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock()

    def measured(self, server: str, sent_at: float) -> None:
        """A question has been answered."""
        count, total_s = self._measured.get(server, (0, 0.0))
        self._measured[server] = (count + 1, total_s + self._clock() - sent_at)

    def _report_latencies(self) -> None:
        if self._latencies is None or self._clock() - self._reported_at < LATENCIES_S:
            return
        self._reported_at = self._clock()
        measured, self._measured = self._measured, {}
        self._latencies.note({name: 1000 * total_s / count for name, (count, total_s) in measured.items()})

    # --- rates --------------------------------------------------------------------------------------------------

    def _wait_for_turn(self, server: ServerSettings) -> int:
        """Return when the request may go out to a server that has asked for fewer, and how often its rate was lowered.

        Raises
        ------
        PacsUnavailable
            That is too long to wait for it here.
        """
        name = server.name
        cuts = 0
        if self._rates is not None and name in self._slowed:
            rate = self._rates.take(name)
            if not rate.is_turn:
                raise slowed(server, rate)
            if rate.wait_s > 0:
                with waiting_for(WaitReason(PacsUnavailable.code, str(rate), name)):
                    self._sleep(rate.wait_s)
            cuts = rate.cuts
        if name in self._asked:
            self._asked[name].append(self._clock())
        return cuts

    def slow_down(self, server: ServerSettings, error: PacsUnavailable, cuts: int) -> None:
        """Lower the rate of ``server`` for all workers; ``error`` then says how long its job waits."""
        if self._rates is None:
            return
        now = self._clock()
        asked = sum(moment > now - _MEASURED_S for moment in list(self._asked.get(server.name, ())))
        status, after_s = int(error.details["status"]), error.retry_after_s
        try:
            rate = self._rates.lower(
                server.name, status=status, retry_after_s=after_s, cuts=cuts, measured_per_s=asked / _MEASURED_S
            )
        except redis.RedisError as trouble:
            log.warning("Could not note that %s asks for fewer requests: %s", server.name, type(trouble).__name__)
            return
        if rate.cuts > cuts:
            log.warning("%s", rate)
        self._slowed |= {server.name}
        error.retry_after_s = rate.wait_s

    # --- breakers -----------------------------------------------------------------------------------------------

    def _refuse_if_open(self, server: ServerSettings, name: str) -> None:
        left_s = self._pause_left_s(name)
        if left_s is not None and left_s > 0:
            raise circuit_open_error(server, name, left_s, self._reason(name))

    def admit(self, server: ServerSettings, name: str) -> _Probe | None:
        """Let a call through: as the probe, if the breaker is half-open. The probe's own job waits for its verdict."""
        while (left_s := self._pause_left_s(name)) is not None:
            if left_s > 0:
                raise circuit_open_error(server, name, left_s, self._reason(name))
            with self._half_open:
                under_way = self._probes.get(name)
                if under_way is None:
                    probe = _Probe(name, job_in_hand())
                    mine, state = self._breakers.probe(name, probe.token, for_s=PROBE_S)
                    self._see(name, state)
                    if mine:
                        self._probes[name] = probe
                        log.info("%s: circuit half-open, sending a test call", name)
                        return probe
                    if not state.closed:
                        raise circuit_open_error(server, name, state.pause_left_s or 0, state.reason)
                    continue
            if under_way.job is None or under_way.job != job_in_hand():
                raise circuit_open_error(server, name, 0, self._reason(name))
            under_way.over.wait(server.connect_timeout_s + server.read_timeout_s)
        return None

    def succeeded(self, name: str, probe: _Probe | None) -> None:
        seen = self._seen.get(name)
        if probe is None and (seen is None or not seen.state.failures or not seen.state.closed):
            return
        try:
            self._see(name, self._breakers.succeeded(name, probe=probe.token if probe else ""))
        except redis.RedisError as error:
            log.warning("Could not note that %s is well: %s", name, type(error).__name__)
        if probe is not None:
            self._done(probe)
            log.info("%s: circuit closed", name)

    def failed(
        self,
        name: str,
        probe: _Probe | None,
        retry_after_s: float | None = None,
        *,
        at_once: bool = False,
        reason: str = "",
    ) -> BreakerState:
        token = probe.token if probe else ""
        try:
            state = self._breakers.failed(
                name, probe=token, retry_after_s=retry_after_s, at_once=at_once, reason=reason
            )
            if self._pause_left_s(name) is None and state.pause_left_s is not None:
                log.warning("%s failed too often: circuit open for %.1f s", name, state.pause_left_s)
            self._see(name, state)
        except redis.RedisError as error:
            log.warning("Could not note a failure of %s: %s", name, type(error).__name__)
            state = BreakerState(name)
        if probe is not None:
            self._done(probe)
        return state

    def give_up(self, probe: _Probe) -> None:
        """It has said nothing of the server."""
        try:
            self._breakers.renew(probe.breaker, probe.token, for_s=0)
        except redis.RedisError as error:
            log.warning("Could not give up the probe of %s: %s", probe.breaker, type(error).__name__)
        self._done(probe)

    def _done(self, probe: _Probe) -> None:
        with self._half_open:
            if self._probes.get(probe.breaker) is probe:
                del self._probes[probe.breaker]
        probe.over.set()

    def _see(self, name: str, state: BreakerState) -> None:
        self._seen[name] = _CircuitSnapshot(state, self._clock())

    def _pause_left_s(self, name: str) -> float | None:
        """None: closed, as far as is known here; 0: half-open."""
        seen = self._seen.get(name)
        if seen is None or seen.state.pause_left_s is None:
            return None
        return max(0.0, seen.state.pause_left_s - (self._clock() - seen.at))

    def _reason(self, name: str) -> str:
        seen = self._seen.get(name)
        return seen.state.reason if seen else ""

    # --- twice a second -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that keeps the slots and looks round, if it does not run yet."""
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(
                    target=_tend_while_alive, args=(weakref.ref(self),), name="guard", daemon=True
                )
                thread.start()
                self._thread = thread

    def _wake_up(self) -> None:
        if not self._looked:
            self.refresh()
            self.start()
            self._looked = True

    def seem_well(self, servers: Sequence[str]) -> bool:
        """Whether nothing is known against ``servers``: no call to them has failed lately, and none has asked for fewer
        requests, as this process learnt within `FRESH_S`. If not, the ledger is to be asked.
        """
        since = self._clock() - FRESH_S
        seen = [self._seen.get(breaker) for name in servers for breaker in breakers_of(name)]
        return self._slowed.isdisjoint(servers) and all(
            one is not None and one.at >= since and one.state.closed and not one.state.failures for one in seen
        )

    def refresh(self) -> None:
        """Read the states of all breakers. What a call learns meanwhile is newer, and stays."""
        asked_at = self._clock()
        for name, state in self._breakers.read(self._names).items():
            seen = self._seen.get(name)
            if seen is None or seen.at <= asked_at:
                self._seen[name] = _CircuitSnapshot(state, asked_at)
        if self._suspensions is not None:
            self._suspensions.refresh()
        if self._rates is not None:
            rates = self._rates.read(self._servers)
            self._slowed = frozenset(name for name, rate in rates.items() if rate.per_s is not None)

    def _beat(self) -> None:
        self.refresh()
        self._slots.tend()
        self._report_latencies()
        for probe in list(self._probes.values()):
            self._breakers.renew(probe.breaker, probe.token, for_s=PROBE_S)


def _tend_while_alive(guard: weakref.ref[Guard]) -> None:
    """As long as somebody has the guard: without this thread its slots and breakers would stand still."""
    while True:
        time.sleep(BEAT_S)
        there = guard()
        if there is None:
            return
        try:
            there._beat()
        except Exception as error:  # noqa: BLE001 - the thread's outermost door
            log.warning("The guard could not look round (%s); trying again", type(error).__name__)
        del there


def _record_error(call: Call, server: ServerSettings, error: CourierError) -> None:
    """What an error says of the server. A broken answer says neither that it is well nor that it is not."""
    if error.server_name != server.name:
        return
    if isinstance(error, PacsUnavailable):
        if error.slow_down:
            call.slowed(server, error)
        elif error.open_circuit is None:
            call.failed(error)
    elif isinstance(error, PacsUnauthorized):
        if error.open_circuit is None:
            call.unauthorized(error)
    elif not isinstance(error, TryAgain):
        call.answered()


def _is_down(error: PacsUnavailable) -> bool:
    """Whether it concerns the server as such: it cannot be reached, or says itself for how long to leave it alone."""
    answered = "status" in error.details or error.details.get("phase") == "answer"
    return error.retry_after_s is not None or not answered


def circuit_open_error(
    server: ServerSettings, breaker: str, left_s: float, reason: str = ""
) -> PacsUnavailable | PacsUnauthorized:
    """Why a call is not made: the breaker is open, or half-open while another job tests the server. ``reason`` is what
    opened that of a credential.
    """
    if breaker.endswith(CREDENTIAL):
        why = reason or "check its auth settings and the account's rights."
        refused = PacsUnauthorized(f"{circuit_open(breaker)}: {why}", details={"phase": "resting"}, **_named(server))
        refused.open_circuit = breaker
        return refused
    then = "the server is tested again when its pause is over" if left_s > 0 else "another job is testing the server"
    return _not_sent_error(server, breaker, f"{circuit_open(breaker)}; {then}.")


def slowed(server: ServerSettings, rate: ServerRate) -> PacsUnavailable:
    """That a job is put aside until its next request to ``server`` may be sent; nothing was sent."""
    details = {"phase": "resting", "status": rate.status}
    error = PacsUnavailable(
        str(rate), retry_after_s=rate.wait_s, server_name=server.name, server_type=server.type, details=details
    )
    error.slow_down, error.is_attempt = True, False
    return error


def _not_sent_error(server: ServerSettings, breaker: str, sentence: str) -> PacsUnavailable:
    error = PacsUnavailable(sentence, details={"phase": "resting"}, **_named(server))
    error.open_circuit, error.is_attempt = breaker, False
    return error


def _named(server: ServerSettings) -> dict[str, Any]:
    return {"server_name": server.name, "server_type": server.type}
