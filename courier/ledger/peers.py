"""The workers on one ledger: of which release each is and which servers it knows, as each says with every look of its
watchdog.

A release may begin beside another only if each can read what the other writes. Which shapes the ledger holds is its
schema: a number in the ledger, written by the first worker. docs/upgrade.md says in which order to upgrade.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import redis

from courier import __version__
from courier.ledger.jobs import SCHEMA, SILENT_S, Ledger, passes, words_of
from courier.settings import ServerSettings

log = logging.getLogger(__name__)

#: What a supervisor sees of a worker that ended itself because it cannot read its ledger (EX_CONFIG).
EXIT_STATUS: Final = 78
#: A worker that says nothing for two of its intervals and this has ended.
_MARGIN_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.5


def schema_of(said: Mapping[str, Any]) -> int:
    """The newest schema that a worker reads, as it says; version 0.1 says none."""
    return int(said.get("schema", 1))


def release_of(said: Mapping[str, Any]) -> str:
    return str(said.get("version", "0.1"))


def entry_of(report: Mapping[str, Any], *, at_s: float, servers: Sequence[ServerSettings] = ()) -> str:
    """What a worker of this release has in the ledger (JSON): what its watchdog told ``at_s`` by the clock of Redis."""
    names = [server.name for server in servers]
    entry = {**report, "at": at_s, "version": __version__, "schema": SCHEMA, "servers": names}
    return json.dumps({**entry, "servers_digest": digest_of(servers)})


def digest_of(servers: Iterable[ServerSettings]) -> str:
    """The same for the same names, types and URLs, in any order; no credential and no query is in it."""
    rows = sorted(
        (server.name, server.type, urlsplit(server.url)._replace(query="", fragment="").geturl()) for server in servers
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Peers:
    """The workers that run, by name: what each said last."""

    said: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, ledger: Ledger) -> Peers:
        now_s = ledger.clock_s()
        rows = ledger.workers(now_s=now_s)
        return cls({name: said for name, said in sorted(rows.items()) if now_s - said["at"] <= SILENT_S})

    @property
    def servers_digests(self) -> frozenset[str]:
        """More than one: the ``[[servers]]`` of these workers differ."""
        return frozenset(said["servers_digest"] for said in self.said.values() if "servers_digest" in said)

    @property
    def difference(self) -> str:
        """In which servers workers differ, in one sentence; "" if they do not."""
        if len(self.servers_digests) < 2:
            return ""
        known = "; ".join(
            f"{name} knows {', '.join(said['servers'])} ({said['servers_digest']})"
            for name, said in self.said.items()
            if "servers_digest" in said
        )
        return f"The [[servers]] of workers differ in names, types or URLs: {known}."

    @property
    def consequence(self) -> str:
        """What the difference leads to. Names are what jobs go by: two addresses of one name may be two archives."""
        lists = {frozenset(said["servers"]) for said in self.said.values() if "servers_digest" in said}
        if len(lists) > 1:
            return "Jobs wait for a worker that knows all those servers (docs/upgrade.md)."
        return (
            "No job waits for that: if one name means two archives, what is on one of them is called missing. Then stop"
            " the workers with the wrong type or URL (docs/upgrade.md)."
        )

    @property
    def too_old(self) -> list[str]:
        """Workers that cannot read what this release writes."""
        return [name for name, said in self.said.items() if schema_of(said) < SCHEMA]


def begin(ledger: Ledger, worker: str, report: Mapping[str, Any], servers: Sequence[ServerSettings] = ()) -> str:
    """Say for the first time what there is to say of ``worker``; why it must not begin, "" if it may."""
    try:
        return objection(ledger) or say(ledger, worker, report, servers)
    except redis.exceptions.ClusterCrossSlotError:
        return "The ledger's Redis is in cluster mode; give queue.key_prefix a hash tag, such as {courier-a}:"
    except redis.exceptions.MovedError:
        return "The ledger's Redis is in cluster mode; name in ledger_url the node that serves queue.key_prefix."
    except (redis.AuthenticationError, redis.ResponseError) as error:
        if isinstance(error, redis.ResponseError) and passes(error):
            raise
        return f"The ledger's Redis refuses a command ({words_of(error)}); correct ledger_url, or what its user may do."


def say(ledger: Ledger, worker: str, report: Mapping[str, Any], servers: Sequence[ServerSettings] = ()) -> str:
    """Say what there is to say of ``worker``; why it cannot go on, in one sentence, "" if it can."""
    entry = entry_of(report, at_s=ledger.clock_s(), servers=servers)
    return cannot_read(ledger.report_health(worker, entry, servers=[server.name for server in servers]))


def objection(ledger: Ledger, *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Why a worker of this release must not begin on ``ledger``, in one sentence; "" if it may.

    A worker that said something within the last day may have ended since, and clocks differ: it is watched until it
    says something, or has said nothing for more than two of its intervals. Then its entry is removed.
    """
    if reason := cannot_read(ledger.schema()):
        return reason
    before = {name: said for name, said in ledger.workers().items() if schema_of(said) < SCHEMA}
    if running := _first_to_speak(ledger, before, sleep):
        return (
            f"Worker {running} of version {release_of(before[running])} still runs on this ledger and cannot read what"
            f" version {__version__} writes; stop all workers of that version, then start this one (docs/upgrade.md)."
        )
    ledger.forget_workers(before)
    return ""


def _first_to_speak(ledger: Ledger, before: Mapping[str, Mapping[str, Any]], sleep: Callable[[float], None]) -> str:
    """The first of the workers that says something anew; "" if none does."""
    if not before:
        return ""
    wait_s = 2 * max(float(said["every_s"]) for said in before.values()) + _MARGIN_S
    log.warning("Waiting up to %.0f s to see whether these older workers still run: %s", wait_s, ", ".join(before))
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        sleep(_LOOK_AGAIN_S)
        now = ledger.workers()
        for name, said in before.items():
            if name in now and now[name]["at"] != said["at"] and schema_of(now[name]) < SCHEMA:
                return name
    return ""


def cannot_read(schema: int) -> str:
    """Why a ledger of ``schema`` (0 = no schema) cannot be read; "" if it can."""
    if schema == 0:
        return (
            "The key schema of the ledger (behind queue.key_prefix) holds no number of a schema, so another program"
            " wrote it; set a queue.key_prefix of your own, or restore that key (docs/upgrade.md)."
        )
    if schema <= SCHEMA:
        return ""
    return (
        f"The ledger has schema {schema}, and version {__version__} reads up to {SCHEMA}; install the release that the"
        " ledger's workers are of (docs/upgrade.md)."
    )
