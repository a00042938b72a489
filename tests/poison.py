"""A file that Orthanc 1.10 cannot leave out of an archive."""

from __future__ import annotations

import io
import struct

import pydicom

from sandbox.synthetic import image


def poisonous(study: str, **more: str) -> bytes:
    """An image of ``study`` whose file meta information is in implicit VR, against PS3.10 7.1."""
    with pydicom.dcmread(io.BytesIO(image(study, side=8, **more))) as ds:
        meta = {
            0x00020000: struct.pack("<L", 0),
            0x00020001: b"\0\1",
            0x00020002: _uid(ds.file_meta.MediaStorageSOPClassUID),
            0x00020003: _uid(ds.file_meta.MediaStorageSOPInstanceUID),
            0x00020010: _uid(ds.file_meta.TransferSyntaxUID),
        }
        body = io.BytesIO()
        pydicom.filewriter.write_dataset(_explicit(body), ds)
    head = b"".join(struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value for tag, value in meta.items())
    return b"\0" * 128 + b"DICM" + head + body.getvalue()


def _explicit(body: io.BytesIO) -> pydicom.filebase.DicomFileLike:
    written = pydicom.filebase.DicomFileLike(body)
    written.is_little_endian, written.is_implicit_VR = True, False
    return written


def _uid(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)
