"""DICOM objects as DCM4CHEE handles them: which attributes it indexes, and what it changes on their way out.

Files and datasets only; neither HTTP nor the store's tables.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from sandbox import datasets
from sandbox.datasets import DEFLATED, UNDEFINED, Header, JsonStyle

Attributes = dict[str, Any]

KEY_OBJECT = "1.2.840.10008.5.1.4.1.1.88.59"
#: Longer values of these VRs are bulk data in metadata.
BULK_ABOVE_BYTES = 1024
BULK_VRS = frozenset(["DS", "FD", "FL", "IS", "LT", "OB", "OD", "OF", "OL", "OW", "UC", "UN", "UR", "UT"])
#: IS, DS, SV and UV are strings, for the switch to numbers is not configured by default.
STYLE = JsonStyle(numbers=False)

_PATIENT = "00100010 00100020 00100021 00100030 00100040 00101002 00101010 00101020 00101030 00104000"
_STUDY = (
    "00080005 00080020 00080030 00080050 00080051 00080090 00081030 00081032 00081048 00081060 0020000D 00200010 "
    "00321032 00321060 00401012"
)
_SERIES = (
    "00080060 00080070 00080080 00081010 00081040 00081050 0008103E 00081070 00081090 00081111 00180015 00181030 "
    "0020000E 00200011 00200060 00400244 00400245 00400254 00400275"
)
_INSTANCE = (
    "00080005 00080008 00080016 00080018 00080022 00080023 0008002A 00080032 00080033 00200012 00200013 00204000 "
    "00280002 00280004 00280008 00280010 00280011 00280100 0040A043 0040A491 0040A493 00420010 00700080"
)


def _numbers(tags: str) -> tuple[int, ...]:
    return tuple(int(tag, 16) for tag in tags.split())


_ITEM, _SEQUENCE_DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
#: What the database keeps of an object at each level.
INDEXED = {"study": _numbers(f"{_PATIENT} {_STUDY}"), "series": _numbers(_SERIES), "instance": _numbers(_INSTANCE)}
PATIENT_TAGS = frozenset(_PATIENT.split())
_OTHER_PATIENT_IDS = "00101002"


def patient_merged(known: Attributes, new: Attributes) -> Attributes:
    """What the archive knows of a patient after another image: the first value stays, and all other IDs are kept."""
    merged = {tag: new[tag] for tag in PATIENT_TAGS & new.keys()} | {
        tag: element for tag, element in known.items() if element.get("Value") or tag not in new
    }
    ids = [one for source in (known, new) for one in source.get(_OTHER_PATIENT_IDS, {}).get("Value", ())]
    if ids:
        distinct = [one for at, one in enumerate(ids) if one not in ids[:at]]
        merged[_OTHER_PATIENT_IDS] = {"vr": "SQ", "Value": distinct}
    return merged


@dataclass(frozen=True)
class Unreadable(Exception):
    """An object the archive cannot take in. ``is_dicom``: it began as a DICOM stream (reason 0110, otherwise C499)."""

    is_dicom: bool
    why: str


def read_header(source: Path | bytes) -> Header:
    """Raises `Unreadable`."""
    try:
        return datasets.read_header(source)
    except datasets.NotDicomFile as error:
        with opened(source) as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        raise Unreadable(is_dicom, str(error)) from error


def names(source: Path | bytes) -> tuple[str, str] | None:
    """SOP class and instance of an object that may be cut behind them; None if it does not come so far."""
    with opened(source) as file:
        try:
            ds = datasets.parse(file, specific_tags=["SOPClassUID", "SOPInstanceUID"])
        except datasets.NotDicomFile:
            return None
    found = ds.get("SOPClassUID"), ds.get("SOPInstanceUID")
    return (str(found[0]), str(found[1])) if all(found) else None


def has_a_broken_end(source: Path | bytes, header: Header) -> bool:
    """Whether bytes follow the pixels that cannot be read as elements; zeros that fill eight bytes can."""
    if header.pixels_at is None:
        return False
    with opened(source) as file:
        if header.implicit_vr:
            length, at = _length(file, header, header.pixels_at + 4), header.pixels_at + 8
        else:
            length, at = _length(file, header, header.pixels_at + 8), header.pixels_at + 12
        end = _behind_fragments(file, header, at) if length == UNDEFINED else at + length
        return end is not None and not _are_elements(file, header, end)


def opened(source: Path | bytes) -> BinaryIO:
    """To be closed by the caller."""
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _length(file: BinaryIO, header: Header, at: int) -> int:
    file.seek(at)
    return int.from_bytes(file.read(4), "big" if header.big_endian else "little")


def _behind_fragments(file: BinaryIO, header: Header, at: int) -> int | None:
    """The byte after the delimiter of the fragments from ``at`` on; None if they cannot be followed."""
    while True:
        file.seek(at)
        tag = file.read(4)
        length = _length(file, header, at + 4)
        if tag == _SEQUENCE_DELIMITER:
            return at + 8
        if tag != _ITEM:
            return None
        at += 8 + length


def _are_elements(file: BinaryIO, header: Header, at: int) -> bool:
    """Whether elements of the dataset fill the file from byte ``at`` to its end."""
    size_bytes = file.seek(0, io.SEEK_END)
    while at < size_bytes:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return False
        vr = head[4:6]
        if header.implicit_vr or not (vr.isalpha() and vr.isupper()):
            length, at = _length(file, header, at + 4), at + 8
        elif vr.decode() in EXPLICIT_VR_LENGTH_32:
            length, at = _length(file, header, at + 8), at + 12
        else:
            length, at = int.from_bytes(head[6:], "big" if header.big_endian else "little"), at + 8
        if length == UNDEFINED:
            return True
        at += length
    return at == size_bytes


def java_hash(text: str) -> int:
    """``String.hashCode`` as an unsigned number."""
    number = 0
    units = text.encode("utf-16-be", "surrogatepass")
    for at in range(0, len(units), 2):
        number = (31 * number + int.from_bytes(units[at : at + 2])) & 0xFFFFFFFF
    return number


def supplemented_issuer(patient_name: str | None, birth_date: str | None) -> str:
    """IssuerOfPatientID of an object that has none: so the same PatientID with another name is another patient."""
    hashes = [f"{java_hash(text):08X}" if text else "null" for text in (patient_name, birth_date)]
    return ".".join(["DCM4CHEE", *hashes])


def has_pixels(header: Header) -> bool:
    """Whether the object is an image; behind deflate the pixels have no place in the file."""
    return header.pixels_at is not None or (header.transfer_syntax_uid == DEFLATED and "Rows" in header.dataset)


# -- on the way out -------------------------------------------------------------------------------------------------

_ENCAPSULATED_LENGTH = 0x7FE00003
#: Name, ID, issuer and birth date are the same in all objects of a study; where they are corrected, no trail is left.
_OF_THE_PATIENT = frozenset(("00100010", "00100020", "00100021", "00100030"))


@dataclass(frozen=True)
class Outgoing:
    """An object to send: ``start``, then the file's bytes from ``rest_at`` (None: nothing of the file)."""

    transfer_syntax_uid: str
    start: bytes
    rest_at: int | None


def as_stored(path: Path, over: Attributes) -> Outgoing:
    """The object with ``over`` laid over it, its pixels untouched and never in memory.

    What the database says of patient, study and series wins over what the object says. The archive writes every object
    anew: file meta information of its own, and no group lengths (pydicom leaves them out). Raises `Unreadable`.
    """
    header = read_header(path)
    changed = _changed(header, over)
    if header.transfer_syntax_uid == DEFLATED:
        ds = dcmread(path)
        _overlay(ds, changed)
        return Outgoing(DEFLATED, written(ds, DEFLATED), None)
    ds = header.dataset
    ds.pop(_ENCAPSULATED_LENGTH, None)
    _overlay(ds, changed)
    return Outgoing(header.transfer_syntax_uid, written(ds, header.transfer_syntax_uid), header.pixels_at)


def decompressed(path: Path, over: Attributes) -> Outgoing:
    """The object in Explicit VR Little Endian, in memory.

    Raises `Unreadable`, and whatever pydicom raises without a decoder or on broken pixels.
    """
    header = read_header(path)
    ds = dcmread(path)
    if ds.file_meta.TransferSyntaxUID.is_compressed and "PixelData" in ds:
        ds.decompress(generate_instance_uid=False)
    _overlay(ds, _changed(header, over))
    return Outgoing(str(ExplicitVRLittleEndian), written(ds, str(ExplicitVRLittleEndian)), None)


def _changed(header: Header, over: Attributes) -> Attributes:
    own = datasets.elements(header, [int(tag, 16) for tag in over], STYLE)
    return {tag: element for tag, element in over.items() if own.get(tag) != element}


def _overlay(ds: FileDataset, changed: Attributes) -> None:
    if any(not str(element).isascii() for element in changed.values()):
        ds.decode()
        ds.SpecificCharacterSet = "ISO_IR 192"
    before = Dataset()
    for tag in changed.keys() - _OF_THE_PATIENT:
        if (own := ds.get(Tag(tag))) is not None and not own.is_empty:
            before[tag] = own
    ds.update(Dataset.from_json(dict(changed)))
    if before:
        _note_changes(ds, before)


def _note_changes(ds: FileDataset, before: Dataset) -> None:
    """The trail of values that the object had otherwise than its study (PS3.3 C.12.1.1.9)."""
    item = Dataset()
    item.ModifiedAttributesSequence = [before]
    item.AttributeModificationDateTime = "20260101120000"
    item.ModifyingSystem, item.SourceOfPreviousValues = "dcm4chee-arc", ""
    item.ReasonForTheAttributeModification = "COERCE"
    ds.OriginalAttributesSequence = [*ds.get("OriginalAttributesSequence", ()), item]


def written(ds: Dataset, transfer_syntax_uid: str) -> bytes:
    """The dataset as a DICOM file."""
    meta = getattr(ds, "file_meta", None) or FileMetaDataset()
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    meta.ImplementationClassUID, meta.ImplementationVersionName = UID("1.2.40.0.13.1.3"), "dcm4che-5.35.1"
    ds.file_meta = meta
    buffer = io.BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def shown(header: Header, over: Mapping[str, Any], style: JsonStyle) -> Attributes:
    """The object's metadata in DICOM JSON, as it would be retrieved."""
    found = {**datasets.whole(header, style, leave_out=[(_ENCAPSULATED_LENGTH,)]), **over}
    return dict(sorted(found.items()))
