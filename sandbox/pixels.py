"""Pixels of a stored file as DICOM: its frames, and other transfer syntaxes. All decoding is done by libraries.

Everything that decodes may take long and is meant for a thread; faults of a file or codec are raised as ValueError.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless

from sandbox.datasets import Header
from sandbox.web import file_chunks, once

EXPLICIT_LE = "1.2.840.10008.1.2.1"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
#: What MSDICOM decodes; anything else is only given as stored.
TRANSCODABLE = frozenset(
    "1.2.840.10008.1.2" + tail for tail in ("", ".1", ".2", ".4.50", ".4.57", ".4.70", ".4.90", ".4.91", ".5")
)


class NoPixels(Exception):
    """The instance has no pixel data."""


class NoSuchFrame(Exception):
    """It has fewer frames than that."""


def frame_count(header: Header) -> int:
    """NumberOfFrames, or 1. Raises `NoPixels`."""
    if header.pixels_at is None:
        raise NoPixels
    text = (header.text(0x00280008) or "").strip(" \0")
    return int(text) if text.isdigit() and int(text) > 0 else 1


def frame_chunks(path: Path, header: Header, number: int) -> AsyncIterator[bytes]:
    """The bytes of frame ``number`` (from 1) as they are stored. Raises `NoPixels` and `NoSuchFrame` at once."""
    place = _native_place(header, number)
    return file_chunks(path, *place) if place else once(_encapsulated_frame(path, header, number))


def frame_bytes(path: Path, header: Header, number: int) -> bytes:
    """The same in one piece."""
    place = _native_place(header, number)
    if place is None:
        return _encapsulated_frame(path, header, number)
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1] - place[0])


def _native_place(header: Header, number: int) -> tuple[int, int] | None:
    """Where in the file an uncompressed frame lies; None for a compressed one."""
    if number > frame_count(header):
        raise NoSuchFrame
    if UID(header.transfer_syntax_uid).is_encapsulated:
        return None
    size_bytes = _native_frame_bytes(header)
    return _values_at(header) + (number - 1) * size_bytes, _values_at(header) + number * size_bytes


def _values_at(header: Header) -> int:
    assert header.pixels_at is not None
    return header.pixels_at + (8 if header.implicit_vr else 12)


def _encapsulated_frame(path: Path, header: Header, number: int) -> bytes:
    with path.open("rb") as file:
        file.seek(_values_at(header))
        return get_frame(file, number - 1, number_of_frames=frame_count(header))


def _native_frame_bytes(header: Header) -> int:
    def number(tag: int) -> int:
        return int.from_bytes(header.value(tag), "big" if header.big_endian else "little")

    bits = number(0x00280010) * number(0x00280011) * (number(0x00280002) or 1) * number(0x00280100)
    return bits * 2 // 24 if (header.text(0x00280004) or "").strip() == "YBR_FULL_422" else (bits + 7) // 8


def transcode(path: Path, transfer_syntax_uid: str) -> bytes:
    """The file in Explicit VR Little Endian or JPEG 2000 lossless."""
    try:
        return _transcoded(path, transfer_syntax_uid)
    except Exception as error:  # codecs raise whatever they run into
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _transcoded(path: Path, transfer_syntax_uid: str) -> bytes:
    dataset = pydicom.dcmread(path)
    own = dataset.file_meta.TransferSyntaxUID
    if own.is_encapsulated and "PixelData" in dataset:
        dataset.decompress(generate_instance_uid=False)
    elif not own.is_little_endian and dataset.get("BitsAllocated") == 16 and "PixelData" in dataset:
        dataset.PixelData = np.frombuffer(dataset.PixelData, ">u2").astype("<u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if transfer_syntax_uid == JPEG_2000 and "PixelData" in dataset:
        _encode(dataset)
    return _written(dataset)


def _written(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def _encode(dataset: Dataset) -> None:
    """Replace uncompressed pixels by JPEG 2000 lossless ones, and nothing else of the dataset.

    By Pillow, whose encoder refuses what it cannot do; GDCM's has been seen to end the process instead.
    """
    count = int(dataset.get("NumberOfFrames") or 1)
    frames = [pixel_array(dataset, index=number, raw=True) for number in range(count)]
    dataset.PixelData = encapsulate([_jpeg_2000(frame) for frame in frames])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    if dataset.SamplesPerPixel > 1:
        dataset.PlanarConfiguration = 0
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless


def _jpeg_2000(frame: Any) -> bytes:
    """A codestream without the JP2 box. Signed values keep their bits; readers go by PixelRepresentation."""
    if frame.dtype.itemsize > 2:
        raise ValueError("more than 16 bits per sample")
    unsigned = frame.view(f"u{frame.dtype.itemsize}")
    levels = min(6, min(frame.shape[:2]).bit_length())  # a small picture cannot be halved six times
    file = io.BytesIO()
    Image.fromarray(unsigned).save(file, "JPEG2000", irreversible=False, no_jp2=True, mct=0, num_resolutions=levels)
    return file.getvalue()
