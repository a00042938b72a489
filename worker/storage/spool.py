"""Where the bytes of one image wait: in memory while they are few, then on disk; counted and hashed as they pass.

No protocol is spoken here; the sources hand in chunks.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, Self, cast

from courier.errors import SourceTooLarge, SourceTruncated, SourceUnreachable
from worker.runtime.scratch import drop, no_room

MEMORY_BYTES = 8 * 1_048_576
CHUNK_BYTES = 262_144


@dataclass(frozen=True)
class Fetched:
    """The bytes of one image, complete. Closing it frees them."""

    stream: BinaryIO
    size_bytes: int
    sha256: str
    source: str
    """The URL without query, fragment and userinfo: safe to show."""

    def open(self) -> BinaryIO:
        """A view from byte 0 with a position of its own; closing it leaves the bytes for the next one."""
        return io.BufferedReader(_View(self.stream), CHUNK_BYTES)

    def starts_with(self, prefix: bytes) -> bool:
        with self.open() as file:
            return file.read(len(prefix)) == prefix

    def to_disk(self) -> None:
        """Give the memory back; for whoever lets many of them wait at a time."""
        if isinstance(self.stream, tempfile.SpooledTemporaryFile):
            try:
                self.stream.rollover()
            except OSError as error:
                raise no_room(error) from error

    def close(self) -> None:
        """Free the bytes. Closing writes what is buffered still, for which a full disk has no room."""
        try:
            self.stream.close()
        except OSError as error:
            raise no_room(error) from error

    def drop(self) -> None:
        """Free the bytes where it no longer matters whether the disk took all of them."""
        drop(self.stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # what has gone wrong before says more
            self.drop()


@dataclass(frozen=True)
class Limits:
    """How much and how long one fetch may take; ``deadline_s`` is a moment of `time.monotonic`."""

    max_bytes: int
    deadline_s: float
    total_timeout_s: float

    def check_size(self, size_bytes: int, source: str) -> None:
        if size_bytes > self.max_bytes:
            raise SourceTooLarge(
                f"{source} is larger than {self.max_bytes} bytes; raise sources.max_bytes if such images are expected."
            )

    def check_time(self, source: str) -> None:
        if time.monotonic() > self.deadline_s:
            raise self.too_slow(source)

    def too_slow(self, source: str) -> SourceUnreachable:
        return SourceUnreachable(
            f"{source} was not there within {self.total_timeout_s:g} s; it is tried again (sources.total_timeout_s)."
        )


def spool(chunks: Iterable[bytes], *, source: str, limits: Limits, announced_bytes: int | None = None) -> Fetched:
    """Take ``chunks`` in; what is left behind on an error is nothing.

    Raises
    ------
    SourceTooLarge
        More than ``limits.max_bytes`` were announced or came.
    SourceTruncated
        Not as many came as ``announced_bytes``.
    SourceUnreachable
        They took too long, or the worker's disk has no room for them.
    """
    limits.check_size(announced_bytes or 0, source)
    # Closed by Fetched.close, or below if it never gets that far.
    stream = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115
    try:
        size_bytes, sha256 = _fill(stream, _within(chunks, limits, source))
        if announced_bytes is not None and size_bytes != announced_bytes:
            raise SourceTruncated(
                f"{source} ended after {size_bytes} of {announced_bytes} bytes; it is fetched again from the start."
            )
        _rewind(stream)
    except BaseException:
        drop(stream)
        raise
    return Fetched(cast(BinaryIO, stream), size_bytes, sha256, source)


def _within(chunks: Iterable[bytes], limits: Limits, source: str) -> Iterator[bytes]:
    size_bytes = 0
    for chunk in chunks:
        size_bytes += len(chunk)
        limits.check_size(size_bytes, source)
        limits.check_time(source)
        yield chunk


def _fill(stream: IO[bytes], chunks: Iterator[bytes]) -> tuple[int, str]:
    digest = hashlib.sha256()
    size_bytes = 0
    for chunk in chunks:
        digest.update(chunk)
        try:
            stream.write(chunk)
        except OSError as error:
            raise no_room(error) from error
        size_bytes += len(chunk)
    return size_bytes, digest.hexdigest()


def _rewind(stream: IO[bytes]) -> None:
    """To the first byte; what is buffered is written now."""
    try:
        stream.seek(0)
    except OSError as error:
        raise no_room(error) from error


class _View(io.RawIOBase):
    """One reader of a stream that has several: it seeks before each read, and nothing is copied."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._stream.seek(0, io.SEEK_END)
        self._position = max(offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._position)
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
