"""Studies by the thousand brought to a place: the kind of batch whose items are studies to download (docs/batches.md).

How one study is brought is said in `downloads`; here, which, from where and to where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from courier.batches.planner import Planned
from courier.batches.store import Batch, Item, Pass, Settled
from courier.errors import CourierError
from courier.messages import BatchDownloadJob, DownloadJob, check_uid, read_job
from worker.batches.coordinator import Answer, Desk, Work, order, unbegun
from worker.batches.study_copy import images_on
from worker.batches.study_lists import planned_studies
from worker.jobs.attempt import NotYet, Run
from worker.jobs.delete import asked
from worker.jobs.download import bring
from worker.jobs.lookup import Reply, settle
from worker.jobs.services import Tools
from worker.jobs.study_lists import check_order_filters
from worker.pacs.protocol import Pacs
from worker.storage.destinations import Archive, Files, Mark


class StudyDownloads:
    """The kind: its items are studies; the server of an item is the one to ask, if anybody said so."""

    #: One at a time in a chunk, because a study is large; several chunks are under way at once.
    group_items = 1

    @property
    def passes(self) -> Mapping[Pass, Work]:
        return {"survey": self.survey, "apply": self.apply, "verify": self.verify}

    def check(self, item: Planned) -> Planned:
        check_uid(item.text)
        return item

    def pages(self, desk: Desk) -> Iterator[Sequence[Planned]]:
        servers = asked(desk.batch.order.get("servers"), desk.tools.fleet)
        return planned_studies(desk, servers, rest_is_reached=False)

    def survey(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:  # noqa: ARG002
        """Who has the study; one that a list has just shown is not asked for again."""
        return [Settled(item, "planned") if item.server else self._found(item, desk) for item in items]

    def apply(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:  # noqa: ARG002
        try:
            return [self._brought(item, desk) for item in items]
        finally:
            desk.run.ledger.let_go_destination(job_id=desk.run.job_id, fence=desk.run.fence)

    def verify(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:  # noqa: ARG002
        """Whether what lies at the destination is whole, and is what the server lists now."""
        return [self._verified(item, desk) for item in items]

    def _found(self, item: Item, desk: Desk) -> Answer:
        try:
            name = _server_of(item, desk)
        except CourierError as error:
            return error
        return Settled(item, "planned", server=name)

    def _brought(self, item: Item, desk: Desk) -> Answer:
        try:
            job = _job_of(item, desk.batch, _server_of(item, desk))
            payload = bring(job, desk.run, desk.tools, still_wanted=lambda _: desk.run.check_ours())
        except NotYet:
            return None
        except CourierError as error:
            return error
        told = {name: getattr(payload, name) for name in ("instances", "size_bytes", "sha256", "warnings")}
        result = {"destination": payload.destination, **{name: value for name, value in told.items() if value}}
        return Settled(item, payload.status, server=payload.server_name, result=result)

    def _verified(self, item: Item, desk: Desk) -> Answer:
        name = desk.known(item).server_name
        pacs = desk.tools.fleet[name]
        try:
            place = _place(_job_of(item, desk.batch, name), desk.tools)
            there, images = place.look(), images_on(pacs, item.text)
        except CourierError as error:
            return error
        if there is None:
            why = f"{place.shown} is not there; retry the batch to bring it again."
            return Settled(item, "missing", server=name, message=why)
        if there != Mark.of(item.text, images):
            return Settled(item, "differs", server=name, message=f"{name} lists other images than {place.shown} holds.")
        return Settled(item, "verified", server=name, result={"compared": "uids", "images": there.images})


def download_all(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """`pacs.batch.download`: see `order`.

    Raises
    ------
    InvalidRequest
        A server is not known or cannot answer for what matches the filters, or nothing may be written at the
        destination; nothing has begun.
    """
    with unbegun(run, tools):
        job = read_job(BatchDownloadJob, message)
        check_order_filters(asked(job.servers, tools.fleet), job.filters)
        tools.destinations.archive(f"{job.destination.rstrip('/')}/0.zip")
    return order(message, run, tools, kind=StudyDownloads(), name="download", form=BatchDownloadJob)


def _server_of(item: Item, desk: Desk) -> str:
    """The server that the item or its survey names, or the first that has the study; silence is never "not there"."""
    if name := item.server or desk.known(item, "survey").server_name:
        return name
    replies = []
    for pacs in asked(desk.batch.order.get("servers"), desk.tools.fleet):
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


def _place(job: DownloadJob, tools: Tools) -> Archive | Files:
    destinations = tools.destinations
    return (destinations.archive if job.format == "zip" else destinations.files)(job.destination)
