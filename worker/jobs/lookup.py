"""Is it anywhere, and what does it say of itself: `pacs.exists` and `pacs.metadata`.

Other jobs that must find an object first (to download or delete it) ask through `find_on_servers` and `settle`, so that
silence means the same everywhere: never "not there". Nothing here changes anything on a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from courier.errors import CourierError, InvalidRequest, NotFound, PacsMisanswered, PacsUnavailable
from courier.ledger.suspensions import Suspension
from courier.messages import ExistsJob, Level, LookupJob, read_job
from courier.results import Dataset, Fault, FoundEntry, FoundPayload
from courier.settings import MODES, ResultSettings
from worker.jobs.attempt import Attempt
from worker.jobs.maintenance import unanswered_error, warned
from worker.jobs.result_fields import allowed, place
from worker.jobs.services import Services
from worker.jobs.study_lists import Left, walk
from worker.pacs.finding import find_in_studies, find_in_study
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import in_maintenance, suspended_error
from worker.pacs.protocol import NEEDS_STUDY, Found, Pacs

#: So much JSON per server may the metadata in a result be.
MAX_METADATA_BYTES = 8 * 1_048_576
#: In so many studies an image is looked for, one after the other, where the server cannot be asked otherwise.
SEARCHED_STUDIES = 100


@dataclass(frozen=True)
class Description:
    """One server's metadata of what it has, as far as results may hold them."""

    datasets: list[Dataset]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Reply:
    """What one server said: what it has, [] if it said that there is nothing, or why it did not answer.

    ``not_asked``: it is in maintenance.
    """

    pacs: Pacs
    found: list[Found]
    error: CourierError | None = None
    not_asked: Suspension | None = None


def exists(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Who has it, by its UID alone (design contract, section 5).

    Raises
    ------
    NotFound
        Every server that had to be asked answered, and none has it.
    CourierError
        The error of the first server whose silence leaves the question open; `PacsUnavailable` at once, if no server
        that was asked has it and one is in maintenance.
    """
    job = read_job(ExistsJob, message)
    return _answer("exists", job, attempt, services, described=job.metadata)


def metadata(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """As `exists`, with the metadata of every image of the object."""
    return _answer("metadata", read_job(LookupJob, message), attempt, services, described=True)


def servers_of_mode(mode: str, fleet: Fleet) -> list[Pacs]:
    """The servers that ``mode`` stands for, in order of preference."""
    if mode in MODES:
        return list(fleet)
    if mode not in fleet.names:
        known = ", ".join((*MODES, *fleet.names))
        raise InvalidRequest(f"No mode or server is called {mode!r}; there are: {known}.", details={"field": "mode"})
    return [fleet[mode]]


def find_on_servers(level: Level, uid: str, *, mode: str, fleet: Fleet, study_uid: str | None = None) -> list[Reply]:
    """Ask for an object, all servers at the same time; in mode `either` up to the first, in order, that has it."""
    servers, left = servers_of_mode(mode, fleet), in_maintenance()
    asked = [pacs for pacs in servers if pacs.server.name not in left]
    answers = fleet.in_order([partial(find, pacs, level, uid, study_uid=study_uid) for pacs in asked])
    replies = []
    for pacs in servers:
        suspension = left.get(pacs.server.name)
        reply = _reply(pacs, next(answers)) if suspension is None else Reply(pacs, [], not_asked=suspension)
        replies.append(reply)
        if mode == "either" and reply.found:
            break
    answers.close()
    return replies


def _reply(pacs: Pacs, answer: list[Found] | CourierError) -> Reply:
    return Reply(pacs, [], answer) if isinstance(answer, CourierError) else Reply(pacs, answer)


def not_asked(replies: Iterable[Reply]) -> list[str]:
    """The servers that are in maintenance, in their order."""
    return [reply.pacs.server.name for reply in replies if reply.not_asked is not None]


def find(pacs: Pacs, level: Level, uid: str, *, study_uid: str | None = None) -> list[Found]:
    """Every object of ``level`` with ``uid``; if the study is given, in that study alone.

    A server that finds it only below its study, and has few studies, is asked below each of them.
    """
    if study_uid is not None:
        return find_in_study(pacs, level, uid, study_uid)
    try:
        return pacs.find(level, uid)
    except PacsMisanswered as error:
        if not error.details.get(NEEDS_STUDY) or (studies := _few_studies(pacs)) is None:
            raise
    return find_in_studies(pacs, level, uid, studies)


def _few_studies(pacs: Pacs) -> list[str] | None:
    """The UIDs of all studies of a server; None if there are more than `SEARCHED_STUDIES`, or may be."""
    left = Left()
    found: dict[str, None] = {}
    try:
        for page in walk(pacs, {}, left, limit=SEARCHED_STUDIES + 1):
            found |= dict.fromkeys(page)
            if len(found) > SEARCHED_STUDIES:
                return None
    except PacsMisanswered as error:
        if not error.is_lasting:
            raise
        return None
    return None if left.may_be_cut else list(found)


def settle(
    level: Level, uid: str, replies: Sequence[Reply], *, study_uid: str | None = None, waits: bool = False
) -> Reply:
    """The first reply that has the object. ``waits``: for a server in maintenance, if no other has it.

    Raises
    ------
    CourierError
        No server that was asked has it, and one did not answer: its error. Or one was not asked: `PacsUnavailable`.
    NotFound
        Nobody has it.
    """
    for reply in replies:
        if reply.found:
            return reply
    for reply in replies:
        if reply.error is not None:
            raise reply.error
    _raise_if_not_all_were_asked(level, uid, replies, waits=waits)
    names = [reply.pacs.server.name for reply in replies]
    only = replies[0].pacs.server if len(replies) == 1 else None
    raise NotFound(
        f"The {level} is not on {' or '.join(names)}{in_that_study(level, study_uid)}.",
        server_name=only.name if only else None,
        server_type=only.type if only else None,
        details={"level": level, "uid": uid, "asked": names},
    )


def _raise_if_not_all_were_asked(level: Level, uid: str, replies: Sequence[Reply], *, waits: bool) -> None:
    left = [(reply.pacs, reply.not_asked) for reply in replies if reply.not_asked is not None]
    if not left:
        return
    asked = [reply.pacs.server.name for reply in replies if reply.not_asked is None]
    nowhere = f"The {level} is not on {' or '.join(asked)}" if asked else f"No server was asked for the {level}"
    if waits:
        pacs, suspension = left[0]
        raise suspended_error(pacs.server, suspension, f", and {nowhere[0].lower()}{nowhere[1:]}")
    raise unanswered_error(f"{nowhere}.", left, level=level, uid=uid, asked=asked)


def in_that_study(level: Level, study_uid: str | None) -> str:
    """What a sentence says of where was looked."""
    return f", in the study {study_uid}" if study_uid is not None and level != "study" else ""


def _answer(
    operation: Literal["exists", "metadata"], job: LookupJob, attempt: Attempt, services: Services, *, described: bool
) -> dict[str, Any]:
    with attempt.step("check"):
        replies = find_on_servers(job.level, job.uid, mode=job.mode, fleet=services.fleet, study_uid=job.study_uid)
        first = settle(job.level, job.uid, replies, study_uid=job.study_uid)
    descriptions: dict[str, Description | CourierError] = {}
    if described:
        with attempt.step("describe"):
            descriptions = _describe([reply for reply in replies if reply.found], services)
    return FoundPayload(
        operation=operation,
        job_id=attempt.job_id,
        level=job.level,
        uid=job.uid,
        mode=job.mode,
        server_name=first.pacs.server.name,
        server_type=first.pacs.server.type,
        servers=[_entry(reply, descriptions.get(reply.pacs.server.name)) for reply in replies],
        warnings=warned(_warnings(job.level, replies, descriptions), not_asked(replies)),
        not_asked=not_asked(replies),
    ).as_json()


def _describe(having: Sequence[Reply], services: Services) -> dict[str, Description | CourierError]:
    """The metadata from each server that has the object; one server's trouble is told if another's are there."""
    results = services.settings.results
    questions = [partial(_read, reply, results) for reply in having]
    answers = services.fleet.gather(questions)
    errors = [answer for answer in answers if isinstance(answer, CourierError)]
    if len(errors) == len(answers):
        raise errors[0]
    return {reply.pacs.server.name: answer for reply, answer in zip(having, answers, strict=True)}


def _read(reply: Reply, results: ResultSettings) -> Description:
    if results.metadata == "none":
        return Description([])
    datasets = [ds for found in reply.found for ds in reply.pacs.metadata(found)]
    if not datasets:
        server = reply.pacs.server
        raise PacsMisanswered(
            f"{server.name} lists the object but shows no metadata; it is looked for again.",
            server_name=server.name,
            server_type=server.type,
        )
    return Description(*allowed(datasets, results, max_bytes=MAX_METADATA_BYTES))


def _entry(reply: Reply, description: Description | CourierError | None) -> FoundEntry:
    server = reply.pacs.server
    if reply.not_asked is not None:
        away = Fault(code=PacsUnavailable.code, message=f"{reply.not_asked}.")
        return FoundEntry(server_name=server.name, server_type=server.type, status="not_asked", error=away)
    error = description if isinstance(description, CourierError) else reply.error
    fault = Fault(code=error.payload["code"], message=error.message) if error else None
    if not reply.found:
        status: Literal["not_there", "unavailable"] = "unavailable" if reply.error else "not_there"
        return FoundEntry(server_name=server.name, server_type=server.type, status=status, error=fault)
    first, *others = [place(found, server) for found in reply.found]
    return FoundEntry(
        server_name=server.name,
        server_type=server.type,
        status="found",
        **first.model_dump(),
        also_in=others,
        metadata=description.datasets if isinstance(description, Description) else None,
        error=fault,
    )


def _warnings(
    level: Level, replies: Sequence[Reply], descriptions: Mapping[str, Description | CourierError]
) -> list[str]:
    warnings = []
    if level == "study" and sum(bool(reply.found) for reply in replies) > 1:
        warnings.append("study_split")
    if any(len(reply.found) > 1 for reply in replies):
        warnings.append("uid_not_unique")
    told = (one.warnings for one in descriptions.values() if isinstance(one, Description))
    return warnings + sorted({warning for some in told for warning in some})
