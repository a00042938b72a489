"""The images of `make run`: public samples that pydicom ships, and what has to become of each.

Only the list and its expectations live here; who serves, uploads or judges them lives in `sandbox.demo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydicom.data import get_testdata_file

STORED = "stored"
#: Put on DCM4CHEE before the first upload, as if its study had always been there.
ALREADY_ON_DCM4CHEE = "examples_rgb_color.dcm"

_PAGE = b"<!doctype html><title>Sign in</title><p>Your session has expired.</p>\n"


@dataclass(frozen=True)
class Sample:
    """One upload of the run.

    ``file`` is the name it is served under; ``content`` is None for a dead link. ``ending`` is ``stored`` or
    the code of the expected refusal, ``server`` who has to be named in either case (None: nobody). ``after`` is
    the file whose upload has to be over before this one starts.
    """

    file: str
    content: bytes | None
    ending: str = STORED
    server: str | None = "msdicom"
    reasons: tuple[str, ...] = ("new_study",)
    after: str | None = None


def sample_bytes(name: str) -> bytes:
    """One of the files inside pydicom's wheel; nothing is downloaded."""
    path = get_testdata_file(name, download=False)
    if path is None:
        raise FileNotFoundError(f"pydicom no longer ships {name}")
    return Path(str(path)).read_bytes()


def samples() -> list[Sample]:
    """Everything `make run` uploads, in order."""
    ct = sample_bytes("CT_small.dcm")
    racing = ("new_study", "claimed", "study_exists")  # two images of one new study, whoever comes first
    return [
        Sample("ct.dcm", ct),
        Sample("mr-run-length.dcm", sample_bytes("MR_small_RLE.dcm")),
        Sample("ct-jpeg2000.dcm", sample_bytes("693_J2KI.dcm")),
        Sample("us-30-frames.dcm", sample_bytes("examples_ybr_color.dcm")),
        Sample("photo-1-of-2.dcm", sample_bytes("SC_rgb_rle.dcm"), reasons=racing),
        Sample("photo-2-of-2.dcm", sample_bytes("SC_rgb_gdcm_KY.dcm"), reasons=racing),
        Sample("ecg.dcm", sample_bytes("waveform_ecg.dcm")),
        Sample("report.dcm", sample_bytes("test-SR.dcm")),
        Sample(
            "us-same-study.dcm",
            sample_bytes("examples_jpeg2k.dcm"),
            server="dcm4chee",
            reasons=("study_exists",),
        ),
        Sample("ct-again.dcm", ct, ending="image_already_exists", after="ct.dcm"),
        Sample(
            "us-stored.dcm",
            sample_bytes(ALREADY_ON_DCM4CHEE),
            ending="image_already_exists",
            server="dcm4chee",
        ),
        Sample("sign-in.html", _PAGE, ending="not_dicom", server=None),
        Sample("no-such-file.dcm", None, ending="source_not_found", server=None),
    ]
