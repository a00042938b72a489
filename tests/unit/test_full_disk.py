"""A temporary folder without room: the attempt ends as `source_unreachable`, and no fault of the worker is told."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest

from courier.errors import NotDicom, SourceTooLarge, SourceUnreachable
from courier.settings import DownloadSettings, ServerSettings, SourceSettings
from sandbox.synthetic import image, new_uid
from tests.unit.test_upload import SingleUploadBench, stored
from worker.batches.backups import Backup, prove
from worker.dicom.fingerprints import _inflated
from worker.jobs.runner import Deferred
from worker.storage.destinations import Destinations, StudyFingerprint
from worker.storage.sources import Fetched, Sources
from worker.storage.spool import Limits, spool


class FullDisk(io.BytesIO):
    """A buffered file on a full disk: ``fails`` are the calls that find no room."""

    fails: tuple[str, ...] = ()

    def _perhaps(self, call: str) -> None:
        if call in self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data: Any) -> int:
        self._perhaps("write")
        return super().write(data)

    def seek(self, *where: int) -> int:
        self._perhaps("seek")
        return super().seek(*where)

    def flush(self) -> None:
        self._perhaps("flush")

    def fileno(self) -> int:
        self._perhaps("fileno")
        return super().fileno()

    def close(self) -> None:
        super().close()
        self._perhaps("close")


def full(*fails: str) -> Callable[..., FullDisk]:
    kind = type("Full", (FullDisk,), {"fails": fails})
    return lambda *_, **__: cast(FullDisk, kind())


def limits(max_bytes: int = 10**9) -> Limits:
    return Limits(max_bytes, time.monotonic() + 60, 60)


@pytest.mark.parametrize("fails", [("write",), ("write", "close"), ("seek",), ("seek", "close")])
def test_a_spool_that_finds_no_room_says_so_wherever_it_notices(
    fails: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", full(*fails))
    with pytest.raises(SourceUnreachable, match="no room"):
        spool([b"abc"], source="http://host/a.dcm", limits=limits())


def test_what_went_wrong_before_a_file_could_not_be_closed_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", full("close"))
    with pytest.raises(SourceTooLarge):
        spool([b"abcd"], source="http://host/a.dcm", limits=limits(3))
    with pytest.raises(NotDicom, match="No"), spool([b"abc"], source="http://host/a.dcm", limits=limits()):
        raise NotDicom("No.")


def test_a_spooled_file_that_cannot_be_closed_is_unreachable_and_one_that_is_given_up_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", full("close"))
    fetched = spool([b"abc"], source="http://host/a.dcm", limits=limits())
    with pytest.raises(SourceUnreachable, match="no room"):
        fetched.close()
    spool([b"abc"], source="http://host/a.dcm", limits=limits()).drop()


@pytest.mark.parametrize("fails", ["write", "flush"])
def test_a_deflated_image_that_cannot_be_inflated_for_want_of_room_is_not_called_damaged(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", full(fails, "close"))
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    with pytest.raises(SourceUnreachable, match="no room"):
        _inflated(io.BytesIO(deflater.compress(b"abc") + deflater.flush()), 0)


@pytest.fixture
def no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder in which no file can be made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "unmounted"))


def sources(folder: Path) -> Sources:
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("a.dcm", image(new_uid()))
    return Sources(SourceSettings(folders=[folder]))


@pytest.mark.usefixtures("no_folder")
def test_an_archive_of_images_that_cannot_be_laid_down_is_no_fault_of_the_worker(tmp_path: Path) -> None:
    files = sources(tmp_path)
    with pytest.raises(SourceUnreachable, match="no room"):
        files.fetch(f"zip+file://{tmp_path}/images.zip!/a.dcm")
    with pytest.raises(SourceUnreachable, match="no room"):
        list(files.pages(f"file://{tmp_path}/images.zip"))


def test_an_archive_of_images_that_finds_no_room_is_fetched_again_by_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sources(tmp_path)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(tempfile, "SpooledTemporaryFile", full("fileno"))
        with pytest.raises(SourceUnreachable, match="no room"):
            files.fetch(f"zip+file://{tmp_path}/images.zip!/a.dcm")
    with files.fetch(f"zip+file://{tmp_path}/images.zip!/a.dcm") as fetched:
        assert fetched.size_bytes
    files.close()


@pytest.mark.usefixtures("no_folder")
def test_a_backup_that_cannot_be_laid_down_is_unreachable_and_not_damaged(tmp_path: Path) -> None:
    destinations = Destinations(DownloadSettings(folders=[tmp_path]))
    place = destinations.archive(f"file://{tmp_path}/backup.zip")
    fingerprint = StudyFingerprint.of("1.2", ["1.2.3"])
    with zipfile.ZipFile(tmp_path / "backup.zip", "w") as archive:
        archive.writestr("manifest.json", json.dumps({"study_uid": "1.2", "instances": [{"image_uid": "1.2.3"}]}))
    pacs = cast(Any, SimpleNamespace(server=ServerSettings(name="a", type="dicomweb", url="http://a")))
    backup = Backup(place.shown, fingerprint.images, fingerprint.images_sha256)
    with pytest.raises(SourceUnreachable, match="no room"):
        prove(pacs, "1.2", backup, cast(Any, SimpleNamespace(destinations=destinations)))


def test_an_upload_whose_file_cannot_be_closed_is_tried_again_and_what_is_stored_is_never_said_to_have_failed() -> None:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        bench = SingleUploadBench(client, "a")
        body = image(new_uid())
        digest = hashlib.sha256(body).hexdigest()

        def fetch(url: str) -> Fetched:
            file = full("close")()
            io.BytesIO.write(file, body)
            return Fetched(file, len(body), digest, url)

        bench.services.sources.fetch = fetch  # type: ignore[method-assign]
        assert isinstance(bench.execute("j"), Deferred)
        assert bench.ledger.read_record("j")["code"] == "source_unreachable"
        assert "fault" not in bench.ledger.read_record("j")["message"]
        assert stored(bench.execute("j"))["server_name"] == "a"
        assert len(bench.servers["a"].images) == 1
