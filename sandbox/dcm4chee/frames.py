"""WADO-RS below the object on DCM4CHEE: frames, pixel data, bulk data, rendered pictures.

Native frames are cut out of the file; compressed ones are taken apart, and decoded where the client asks for that,
by pydicom.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence

from aiohttp import web
from pydicom import Dataset, dcmread
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian

from sandbox import pictures, pixels
from sandbox.datasets import DEFLATED, Header
from sandbox.dcm4chee.archive import ArchiveState, Refusal, refuse
from sandbox.dcm4chee.media import ANY, Media, accepted
from sandbox.dcm4chee.objects import has_pixels, read_header
from sandbox.dcm4chee.retrieval import OCTETS, Matched, Parts, completeness, match_rows, not_acceptable, related
from sandbox.store import InstanceRow
from sandbox.web import CHUNK_BYTES, Streamed, operation

#: The media type of one compressed frame.
FRAME_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}


@operation("retrieve")
async def frames(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    row, header = _image(archive, request)
    numbers = _frame_numbers(request.match_info["frames"])
    available = int(header.dataset.get("NumberOfFrames") or 1)
    there = [number for number in numbers if number <= available]
    if not there:
        raise refuse(404, "No such frame.")
    kind, compressed = _frame_form(request, row)
    missing = len(numbers) - len(there)
    syntax = row.transfer_syntax_uid if compressed else str(ExplicitVRLittleEndian)

    async def parts() -> Parts:
        for number in there:
            yield {"Content-Type": f"{kind};transfer-syntax={syntax}"}, _frame(row, header, number, compressed)

    return related(parts(), f'"{kind}";transfer-syntax={syntax}', 206 if missing else 200, {})


def _image(archive: ArchiveState, request: web.Request) -> tuple[InstanceRow, Header]:
    _ae, matched = match_rows(archive, request)
    header = read_header(matched.rows[0].path)
    if not has_pixels(header):
        raise refuse(404, "Not an image.")
    return matched.rows[0], header


def _frame_numbers(text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise refuse(400, f"Invalid frame list: {text}")
    return numbers


def _frame_form(request: web.Request, row: InstanceRow) -> tuple[str, bool]:
    """The media type of the frames, and whether they stay compressed."""
    own = FRAME_TYPES.get(row.transfer_syntax_uid)
    for one in accepted(request):
        if one.name == ANY:
            return (own, True) if own else (OCTETS, False)
        if own and one.related == own and one.transfer_syntax in (None, "*", row.transfer_syntax_uid):
            return own, True
        if one.related in (OCTETS, ANY):
            return OCTETS, False
    raise Refusal(not_acceptable())


async def _frame(row: InstanceRow, header: Header, number: int, compressed: bool) -> AsyncIterator[bytes]:
    """One frame's bytes, as they lie in the file where that is what was asked for."""
    syntax = UID(row.transfer_syntax_uid)
    native = not syntax.is_compressed and syntax.is_little_endian and int(header.dataset.BitsAllocated) % 8 == 0
    if header.pixels_at is not None and (compressed or native):
        async for chunk in pixels.frame_chunks(row.path, header, number):
            yield chunk
    else:
        yield await asyncio.to_thread(_decoded_frame, row, number)


def _decoded_frame(row: InstanceRow, number: int) -> bytes:
    if row.transfer_syntax_uid == DEFLATED:
        array = pixel_array(dcmread(row.path), index=number - 1)
    else:
        array = pixel_array(row.path, index=number - 1)
    return bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def pixel_data(request: web.Request, matched: Matched, asked: Media) -> Streamed:
    """The pixel data of every image: one part each, or one per frame where frames stay compressed."""
    headers_of = {row.key: read_header(row.path) for row in matched.rows}
    images = [row for row in matched.rows if has_pixels(headers_of[row.key])]
    if asked.related != OCTETS:
        images = [row for row in images if FRAME_TYPES.get(row.transfer_syntax_uid) == asked.related]
    if not images:
        raise Refusal(not_acceptable())
    keep = asked.related != OCTETS

    async def parts() -> Parts:
        for row in images:
            syntax = row.transfer_syntax_uid if keep else str(ExplicitVRLittleEndian)
            kind = {"Content-Type": f"{asked.related};transfer-syntax={syntax}"}
            header = headers_of[row.key]
            numbers = range(1, int(header.dataset.get("NumberOfFrames") or 1) + 1)
            if keep:
                for number in numbers:
                    yield kind, _frame(row, header, number, True)
            else:
                yield kind, _all_frames(row, header, numbers)

    status, headers = completeness(request, matched, len(matched.rows) - len(images))
    return related(parts(), f'"{asked.related}"', status, headers)


async def _all_frames(row: InstanceRow, header: Header, numbers: Sequence[int]) -> AsyncIterator[bytes]:
    for number in numbers:
        async for chunk in _frame(row, header, number, False):
            yield chunk


@operation("retrieve")
async def bulk_data(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    """``…/bulkdata/{tag}[/{item}/{tag}…]``."""
    _ae, matched = match_rows(archive, request)
    ds = dcmread(matched.rows[0].path, defer_size=1 << 16)
    content = _bulk_value(ds, request.match_info["path"].split("/"))
    if not any(one.name == ANY or one.related in (OCTETS, ANY) for one in accepted(request)):
        raise Refusal(not_acceptable())

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(content), CHUNK_BYTES):
            yield content[at : at + CHUNK_BYTES]

    async def parts() -> Parts:
        yield {"Content-Type": OCTETS}, chunks()

    return related(parts(), f'"{OCTETS}"', 200, {})


def _bulk_value(ds: Dataset, steps: Sequence[str]) -> bytes:
    try:
        for tag, item in zip(steps[::2], steps[1::2], strict=False):
            ds = ds[int(tag, 16)].value[int(item) - 1]
        value = ds[int(steps[-1], 16)].value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise refuse(400, f"No such attribute: {'/'.join(steps)}") from error
    if isinstance(value, bytes):
        return value
    return ("\\".join(map(str, value)) if isinstance(value, list) else str(value)).encode()


@operation("retrieve")
async def rendered(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    """``/rendered`` and ``/thumbnail`` of an instance or frame: JPEG or PNG."""
    row, header = _image(archive, request)
    number = int(request.match_info.get("frame", 1))
    if number > int(header.dataset.get("NumberOfFrames") or 1):
        raise refuse(404, "No such frame.")
    form = _picture_form(request)
    edge = 64 if request.path.endswith("/thumbnail") else None
    try:
        picture = await asyncio.to_thread(pictures.render, row.path, frame=number, longest_edge=edge)
    except pictures.NoPicture as error:
        raise Refusal(not_acceptable()) from error
    content = io.BytesIO()
    picture.save(content, form)
    return web.Response(body=content.getvalue(), content_type=f"image/{form}")


def _picture_form(request: web.Request) -> str:
    for one in accepted(request):
        if one.name in (ANY, "image/*", "image/jpeg"):
            return "jpeg"
        if one.name in ("image/png", "image/gif"):
            return one.name.removeprefix("image/")
    raise Refusal(not_acceptable())
