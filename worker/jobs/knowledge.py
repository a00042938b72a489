"""Whether this worker knows all servers that a job is about, while workers run whose ``[[servers]]`` differ.

A worker that lacks a server cannot say that an image, or a study, is on none: it would store an image twice, split a
study, or call a study deleted that is still there. So it leaves such a job to a worker that knows more. A server counts
as long as a worker which knows it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from courier.errors import PacsUnavailable
from courier.settings import MODES
from worker.jobs.attempt import ServerUnknown
from worker.jobs.services import Services

#: How long a worker keeps a slot for a job that it puts back: an idle one would take most of the messages else.
LINGER_S: Final = 1.0
#: Tasks that name one server in ``mode``, if they are about one.
_BY_MODE: Final = frozenset({"pacs.exists", "pacs.metadata", "pacs.list_studies", "pacs.download"})
#: Tasks that name their servers in ``servers``, if they are not about all. An order that deletes is not among them:
#: where nothing of a study is left on any server, it drops the claim.
_BY_SERVERS: Final = frozenset({"pacs.audit", "pacs.batch.download"})
#: Tasks that ask no server, or say of each server what it says of itself.
_OF_EACH: Final = frozenset({"pacs.status", "pacs.storage", "pacs.database"})
_OF_NONE: Final = frozenset({"pacs.batch.show", "pacs.batch.pause", "pacs.batch.resume", "pacs.batch.cancel"})

_REPLAY: Final = ", and if the job is a dead letter by then, replay it"


def check_knows_servers(task: str, job: Mapping[str, Any], servers: Collection[str], services: Services) -> None:
    """`ServerUnknown`, if a job is about one of ``servers``, those of all workers, that this worker does not know."""
    missing = sorted(set(servers) - set(services.fleet.names)) if servers else []
    if missing and (named := _named(task, job)) is not None:
        missing = [name for name in missing if name in named]
    if missing:
        services.sleep(LINGER_S)
        raise ServerUnknown(missing[0])


def server_left(name: str, done: str, *, then: str = _REPLAY, **context: Any) -> PacsUnavailable:
    """The error of a job of which an earlier attempt was at server ``name``, and no running worker knows that server.

    Only that server can say what became of ``done``. So the job waits for it as for one that is silent, and becomes a
    dead letter, which can be replayed when the server is back.
    """
    sentence = (
        f"An earlier attempt {done} {name}, and no running worker knows {name} any more; put {name} back into"
        f" [[servers]]{then}."
    )
    return PacsUnavailable(sentence, server_name=name, **context)


def _named(task: str, job: Mapping[str, Any]) -> Collection[object] | None:
    """The servers that a job is about; None if it is about all of them."""
    servers, mode = job.get("servers"), job.get("mode")
    if task in _BY_SERVERS | _OF_EACH and isinstance(servers, list):
        return servers
    if task in _BY_MODE and isinstance(mode, str) and mode not in MODES:
        return [mode]
    return () if task in _OF_EACH | _OF_NONE else None
