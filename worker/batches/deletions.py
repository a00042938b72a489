"""Studies by the thousand made to go away: the kind of batch whose items are studies to delete (docs/batches.md).

How one study is deleted is said in `deletions`, how a copy is kept and brought back in `kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from courier.batches.planner import Planned
from courier.batches.store import CHUNK_ITEMS, Batch, Batches, Item, ItemOutcome, ItemStatus, Pass, Row
from courier.errors import ConfirmationRequired, CourierError, InvalidRequest, Refused, StudyConflict, first_to_wait_for
from courier.messages import BatchDeleteJob, check_uid, read_job
from worker.batches.backups import Backup, back_up, has_others, is_all_backed_up, prove, remove_backed_up, restore
from worker.batches.confirmations import Command
from worker.batches.coordinator import ItemResult, PassContext, PassHandler, order, unbegun
from worker.batches.hidden import show_again, what_is_shown
from worker.batches.study_lists import planned_studies
from worker.jobs.attempt import Attempt
from worker.jobs.delete import as_done, forget_what_is_gone, reachable, remove, select_servers
from worker.jobs.download import OVERWRITE_NOT_PREVENTED
from worker.jobs.maintenance import refuse_in_maintenance
from worker.jobs.receipts import Receipts
from worker.jobs.services import Services
from worker.jobs.study_lists import check_order_filters
from worker.pacs.fleet import Fleet
from worker.pacs.protection import check_allowed, refusal
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs

CONFIRMATION = "delete all studies"
_STATUS: Mapping[DeletionFate, ItemStatus] = {
    DeletionFate.DELETED: "deleted",
    DeletionFate.HIDDEN: "hidden",
    DeletionFate.NOT_THERE: "not_there",
    DeletionFate.REFUSED: "refused",
}
#: Of several servers' fates of one study, the one that says most.
_MOST_FIRST: Sequence[ItemStatus] = ("refused", "hidden", "deleted", "not_there")


class StudyDeletions:
    """The kind: its items are studies; the server of an item is the only one to delete it on, if anybody said so.

    With ``backup`` an item takes two attempts: in the first every copy is kept and written down in its result, which
    leaves it open; the second deletes what is kept. So there is never a deletion whose copy nobody knows.
    """

    group_items = 8

    @property
    def passes(self) -> Mapping[Pass, PassHandler]:
        return {"survey": self.preflight, "apply": self.apply, "verify": self.verify, "undo": self.undo}

    def check(self, item: Planned) -> Planned:
        check_uid(item.text)
        return item

    def refuse_forbidden(self, command: Command, batch: Batch, fleet: Fleet) -> None:
        if command in ("apply", "retry") and _is_about_all(batch):
            refuse_in_maintenance(select_servers(batch.order.get("servers"), fleet), "a deletion of all studies")
        if command in ("apply", "retry") and batch.order.get("servers") is not None:
            check_allowed(fleet.known(batch.order["servers"]), permanent=_is_permanent(batch))

    def study_at_stake(self, command: Command, row: Row, batch: Batch, fleet: Fleet) -> str | None:
        """What the settings forbid to delete where it is planned is not at stake: it is refused."""
        wanted = {"apply": ("open",), "retry": ("open", "failed")}.get(command, ())
        if row.outcome.status not in wanted:
            return None
        planned = fleet.known([row.item.server])
        forbidden = planned and refusal(planned[0], permanent=_is_permanent(batch))
        return None if forbidden else row.item.text

    def pages(self, context: PassContext) -> Iterator[Sequence[Planned]]:
        servers = select_servers(context.batch.order.get("servers"), context.services.fleet)
        return planned_studies(context, servers, rest_is_reached=True)

    def preflight(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        """Who has the study; one that a list has just shown is not asked for again.

        What the settings forbid everywhere is refused here.
        """
        unknown = [item for item in items if not item.server]
        found = _together(unknown, _seen, context)
        return [
            found.get(item) or _forbidden(item, [item.server], context) or ItemOutcome(item, "planned")
            for item in items
        ]

    def apply(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
        ledger, attempt = context.services.ledger, context.attempt
        try:
            ready = _lock_for_delete(items, context)
            shown, done = _note_what_is_shown(ready, context)
            begun: dict[Item, Any] = {}
            ready = [item for item in ready if item not in done]
            done |= _together(ready, partial(_applied, resumed=resumed, begun=begun), context)
            done = {item: _with_result(answer, shown.get(item, {})) for item, answer in done.items()}
            _note_begun(begun, context, shown)
            over = [
                item for item, answer in done.items() if isinstance(answer, ItemOutcome) and answer.status != "open"
            ]
            forget_what_is_gone({item.text for item in over}, context.services)
        finally:
            ledger.release(attempt.job_id, fence=attempt.fence)
        return [done.get(item) for item in items]

    def verify(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        """Whether it is still gone from where it was deleted. The claim of a study that was nowhere goes here."""
        done = _together(items, _verified, context)
        forget_what_is_gone(
            {item.text for item in items if context.known(item).status == "not_there"}, context.services
        )
        return list(done.values())

    def undo(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        """Show again what was hidden, bring back what was kept; what was neither is refused."""
        ledger, attempt = context.services.ledger, context.attempt
        try:
            ready = _lock_for_delete(items, context)
            done = _together(ready, _undone, context)
        finally:
            ledger.release(attempt.job_id, fence=attempt.fence)
        return [done.get(item) for item in items]


def _lock_for_delete(items: Sequence[Item], context: PassContext) -> list[Item]:
    """Those of the studies that no other job is storing into or deleting; new jobs are kept out of all of them."""
    attempt, ledger = context.attempt, context.services.ledger
    return [
        item
        for item in items
        if attempt.is_free(ledger.lock_for_delete(item.text, job_id=attempt.job_id, fence=attempt.fence))
    ]


def delete_many(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """`pacs.batch.delete`: see `order`.

    Raises
    ------
    ConfirmationRequired
        Everything is to be deleted, and ``confirm`` is not the sentence.
    InvalidRequest
        A field or a server is not known, a server cannot answer for what matches the filters, the settings forbid the
        deletion on it, or nothing may be written where backups go. Nothing has begun.
    """
    with unbegun(attempt, services):
        job = read_job(BatchDeleteJob, message)
        if job.everything and not job.dry_run and job.confirm != CONFIRMATION:
            raise ConfirmationRequired(f'Nothing was deleted: confirm has to be "{CONFIRMATION}".')
        servers = select_servers(job.servers, services.fleet)
        if job.everything:
            refuse_in_maintenance(servers, "a deletion of all studies")
        if job.servers is not None:
            check_allowed(servers, permanent=job.permanent)
        check_order_filters(servers, job.filters)
        check_backup(job.backup, services)
    return order(message, attempt, services, kind=StudyDeletions(), name="delete", form=BatchDeleteJob)


def check_backup(place: str | None, services: Services) -> None:
    """`InvalidRequest` if nothing may be written where the backups of an order go; without a place there are none."""
    if place is not None:
        services.destinations.archive(f"{place.rstrip('/')}/0.zip")


def _together(
    items: Sequence[Item], step: Callable[[Item, PassContext], ItemOutcome], context: PassContext
) -> dict[Item, ItemOutcome | CourierError]:
    """What ``step`` makes of each of the items, all at the same time."""
    answers = context.services.fleet.gather([partial(step, item, context) for item in items])
    return dict(zip(items, answers, strict=True))


def _servers(item: Item, context: PassContext) -> list[Pacs]:
    names = context.batch.order.get("servers")
    if item.server and names is not None and item.server not in names:
        sentence = (
            f"It is to be deleted on {item.server}, and the batch only on {' and '.join(names)}; nothing was deleted."
        )
        raise InvalidRequest(sentence)
    if item.server:
        names = [item.server]
    servers = select_servers(names, context.services.fleet)
    types = context.batch.types
    # A server that came into the settings later stood in no plan.
    return [pacs for pacs in servers if names is not None or not types or pacs.server.name in types]


def _seen(item: Item, context: PassContext) -> ItemOutcome:
    """Which servers have the study; one that is silent raises, because nobody knows what would be deleted."""
    permanent = _is_permanent(context.batch)
    servers = _servers(item, context)
    names = [pacs.server.name for pacs in servers if reachable(pacs, "study", item.text, permanent=permanent)]
    if not names:
        return ItemOutcome(item, "not_there", "not_found", "No server that was asked has the study.")
    return _forbidden(item, names, context) or ItemOutcome(item, "planned", server=names[0], result={"on": names})


def _forbidden(item: Item, names: Sequence[str], context: PassContext) -> ItemOutcome | None:
    """The item refused, if the settings forbid it on each of the servers that have the study."""
    reasons = [refusal(context.services.fleet[name], permanent=_is_permanent(context.batch)) for name in names]
    if not all(reasons):
        return None
    return ItemOutcome(item, "refused", InvalidRequest.code, " ".join(reasons), server=names[0])


def _is_about_all(batch: Batch) -> bool:
    """Whether all studies are to be deleted: `pacs.delete_all`, whose order says nothing else, or ``everything``."""
    return bool(batch.order.get("everything")) or batch.order.get("survey") is False


def _is_permanent(batch: Batch) -> bool:
    return bool(batch.order.get("permanent", True))


# --- apply ------------------------------------------------------------------------------------------------------


def _applied(item: Item, context: PassContext, *, resumed: set[int], begun: dict[Item, Any]) -> ItemOutcome:
    """One step with one study: keep its copies, or delete it."""
    if item.server and item.number not in resumed and (refused := _forbidden(item, [item.server], context)):
        return refused
    folder = context.batch.order.get("backup") or context.batch.order.get("keep")  # as version 0.1 called it
    if folder is None:
        return _deleted(item, _servers(item, context), context, resumed=item.number in resumed, begun=begun)
    known = {name: Backup(**told) for name, told in context.known(item).result.get("kept", {}).items()}
    if not known:
        return _back_up(item, f"{str(folder).rstrip('/')}/{context.batch.id}", context)
    _check_backups(item, known, context)
    servers = [context.services.fleet[name] for name in known]
    outcome = _deleted(item, servers, context, resumed=item.number in resumed, begun=begun, known=known)
    told = context.known(item).result
    written_down = {name: told[name] for name in ("kept", "elsewhere", "warnings") if name in told}
    return replace(outcome, result={**outcome.result, **written_down})


def _note_what_is_shown(
    items: Sequence[Item], context: PassContext
) -> tuple[dict[Item, Mapping[str, Any]], dict[Item, ItemOutcome | CourierError]]:
    """Write down what an undo of a hide has to know, before anything is hidden; and the errors of those items where
    that cannot be told.
    """
    if _is_permanent(context.batch):
        return {}, {}
    known = {item: context.known(item).result for item in items if "hides" in context.known(item).result}
    told = _together([item for item in items if item not in known], _to_be_hidden, context)
    new = {item: one for item, one in told.items() if isinstance(one, ItemOutcome) and one.result}
    if new:
        attempt, chunk = context.attempt, next(iter(new)).number // CHUNK_ITEMS
        Batches(attempt.ledger).record_outcomes(
            context.batch, "apply", chunk, new.values(), job_id=attempt.job_id, fence=attempt.fence
        )
    known |= {item: one.result for item, one in new.items()}
    return known, {item: one for item, one in told.items() if isinstance(one, CourierError)}


def _to_be_hidden(item: Item, context: PassContext) -> ItemOutcome:
    servers = _servers(item, context)
    hides = {pacs.server.name: told for pacs in servers if (told := what_is_shown(pacs, item.text)) is not None}
    if not hides:
        return ItemOutcome(item, "open", server=context.known(item).server)
    others = _with_study(item, context, but=[pacs.server.name for pacs in servers], silent=True)
    result = {"elsewhere": others, **context.known(item).result, "hides": hides}
    return ItemOutcome(item, "open", server=context.known(item).server, result=result)


def _with_result(answer: ItemOutcome | CourierError, told: Mapping[str, Any]) -> ItemOutcome | CourierError:
    """``answer``, with what has to be known to show again what it has hidden."""
    more = {name: told[name] for name in ("hides", "elsewhere") if name in told}
    if isinstance(answer, CourierError) or not more or answer.status == "refused":
        return answer
    return replace(answer, result={**more, **answer.result})


def _note_begun(begun: Mapping[Item, Any], context: PassContext, shown: Mapping[Item, Mapping[str, Any]]) -> None:
    """Of studies that are still open: which servers have answered, and what, for the next attempt and the report."""
    noted = [
        ItemOutcome(
            item,
            "open",
            server=context.known(item).server,
            result={**context.known(item).result, **shown.get(item, {}), "servers": fates},
        )
        for item, fates in begun.items()
        if fates
    ]
    if noted:
        attempt, chunk = context.attempt, noted[0].item.number // CHUNK_ITEMS
        Batches(attempt.ledger).record_outcomes(
            context.batch, "apply", chunk, noted, job_id=attempt.job_id, fence=attempt.fence
        )


def _back_up(item: Item, folder: str, context: PassContext) -> ItemOutcome:
    """Write a copy per server that has the study; the item stays open, to be deleted in the next attempt."""
    copies: dict[str, Any] = {}
    warnings: list[str] = []
    for pacs in _servers(item, context):
        backup = back_up(pacs, item.text, folder, context.attempt, context.services.destinations)
        if backup is not None:
            copies[pacs.server.name] = told = asdict(backup)
            if not told.pop("overwrites_prevented"):
                warnings = [OVERWRITE_NOT_PREVENTED]
    if not copies:
        _check_not_hidden(item, context)
        return ItemOutcome(item, "not_there", server=item.server)
    elsewhere = _with_study(item, context, but=copies, silent=True)
    result = {"kept": copies, "elsewhere": elsewhere, **({"warnings": warnings} if warnings else {})}
    return ItemOutcome(item, "open", server=next(iter(copies)), result=result)


def _check_not_hidden(item: Item, context: PassContext) -> None:
    """Of what is hidden no copy can be read."""
    for pacs in _servers(item, context):
        if reachable(pacs, "study", item.text, permanent=_is_permanent(context.batch)):
            name = pacs.server.name
            sentence = f"{name} hides all images of the study, so no backup of them can be made; nothing was deleted."
            raise InvalidRequest(sentence, server_name=name, server_type=pacs.server.type)


def _with_study(item: Item, context: PassContext, *, but: Collection[str], silent: bool) -> list[str]:
    """The further servers that have the study; those that are silent too, or their error."""
    found = []
    for pacs in context.services.fleet:
        if pacs.server.name not in but:
            try:
                there = bool(pacs.find("study", item.text))
            except CourierError:
                if not silent:
                    raise
                there = True
            found += [pacs.server.name] * there
    return found


def _check_backups(item: Item, known: Mapping[str, Backup], context: PassContext) -> None:
    """Nothing is deleted that is not in its archive as it is now, which is read back and compared."""
    for name, backup in known.items():
        pacs = context.services.fleet[name]
        if not pacs.find("study", item.text):
            continue
        prove(pacs, item.text, backup, context.services)
        if not is_all_backed_up(pacs, item.text, backup, context.services.destinations):
            raise has_others(pacs, backup)


def _deleted(
    item: Item,
    servers: Sequence[Pacs],
    context: PassContext,
    *,
    resumed: bool,
    begun: dict[Item, Any],
    known: Mapping[str, Backup] = MappingProxyType({}),
) -> ItemOutcome:
    """On all servers, of which those in ``known`` have a copy; where one is silent, ``begun`` says what others did."""
    permanent, receipts = _is_permanent(context.batch), Receipts.of(context.attempt)
    fates: dict[str, Deletion] = {}
    errors: list[CourierError] = []
    for pacs in servers:
        name = pacs.server.name
        ours = _may_be_ours(item, name, context, resumed=resumed)
        try:
            if permanent and name in known:
                deletion = remove_backed_up(pacs, item.text, known[name], receipts, resumed=resumed)
                fates[name] = as_done(deletion, pacs, "study", permanent=True)
            else:
                fates[name] = remove(pacs, [Found("study", item.text)], receipts, permanent=permanent, resumed=ours)
        except Refused as error:
            fates[name] = Deletion(DeletionFate.REFUSED, error.message, error.payload["code"])
        except CourierError as error:
            errors.append(error)
    if errors:
        begun[item] = {name: _STATUS[deletion.fate] for name, deletion in fates.items()}
        raise first_to_wait_for(errors)
    return _concluded(item, fates)


def _may_be_ours(item: Item, name: str, context: PassContext, *, resumed: bool) -> bool:
    """Whether "not there" means that an earlier attempt has deleted it on that server; what was kept had been there."""
    told = context.known(item).result
    if name in told.get("kept", {}):
        return True
    fate = told.get("servers", {}).get(name)
    if fate is not None:
        return fate in ("deleted", "hidden")
    on = context.known(item, "survey").result.get("on")
    return resumed and (on is None or name in on)


def _concluded(item: Item, fates: Mapping[str, Deletion]) -> ItemOutcome:
    """What all servers' fates come to; each is told where there are several."""
    statuses = {name: _STATUS[deletion.fate] for name, deletion in fates.items()}
    name = min(statuses, key=lambda one: _MOST_FIRST.index(statuses[one]))
    status, note = statuses[name], fates[name].note
    result = {"servers": statuses} if len(statuses) > 1 else {}
    code, why = (fates[name].code, note) if status == "refused" else ("", "")
    return ItemOutcome(item, status, code, why, result, "" if name == item.server else name)


# --- verify and undo --------------------------------------------------------------------------------------------


def _verified(item: Item, context: PassContext) -> ItemOutcome:
    known = context.known(item)
    names = list(known.result.get("servers", {})) or [known.server_name]
    if names == [""]:  # it was nowhere
        names = [pacs.server.name for pacs in _servers(item, context)]
    permanent = _is_permanent(context.batch) and known.status != "hidden"
    there: dict[str, ItemStatus] = {
        name: "differs"
        if reachable(context.services.fleet[name], "study", item.text, permanent=permanent)
        else "verified"
        for name in names
    }
    result = {"servers": there} if len(there) > 1 else {}
    again = [name for name, status in there.items() if status == "differs"]
    if again:
        sentence = f"{' and '.join(again)} {'has' if len(again) == 1 else 'have'} the study (again)."
        return ItemOutcome(item, "differs", server=again[0], message=sentence, result=result)
    return ItemOutcome(item, "verified", server=names[0], result=result)


def _check_not_elsewhere(item: Item, context: PassContext) -> None:
    """What comes back splits no study: one that has begun anew since on another server stays there.

    Where the plan names servers, another item of it may just have come back to one of those.
    """
    told = context.known(item).result
    ours = {*told.get("kept", {}), *told.get("hides", {}), *told.get("elsewhere", ()), *context.batch.servers}
    if new := _with_study(item, context, but=ours, silent=False):
        sentence = f"{new[0]} has got images of the study since it was deleted; move them, then undo the batch again."
        raise StudyConflict(sentence, server_name=new[0], server_type=context.services.fleet[new[0]].server.type)


def _undone(item: Item, context: PassContext) -> ItemOutcome:
    known = context.known(item)
    if known.status == "not_there":
        return ItemOutcome(item, "not_there", server=known.server_name)
    fates = {known.server_name: known.status, **known.result.get("servers", {})}
    hides = {name: told for name, told in known.result.get("hides", {}).items() if fates.get(name) == "hidden"}
    backups = {name: told for name, told in (known.result.get("kept") or {}).items() if name not in hides}
    lost = [name for name, fate in fates.items() if fate == "deleted" and name not in backups]
    if lost or not (backups or hides):
        raise InvalidRequest(
            "No copy was kept, so this cannot be taken back; order deletions with backup (once: keep)."
        )
    _check_not_elsewhere(item, context)
    results: dict[str, Any] = {}
    for name, told in hides.items():
        results[name] = show_again(context.services.fleet[name], item.text, told, Receipts.of(context.attempt))
    for name, told in backups.items():
        results[name] = restore(context.services.fleet[name], item.text, Backup(**told), context)
    return ItemOutcome(item, "undone", server=next(iter(results)), result={"servers": results})
