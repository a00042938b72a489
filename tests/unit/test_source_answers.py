"""What a source's answers mean, how its bytes are counted and unpacked, which files are open to it."""

from __future__ import annotations

import collections
import gzip
import hashlib
import os
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTooLarge,
    SourceTruncated,
    SourceUnreachable,
)
from courier.settings import SettingsError, SourceSettings
from worker.storage.encoding import decoded, is_plain
from worker.storage.folder_source import path_of
from worker.storage.http import error_of_status
from worker.storage.s3_source import bucket_and_key
from worker.storage.sources import Sources
from worker.storage.spool import CHUNK_BYTES, MEMORY_BYTES, Limits, spool


def limits(max_bytes: int = 1 << 30, total_timeout_s: float = 60) -> Limits:
    return Limits(max_bytes, time.monotonic() + total_timeout_s, total_timeout_s)


STATUSES: list[tuple[int, type[CourierError]]] = [
    *((status, SourceDenied) for status in (400, 401, 402, 403, 405, 406, 407, 409, 412, 416, 418, 422, 451)),
    *((status, SourceNotFound) for status in (204, 205, 404, 410)),
    *((status, SourceUnreachable) for status in (408, 421, 423, 425, 429, 500, 501, 502, 503, 504, 507, 599)),
    *((status, SourceUnreachable) for status in (201, 202, 300, 304, 999)),
    (206, SourceTruncated),
]


@pytest.mark.parametrize(("status", "kind"), STATUSES)
def test_each_status_has_its_meaning_and_is_named_in_the_sentence(status: int, kind: type[CourierError]) -> None:
    refusal = error_of_status(status, None, "http://images.example.org/a")
    assert type(refusal) is kind
    assert str(status) in refusal.message


@pytest.mark.parametrize("status", [200, 203])
def test_only_a_whole_answer_is_an_image(status: int) -> None:
    assert error_of_status(status, None, "http://images.example.org/a") is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        (None, None),
        ("soon", None),
        ("-5", None),
        ("1e9", None),
        ("Fri, 01 Jan 2021 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_taken_over_where_it_makes_sense(text: str | None, seconds: float | None) -> None:
    refusal = error_of_status(503, text, "http://images.example.org/a")
    assert isinstance(refusal, SourceUnreachable)
    assert refusal.retry_after_s == seconds


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_the_spool_holds_the_bytes_and_their_digest(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    with spool(chunks, source="x", limits=limits(), announced_bytes=len(whole)) as fetched:
        assert fetched.stream.read() == whole
        assert (fetched.size_bytes, fetched.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_views_of_a_spool_are_independent_and_leave_it_open() -> None:
    with spool([b"abc", b"def"], source="x", limits=limits()) as fetched:
        first, second = fetched.open(), fetched.open()
        assert first.read(2) == b"ab"
        assert second.read() == b"abcdef"
        first.close()
        second.seek(4)
        assert second.read() == b"ef"
        assert fetched.open().read() == b"abcdef"


def test_a_large_image_waits_on_disk_and_not_in_memory() -> None:
    chunk = bytes(CHUNK_BYTES)
    count = 8 * MEMORY_BYTES // len(chunk)
    tracemalloc.start()
    with spool((chunk for _ in range(count)), source="x", limits=limits()) as fetched:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert fetched.size_bytes == 8 * MEMORY_BYTES
        assert peak_bytes < 3 * MEMORY_BYTES


def test_too_many_bytes_are_refused_when_announced_and_when_they_come() -> None:
    with pytest.raises(SourceTooLarge, match=r"sources\.max_bytes"):
        spool([], source="x", limits=limits(max_bytes=10), announced_bytes=11)
    with pytest.raises(SourceTooLarge):
        spool((bytes(4) for _ in range(10**9)), source="x", limits=limits(max_bytes=10))
    with spool([bytes(10)], source="x", limits=limits(max_bytes=10), announced_bytes=10) as fetched:
        assert fetched.size_bytes == 10


@pytest.mark.parametrize("announced_bytes", [0, 2, 4])
def test_other_than_the_announced_number_of_bytes_is_truncated(announced_bytes: int) -> None:
    with pytest.raises(SourceTruncated, match="3 of"):
        spool([b"abc"], source="x", limits=limits(), announced_bytes=announced_bytes)


def test_a_fetch_that_takes_too_long_is_ended() -> None:
    with pytest.raises(SourceUnreachable, match="within"):
        spool(iter([b"abc"]), source="x", limits=limits(total_timeout_s=-1))


@given(st.binary(max_size=2000), st.integers(1, 50))
def test_gzip_content_is_unpacked_however_it_is_cut_into_chunks(data: bytes, step: int) -> None:
    zipped = gzip.compress(data[:500]) + gzip.compress(data[500:])
    chunks = [zipped[i : i + step] for i in range(0, len(zipped), step)]
    assert b"".join(decoded(chunks, "GZIP", source="x")) == data


def test_a_gzip_bomb_stops_at_the_size_limit_without_filling_memory() -> None:
    bomb = gzip.compress(bytes(64 * 1_048_576))
    tracemalloc.start()
    with pytest.raises(SourceTooLarge):
        spool(decoded([bomb], "gzip", source="x"), source="x", limits=limits(max_bytes=16 * 1_048_576))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * MEMORY_BYTES


@pytest.mark.parametrize(
    "encoding", ["gzip", "x-gzip", "aws-chunked,gzip", "gzip, aws-chunked", "identity, GZIP", "gzip,"]
)
@pytest.mark.parametrize("padding", [b"", bytes(16), bytes(700_000)])
def test_gzip_is_found_among_words_that_are_no_compression_and_zeros_may_follow(encoding: str, padding: bytes) -> None:
    data = gzip.compress(b"image" * 1000) + padding
    assert b"".join(decoded([data[:1], data[1:30], data[30:]], encoding, source="x")) == b"image" * 1000
    assert not is_plain(encoding)


@pytest.mark.parametrize(
    "encoding", ["", "identity", "aws-chunked,", "aws-chunked, aws-chunked", "UTF-8", "binary", "none", "base64"]
)
def test_a_word_that_is_no_compression_leaves_the_bytes_as_they_are(encoding: str) -> None:
    assert b"".join(decoded([b"ab", b"c"], encoding, source="x")) == b"abc"
    assert is_plain(encoding)


@pytest.mark.parametrize("data", [bytes(128) + b"DICM", b"\x1e\x8b", b"\x1f\x8a and more", b"<html>"])
def test_what_is_called_gzip_and_is_none_is_taken_as_it_is(data: bytes) -> None:
    assert b"".join(decoded([data[:1], data[1:]], "gzip", source="x")) == data


def test_compressed_content_that_grows_beyond_all_images_is_cut_off_though_the_size_limit_would_let_it_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.storage.encoding.GROWTH_COUNTS_FROM_BYTES", 1_048_576)
    bomb = gzip.compress(bytes(2 * 1_048_576))
    content = decoded([bomb], "gzip", source="x")
    with pytest.raises(SourceTooLarge, match="200 times"):
        collections.deque(content, maxlen=0)


@pytest.mark.parametrize(
    "data", [gzip.compress(b"abc" * 100, mtime=0)[:-4], gzip.compress(b"abc", mtime=0) + b"rest", b"\x1f", b""]
)
def test_damaged_gzip_is_truncated(data: bytes) -> None:
    with pytest.raises(SourceTruncated):
        list(decoded([data], "gzip", source="x"))


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "compress"])
def test_an_encoding_that_is_not_spoken_is_refused(encoding: str) -> None:
    with pytest.raises(SourceNotAllowed):
        list(decoded([b"abc"], encoding, source="x"))


def content(sources: Sources, url: str) -> bytes:
    with sources.fetch(url) as fetched:
        return fetched.stream.read()


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    (folder / "day one").mkdir(parents=True)
    (folder / "day one" / "a#1.dcm").write_bytes(b"image")
    (tmp_path / "secret.dcm").write_bytes(b"secret")
    return folder


def test_a_file_below_a_configured_folder_is_fetched(inbox: Path) -> None:
    url = f"file://{inbox}/day%20one/a%231.dcm"
    with Sources(SourceSettings(folders=(inbox,))).fetch(url) as fetched:
        assert fetched.stream.read() == b"image"
        assert fetched.sha256 == hashlib.sha256(b"image").hexdigest()
        assert fetched.source == url


@pytest.mark.parametrize("prefix", ["file:", "file://localhost", "FILE://", "file://LOCALHOST"])
def test_a_file_url_may_be_written_in_each_of_its_absolute_forms(inbox: Path, prefix: str) -> None:
    url = f"{prefix}{inbox}/day%20one/a%231.dcm"
    assert content(Sources(SourceSettings(folders=(inbox,))), url) == b"image"


def test_links_within_the_folder_are_followed_and_links_out_of_it_are_not(inbox: Path) -> None:
    sources = Sources(SourceSettings(folders=(inbox,)))
    (inbox / "inner").symlink_to(inbox / "day one" / "a#1.dcm")
    (inbox / "outer").symlink_to(inbox.parent / "secret.dcm")
    (inbox / "outside").symlink_to(inbox.parent)
    assert content(sources, f"file://{inbox}/inner") == b"image"
    for name in ("outer", "outside/secret.dcm", "outside/nothing"):
        with pytest.raises(SourceNotAllowed):
            sources.fetch(f"file://{inbox}/{name}")


def test_a_configured_folder_may_itself_be_a_link(inbox: Path) -> None:
    link = inbox.parent / "link"
    link.symlink_to(inbox)
    assert content(Sources(SourceSettings(folders=(link,))), f"file://{link}/day%20one/a%231.dcm") == b"image"


def test_a_link_swapped_in_after_the_check_is_not_followed(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = os.path.realpath

    def then_swap(path: str | Path) -> str:
        resolved = resolve(path)
        (inbox / "day one").rename(inbox.parent / "moved")
        (inbox / "day one").symlink_to(inbox.parent)
        return resolved

    (inbox / "day one" / "secret.dcm").write_bytes(b"image")
    sources = Sources(SourceSettings(folders=(inbox,)))
    monkeypatch.setattr("worker.storage.folder_source.os.path.realpath", then_swap)
    with pytest.raises(SourceNotAllowed):
        sources.fetch(f"file://{inbox}/day%20one/secret.dcm")


@pytest.mark.parametrize(
    "tail", ["/../secret.dcm", "/%2e%2e/secret.dcm", "/day%20one/../../secret.dcm", "/..%2fsecret.dcm"]
)
def test_a_way_out_of_the_folder_is_refused_in_every_spelling(inbox: Path, tail: str) -> None:
    with pytest.raises(SourceNotAllowed):
        Sources(SourceSettings(folders=(inbox,))).fetch(f"file://{inbox}{tail}")


def test_a_folder_whose_name_starts_like_a_configured_one_is_not_it(inbox: Path) -> None:
    other = inbox.parent / "inbox-of-somebody"
    other.mkdir()
    (other / "a.dcm").write_bytes(b"image")
    with pytest.raises(SourceNotAllowed):
        Sources(SourceSettings(folders=(inbox,))).fetch(f"file://{other}/a.dcm")


def test_without_configured_folders_no_file_is_fetched(inbox: Path) -> None:
    with pytest.raises(SourceNotAllowed, match=r"sources\.folders"):
        Sources(SourceSettings()).fetch(f"file://{inbox}/day%20one/a%231.dcm")


def test_a_missing_file_is_not_found_and_one_outside_is_not_told_from_a_missing_one(inbox: Path) -> None:
    sources = Sources(SourceSettings(folders=(inbox,)))
    with pytest.raises(SourceNotFound):
        sources.fetch(f"file://{inbox}/nothing.dcm")
    for name in ("secret.dcm", "nothing.dcm"):
        with pytest.raises(SourceNotAllowed):
            sources.fetch(f"file://{inbox.parent}/{name}")


def test_what_is_no_regular_file_is_refused_at_once(inbox: Path) -> None:
    os.mkfifo(inbox / "fifo")
    sources = Sources(SourceSettings(folders=(inbox, Path("/dev"))))
    for path in (inbox / "fifo", inbox / "day one", inbox, Path("/dev/zero")):
        with pytest.raises(SourceNotAllowed):
            sources.fetch(f"file://{path}".replace(" ", "%20"))


def test_a_file_larger_than_allowed_is_refused(inbox: Path) -> None:
    with pytest.raises(SourceTooLarge):
        Sources(SourceSettings(folders=(inbox,), max_bytes=4)).fetch(f"file://{inbox}/day%20one/a%231.dcm")


@pytest.mark.parametrize(
    "url",
    [
        "file:a.dcm",
        "file:./a.dcm",
        "file:",
        "file://images.example.org/a.dcm",
        "file://user@localhost/a.dcm",
        "file:///a%00.dcm",
        "file://[::1/a.dcm",
    ],
)
def test_a_file_url_that_is_not_absolute_or_not_of_this_machine_is_refused(url: str) -> None:
    with pytest.raises(SourceNotAllowed):
        path_of(url)


@pytest.mark.parametrize(
    "url", ["file://{}/order?2#b.dcm", "file://{}/order%3F2%23b.dcm", "file://localhost{}/order?2%23b.dcm"]
)
def test_a_question_mark_and_a_hash_belong_to_the_name_of_a_file(inbox: Path, url: str) -> None:
    (inbox / "order").write_bytes(b"another one")
    (inbox / "order?2#b.dcm").write_bytes(b"this one")
    with Sources(SourceSettings(folders=(inbox,))).fetch(url.format(inbox)) as fetched, fetched.open() as opened:
        assert opened.read() == b"this one"


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/", "s3:///key", "s3://user:s3cret@bucket/key", "s3://b@c/k"]
)
def test_an_s3_url_without_bucket_and_key_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(SourceNotAllowed) as refused:
        bucket_and_key(url)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("key", ["../secret/a.dcm", "a/../../secret/a.dcm", "./a.dcm", "..", "a/."])
def test_an_s3_key_that_would_lead_out_of_its_bucket_is_refused(key: str) -> None:
    with pytest.raises(SourceNotAllowed, match="between slashes"):
        bucket_and_key(f"s3://images/{key}")


def test_an_s3_key_is_taken_as_it_stands() -> None:
    assert bucket_and_key("S3://images/2024/a b%20+é.dcm") == ("images", "2024/a b%20+é.dcm")


@pytest.mark.parametrize("url", ["", "a.dcm", "/a.dcm", "ftp://h/a", "gs://b/k", "data:,x", "s3cret:x@h"])
def test_a_scheme_that_is_not_spoken_is_refused(url: str) -> None:
    with pytest.raises(SourceNotAllowed, match="http, https, file, s3"):
        Sources(SourceSettings()).fetch(url)


@pytest.mark.parametrize("url", ["file:///a\ud800.dcm", "http://h/\udfff", "s3://images/\udc80", "\ud800"])
def test_a_url_that_is_no_text_is_refused(url: str) -> None:
    with pytest.raises(SourceNotAllowed, match="Unicode"):
        Sources(SourceSettings(allow_hosts=("*",), folders=(Path("/"),))).fetch(url)


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_an_authority_that_cannot_be_read_stops_the_start_by_its_name(tmp_path: Path, content: bytes | None) -> None:
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"sources\.ca_file"):
        Sources(SourceSettings(ca_file=ca_file))


@given(st.text(max_size=60))
def test_no_file_url_ends_as_anything_but_an_error_of_ours(path: str) -> None:
    sources = Sources(SourceSettings(folders=(Path("/nonexistent"),)))
    with pytest.raises((SourceNotAllowed, SourceNotFound)):
        sources.fetch(f"file:///nonexistent/{path}")
