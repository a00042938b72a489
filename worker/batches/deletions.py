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
from courier.batches.store import CHUNK_ITEMS, Batch, Batches, Item, ItemStatus, Pass, Row, Settled
from courier.errors import ConfirmationRequired, CourierError, InvalidRequest, Refused, StudyConflict, first_to_wait_for
from courier.messages import BatchDeleteJob, check_uid, read_job
from worker.batches.backups import Kept, has_others, is_all_kept, keep, prove, remove_kept, restore
from worker.batches.confirmations import Command
from worker.batches.coordinator import Answer, Desk, Work, order, unbegun
from worker.batches.hidden import show_again, what_is_shown
from worker.batches.study_lists import planned_studies
from worker.jobs.attempt import Run
from worker.jobs.delete import as_done, asked, forget_what_is_gone, reachable, remove
from worker.jobs.download import OVERWRITE_NOT_PREVENTED
from worker.jobs.receipts import Receipts
from worker.jobs.services import Tools
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
    def passes(self) -> Mapping[Pass, Work]:
        return {"survey": self.survey, "apply": self.apply, "verify": self.verify, "undo": self.undo}

    def check(self, item: Planned) -> Planned:
        check_uid(item.text)
        return item

    def refuse_forbidden(self, command: Command, batch: Batch, fleet: Fleet) -> None:
        if command in ("apply", "retry") and batch.order.get("servers") is not None:
            check_allowed(fleet.known(batch.order["servers"]), permanent=_is_permanent(batch))

    def study_at_stake(self, command: Command, row: Row, batch: Batch, fleet: Fleet) -> str | None:
        """What the settings forbid to delete where it is planned is not at stake: it is refused."""
        wanted = {"apply": ("open",), "retry": ("open", "failed")}.get(command, ())
        if row.settled.status not in wanted:
            return None
        planned = fleet.known([row.item.server])
        forbidden = planned and refusal(planned[0], permanent=_is_permanent(batch))
        return None if forbidden else row.item.text

    def pages(self, desk: Desk) -> Iterator[Sequence[Planned]]:
        servers = asked(desk.batch.order.get("servers"), desk.tools.fleet)
        return planned_studies(desk, servers, rest_is_reached=True)

    def survey(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:  # noqa: ARG002
        """Who has the study; one that a list has just shown is not asked for again.

        What the settings forbid everywhere is refused here.
        """
        unknown = [item for item in items if not item.server]
        found = _together(unknown, _seen, desk)
        return [found.get(item) or _forbidden(item, [item.server], desk) or Settled(item, "planned") for item in items]

    def apply(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:
        ledger, run = desk.tools.ledger, desk.run
        try:
            ready = _shut(items, desk)
            shown, done = _note_what_is_shown(ready, desk)
            begun: dict[Item, Any] = {}
            ready = [item for item in ready if item not in done]
            done |= _together(ready, partial(_applied, resumed=resumed, begun=begun), desk)
            done = {item: _with_result(answer, shown.get(item, {})) for item, answer in done.items()}
            _note_begun(begun, desk, shown)
            over = [item for item, answer in done.items() if isinstance(answer, Settled) and answer.status != "open"]
            forget_what_is_gone({item.text for item in over}, desk.tools)
        finally:
            ledger.let_go(run.job_id, fence=run.fence)
        return [done.get(item) for item in items]

    def verify(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:  # noqa: ARG002
        """Whether it is still gone from where it was deleted. The claim of a study that was nowhere goes here."""
        done = _together(items, _verified, desk)
        forget_what_is_gone({item.text for item in items if desk.known(item).status == "not_there"}, desk.tools)
        return list(done.values())

    def undo(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]:  # noqa: ARG002
        """Show again what was hidden, bring back what was kept; what was neither is refused."""
        ledger, run = desk.tools.ledger, desk.run
        try:
            ready = _shut(items, desk)
            done = _together(ready, _undone, desk)
        finally:
            ledger.let_go(run.job_id, fence=run.fence)
        return [done.get(item) for item in items]


def _shut(items: Sequence[Item], desk: Desk) -> list[Item]:
    """Those of the studies that no other job is storing into or deleting; new jobs are kept out of all of them."""
    run, ledger = desk.run, desk.tools.ledger
    return [item for item in items if run.is_free(ledger.shut(item.text, job_id=run.job_id, fence=run.fence))]


def delete_many(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """`pacs.batch.delete`: see `order`.

    Raises
    ------
    ConfirmationRequired
        Everything is to be deleted, and ``confirm`` is not the sentence.
    InvalidRequest
        A field or a server is not known, a server cannot answer for what matches the filters, the settings forbid the
        deletion on it, or nothing may be written where backups go. Nothing has begun.
    """
    with unbegun(run, tools):
        job = read_job(BatchDeleteJob, message)
        if job.everything and not job.dry_run and job.confirm != CONFIRMATION:
            raise ConfirmationRequired(f'Nothing was deleted: confirm has to be "{CONFIRMATION}".')
        servers = asked(job.servers, tools.fleet)
        if job.servers is not None:
            check_allowed(servers, permanent=job.permanent)
        check_order_filters(servers, job.filters)
        check_backup(job.backup, tools)
    return order(message, run, tools, kind=StudyDeletions(), name="delete", form=BatchDeleteJob)


def check_backup(place: str | None, tools: Tools) -> None:
    """`InvalidRequest` if nothing may be written where the backups of an order go; without a place there are none."""
    if place is not None:
        tools.destinations.archive(f"{place.rstrip('/')}/0.zip")


def _together(
    items: Sequence[Item], step: Callable[[Item, Desk], Settled], desk: Desk
) -> dict[Item, Settled | CourierError]:
    """What ``step`` makes of each of the items, all at the same time."""
    answers = desk.tools.fleet.gather([partial(step, item, desk) for item in items])
    return dict(zip(items, answers, strict=True))


def _servers(item: Item, desk: Desk) -> list[Pacs]:
    names = desk.batch.order.get("servers")
    if item.server and names is not None and item.server not in names:
        sentence = (
            f"It is to be deleted on {item.server}, and the batch only on {' and '.join(names)}; nothing was deleted."
        )
        raise InvalidRequest(sentence)
    if item.server:
        names = [item.server]
    servers = asked(names, desk.tools.fleet)
    types = desk.batch.types
    # A server that came into the settings later stood in no plan.
    return [pacs for pacs in servers if names is not None or not types or pacs.server.name in types]


def _seen(item: Item, desk: Desk) -> Settled:
    """Which servers have the study; one that is silent raises, because nobody knows what would be deleted."""
    permanent = _is_permanent(desk.batch)
    servers = _servers(item, desk)
    names = [pacs.server.name for pacs in servers if reachable(pacs, "study", item.text, permanent=permanent)]
    if not names:
        return Settled(item, "not_there", "not_found", "No server that was asked has the study.")
    return _forbidden(item, names, desk) or Settled(item, "planned", server=names[0], result={"on": names})


def _forbidden(item: Item, names: Sequence[str], desk: Desk) -> Settled | None:
    """The item refused, if the settings forbid it on each of the servers that have the study."""
    reasons = [refusal(desk.tools.fleet[name], permanent=_is_permanent(desk.batch)) for name in names]
    if not all(reasons):
        return None
    return Settled(item, "refused", InvalidRequest.code, " ".join(reasons), server=names[0])


def _is_permanent(batch: Batch) -> bool:
    return bool(batch.order.get("permanent", True))


# --- apply ------------------------------------------------------------------------------------------------------


def _applied(item: Item, desk: Desk, *, resumed: set[int], begun: dict[Item, Any]) -> Settled:
    """One step with one study: keep its copies, or delete it."""
    if item.server and item.number not in resumed and (refused := _forbidden(item, [item.server], desk)):
        return refused
    folder = desk.batch.order.get("backup") or desk.batch.order.get("keep")  # as version 0.1 called it
    if folder is None:
        return _deleted(item, _servers(item, desk), desk, resumed=item.number in resumed, begun=begun)
    known = {name: Kept(**told) for name, told in desk.known(item).result.get("kept", {}).items()}
    if not known:
        return _keep(item, f"{str(folder).rstrip('/')}/{desk.batch.id}", desk)
    _check_kept(item, known, desk)
    servers = [desk.tools.fleet[name] for name in known]
    settled = _deleted(item, servers, desk, resumed=item.number in resumed, begun=begun, known=known)
    told = desk.known(item).result
    written_down = {name: told[name] for name in ("kept", "elsewhere", "warnings") if name in told}
    return replace(settled, result={**settled.result, **written_down})


def _note_what_is_shown(
    items: Sequence[Item], desk: Desk
) -> tuple[dict[Item, Mapping[str, Any]], dict[Item, Settled | CourierError]]:
    """Write down what an undo of a hide has to know, before anything is hidden; and the errors of those items where
    that cannot be told.
    """
    if _is_permanent(desk.batch):
        return {}, {}
    known = {item: desk.known(item).result for item in items if "hides" in desk.known(item).result}
    told = _together([item for item in items if item not in known], _to_be_hidden, desk)
    new = {item: one for item, one in told.items() if isinstance(one, Settled) and one.result}
    if new:
        run, chunk = desk.run, next(iter(new)).number // CHUNK_ITEMS
        Batches(run.ledger).settle(desk.batch, "apply", chunk, new.values(), job_id=run.job_id, fence=run.fence)
    known |= {item: one.result for item, one in new.items()}
    return known, {item: one for item, one in told.items() if isinstance(one, CourierError)}


def _to_be_hidden(item: Item, desk: Desk) -> Settled:
    servers = _servers(item, desk)
    hides = {pacs.server.name: told for pacs in servers if (told := what_is_shown(pacs, item.text)) is not None}
    if not hides:
        return Settled(item, "open", server=desk.known(item).server)
    others = _with_study(item, desk, but=[pacs.server.name for pacs in servers], silent=True)
    result = {"elsewhere": others, **desk.known(item).result, "hides": hides}
    return Settled(item, "open", server=desk.known(item).server, result=result)


def _with_result(answer: Settled | CourierError, told: Mapping[str, Any]) -> Settled | CourierError:
    """``answer``, with what has to be known to show again what it has hidden."""
    more = {name: told[name] for name in ("hides", "elsewhere") if name in told}
    if isinstance(answer, CourierError) or not more or answer.status == "refused":
        return answer
    return replace(answer, result={**more, **answer.result})


def _note_begun(begun: Mapping[Item, Any], desk: Desk, shown: Mapping[Item, Mapping[str, Any]]) -> None:
    """Of studies that are still open: which servers have answered, and what, for the next attempt and the report."""
    noted = [
        Settled(
            item,
            "open",
            server=desk.known(item).server,
            result={**desk.known(item).result, **shown.get(item, {}), "servers": fates},
        )
        for item, fates in begun.items()
        if fates
    ]
    if noted:
        run, chunk = desk.run, noted[0].item.number // CHUNK_ITEMS
        Batches(run.ledger).settle(desk.batch, "apply", chunk, noted, job_id=run.job_id, fence=run.fence)


def _keep(item: Item, folder: str, desk: Desk) -> Settled:
    """Write a copy per server that has the study; the item stays open, to be deleted in the next attempt."""
    copies: dict[str, Any] = {}
    warnings: list[str] = []
    for pacs in _servers(item, desk):
        kept = keep(pacs, item.text, folder, desk.run, desk.tools.destinations)
        if kept is not None:
            copies[pacs.server.name] = told = asdict(kept)
            if not told.pop("overwrites_prevented"):
                warnings = [OVERWRITE_NOT_PREVENTED]
    if not copies:
        _check_not_hidden(item, desk)
        return Settled(item, "not_there", server=item.server)
    elsewhere = _with_study(item, desk, but=copies, silent=True)
    result = {"kept": copies, "elsewhere": elsewhere, **({"warnings": warnings} if warnings else {})}
    return Settled(item, "open", server=next(iter(copies)), result=result)


def _check_not_hidden(item: Item, desk: Desk) -> None:
    """Of what is hidden no copy can be read."""
    for pacs in _servers(item, desk):
        if reachable(pacs, "study", item.text, permanent=_is_permanent(desk.batch)):
            name = pacs.server.name
            sentence = f"{name} hides all images of the study, so no backup of them can be made; nothing was deleted."
            raise InvalidRequest(sentence, server_name=name, server_type=pacs.server.type)


def _with_study(item: Item, desk: Desk, *, but: Collection[str], silent: bool) -> list[str]:
    """The further servers that have the study; those that are silent too, or their error."""
    found = []
    for pacs in desk.tools.fleet:
        if pacs.server.name not in but:
            try:
                there = bool(pacs.find("study", item.text))
            except CourierError:
                if not silent:
                    raise
                there = True
            found += [pacs.server.name] * there
    return found


def _check_kept(item: Item, known: Mapping[str, Kept], desk: Desk) -> None:
    """Nothing is deleted that is not in its archive as it is now, which is read back and compared."""
    for name, kept in known.items():
        pacs = desk.tools.fleet[name]
        if not pacs.find("study", item.text):
            continue
        prove(pacs, item.text, kept, desk.tools)
        if not is_all_kept(pacs, item.text, kept, desk.tools.destinations):
            raise has_others(pacs, kept)


def _deleted(
    item: Item,
    servers: Sequence[Pacs],
    desk: Desk,
    *,
    resumed: bool,
    begun: dict[Item, Any],
    known: Mapping[str, Kept] = MappingProxyType({}),
) -> Settled:
    """On all servers, of which those in ``known`` have a copy; where one is silent, ``begun`` says what others did."""
    permanent, receipts = _is_permanent(desk.batch), Receipts.of(desk.run)
    fates: dict[str, Deletion] = {}
    errors: list[CourierError] = []
    for pacs in servers:
        name = pacs.server.name
        ours = _may_be_ours(item, name, desk, resumed=resumed)
        try:
            if permanent and name in known:
                deletion = remove_kept(pacs, item.text, known[name], receipts, resumed=resumed)
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


def _may_be_ours(item: Item, name: str, desk: Desk, *, resumed: bool) -> bool:
    """Whether "not there" means that an earlier attempt has deleted it on that server; what was kept had been there."""
    told = desk.known(item).result
    if name in told.get("kept", {}):
        return True
    fate = told.get("servers", {}).get(name)
    if fate is not None:
        return fate in ("deleted", "hidden")
    on = desk.known(item, "survey").result.get("on")
    return resumed and (on is None or name in on)


def _concluded(item: Item, fates: Mapping[str, Deletion]) -> Settled:
    """What all servers' fates come to; each is told where there are several."""
    statuses = {name: _STATUS[deletion.fate] for name, deletion in fates.items()}
    name = min(statuses, key=lambda one: _MOST_FIRST.index(statuses[one]))
    status, note = statuses[name], fates[name].note
    result = {"servers": statuses} if len(statuses) > 1 else {}
    code, why = (fates[name].code, note) if status == "refused" else ("", "")
    return Settled(item, status, code, why, result, "" if name == item.server else name)


# --- verify and undo --------------------------------------------------------------------------------------------


def _verified(item: Item, desk: Desk) -> Settled:
    known = desk.known(item)
    names = list(known.result.get("servers", {})) or [known.server_name]
    if names == [""]:  # it was nowhere
        names = [pacs.server.name for pacs in _servers(item, desk)]
    permanent = _is_permanent(desk.batch) and known.status != "hidden"
    there: dict[str, ItemStatus] = {
        name: "differs" if reachable(desk.tools.fleet[name], "study", item.text, permanent=permanent) else "verified"
        for name in names
    }
    result = {"servers": there} if len(there) > 1 else {}
    again = [name for name, status in there.items() if status == "differs"]
    if again:
        sentence = f"{' and '.join(again)} {'has' if len(again) == 1 else 'have'} the study (again)."
        return Settled(item, "differs", server=again[0], message=sentence, result=result)
    return Settled(item, "verified", server=names[0], result=result)


def _check_not_elsewhere(item: Item, desk: Desk) -> None:
    """What comes back splits no study: one that has begun anew since on another server stays there.

    Where the plan names servers, another item of it may just have come back to one of those.
    """
    told = desk.known(item).result
    ours = {*told.get("kept", {}), *told.get("hides", {}), *told.get("elsewhere", ()), *desk.batch.servers}
    if new := _with_study(item, desk, but=ours, silent=False):
        sentence = f"{new[0]} has got images of the study since it was deleted; move them, then undo the batch again."
        raise StudyConflict(sentence, server_name=new[0], server_type=desk.tools.fleet[new[0]].server.type)


def _undone(item: Item, desk: Desk) -> Settled:
    known = desk.known(item)
    if known.status == "not_there":
        return Settled(item, "not_there", server=known.server_name)
    fates = {known.server_name: known.status, **known.result.get("servers", {})}
    hides = {name: told for name, told in known.result.get("hides", {}).items() if fates.get(name) == "hidden"}
    kept = {name: told for name, told in (known.result.get("kept") or {}).items() if name not in hides}
    lost = [name for name, fate in fates.items() if fate == "deleted" and name not in kept]
    if lost or not (kept or hides):
        raise InvalidRequest(
            "No copy was kept, so this cannot be taken back; order deletions with backup (once: keep)."
        )
    _check_not_elsewhere(item, desk)
    results: dict[str, Any] = {}
    for name, told in hides.items():
        results[name] = show_again(desk.tools.fleet[name], item.text, told)
    for name, told in kept.items():
        results[name] = restore(desk.tools.fleet[name], item.text, Kept(**told), desk)
    return Settled(item, "undone", server=next(iter(results)), result={"servers": results})
