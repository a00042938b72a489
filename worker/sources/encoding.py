"""Content-Encoding: what a source stored its images in although nobody asked for it. Pure; chunks in, chunks out."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from worker.errors import SourceNotAllowed, SourceTruncated
from worker.sources.spool import CHUNK_BYTES

#: ``aws-chunked`` is how an upload to S3 was framed and is left over in what some servers answer.
_PLAIN = frozenset(("", "identity", "aws-chunked"))
_GZIP = zlib.MAX_WBITS | 16


def is_plain(encoding: str) -> bool:
    """Whether the bytes on the wire are the image's, so that the announced length is the image's too."""
    return encoding.strip().lower() in _PLAIN


def decoded(chunks: Iterable[bytes], encoding: str, *, source: str) -> Iterator[bytes]:
    """The image's bytes: those that came, or what was zipped into them.

    Raises
    ------
    SourceNotAllowed
        An encoding other than gzip.
    SourceTruncated
        The gzip content is damaged or has no end.
    """
    if is_plain(encoding):
        yield from chunks
    elif encoding.strip().lower() in ("gzip", "x-gzip"):
        yield from _unzipped(chunks, source)
    else:
        raise SourceNotAllowed(f"{source} comes in a Content-Encoding that is not spoken here; store it plain or gzip.")


def _unzipped(chunks: Iterable[bytes], source: str) -> Iterator[bytes]:
    """The content of gzip members, never more than `CHUNK_BYTES` of it at a time, however dense they are."""
    inflater = zlib.decompressobj(_GZIP)
    for chunk in chunks:
        data = chunk
        while data:
            if inflater.eof:
                inflater = zlib.decompressobj(_GZIP)
            try:
                yield inflater.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                raise SourceTruncated(f"{source} says that it is gzip but is not; it is fetched again.") from error
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    if not inflater.eof:
        raise SourceTruncated(f"{source} ended within its gzip content; it is fetched again.")
