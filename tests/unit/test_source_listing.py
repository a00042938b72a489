"""Folders and archives say what they hold, and give nothing that lies outside of them or that blows up."""

from __future__ import annotations

import os
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from courier.errors import CourierError, NotDicom, SourceDenied, SourceNotAllowed, SourceNotFound, SourceTooLarge
from courier.settings import SourceSettings
from worker.storage import zip_source
from worker.storage.listing import PAGE_ENTRIES
from worker.storage.sources import ListedObject, Sources

BODY = b"0123456789abcdef" * 2000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "outside.dcm").write_bytes(BODY)
    return inside


@pytest.fixture
def sources(folder: Path) -> Sources:
    return Sources(SourceSettings(folders=(folder,), max_bytes=10_000_000))


def everything(sources: Sources, url: str) -> dict[str, ListedObject]:
    return {one.url: one for page in sources.pages(url) for one in page}


def names(found: dict[str, ListedObject]) -> dict[str, str]:
    return {url.rpartition("/")[2]: one.skip_reason for url, one in found.items()}


def test_a_folder_gives_every_file_below_it_by_a_url_that_fetches_it(sources: Sources, folder: Path) -> None:
    (folder / "a b" / "ü#?%").mkdir(parents=True)
    for name in ("one.dcm", "a b/two", "a b/ü#?%/three!.dcm"):
        (folder / name).write_bytes(BODY)
    found = everything(sources, f"{folder.as_uri()}/")
    assert len(found) == 3
    for url, one in found.items():
        assert (one.size_bytes, one.skip_reason) == (len(BODY), "")
        with sources.fetch(url) as fetched:
            assert fetched.stream.read() == BODY
    assert len(everything(sources, (folder / "a b").as_uri() + "/")) == 2


def test_what_is_no_image_is_listed_with_the_reason(sources: Sources, folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("DICOMDIR", "manifest.json", "more.zip", "x.dcm"):
        (folder / name).write_bytes(BODY)
    (folder / "gone").symlink_to("nowhere")
    (folder / "up").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.dcm")).write_bytes(BODY)
    listed = everything(sources, f"{folder.as_uri()}/")
    found = names(listed)
    assert {name for name, skip_reason in found.items() if not skip_reason} == {"x.dcm", "%FF.dcm"}
    assert len(found) == 8  # a link out of the folder is not followed
    refused = {url.rpartition("/")[2] for url, one in listed.items() if one.refused}
    assert refused == {"more.zip", "gone", "up", "pipe"}, "what may hold an image is not left out in silence"
    with sources.fetch(next(url for url in listed if url.endswith("%FF.dcm"))) as fetched:
        assert fetched.stream.read() == BODY


def test_folders_are_paged_and_none_is_listed_that_the_settings_do_not_name(sources: Sources, folder: Path) -> None:
    for number in range(PAGE_ENTRIES + 1):
        (folder / str(number)).touch()
    assert [len(page) for page in sources.pages(f"{folder.as_uri()}/")] == [PAGE_ENTRIES, 1]
    (folder / "empty").mkdir()
    (folder / "up").symlink_to(folder.parent)
    for url, kind in (
        (f"{folder.parent.as_uri()}/", SourceNotAllowed),
        (f"{folder.as_uri()}/../", SourceNotAllowed),
        (f"{folder.as_uri()}/up/", SourceNotAllowed),
        (f"{folder.as_uri()}/missing/", SourceNotFound),
        (f"{folder.as_uri()}/empty/", SourceNotFound),
        (f"{folder.as_uri()}/0/", SourceNotAllowed),
        (folder.as_uri(), SourceNotAllowed),
        ("https://images.example.org/all/", SourceNotAllowed),
        ("s3://elsewhere/", SourceNotAllowed),
        ("az://elsewhere/a/", SourceNotAllowed),
        ("az://elsewhere/a?sig=x/", SourceNotAllowed),
    ):
        with pytest.raises(kind):
            everything(sources, url)
    if os.geteuid():
        (folder / "locked").mkdir(mode=0)
        with pytest.raises(SourceDenied):
            everything(sources, f"{folder.as_uri()}/locked/")


Packed = Callable[..., str]


@pytest.fixture
def packed(folder: Path) -> Packed:
    def pack(entries: dict[str, bytes], name: str = "images.zip", how: int = zipfile.ZIP_DEFLATED) -> str:
        with zipfile.ZipFile(folder / name, "w", how) as archive:
            for entry, body in entries.items():
                archive.writestr(entry, body)
        return (folder / name).as_uri()

    return pack


def test_an_archive_gives_each_entry_by_a_url_that_fetches_it(sources: Sources, packed: Packed) -> None:
    bodies = {f"a b/ü#?%!/{number}.dcm": random.Random(number).randbytes(50_000) for number in range(30)}
    url = packed(bodies | {"folder/": b""})
    found = everything(sources, url)
    assert len(found) == 30
    assert all(one.size_bytes == 50_000 and one.url.startswith(f"zip+{url}!/") for one in found.values())
    assert everything(sources, f"zip+{url}") == found

    def body(url: str) -> bytes:
        with sources.fetch(url) as fetched:
            assert "!/a%20b/" in fetched.source
            return fetched.stream.read()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(body, found)) == list(bodies.values())
    # Another worker, or this one later, opens the archive anew.
    sources.close()
    assert body(next(iter(found))) == next(iter(bodies.values()))
    with pytest.raises(SourceNotFound, match="no such entry"):
        sources.fetch(f"zip+{url}!/elsewhere.dcm")


def test_an_entry_is_named_whole_however_its_name_is_written(sources: Sources, packed: Packed) -> None:
    url = packed({"order?1.dcm": b"image 1", "order?2.dcm": b"image 2", "100%3F.dcm": b"image 3"})
    for entry, body in (("order?2.dcm", b"image 2"), ("order%3F2.dcm", b"image 2"), ("100%253F.dcm", b"image 3")):
        with sources.fetch(f"zip+{url}!/{entry}") as fetched:
            assert fetched.stream.read() == body
            assert fetched.source == f"{url}!/{entry.replace('?', '%3F')}"


def test_an_entry_without_a_name_is_passed_over(sources: Sources, folder: Path, packed: Packed) -> None:
    url = packed({"a": BODY, "b": BODY})
    packed_bytes = (folder / "images.zip").read_bytes()
    (folder / "images.zip").write_bytes(packed_bytes.replace(b"a", b"\0"))  # where zipfile ends a name
    assert list(everything(sources, url)) == [f"zip+{url}!/b"]
    with pytest.raises(CourierError):
        sources.fetch(f"zip+{url}!/")


def test_an_archive_is_fetched_once_for_all_its_entries_and_let_go_later(
    sources: Sources, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    inner = sources._archives._fetch
    monkeypatch.setattr(sources._archives, "_fetch", lambda url, limits: [fetched.append(url), inner(url, limits)][1])
    first, second, third = (packed({"a": BODY, "b": BODY}, f"{number}.zip") for number in range(3))
    for _ in range(3):
        for entry in ("a", "b"):
            sources.fetch(f"zip+{first}!/{entry}").close()
    for wrong in ("c", "../a"):
        with pytest.raises(CourierError):
            sources.fetch(f"zip+{first}!/{wrong}")
    assert fetched == [first]
    for url in (second, third):
        sources.fetch(f"zip+{url}!/a").close()
    assert list(sources._archives._kept) == [second, third]
    sources._archives._drop_idle()
    assert len(sources._archives._kept) == 2
    monkeypatch.setattr(zip_source, "KEEP_S", -1.0)
    sources._archives._drop_idle()
    assert not sources._archives._kept


def test_entries_that_lead_astray_are_neither_listed_as_images_nor_read(
    sources: Sources, packed: Packed, folder: Path
) -> None:
    url = packed({"../up.dcm": BODY, "/root.dcm": BODY, "C:/a.dcm": BODY, "inner.zip": BODY, "__MACOSX/._a": BODY})
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder / "images.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("lzma.dcm", BODY, zipfile.ZIP_LZMA)
        archive.writestr("good.dcm", BODY)
        archive.writestr("twice.dcm", BODY)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("twice.dcm", BODY)
    found = everything(sources, url)
    assert [one.rpartition("/")[2] for one, listed in found.items() if not listed.skip_reason] == ["good.dcm"]
    assert [one.rpartition("/")[2] for one, listed in found.items() if listed.skip_reason and not listed.refused] == [
        "._a"
    ]
    for one, listed in found.items():
        if listed.skip_reason:
            with pytest.raises(SourceNotAllowed):
                sources.fetch(one)
    for malformed in (f"zip+{url}", f"zip+{url}!/", f"zip+zip+{url}!/inner.zip!/a"):
        with pytest.raises(SourceNotAllowed):
            sources.fetch(malformed)
    with pytest.raises(SourceNotAllowed, match="none of the folders"):
        sources.fetch(f"zip+{folder.parent.as_uri()}/outside.dcm!/a")
    with pytest.raises(SourceNotAllowed, match="entry of an archive"):
        everything(sources, f"zip+{url}!/inner.zip")


def refused(sources: Sources, url: str, kind: type[CourierError]) -> None:
    with pytest.raises(kind):
        everything(sources, url)
    with pytest.raises(kind):
        sources.fetch(f"zip+{url}!/a")
    assert not sources._archives._kept


def test_what_is_no_archive_or_damaged_is_refused(sources: Sources, packed: Packed, folder: Path) -> None:
    whole = Path(packed({"a": BODY}, how=zipfile.ZIP_STORED)[len("file://") :]).read_bytes()
    (folder / "none.zip").write_bytes(BODY)
    refused(sources, (folder / "none.zip").as_uri(), NotDicom)
    (folder / "cut.zip").write_bytes(whole[: len(whole) // 2])
    refused(sources, (folder / "cut.zip").as_uri(), NotDicom)
    (folder / "bit.zip").write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(NotDicom, match="damaged"):
        sources.fetch(f"zip+{(folder / 'bit.zip').as_uri()}!/a")
    for _ in range(200):
        rng = random.Random(_)
        spoilt = bytearray(whole[-150:])
        for _ in range(3):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        (folder / "fuzz.zip").write_bytes(whole[:-150] + spoilt)
        try:
            for url in everything(sources, (folder / "fuzz.zip").as_uri()):
                sources.fetch(url).close()
        except CourierError:
            pass
        sources.close()


def test_an_archive_that_would_blow_up_is_refused_before_it_does(
    sources: Sources, packed: Packed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = packed({"a": bytes(20_000_000)})
    with pytest.raises(SourceTooLarge):
        sources.fetch(f"zip+{bomb}!/a")
    monkeypatch.setattr(zip_source, "GROWTH_BYTES", 1_000_000)
    sources.close()
    refused(sources, bomb, SourceTooLarge)
    monkeypatch.setattr(zip_source, "MAX_ENTRIES", 3)
    refused(sources, packed({name: b"" for name in "abcd"}), SourceTooLarge)
    monkeypatch.setattr(zip_source, "MAX_ENTRIES", 1000)
    monkeypatch.setattr(zip_source, "MAX_DIRECTORY_BYTES", 100)
    refused(sources, packed({name: b"" for name in "abcd"}), SourceTooLarge)


def test_an_archive_whose_entries_share_their_bytes_is_refused(sources: Sources, packed: Packed, folder: Path) -> None:
    url = packed({"a": BODY, "b": BODY}, how=zipfile.ZIP_STORED)
    path = folder / "images.zip"
    content = bytearray(path.read_bytes())
    second = content.rfind(b"PK\x01\x02")
    content[second + 42 : second + 46] = struct.pack("<I", 0)  # the second entry begins where the first does
    path.write_bytes(content)
    refused(sources, url, SourceNotAllowed)


CD = (
    *("DICOMDIR", "README", "README.TXT", "Readme_en.html", "LOCKFILE", "VERSION", "Thumbs.db", ".DS_Store"),
    *("._IM0001", "__MACOSX/IMAGES/IM0001", "a/._b.zip", "AUTORUN.INF", "VIEWER.EXE", "lib/viewer.jar", "bin/qt.dll"),
    *("IHE_PDI/INDEX.HTM", "IHE_PDI/style.css", "help/manual.pdf"),
)
IMAGES = (
    *("IMAGES/IM0001", "IMAGES/1.2.840.10008.1", "A/B.C/0001", "x.dcm", "x.DCM", "version1", "readme.dcm", ".txt"),
    *("photo.jpg", "README/IM0001"),
)


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_what_a_patient_cd_holds_beside_its_images_is_left_out_by_name_and_the_rest_is_tried(
    form: str, sources: Sources, packed: Packed, folder: Path
) -> None:
    if form == "archive":
        url = packed(dict.fromkeys((*CD, *IMAGES), BODY))
    else:
        url = f"{folder.as_uri()}/"
        for name in (*(name for name in CD if name != "README"), *IMAGES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(BODY)
    found = everything(sources, url)
    start = len(url) + (len("zip+!/") if form == "archive" else 0)
    assert {one[start:] for one, listed in found.items() if not listed.skip_reason} == set(IMAGES)
    assert not any(listed.refused for listed in found.values())


def test_what_is_no_image_by_its_name_is_left_out_however_it_is_packed(
    sources: Sources, packed: Packed, folder: Path
) -> None:
    url = packed({"README": BODY, "a.exe": BODY, "a": BODY, "b.dcm": BODY}, how=zipfile.ZIP_BZIP2)
    assert {one.rpartition("/")[2]: listed.refused for one, listed in everything(sources, url).items()} == {
        "README": False,
        "a.exe": False,
        "a": True,
        "b.dcm": True,
    }


@pytest.mark.parametrize("entries", [{}, {"folder/": b""}])
def test_an_archive_without_a_file_is_called_empty(sources: Sources, packed: Packed, entries: dict[str, bytes]) -> None:
    url = packed(entries)
    with pytest.raises(SourceNotFound, match=r"images\.zip is empty: the archive holds no file\.$"):
        everything(sources, url)
    with pytest.raises(SourceNotFound, match="no such entry"):
        sources.fetch(f"zip+{url}!/a.dcm")


def test_a_file_without_a_byte_is_called_empty_and_no_damaged_archive(sources: Sources, folder: Path) -> None:
    (folder / "none.zip").touch()
    with pytest.raises(NotDicom, match="is empty"):
        everything(sources, (folder / "none.zip").as_uri())


def test_a_url_that_is_too_long_is_refused_and_named_by_its_beginning(sources: Sources, packed: Packed) -> None:
    url = packed({"ü" * 3000 + ".dcm": BODY, "a.dcm": BODY})
    long, short = everything(sources, url).values()
    assert (len(long.url), long.refused, short.skip_reason) == (8192, True, "")


def test_an_entry_that_cannot_be_unpacked_is_refused_with_what_it_is(
    sources: Sources, packed: Packed, folder: Path
) -> None:
    reasons = {
        packed({"1.dcm": BODY}, "bz2.zip", zipfile.ZIP_BZIP2): "packed in a way that is not read here",
        packed({"1.dcm": BODY}, "lzma.zip", zipfile.ZIP_LZMA): "packed in a way that is not read here",
    }
    for flag, offset, value, reason in (("encrypted", 8, 1, "encrypted"), ("deflate64", 10, 9, "packed in a way")):
        url = packed({"1.dcm": BODY}, f"{flag}.zip")
        content = bytearray((folder / f"{flag}.zip").read_bytes())
        content[content.rfind(b"PK\x01\x02") + offset] = value
        (folder / f"{flag}.zip").write_bytes(content)
        reasons[url] = reason
    for url, reason in reasons.items():
        (one,) = everything(sources, url).values()
        assert one.refused
        assert reason in one.skip_reason
        with pytest.raises(SourceNotAllowed, match=reason):
            sources.fetch(one.url)
