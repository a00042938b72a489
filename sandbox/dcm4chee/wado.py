"""WADO-RS as DCM4CHEE has it (PS3.18 10.4): objects, as multipart or ZIP, and their metadata.

Which form and which status; how bytes are changed is in ``objects.py``.
"""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import zipfile
from collections.abc import AsyncIterator, Iterable
from typing import Any

from aiohttp import web
from pydicom.uid import UID, ExplicitVRLittleEndian

from sandbox.datasets import AttributePath, JsonStyle
from sandbox.dcm4chee.aets import ApplicationEntity
from sandbox.dcm4chee.archive import ArchiveState, Refusal, services_url
from sandbox.dcm4chee.forms import native_xml
from sandbox.dcm4chee.frames import FRAME_TYPES, pixel_data
from sandbox.dcm4chee.media import ANY, Media, accepted
from sandbox.dcm4chee.objects import (
    BULK_ABOVE_BYTES,
    Attributes,
    Outgoing,
    Unreadable,
    as_stored,
    decompressed,
    has_pixels,
    java_hash,
    read_header,
    shown,
)
from sandbox.dcm4chee.retrieval import (
    OCTETS,
    Matched,
    Parts,
    check_conditions,
    completeness,
    laid_over,
    match_rows,
    not_acceptable,
    related,
)
from sandbox.pictures import can_decode
from sandbox.store import InstanceRow
from sandbox.web import DICOM_JSON, Streamed, file_chunks, multipart, once, operation

DICOM = "application/dicom"
_WILDCARD = "*"
#: MPEG and HEVC stay as they are, whatever is accepted.
_VIDEO = ("1.2.840.10008.1.2.4.10", "1.2.840.10008.1.2.4.11")


# -- objects --------------------------------------------------------------------------------------------------------


@operation("retrieve")
async def retrieve(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    ae, matched = match_rows(archive, request)
    for one in accepted(request):
        if one.name == ANY or one.related == DICOM:
            check_conditions(request, matched)
            return await _objects(archive, request, ae, matched, one)
        if one.name == "application/zip":
            check_conditions(request, matched)
            return await _zip(archive, request, ae, matched, one)
        if one.related in (OCTETS, *FRAME_TYPES.values()):
            return pixel_data(request, matched, one)
    raise Refusal(web.Response(status=406))


def _keeps(syntax: str, asked: Media) -> bool:
    """Whether an object goes out in the transfer syntax it has."""
    if asked.name == ANY or asked.transfer_syntax in (_WILDCARD, syntax):
        return True
    return syntax.startswith(_VIDEO) or not UID(syntax).is_compressed


async def _outgoing(row: InstanceRow, over: Attributes, asked: Media) -> Outgoing | None:
    """One object as it will be sent; None if it cannot be had in the form asked for."""
    try:
        if _keeps(row.transfer_syntax_uid, asked):
            return as_stored(row.path, over)
        return await asyncio.to_thread(decompressed, row.path, over)
    except Exception:  # noqa: BLE001  # pydicom and its decoders raise whatever they run into
        return None


async def _bytes_of(row: InstanceRow, outgoing: Outgoing) -> AsyncIterator[bytes]:
    if outgoing.start:
        yield outgoing.start
    if outgoing.rest_at is not None:
        async for chunk in file_chunks(row.path, outgoing.rest_at):
            yield chunk


async def _objects(
    archive: ArchiveState, request: web.Request, ae: ApplicationEntity, matched: Matched, asked: Media
) -> web.StreamResponse:
    needs_codec = [row for row in matched.rows if not _keeps(row.transfer_syntax_uid, asked)]
    unacceptable = {row.key for row in needs_codec if not can_decode(row.transfer_syntax_uid)}
    rows = [row for row in matched.rows if row.key not in unacceptable]
    if not rows:
        raise Refusal(not_acceptable())

    async def parts() -> Parts:
        for row in rows:
            outgoing = await _outgoing(row, laid_over(archive, ae, row), asked)
            if outgoing is None:
                raise OSError(f"{row.sop_instance_uid} cannot be transcoded")
            yield {"Content-Type": f"{DICOM};transfer-syntax={outgoing.transfer_syntax_uid}"}, _bytes_of(row, outgoing)

    first = rows[0].transfer_syntax_uid if _keeps(rows[0].transfer_syntax_uid, asked) else str(ExplicitVRLittleEndian)
    status, headers = completeness(request, matched, len(unacceptable))
    headers = {**headers, **matched.headers, "Accept-Ranges": "none"}
    return related(parts(), f'"{DICOM}";transfer-syntax={first}', status, headers)


# -- zip ------------------------------------------------------------------------------------------------------------


async def _zip(
    archive: ArchiveState, request: web.Request, ae: ApplicationEntity, matched: Matched, asked: Media
) -> web.StreamResponse:
    async def content() -> AsyncIterator[bytes]:
        sink = _Sink()
        seen: set[str] = set()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as packed:
            for row in matched.rows:
                outgoing = await _outgoing(row, laid_over(archive, ae, row), asked)
                if outgoing is None:
                    raise OSError(f"{row.sop_instance_uid} cannot be transcoded")
                for folder in _folders(row):
                    if folder not in seen:
                        packed.mkdir(folder)
                        seen.add(folder)
                with packed.open(_entry(row), "w", force_zip64=True) as entry:
                    async for chunk in _bytes_of(row, outgoing):
                        entry.write(chunk)
                        yield sink.take()
        yield sink.take()

    status, headers = completeness(request, matched)
    return Streamed(content(), status=status, headers={**headers, **matched.headers, "Content-Type": "application/zip"})


class _Sink(io.RawIOBase):
    """What zipfile writes to: a stream that cannot seek, emptied after every chunk."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, chunk: Any) -> int:
        self._held.append(bytes(chunk))
        return len(chunk)

    def take(self) -> bytes:
        held, self._held = self._held, []
        return b"".join(held)


def _names(row: InstanceRow) -> list[str]:
    uids = (row.study_instance_uid, row.series_instance_uid, row.sop_instance_uid)
    return ["DICOM", *(f"{java_hash(uid):08X}" for uid in uids)]


def _folders(row: InstanceRow) -> list[str]:
    names = _names(row)
    return ["/".join(names[:depth]) + "/" for depth in (1, 2, 3)]


def _entry(row: InstanceRow) -> str:
    return "/".join(_names(row)) + ".dcm"


# -- metadata -------------------------------------------------------------------------------------------------------


@operation("metadata")
async def metadata(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    ae, matched = match_rows(archive, request)
    as_xml = _wants_xml(request)
    check_conditions(request, matched)
    status, headers = completeness(request, matched)
    datasets = (_metadata_of(archive, request, ae, row) for row in matched.rows)
    headers = {**headers, **matched.headers}
    if as_xml:
        parts = [({"Content-Type": "application/dicom+xml"}, once(native_xml(one))) for one in datasets]
        boundary = secrets.token_hex(16)
        kind = f'multipart/related;type="application/dicom+xml";boundary={boundary}'
        return Streamed(multipart(parts, boundary), status=status, headers={**headers, "Content-Type": kind})
    return Streamed(_array(datasets), status=status, headers={**headers, "Content-Type": DICOM_JSON})


def _wants_xml(request: web.Request) -> bool:
    for one in accepted(request):
        if one.name in (DICOM_JSON, "application/json", ANY):
            return False
        if one.related == "application/dicom+xml":
            return True
    raise Refusal(web.Response(status=406))


async def _array(datasets: Iterable[Attributes]) -> AsyncIterator[bytes]:
    """A JSON array, one dataset at a time."""
    opening = b"["
    for one in datasets:
        yield opening + json.dumps(one, separators=(",", ":")).encode()
        opening = b","
        await asyncio.sleep(0)
    yield b"]"


def _metadata_of(archive: ArchiveState, request: web.Request, ae: ApplicationEntity, row: InstanceRow) -> Attributes:
    url = (
        f"{services_url(request)}/studies/{row.study_instance_uid}/series/{row.series_instance_uid}"
        f"/instances/{row.sop_instance_uid}"
    )

    def bulk(path: AttributePath) -> str:
        steps = [f"{step:08X}" if at % 2 == 0 else str(step + 1) for at, step in enumerate(path)]
        return f"{url}/bulkdata/{'/'.join(steps)}"

    style = JsonStyle(numbers=False, bulk=bulk, bulk_above_bytes=BULK_ABOVE_BYTES, bulk_vrs=frozenset())
    try:
        header = read_header(row.path)
    except Unreadable as error:
        raise OSError(str(error)) from error
    found = shown(header, laid_over(archive, ae, row), style)
    if has_pixels(header):
        # For pixel data the URI is the instance itself.
        found["7FE00010"] = {"vr": "OW", "BulkDataURI": url}
    return found
