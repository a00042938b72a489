"""Which studies there are: `pacs.list_studies`, one bounded page of all servers' lists per job.

A page asks each server for the next part of its list and merges what it got. Where the list goes on is in the
cursor, which the caller keeps: nothing is remembered here, however long the list is. A server that does not answer
stays in the cursor, so a list never ends without it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from courier.errors import CourierError, InvalidRequest, PacsUnavailable, Refused
from courier.ledger.suspensions import Suspension
from courier.messages import StudiesJob, read_job
from courier.results import Dataset, Fault, ListedServer, StudiesPayload, StudyEntry, StudyOn
from courier.settings import ResultSettings
from worker.dicom.viewer import viewer_url
from worker.jobs.attempt import Attempt
from worker.jobs.lookup import servers_of_mode
from worker.jobs.maintenance import unanswered_error
from worker.jobs.services import Services
from worker.jobs.study_lists import Left, ListWalk, Mark
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, number, text, values
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import in_maintenance
from worker.pacs.protocol import Pacs

_TEXTS = {
    "study_date": "00080020",
    "study_time": "00080030",
    "accession_number": "00080050",
    "study_description": "00081030",
    "patient_id": "00100020",
}
_PATIENT_NAME = "00100010"
_MODALITIES_IN_STUDY = "00080061"
_NUMBER_OF_INSTANCES = "00201208"
#: After so many rows of one server that do not match, a page ends with what it has.
MAX_DROPPED = 5_000
#: Servers that ignore the offset may send several pages in turn; so many are known again.
MAX_PRINTS = 20


@dataclass(frozen=True)
class ListPart:
    """The next part of one server's list, and where it goes on: None after its end.

    ``left`` is what the server sent beside it.
    """

    studies: list[Dataset]
    next: Mark | None
    left: Left = field(default_factory=Left)
    is_sorted: bool = False


def list_studies(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """One page of the merged list (design contract, section 5).

    Raises
    ------
    InvalidRequest
        The cursor is of another list, or a filter cannot be matched by a server that is asked.
    CourierError
        No server answered: the error of the first. Or all are in maintenance.
    """
    job = read_job(StudiesJob, message)
    marks = read_cursor(job, services.fleet)
    left = in_maintenance()
    missing = [name for name in services.fleet.names if name in {*_left_out(job), *(left.keys() & marks.keys())}]
    marks = {name: mark for name, mark in marks.items() if name not in left}
    if not marks:
        pairs = [(services.fleet[name], left[name]) for name in missing if name in left]
        raise unanswered_error("No studies can be listed.", pairs, mode=job.mode)
    with attempt.step("list"):
        parts = _parts(job, marks, services.fleet)
    listed = {name: part for name, part in parts.items() if isinstance(part, ListPart)}
    if not listed:
        raise next(part for part in parts.values() if isinstance(part, CourierError))
    return StudiesPayload(
        job_id=attempt.job_id,
        mode=job.mode,
        studies=merge(listed, services),
        servers=[
            *(_listed(services.fleet[name], part) for name, part in parts.items()),
            *(_not_listed(services.fleet[name], left.get(name)) for name in missing),
        ],
        cursor=_cursor(job, marks, parts, missing),
        not_asked=missing,
    ).as_json()


def _left_out(job: StudiesJob) -> list[str]:
    """The servers that an earlier page of the list has left out."""
    if job.cursor is None:
        return []
    cursor = json.loads(base64.urlsafe_b64decode(job.cursor.encode("ascii")))  # `read_cursor` has read it
    return [str(name) for name in cursor.get("not_asked", ())]


def read_cursor(job: StudiesJob, fleet: Fleet) -> dict[str, Mark]:
    """Where the list goes on, per server that is not at its end.

    Raises
    ------
    InvalidRequest
        The cursor is none of ours, or was given out for another mode, other filters or other servers.
    """
    if job.cursor is None:
        return {pacs.server.name: Mark() for pacs in servers_of_mode(job.mode, fleet)}
    try:
        cursor = json.loads(base64.urlsafe_b64decode(job.cursor.encode("ascii")))
        query, offsets = cursor["query"], {str(name): int(offset) for name, offset in cursor["offsets"].items()}
        prints = {str(name): tuple(str(one).split()) for name, one in cursor.get("prints", {}).items()}
        skips = {str(name): int(skip) for name, skip in cursor.get("skips", {}).items()}
        unpaged = {str(name) for name in cursor.get("unpaged", ())}
    except (ValueError, binascii.Error, KeyError, TypeError, AttributeError):
        raise InvalidRequest("The cursor is none that a list has given.", details={"field": "cursor"}) from None
    if query != _query(job) or not offsets or min(*offsets.values(), *skips.values(), 0) < 0:
        sentence = "The cursor belongs to a list with another mode or other filters."
        raise InvalidRequest(sentence, details={"field": "cursor"})
    return {
        fleet[name].server.name: Mark(offset, prints.get(name, ()), skips.get(name, 0), name in unpaged)
        for name, offset in offsets.items()
    }


def _cursor(
    job: StudiesJob,
    marks: Mapping[str, Mark],
    parts: Mapping[str, ListPart | CourierError],
    missing: Sequence[str],
) -> str | None:
    """What is still to be asked, or did not answer, goes on where it was; what is in maintenance is left out."""
    left: dict[str, Mark] = {}
    either = job.mode == "either"
    for name, mark in marks.items():
        part = parts.get(name)
        if not isinstance(part, ListPart):
            left |= {} if either else {name: mark}  # the first that answers is the one whose list it is
        elif part.next is not None:
            left[name] = part.next
    if not left:
        return None
    told = {
        "query": _query(job),
        "offsets": {name: mark.offset for name, mark in left.items()},
        "prints": {name: " ".join(mark.prints) for name, mark in left.items() if mark.prints},
        "skips": {name: mark.skip for name, mark in left.items() if mark.skip},
        "unpaged": [name for name, mark in left.items() if mark.unpaged],
        **({"not_asked": list(missing)} if missing else {}),
    }
    cursor = json.dumps(told, separators=(",", ":"))
    return base64.urlsafe_b64encode(cursor.encode()).decode("ascii")


def _query(job: StudiesJob) -> str:
    """What a cursor belongs to, without saying it: filters may name a patient."""
    order = json.dumps([job.mode, job.filters, *(["newest"] if job.newest_first else [])], sort_keys=True)
    return hashlib.sha256(order.encode()).hexdigest()[:16]


def _parts(job: StudiesJob, marks: Mapping[str, Mark], fleet: Fleet) -> dict[str, ListPart | CourierError]:
    """Each server's next part, or why there is none. A refusal of the question refuses the job."""
    if job.mode == "either":
        return _first_part(job, marks, fleet)
    names = list(marks)[: job.limit]
    share = job.limit // len(names)
    questions = [partial(_part, fleet[name], job, mark=marks[name], wanted=share) for name in names]
    parts = dict(zip(names, fleet.gather(questions), strict=True))
    _raise_refusals(parts.values())
    return parts


def _first_part(job: StudiesJob, marks: Mapping[str, Mark], fleet: Fleet) -> dict[str, ListPart | CourierError]:
    parts: dict[str, ListPart | CourierError] = {}
    for name, mark in marks.items():
        question = partial(_part, fleet[name], job, mark=mark, wanted=job.limit)
        parts[name] = fleet.gather([question])[0]
        _raise_refusals(parts.values())
        if isinstance(parts[name], ListPart):
            break
    return parts


def _raise_refusals(parts: Any) -> None:
    for part in parts:
        if isinstance(part, Refused):
            raise part


def _part(pacs: Pacs, job: StudiesJob, *, mark: Mark, wanted: int) -> ListPart:
    """``wanted`` studies from ``mark``, in as many requests as the server's own page size asks for.

    Fewer, if the server sends many that do not match: the list goes on with the next job.
    """
    studies: list[Dataset] = []
    way = ListWalk(pacs, job.filters, set(mark.prints), newest_first=job.newest_first)
    at: Mark | None = mark
    while at is not None and len(studies) < wanted and way.left.dropped < MAX_DROPPED:
        limit = wanted - len(studies)
        further, at = way.step(at, limit=limit, at_most=limit)
        studies += further
    if at is not None:
        at = replace(at, prints=(*mark.prints, *filter(None, (way.first,)))[-MAX_PRINTS:])
    return ListPart(studies, at, way.left, way.is_sorted)


def merge(parts: Mapping[str, ListPart], services: Services) -> list[StudyEntry]:
    """One entry per study, its servers in order; a study that stands twice on overlapping pages counts once."""
    by_uid: dict[str, dict[str, Dataset]] = {}
    for name, part in parts.items():
        for ds in part.studies:
            by_uid.setdefault(text(ds, STUDY_INSTANCE_UID), {})[name] = ds
    results = services.settings.results
    return [_entry(uid, datasets, services.fleet, results) for uid, datasets in by_uid.items()]


def _entry(uid: str, datasets: Mapping[str, Dataset], fleet: Fleet, results: ResultSettings) -> StudyEntry:
    places = [_place(fleet[name], uid, ds) for name, ds in datasets.items()]
    if results.metadata != "full":
        return StudyEntry(study_uid=uid, servers=places)
    told = list(datasets.values())
    return StudyEntry(
        study_uid=uid,
        servers=places,
        patient_name=_first([_person(ds) for ds in told]),
        modalities=sorted({str(value) for ds in told for value in values(ds, _MODALITIES_IN_STUDY)}),
        **{name: _first([text(ds, tag) for ds in told]) for name, tag in _TEXTS.items()},
    )


def _place(pacs: Pacs, uid: str, ds: Dataset) -> StudyOn:
    server = pacs.server
    link = viewer_url(server, study=uid)
    images = number(ds, _NUMBER_OF_INSTANCES)
    return StudyOn(server_name=server.name, server_type=server.type, images=images, viewer_url=link)


def _first(told: Sequence[str]) -> str | None:
    return next((one for one in told if one), None)


def _person(ds: Dataset) -> str:
    found = values(ds, _PATIENT_NAME)
    name = found[0] if found else ""
    return str(name.get("Alphabetic", "")) if isinstance(name, dict) else str(name or "")


def _not_listed(pacs: Pacs, suspension: Suspension | None) -> ListedServer:
    """``suspension`` is None where the maintenance has ended since an earlier page left the server out."""
    server = pacs.server
    why = f"{suspension}." if suspension else f"{server.name} was in maintenance when the list began; list again."
    fault = Fault(code=PacsUnavailable.code, message=why)
    return ListedServer(server_name=server.name, server_type=server.type, status="not_asked", error=fault)


def _listed(pacs: Pacs, part: ListPart | CourierError) -> ListedServer:
    server = pacs.server
    if isinstance(part, CourierError):
        fault = Fault(code=part.payload["code"], message=part.message)
        return ListedServer(server_name=server.name, server_type=server.type, status="unavailable", error=fault)
    count = len({text(ds, STUDY_INSTANCE_UID) for ds in part.studies})
    status = "complete" if part.next is None else "more"
    return ListedServer(
        server_name=server.name,
        server_type=server.type,
        status=status,
        count=count,
        dropped=part.left.dropped,
        lacking=sorted(part.left.lacking or ()),
        may_be_cut=part.left.may_be_cut,
        newest_first=part.is_sorted,
    )
