"""Studies by the thousand brought to a place: the kind of batch whose items are studies to download (docs/batches.md).

How one study is brought is said in `downloads`; here, which, from where and to where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from courier.batches.planner import Planned
from courier.batches.store import Batch, Item, ItemOutcome, Pass
from courier.errors import CourierError
from courier.messages import BatchDownloadJob, DownloadJob, check_uid, read_job
from worker.batches.coordinator import ItemResult, PassContext, PassHandler, order, unbegun
from worker.batches.study_copy import images_on
from worker.batches.study_lists import planned_studies
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.delete import select_servers
from worker.jobs.download import bring
from worker.jobs.lookup import Reply, settle
from worker.jobs.services import Services
from worker.jobs.study_lists import check_order_filters
from worker.pacs.protocol import Pacs
from worker.storage.destinations import Archive, Files, StudyFingerprint


class StudyDownloads:
    """The kind: its items are studies; the server of an item is the one to ask, if the order names one."""

    #: One at a time in a chunk, because a study is large; several chunks are under way at once.
    group_items = 1

    @property
    def passes(self) -> Mapping[Pass, PassHandler]:
        return {"survey": self.preflight, "apply": self.apply, "verify": self.verify}

    def check(self, item: Planned) -> Planned:
        check_uid(item.text)
        return item

    def pages(self, context: PassContext) -> Iterator[Sequence[Planned]]:
        servers = select_servers(context.batch.order.get("servers"), context.services.fleet)
        return planned_studies(context, servers, rest_is_reached=False)

    def preflight(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        """Who has the study; one that a list has just shown is not asked for again."""
        return [ItemOutcome(item, "planned") if item.server else self._found(item, context) for item in items]

    def apply(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        try:
            return [self._brought(item, context) for item in items]
        finally:
            context.attempt.ledger.release_destination(job_id=context.attempt.job_id, fence=context.attempt.fence)

    def verify(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        """Whether what lies at the destination is whole, and is what the server lists now."""
        return [self._verified(item, context) for item in items]

    def _found(self, item: Item, context: PassContext) -> ItemResult:
        try:
            name = _server_of(item, context)
        except CourierError as error:
            return error
        return ItemOutcome(item, "planned", server=name)

    def _brought(self, item: Item, context: PassContext) -> ItemResult:
        try:
            job = _job_of(item, context.batch, _server_of(item, context))
            payload = bring(job, context.attempt, context.services, still_wanted=lambda _: context.attempt.check_ours())
        except Postpone:
            return None
        except CourierError as error:
            return error
        told = {name: getattr(payload, name) for name in ("instances", "size_bytes", "sha256", "warnings")}
        result = {"destination": payload.destination, **{name: value for name, value in told.items() if value}}
        return ItemOutcome(item, payload.status, server=payload.server_name, result=result)

    def _verified(self, item: Item, context: PassContext) -> ItemResult:
        name = context.known(item).server_name
        pacs = context.services.fleet[name]
        try:
            place = _place(_job_of(item, context.batch, name), context.services)
            there, images = place.read_fingerprint(), images_on(pacs, item.text)
        except CourierError as error:
            return error
        if there is None:
            why = f"{place.shown} is not there; retry the batch to bring it again."
            return ItemOutcome(item, "missing", server=name, message=why)
        if there != StudyFingerprint.of(item.text, images):
            return ItemOutcome(
                item, "differs", server=name, message=f"{name} lists other images than {place.shown} holds."
            )
        return ItemOutcome(item, "verified", server=name, result={"compared": "uids", "images": there.images})


def download_all(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """`pacs.batch.download`: see `order`.

    Raises
    ------
    InvalidRequest
        A server is not known or cannot answer for what matches the filters, or nothing may be written at the
        destination; nothing has begun.
    """
    with unbegun(attempt, services):
        job = read_job(BatchDownloadJob, message)
        check_order_filters(select_servers(job.servers, services.fleet), job.filters)
        services.destinations.archive(f"{job.destination.rstrip('/')}/0.zip")
    return order(message, attempt, services, kind=StudyDownloads(), name="download", form=BatchDownloadJob)


def _server_of(item: Item, context: PassContext) -> str:
    """The server that the item or its survey names, or the first that has the study; silence is never "not there"."""
    if name := item.server or context.known(item, "survey").server_name:
        return name
    replies = []
    for pacs in select_servers(context.batch.order.get("servers"), context.services.fleet):
        replies.append(_reply(pacs, item.text))
        if replies[-1].found:
            break
    return settle("study", item.text, replies).pacs.server.name


def _reply(pacs: Pacs, study_uid: str) -> Reply:
    try:
        return Reply(pacs, pacs.find("study", study_uid))
    except CourierError as error:
        return Reply(pacs, [], error)


def _job_of(item: Item, batch: Batch, server: str) -> DownloadJob:
    form = batch.order.get("format", "zip")
    destination = f"{str(batch.order['destination']).rstrip('/')}/{item.text}" + (".zip" if form == "zip" else "")
    return DownloadJob(study_uid=item.text, destination=destination, format=form, mode=server)


def _place(job: DownloadJob, services: Services) -> Archive | Files:
    destinations = services.destinations
    return (destinations.archive if job.format == "zip" else destinations.files)(job.destination)
