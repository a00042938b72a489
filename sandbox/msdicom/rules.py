"""What MSDICOM accepts and refuses, as pure functions: UIDs, attribute values, Accept and Content-Type headers.

No HTTP, no store. Which answer a refusal becomes is decided in ``msdicom.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache

from pydicom.datadict import dictionary_VR, keyword_for_tag

from sandbox.datasets import TEXT_VRS, AttributePath, Header, walk

FAILED = 43264  # A900
DUPLICATE = 45070  # B00E
PENDING = 45071  # B00F
TROUBLE = 272  # 0110
OUT_OF_RESOURCES = 42752  # A700
IMPLICIT_VR = 45063  # B007, a WarningReason
INVALID_ATTRIBUTE = 1  # a WarningReason

STUDY_UID, SERIES_UID, SOP_UID, CLASS_UID, PATIENT_ID = 0x0020000D, 0x0020000E, 0x00080018, 0x00080016, 0x00100020
TRIPLE = (STUDY_UID, SERIES_UID, SOP_UID)
REQUIRED = (STUDY_UID, SERIES_UID, SOP_UID, CLASS_UID, PATIENT_ID)
#: Searchable without extended query tags; v1 refuses a file in which one of them is invalid.
SEARCHABLE = (
    *(STUDY_UID, 0x00100010, PATIENT_ID, 0x00100030, 0x00080050, 0x00080090, 0x00080020, 0x00081030),
    *(SERIES_UID, 0x00080060, 0x00400244, 0x00081090, SOP_UID),
)

_UID = re.compile(r"[0-9.]{0,63}[0-9]")
_CONTROLS = re.compile(r"[\x00-\x1a\x1c-\x1f\x7f]")
_CONTROLS_BUT_LINES = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
_PATTERNS = {
    "AS": re.compile(r"\d{3}[DWMY]"),
    "CS": re.compile(r"[A-Z0-9_ ]*"),
    "DS": re.compile(r" *[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)? *"),
    "DT": re.compile(r"\d{4}(\d\d){0,5}(\.\d{1,6})?([+-]\d{4})? *"),
    "IS": re.compile(r" *[+-]?\d+ *"),
    "TM": re.compile(
        r"([01]\d|2[0-3])([0-5]\d([0-5]\d(\.\d{1,6})?)?)? *|([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d{1,6})?)?"
    ),
    "UI": _UID,
}
_LENGTHS = {"AE": 16, "CS": 16, "DS": 16, "IS": 12, "LO": 64, "LT": 10240, "SH": 16, "ST": 1024}
_WIDTHS = {"AT": 4, "FL": 4, "FD": 8, "SL": 4, "SS": 2, "SV": 8, "UL": 4, "US": 2, "UV": 8}
#: Longer texts are judged anew each time rather than kept.
_CACHED_CHARACTERS = 256

INVALID_CHARACTER = "the value contains an invalid character"


def is_uid(text: str) -> bool:
    """Digits and dots, the last one a digit, at most 64; leading zeros and trailing spaces are tolerated."""
    return _UID.fullmatch(text.rstrip(" ")) is not None


def bare_uid(text: str) -> str:
    """A UID as it is compared: without padding."""
    return text.rstrip(" \0")


@dataclass(frozen=True)
class FileCheck:
    """What is wrong with a file. ``errors`` keep it out; ``warnings`` do not; both map a path of tags to a sentence."""

    errors: dict[AttributePath, str] = field(default_factory=dict)
    warnings: dict[AttributePath, str] = field(default_factory=dict)


def comments(complaints: dict[AttributePath, str]) -> list[str]:
    """The texts of FailedAttributesSequence, one per attribute."""
    return [f"DICOM100: ({path[-1] >> 16:04x},{path[-1] & 0xFFFF:04x}) - {text}" for path, text in complaints.items()]


def check_file(header: Header, version: int, study_instance_uid: str | None) -> FileCheck:
    """Judge a file by the rules of API version 1 or 2; ``study_instance_uid`` is the one in the request's path."""
    errors: dict[AttributePath, str] = {}
    warnings: dict[AttributePath, str] = {}
    for tag in REQUIRED:
        complaint = _required(header, tag, version)
        if complaint:
            errors[(tag,)] = complaint
    if version == 1:
        for tag in SEARCHABLE:
            complaint = _first_value_invalid(header, tag)
            if complaint and (tag,) not in errors:
                errors[(tag,)] = complaint
    elif not errors:
        warnings = dict(_every_invalid(header))
    if not errors and study_instance_uid is not None:
        own = bare_uid(header.text(STUDY_UID) or "")
        if own.lower() != bare_uid(study_instance_uid).lower():
            errors[(STUDY_UID,)] = "The StudyInstanceUID of the file is not the one of the request."
    return FileCheck(errors, warnings)


def _sentence(tag: int, vr: str, fault: str) -> str:
    return f"The attribute {keyword_for_tag(tag) or f'{tag:08X}'} is not valid for VR {vr}: {fault}."


def _required(header: Header, tag: int, version: int) -> str | None:
    vr = dictionary_VR(tag)
    if header.vr(tag) is None:
        return f"The attribute {keyword_for_tag(tag)} is required and missing."
    if header.vr(tag) != vr:
        return f"The attribute {keyword_for_tag(tag)} has to have VR {vr}."
    text = header.text(tag) or ""
    text = text.removesuffix("\0") if vr == "UI" else text
    if version == 2:
        text = text.rstrip("\0")
    if not text.strip(" "):
        if tag == PATIENT_ID and version == 2:
            return None
        return f"The attribute {keyword_for_tag(tag)} is required and empty."
    if "\\" in text:
        return f"The attribute {keyword_for_tag(tag)} has to have one value."
    fault = _fault(vr, text.rstrip(" "))
    return _sentence(tag, vr, fault) if fault else None


def _first_value_invalid(header: Header, tag: int) -> str | None:
    """v1's check of an indexed attribute; an empty value always passes."""
    vr = header.vr(tag)
    if vr is None:
        return None
    text = (header.text(tag) or "").split("\\")[0]
    text = (text.removesuffix("\0") if vr == "UI" else text).rstrip(" ")
    if not text:
        return None
    fault = _too_long(vr, text) if vr == "CS" else _fault(vr, text)
    return _sentence(tag, vr, fault) if fault else None


def _every_invalid(header: Header) -> Iterator[tuple[AttributePath, str]]:
    """v2's check of every element; what it finds is only worth a warning."""
    if not (header.text(PATIENT_ID) or "").strip(" \0"):
        yield (PATIENT_ID,), _sentence(PATIENT_ID, "LO", "the value is empty")
    for path, vr, value, text in walk(header):
        if vr in _WIDTHS:
            fault = _binary_fault(vr, value)
        elif vr in TEXT_VRS:
            fault = _text_fault(vr, text) if len(text) <= _CACHED_CHARACTERS else _text_fault.__wrapped__(vr, text)
        else:
            continue
        if fault:
            yield path, _sentence(path[-1], vr, fault)


def _binary_fault(vr: str, value: bytes) -> str | None:
    return f"the length is not a multiple of {_WIDTHS[vr]}" if len(value) % _WIDTHS[vr] else None


@lru_cache(maxsize=4096)  # most values of a scanner's header are the same in its next image
def _text_fault(vr: str, text: str) -> str | None:
    text = text.rstrip("\0")
    if vr in ("LT", "ST", "UT", "UR"):
        return _fault(vr, text.rstrip(" "))
    for value in text.split("\\"):
        fault = _fault(vr, value.strip(" ") if vr not in ("DS", "IS") else value.rstrip(" "))
        if fault and value.strip(" "):
            return fault
    return None


def _fault(vr: str, text: str) -> str | None:
    """What is wrong with one value, or None."""
    if vr == "PN":
        return _name_fault(text)
    if vr == "DA":
        return None if is_date(text) else "the value is not a date as yyyyMMdd"
    too_long = _too_long(vr, text)
    if too_long:
        return too_long
    if vr in ("LT", "ST", "UT"):
        return INVALID_CHARACTER if _CONTROLS_BUT_LINES.search(text) else None
    pattern = _PATTERNS.get(vr)
    if pattern is not None:
        return None if pattern.fullmatch(text) else INVALID_CHARACTER
    return INVALID_CHARACTER if _CONTROLS.search(text) else None


def _too_long(vr: str, text: str) -> str | None:
    limit = _LENGTHS.get(vr)
    return f"the value is longer than {limit} characters" if limit is not None and len(text) > limit else None


def _name_fault(text: str) -> str | None:
    groups = text.split("=")
    if len(groups) > 3:
        return "the name has more than 3 groups"
    for group in groups:
        if len(group) > 64:
            return "a group of the name is longer than 64 characters"
        if group.count("^") > 4:
            return "the name has more than 5 components"
    return INVALID_CHARACTER if _CONTROLS.search(text) else None


def is_date(text: str) -> bool:
    """Exactly ``yyyyMMdd`` and in the calendar."""
    if len(text) != 8 or not text.isascii() or not text.isdigit():
        return False
    try:
        date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return False
    return True


# -- headers --------------------------------------------------------------------------------------------------------

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_MEDIA = re.compile(rf"\s*({_TOKEN}/{_TOKEN})\s*")
_PARAMETER = re.compile(rf';\s*({_TOKEN})\s*=\s*({_TOKEN}|"(?:[^"\\]|\\.)*")\s*')


@dataclass(frozen=True)
class MediaType:
    """One media range or type, lower case, with its parameters (names lower case, values unquoted)."""

    name: str
    parameters: dict[str, str]

    @property
    def quality(self) -> float:
        try:
            return float(self.parameters.get("q", "1"))
        except ValueError:
            return 0.0


def strict_media_type(text: str) -> MediaType | None:
    """RFC 9110 8.3.1 to the letter: None for anything malformed, such as an unquoted ``type=a/b``."""
    head = _MEDIA.match(text)
    if head is None:
        return None
    parameters: dict[str, str] = {}
    position = head.end()
    while position < len(text):
        found = _PARAMETER.match(text, position)
        if found is None:
            return None
        parameters[found[1].lower()] = _unquoted(found[2])
        position = found.end()
    return MediaType(head[1].lower(), parameters)


def accepts_dicom_json(headers: Sequence[str]) -> bool:
    """The strict filter of STOW, QIDO and metadata: one malformed element voids the whole list."""
    ranges = [strict_media_type(element) for header in headers for element in _split(header, ",")]
    if not ranges or None in ranges:
        return False
    wanted = ("*/*", "application/*", "application/json", "application/dicom+json")
    return any(one is not None and one.name in wanted for one in ranges)


def lenient_media_types(headers: Sequence[str]) -> list[MediaType]:
    """The Accept list of a retrieve: parameters may be unquoted; ordered by quality, ``transfer-syntax=*`` first."""
    ranges = []
    for element in (element for header in headers for element in _split(header, ",")):
        name, *rest = _split(element, ";")
        pairs = (parameter.partition("=") for parameter in rest)
        parameters = {key.strip().lower(): _unquoted(value.strip()) for key, _, value in pairs}
        ranges.append(MediaType(name.strip().lower(), parameters))
    return sorted(ranges, key=lambda one: (-one.quality, one.parameters.get("transfer-syntax") != "*"))


def _split(text: str, separator: str) -> list[str]:
    """At separators outside quotes; empty pieces are dropped."""
    pieces = re.findall(rf'(?:"(?:[^"\\]|\\.)*"|[^{separator}"]|")+', text)
    return [piece for piece in pieces if piece.strip()]


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if len(text) > 1 and text[0] == '"' == text[-1] else text
