"""Images as one ZIP archive, uncompressed: the body of a request to a server that takes archives.

No HTTP here, and the archive is zipstream-ng's. What a server answers is its dialect's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from zipstream import ZipStream

from worker.pacs.protocol import Part
from worker.pacs.stow import Once, content_of, in_blocks, preamble_of

CONTENT_TYPE = "application/zip"


class ZipBody:
    """One entry per part, in their order; each iteration opens them afresh. A file without preamble gets one."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": CONTENT_TYPE, "Content-Length": str(len(self._archive()))}

    def __iter__(self) -> Iterator[bytes]:
        return in_blocks(self._archive())

    def _archive(self) -> ZipStream:
        archive = ZipStream(sized=True)
        for number, part in enumerate(self._parts):
            preamble = preamble_of(part)
            pieces = chain((preamble,), content_of(part))
            archive.add(pieces, str(number), size=len(preamble) + part.size_bytes)
        return archive


class StreamedZip:
    """As `ZipBody`, for instances that pass by once and whose lengths nobody knows."""

    headers: Mapping[str, str] = {"Content-Type": CONTENT_TYPE}

    def __init__(self, stream: Once) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        return in_blocks(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        archive = ZipStream()
        for number, one in enumerate(self._stream):
            archive.add(chain((preamble_of(one),), one.chunks), str(number))
            yield from archive.file()
        yield from archive.footer()
