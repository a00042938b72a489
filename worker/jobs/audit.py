"""Which studies are on more than one server, and in which images their copies differ: `pacs.audit`.

UIDs alone are compared, never bytes. Nothing is changed anywhere. A server that does not answer fails the attempt:
without its list the audit cannot say that no study is split. Of one in maintenance the result says that it was not
asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from courier.errors import CourierError, InvalidRequest
from courier.ledger.elsewhere import ElsewhereStudies
from courier.messages import AuditJob, read_job
from courier.results import AuditedServer, AuditPayload, OnlyOn, Overlap, SplitOn, SplitStudy
from worker.dicom.viewer import viewer_url
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.delete import select_servers
from worker.jobs.lookup import Reply, settle
from worker.jobs.maintenance import names_not_asked, unanswered_error
from worker.jobs.services import Services
from worker.jobs.study_lists import Left, walk
from worker.jobs.uid_index import UidIndex
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import in_maintenance, suspended, suspended_error
from worker.pacs.protocol import Found, Pacs

log = logging.getLogger(__name__)

#: What is asked for at a time; a dialect whose server holds its pages smaller asks for less.
PAGE = 1000
#: So many studies are compared at a time: other jobs ask the same servers.
ABREAST = 4
#: How soon an audit begins anew whose studies were not all noted when it began.
ANEW_S = 1.0
#: Differing images shown per study, and over all studies of one result, which passes through Redis.
SHOWN_PER_STUDY, SHOWN_PER_RESULT = 100, 20_000

T = TypeVar("T")


def audit(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """One page of the split studies, in the order of their UIDs; of one study, one page of the images that differ.

    Raises
    ------
    CourierError
        Of any server that was to be asked. There is no result without all of them.
    NotFound
        The one study that was asked for is on none of them.
    """
    job = read_job(AuditJob, message)
    noted = None if job.maintenance is None else _noted(job.maintenance, services)
    meant, out_of_service = select_servers(job.servers, services.fleet), in_maintenance()
    if len(meant) < 2:
        raise InvalidRequest("An audit compares servers: name two or more.", details={"field": "servers"})
    servers = [pacs for pacs in meant if pacs.server.name not in out_of_service]
    away = [(pacs, out_of_service[pacs.server.name]) for pacs in meant if pacs not in servers]
    if len(servers) < 2:
        raise unanswered_error("Fewer than two servers are left to be compared.", away)
    names = [pacs.server.name for pacs in servers]
    with UidIndex(names) as studies:
        with attempt.step("list"):
            not_asked = [Reply(pacs, [], not_asked=suspension) for pacs, suspension in away]
            if noted is None:
                left = _list(job, servers, not_asked, studies, attempt, services.fleet)
            else:
                left = _look_for(noted.study_uids, servers, studies, attempt, services.fleet)
        after = "" if job.study_uid or job.cursor is None else job.cursor
        candidates = studies.shared(after=after, limit=job.limit + 1)
        groups = studies.groups()
    with attempt.step("compare"):
        entries = _compare(job, candidates[: job.limit], attempt, services.fleet)
    cursor = candidates[job.limit - 1][0] if len(candidates) > job.limit else None
    if job.study_uid is not None:
        entries, cursor = _one_page(entries, job.limit)
    split = sum(count for on, count in groups if len(on) > 1)
    if noted is not None:
        _note_audited(noted, split, attempt)
    return AuditPayload(
        job_id=attempt.job_id,
        servers=[_audited(pacs, groups, left.get(pacs.server.name, Left())) for pacs in servers],
        studies=sum(count for _, count in groups),
        split=split,
        entries=entries,
        cursor=cursor,
        not_asked=names_not_asked(meant),
        maintenance=job.maintenance,
        left_out=noted.left_out if noted else 0,
        timings_ms=attempt.timings_ms,
        attempts=attempt.number,
    ).as_json()


@dataclass(frozen=True)
class _NotedStudies:
    """What was stored elsewhere while ``server`` was in maintenance, as it was noted when the audit began."""

    elsewhere: ElsewhereStudies
    server: str
    study_uids: list[str]
    left_out: int
    added: int


def _noted(name: str, services: Services) -> _NotedStudies:
    """The studies to be looked for; a server that is still out of service is waited for."""
    pacs, ledger = services.fleet[name], services.ledger
    if (suspension := suspended().get(name)) is not None:
        raise suspended_error(pacs.server, suspension)
    elsewhere = ElsewhereStudies(ledger.client, prefix=ledger.key(""))
    added, audit = elsewhere.added(name), elsewhere.read(name)
    return _NotedStudies(elsewhere, name, elsewhere.studies(name), audit.left_out if audit else 0, added)


def _note_audited(noted: _NotedStudies, split: int, attempt: Attempt) -> None:
    """Write down what the audit found; `Postpone`, if an upload that was under way has stored elsewhere meanwhile."""
    count = len(noted.study_uids)
    found = {"studies": count, "split": split}
    if not noted.elsewhere.audited(noted.server, added=noted.added, job_id=attempt.job_id, **found):
        raise Postpone("images were stored elsewhere since the audit began", delay_s=ANEW_S)
    if split:
        words = "After the maintenance of %s, %d of %d studies are on more than one server: pacs audit --maintenance %s"
        log.warning(words, noted.server, split, count, noted.server)


def _look_for(
    study_uids: Sequence[str], servers: Sequence[Pacs], studies: UidIndex, attempt: Attempt, fleet: Fleet
) -> dict[str, Left]:
    """Note on which servers each of these studies is, some at a time."""
    for start in range(0, len(study_uids), ABREAST):
        attempt.write_intent({})  # nothing to remember, but a cancelled or lost job ends here
        some = study_uids[start : start + ABREAST]
        answers = iter(_all([partial(pacs.find, "study", uid) for uid in some for pacs in servers], fleet))
        for uid in some:
            for pacs in servers:
                if next(answers):
                    studies.note(pacs.server.name, [uid])
    return {}


def _list(
    job: AuditJob,
    servers: Sequence[Pacs],
    away: Sequence[Reply],
    studies: UidIndex,
    attempt: Attempt,
    fleet: Fleet,
) -> dict[str, Left]:
    """Note which studies each server has; what each sent that does not match, by its name."""
    if job.study_uid is None:
        left = _all([partial(_walk, pacs, job.filters, studies, attempt) for pacs in servers], fleet)
        return {pacs.server.name: one for pacs, one in zip(servers, left, strict=True)}
    answers = _all([partial(pacs.find, "study", job.study_uid) for pacs in servers], fleet)
    replies = [Reply(pacs, found) for pacs, found in zip(servers, answers, strict=True)]
    settle("study", job.study_uid, [*replies, *away])
    for reply in replies:
        studies.note(reply.pacs.server.name, [found.study_instance_uid for found in reply.found])
    return {}


def _walk(pacs: Pacs, filters: Mapping[str, str], studies: UidIndex, attempt: Attempt) -> Left:
    """Note all of one server's studies, page by page; what it sent beside them."""
    left = Left()
    attempt.write_intent({})  # nothing to remember, but a cancelled or lost job ends here
    for uids in walk(pacs, filters, left, limit=PAGE):
        studies.note(pacs.server.name, uids)
        attempt.write_intent({})  # as above
    return left


def _compare(
    job: AuditJob, candidates: Sequence[tuple[str, list[str]]], attempt: Attempt, fleet: Fleet
) -> list[SplitStudy]:
    """Those of the studies that still are on more than one server when their images are asked for."""
    compared: list[SplitStudy | None] = []
    shown = (
        min(SHOWN_PER_STUDY, SHOWN_PER_RESULT // max(1, len(candidates))) if job.study_uid is None else job.limit + 1
    )
    after = job.cursor if job.study_uid and job.cursor else ""
    compare = partial(_compared, after=after, shown=shown)
    for start in range(0, len(candidates), ABREAST):
        attempt.write_intent({})  # as above
        abreast = candidates[start : start + ABREAST]
        compared += _all([partial(compare, uid, [fleet[name] for name in on]) for uid, on in abreast], fleet)
    return [study for study in compared if study is not None]


def _compared(study_uid: str, servers: Sequence[Pacs], *, after: str, shown: int) -> SplitStudy | None:
    """The study's copies; of the images that differ the next ``shown`` after ``after``."""
    with UidIndex([pacs.server.name for pacs in servers]) as images:
        for pacs in servers:
            found = pacs.instances(Found("study", study_uid))
            images.note(pacs.server.name, (str(one.sop_instance_uid) for one in found))
        groups = images.groups()
        counts = {pacs.server.name: _count(pacs, groups) for pacs in servers}
        holders = [pacs for pacs in servers if counts[pacs.server.name]]
        if len(holders) < 2:
            return None
        names = [pacs.server.name for pacs in holders]
        differing = images.missing_somewhere(names, after=after, limit=shown)
    return SplitStudy(
        study_uid=study_uid,
        overlap=overlap(names, groups),
        images=sum(count for _, count in groups),
        keep=max(names, key=counts.__getitem__),
        servers=[_place(pacs, study_uid, counts[pacs.server.name]) for pacs in holders],
        only_on=[_only_on(on, count, differing) for on, count in groups if on != names],
    )


def overlap(holders: Sequence[str], groups: Sequence[tuple[list[str], int]]) -> Overlap:
    """``groups``: how many images are on exactly these servers."""
    if all(on == list(holders) for on, _ in groups):
        return "equal"
    return "partial" if any(len(on) > 1 for on, _ in groups) else "none"


def _only_on(on: list[str], count: int, differing: Sequence[tuple[str, list[str]]]) -> OnlyOn:
    return OnlyOn(servers=on, images=count, image_uids=[uid for uid, where in differing if where == on])


def _one_page(entries: list[SplitStudy], limit: int) -> tuple[list[SplitStudy], str | None]:
    """The entry of the only study without the image that was asked for in excess, which tells that more follow."""
    uids = sorted(uid for entry in entries for group in entry.only_on for uid in group.image_uids)
    if len(uids) <= limit:
        return entries, None
    excess = uids[-1]
    only_on = [
        group.model_copy(update={"image_uids": [uid for uid in group.image_uids if uid != excess]})
        for group in entries[0].only_on
    ]
    return [entries[0].model_copy(update={"only_on": only_on})], uids[-2]


def _place(pacs: Pacs, study_uid: str, images: int) -> SplitOn:
    server = pacs.server
    link = viewer_url(server, study=study_uid)
    return SplitOn(server_name=server.name, server_type=server.type, images=images, viewer_url=link)


def _audited(pacs: Pacs, groups: Sequence[tuple[list[str], int]], left: Left) -> AuditedServer:
    server = pacs.server
    return AuditedServer(
        server_name=server.name,
        server_type=server.type,
        studies=_count(pacs, groups),
        dropped=left.dropped,
        lacking=sorted(left.lacking or ()),
        may_be_cut=left.may_be_cut,
    )


def _count(pacs: Pacs, groups: Sequence[tuple[list[str], int]]) -> int:
    return sum(count for on, count in groups if pacs.server.name in on)


def _all(questions: Sequence[Callable[[], T]], fleet: Fleet) -> list[T]:
    """Every answer, all asked at the same time; the first error is everybody's."""
    answers: list[T] = []
    for answer in fleet.gather(questions):
        if isinstance(answer, CourierError):
            raise answer
        answers.append(answer)
    return answers
