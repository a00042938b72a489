"""QIDO-RS as DCM4CHEE has it (PS3.18 10.6), and its ``/count`` and ``/size``.

A search decides its status by what the database finds, and drops hidden studies and series from the list afterwards:
that is where its ``200 []`` comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from pydicom.datadict import dictionary_has_tag, dictionary_VR

from sandbox.dcm4chee.aets import NOTE, REJECTION_CODES, STORED_BY, ApplicationEntity
from sandbox.dcm4chee.archive import (
    CREATOR,
    PRIVATE,
    RESERVED,
    ArchiveState,
    Parameter,
    Refusal,
    attribute_path,
    entity,
    invalid,
    need_database,
    parameters,
    plain_json,
    services_url,
    unknown,
    warning,
)
from sandbox.dcm4chee.forms import csv_text, native_xml
from sandbox.dcm4chee.media import ANY, Media, accepted
from sandbox.store import COLUMNS, EVERYTHING, Condition, Level, SearchHit, first_value
from sandbox.web import DICOM_JSON, dicom_json, multipart, once, operation

Attributes = dict[str, Any]
MAX_RESULTS = 1000
STORAGE_ID = "fs1"
#: PatientName and ReferringPhysicianName.
NAMES = ("00100010", "00080090")

_ALWAYS = "00080005 00080054 00080056 00080201 00081190"
_STUDY = (
    "00080020 00080030 00080050 00080061 00080090 00100010 00100020 00100030 00100040 "
    "00200010 0020000D 00201206 00201208"
)
_SERIES = "00080060 0008103E 00200011 0020000E 00201209 00400244 00400245 00400275"
_INSTANCE = "00080016 00080018 00083002 00200013 00280010 00280011 00280100 00280008"
DEFAULTS: dict[Level, frozenset[str]] = {
    "study": frozenset(f"{_ALWAYS} {_STUDY}".split()),
    "series": frozenset(f"{_ALWAYS} {_SERIES}".split()),
    "instance": frozenset(f"{_ALWAYS} {_INSTANCE}".split()),
}
_UIDS: dict[Level, tuple[str, ...]] = {
    "study": ("0020000D",),
    "series": ("0020000D", "0020000E"),
    "instance": ("0020000D", "0020000E", "00080018"),
}
_LEVELS: tuple[Level, ...] = ("study", "series", "instance")

#: What was seen to be matched on studies (dcm4chee-arc-light 5.35.1); any other attribute filters nothing.
_MATCHED = (
    "0020000D 00080020 00080030 00200010 00080050 00081030 00080090 00100010 00100020 00100021 00100030 00100040 "
    "00080061 00080062 00080080 00081040 00081010 0008103E 00180015"
)
MATCHED_ON_STUDIES = frozenset(_MATCHED.split())
_DATES = re.compile(r"\d{8}(-(\d{8})?)?|-\d{8}", re.ASCII).fullmatch
_TIME = r"\d\d(\d\d(\d\d(\.\d{1,6})?)?)?"
_TIMES = re.compile(f"{_TIME}(-({_TIME})?)?|-{_TIME}", re.ASCII).fullmatch

#: Names of the archive's own that are accepted; of these only storageID filters anything here.
_OWN = (
    "onlyWithStudies incomplete retrievefailed storageVerificationFailed metadataUpdateFailed compressionfailed "
    "ExternalRetrieveAET ExternalRetrieveAET! patientVerificationStatus merged ExpirationDate ExpirationState "
    "storageID storageClustered storageExported allOfModalitiesInStudy template requested allmodified modified"
)
_OWN_NAMES = frozenset(_OWN.split())
_FORMS = {
    "limit": re.compile(r"[1-9]\d{0,4}"),
    "offset": re.compile(r"\d{1,5}"),
    "fuzzymatching": re.compile("true|false"),
    "includedefaults": re.compile("true|false"),
}


@dataclass
class QidoQuery:
    """What a query string asks for, as far as this stand-in understands it."""

    level: Level
    conditions: list[Condition] = field(default_factory=list)
    #: Filters on attributes the index has no column for.
    others: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    limit: int | None = None
    offset: int = 0
    order: list[tuple[str, bool]] = field(default_factory=list)
    fields: set[str] = field(default_factory=set)
    everything: bool = False
    storage_ids: tuple[str, ...] = ()


def _column(tag: str, level: Level) -> str | None:
    for name in _LEVELS[: _LEVELS.index(level) + 1]:
        for column, of in COLUMNS[name].items():
            if of == tag:
                return column
    return None


def read_query(archive: ArchiveState, request: web.Request, level: Level) -> QidoQuery:
    """The query string and the UIDs of the path; raises the 400 of anything unknown."""
    query = QidoQuery(level, fields=set(DEFAULTS[level]))
    asked = parameters(request)
    if any(p.name == "includedefaults" and p.value == "false" for p in asked):
        query.fields = set()
    elif "study" not in request.match_info and level != "study":
        query.fields |= DEFAULTS["study"] | DEFAULTS["series"]
    elif level == "instance" and "series" not in request.match_info:
        query.fields |= DEFAULTS["series"]
    query.fields |= set(_UIDS[level])
    for parameter in asked:
        if parameter.name in _FORMS and not _FORMS[parameter.name].fullmatch(parameter.value):
            raise invalid(request, f"Invalid {parameter.name}", parameter.value)
        if parameter.name not in RESERVED and parameter.name not in ("fuzzymatching", "includedefaults"):
            _apply(archive, request, query, parameter)
    for name, column in (("study", "study_instance_uid"), ("series", "series_instance_uid")):
        if name in request.match_info:
            query.conditions.append(Condition(column, "=", request.match_info[name]))
    return query


def _apply(archive: ArchiveState, request: web.Request, query: QidoQuery, parameter: Parameter) -> None:
    """One parameter that means something."""
    if parameter.name == "limit":
        query.limit = int(parameter.value)
    elif parameter.name == "offset":
        query.offset = int(parameter.value)
    elif parameter.name in ("includefield", "orderby"):
        # Unlike a filter's values these are split again after decoding, so %2C works here.
        for name in ",".join(parameter.values).split(","):
            _include(request, query, name) if parameter.name == "includefield" else _order(request, query, name)
    elif parameter.name == "storageID":
        query.storage_ids = parameter.values
    elif parameter.name not in _OWN_NAMES:
        path = attribute_path(parameter.name)
        if path is None:
            raise unknown(request)
        _filter(archive, query, path, parameter.values)


def _include(request: web.Request, query: QidoQuery, name: str) -> None:
    if name == "all":
        query.everything = True
        return
    path = attribute_path(name)
    if path is None:
        raise invalid(request, f"Unknown includefield: {name}", name)
    query.fields.add(path[0])


def _order(request: web.Request, query: QidoQuery, name: str) -> None:
    path = attribute_path(name.lstrip("-"))
    if path is None:
        raise invalid(request, f"Unknown orderby: {name}", name)
    query.order.append((path[0], name.startswith("-")))


def _filter(archive: ArchiveState, query: QidoQuery, path: list[str], values: tuple[str, ...]) -> None:
    """A matching key; one without a value is universal matching.

    What the archive does not match, and a value that it cannot read, is ignored without a word.
    """
    values = tuple(value for value in values if value)
    column = _column(path[0], query.level)
    if not values:
        query.fields.add(path[0])
        return
    if query.level == "study" and (path[0] not in MATCHED_ON_STUDIES or not _is_readable(path[0], values)):
        return
    if path[0] == "00100020":
        values = values[:1]  # of a list of Patient IDs only the first is matched
    if path[0] in NAMES and any(value != value.upper() for value in values):
        query.others.append((path[0], values))  # with its case, beside the comparison in capitals
    if column is None or len(path) > 1:
        query.others.append((path[0], values)) if len(path) == 1 else None
    elif len(values) > 1:
        query.conditions.append(Condition(column, "IN", tuple(archive.store.fold(path[0], v) for v in values)))
    else:
        query.conditions += _single(column, archive.store.fold(path[0], values[0]))


def _is_readable(tag: str, values: tuple[str, ...]) -> bool:
    form = {"DA": _DATES, "TM": _TIMES}.get(_vr(tag))
    return form is None or all(form(value) for value in values)


def _single(column: str, value: str) -> Iterator[Condition]:
    if column.endswith(("_date", "_time")) and "-" in value:
        first, _, last = value.partition("-")
        if first:
            yield Condition(column, ">=", first)
        if last:
            # A range ends with the last moment that begins with what was written.
            yield Condition(column, "<=", f"{last}~")
    elif "*" in value or "?" in value:
        yield Condition(column, "GLOB", value.replace("[", "[[]"))
    else:
        yield Condition(column, "=", value)


# -- results --------------------------------------------------------------------------------------------------------


def _view(query: QidoQuery, ae: ApplicationEntity) -> str:
    """Instances are filtered in SQL; studies and series only afterwards."""
    return ae.view if query.level == "instance" else EVERYTHING


def _shown(
    archive: ArchiveState, request: web.Request, query: QidoQuery, ae: ApplicationEntity, found: SearchHit
) -> Attributes | None:
    """One hit as it will be answered, or None if this AE sees nothing of it."""
    everything = {**found.study, **found.series, **found.instance}
    below = archive.store.tally(found.study_instance_uid, found.series_instance_uid, view=ae.view)
    if query.level != "instance" and below.instances == 0:
        return None
    everything |= _counted(archive, query.level, ae, found)
    everything |= {
        "00080054": {"vr": "AE", "Value": [STORED_BY]},
        "00080056": {"vr": "CS", "Value": ["ONLINE"]},
        "00081190": {"vr": "UR", "Value": [_retrieve_url(request, found)]},
    }
    if query.others and not all(_matches(everything.get(tag), values) for tag, values in query.others):
        return None
    if query.everything or query.fields & {tag for tag, _vr in PRIVATE.values()}:
        everything |= _private(archive, query.level, found)
    names = set(everything) if query.everything else query.fields
    return {
        tag: everything.get(tag) or {"vr": _vr(tag)}
        for tag in sorted(names)
        if tag in everything or _in_dictionary(tag)
    }


def _in_dictionary(tag: str) -> bool:
    """Attributes of the standard are shown empty when there is nothing to say, private ones are left out."""
    return dictionary_has_tag(int(tag, 16))


def _vr(tag: str) -> str:
    return dictionary_VR(int(tag, 16)).split(" ")[0]


def _counted(archive: ArchiveState, level: Level, ae: ApplicationEntity, found: SearchHit) -> Attributes:
    """What the archive computes: counts and modalities as this AE sees them."""
    study = archive.store.tally(found.study_instance_uid, view=ae.view)
    computed: Attributes = {
        "00080061": {"vr": "CS", "Value": list(study.modalities)} if study.modalities else {"vr": "CS"},
        "00201206": {"vr": "IS", "Value": [str(study.series)]},
        "00201208": {"vr": "IS", "Value": [str(study.instances)]},
    }
    if level != "study":
        series = archive.store.tally(found.study_instance_uid, found.series_instance_uid, view=ae.view)
        computed["00201209"] = {"vr": "IS", "Value": [str(series.instances)]}
    if level == "instance":
        row = archive.store.by_sop(found.sop_instance_uid or "")[0]
        computed["00083002"] = {"vr": "UI", "Value": [row.transfer_syntax_uid]}
    return computed


def _private(archive: ArchiveState, level: Level, found: SearchHit) -> Attributes:
    rows = archive.store.instances(
        study_instance_uid=found.study_instance_uid,
        series_instance_uid=found.series_instance_uid,
        sop_instance_uid=found.sop_instance_uid,
    )
    values: dict[str, list[Any]] = {"StorageIDsOfStudy": [STORAGE_ID]}
    times = [row.received_at_s for row in rows]
    if level == "study":
        size = sum(row.size_bytes for row in rows)
        values |= {
            "StudyReceiveDateTime": [_dt(min(times))],
            "StudyUpdateDateTime": [_dt(max(times))],
            "StudyAccessDateTime": [_dt(max(times))],
            "StudySizeInKB": [size // 1000],
            "StudySizeBytes": [size % 1000],
        }
        state = rejection_state(rows)
        if state in ("PARTIAL", "COMPLETE"):
            values["StudyRejectionState"] = [state]
    elif level == "series":
        values |= {"SeriesReceiveDateTime": [_dt(min(times))]}
    else:
        values |= {
            "InstanceReceiveDateTime": [_dt(times[0])],
            "StorageID": [STORAGE_ID],
            "StorageTransferSyntaxUID": [rows[0].transfer_syntax_uid],
            "StorageObjectSize": [rows[0].size_bytes],
        }
        if code := REJECTION_CODES.get(rows[0].rejection or ""):
            values["RejectionCodeSequence"] = [code.as_item()]
    shown: Attributes = {"77770010": {"vr": "LO", "Value": [CREATOR]}}
    return shown | {PRIVATE[name][0]: {"vr": PRIVATE[name][1], "Value": value} for name, value in values.items()}


#: Among the notes of a row: it was rejected, and the rejection stopped before it was counted.
UNCOUNTED = "uncounted"


def rejection_state(rows: list[Any]) -> str:
    """NONE, PARTIAL, COMPLETE or EMPTY: what of a study is rejected, its rejection notes aside."""
    objects = [row for row in rows if not (row.rejection or "").startswith(NOTE)]
    rejected = [row for row in objects if row.rejection and UNCOUNTED not in row.notes]
    if not objects:
        return "EMPTY"
    return "NONE" if not rejected else "COMPLETE" if len(rejected) == len(objects) else "PARTIAL"


def _dt(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y%m%d%H%M%S.%f")[:18] + "+0000"


def _retrieve_url(request: web.Request, found: SearchHit) -> str:
    url = f"{services_url(request)}/studies/{found.study_instance_uid}"
    if found.series_instance_uid:
        url += f"/series/{found.series_instance_uid}"
    return f"{url}/instances/{found.sop_instance_uid}" if found.sop_instance_uid else url


def _matches(element: Attributes | None, values: tuple[str, ...]) -> bool:
    """An attribute that the object lacks altogether is none the archive indexes: it filters nothing."""
    if element is None or element["vr"] == "SQ":
        return True
    own = [str(v.get("Alphabetic", "")) if isinstance(v, dict) else str(v) for v in element.get("Value", ())]
    patterns = [re.escape(v).replace(r"\*", ".*").replace(r"\?", ".") for v in values]
    return any(re.fullmatch(pattern, text) for pattern in patterns for text in own)


def _page(
    archive: ArchiveState, query: QidoQuery, view: str, show: Callable[[SearchHit], Attributes | None]
) -> list[Attributes]:
    """One page. With a limit, rows that turn out to be hidden are made up for by the rows behind them."""
    if query.order:
        return _ordered(archive, query, view, show)
    wanted = MAX_RESULTS if query.limit is None or query.limit > MAX_RESULTS else query.limit
    page: list[Attributes] = []
    offset = query.offset
    while len(page) < wanted:
        found = archive.store.search(query.level, query.conditions, view=view, limit=wanted, offset=offset)
        page += [attributes for attributes in map(show, found) if attributes is not None]
        offset += len(found)
        if len(found) < wanted or query.limit is None or query.limit > MAX_RESULTS:
            break
    return page[:wanted]


def _ordered(
    archive: ArchiveState, query: QidoQuery, view: str, show: Callable[[SearchHit], Attributes | None]
) -> list[Attributes]:
    found = archive.store.search(query.level, query.conditions, view=view)
    for tag, descending in reversed(query.order):
        found.sort(key=lambda one: _sort_key(one, tag), reverse=descending)
    shown = [attributes for attributes in map(show, found[query.offset :]) if attributes is not None]
    return shown[: min(query.limit or MAX_RESULTS, MAX_RESULTS)]


def _sort_key(found: SearchHit, tag: str) -> tuple[bool, int, str]:
    """Numbers by their value, everything else as text; what is missing comes last."""
    text = first_value({**found.study, **found.series, **found.instance}.get(tag))
    number = int(text) if text is not None and re.fullmatch(r"-?\d+", text) and tag in ("00200011", "00200013") else 0
    return text is None, number, text or ""


# -- handlers -------------------------------------------------------------------------------------------------------


def _level(request: web.Request) -> Level:
    last = [step for step in request.path.split("/") if step in ("studies", "series", "instances")][-1]
    return {"studies": "study", "series": "series", "instances": "instance"}[last]  # type: ignore[return-value]


@operation("query")
async def search(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    form = _form(request)
    query = read_query(archive, request, _level(request))
    ae = entity(request, "QIDO_RS")
    need_database(request)
    if query.storage_ids and STORAGE_ID not in query.storage_ids:
        return dicom_json([], headers=_PLAIN)
    view = _view(query, ae)
    remaining = archive.store.count(query.level, query.conditions, view=view) - query.offset
    if remaining <= 0:
        return web.Response(status=204)
    page = _page(archive, query, view, lambda found: _shown(archive, request, query, ae, found))
    if not page and ae.hides_not_rejected:
        return web.Response(status=204)
    headers = {"Cache-Control": "no-cache"}
    if remaining > MAX_RESULTS and (query.limit is None or query.limit > MAX_RESULTS):
        text = f"There are {remaining - MAX_RESULTS} additional results that can be requested"
        headers["Warning"] = warning(request, text)
    return await _written(page, form, headers)


_PLAIN = {"Content-Type": DICOM_JSON}


def _form(request: web.Request) -> Media:
    """The first acceptable form of a list."""
    for one in accepted(request):
        if one.name in (DICOM_JSON, "application/json", ANY, "application/*", "text/csv"):
            return one
        if one.related == "application/dicom+xml":
            return one
    raise Refusal(web.Response(status=406))


async def _written(page: list[Attributes], form: Media, headers: dict[str, str]) -> web.Response:
    if form.name == "text/csv":
        delimiter = ";" if form.parameters.get("delimiter") == "semicolon" else ","
        return web.Response(text=csv_text(page, delimiter), content_type="text/csv", headers=headers)
    if form.related:
        parts = [({"Content-Type": form.related}, once(native_xml(item))) for item in page]
        body = b"".join([chunk async for chunk in multipart(parts, "sandbox")])
        kind = f'multipart/related;type="{form.related}";boundary=sandbox'
        return web.Response(body=body, headers={**headers, "Content-Type": kind})
    return dicom_json(page, headers={**headers, **_PLAIN})


@operation("query")
async def count(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    """Pure SQL at study and series level: hidden ones are counted."""
    query = read_query(archive, request, _level(request))
    ae = entity(request, "QIDO_COUNT")
    need_database(request)
    return plain_json({"count": archive.store.count(query.level, query.conditions, view=_view(query, ae))})


@operation("query")
async def size(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    query = read_query(archive, request, "study")
    entity(request, "DCM4CHEE_ARC_AET")
    need_database(request)
    studies = archive.store.search("study", query.conditions)
    total = sum(archive.store.tally(study.study_instance_uid).size_bytes for study in studies)
    return plain_json({"size": total})
