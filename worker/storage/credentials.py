"""The circuit breakers of the worker's own credentials at stores, one state for all workers.

A credential that was rotated, has expired or is signed by a wrong clock is refused for every object. Its breaker opens
then, and jobs wait for it (``worker/jobs/runner.py``) instead of failing one after the other. A store may also refuse
one object, or one bucket, to a credential that is in order: what it let be read before is then asked for again, which
tells the one from the other. What a store's answer means is said in ``worker/storage/refusals.py``.

Breakers: ``credential:NAME`` (``sources.s3``) for all that is asked with it, and ``credential:NAME/PLACE`` for one
bucket or container.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from courier.errors import CourierError, Refused, SourceNotFound, SourceUnauthorized, TryAgain
from courier.ledger.breakers import STORE, Breakers, BreakerState, circuit_open

log = logging.getLogger(__name__)

#: A state that was read so long ago is read again before the next call.
FRESH_S = 0.5
#: How long the one call that tests a refused credential has for its answer.
PROBE_S = 60.0
#: Of so many buckets the last object that could be read is known.
_PLACES = 64

Again = Callable[[], object]


class Doubt(Exception):
    """A refusal of which the answer alone does not say whether it is the credential's or the object's.

    ``denied`` is what it means if it is the object's. ``whole``: if it is the credential's it is for all places alike.
    """

    def __init__(self, denied: CourierError, unauthorized: SourceUnauthorized, *, whole: bool) -> None:
        super().__init__(denied, unauthorized)
        self.denied, self.unauthorized, self.whole = denied, unauthorized, whole


@dataclass(frozen=True)
class _CredentialSnapshot:
    state: BreakerState
    at: float


class StoreCredential:
    """One credential of the settings, as this process sees it. Safe for threads; made after a fork.

    Without ``breakers`` a refusal ends the job that met it, and is no other job's business.
    """

    def __init__(
        self,
        name: str,
        breakers: Breakers | None = None,
        *,
        renew: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``renew`` is called after a refusal, so that the next call reads the credential anew."""
        self.name = name
        self._breakers, self._renew, self._clock = breakers, renew, clock
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._seen: dict[str, _CredentialSnapshot] = {}
        self._known: OrderedDict[str, Again] = OrderedDict()

    @contextmanager
    def asking(self, shown: str, place: str = "", *, counts: bool = True) -> Iterator[Asking]:
        """Around one request, to be left when its answer has begun; or several of one kind, of which each may be
        `Asking.accepted`. What is raised inside is judged and goes on. Inside another one of this thread, it is that.
        Of a place, refusals in a row open its breaker, unless they do not ``count``: the right to list is not needed to
        read.

        Raises
        ------
        SourceUnauthorized
            The credential is refused; with ``open_circuit`` if its breaker is open.
        """
        under_way = getattr(self._mine, "asking", None)
        if under_way is not None:
            yield under_way
            return
        names = [f"{STORE}{self.name}", *([f"{STORE}{self.name}/{place}"] if place else [])]
        asking = self._mine.asking = Asking(self, names, place, counts=counts)
        try:
            for name in names:
                asking.admit(name, shown)
            yield asking
            asking.accepted()
        except Doubt as doubt:
            raise asking.resolve_doubt(doubt) from doubt.__cause__
        except SourceUnauthorized as error:
            if error.open_circuit is None:
                asking.refused(error, names[0])
            raise
        except CourierError as error:
            if isinstance(error, Refused) and error.server_name is None:  # no error of a PACS that passes through
                asking.accepted()
            raise
        finally:
            self._mine.asking = None
            asking.over()

    @contextmanager
    def reading(self, shown: str) -> Iterator[None]:
        """Around what reads the credential and asks no store: that it cannot be read is a refusal, that it can is no
        proof that a store accepts it.

        Raises
        ------
        SourceUnauthorized
            As for `asking`.
        """
        try:
            yield
        except SourceUnauthorized as error:
            with self.asking(shown):
                raise error

    # --- what is known of places ----------------------------------------------------------------------------------

    def learn(self, place: str, again: Again) -> None:
        with self._lock:
            self._known[place] = again
            self._known.move_to_end(place)
            while len(self._known) > _PLACES:
                self._known.popitem(last=False)

    def known(self, place: str) -> Again | None:
        return self._known.get(place)

    def known_elsewhere(self, place: str) -> Again | None:
        with self._lock:
            return next((again for other, again in reversed(self._known.items()) if other != place), None)

    # --- breakers -------------------------------------------------------------------------------------------------

    def state(self, name: str) -> BreakerState:
        """At most half a second old; closed, where the ledger cannot be asked."""
        seen = self._seen.get(name)
        if self._breakers is None:
            return BreakerState(name)
        if seen is None or self._clock() - seen.at > FRESH_S:
            try:
                return self._see(self._breakers.read([name])[name])
            except redis.RedisError as error:
                log.warning("Could not read the circuit breaker %s: %s", name, type(error).__name__)
                return BreakerState(name)
        return seen.state

    def probe(self, name: str, token: str) -> tuple[bool, BreakerState]:
        if self._breakers is None:
            return True, BreakerState(name)
        mine, state = self._breakers.probe(name, token, for_s=PROBE_S)
        return mine, self._see(state)

    def failed(self, name: str, token: str, *, at_once: bool, reason: str) -> BreakerState:
        if self._breakers is None:
            return BreakerState(name)
        try:
            before = self.state(name)
            state = self._see(self._breakers.failed(name, probe=token, at_once=at_once, reason=reason))
        except redis.RedisError as error:
            log.warning("Could not note that %s was refused: %s", name, type(error).__name__)
            return BreakerState(name)
        if before.closed and not state.closed:
            log.warning("%s was refused (%s): jobs wait until it is accepted", name, reason)
        return state

    def succeeded(self, name: str, token: str) -> None:
        seen = self._seen.get(name)
        if self._breakers is None or (not token and (seen is None or not seen.state.failures or not seen.state.closed)):
            return
        try:
            self._see(self._breakers.succeeded(name, probe=token))
        except redis.RedisError as error:
            log.warning("Could not note that %s was accepted: %s", name, type(error).__name__)
        if token:
            log.info("%s is accepted again", name)

    def give_up(self, name: str, token: str) -> None:
        if self._breakers is None:
            return
        try:
            self._breakers.renew(name, token, for_s=0)
        except redis.RedisError as error:
            log.warning("Could not give up the test of %s: %s", name, type(error).__name__)

    def renew(self) -> None:
        with self._lock:
            self._known.clear()  # it was asked with the old one
        self._renew()

    def _see(self, state: BreakerState) -> BreakerState:
        self._seen[state.breaker] = _CredentialSnapshot(state, self._clock())
        return state


class Asking:
    """One request on its way."""

    def __init__(self, credential: StoreCredential, names: list[str], place: str, *, counts: bool) -> None:
        self._credential, self._names, self._place, self._counts = credential, names, place, counts
        self._tokens: dict[str, str] = {}

    def admit(self, name: str, shown: str) -> None:
        """Pass a breaker, as its probe if it is half-open."""
        state = self._credential.state(name)
        if state.closed:
            return
        if not state.pause_left_s:
            token = uuid.uuid4().hex
            mine, state = self._credential.probe(name, token)
            if mine:
                self._tokens[name] = token
                return
            if state.closed:
                return
        why = f" with {state.reason}" if state.reason else ""
        error = SourceUnauthorized(
            f"{shown} is not asked for: {circuit_open(name)}{why}; correct the credential, and jobs go on once the"
            " store accepts it.",
            details={"phase": "resting", "reason": state.reason},
        )
        error.open_circuit = name
        raise error

    def accepted(self, again: Again | None = None) -> None:
        """The store lets the credential do what was asked; ``again`` asks for as little of the same once more."""
        for name in self._names:
            self._credential.succeeded(name, self._tokens.pop(name, ""))
        if again is not None:
            self._credential.learn(self._place, again)

    def refused(self, error: SourceUnauthorized, name: str) -> SourceUnauthorized:
        """Open the breaker ``name``; the job of ``error`` waits for it."""
        reason = str(error.details.get("reason", ""))
        state = self._credential.failed(name, self._tokens.pop(name, ""), at_once=True, reason=reason)
        self._credential.renew()
        if not state.closed:
            error.open_circuit = name
        return error

    def resolve_doubt(self, doubt: Doubt) -> CourierError:
        """What a refusal is that may be the credential's, the place's, or the object's."""
        whole, place = self._names[0], self._names[-1]
        name = whole if doubt.whole else place
        again = self._credential.known(self._place)
        if again is not None:
            return self._resolve_by_asking_again(again, doubt, name)
        if doubt.whole:
            elsewhere = self._credential.known_elsewhere(self._place)
            accepted = elsewhere is not None and _is_accepted(elsewhere) is True
            return self.refused(doubt.unauthorized, place if accepted else whole)
        if not self._counts:
            return doubt.denied
        reason = str(doubt.unauthorized.details.get("reason", ""))
        token = self._tokens.pop(name, "")
        if self._credential.failed(name, token, at_once=False, reason=reason).closed:
            return doubt.denied
        doubt.unauthorized.open_circuit = name
        return doubt.unauthorized

    def _resolve_by_asking_again(self, again: Again, doubt: Doubt, name: str) -> CourierError:
        answer = _is_accepted(again)
        if answer is True:
            self.accepted()
            return doubt.denied
        return answer if isinstance(answer, CourierError) else self.refused(doubt.unauthorized, name)

    def over(self) -> None:
        """Nothing is known of the credential by this call: another one may test it."""
        for name, token in self._tokens.items():
            self._credential.give_up(name, token)


def _is_accepted(again: Again) -> bool | CourierError:
    """Whether the store still allows what it allowed before; an error, if the store does not say."""
    try:
        again()
    except SourceNotFound:  # which a store says only to those who may know
        return True
    except (Doubt, SourceUnauthorized):
        return False
    except CourierError as error:
        return error if isinstance(error, TryAgain) else True
    return True
