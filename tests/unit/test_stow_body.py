"""The body of a STOW request: framing, length, memory, and being built twice. No server."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from typing import BinaryIO

import pytest
from python_multipart.multipart import parse_options_header

from courier.errors import PacsUnavailable, SourceTruncated
from worker.dicom.instances import Instance
from worker.pacs.multipart import read_parts
from worker.pacs.protocol import Part, StreamedInstance
from worker.pacs.stow import PREAMBLE, Once, StowBody, StreamedBody

GIB = 1024**3


def part(content: bytes, *, announced: int | None = None, has_preamble: bool = True) -> Part:
    instance = Instance("1.1", "1.2", "1.3", "1.4", "1.2.840.10008.1.2.1", has_preamble)
    return Part(instance, lambda: io.BytesIO(content), len(content) if announced is None else announced)


class Zeros(io.RawIOBase):
    """A stream of ``size_bytes`` zeros that holds none of them, and remembers how large a block was asked for."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes
        self.reads: list[int] = []

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        self.reads.append(size)
        given = min(size, self._left)
        self._left -= given
        return bytes(given)


def parts_of(body: StowBody) -> list[bytes]:
    read = read_parts(iter([b"".join(body)]), body.content_type, error=AssertionError)
    return [b"".join(one.chunks) for one in read]


@pytest.mark.parametrize("contents", [[b"abc"], [b"abc", b"", b"x" * 600_000], [b"\r\n--", b"--\r\n"]])
def test_the_body_is_the_parts_framed_and_as_long_as_announced(contents: list[bytes]) -> None:
    body = StowBody([part(content) for content in contents])
    assert len(b"".join(body)) == body.content_length
    assert parts_of(body) == contents


def test_the_type_of_the_whole_is_quoted_and_that_of_a_part_is_bare() -> None:
    body = StowBody([part(b"abc")])
    assert 'type="application/dicom"' in body.content_type
    assert b"\r\nContent-Type: application/dicom\r\n\r\nabc\r\n--" in b"".join(body)
    assert parse_options_header(body.content_type)[0] == b"multipart/related"


def test_a_body_can_be_built_twice() -> None:
    body = StowBody([part(b"abc"), part(b"def")])
    assert b"".join(body) == b"".join(body)


def test_a_small_image_is_sent_in_one_block() -> None:
    assert len(list(StowBody([part(b"x" * 40_000)]))) == 1


def test_a_file_without_preamble_gets_one() -> None:
    body = StowBody([part(b"\2\0\0\0", has_preamble=False)])
    assert parts_of(body) == [PREAMBLE + b"\2\0\0\0"]
    assert len(PREAMBLE) == 132
    assert len(b"".join(body)) == body.content_length


@pytest.mark.parametrize("announced", [4, 1_000_000])
def test_a_spool_shorter_than_announced_is_not_sent_as_whole(announced: int) -> None:
    with pytest.raises(SourceTruncated):
        list(StowBody([part(b"abc", announced=announced)]))


def test_a_spool_longer_than_announced_is_cut_where_announced() -> None:
    body = StowBody([part(b"abcdef", announced=3)])
    assert parts_of(body) == [b"abc"]


def test_a_spool_that_cannot_be_read_is_a_source_that_can_be_fetched_again() -> None:
    def gone() -> BinaryIO:
        raise FileNotFoundError(2, "No such file or directory")

    instance = Instance("1.1", "1.2", "1.3", "1.4", "1.2.840.10008.1.2.1")
    with pytest.raises(SourceTruncated):
        list(StowBody([Part(instance, gone, 3)]))


def test_a_gibibyte_passes_through_a_few_large_blocks() -> None:
    stream = Zeros(GIB)
    instance = Instance("1.1", "1.2", "1.3", "1.4", "1.2.840.10008.1.2.1")
    body = StowBody([Part(instance, lambda: stream, GIB)])  # type: ignore[arg-type,return-value]
    tracemalloc.start()
    try:
        sent = sum(len(block) for block in body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent == body.content_length > GIB
    assert peak_bytes < 4 * 1024**2
    assert min(size for size in stream.reads if size) >= 64 * 1024


# Instances that pass by once


def streamed(*chunks: bytes, has_preamble: bool = True) -> StreamedInstance:
    return StreamedInstance(Instance("1.1", "1.2", "1.3", "1.4", "1.2.840.10008.1.2.1", has_preamble), iter(chunks))


def once(*images: StreamedInstance) -> Once:
    return Once(iter(images), again=lambda: PacsUnavailable("it has passed"))


def body_of(*images: StreamedInstance) -> StreamedBody:
    return StreamedBody(once(*images))


def test_what_passes_is_framed_as_what_is_spooled() -> None:
    arriving = once(streamed(b"abc", b"d"), streamed(), streamed(b"x" * 600_000), streamed(b"\2\0", has_preamble=False))
    body = StreamedBody(arriving)
    read = read_parts(iter([b"".join(body)]), body.content_type, error=AssertionError)
    assert [b"".join(one.chunks) for one in read] == [b"abcd", b"", b"x" * 600_000, PREAMBLE + b"\2\0"]
    assert len(arriving.sent) == 4


def test_what_has_passed_is_not_sent_twice_as_an_empty_body() -> None:
    body = body_of(streamed(b"abc"))
    list(body)
    with pytest.raises(PacsUnavailable, match="it has passed"):
        list(body)


def test_a_body_that_breaks_off_has_no_closing_boundary() -> None:
    def breaking() -> Iterator[bytes]:
        yield b"x" * 300_000
        raise PacsUnavailable("gone")

    body = body_of(StreamedInstance(streamed().instance, breaking()))
    blocks = iter(body)
    sent = next(blocks)
    assert len(sent) >= 300_000
    assert b"--\r\n" not in sent
    with pytest.raises(PacsUnavailable, match="gone"):
        next(blocks)


def test_a_gibibyte_that_passes_is_never_held() -> None:
    block = bytes(256 * 1024)
    body = body_of(*(StreamedInstance(streamed().instance, (block for _ in range(1024))) for _ in range(4)))
    tracemalloc.start()
    try:
        sent = sum(len(piece) for piece in body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent > GIB
    assert peak_bytes < 4 * 1024**2
