"""What all of WADO-RS shares on DCM4CHEE: which rows a URL names, conditions, status, and the multipart answer.

Nothing that reads DICOM.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import formatdate

from aiohttp import web

from sandbox.dcm4chee.aets import ApplicationEntity
from sandbox.dcm4chee.archive import ArchiveState, Refusal, entity, need_database, refuse, warning
from sandbox.dcm4chee.objects import Attributes
from sandbox.store import Condition, InstanceRow
from sandbox.web import FAULT, Streamed

OCTETS = "application/octet-stream"
#: Headers and content of a multipart answer's parts, each made when its turn comes.
Parts = AsyncIterator[tuple[dict[str, str], AsyncIterator[bytes]]]


@dataclass(frozen=True)
class Matched:
    """What a URL names, as far as the AE may see it and its file is there."""

    rows: list[InstanceRow]
    lost: int

    @property
    def headers(self) -> dict[str, str]:
        newest_s = max(row.received_at_s for row in self.rows)
        state = ",".join(f"{row.key}:{row.rejection or ''}" for row in self.rows)
        return {
            "ETag": f'"{hashlib.md5(f"{newest_s}{state}".encode()).hexdigest()}"',
            "Last-Modified": formatdate(newest_s, usegmt=True),
        }


def match_rows(archive: ArchiveState, request: web.Request) -> tuple[ApplicationEntity, Matched]:
    ae = entity(request, "WADO_RS")
    need_database(request)
    info = request.match_info
    rows = archive.store.instances(
        study_instance_uid=info["study"],
        series_instance_uid=info.get("series"),
        sop_instance_uid=info.get("instance"),
        view=ae.view,
    )
    if not rows:
        raise refuse(404, "No matches found.")
    there = [] if request[FAULT].storage_down else [row for row in rows if row.path.exists()]
    if not there:
        raise refuse(410, "No longer accessible.")
    return ae, Matched(there, len(rows) - len(there))


def check_conditions(request: web.Request, matched: Matched) -> None:
    """If-None-Match or If-Modified-Since, and If-Match or If-Unmodified-Since (RFC 9110 13)."""
    tag, newest_s = matched.headers["ETag"], int(max(row.received_at_s for row in matched.rows))
    known, wanted = (
        [text.strip() for text in request.headers.get(name, "").split(",") if text.strip()]
        for name in ("If-None-Match", "If-Match")
    )
    since, until = request.if_modified_since, request.if_unmodified_since
    if tag in known or "*" in known or (not known and since and newest_s <= since.timestamp()):
        raise Refusal(web.Response(status=304, headers=matched.headers))
    missed = wanted and tag not in wanted and "*" not in wanted
    if missed or (not wanted and until and newest_s > until.timestamp()):
        raise Refusal(web.Response(status=412))


def laid_over(archive: ArchiveState, ae: ApplicationEntity, row: InstanceRow) -> Attributes:
    """What is laid over an object: on DCM4CHEE what the store request said, and what the database says."""
    if ae.returns_as_received:
        return {}
    coerced: Attributes = row.notes.get("coerced", {})
    where = [
        Condition("study_instance_uid", "=", row.study_instance_uid),
        Condition("series_instance_uid", "=", row.series_instance_uid),
    ]
    found = archive.store.search("series", where)[0]
    over = {**coerced, **found.study, **archive.patient(found.study), **found.series}
    over.pop("00080005", None)  # each object keeps its own
    return over


def completeness(request: web.Request, matched: Matched, unacceptable: int = 0) -> tuple[int, dict[str, str]]:
    """200, or 206 and why."""
    if matched.lost:
        return 206, {"Warning": warning(request, f"{matched.lost} objects no longer accessible.")}
    if unacceptable:
        return 206, {"Warning": warning(request, f"{unacceptable} objects not acceptable.")}
    return 200, {}


def not_acceptable() -> web.Response:
    text = '{"errorMessage":"Not accepted instances present."}'
    return web.Response(status=406, text=text, content_type="text/plain")


def related(parts: Parts, kind: str, status: int, headers: dict[str, str]) -> Streamed:
    """A multipart/related answer; ``kind`` is its type parameter and what follows it."""
    boundary = secrets.token_hex(16)
    kind = f"multipart/related;type={kind};boundary={boundary}"
    return Streamed(_joined(parts, boundary), status=status, headers={**headers, "Content-Type": kind})


async def _joined(parts: Parts, boundary: str) -> AsyncIterator[bytes]:
    """A multipart body of parts that are themselves made one after the other."""
    opening = b""
    async for headers, content in parts:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        yield opening + f"--{boundary}\r\n{lines}\r\n".encode()
        async for chunk in content:
            yield chunk
        opening = b"\r\n"
    yield opening + f"--{boundary}--\r\n".encode()
