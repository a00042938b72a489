"""What the settings allow to be deleted on a server (``[[servers]] deletions``), enforced in front of its dialect.

`Fleet` puts `Protected` in front of each protected server, so every deletion and every rejection passes through here,
whichever job, batch, undo or cleanup orders it. `check_allowed` is for orders that name their servers: those are
refused as a whole, before anything begins; `check_two_archives` is for moves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import urlsplit

from courier.errors import InvalidRequest
from courier.messages import Level
from worker.pacs.finding import find_known
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs


def refusal(pacs: Pacs, *, permanent: bool) -> str:
    """Why the settings forbid a deletion on a server, and what can be done instead; "" if they allow it."""
    server = pacs.server
    if server.deletions == "never":
        return f'{server.name} is protected (setting deletions = "never"): nothing may be deleted or hidden there.'
    if server.deletions != "hide" or not permanent:
        return ""
    sentence = f'{server.name} is protected (setting deletions = "hide"): nothing may be deleted for good there'
    if pacs.deletion("study", permanent=False).fate is DeletionFate.HIDDEN:
        return f"{sentence}. Order it with --hide (permanent = false), or name other servers."
    return f"{sentence}, and a server of the type {server.type} cannot hide."


def check_allowed(servers: Iterable[Pacs], *, permanent: bool) -> None:
    """Refuse an order that names ``servers`` if the settings forbid it on one of them.

    Raises
    ------
    InvalidRequest
        The sentence names the server and its setting.
    """
    for pacs in servers:
        if why := refusal(pacs, permanent=permanent):
            raise InvalidRequest(f"Refused: {why}", server_name=pacs.server.name, server_type=pacs.server.type)


def check_two_archives(source: Pacs, target: Pacs) -> None:
    """Refuse to move between two entries of the settings that lead to one archive: its only copy would be deleted.

    Raises
    ------
    InvalidRequest
        Both have the same host and port, and the same path but for what stands for a service of the archive.
    """
    if _archive_of(source) == _archive_of(target):
        names = f"{source.server.name} and {target.server.name}"
        sentence = f"Refused: {names} are one archive by their URLs, and what is deleted on one is gone on the other."
        raise InvalidRequest(sentence, server_name=source.server.name, server_type=source.server.type)


def _archive_of(pacs: Pacs) -> tuple[str | None, int | None, str]:
    """Host, port and path, without the application entity of DCM4CHEE, Orthanc's plugin or MSDICOM's version."""
    url = urlsplit(pacs.server.url)
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return url.hostname, port, re.sub(r"(/aets/[^/]+/rs|/dicom-web|/v[0-9]+)/?$", "", url.path).rstrip("/")


def protected(pacs: Pacs) -> Pacs:
    """``pacs``, behind its protection if it has one."""
    return pacs if pacs.server.deletions == "allow" else cast(Pacs, Protected(pacs))


class Protected:
    """A server of which the settings forbid some deletions, or all; everything else passes through."""

    def __init__(self, pacs: Pacs) -> None:
        self._pacs = pacs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pacs, name)

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:
        if why := refusal(self._pacs, permanent=permanent):
            return Deletion(DeletionFate.REFUSED, why, InvalidRequest.code)
        return self._pacs.deletion(level, permanent=permanent)

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        """As the dialect, where it is allowed. Otherwise the server is only asked whether it has ``found``."""
        forbidden = self.deletion(found.level, permanent=permanent)
        if forbidden.code != InvalidRequest.code:
            return self._pacs.delete(found, permanent=permanent)
        return forbidden if self._has(found) else Deletion(DeletionFate.NOT_THERE)

    def _has(self, found: Found) -> bool:
        there = find_known(self._pacs, found)
        return any(one.study_instance_uid == found.study_instance_uid for one in there)
