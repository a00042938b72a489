"""Delete every study of every server, or of those that are named: `pacs.delete_all`, a batch of study deletions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from worker.batches import Batch, Batches, Item, ItemStatus, Pass, Settled
from worker.errors import ConfirmationRequired, CourierError, InvalidRequest, NeedsPerson, Refused
from worker.jobs.batches import WIDTH, Answer, Conductor, Desk, Work, in_turns
from worker.jobs.deletions import asked, forget_what_is_gone, remove
from worker.jobs.run import Run
from worker.jobs.tools import Tools
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs
from worker.payloads import BatchFailure, BatchPayload, BatchServer, DeleteAllJob, check_uid, read_job
from worker.planning import Planned

CONFIRMATION = "delete all studies"
PAGE_STUDIES = 1000
#: A result passes through Redis; the report has them all.
MAX_FAILURES_TOLD = 100

_STATUS: Mapping[DeletionFate, ItemStatus] = {
    DeletionFate.DELETED: "deleted",
    DeletionFate.HIDDEN: "hidden",
    DeletionFate.NOT_THERE: "not_there",
    DeletionFate.REFUSED: "refused",
}


class StudyDeletions:
    """The kind of batch whose items are studies to delete, one per server that has them."""

    group_items = 8

    @property
    def passes(self) -> Mapping[Pass, Work]:
        return {"apply": self.apply}

    def check(self, item: Planned) -> Planned:
        check_uid(item.text)
        return item

    def pages(self, desk: Desk) -> Iterator[Sequence[Planned]]:
        servers = [desk.tools.fleet[name] for name in desk.batch.servers]
        return in_turns([_planned(pacs, desk.warnings) for pacs in servers])

    def apply(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:
        run, fleet = desk.run, desk.tools.fleet
        permanent = bool(desk.batch.order["permanent"])
        ledger = desk.tools.ledger
        try:
            ready = [item for item in items if ledger.shut(item.text, job_id=run.job_id, fence=run.fence) is None]
            answers = fleet.gather(
                [
                    partial(
                        remove,
                        fleet[item.server],
                        [Found("study", item.text)],
                        permanent=permanent,
                        resumed=item.number in resumed,
                    )
                    for item in ready
                ]
            )
            done = {item.number: _settled(item, answer) for item, answer in zip(ready, answers, strict=True)}
            gone = {item.text for item in ready if isinstance(done[item.number], Settled)}
            forget_what_is_gone(gone, desk.tools)
        finally:
            ledger.let_go(run.job_id)
        return [done.get(item.number) for item in items]


def delete_all(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """Plan the deletion of all studies and see it through; the batch bears the job's id (docs/batches.md).

    Raises
    ------
    ConfirmationRequired
        ``confirm`` is not the sentence.
    CourierError
        A server could not be listed: nothing is deleted before all are.
    """
    job = read_job(DeleteAllJob, message)
    if not job.dry_run and job.confirm != CONFIRMATION:
        raise ConfirmationRequired(f'Nothing was deleted: confirm has to be "{CONFIRMATION}".')
    servers = {pacs.server.name: pacs.server.type for pacs in asked(job.servers, tools.fleet)}
    batches = Batches(tools.ledger)
    order = {"permanent": job.permanent, "dry_run": job.dry_run, "verify": False}
    batches.open(run.job_id, kind="delete", servers=servers, order=order, width=WIDTH)
    batch = Conductor(StudyDeletions(), run.job_id, run, tools, may_be_empty=True).order()
    remaining = {}
    if batch.state == "done":
        with run.step("verify"):
            remaining = _remaining(batch, tools.fleet)
    return _payload(batch, remaining, run, tools).as_json()


def _planned(pacs: Pacs, warnings: list[str]) -> Iterator[Sequence[Planned]]:
    for page in study_pages(pacs, warnings):
        yield [Planned(study_uid, pacs.server.name) for study_uid in page]


def study_pages(pacs: Pacs, warnings: list[str]) -> Iterator[list[str]]:
    """The UIDs of a server's studies, as far as it lets one page through them."""
    offset: int | None = 0
    while offset is not None:
        try:
            page = pacs.studies(filters={}, limit=PAGE_STUDIES, offset=offset)
        except InvalidRequest:
            if offset == 0:
                raise
            warnings.append(f"{pacs.server.name} lists no more than {offset} studies at a time; run this again.")
            return
        yield [text(ds, STUDY_INSTANCE_UID) for ds in page.studies]
        offset = page.next_offset


def _settled(item: Item, answer: Deletion | CourierError) -> Settled | CourierError:
    if isinstance(answer, Refused | NeedsPerson):
        return Settled(item, "refused", answer.payload["code"], answer.message)
    if isinstance(answer, CourierError):
        return answer
    refused = answer.fate is DeletionFate.REFUSED
    return Settled(item, _STATUS[answer.fate], "pacs_rejected" if refused else "", answer.note if refused else "")


def _remaining(batch: Batch, fleet: Fleet) -> dict[str, int]:
    """How many studies each server still lists; a server that is silent now is left out."""
    counts = fleet.gather([partial(_count, fleet[name]) for name in batch.servers])
    return {name: count for name, count in zip(batch.servers, counts, strict=True) if isinstance(count, int)}


def _count(pacs: Pacs) -> int:
    return sum(len(page) for page in study_pages(pacs, []))


def _payload(batch: Batch, remaining: Mapping[str, int], run: Run, tools: Tools) -> BatchPayload:
    failures = Batches(tools.ledger).failures(batch, MAX_FAILURES_TOLD)
    return BatchPayload(
        job_id=run.job_id,
        batch_id=batch.id,
        status="planned" if batch.state == "planned" else "done",
        items=batch.items,
        servers=[
            BatchServer(
                server_name=name,
                server_type=batch.types[name],
                remaining=remaining.get(name),
                **batch.counts[name],
            )
            for name in batch.servers
        ],
        failures=[
            BatchFailure(
                server_name=one.item.server,
                server_type=batch.types[one.item.server],
                study_uid=one.item.text,
                status="refused" if one.status == "refused" else "failed",
                code=one.code,
                message=one.message,
            )
            for one in failures
        ],
        failures_total=sum(counts.get("failed", 0) + counts.get("refused", 0) for counts in batch.counts.values()),
        warnings=list(batch.warnings),
    )
