from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox.store import Store
from sandbox.web import BrokenMultipart, Splitter

CONTENTS = st.lists(st.binary(max_size=200), max_size=4)


def framed(contents: list[bytes]) -> bytes:
    parts = (b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in contents)
    return b"preamble\r\n" + b"".join(parts) + b"--frontier--\r\nepilogue"


def split(store: Store, body: bytes, cuts: list[int]) -> list[bytes]:
    splitter = Splitter("frontier", store)
    found = []
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    try:
        for start, end in pairwise(places):
            for part in splitter.feed(body[start:end]):
                assert part.headers == {"content-type": "application/dicom"}
                found.append(part.spool.path.read_bytes())
                part.spool.discard()
        splitter.end()
    finally:
        splitter.discard()
    return found


@given(CONTENTS, st.lists(st.integers(min_value=0, max_value=2000), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_are_found_whole_however_the_body_is_cut_into_chunks(
    tmp_path: Path, contents: list[bytes], cuts: list[int]
) -> None:
    store = Store(tmp_path)
    assert split(store, framed(contents), cuts) == contents
    assert list((tmp_path / "spool").iterdir()) == []
    store.close()


@pytest.mark.parametrize(
    ("body", "inside_part"),
    [
        (b"", False),
        (b"no boundary", False),
        (b"--frontier\r\nContent-Type: applic", False),
        (b"--frontier\r\nContent-Type: application/dicom\r\n\r\nhalf", True),
        (b"--frontier\r\nContent-Type: application/dicom\r\n\r\nwhole\r\n--front", True),
        (b"--frontier\r\nContent-Type application/dicom\r\n\r\n", False),
    ],
)
def test_a_body_that_breaks_off_says_where(tmp_path: Path, body: bytes, inside_part: bool) -> None:
    store = Store(tmp_path)
    with pytest.raises(BrokenMultipart) as broken:
        split(store, body, [])
    assert broken.value.inside_part is inside_part
    assert list((tmp_path / "spool").iterdir()) == []
    store.close()
