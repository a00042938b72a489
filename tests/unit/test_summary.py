"""What `make run` calls a surprise, and that its samples are all there."""

from __future__ import annotations

import io

import pytest
from pydicom import dcmread
from rich.console import Console

from courier.errors import ImageAlreadyExists, NotDicom
from sandbox.samples import ALREADY_ON_DCM4CHEE, STORED, Sample, sample_bytes, samples
from sandbox.summary import Upload, as_table, viewer_links

STORED_ON_MSDICOM = {
    "status": "stored",
    "server_name": "msdicom",
    "route": {"reason": "new_study"},
    "study_uid": "1.2.840.113619.2.1",
    "viewer_url": "http://localhost/viewer?StudyInstanceUIDs=1.2.840.113619.2.1",
    "timings_ms": {"fetch": 3.2, "push": 9.0},
    "warnings": [],
}


def uploaded(sample: Sample, **changes: object) -> Upload:
    upload = Upload(sample, job_id="1")
    upload.stored({**STORED_ON_MSDICOM, **changes})
    return upload


CT = Sample("ct.dcm", b"")


@pytest.mark.parametrize(
    ("upload", "surprise"),
    [
        (uploaded(CT), ""),
        (uploaded(CT, server_name="dcm4chee"), "expected server msdicom"),
        (uploaded(CT, route={"reason": "requested"}), "expected new_study"),
        (uploaded(CT, viewer_url=""), "expected a viewer link"),
        (uploaded(Sample("a.html", b"", ending="not_dicom", server=None)), "expected not_dicom"),
        (Upload(CT, job_id="1"), "expected stored"),
    ],
)
def test_a_surprise_says_what_was_expected(upload: Upload, surprise: str) -> None:
    assert upload.surprise == surprise


def test_an_expected_refusal_that_names_the_right_server_is_no_surprise() -> None:
    upload = Upload(Sample("again.dcm", b"", ending="image_already_exists"))
    upload.refused(ImageAlreadyExists("It is there.", server_name="msdicom"))
    assert upload.surprise == ""
    upload.refused(ImageAlreadyExists("It is there.", server_name="dcm4chee"))
    assert upload.surprise == "expected server msdicom"


def test_the_table_fits_into_a_hundred_columns_and_shows_why_a_sample_failed() -> None:
    uploads = [uploaded(sample, study_uid="1.2.3." + "4" * 50) for sample in samples()]
    uploads[0].payload = None
    uploads[0].refused(NotDicom("It begins with <html>."))
    shown = io.StringIO()
    Console(file=shown, width=100).print(as_table(uploads))
    assert max(len(line) for line in shown.getvalue().splitlines()) <= 100
    assert "…" not in shown.getvalue().replace("…444", ""), "a cell was cut"
    assert "It begins with" in shown.getvalue()


def test_studies_share_their_viewer_link() -> None:
    other = uploaded(CT, viewer_url="http://localhost/viewer?StudyInstanceUIDs=1.2.3")
    assert list(viewer_links([uploaded(CT), uploaded(CT), other]).values()) == [1, 2]


def test_samples_cover_several_studies_modalities_and_transfer_syntaxes() -> None:
    files = [sample.content for sample in samples() if sample.ending == STORED and sample.content]
    datasets = [dcmread(io.BytesIO(content), stop_before_pixels=True) for content in files]
    assert len({ds.StudyInstanceUID for ds in datasets}) >= 7
    assert len({ds.Modality for ds in datasets}) >= 5
    assert len({ds.file_meta.TransferSyntaxUID for ds in datasets}) >= 4


def test_the_seeded_image_opens_the_study_of_the_sample_that_has_to_follow_it() -> None:
    seeded = dcmread(io.BytesIO(sample_bytes(ALREADY_ON_DCM4CHEE)), stop_before_pixels=True)
    (following,) = [sample for sample in samples() if sample.ending == STORED and sample.server == "dcm4chee"]
    assert following.content is not None
    second = dcmread(io.BytesIO(following.content), stop_before_pixels=True)
    assert second.StudyInstanceUID == seeded.StudyInstanceUID
    assert second.SOPInstanceUID != seeded.SOPInstanceUID
