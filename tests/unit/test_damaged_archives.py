"""A backup whose directory is damaged is told to be damaged, at once and whatever byte of it has changed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from courier.errors import InvalidRequest, StudyConflict
from courier.settings import DownloadSettings, ServerSettings
from sandbox.synthetic import image, new_uid
from worker.batches.backups import Backup, prove
from worker.dicom.instances import identify
from worker.storage.destinations import Archive, Destinations, StudyFingerprint

STUDY = new_uid()
#: Bytes that mean another kind of packing, an encrypted or a patched entry, another version, or a place far away.
OTHER = (0x00, 0x01, 0x08, 0x0C, 0x0E, 0x20, 0x80, 0xFF)


def backup(packed_as: int) -> bytes:
    content, body = io.BytesIO(), image(STUDY)
    found = identify(io.BytesIO(body))
    entry = {"file": "1.dcm", "image_uid": found.sop_instance_uid, "series_uid": found.series_instance_uid}
    with zipfile.ZipFile(content, "w", packed_as) as archive:
        archive.writestr("1.dcm", body)
        archive.writestr("manifest.json", json.dumps({"study_uid": STUDY, "instances": [entry]}))
    return content.getvalue()


def variants(whole: bytes) -> Iterator[bytes]:
    """Every byte of the directory changed, and every place before it at which a file may end."""
    directory = whole.index(b"PK\x01\x02")
    for place in range(directory, len(whole)):
        for other in OTHER:
            yield whole[:place] + bytes([other]) + whole[place + 1 :]
    for end in range(0, len(whole), 97):
        yield whole[:end]


def seen_at(place: Archive) -> str:
    try:
        return "a download of ours" if place.read_fingerprint() else "nothing"
    except InvalidRequest as error:
        return str(error.details["reason"])


@pytest.mark.parametrize("packed_as", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_damaged_backup_is_told_to_be_damaged_and_nothing_escapes(packed_as: int, tmp_path: Path) -> None:
    destinations = Destinations(DownloadSettings(folders=[tmp_path]))
    place: Archive = destinations.archive(f"file://{tmp_path}/backup.zip")
    services = cast(Any, SimpleNamespace(destinations=destinations))
    pacs = cast(Any, SimpleNamespace(server=ServerSettings(name="a", type="dicomweb", url="http://a")))
    fingerprint = StudyFingerprint.of(
        STUDY, ["1.2.3"]
    )  # of another image: a backup that can be read after all is not what was kept
    for content in variants(backup(packed_as)):
        (tmp_path / "backup.zip").write_bytes(content)
        assert seen_at(place) in ("a download of ours", "exists")
        with pytest.raises(StudyConflict, match="is damaged"):
            prove(pacs, STUDY, Backup(place.shown, fingerprint.images, fingerprint.images_sha256), services)
