"""Whose a file is, as this project reads it, beside what Orthanc makes of the same bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import urllib3
from pydicom.data import get_testdata_file

from courier.errors import CourierError
from worker.dicom.instances import identify

FOLDER = Path(str(get_testdata_file("CT_small.dcm"))).parent
MAX_BYTES = 2_000_000
#: Orthanc 1.10 never answers to these, and keeps a thread at work on them.
NEVER_ANSWERED = {"SC_rgb_jpeg.dcm"}
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@pytest.fixture
def rest(orthanc: str) -> str:
    return orthanc.removesuffix("/dicom-web")


def as_orthanc_reads(rest: str, content: bytes) -> list[str] | None:
    """The UIDs under which Orthanc has stored ``content``, which is removed again; None if it takes it for no DICOM."""
    answer = urllib3.request("POST", f"{rest}/instances", body=content, retries=False)
    if answer.status != 200:
        return None
    path = f"{rest}/instances/{json.loads(answer.data)['ID']}"
    tags = urllib3.request("GET", f"{path}/simplified-tags", retries=False).json()
    urllib3.request("DELETE", path, retries=False)
    return [tags.get(keyword, "") for keyword in UIDS]


def test_files_of_pydicom_s_wheel_have_the_uids_under_which_orthanc_stores_them(rest: str) -> None:
    compared = 0
    for path in sorted(FOLDER.glob("*.dcm")):
        content = path.read_bytes()
        if len(content) > MAX_BYTES or path.name in NEVER_ANSWERED:
            continue
        try:
            ours = identify(io.BytesIO(content))
        except CourierError:
            continue
        theirs = as_orthanc_reads(rest, content)
        if theirs is not None:
            compared += 1
            assert theirs == [
                ours.study_instance_uid,
                ours.series_instance_uid,
                ours.sop_instance_uid,
                ours.sop_class_uid,
            ], path.name
    assert compared >= 40
