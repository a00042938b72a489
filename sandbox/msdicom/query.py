"""MSDICOM's QIDO-RS: which parameters it takes, what they match, which attributes it returns.

From a query string to conditions of the store, and from the store's hits to DICOM JSON. No HTTP.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from sandbox.msdicom.rules import is_date
from sandbox.store import Condition, Level, SearchHit

STUDY_COLUMNS = {
    0x0020000D: "study_instance_uid",
    0x00100010: "patient_name",
    0x00100020: "patient_id",
    0x00100030: "patient_birth_date",
    0x00080050: "accession_number",
    0x00080090: "referring_physician_name",
    0x00080020: "study_date",
    0x00081030: "study_description",
    0x00080061: "modalities_in_study",
}
SERIES_COLUMNS = {
    0x0020000E: "series_instance_uid",
    0x00080060: "modality",
    0x00400244: "performed_procedure_step_start_date",
    0x00081090: "manufacturer_model_name",
}
INSTANCE_COLUMNS = {0x00080018: "sop_instance_uid"}

MODALITIES_IN_STUDY, STUDY_INSTANCES, SERIES_INSTANCES = 0x00080061, 0x00201208, 0x00201209
COMPUTED = frozenset((MODALITIES_IN_STUDY, STUDY_INSTANCES, SERIES_INSTANCES))


def _tags(text: str) -> tuple[int, ...]:
    return tuple(int(tag, 16) for tag in text.split())


#: What is returned without being asked for, by API version and level.
DEFAULTS: dict[int, dict[Level, tuple[int, ...]]] = {
    2: {
        "study": _tags("00080020 00080050 00080090 00081030 00100010 00100020 00100030 0020000D"),
        "series": _tags("00080060 00081090 0020000E 00400244"),
        "instance": _tags("00080018"),
    },
    1: {
        "study": _tags(
            "00080005 00080020 00080030 00080050 00080056 00080090 00080201 00100010 00100020 00100030 00100040 "
            "0020000D 00200010"
        ),
        "series": _tags("00080005 00080060 00080201 0008103E 0020000E 00400244 00400245 00400275"),
        "instance": _tags("00080005 00080016 00080018 00080056 00080201 00200013 00280008 00280010 00280011 00280100"),
    },
}
#: What ``includefield=all`` adds.
ALL: dict[Level, tuple[int, ...]] = {
    "study": _tags(
        "00080005 00080030 00080056 00080063 00080201 00081030 00081032 00081060 00081080 00081110 00100040 00101010 "
        "00101020 00101030 00102180 001021B0 00200010"
    ),
    "series": _tags("00080005 00080021 00080031 0008103E 00080201 00200011 00200060 00400245 00400275"),
    "instance": DEFAULTS[1]["instance"],
}
#: What the index keeps of each level; anything else is read from the newest file when it is asked for.
INDEXED: dict[Level, tuple[int, ...]] = {
    "study": tuple(sorted({*DEFAULTS[1]["study"], *DEFAULTS[2]["study"], *ALL["study"]})),
    "series": tuple(sorted({*DEFAULTS[1]["series"], *DEFAULTS[2]["series"], *ALL["series"]})),
    "instance": DEFAULTS[1]["instance"],
}
KEPT = frozenset(
    {tag for tags in INDEXED.values() for tag in tags} | {*STUDY_COLUMNS, *SERIES_COLUMNS, *INSTANCE_COLUMNS}
)


class BadQuery(ValueError):
    """The query string is not one MSDICOM takes; the sentence goes into its 400."""


@dataclass(frozen=True)
class Resource:
    """One of the six search resources: what it searches, what may filter it, which levels' defaults it returns."""

    level: Level
    filters: dict[int, str]
    returned: tuple[Level, ...]


RESOURCES = {
    "studies": Resource("study", STUDY_COLUMNS, ("study",)),
    "series": Resource("series", {**STUDY_COLUMNS, **SERIES_COLUMNS}, ("study", "series")),
    "instances": Resource(
        "instance", {**STUDY_COLUMNS, **SERIES_COLUMNS, **INSTANCE_COLUMNS}, ("study", "series", "instance")
    ),
    "studies/series": Resource("series", SERIES_COLUMNS, ("series",)),
    "studies/instances": Resource("instance", {**SERIES_COLUMNS, **INSTANCE_COLUMNS}, ("series", "instance")),
    "studies/series/instances": Resource("instance", INSTANCE_COLUMNS, ("instance",)),
}


@dataclass(frozen=True)
class MsDicomQuery:
    """A search that was understood. ``fuzzy`` conditions are answered by an index that lags behind."""

    level: Level
    conditions: tuple[Condition, ...]
    tags: frozenset[int]
    limit: int
    offset: int
    fuzzy: bool
    plain: bool


@dataclass
class _Draft:
    """What is gathered while the parameters are gone through."""

    limit: int = 100
    offset: int = 0
    fuzzy: bool = False
    fields: list[str] = field(default_factory=list)
    filters: dict[int, str] = field(default_factory=dict)


def parse(
    resource: Resource, version: int, parameters: Iterable[tuple[str, str]], path: dict[int, str]
) -> MsDicomQuery:
    """Understand a query string; ``path`` are the UIDs of the URL, by tag. Raises `BadQuery`."""
    draft = _Draft()
    seen: set[str] = set()
    for name, value in parameters:
        known = _READERS.get(name.lower())
        if known is None:
            _read_filter(draft, resource, name, value)
            continue
        if name.lower() in seen and name.lower() != "includefield":
            raise BadQuery(f"The parameter {name} was given more than once.")
        seen.add(name.lower())
        known(draft, value)
    extra, everything = _included(draft.fields)
    conditions = [Condition(_column(tag), "=", fold(tag, uid)) for tag, uid in path.items()]
    for tag, value in draft.filters.items():
        conditions += _conditions(tag, resource.filters[tag], value, fuzzy=draft.fuzzy)
    tags = {*path, *draft.filters, *extra}
    for level in resource.returned:
        tags |= {*DEFAULTS[version][level], *(ALL[level] if everything else ())}
    names = [tag for tag in draft.filters if dictionary_VR(tag) == "PN"]
    return MsDicomQuery(
        level=resource.level,
        conditions=tuple(conditions),
        tags=frozenset(tags),
        limit=draft.limit,
        offset=draft.offset,
        fuzzy=draft.fuzzy and bool(names),
        plain=not extra and not everything,
    )


def _read_limit(draft: _Draft, value: str) -> None:
    if not re.fullmatch(r"[+-]?\d{1,9}", value) or not 1 <= int(value) <= 200:
        raise BadQuery("The limit has to be a whole number from 1 to 200.")
    draft.limit = int(value)


def _read_offset(draft: _Draft, value: str) -> None:
    if not re.fullmatch(r"[+-]?\d{1,9}", value) or int(value) < 0:
        raise BadQuery("The offset has to be a whole number of 0 or more.")
    draft.offset = int(value)


def _read_fuzzy(draft: _Draft, value: str) -> None:
    if value.lower() not in ("true", "false"):
        raise BadQuery("fuzzymatching has to be true or false.")
    draft.fuzzy = value.lower() == "true"


def _read_fields(draft: _Draft, value: str) -> None:
    draft.fields += value.split(",")


_READERS: dict[str, Callable[[_Draft, str], None]] = {
    "limit": _read_limit,
    "offset": _read_offset,
    "fuzzymatching": _read_fuzzy,
    "includefield": _read_fields,
}


def _read_filter(draft: _Draft, resource: Resource, name: str, value: str) -> None:
    tag = _tag(name)
    if tag is None:
        raise BadQuery(f"{name} is neither a parameter nor the keyword or tag of an attribute.")
    if tag not in resource.filters:
        raise BadQuery(f"The attribute {name} is not queryable at this resource.")
    if tag in draft.filters:
        raise BadQuery(f"The attribute {name} was given more than once.")
    if not value.strip():
        raise BadQuery(f"The attribute {name} has no value.")
    draft.filters[tag] = value


def _tag(name: str) -> int | None:
    """By keyword (its case matters) or eight hexadecimal digits; no sequence paths."""
    if re.fullmatch(r"[0-9A-Fa-f]{8}", name):
        tag = int(name, 16)
        return tag if tag >> 16 & 1 or keyword_for_tag(tag) else None
    return tag_for_keyword(name)


def _included(fields: list[str]) -> tuple[list[int], bool]:
    """The tags of includefield, and whether it says ``all``, which has to stand alone."""
    if any(name.lower() == "all" for name in fields):
        if len(fields) > 1:
            raise BadQuery("includefield=all cannot be combined with other fields.")
        return [], True
    tags = [(name, _tag(name.strip())) for name in fields]
    for name, tag in tags:
        if tag is None:
            raise BadQuery(f"includefield names an unknown attribute: {name}.")
    return [tag for _, tag in tags if tag is not None], False


def _column(tag: int) -> str:
    return {**STUDY_COLUMNS, **SERIES_COLUMNS, **INSTANCE_COLUMNS}[tag]


def _conditions(tag: int, column: str, value: str, *, fuzzy: bool) -> list[Condition]:
    vr = dictionary_VR(tag)
    if vr == "DA":
        return _date_conditions(column, value)
    if vr == "PN" and fuzzy:
        if '"' in value:
            raise BadQuery("A fuzzy value cannot contain a quotation mark.")
        return [Condition(column, "WORDS", fold(tag, value))]
    return [Condition(column, "=", fold(tag, value))]


def _date_conditions(column: str, value: str) -> list[Condition]:
    value = value.strip()
    first, dash, last = value.partition("-")
    for one in (first, last):
        if one and not is_date(one):
            raise BadQuery(f"{value} is not a date: dates are written yyyyMMdd, ranges yyyyMMdd-yyyyMMdd.")
    if not dash:
        return [Condition(column, "=", first)]
    if not first and not last:
        raise BadQuery("A range needs at least one date, written yyyyMMdd.")
    if first and last and first > last:
        raise BadQuery(f"The range {value} ends before it starts (yyyyMMdd-yyyyMMdd).")
    conditions = [Condition(column, ">=", first)] if first else []
    return conditions + ([Condition(column, "<=", last)] if last else [])


def fold(tag: str | int, text: str) -> str:
    """The text that is compared: case never matters, accents only outside names; padding never does."""
    text = text.rstrip(" \0").casefold()
    number = int(tag, 16) if isinstance(tag, str) else tag
    if dictionary_VR(number) != "PN":
        return text
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def indexed(found: SearchHit) -> dict[str, object]:
    """Everything the index knows of a hit, by tag as text."""
    return {**found.study, **found.series, **found.instance}
