"""What a DICOM file says of itself: its UIDs, and whether all of it is there.

Nothing here opens a socket; pixels are never looked at. How elements follow each other is in `structure`.
"""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from pydicom import dcmread
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import keyword_for_tag
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPIPHTJ2KReferencedDeflate, MediaStorageDirectoryStorage

from courier.errors import InvalidUid, MissingUid, NotDicom
from worker.dicom.structure import MAX_VALUE_BYTES, ByteWindow, CannotTell, CutShort, Feed, Steps, Walk, read_through

_MEDIA_STORAGE_SOP_CLASS_UID, _TRANSFER_SYNTAX_UID = 0x00020002, 0x00020010
_SOP_CLASS_UID, _SOP_INSTANCE_UID = 0x00080016, 0x00080018
_STUDY_INSTANCE_UID, _SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
_DATASET_UIDS = (_STUDY_INSTANCE_UID, _SERIES_INSTANCE_UID, _SOP_INSTANCE_UID, _SOP_CLASS_UID)
_PATIENT_ID, _SPECIFIC_CHARACTER_SET = 0x00100020, 0x00080005
#: What an archive files an image by, and keeps in columns of its database.
_TEXTS = (
    0x00080050,  # AccessionNumber
    0x00080060,  # Modality
    0x00080080,  # InstitutionName
    0x00080090,  # ReferringPhysicianName
    0x00081010,  # StationName
    0x00081030,  # StudyDescription
    0x0008103E,  # SeriesDescription
    0x00081040,  # InstitutionalDepartmentName
    0x00081050,  # PerformingPhysicianName
    0x00100010,  # PatientName
    _PATIENT_ID,
    0x00100021,  # IssuerOfPatientID
    0x00100030,  # PatientBirthDate
    0x00102297,  # ResponsiblePerson
    0x00180015,  # BodyPartExamined
    0x00200010,  # StudyID
    0x00200060,  # Laterality
    0x00380010,  # AdmissionID
    0x0040A491,  # CompletionFlag
    0x0040A493,  # VerificationFlag
)
_WANTED = frozenset((*_DATASET_UIDS, *_TEXTS, _SPECIFIC_CHARACTER_SET))
#: What such a column takes.
_TEXT_LENGTH = 255
_TITLE = "ConceptNameCodeSequence"
_META_UIDS = (_MEDIA_STORAGE_SOP_CLASS_UID, _TRANSFER_SYNTAX_UID)
_NAMES = {
    _MEDIA_STORAGE_SOP_CLASS_UID: "Media Storage SOP Class UID (0002,0002)",
    _STUDY_INSTANCE_UID: "Study Instance UID (0020,000D)",
    _SERIES_INSTANCE_UID: "Series Instance UID (0020,000E)",
    _SOP_INSTANCE_UID: "SOP Instance UID (0008,0018)",
    _SOP_CLASS_UID: "SOP Class UID (0008,0016)",
    _TRANSFER_SYNTAX_UID: "Transfer Syntax UID (0002,0010)",
}
_JPIP_REFERENCED_DEFLATE = "1.2.840.10008.1.2.4.95"
_DEFLATED = frozenset((DeflatedExplicitVRLittleEndian, _JPIP_REFERENCED_DEFLATE, JPIPHTJ2KReferencedDeflate))
_IS_UID = re.compile(r"[0-9]+(\.[0-9]+)*").fullmatch
#: What pydicom's reader raises for files that it cannot read; an OSError without a number is its own.
_ERRORS_OF_PYDICOM = (
    ArithmeticError,
    AttributeError,
    BytesLengthException,
    EOFError,
    InvalidDicomError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
#: The preamble and the mark behind it, and so much of the rest as it takes to say what a file is that is not DICOM.
_HEAD_BYTES = 256
#: No meta group is longer than this, in which the transfer syntax stands.
_META_BYTES = 1_048_576
#: Each piece of a deflated dataset costs or gives this many bytes at most.
_DEFLATED_BYTES = 65_536
#: A deflated dataset is followed up to here, which takes about a second.
_MAX_INFLATED_BYTES = 1_073_741_824
#: And so many of its elements, and more for each byte that is inflated: a few of these may become millions.
_INFLATED_STEPS, _STEPS_PER_BYTE = 200_000, 4
#: The element numbers in group 0008 that a dataset begins with: group length, length to end, character set, image type.
_BEGIN_DATASET = (b"\x00\x00", b"\x01\x00", b"\x05\x00", b"\x08\x00", b"\x16\x00", b"\x18\x00")
_NOT_DICOM_BUT = (
    (b"<!doctype html", "an HTML page, perhaps a login or error page"),
    (b"<html", "an HTML page, perhaps a login or error page"),
    (b"<?xml", "an XML document, perhaps an error message"),
    (b"{", "a JSON document, perhaps an error message"),
    (b"pk\x03\x04", "a ZIP archive: upload the files in it one by one"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"%pdf", "a PDF document"),
    (b"\xff\xd8\xff", "a plain JPEG picture"),
    (b"\x89png", "a plain PNG picture"),
)


@dataclass(frozen=True)
class Instance:
    """The identity of one SOP instance. ``has_preamble`` is False for a file that starts at its meta group.

    ``odd_texts`` names those of the texts that an archive files an image by which are longer than 255 characters or
    have a NUL in them; of an image that arrives in pieces, those that came before its last UID.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    has_preamble: bool = True
    has_patient_id: bool = field(default=True, compare=False)
    odd_texts: str = field(default="", compare=False)


def identify(stream: BinaryIO) -> Instance:
    """Read the identity of the DICOM file in ``stream`` (PS3.10), which is left at byte 0.

    Raises
    ------
    NotDicom
        Not a DICOM file, or cut short.
    MissingUid
        A Study, Series or SOP Instance UID, the SOP Class UID or the Transfer Syntax UID is absent or empty.
    InvalidUid
        One of them is not digits and dots, or longer than 64 characters (PS3.5 9.1), or there are two that differ.
    """
    file = _File()
    try:
        read_through(file.walk, stream)
        if not (file.is_understood or file.has_all):
            file.take_over(_found_by_pydicom(stream))
        return file.identified()
    except CutShort as cut:
        raise _cut_short(cut) from None
    finally:
        stream.seek(0)


class Reading:
    """A DICOM file while it arrives: whose it is, as soon as that is known, and whether it is whole.

    Errors are those of `identify`.

    ``instance`` is None until all UIDs have come. What comes later may still contradict it: then `feed` or `end` raise.
    """

    def __init__(self) -> None:
        self.instance: Instance | None = None
        self._file = _File()
        self._feed = Feed(self._file.walk)

    def feed(self, chunk: bytes) -> None:
        try:
            self._feed.feed(chunk)
        except CutShort as cut:  # where the end is told before the last byte
            raise _cut_short(cut) from None
        if self.instance is None and self._file.has_all:
            self.instance = self._file.identified()

    def end(self, *, is_named: bool = True) -> bool:
        """No more comes: whether the file is proven whole; False where its structure is too odd to tell.

        Without ``is_named`` the file need not say whose it is.
        """
        try:
            self._feed.end()
        except CutShort as cut:
            raise _cut_short(cut) from None
        if is_named:
            self.instance = self._file.identified()
        return self._file.is_understood


def title_code(stream: BinaryIO) -> str:
    """The code of a document's title (Concept Name Code Sequence), as ``113037^DCM``; "" if it has none.

    Raises
    ------
    NotDicom
        It cannot be read, or is deflated: pydicom inflates all of it, of whatever size.
    """
    if _may_be_deflated(stream):
        raise NotDicom("The title of the document cannot be read, because it is deflated.")
    try:
        with warnings.catch_warnings(action="ignore"):
            dataset = dcmread(stream, stop_before_pixels=True, specific_tags=[_TITLE], force=True)
            titles = [(one.get("CodeValue"), one.get("CodingSchemeDesignator")) for one in dataset.get(_TITLE) or ()]
    except _ERRORS_OF_PYDICOM as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise NotDicom("The title of the document cannot be read.") from error
    return "^".join(str(part).strip() for part in titles[0]) if titles and all(titles[0]) else ""


def _found_by_pydicom(stream: BinaryIO) -> dict[int, list[bytes]]:
    """The UIDs that pydicom's reader finds before the pixels, none where it gives up too.

    It inflates a deflated dataset as a whole, of whatever size, so none is given to it.
    """
    if _may_be_deflated(stream):
        return {}
    try:
        with warnings.catch_warnings(action="ignore"):
            dataset = dcmread(stream, stop_before_pixels=True, specific_tags=list(_DATASET_UIDS), force=True)
            return {tag: [str(dataset[tag].value).encode()] for tag in _DATASET_UIDS if tag in dataset}
    except _ERRORS_OF_PYDICOM as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return {}


def _may_be_deflated(stream: BinaryIO) -> bool:
    """Whether a deflated transfer syntax is named where one stands; ``stream`` is left at byte 0."""
    stream.seek(0)
    head = stream.read(_META_BYTES)
    stream.seek(0)
    return any(str(uid).encode() in head for uid in _DEFLATED)


def _cut_short(cut: CutShort) -> NotDicom:
    return NotDicom(f"The file is cut short: {cut}. Fetch or export it again.")


class _File:
    """The walk over one file, and what it has found."""

    def __init__(self) -> None:
        self.is_understood = True
        self._meta: dict[int, list[bytes]] = {}
        self._dataset: dict[int, list[bytes]] = {}
        self._has_preamble = True

    def walk(self, window: ByteWindow) -> Steps[None]:
        """Raises `NotDicom`, `MissingUid` and `InvalidUid` for what the dataset cannot be read without."""
        yield from window.have(0, _HEAD_BYTES)
        start = _start_of_meta(window.read(0, _HEAD_BYTES))
        self._has_preamble = start > 0
        try:
            yield from self._walk(window, start)
        except CannotTell:
            self.is_understood = False

    def _walk(self, window: ByteWindow, start: int) -> Steps[None]:
        meta = Walk(window, frozenset(_META_UIDS))
        self._meta = meta.values
        dataset_start = yield from meta.meta(start)
        syntax = self._transfer_syntax_uid()
        if syntax in _DEFLATED:
            yield from self._inflate(window, dataset_start, syntax)
        else:
            dataset = Walk(window, _WANTED)
            self._dataset = dataset.values
            yield from dataset.dataset(dataset_start, syntax)

    def _inflate(self, window: ByteWindow, at: int, syntax: str) -> Steps[None]:
        """The same for a deflated dataset, of which no more than one piece is in memory."""
        inner = _Inflated(syntax)
        self._dataset = inner.values
        while not inner.is_whole:
            if (yield from window.have(at, 1)) < 1:
                raise CutShort("its deflated dataset has no end")
            data = window.read(at, _DEFLATED_BYTES)
            inner.feed(data)
            at += len(data)
        inner.end()
        self.is_understood = inner.is_understood

    def take_over(self, dataset: dict[int, list[bytes]]) -> None:
        """What another reader has found of what is missing."""
        self._dataset = {**dataset, **self._dataset}

    @property
    def has_all(self) -> bool:
        return all(self._dataset.get(tag) for tag in _DATASET_UIDS)

    def identified(self) -> Instance:
        """What the walk has found so far, or what is wrong with it."""
        if not (self.is_understood or self.has_all):
            missing = " and no ".join(_NAMES[tag] for tag in _DATASET_UIDS if not self._dataset.get(tag))
            raise NotDicom(
                f"The elements of the file cannot be followed to their end, and up to there stands no {missing}. "
                "Have it exported again by its system."
            )
        found = _checked(self._dataset, _DATASET_UIDS)
        return Instance(
            study_instance_uid=found[_STUDY_INSTANCE_UID],
            series_instance_uid=found[_SERIES_INSTANCE_UID],
            sop_instance_uid=found[_SOP_INSTANCE_UID],
            sop_class_uid=found[_SOP_CLASS_UID],
            transfer_syntax_uid=self._transfer_syntax_uid(),
            has_preamble=self._has_preamble,
            has_patient_id=any(value.strip(b"\0 ") for value in self._dataset.get(_PATIENT_ID, ())),
            odd_texts=", ".join(keyword_for_tag(tag) for tag in _TEXTS if self._is_odd(tag)),
        )

    def _is_odd(self, tag: int) -> bool:
        """Whether a text has a NUL before its padding, or is longer than a database's column for it.

        Of several values a database keeps the first, without the blanks around it.
        """
        texts = [value.partition(b"\\")[0].rstrip(b"\0 ").lstrip(b" ") for value in self._dataset.get(tag, ())]
        return any(b"\0" in text or (len(text) > _TEXT_LENGTH and self._length(text) > _TEXT_LENGTH) for text in texts)

    def _length(self, text: bytes) -> int:
        """In characters; in bytes where the file does not say how to read them."""
        named = self._dataset.get(_SPECIFIC_CHARACTER_SET, [b""])[0]
        try:
            encodings = convert_encodings(named.decode("latin-1").rstrip("\0 ").split("\\"))
            return len(decode_bytes(text, encodings, set()))
        except (LookupError, ValueError):
            return len(text)

    def _transfer_syntax_uid(self) -> str:
        if MediaStorageDirectoryStorage in map(_text, self._meta.get(_MEDIA_STORAGE_SOP_CLASS_UID, ())):
            raise MissingUid("This is a DICOMDIR, a list of files and no image; upload the files that it lists.")
        return _checked(self._meta, (_TRANSFER_SYNTAX_UID,))[_TRANSFER_SYNTAX_UID]


class _Inflated:
    """A deflated dataset: its bytes go in, and are walked as they are inflated."""

    def __init__(self, syntax: str) -> None:
        self.is_understood = True
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._size_bytes = 0
        self._feed = Feed(lambda window: self._dataset(window, syntax))

    def _dataset(self, window: ByteWindow, syntax: str) -> Steps[None]:
        self._walk = Walk(window, _WANTED, max_steps=_INFLATED_STEPS)
        try:
            yield from self._walk.dataset(0, syntax)
        except CannotTell:
            self.is_understood = False  # whether it comes to its end is still to be seen

    @property
    def values(self) -> dict[int, list[bytes]]:
        return self._walk.values

    @property
    def is_whole(self) -> bool:
        return self._inflater.eof

    def feed(self, data: bytes) -> None:
        self._walk.allow(_STEPS_PER_BYTE * len(data))
        while data and not self._inflater.eof:
            try:
                piece = self._inflater.decompress(data, _DEFLATED_BYTES)
            except zlib.error:
                raise NotDicom("The file says that its dataset is deflated, but it cannot be inflated.") from None
            self._size_bytes += len(piece)
            if self._size_bytes > _MAX_INFLATED_BYTES:
                raise CannotTell
            self._feed.feed(piece)
            data = self._inflater.unconsumed_tail

    def end(self) -> None:
        self._feed.end()


def _start_of_meta(head: bytes) -> int:
    """Where the file meta information starts: after the preamble, or at byte 0 without one."""
    if not head:
        raise NotDicom("The file is empty; check what the source serves.")
    if head[128:132] == b"DICM":
        return 132
    if head[:2] == b"\x02\x00" and head[4:6] in (b"UL", b"OB", b"UI"):
        return 0
    lowered = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = next((kind for magic, kind in _NOT_DICOM_BUT if lowered.startswith(magic)), None)
    if kind:
        raise NotDicom(f"The file is not DICOM; it looks like {kind}.")
    if head[:2] == b"\x08\x00" and head[2:4] in _BEGIN_DATASET:
        raise NotDicom(
            "The file is a DICOM dataset without file meta information (PS3.10, 7.1), which alone says how it is "
            "encoded. Write it as a DICOM file first, for example with dcmconv."
        )
    raise NotDicom("The file is not DICOM: it has neither the DICM mark at byte 128 nor file meta information.")


def _text(value: bytes) -> str:
    """The value of a UID without its padding."""
    return value.rstrip(b"\0 ").decode("latin-1")


def _checked(values: Mapping[int, Sequence[bytes]], tags: tuple[int, ...]) -> dict[int, str]:
    """The UIDs of ``tags``; an error that names those that are missing, or the first that is none or is two."""
    found = {tag: _text(values[tag][0]) if tag in values else "" for tag in tags}
    for tag in tags:
        if len(values.get(tag, ())) > 1:
            raise InvalidUid(
                f"The file has two {_NAMES[tag].replace('UID ', 'UIDs ')} that differ, and programs disagree on which "
                "one counts. Have it exported again by its system."
            )
    missing = " and no ".join(_NAMES[tag] for tag in tags if not found[tag])
    if missing:
        raise MissingUid(f"The file has no {missing}; a PACS cannot file it. Have it exported again by its system.")
    for tag in tags:
        if len(found[tag]) > 64 or len(values[tag][0]) > MAX_VALUE_BYTES:
            raise InvalidUid(f"The {_NAMES[tag]} of the file is longer than 64 characters.")
        if not _IS_UID(found[tag]):
            raise InvalidUid(f"The {_NAMES[tag]} of the file is not made of numbers with dots between them.")
    return found
