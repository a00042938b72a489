"""The kind of batch whose items are studies that go from one server to another: `pacs.batch.migrate`.

What is done to one study is said in ``study_migration.py``; here: many at the same time, each behind its lock
for delete, and what goes into the batch. The result of ``apply`` is a study's receipt, which later passes complete
(docs/batches.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from courier.batches.planner import Planned
from courier.batches.store import (
    CHUNK_ITEMS,
    NOT_DONE,
    Batch,
    Batches,
    Item,
    ItemOutcome,
    ItemStatus,
    Pass,
    Row,
    is_to_undo,
)
from courier.errors import CourierError, InvalidRequest, NotFound, PacsUnavailable, Poisoned, Refused
from courier.ledger.jobs import LeaseLost
from courier.messages import BatchMigrateJob, check_uid, read_job
from worker.batches.confirmations import Command
from worker.batches.coordinator import ItemResult, PassContext, PassHandler, order, unbegun
from worker.batches.study_copy import Transfer, images_on
from worker.batches.study_migration import (
    Digests,
    MigrationReceipt,
    copy_study,
    delete_source,
    end_deletion,
    preflight_study,
    undo_study,
    verify_moved,
    verify_study,
    what_is_left_out,
)
from worker.jobs.attempt import Attempt
from worker.jobs.hangs import Hangs
from worker.jobs.maintenance import refuse_in_maintenance
from worker.jobs.placement import check_no_open_circuit
from worker.jobs.receipts import Receipts
from worker.jobs.services import Services
from worker.jobs.study_lists import check_order_filters, study_pages
from worker.pacs.fleet import Fleet
from worker.pacs.protection import check_allowed, check_two_archives
from worker.pacs.protocol import Pacs

#: What is done to a study of a group.
Do = Callable[..., ItemOutcome]


def migrate(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """`pacs.batch.migrate`: plan a migration and see it through; it bears the job's id (docs/jobs.md).

    Raises
    ------
    InvalidRequest
        A server is not configured, or both are the same one; the settings forbid deletions on the source of a move;
        or the source cannot answer for what matches the filters.
    """
    with unbegun(attempt, services):
        job = read_job(BatchMigrateJob, message)
        source, target = (services.fleet[name] for name in (job.from_server, job.to_server))
        if job.delete_source:
            refuse_in_maintenance([source, target], "a move")
            check_allowed([source], permanent=True)
            check_two_archives(source, target)
        check_order_filters([source], job.filters)
    return order(message, attempt, services, kind=StudyMigrations(), name="migrate", form=BatchMigrateJob)


class StudyMigrations:
    """Studies from one server to another."""

    group_items = 16

    @property
    def passes(self) -> Mapping[Pass, PassHandler]:
        return {"survey": self.preflight, "apply": self.apply, "verify": self.verify, "undo": self.undo}

    def check(self, item: Planned) -> Planned:
        """A study goes but one way, whatever server is named with it."""
        check_uid(item.text)
        return replace(item, server="")

    def refuse_forbidden(self, command: Command, batch: Batch, fleet: Fleet) -> None:
        """A move deletes at its source, an undo at the target, and both for good. None moves while one is in
        maintenance.
        """
        if batch.order.get("delete_source"):
            refuse_in_maintenance(fleet.known([batch.order["from_server"], batch.order["to_server"]]), "a move")
        if command == "undo":
            check_allowed(fleet.known([batch.order["to_server"]]), permanent=True)
        elif batch.order.get("delete_source"):
            check_allowed(fleet.known([batch.order["from_server"]]), permanent=True)

    def study_at_stake(self, command: Command, row: Row, batch: Batch, fleet: Fleet) -> str | None:  # noqa: ARG002
        """A move is about each study whose source it has not deleted yet, an undo about each that the batch copied."""
        applied = row.outcome
        if command == "undo":
            return row.item.text if applied.result.get("parcels") and is_to_undo(row) else None
        if not batch.order.get("delete_source") or applied.result.get("source_deleted"):
            return None
        left_out = NOT_DONE if command == "verify" else ("skipped", "refused")
        return None if applied.status in left_out else row.item.text

    def pages(self, context: PassContext) -> Iterator[Sequence[Planned]]:
        """The studies of the source that match the order's filters, as far as it lets one page through them."""
        order = context.batch.order
        source, moves = context.services.fleet[order["from_server"]], bool(order.get("delete_source"))
        for page in study_pages(source, context.warnings, order.get("filters"), rest_is_reached=moves):
            yield [Planned(study_uid) for study_uid in page]

    def preflight(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        return _done(items, context, lambda group: group.each(items, _preflight, others=_elsewhere(items, group)))

    def apply(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        return _done(items, context, lambda group: group.locked_for_delete(items, _apply))

    def verify(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        return _done(items, context, lambda group: group.locked_for_delete(items, _verify))

    def undo(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        return _done(items, context, lambda group: group.locked_for_delete(items, _undo))


# --- a group of studies -----------------------------------------------------------------------------------------


def _done(items: Sequence[Item], context: PassContext, do: Callable[[_Group], list[ItemResult]]) -> list[ItemResult]:
    """What ``do`` makes of the items; failed, if a server has gone from the settings since they were planned."""
    try:
        group = _Group.at(context)
    except InvalidRequest as error:
        sentence = f"{error.message} Put it back into the settings, then retry the batch."
        return [ItemOutcome(item, "failed", error.payload["code"], sentence) for item in items]
    return do(group)


@dataclass
class _ChunkBook:
    """Entries into the batch's book by several threads of one chunk.

    An entry is written with those of its neighbours, so whoever has the pen writes for all who wait for it.
    """

    context: PassContext
    _pen: threading.Lock = field(default_factory=threading.Lock)
    _queue: threading.Lock = field(default_factory=threading.Lock)
    _waiting: list[ItemOutcome] = field(default_factory=list)
    _blot: BaseException | None = None

    def write(self, entry: ItemOutcome) -> None:
        with self._queue:
            self._waiting.append(entry)
        with self._pen:
            if self._blot is not None:
                raise self._blot
            with self._queue:
                if not any(one is entry for one in self._waiting):
                    return
                entries, self._waiting = self._waiting, []
            try:
                self._record_outcomes(entries)
            except BaseException as error:
                self._blot = error  # of nobody's entry it is known that it stands
                raise

    def _record_outcomes(self, entries: Sequence[ItemOutcome]) -> None:
        attempt, chunk = self.context.attempt, entries[0].item.number // CHUNK_ITEMS
        batches = Batches(self.context.services.ledger)
        batches.record_outcomes(self.context.batch, "apply", chunk, entries, job_id=attempt.job_id, fence=attempt.fence)


@dataclass
class _Group:
    """The studies of one call: where they come from and go to, and what is written down of them."""

    context: PassContext
    source: Pacs
    target: Pacs
    _book: _ChunkBook

    @classmethod
    def at(cls, context: PassContext) -> _Group:
        """The group at ``context``; `InvalidRequest` if the settings do not know one of its servers."""
        fleet, order = context.services.fleet, context.batch.order
        return cls(context, fleet[order["from_server"]], fleet[order["to_server"]], _ChunkBook(context))

    def each(self, items: Sequence[Item], do: Do, **more: Any) -> list[ItemResult]:
        """Do all of them at the same time, unless a server that they need is silent."""
        for pacs in (self.source, self.target):
            if pacs.server.name in self.context.down:
                return [self.context.down[pacs.server.name]] * len(items)
        answers = self.context.services.fleet.gather([partial(do, item, self, **more) for item in items])
        self._note_silence(answers)
        return list(answers)

    def locked_for_delete(self, items: Sequence[Item], do: Do) -> list[ItemResult]:
        """As `each`, for those studies that nobody else is storing or deleting; nobody begins to meanwhile."""
        attempt, ledger = self.context.attempt, self.context.services.ledger
        ready: dict[str, Item] = {}
        try:
            for item in items:
                if item.text not in ready and attempt.is_free(
                    ledger.lock_for_delete(item.text, job_id=attempt.job_id, fence=attempt.fence)
                ):
                    ready[item.text] = item
            ours = list(ready.values())
            answers = {item.number: one for item, one in zip(ours, self.each(ours, do), strict=True)}
        finally:
            if not attempt.lost:  # what was ours is the next attempt's then
                ledger.release(attempt.job_id, fence=attempt.fence)
        return [answers.get(item.number) for item in items]

    def transfer(self, item: Item) -> Transfer:
        settings = self.context.services.settings
        return Transfer(
            self.source,
            self.target,
            item.text,
            receipts=Receipts.of(self.context.attempt),
            hangs=Hangs(self.context.attempt),
            check_may_go_on=self._check_may_go_on,
            max_spool_bytes=settings.sources.max_bytes,
            pending_wait_s=settings.jobs.pending_wait_s,
        )

    def receipt(self, item: Item) -> MigrationReceipt:
        """What the batch knows of the study; saving it leaves the item's status as it is."""
        applied = self.context.known(item)

        def save(receipt: MigrationReceipt) -> None:
            self._book.write(replace(applied, status="open", result={**_figures(applied), **receipt.as_json()}))

        return MigrationReceipt.from_json(applied.result, save=save)

    def move_claim(self, item: Item, pacs: Pacs) -> None:
        self.context.services.ledger.move_claim(item.text, server=pacs.server.name, job_id=self.context.attempt.job_id)

    def _check_may_go_on(self, _stored: int) -> None:
        if self.context.attempt.lost:
            raise LeaseLost
        target = self.target.server.name
        check_no_open_circuit(self.context.services, [target], changed=target)

    def _note_silence(self, answers: Sequence[ItemOutcome | CourierError]) -> None:
        """A server on which every study of a group came to grief is not asked again in this attempt."""
        if len(answers) == 1 and isinstance(answers[0], PacsUnavailable) and "failure_reason" in answers[0].details:
            return  # it failed at images of this one study
        silent = {one.server_name if isinstance(one, PacsUnavailable) else None for one in answers}
        if len(silent) == 1 and (name := silent.pop()) is not None and isinstance(answers[0], CourierError):
            self.context.down[name] = answers[0]


def _figures(applied: ItemOutcome) -> dict[str, Any]:
    """What a result says beside the receipt."""
    return {name: value for name, value in applied.result.items() if name not in MigrationReceipt.FIELDS}


# --- a study in each pass ---------------------------------------------------------------------------------------


def _elsewhere(items: Sequence[Item], group: _Group) -> dict[int, dict[str, bool | None]]:
    """Which of the further servers have each study; None where one does not say."""
    fleet = group.context.services.fleet
    others = [pacs for pacs in fleet if pacs not in (group.source, group.target)]
    questions = [partial(pacs.find, "study", item.text) for item in items for pacs in others]
    answers = iter(fleet.gather(questions))
    found: dict[int, dict[str, bool | None]] = {}
    for item in items:
        replies = {pacs.server.name: next(answers) for pacs in others}
        found[item.number] = {n: None if isinstance(one, CourierError) else bool(one) for n, one in replies.items()}
    return found


def _preflight(item: Item, group: _Group, *, others: Mapping[int, Mapping[str, bool | None]]) -> ItemOutcome:
    """A study that is whole on both by its UIDs is planned too: whether it is the same, verification says."""
    told = preflight_study(group.transfer(item), others[item.number])
    notes = list(told["warnings"])
    if not told["missing"]:
        notes.append(f"{group.target.server.name} has the study already, whole: {told['images']} images")
    return ItemOutcome(item, "planned", "", "; ".join(notes), told, server=group.source.server.name)


def _apply(item: Item, group: _Group) -> ItemOutcome:
    transfer, receipt = group.transfer(item), group.receipt(item)
    target = group.target.server.name
    try:
        figures = copy_study(transfer, receipt, attempt=group.context.attempt.number)
    except Refused as error:
        server = error.server_name or target
        return ItemOutcome(item, "refused", error.payload["code"], error.message, receipt.as_json(), server=server)
    except Poisoned as error:
        return ItemOutcome(item, "failed", error.code, error.message, receipt.as_json(), server=target)
    status: ItemStatus = "copied" if figures["added"] else "already_there"
    note = what_is_left_out(receipt.notes, group.source)
    return ItemOutcome(item, status, "", note, {**figures, **receipt.as_json()}, server=target)


def _verify(item: Item, group: _Group) -> ItemOutcome:
    transfer, receipt = group.transfer(item), group.receipt(item)
    order, target = group.context.batch.order, group.target.server.name
    moves = bool(order.get("delete_source"))
    # Orders of version 0.1.0 could ask for fewer: what is deleted is compared, whatever they say.
    digests: Digests = "all" if moves else order.get("digests", "all")
    try:
        if receipt.source_deleted and not images_on(group.source, item.text):
            end_deletion(transfer, receipt)
            group.move_claim(item, group.target)
            told = verify_moved(transfer, receipt, digests=digests)
        else:
            attempt = group.context.attempt.number
            told = verify_study(transfer, receipt, digests=digests, attempt=attempt, moves=moves)
            if moves:
                delete_source(transfer, receipt)
                group.move_claim(item, group.target)
                told["source_deleted"] = True
    except Refused as error:
        return _not_verified(item, error, target)
    if told.get("source_deleted"):
        told["servers"] = {target: "verified", group.source.server.name: "deleted"}
    notes = [_how_compared(told), what_is_left_out(told.pop("notes", ()), group.source)]
    return ItemOutcome(item, "verified", "", " ".join(filter(None, notes)), told, server=target)


def _how_compared(told: Mapping[str, Any]) -> str:
    """What a verification has not compared by bytes; empty if it has so compared all that it was to compare."""
    if told["digests"] == "none":
        return 'Only UIDs were compared: the order says digests "none".'
    notes = []
    if told["compared_elements"]:
        rewriting = " and ".join(told["not_kept_by"])
        notes = [f"{told['compared_elements']} images were compared element by element: {rewriting} rewrites headers."]
    left = told["images"] - told["compared"] - told["compared_elements"]
    if told["digests"] == "all" and left:
        notes.append(f"Of {left} images only UIDs were compared: the source has no copy any more to compare them with.")
    return " ".join(notes)


def _not_verified(item: Item, error: Refused, target: str) -> ItemOutcome:
    """What is to be read out of a refusal: images differ, images are missing, or nobody can say."""
    details = error.details
    status: ItemStatus = "differs" if "different" in details else "missing" if "missing" in details else "failed"
    if isinstance(error, NotFound):
        status = "unverified"
    return ItemOutcome(item, status, error.payload["code"], error.message, _details_of(error), server=target)


def _details_of(error: Refused) -> dict[str, Any]:
    return {name: found for name, found in error.details.items() if name != "study_uid"}


def _undo(item: Item, group: _Group) -> ItemOutcome:
    transfer, receipt = group.transfer(item), group.receipt(item)
    target = group.target.server.name
    try:
        told = undo_study(transfer, receipt)
    except Refused as error:
        server = error.server_name or target
        return ItemOutcome(item, "kept", error.payload["code"], error.message, _details_of(error), server=server)
    if not told["removed"] and not told["restored"]:
        return ItemOutcome(
            item, "kept", "", f"{target} has nothing of it that this batch has added.", told, server=target
        )
    if told["restored"]:
        group.move_claim(item, group.source)
        told["servers"] = {target: "undone", group.source.server.name: "undone"}
    notes = [note] if (note := told.pop("note")) else []
    notes += [f"{target} hides what was removed, and frees it later."] if told["hidden"] else []
    if told["left_out"]:
        notes.append(
            f"{target} keeps {told['left_out']} notes of rejections: {group.source.server.name} does not take them "
            "without the images that they hid there."
        )
    if told["left"]:
        notes.append(
            f"{target} keeps {told['left']} images that the batch has not added, so the study is on both servers."
        )
    return ItemOutcome(item, "undone", "", " ".join(notes), told, server=target)
