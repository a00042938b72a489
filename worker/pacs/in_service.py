"""Which servers an attempt may ask: all but those that an operator has paused or put into maintenance.

An attempt at a single job keeps to what was ordered when it began to ask servers, so that what is under way ends. A
chunk of a batch, which may take long, obeys before every request. No Redis here: what is ordered is read by
``courier/ledger/suspensions.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from courier.errors import CourierError, PacsUnavailable
from courier.ledger.breakers import SUSPENDED, is_suspension
from courier.ledger.suspensions import Suspension, Suspensions
from courier.settings import ServerSettings

#: In the details of an error: in which state the server is that is not asked.
STATE = "suspended"


class ServiceView:
    """The servers out of service, as one attempt sees them. ``live``: as they are at each look."""

    def __init__(self, suspensions: Suspensions | None, *, live: bool) -> None:
        self._suspensions, self._live = suspensions, live
        self._began = self._seen = self._look()

    def _look(self) -> Mapping[str, Suspension]:
        return {} if self._suspensions is None else self._suspensions.current()

    def renew(self) -> None:
        """The attempt has asked no server yet, and is about to: it goes by what is ordered now."""
        self._began = self._seen = self._look()

    @property
    def suspended(self) -> Mapping[str, Suspension]:
        return self._look() if self._live else self._seen

    def is_news(self, error: CourierError) -> bool:
        """Whether ``error`` says that a maintenance has begun since this attempt did: another one goes on without the
        server, if it can.
        """
        if error.details.get(STATE) != "maintenance" or not is_suspension(error.open_circuit):
            return False
        before = self._began.get(str(error.server_name))
        return before is None or before.state != "maintenance"


_view: ContextVar[ServiceView | None] = ContextVar("service_view", default=None)


@contextmanager
def viewed_by_attempt(suspensions: Suspensions | None, *, live: bool) -> Iterator[ServiceView]:
    """Inside, also on the threads that this context is copied to, servers are asked as one `ServiceView` has them."""
    view = ServiceView(suspensions, live=live)
    token = _view.set(view)
    try:
        yield view
    finally:
        _view.reset(token)


def renew() -> None:
    """See `ServiceView.renew`."""
    if (view := _view.get()) is not None:
        view.renew()


def suspended(suspensions: Suspensions | None = None) -> Mapping[str, Suspension]:
    """The servers out of service, as the attempt at work here sees them; outside of any, as ``suspensions`` says."""
    if (view := _view.get()) is not None:
        return view.suspended
    return {} if suspensions is None else suspensions.current()


def in_maintenance() -> dict[str, Suspension]:
    """The servers that the attempt at work here does not ask."""
    return {name: one for name, one in suspended().items() if one.state == "maintenance"}


def suspended_error(server: ServerSettings, suspension: Suspension, more: str = "") -> PacsUnavailable:
    """Why a request is not sent, or a job waits: an operator has taken ``server`` out of service."""
    end = "the server is resumed" if suspension.state == "paused" else "the maintenance ends"
    error = PacsUnavailable(
        f"{suspension}{more}; the job waits until {end}.",
        server_name=server.name,
        server_type=server.type,
        details={"phase": "resting", STATE: suspension.state},
    )
    error.open_circuit, error.is_attempt = server.name + SUSPENDED, False
    return error
