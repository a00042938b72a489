"""How a sandbox server misbehaves on demand: which fault applies to which request, and the clock that can be moved.

Only values and the table of faults; what a fault does on the wire is in ``web.py`` (everything that concerns the
connection) and in the dialects (everything that concerns an answer's content).
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

Operation = Literal["store", "query", "metadata", "retrieve", "delete", "reject", "health", "storage", "token", "*"]
OPERATIONS: tuple[str, ...] = get_args(Operation)
DIALECTS = ("msdicom", "dcm4chee")


class FaultError(ValueError):
    """A fault that cannot be; the sentence says what is wrong with it."""


@dataclass(frozen=True)
class InjectedFault:
    """What goes wrong with a request; fields combine.

    The connection (done in ``web.py``, for any dialect and operation)
        ``latency_ms`` number or [min, max] before anything else happens; ``refuse`` closes the connection before any
        answer (on operation ``*`` without ``times`` the port itself refuses); ``hang`` never answers until the client
        leaves; ``status`` answers that status at once, with ``retry_after_s`` as Retry-After; ``unauthorized`` answers
        401 until a token comes that was not seen or issued before; ``reset_after_bytes`` resets the connection (RST)
        after that many bytes of the request's body; ``commit_then_drop`` does the work and closes the connection
        instead of answering; ``drip_bytes_per_s`` sends the answer's body at that rate; ``truncate`` cuts the
        answer's body in the middle and closes the connection (``"cleanly"``: the HTTP message ends well and only its
        content is cut; a number: after so many bytes); ``reset_answer`` does so with a RST instead of a close.

    The content (done by the dialects)
        ``disk_full`` "A700" or "272": every instance of a store fails with that reason; ``transient_272``: the same
        with 272 (bound it with ``times``); ``fail_image``: the same for the image with that SOP Instance UID alone;
        ``failure_reason``: every instance fails with that number; ``pending_45071``: an
        instance not seen before is answered 45071 and stays pending for so many seconds, or "never" clears;
        ``crash_in_delete``: DCM4CHEE dies in the middle of a DELETE, and the study is being deleted for ever;
        ``crash_in_reject``: DCM4CHEE hides the images and fails before it counts their study as rejected;
        ``lose_last_part``: the last part of a store is not read; ``database_down``, ``storage_down``: as the reference
        says, which is not what one would expect; ``charset`` (done in ``web.py``): ``; charset=utf-8`` behind the type
        of JSON.

    Authentication (done by ``tokens.py``)
        ``bearer``: requests need a valid token of the built-in endpoint; ``token_lifetime_s``: how long one lives.
    """

    latency_ms: float | tuple[float, float] | None = None
    refuse: bool = False
    hang: bool = False
    drip_bytes_per_s: float | None = None
    status: int | None = None
    retry_after_s: float | None = None
    reset_after_bytes: int | None = None
    truncate: bool | int | str = False
    reset_answer: bool = False
    commit_then_drop: bool = False
    disk_full: str | None = None
    transient_272: bool = False
    fail_image: str | None = None
    failure_reason: int | None = None
    pending_45071: float | str | None = None
    crash_in_delete: bool = False
    crash_in_reject: bool = False
    lose_last_part: bool = False
    charset: bool = False
    unauthorized: bool = False
    database_down: bool = False
    storage_down: bool = False
    bearer: bool = False
    token_lifetime_s: float | None = None

    def latency_s(self) -> float:
        """How long to wait this time."""
        if self.latency_ms is None:
            return 0.0
        if isinstance(self.latency_ms, tuple):
            return random.uniform(*self.latency_ms) / 1000
        return self.latency_ms / 1000

    def over(self, other: InjectedFault) -> InjectedFault:
        """This fault where it says something, else ``other``."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return InjectedFault(**{**other.as_json(), **said})

    def as_json(self) -> dict[str, Any]:
        """Only the fields that say something."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def parse(order: Mapping[str, Any]) -> tuple[InjectedFault, int | None]:
    """A fault and how many requests it lasts (None: until changed), from a control request's JSON.

    Raises `FaultError`.
    """
    order = dict(order)
    times = order.pop("times", None)
    if times is not None and (not isinstance(times, int) or isinstance(times, bool) or times < 1):
        raise FaultError("times must be a whole number above 0")
    unknown = set(order) - set(_KINDS)
    if unknown:
        raise FaultError(f"unknown fault {sorted(unknown)[0]!r}; there are {', '.join(sorted(_KINDS))}")
    for name, value in order.items():
        if not _KINDS[name](value):
            raise FaultError(f"{name} cannot be {value!r}")
    if isinstance(order.get("latency_ms"), list):
        order["latency_ms"] = tuple(order["latency_ms"])
    return InjectedFault(**order), times


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _latency(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]
    return _number(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


_KINDS: dict[str, Any] = {
    **{f.name: _flag for f in fields(InjectedFault) if f.default is False},
    "latency_ms": _latency,
    "drip_bytes_per_s": lambda value: _number(value) and value > 0,
    "status": lambda value: isinstance(value, int) and 200 <= value <= 599,
    "retry_after_s": _number,
    "reset_after_bytes": _number,
    "truncate": lambda value: value == "cleanly" or _flag(value) or _number(value),
    "failure_reason": lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536,
    "fail_image": lambda value: isinstance(value, str),
    "disk_full": lambda value: value in ("A700", "272"),
    "pending_45071": lambda value: value == "never" or _number(value),
    "token_lifetime_s": _number,
}


@dataclass
class Clock:
    """The sandbox's own time: token expiry, pending instances, purges and cached health go by it."""

    ahead_s: float = 0.0

    def now_s(self) -> float:
        """Seconds since the epoch, as far ahead as the clock has been moved."""
        return time.time() + self.ahead_s


@dataclass
class _Spell:
    fault: InjectedFault
    times_left: int | None
    set_at_s: float
    #: Authorization headers that were refused under this spell; any other one is a new token.
    refused: set[str] = field(default_factory=set)


class Faults:
    """Which fault is set for which dialect and operation. ``usual`` is what `clear` goes back to."""

    def __init__(self, clock: Clock | None = None, usual: InjectedFault | None = None) -> None:
        self.clock = clock or Clock()
        self.usual = usual or InjectedFault()
        self._spells: dict[tuple[str, str], _Spell] = {}
        self._changes: dict[tuple[str, str], int] = {}
        self._clearings = 0

    def put(self, dialect: str, operation: str, fault: InjectedFault, times: int | None = None) -> None:
        """Set the fault of an operation (``*``: of all), replacing the one it had. Raises `FaultError`."""
        if dialect not in DIALECTS:
            raise FaultError(f"dialect must be one of {', '.join(DIALECTS)}")
        if operation not in OPERATIONS:
            raise FaultError(f"operation must be one of {', '.join(OPERATIONS)}")
        self._spells[dialect, operation] = _Spell(fault, times, self.clock.now_s())
        self._changes[dialect, operation] = self._changes.get((dialect, operation), 0) + 1

    def clear(self) -> None:
        self._spells.clear()
        self._clearings += 1

    def changes(self, dialect: str, operation: str) -> tuple[int, int]:
        """Differs whenever faults were cleared or one was set for this very operation (not for ``*``)."""
        return self._clearings, self._changes.get((dialect, operation), 0)

    def read_current(self, dialect: str, operation: str) -> InjectedFault:
        """The fault an operation is in, without using up a request."""
        fault = self.usual
        for key in ((dialect, "*"), (dialect, operation)):
            if key in self._spells:
                fault = self._spells[key].fault.over(fault)
        return fault

    def take(self, dialect: str, operation: str) -> InjectedFault:
        """The fault for one request, which counts against ``times``."""
        fault = self.read_current(dialect, operation)
        for key in {(dialect, "*"), (dialect, operation)}:
            spell = self._spells.get(key)
            if spell is None or spell.times_left is None:
                continue
            spell.times_left -= 1
            if spell.times_left == 0:
                del self._spells[key]
        return fault

    def refuses_all(self, dialect: str) -> bool:
        """Whether the dialect refuses everything until changed, so that its port can be closed."""
        spell = self._spells.get((dialect, "*"))
        return spell is not None and spell.fault.refuse and spell.times_left is None

    def is_old_token(self, dialect: str, operation: str, authorization: str | None, issued_at_s: float | None) -> bool:
        """Whether ``unauthorized`` still refuses this Authorization header.

        A token of the built-in endpoint is new if it was issued after the fault was set. Of any other header nothing is
        known, so the first one seen is the old one, and a different one is new.
        """
        spell = self._spells.get((dialect, operation)) or self._spells.get((dialect, "*"))
        if authorization is None or spell is None:
            return True
        if issued_at_s is not None:
            return issued_at_s <= spell.set_at_s
        if not spell.refused:
            spell.refused.add(authorization)
        return authorization in spell.refused

    def as_json(self) -> dict[str, dict[str, Any]]:
        """What is set, as ``GET /faults`` shows it."""
        shown: dict[str, dict[str, Any]] = {dialect: {} for dialect in DIALECTS}
        for (dialect, operation), spell in self._spells.items():
            entry = spell.fault.as_json()
            if spell.times_left is not None:
                entry["times"] = spell.times_left
            shown[dialect][operation] = entry
        return shown
