"""Media types as DCM4CHEE reads them from ``Accept`` or from the query parameter that replaces it.

Text only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message

from aiohttp import web

from sandbox.dcm4chee.archive import parameters

ANY = "*/*"


@dataclass(frozen=True)
class Media:
    """``type/subtype`` in lower case, and its parameters without quotes."""

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def transfer_syntax(self) -> str | None:
        return self.parameters.get("transfer-syntax")

    @property
    def related(self) -> str | None:
        """The type of a multipart/related's parts; None for anything else."""
        return self.parameters.get("type", "").lower() if self.name == "multipart/related" else None


def media(text: str) -> Media:
    """One media type, by the standard library's reader of MIME headers."""
    message = Message()
    message["Content-Type"] = text
    listed = message.get_params(failobj=[], unquote=True)
    return Media(
        message.get_content_type() if "/" in text else text, {name.lower(): value for name, value in listed[1:]}
    )


def accepted(request: web.Request) -> list[Media]:
    """What the client accepts, in its order; nothing said is ``*/*``."""
    given = [value for p in parameters(request) if p.name == "accept" for value in p.values]
    if not given:
        given = _split(",".join(request.headers.getall("Accept", [])))
    found = [Media(ANY) if text.strip().startswith(ANY) else media(text.strip()) for text in given if text.strip()]
    return found or [Media(ANY)]


def _split(header: str) -> list[str]:
    """At commas that are not within quotes."""
    pieces, quoted, start = [], False, 0
    for at, character in enumerate(header):
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            pieces.append(header[start:at])
            start = at + 1
    return [*pieces, header[start:]]
