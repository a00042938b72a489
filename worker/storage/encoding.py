"""Content-Encoding (RFC 9110, 8.4): how a source packed its images, unasked. Pure; chunks in, chunks out."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator

from courier.errors import SourceNotAllowed, SourceTooLarge, SourceTruncated
from worker.storage.spool import CHUNK_BYTES

_GZIP = frozenset(("gzip", "x-gzip"))
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_FORMAT = zlib.MAX_WBITS | 16
#: Compressions that are registered and not spoken here.
_REFUSED = frozenset(("br", "zstd", "deflate", "compress", "x-compress", "dcb", "dcz", "exi", "pack200-gzip"))
#: An answer may grow to so many times its size once it is large; deflate's own limit is 1,032.
MAX_GROWTH = 200
GROWTH_COUNTS_FROM_BYTES = 268_435_456


def is_plain(encoding: str) -> bool:
    """Whether the bytes on the wire are the image's, so that the announced length is the image's too."""
    return not _codings(encoding)


def decoded(chunks: Iterable[bytes], encoding: str, *, source: str) -> Iterator[bytes]:
    """The image's bytes: those that came, or what was zipped into them.

    Words that are no compression (``identity``, ``aws-chunked``, a charset, ``binary``) say nothing about the bytes;
    what is called gzip and does not begin as gzip does is taken as it is.

    Raises
    ------
    SourceNotAllowed
        A compression other than gzip, or more than one.
    SourceTooLarge
        The content grows to more than `MAX_GROWTH` times what came.
    SourceTruncated
        The gzip content is damaged or has no end.
    """
    codings = _codings(encoding)
    if len(codings) > 1 or _REFUSED.intersection(codings):
        raise SourceNotAllowed(f"{source} comes in a Content-Encoding that is not spoken here; store it plain or gzip.")
    yield from _unzipped(chunks, source) if codings else chunks


def _codings(encoding: str) -> list[str]:
    """The compressions in a Content-Encoding, in their order.

    ``aws-chunked`` is how an upload to S3 was framed and is left over in what some servers answer; what is not
    registered as a coding is read as identity, as browsers do.
    """
    return [coding for word in encoding.split(",") if (coding := word.strip().lower()) in _GZIP | _REFUSED]


def _unzipped(chunks: Iterable[bytes], source: str) -> Iterator[bytes]:
    """The content of gzip members, or the chunks themselves where they do not begin one."""
    rest = iter(chunks)
    head = b""
    while len(head) < len(_GZIP_MAGIC) and (chunk := next(rest, b"")):
        head += chunk
    whole = itertools.chain((head,), rest)
    return _inflated(whole, source) if _GZIP_MAGIC.startswith(head[:2]) else whole


def _inflated(chunks: Iterable[bytes], source: str) -> Iterator[bytes]:
    """Never more than `CHUNK_BYTES` of the content at a time, however dense it is. Zeros may follow the last member."""
    inflater = zlib.decompressobj(_GZIP_FORMAT)
    came_bytes = content_bytes = 0
    for chunk in chunks:
        came_bytes += len(chunk)
        data = chunk
        while data:
            if inflater.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                inflater = zlib.decompressobj(_GZIP_FORMAT)
            content = _content(inflater, data, source)
            content_bytes += len(content)
            if content_bytes > max(GROWTH_COUNTS_FROM_BYTES, came_bytes * MAX_GROWTH):
                raise SourceTooLarge(
                    f"{source} would grow to more than {MAX_GROWTH} times its compressed size; store it plain."
                )
            yield content
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    if not inflater.eof:
        raise SourceTruncated(f"{source} ended within its gzip content; it is fetched again.")


def _content(inflater: zlib._Decompress, data: bytes, source: str) -> bytes:
    try:
        return inflater.decompress(data, CHUNK_BYTES)
    except zlib.error as error:
        raise SourceTruncated(f"{source} has damaged gzip content; it is fetched again.") from error
