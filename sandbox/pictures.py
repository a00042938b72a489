"""Pictures of DICOM images for people to look at: one frame, windowed as the object itself asks for.

Pixels are decoded and windowed by pydicom; nothing here knows a PACS or HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian


class NoPicture(Exception):
    """The object has no pixels, or they cannot be decoded; the message says which, in one sentence."""


def render(path: Path, *, frame: int = 1, longest_edge: int | None = None) -> Image.Image:
    """One frame (from 1) as an 8-bit picture, grey or RGB.

    Raises `NoPicture`.
    """
    try:
        ds = dcmread(path, stop_before_pixels=True)
    except Exception as error:  # pydicom raises whatever its parsing runs into
        raise NoPicture("The file cannot be read.") from error
    if "Rows" not in ds:
        raise NoPicture("This object has no pixels.")
    syntax = ds.file_meta.TransferSyntaxUID
    try:
        source = dcmread(path) if syntax == DeflatedExplicitVRLittleEndian else path
        pixels = pixel_array(source, index=frame - 1)
        shown = _rgb(ds, pixels) if pixels.ndim == 3 else _grey(ds, pixels)
        picture = Image.fromarray(shown)
    except Exception as error:  # each decoder has exceptions of its own
        raise NoPicture(f"The pixels ({syntax.name}) cannot be decoded here.") from error
    if longest_edge is not None:
        picture.thumbnail((longest_edge, longest_edge))
    return picture


def can_decode(transfer_syntax_uid: str) -> bool:
    """Whether pydicom has a decoder for it here."""
    try:
        return bool(get_decoder(UID(transfer_syntax_uid)).is_available)
    except NotImplementedError:
        return False


def _rgb(ds: Dataset, pixels: Any) -> Any:
    """pixel_array has turned YBR into RGB; only deeper samples are left to be scaled."""
    if pixels.dtype == np.uint8:
        return pixels
    return (pixels >> max(int(ds.get("BitsStored", 8)) - 8, 0)).astype(np.uint8)


def _grey(ds: Dataset, pixels: Any) -> Any:
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        coloured = apply_color_lut(pixels, ds)
        return coloured if coloured.dtype == np.uint8 else (coloured >> 8).astype(np.uint8)
    values = apply_modality_lut(pixels, ds)
    if "WindowCenter" in ds or "VOILUTSequence" in ds:
        windowed = apply_voi_lut(values, ds)
        # A window beside all values of the image is an error of the file; a black square would help nobody.
        values = windowed if windowed.min() < windowed.max() else values
    grey = _stretched(values.astype(np.float64))
    return 255 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey


def _stretched(values: Any) -> Any:
    """Smallest to largest value over black to white; a uniform picture is mid-grey."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return np.full(values.shape, 128, dtype=np.uint8)
    return ((values - low) * (255.0 / (high - low))).astype(np.uint8)
