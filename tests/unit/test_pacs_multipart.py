"""Reading multipart answers however the network cuts them. No server."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from courier.errors import PacsMisanswered
from worker.pacs.multipart import read_parts

TYPE = 'multipart/related; type="application/dicom"; boundary=BB'
BODY = (
    b"--BB\r\nContent-Type: application/dicom; transfer-syntax=1.2.840.10008.1.2.1\r\n\r\nfirst\r\n--B\r\n"
    b'\r\n--BB\r\ncontent-type: application/dicom;transfer-syntax="1.2.840.10008.1.2.4.90"\r\n'
    b"Content-Length: 6\r\n\r\nsecond\r\n--BB\r\nContent-Type: application/dicom\r\n\r\n\r\n--BB--\r\n"
)
PARTS = [
    ("1.2.840.10008.1.2.1", b"first\r\n--B\r\n"),
    ("1.2.840.10008.1.2.4.90", b"second"),
    (None, b""),
]


def read(blocks: Iterable[bytes], content_type: str = TYPE) -> list[tuple[str | None, bytes]]:
    parts = read_parts(blocks, content_type, error=PacsMisanswered)
    return [(part.transfer_syntax_uid, b"".join(part.chunks)) for part in parts]


def test_each_part_comes_with_its_transfer_syntax_and_its_bytes() -> None:
    assert read([BODY]) == PARTS


@given(cuts=st.lists(st.integers(0, len(BODY)), max_size=20))
def test_where_the_network_cuts_does_not_matter(cuts: list[int]) -> None:
    edges = sorted({0, *cuts, len(BODY)})
    assert read(BODY[a:b] for a, b in pairwise(edges)) == PARTS


def test_a_byte_at_a_time_does_not_matter() -> None:
    assert read(BODY[i : i + 1] for i in range(len(BODY))) == PARTS


@pytest.mark.parametrize("step", range(1, 20))
def test_a_preamble_is_skipped_and_what_only_resembles_a_delimiter_is_none(step: int) -> None:
    def cut(body: bytes) -> list[bytes]:
        return [body[at : at + step] for at in range(0, len(body), step)]

    assert read(cut(b"\r\nsee --BB--\r\n--B\r\n" + BODY)) == PARTS
    with pytest.raises(PacsMisanswered, match="closing boundary"):
        read(cut(b"\r\n\x00u\x019--BB--\r\n"))


def test_a_boundary_that_is_too_long_is_no_answer() -> None:
    with pytest.raises(PacsMisanswered):
        read([BODY], f"multipart/related; boundary={'B' * 257}")


@pytest.mark.parametrize("end", range(len(BODY) - 2))
def test_an_answer_cut_anywhere_before_its_closing_boundary_is_no_answer(end: int) -> None:
    with pytest.raises(PacsMisanswered):
        read([BODY[:end]])


@pytest.mark.parametrize("content_type", ["text/html", "", "multipart/related", "application/zip"])
def test_an_answer_of_another_type_is_no_answer(content_type: str) -> None:
    with pytest.raises(PacsMisanswered):
        read([BODY], content_type)


def test_an_answer_that_is_not_framed_is_no_answer() -> None:
    with pytest.raises(PacsMisanswered):
        read([b"<html>not here</html>"])


def test_a_boundary_may_be_quoted_and_the_type_missing() -> None:
    assert read([BODY], 'multipart/related; boundary="BB"') == PARTS


def test_what_is_left_of_a_part_is_skipped_for_the_next() -> None:
    parts = read_parts([BODY], TYPE, error=PacsMisanswered)
    assert [part.transfer_syntax_uid for part in parts] == [syntax for syntax, _ in PARTS]


def test_a_single_part_answer_is_one_part() -> None:
    assert read([b"DI", b"CM"], "application/dicom; transfer-syntax=1.2.3") == [("1.2.3", b"DICM")]


def test_a_wildcard_is_no_transfer_syntax() -> None:
    body = b"--BB\r\nContent-Type: application/dicom; transfer-syntax=*\r\n\r\nx\r\n--BB--\r\n"
    assert read([body]) == [(None, b"x")]


def test_a_part_is_handed_on_before_the_next_block_is_read() -> None:
    source = io.BytesIO(BODY)
    blocks = iter(lambda: source.read(90), b"")
    first = next(read_parts(blocks, TYPE, error=PacsMisanswered))
    assert first.transfer_syntax_uid == PARTS[0][0]
    assert source.tell() < len(BODY)


def test_a_block_full_of_empty_parts_costs_ten_times_its_size_at_most() -> None:
    body = b"--BB\r\n\r\n\r\n" * 20_000 + b"--BB--"
    parts = read_parts([body], TYPE, error=PacsMisanswered)
    tracemalloc.start()
    try:
        assert sum(1 for _ in parts) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 10 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", [1, 5, 1 << 20])
@pytest.mark.parametrize(("length", "when"), [("7", "early"), ("0005", "late"), (" 6 ", ""), ("six", ""), ("-1", "")])
def test_a_part_that_has_not_the_length_it_announces_is_no_part(length: str, when: str, step: int) -> None:
    body = BODY.replace(b"Content-Length: 6", f"Content-Length: {length}".encode())
    blocks = [body[at : at + step] for at in range(0, len(body), step)]
    if not when:
        assert read(blocks) == PARTS
        return
    got = list[tuple[str | None, bytes]]()
    with pytest.raises(PacsMisanswered, match=f"ends {when}"):  # noqa: PT012 - what came before it counts
        for part in read_parts(blocks, TYPE, error=PacsMisanswered):
            got.append((part.transfer_syntax_uid, b"".join(part.chunks)))
    assert got == PARTS[:1], "what came whole before it is not lost"


def test_a_boundary_that_occurs_in_an_image_is_found_by_its_length() -> None:
    content = b"pixels\r\n--BB\r\n\r\nmore pixels"
    body = b"--BB\r\nContent-Length: %d\r\n\r\n%b\r\n--BB--\r\n" % (len(content), content)
    with pytest.raises(PacsMisanswered, match="ends early"):
        read([body])


def test_a_part_that_is_skipped_has_to_have_its_length_too() -> None:
    parts = read_parts([BODY.replace(b"Content-Length: 6", b"Content-Length: 9")], TYPE, error=PacsMisanswered)
    with pytest.raises(PacsMisanswered, match="ends early"):
        list(parts)
