"""What a DICOM file says of itself: its UIDs, read from the header alone.

Nothing here opens a socket; pixels are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO


@dataclass(frozen=True)
class Instance:
    """The identity of one SOP instance. ``has_preamble`` is False for a file that starts at its meta information."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    has_preamble: bool = True


def identify(stream: BinaryIO) -> Instance:
    """Read the identity of the DICOM file in ``stream`` (PS3.10), which is left at byte 0.

    Raises
    ------
    NotDicom
        Not a DICOM file, or cut short.
    MissingUid
        A Study, Series or SOP Instance UID, or the SOP Class UID, is absent or empty.
    InvalidUid
        One of them is not digits and dots, or longer than 64 characters (PS3.5 9.1).
    """
    raise NotImplementedError  # the helper that owns sources writes this next
