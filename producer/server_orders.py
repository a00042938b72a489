"""Taking a server out of service, and back: pause, resume, and (for a while) maintenance.

The order is written into the ledger, and every worker obeys it within two seconds. What it means for jobs is in
docs/jobs.md; how it is shown on a terminal in ``cli/server.py``.
"""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import redis

from courier.ledger.elsewhere import ElsewhereAudit, ElsewhereStudies
from courier.ledger.jobs import Ledger
from courier.ledger.suspensions import SuspendedState, Suspension, Suspensions
from courier.messages import Job, nearest_field, read_job
from producer.errors import BrokerUnavailable, InvalidRequest


@dataclass(frozen=True)
class ServerChange:
    """What an order has come to: ``suspension`` is how the server is out of service now, None if it is in service.

    ``changed`` is False if the server was so already; ``before`` is what has been ended.
    """

    server: str
    changed: bool
    suspension: Suspension | None = None
    before: Suspension | None = None
    #: What is audited after the maintenance that has been ended.
    audit: ElsewhereAudit | None = None


class ServerClient:
    """The servers of all workers: which of them are out of service, and taking them out and back."""

    def __init__(self, ledger: Ledger, configured: Sequence[str]) -> None:
        """``configured``: the servers in the settings of this program, which may name none."""
        self._ledger, self._configured = ledger, list(configured)
        self._suspensions = Suspensions(ledger.client, prefix=ledger.key(""))
        self._elsewhere = ElsewhereStudies(ledger.client, prefix=ledger.key(""))

    def names(self) -> list[str]:
        """The servers that the settings name, then those that a worker has known within a day."""
        with _reachable():
            return list(dict.fromkeys([*self._configured, *self._ledger.servers_of_workers()]))

    def suspended(self) -> dict[str, Suspension]:
        """The servers that are paused or in maintenance, by name."""
        with _reachable():
            return self._suspensions.read(self.names())

    def pause(self, server: str, *, requested_by: str | None = None, reason: str | None = None) -> ServerChange:
        """Begin nothing new on ``server``: what needs it waits, takes no attempt and does not fail.

        A server that is paused already stays so, with the name and the time of the first order.

        Raises
        ------
        InvalidRequest
            No worker knows such a server, or it is in maintenance.
        """
        name, who, why = self._order(server, requested_by, reason)
        with _reachable():
            changed, now = self._suspensions.pause(name, set_by=who, reason=why)
        if not changed and now.state != "paused":
            raise InvalidRequest(f"{now}; end that first: pacs server maintenance {name} --end.")
        return ServerChange(name, changed, now)

    def resume(self, server: str) -> ServerChange:
        """End a pause. `InvalidRequest` if no worker knows such a server, or if it is in maintenance."""
        return self._end(self._known(server), "paused", "pacs server maintenance {} --end")

    def maintenance(
        self,
        server: str,
        *,
        until: datetime | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> ServerChange:
        """Leave ``server`` alone while work on the others goes on, until `end_maintenance` or ``until``.

        A server that is paused goes into maintenance; one that is in maintenance gets the new end and the new name.

        Raises
        ------
        InvalidRequest
            No worker knows such a server, or ``until`` is over or has no time zone.
        """
        if until is not None and until.tzinfo is None:
            raise InvalidRequest("The end of a maintenance needs a time zone.", details={"field": "until"})
        name, who, why = self._order(server, requested_by, reason)
        until_ms = None if until is None else int(until.timestamp() * 1000)
        with _reachable():
            changed, now = self._suspensions.maintain(name, set_by=who, reason=why, until_ms=until_ms)
        return ServerChange(name, changed, now)

    def end_maintenance(self, server: str) -> ServerChange:
        """End a maintenance; says which studies are audited now. `InvalidRequest` if no worker knows such a server, or
        if it is paused.
        """
        change = self._end(self._known(server), "maintenance", "pacs server resume {}")
        with _reachable():
            return replace(change, audit=self._elsewhere.read(change.server))

    def _end(self, name: str, state: SuspendedState, command: str) -> ServerChange:
        with _reachable():
            ended, was = self._suspensions.end(name, state)
        if not ended and was is not None:
            raise InvalidRequest(f"{was}; use {command.format(name)}.")
        return ServerChange(name, ended, None, was)

    def _order(self, server: str, requested_by: str | None, reason: str | None) -> tuple[str, str, str]:
        """The server, who gives the order, and why."""
        name = self._known(server)
        job = read_job(Job, {"requested_by": requested_by, "reason": reason})
        return name, job.requested_by or _user_at_host(), job.reason or ""

    def _known(self, server: str) -> str:
        names = self.names()
        if server in names:
            return server
        if not names:
            raise InvalidRequest(
                "No server is known: the settings (PACS_CONFIG) name none, and no worker has run within a day."
            )
        nearest = nearest_field(server, names)
        hint = f"did you mean {nearest}?" if nearest else f"there are: {', '.join(names)}."
        raise InvalidRequest(f"No server is called {server!r}; {hint}", details={"field": "server"})


def _user_at_host() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no name belongs to this user's number
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise BrokerUnavailable(f"The ledger cannot be reached ({type(error).__name__}); check LEDGER_URL.") from error
