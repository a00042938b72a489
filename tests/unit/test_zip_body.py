"""Images as one archive: entries, length, memory, and being built twice. No server."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Iterable, Iterator

import pytest

from courier.errors import PacsUnavailable, SourceTruncated
from worker.dicom.instances import Instance
from worker.pacs.protocol import Part, StreamedInstance
from worker.pacs.stow import PREAMBLE, Once
from worker.pacs.zip_body import StreamedZip, ZipBody

MIB = 1024**2
CONTENTS = [b"abc", b"x" * 600_000, b"PK\3\4"]


def instance(*, has_preamble: bool = True) -> Instance:
    return Instance("1.1", "1.2", "1.3", "1.4", "1.2.840.10008.1.2.1", has_preamble)


def part(content: bytes, *, announced: int | None = None, has_preamble: bool = True) -> Part:
    size_bytes = len(content) if announced is None else announced
    return Part(instance(has_preamble=has_preamble), lambda: io.BytesIO(content), size_bytes)


def streamed(*chunks: bytes, has_preamble: bool = True) -> StreamedInstance:
    return StreamedInstance(instance(has_preamble=has_preamble), iter(chunks))


def once(*images: StreamedInstance) -> Once:
    return Once(iter(images), again=lambda: PacsUnavailable("it has passed"))


def entries(body: Iterable[bytes]) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(b"".join(body))) as archive:
        return [archive.read(info) for info in archive.infolist()]


def test_there_is_an_entry_for_each_part_in_order_and_the_length_is_as_announced() -> None:
    body = ZipBody([*map(part, CONTENTS), part(b"\2\0", has_preamble=False)])
    assert len(b"".join(body)) == int(body.headers["Content-Length"])
    assert entries(body) == [*CONTENTS, PREAMBLE + b"\2\0"], "built again for a second attempt"


@pytest.mark.parametrize("announced", [2, 4])
def test_a_file_of_another_length_than_announced_is_sent_as_announced_or_not_at_all(announced: int) -> None:
    body = ZipBody([part(b"abc", announced=announced)])
    if announced > 3:
        with pytest.raises(SourceTruncated):
            list(body)
    else:
        assert entries(body) == [b"ab"]


def test_what_passes_has_an_entry_each_and_no_length() -> None:
    arriving = once(streamed(b"abc", b"d"), streamed(b"x" * 600_000), streamed(b"\2\0", has_preamble=False))
    body = StreamedZip(arriving)
    assert "Content-Length" not in body.headers
    assert entries(body) == [b"abcd", b"x" * 600_000, PREAMBLE + b"\2\0"]
    assert len(arriving.sent) == 3
    with pytest.raises(PacsUnavailable, match="it has passed"):
        list(body)


def test_what_breaks_off_is_no_archive() -> None:
    def breaking() -> Iterator[bytes]:
        yield b"x" * 300_000
        raise PacsUnavailable("gone")

    blocks = iter(StreamedZip(once(streamed(b"abc"), StreamedInstance(instance(), breaking()))))
    sent = next(blocks)
    assert len(sent) >= 300_000
    assert not zipfile.is_zipfile(io.BytesIO(sent))
    with pytest.raises(PacsUnavailable, match="gone"):
        next(blocks)


def test_a_gibibyte_is_never_held() -> None:
    block = bytes(256 * 1024)
    images = (StreamedInstance(instance(), (block for _ in range(1024))) for _ in range(4))
    tracemalloc.start()
    try:
        sent = sum(len(piece) for piece in StreamedZip(once(*images)))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent > 1024 * MIB
    assert peak_bytes < 4 * MIB
