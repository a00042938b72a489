"""Which studies a server is asked for by filters, and which of those it sends match (PS3.4 C.2.2.2).

A server may ignore a filter, or read a value in its own way. So each row is matched again here, and each dialect says
which keys its server matches: only these narrow its list. No HTTP. What a filter may be: ``courier/filters.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal

from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_dict, tag_for_keyword

from courier.errors import InvalidRequest
from courier.filters import Filter, read, refusal, unknown
from courier.results import Dataset
from courier.settings import ServerSettings
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.protocol import StudyPage

Parameter = tuple[str, str]

#: What every DICOMweb server has to match on studies (PS3.18 10.6.1.2.3).
REQUIRED = (
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ModalitiesInStudy",
    "ReferringPhysicianName",
    "PatientName",
    "PatientID",
    "StudyInstanceUID",
    "StudyID",
)
#: What says of a study what a key of its series or images says of those.
_INSTEAD: Mapping[str, str] = {
    "Modality": "ModalitiesInStudy",
    "SOPClassUID": "SOPClassesInStudy",
    "SeriesDescription": "StudyDescription",
    "ProtocolName": "StudyDescription",
    "RequestedProcedureDescription": "StudyDescription",
    **dict.fromkeys(("SeriesInstanceUID", "SOPInstanceUID"), "StudyInstanceUID"),
    **dict.fromkeys(("SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate"), "StudyDate"),
    **dict.fromkeys(("PerformedProcedureStepStartDate", "AcquisitionDateTime"), "StudyDate"),
    **dict.fromkeys(("SeriesTime", "AcquisitionTime", "ContentTime"), "StudyTime"),
    **dict.fromkeys(("OtherPatientIDs", "OtherPatientNames"), "PatientID"),
}
#: Lists of values become a query each; more are refused.
_MAX_QUERIES = 1_000
_LATEST = "235959.999999"
#: Offsets of the queries that a list of values becomes lie so far apart.
_SPAN = 10**9
#: VRs of text that may hold any letter, and so may lose some where a server does not send Unicode.
ANY_LETTERS = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))


def widened(one: Filter, member: str) -> str | None:
    """What any server can be asked for ``member``, which may bring more than is meant; None: nothing that narrows.

    Of a name with several component groups the first, and a time that is not written to the end as a range: servers
    differ in what they make of these.
    """
    if one.vr == "TM":
        return time_range(member)
    if one.vr != "PN" or "=" not in member:
        return member
    alphabetic = member.partition("=")[0].rstrip("^")
    return f"{alphabetic}*" if alphabetic.strip("*?^ ") else None


def time_range(member: str) -> str:
    """From the first moment that is meant by a time (or the range of times) to the last."""
    first, dash, last = member.partition("-")
    last = last if dash else first
    return member if last == first and "." in first else f"{first}-{last + _LATEST[len(last) :] if last else ''}"


def never(_: str) -> bool:
    return False


@dataclass(frozen=True)
class Matching:
    """How one product matches studies.

    ``keywords`` are those that it matches. ``value`` is how it is asked for a value, or None where it would misread it.
    ``uid_lists``: how it takes several UIDs in one query; a list of anything else takes a query per value.
    ``is_unproven``: of a keyword, whether the rows do not show the attribute, or not with all its letters.
    """

    keywords: Collection[str]
    value: Callable[[Filter, str], str | None] = widened
    uid_lists: Literal["none", "commas", "repeated"] = "none"
    is_unproven: Callable[[str], bool] = never
    fields_by_tag: bool = False

    def sent(self, one: Filter) -> list[str]:
        """The values that the server is asked for; none, if the filter is matched here only."""
        if one.keyword not in self.keywords or one.is_universal:
            return []
        values = [self.value(one, member) for member in one.members]
        return [] if None in values else [value for value in dict.fromkeys(values) if value is not None]

    def narrows(self, one: Filter) -> bool:
        """Whether the server leaves out what does not match."""
        values = self.sent(one)
        return bool(values) and one.selects and all(value.strip("*?") for value in values)


@dataclass(frozen=True)
class StudyQuery:
    """Filters of studies as one server is asked for them."""

    filters: Sequence[Filter]
    matching: Matching
    server: ServerSettings

    @classmethod
    def of(cls, filters: Mapping[str, str], matching: Matching, server: ServerSettings) -> StudyQuery:
        """Raises `InvalidRequest` for a filter that is none; see `courier.filters.read`."""
        return cls([read_filter(keyword, value) for keyword, value in filters.items()], matching, server)

    def check_order(self) -> None:
        """Refuse filters by which nothing may be deleted, moved, hidden or copied.

        A key that the server does not match may be matched here, if another filter narrows its list.

        Raises
        ------
        InvalidRequest
            The server would send all its studies, or cannot show that what it sends matches; names the server, the key
            and the key to use instead.
        """
        narrows = any(map(self.matching.narrows, self.filters))
        for one in self._wanted:
            if self.matching.is_unproven(one.keyword):
                what = f"does not show {one.keyword} in its list of studies as it is stored, so no match can be checked"
                raise self._refusal(one, what)
            if not narrows and not self.matching.sent(one):
                raise self._refusal(one, f"{self._mismatch(one)}, and no other filter narrows its list")

    def check_asked(self) -> None:
        """Refuse filters of which the server matches none; of `InvalidRequest` as `check_order`."""
        if self._wanted and not any(map(self.matching.sent, self._wanted)):
            raise self._refusal(self._wanted[0], self._mismatch(self._wanted[0]))

    def parameters(self, offset: int) -> tuple[list[Parameter], int]:
        """What to ask the server for, and its own offset, at an offset of ours."""
        which, at = divmod(offset, _SPAN)
        if which >= len(self._queries):
            raise InvalidRequest("The cursor is none that a list has given.", details={"field": "cursor"})
        return [*self._queries[which], *(("includefield", field) for field in self._fields)], at

    def page(self, rows: list[Dataset], *, offset: int, limit: int, step: int, is_paged: bool = False) -> StudyPage:
        """The rows that match, and where the list goes on: ``step`` behind ``offset``, or with the next query.

        ``is_paged``: the server is known to mind ``offset``, so the same page twice is no sign of its end.
        """
        matching = [ds for ds in rows if all(self._is_match(one, ds) for one in self.filters)]
        which = offset // _SPAN
        after = (which + 1) * _SPAN if which + 1 < len(self._queries) else None
        return StudyPage(
            matching,
            next_offset=offset + step if rows else after,
            dropped=len(rows) - len(matching),
            lacking=tuple(one.keyword for one in self._wanted if self._is_lacking(one, rows)),
            is_full=len(rows) == limit,
            is_over=len(rows) > limit,
            start=which * _SPAN,
            fingerprint="" if is_paged or not rows else f"{which}:{fingerprint(rows)}",
            after=after,
        )

    @property
    def is_single(self) -> bool:
        """Whether one query has the whole list, and not one for each of several values."""
        return len(self._queries) == 1

    @property
    def _wanted(self) -> list[Filter]:
        return [one for one in self.filters if not one.is_universal]

    @property
    def _fields(self) -> list[str]:
        """The filtered attributes, as the server is asked to return them."""
        return [tag_of(one.keyword) if self.matching.fields_by_tag else one.keyword for one in self.filters]

    @cached_property
    def _queries(self) -> list[list[Parameter]]:
        """The parameters of each query: one for each value of a list, but where the server takes lists."""
        choices: list[list[list[Parameter]]] = []
        for one in self._wanted:
            if values := self.matching.sent(one):
                choices.append(self._choices(one, values))
            if prod(map(len, choices)) > _MAX_QUERIES:
                raise refusal(f"The lists of values make more than {_MAX_QUERIES} queries; ask for them in pieces.")
        return [[pair for pairs in chosen for pair in pairs] for chosen in product(*choices)]

    def _choices(self, one: Filter, values: Sequence[str]) -> list[list[Parameter]]:
        if one.vr == "UI" and self.matching.uid_lists == "commas":
            return [[(one.keyword, ",".join(values))]]
        if one.vr == "UI" and self.matching.uid_lists == "repeated":
            return [[(one.keyword, value) for value in values]]
        return [[(one.keyword, value)] for value in values]

    def _is_match(self, one: Filter, ds: Dataset) -> bool:
        """A row that lacks the attribute does not match, unless the server matches it and does not show it."""
        element = ds.get(tag_of(one.keyword))
        return one.matches(element) or (element is None and self._is_trusted(one))

    def _is_trusted(self, one: Filter) -> bool:
        return self.matching.is_unproven(one.keyword) and bool(self.matching.sent(one))

    def _is_lacking(self, one: Filter, rows: Sequence[Dataset]) -> bool:
        return bool(rows) and not self._is_trusted(one) and not any(text(ds, tag_of(one.keyword)) for ds in rows)

    def _mismatch(self, one: Filter) -> str:
        if one.keyword in self.matching.keywords:
            return f"matches {one.keyword} by whole values only"
        return f"does not match {one.keyword} on studies"

    def _refusal(self, one: Filter, what: str) -> InvalidRequest:
        usable = [keyword for keyword in self.matching.keywords if not self.matching.is_unproven(keyword)]
        instead = _INSTEAD.get(one.keyword)
        known = {"instead": instead} if instead in usable else {}
        advice = f"use {instead} instead" if known else f"it matches {', '.join(usable)}"
        return InvalidRequest(
            f"{self.server.name} {what}: {advice}.",
            server_name=self.server.name,
            server_type=self.server.type,
            details={"field": "filters", "keyword": one.keyword, **known},
        )


def read_filter(keyword: str, value: str) -> Filter:
    """The filter, checked with the DICOM dictionary (PS3.6); raises `InvalidRequest`."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise unknown(keyword, filter(None, keyword_dict))
    return replace(read(keyword, vr_of(keyword), value), is_single=dictionary_VM(tag) == "1")


def tag_of(keyword: str) -> str:
    """The tag of a DICOM keyword as DICOM JSON writes it."""
    return f"{tag_for_keyword(keyword) or 0:08X}"


def vr_of(keyword: str) -> str:
    """The VR of a DICOM keyword; of those that may have several, the first."""
    return dictionary_VR(tag_for_keyword(keyword) or 0).split()[0]


def fingerprint(rows: Sequence[Dataset]) -> str:
    """What tells the studies of one page from those of another; "" if there are none."""
    if not rows:
        return ""
    uids = sorted(text(ds, STUDY_INSTANCE_UID) for ds in rows)
    return hashlib.sha256(" ".join(uids).encode("utf-8", "replace")).hexdigest()[:16]
