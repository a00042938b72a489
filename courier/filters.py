"""Filters of studies: what may be asked for, and whether an attribute's values match (PS3.4 C.2.2.2).

Pure functions over keywords, VRs and values. No DICOM dictionary and no server: producers check filters here too, and
`worker.pacs.matching` adds the dictionary and what each server matches.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Final

from courier.errors import InvalidRequest
from courier.redaction import printable, redact_url

#: VRs (PS3.6) of what studies are asked for most: what a producer can check without the DICOM dictionary.
VRS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("StudyDate", "PatientBirthDate", "SeriesDate", "AcquisitionDate", "ContentDate"), "DA"),
    **dict.fromkeys(("PerformedProcedureStepStartDate", "InstanceCreationDate"), "DA"),
    **dict.fromkeys(("StudyTime", "PatientBirthTime", "SeriesTime", "AcquisitionTime", "ContentTime"), "TM"),
    **dict.fromkeys(("PatientName", "ReferringPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName"), "PN"),
    **dict.fromkeys(("PerformingPhysicianName", "RequestingPhysician", "OtherPatientNames"), "PN"),
    **dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), "UI"),
    **dict.fromkeys(("SOPClassUID", "SOPClassesInStudy"), "UI"),
    **dict.fromkeys(("NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances", "SeriesNumber"), "IS"),
    **dict.fromkeys(("Modality", "ModalitiesInStudy", "PatientSex", "BodyPartExamined"), "CS"),
    **dict.fromkeys(("PatientID", "IssuerOfPatientID", "StudyDescription", "SeriesDescription"), "LO"),
    **dict.fromkeys(("InstitutionName", "InstitutionalDepartmentName", "Manufacturer", "ManufacturerModelName"), "LO"),
    **dict.fromkeys(("AccessionNumber", "StudyID", "StationName"), "SH"),
}

#: Text whose values may hold a backslash; of all others it separates values.
_ONE_VALUE = frozenset(("LT", "ST", "UT", "UR"))
_TEXT = frozenset(("AE", "AS", "CS", "LO", "SH", "UC")) | _ONE_VALUE
_NUMBERS = frozenset(("DS", "IS", "FL", "FD", "SL", "SS", "SV", "UL", "US", "UV"))
_KEYWORD = re.compile(r"[A-Z][A-Za-z0-9]*", re.ASCII).fullmatch
_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII).fullmatch
_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)", re.ASCII).fullmatch
_TIME = re.compile(r"([01]\d|2[0-3])(([0-5]\d)(([0-5]\d|60)(\.\d{1,6})?)?)?", re.ASCII).fullmatch
_MOMENT = re.compile(
    r"\d{4}((0[1-9]|1[0-2])((0[1-9]|[12]\d|3[01])(([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?)?)?)?", re.ASCII
).fullmatch
#: The latest moment, which completes what is written less exactly; a year's and a month's last day may be none.
_LATEST_TIME, _LATEST_MOMENT = "235960.999999", "00001231235960.999999"
_GROUPS, _COMPONENTS = 3, 5
#: Characters of the longest Patient ID (LO, PS3.5 6.2).
_LONGEST_ID = 64
#: A filter of nothing but these says nothing of a study.
_SAYS_NOTHING = "*?-^= "


@dataclass(frozen=True)
class Filter:
    """One filter, checked. ``members`` are its values, of which any may match.

    ``is_single``: the attribute has one value by the standard. If a study has several, each of them has to match: which
    one counts differs from toolkit to toolkit.
    """

    keyword: str
    vr: str
    members: tuple[str, ...]
    is_single: bool = False

    @property
    def is_universal(self) -> bool:
        """Whether it matches every study, also one that lacks the attribute (PS3.4 C.2.2.2.3)."""
        return any(not member.strip("*") for member in self.members)

    @property
    def selects(self) -> bool:
        """Whether it says anything of a study: not if one of its values is nothing but wildcards and separators."""
        return _select(self.members)

    def matches(self, element: object) -> bool:
        """Whether the values of ``element`` (DICOM JSON, PS3.18 F) match; an element without a value never does."""
        if self.is_universal:
            return True
        found = [self._matches_value(value) for values in _values(element) for value in self._split(values)]
        return bool(found) and (all(found) if self.is_single else any(found))

    def _split(self, values: object) -> list[Any]:
        if self.vr == "PN":
            return [name for name in _names(values) if any(name)]
        return [text for text in _texts(values, self.vr) if text]

    def _matches_value(self, value: Any) -> bool:
        match = _name_matches if self.vr == "PN" else _MATCHES.get(self.vr, _text_matches)
        return any(match(member, value) for member in self.members)


def read(keyword: str, vr: str, value: str) -> Filter:
    """The filter, checked.

    Raises
    ------
    InvalidRequest
        It cannot match anything, or is written in another way than DICOM writes it; the sentence says what to write.
    """
    if not _is_unicode(value):
        raise refusal(f"The filter {keyword} has characters that are no Unicode text; write it in UTF-8.")
    members = _members(keyword, vr, value)
    if not all(members):
        what = "an empty value in its list" if len(members) > 1 else "no value"
        raise refusal(f"The filter {keyword} has {what}; leave the filter out, or write what has to match.")
    check = _CHECKS.get(vr)
    if check is None and vr not in _TEXT:
        raise refusal(f"Studies cannot be filtered by {keyword}: an attribute of VR {vr} is not matched.")
    for member in members:
        if check is not None and member.strip("*"):
            check(keyword, member)
    return Filter(keyword, vr, members)


def check_filters(filters: Mapping[str, str]) -> Mapping[str, str]:
    """``filters`` as they are, where nothing is wrong with them that can be said without the DICOM dictionary.

    Raises
    ------
    InvalidRequest
        Of `read`, or a name that cannot be a DICOM keyword.
    """
    for keyword, value in filters.items():
        if not _KEYWORD(keyword):
            raise unknown(keyword, VRS)
        read(keyword, VRS.get(keyword, "LT"), value)
    return filters


def check_selecting(filters: Mapping[str, str]) -> None:
    """Refuse filters that would choose every study.

    Raises
    ------
    InvalidRequest
        No filter says anything of a study: each is empty, or only ``*``, ``?``, ``-`` and the like.
    """
    if not any(_says_something(keyword, value) for keyword, value in filters.items()):
        raise refusal(
            "No filter chooses any studies: one has to be more than * or -. To mean all studies, say so: "
            "--all, or everything = true, with its confirmation."
        )


def check_unambiguous(filters: Mapping[str, str]) -> None:
    """Refuse a comma in a Patient ID, by which an order could reach other patients than are meant.

    Raises
    ------
    InvalidRequest
        It says how to write several IDs, and one that has a comma.
    """
    if "," in filters.get("PatientID", ""):
        raise refusal(
            "A comma in PatientID may separate two IDs or be part of one, so nothing is ordered by it. Separate IDs by "
            "a backslash, in quotes: 'PatientID=A\\B'. For an ID that has a comma, write ? (any one character) in its "
            "place, or order the patient's studies by their UIDs."
        )


def unknown(keyword: str, keywords: Iterable[str]) -> InvalidRequest:
    """The refusal of a filter that is no DICOM keyword, with the nearest of ``keywords``."""
    by_lower = {one.lower(): one for one in keywords}
    nearest = get_close_matches(keyword.lower(), by_lower, n=1, cutoff=0.8)
    advice = f"; {by_lower[nearest[0]]} is" if nearest else ", such as StudyDate or PatientID"
    return refusal(f"{printable(redact_url(keyword), limit=64)!r} is no DICOM keyword{advice}.")


def refusal(sentence: str) -> InvalidRequest:
    return InvalidRequest(sentence, details={"field": "filters"})


def _members(keyword: str, vr: str, value: str) -> tuple[str, ...]:
    """The values of a filter, which a backslash separates, and between UIDs a comma too."""
    parts = [value] if vr in _ONE_VALUE else re.split(r"[\\,]" if vr == "UI" else r"\\", value)
    if keyword == "PatientID":
        parts = [one for part in parts for one in _readings(part)]
    return tuple(unicodedata.normalize("NFC", part.strip(" \0")) for part in parts)


def _readings(part: str) -> list[str]:
    """A Patient ID may have a comma, and many write lists of them with commas: both are looked for."""
    several = part.split(",")
    return several if len(several) == 1 or len(part) > _LONGEST_ID else [*several, part]


def _select(members: Sequence[str]) -> bool:
    return all(member.strip(_SAYS_NOTHING) for member in members)


def _says_something(keyword: str, value: str) -> bool:
    return _select(_members(keyword, VRS.get(keyword, "LO"), value))


# --- what a value may look like ---------------------------------------------------------------------------------


def _is_unicode(value: str) -> bool:
    """Whether it has no lone surrogates, which stand for bytes that were not UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _check_code(keyword: str, member: str) -> None:
    if "," in member:
        raise refusal(f"{keyword} has no comma in its values; separate several by a backslash, in quotes: 'CT\\MR'.")


def _check_uid(keyword: str, member: str) -> None:
    if len(member) > 64 or not _UID(member):
        raise refusal(f"{keyword} takes UIDs: digits and dots, at most 64 characters, no wildcards; several by commas.")


def _check_date(keyword: str, member: str) -> None:
    bounds = _bounds(keyword, member, "YYYYMMDD", _DATE, more=" A whole year is YYYY0101-YYYY1231.")
    _check_calendar(keyword, bounds)
    if all(bounds) and bounds[0] > bounds[-1]:
        raise _swapped(keyword, "YYYYMMDD")


def _check_time(keyword: str, member: str) -> None:
    bounds = _bounds(keyword, member, "HHMMSS", _TIME, more=" HH and HHMM are the whole hour and minute.")
    if all(bounds) and bounds[0] > _completed(bounds[-1], _LATEST_TIME):
        raise _swapped(keyword, "HHMMSS")


def _check_moment(keyword: str, member: str) -> None:
    more = " It has no offset from UTC."
    bounds = _bounds(keyword, member, "YYYYMMDDHHMMSS", _MOMENT, more=more)
    _check_calendar(keyword, [bound[:8] for bound in bounds if len(bound) >= 8])
    if all(bounds) and bounds[0] > _completed(bounds[-1], _LATEST_MOMENT):
        raise _swapped(keyword, "YYYYMMDDHHMMSS")


def _bounds(keyword: str, member: str, form: str, fits: Callable[[str], object], *, more: str) -> list[str]:
    """The value, or both ends of the range, of which one may be open."""
    bounds = member.split("-")
    if len(bounds) > 2 or not any(bounds) or not all(not bound or fits(bound) for bound in bounds):
        raise refusal(
            f"{keyword} is written {form}, a range {form}-{form}, {form}- or -{form}, without wildcards.{more}"
        )
    return bounds


def _swapped(keyword: str, form: str) -> InvalidRequest:
    return refusal(f"The range of {keyword} ends before it begins; write the earlier one first: {form}-{form}.")


def _check_number(keyword: str, member: str) -> None:
    if _number(member) is None:
        raise refusal(f"{keyword} takes one whole or decimal number, no range and no wildcards.")


def _check_name(keyword: str, member: str) -> None:
    groups = member.split("=")
    if len(groups) > _GROUPS or any(group.count("^") >= _COMPONENTS for group in groups):
        raise refusal(
            f"{keyword} is written Family^Given^Middle^Prefix^Suffix, at most five components, and at most three such "
            "groups separated by = (alphabetic, ideographic, phonetic)."
        )


_CHECKS: Mapping[str, Callable[[str, str], None]] = {
    "CS": _check_code,
    "UI": _check_uid,
    "DA": _check_date,
    "TM": _check_time,
    "DT": _check_moment,
    "PN": _check_name,
    **dict.fromkeys(_NUMBERS, _check_number),
}


def _check_calendar(keyword: str, days: Iterable[str]) -> None:
    if not all(_in_calendar(day) for day in days if day):
        raise refusal(f"The filter {keyword} has a date that is not in the calendar; dates are written YYYYMMDD.")


def _in_calendar(text: str) -> bool:
    try:
        date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return False
    return True


# --- matching ---------------------------------------------------------------------------------------------------


def _values(element: object) -> Sequence[Any]:
    """The values of an element; servers leave the list out, and put several into one text."""
    found = element.get("Value") if isinstance(element, Mapping) else None
    return found if isinstance(found, list) else [] if found is None else [found]


def _texts(value: object, vr: str) -> list[str]:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return []
    text = unicodedata.normalize("NFC", str(value))
    return [part.strip(" \0") for part in (text.split("\\") if vr not in _ONE_VALUE else [text])]


def _text_matches(member: str, text: str) -> bool:
    """Case counts, as in PS3.4; blanks around a value do not."""
    return _pattern(member)(text) is not None


@lru_cache(maxsize=1024)
def _pattern(member: str) -> Callable[[str], re.Match[str] | None]:
    """``*`` and ``?`` as wildcards, everything else as it is (fnmatch's brackets mean nothing in DICOM)."""
    return re.compile(fnmatch.translate(member.replace("[", "[[]"))).match


def _uid_matches(member: str, text: str) -> bool:
    return member == text


def _date_matches(member: str, text: str) -> bool:
    """A date that was stored in the form of ACR-NEMA, ``2026.01.31``, is read as well (PS3.5 6.2)."""
    text = text.replace(".", "") if re.fullmatch(r"\d{4}\.\d\d\.\d\d", text, re.ASCII) else text
    if not _DATE(text):
        return False
    first, last = _range(member)
    return first <= text and (not last or text <= last)


def _time_matches(member: str, text: str) -> bool:
    """What is written less exactly is the whole hour or minute, in the filter and in the study."""
    text = text.replace(":", "")
    return bool(_TIME(text)) and _is_within(member, text, _LATEST_TIME)


def _moment_matches(member: str, text: str) -> bool:
    """One with an offset from UTC is not compared, and so does not match."""
    return bool(_MOMENT(text)) and _is_within(member, text, _LATEST_MOMENT)


def _is_within(member: str, text: str, latest: str) -> bool:
    """Whether all that ``text`` may be is between the bounds of ``member``."""
    first, last = _range(member)
    earliest = _earliest(text, latest)
    return _earliest(first, latest) <= earliest and (not last or _completed(text, latest) <= _completed(last, latest))


def _range(member: str) -> tuple[str, str]:
    first, dash, last = member.partition("-")
    return first, last if dash else first


def _completed(text: str, latest: str) -> str:
    return text + latest[len(text) :]


def _earliest(text: str, latest: str) -> str:
    return text + "".join("." if one == "." else "0" for one in latest[len(text) :])


def _number_matches(member: str, text: str) -> bool:
    return _number(text) is not None and _number(member) == _number(text)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


_MATCHES: Mapping[str, Callable[[str, str], bool]] = {
    "UI": _uid_matches,
    "DA": _date_matches,
    "TM": _time_matches,
    "DT": _moment_matches,
    **dict.fromkeys(_NUMBERS, _number_matches),
}


def _names(value: object) -> list[list[str]]:
    """The component groups of a value's person names: DICOM JSON has the groups apart, some servers as one text."""
    if isinstance(value, Mapping):
        groups = [str(value.get(name) or "") for name in ("Alphabetic", "Ideographic", "Phonetic")]
        return [[_group(group) for group in groups]] if "=" not in groups[0] else _names(groups[0])
    names = value.split("\\") if isinstance(value, str) else []
    return [[_group(group) for group in name.split("=")] for name in names]


def _folded(text: str) -> str:
    """Case does not count in names, as PS3.4 C.2.2.2.1 allows; letters and accents do."""
    return unicodedata.normalize("NFC", text).lower()


def _group(text: str) -> str:
    """A component group without padding and without the empty components at its end."""
    return "^".join(part.strip(" \0") for part in _folded(text).split("^")).rstrip("^")


def _name_matches(member: str, name: Sequence[str]) -> bool:
    """A filter of one group may be any group of the name; one of several asks for each that is not empty."""
    wanted = [_group(group) for group in member.split("=")]
    if "=" not in member:
        return any(_group_matches(wanted[0], group) for group in name)
    pairs = zip_longest(wanted, name, fillvalue="")
    return any(wanted) and all(_group_matches(one, group) for one, group in pairs if one)


def _group_matches(wanted: str, group: str) -> bool:
    """Component by component; a wildcard in the last one that was given reaches over those behind it."""
    if not group:
        return False
    *parts, last = wanted.split("^")
    found = group.split("^")
    found += [""] * (len(parts) + 1 - len(found))
    rest = "^".join(found[len(parts) :])
    return all(map(_text_matches, parts, found)) and _text_matches(last, rest)
