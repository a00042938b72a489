"""A DICOMweb server that costs next to nothing: ``python -m benchmarks.stub_pacs``.

It has nothing and keeps nothing: each question is answered with an empty list, each store with success, and a question
for the metadata of an image with those of the benchmarks' CT under the UIDs of the request. It listens on a free
loopback port and prints its base URL.
"""

from __future__ import annotations

import asyncio
import io
import json
import re

import pydicom

from benchmarks.images import image

_STUDY, _SERIES, _SOP = "2.25.1000001", "2.25.1000002", "2.25.1000003"
_CLASS = "1.2.840.10008.5.1.4.1.1.2"
_METADATA = re.compile(rb"/studies/([\d.]+)/series/([\d.]+)/instances/([\d.]+)/metadata")
#: Media Storage SOP Instance UID (0002,0003) of a body that is stored: its element, length and value.
_STORED_UID = re.compile(rb"\x02\x00\x03\x00UI..([\d.]+)", re.DOTALL)


def _metadata_template() -> bytes:
    ds = pydicom.dcmread(io.BytesIO(image(1, 1)), stop_before_pixels=True)
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = _STUDY, _SERIES, _SOP
    return json.dumps([ds.to_json_dict(suppress_invalid_tags=True)]).encode()


_TEMPLATE = _metadata_template()


def answer_to(request_line: bytes, body: bytes) -> bytes:
    """The body of the answer to a request."""
    if request_line.startswith(b"POST "):
        referenced = [
            {"00081150": {"vr": "UI", "Value": [_CLASS]}, "00081155": {"vr": "UI", "Value": [uid.decode()]}}
            for uid in _STORED_UID.findall(body)
        ]
        return json.dumps({"00081199": {"vr": "SQ", "Value": referenced}}).encode()
    if asked := _METADATA.search(request_line):
        text = _TEMPLATE
        for old, new in zip((_STUDY, _SERIES, _SOP), asked.groups(), strict=True):
            text = text.replace(old.encode(), new)
        return text
    return b"[]"


async def _serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            text = answer_to(head.partition(b"\r\n")[0], body)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\nContent-Length: %d\r\n\r\n" % len(text)
            )
            writer.write(text)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _serve() -> None:
    server = await asyncio.start_server(_serve_connection, "127.0.0.1", 0, limit=1 << 22)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/dicom-web", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
