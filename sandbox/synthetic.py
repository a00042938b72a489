"""Synthetic images with UIDs of one's own: small grey squares that every server accepts. Nobody's patient."""

from __future__ import annotations

import io
import random
import uuid

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

#: Of each image that is given no other. A server that keeps patients wants another one for each test.
PATIENT_ID = "SYNTHETIC"


def new_uid() -> str:
    """A UID made from a UUID (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid4().int}"


def image(
    study: str, *, series: str | None = None, sop: str | None = None, side: int = 64, seed: int = 0, **keywords: object
) -> bytes:
    """A Part-10 file: one CT-like frame of ``side`` × ``side`` 16-bit pixels; ``keywords`` set further attributes."""
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = sop or new_uid()
    ds.StudyInstanceUID = study
    ds.SeriesInstanceUID = series or f"{study}.1"
    ds.PatientID, ds.PatientName = PATIENT_ID, "Synthetic^Square"
    ds.PatientBirthDate, ds.PatientSex = "19700101", "O"
    ds.StudyDate, ds.StudyTime, ds.Modality = "20260101", "120000", "CT"
    ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "", ""
    ds.SeriesNumber, ds.InstanceNumber = 1, 1
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    for keyword, value in keywords.items():
        setattr(ds, keyword, value)
    pixels = np.add.outer(np.arange(side), np.arange(side)) + random.Random(seed).randrange(256)
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()
