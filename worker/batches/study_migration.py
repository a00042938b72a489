"""One study's way from one server to another, pass by pass: look, copy, verify, delete the source's copy, take it back.

How images get across is in `worker.batches.study_copy`; here: which are copied, what proves that they arrived,
and what is written down before each step, so that the next attempt goes on where a crashed one stopped. The caller has
the study's lock for delete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from courier.errors import CourierError, InvalidRequest, NotFound, PacsMisanswered, PacsRejected, StudyConflict
from worker.batches.equality import Compared, Side, compare
from worker.batches.removals import Removal, hidden_on, remove_images, remove_study
from worker.batches.study_copy import Transfer, bare_digests_on, copy_images, digests_on, images_on, listed_on, pending
from worker.jobs.hangs import poisoned
from worker.pacs.notes import is_rejection_note
from worker.pacs.protection import check_two_archives, refusal
from worker.pacs.protocol import Deletion, DeletionFate, Fate, Found, Pacs

Digests = Literal["all", "sample", "none"]
#: So often in one verification a study that has grown is brought up to date before it is given up.
TOP_UPS = 3
#: After so many attempts, what a broken store has left behind on the target is removed (docs/pacs-oddities.md).
ATTEMPTS_BEFORE_REMOVAL = 3
#: A report names so many of the images that went wrong.
TOLD = 10


@dataclass(frozen=True)
class ListedImages:
    """Which images of a study both servers list, each with its series; ``on_source`` without what is left out."""

    on_source: Mapping[str, str]
    on_target: Mapping[str, str]

    @property
    def missing(self) -> set[str]:
        return self.on_source.keys() - self.on_target.keys()

    @classmethod
    def read_lists(cls, transfer: Transfer, *, notes_too: bool = False) -> ListedImages:
        """What the source lists as a rejection note is left out, and known to ``transfer`` then; or ``notes_too``."""
        study_uid = transfer.study_uid
        listed = listed_on(transfer.source, study_uid)
        if transfer.leaves_notes and not notes_too:
            transfer.leave_out(str(one.sop_instance_uid) for one in listed if is_rejection_note(one.attributes))
        uids = {str(one.sop_instance_uid): str(one.series_instance_uid) for one in listed}
        on_source = {uid: series for uid, series in uids.items() if notes_too or uid not in transfer.moot}
        return cls(on_source, images_on(transfer.target, study_uid))


@dataclass(frozen=True)
class CopiedSet:
    """Images that a pass put on the target, with one digest over those of all of them as they passed, in order.

    None: an attempt that was cut short brought some of them, and their digests died with it.
    """

    uids: frozenset[str]
    digest: str | None

    def is_among(self, given: Mapping[str, str]) -> bool:
        """Whether ``given``, digests by UID, are of what passed."""
        return self.uids <= given.keys() and self.is_of(given[uid] for uid in self.uids)

    def is_of(self, digests: Iterable[str]) -> bool:
        """Whether these are the digests of what passed. Images have their UIDs in them, so no order is needed."""
        return self.digest is not None and digest_over(digests) == self.digest


@dataclass
class MigrationReceipt:
    """What a batch knows of a study that it brings over; verification and undo go by it.

    ``before``: what the target had when the pass under way first touched the study; None when none is. ``shared``: what
    both servers had anyway, known once the source's copy goes. ``removing``: what an undo is about to remove.
    ``hidden_before``: while a copy is removed, what its server hid of the study before that; None when none is.
    ``faults``: how often the target failed at images that it has not got yet, and since when; ``hangs``: how often it
    had hung at those that were given up for it. ``notes``: rejection notes of the source, which are left out. ``save``
    is called before anything is done that could not be told from what others do.
    """

    #: What it is made of as JSON.
    FIELDS: ClassVar = (
        "parcels",
        "before",
        "shared",
        "source_deleted",
        "removing",
        "hidden_before",
        "faults",
        "hangs",
        "notes",
    )

    copied_sets: list[CopiedSet] = field(default_factory=list)
    before: frozenset[str] | None = None
    shared: frozenset[str] = frozenset()
    source_deleted: bool = False
    removing: frozenset[str] | None = None
    hidden_before: frozenset[str] | None = None
    faults: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    hangs: Mapping[str, int] = field(default_factory=dict)
    notes: frozenset[str] = frozenset()
    save: Callable[[MigrationReceipt], None] = lambda _: None

    @property
    def added(self) -> frozenset[str]:
        return frozenset(uid for copied_set in self.copied_sets for uid in copied_set.uids)

    @property
    def moved(self) -> frozenset[str]:
        """What the source had when its copy was deleted."""
        return self.added | self.shared

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "parcels": [
                {"uids": sorted(copied_set.uids), "digest": copied_set.digest} for copied_set in self.copied_sets
            ],
            "before": None if self.before is None else sorted(self.before),
            "shared": sorted(self.shared),
            "source_deleted": self.source_deleted,
            "removing": None if self.removing is None else sorted(self.removing),
            "hidden_before": None if self.hidden_before is None else sorted(self.hidden_before),
            "faults": {uid: list(told) for uid, told in sorted(self.faults.items())},
            "hangs": dict(sorted(self.hangs.items())),
            "notes": sorted(self.notes),
        }
        return {name: value for name, value in told.items() if value or value == []}

    @classmethod
    def from_json(cls, told: Mapping[str, Any], *, save: Callable[[MigrationReceipt], None]) -> MigrationReceipt:
        return cls(
            copied_sets=[CopiedSet(frozenset(one["uids"]), one["digest"]) for one in told.get("parcels", ())],
            before=frozenset(told["before"]) if "before" in told else None,
            shared=frozenset(told.get("shared", ())),
            source_deleted=bool(told.get("source_deleted")),
            removing=frozenset(told["removing"]) if "removing" in told else None,
            hidden_before=frozenset(told["hidden_before"]) if "hidden_before" in told else None,
            faults={uid: (faults, since_s) for uid, (faults, since_s) in told.get("faults", {}).items()},
            hangs=dict(told.get("hangs", {})),
            notes=frozenset(told.get("notes", ())),
            save=save,
        )


# --- survey -----------------------------------------------------------------------------------------------------


def preflight_study(transfer: Transfer, others: Mapping[str, bool | None]) -> dict[str, Any]:
    """What a migration of the study would come to. ``others``: whether each further server has it; None, it is silent.

    Raises
    ------
    NotFound
        The source does not have it.
    """
    seen = ListedImages.read_lists(transfer)
    _check_found(transfer, seen)
    warnings = [f"study_split: it is on {name} too" for name, there in others.items() if there]
    warnings += [f"{name} did not say whether it has the study" for name, there in others.items() if there is None]
    warnings += [note] if (note := what_is_left_out(transfer.moot, transfer.source)) else []
    return {
        "images": len(seen.on_source),
        "images_on_target": len(seen.on_target),
        "missing": len(seen.missing),
        "warnings": warnings,
    }


# --- copy -------------------------------------------------------------------------------------------------------


def copy_study(transfer: Transfer, receipt: MigrationReceipt, *, attempt: int = 1) -> dict[str, Any]:
    """Bring over what the target lacks. The receipt then says what was added; the figures are for the report.

    Raises
    ------
    NotFound
        The source does not have the study.
    StudyConflict, PacsRejected
        The target refuses some of the images for good; the others are there, and in the receipt.
    CourierError
        A server failed; the next attempt brings what is left.
    """
    transfer.leave_out(receipt.notes)
    seen = ListedImages.read_lists(transfer)
    _check_found(transfer, seen)
    _begin(transfer, receipt, seen)
    before = receipt.before or frozenset()
    if seen.missing:
        _copy_missing(transfer, receipt, seen, attempt=attempt)
    added = _note_copied_set(transfer, receipt, seen)
    receipt.hangs = transfer.given_up
    _check_accepted(transfer)
    return {
        "images": len((seen.on_source.keys() | transfer.settled) - transfer.moot),
        "added": added,
        "there_before": len(seen.on_source.keys() & before),
        "size_bytes": transfer.size_bytes,
        "warnings": sorted(transfer.warnings),
    }


def _begin(transfer: Transfer, receipt: MigrationReceipt, seen: ListedImages) -> None:
    """Write down what was on the target before the pass touches the study, if it is going to."""
    transfer.resumed = receipt.before is not None
    if receipt.before is None and seen.missing:
        receipt.before = frozenset(seen.on_target)
        receipt.save(receipt)


def _copy_missing(transfer: Transfer, receipt: MigrationReceipt, seen: ListedImages, *, attempt: int) -> None:
    transfer.faults, transfer.hangs_seen = dict(receipt.faults), receipt.hangs
    try:
        copy_images(transfer, seen.missing, on_source=seen.on_source, on_target=seen.on_target)
        receipt.faults = {}
    except CourierError:
        if transfer.faults:
            receipt.faults = {uid: told for uid, told in transfer.faults.items() if uid not in transfer.settled}
            receipt.save(receipt)
        if attempt >= ATTEMPTS_BEFORE_REMOVAL:
            _clear_pending(transfer)
        raise


def _clear_pending(transfer: Transfer) -> None:
    """An image that is "being stored" for ever was left behind by a store that broke; deleting it helps."""
    for uid in pending(transfer):
        image = Found("image", transfer.study_uid, transfer.listed[uid], uid)
        transfer.receipts.delete(transfer.target, image, permanent=True)


def _note_copied_set(transfer: Transfer, receipt: MigrationReceipt, first: ListedImages) -> int:
    """Enter into the receipt what the pass has added, an earlier attempt included; how many images that are.

    What an earlier attempt added was there at the ``first`` look.
    """
    earlier = _by_earlier_attempt(receipt, first)
    uids = earlier | transfer.stored.keys()
    if uids:
        digest = None if earlier else digest_over(transfer.stored.values())
        receipt.copied_sets.append(CopiedSet(frozenset(uids), digest))
    receipt.before = None
    receipt.notes |= transfer.moot
    return len(uids)


def _by_earlier_attempt(receipt: MigrationReceipt, seen: ListedImages) -> set[str]:
    if receipt.before is None:
        return set()
    return (seen.on_target.keys() & seen.on_source.keys()) - receipt.before


def digest_over(digests: Iterable[str]) -> str:
    """One digest for many images: of theirs, in order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _check_found(transfer: Transfer, seen: ListedImages) -> None:
    if not seen.on_source:
        on_target = f"; {transfer.target.server.name} has {len(seen.on_target)} images of it" if seen.on_target else ""
        sentence = f"{transfer.source.server.name} does not have the study{on_target}."
        raise transfer.error(NotFound, transfer.source, sentence)


def _check_accepted(transfer: Transfer) -> None:
    """The first image that the target will never take speaks for the others; then the first that is not sent again."""
    refused = {uid: outcome for uid, outcome in transfer.refused.items() if not outcome.is_moot}
    if not refused:
        _check_none_given_up(transfer)
        return
    uid, outcome = min(refused.items())
    kind = StudyConflict if outcome.fate is Fate.CONFLICT else PacsRejected
    name, count = transfer.target.server.name, len(refused)
    said = outcome.message or "It names no reason."
    error = transfer.error(kind, transfer.target, f"{name} will not take {count} of the images, {uid} for one. {said}")
    error.payload["details"] |= {**outcome.details, "refused": sorted(refused)[:TOLD]}
    raise error


def _check_none_given_up(transfer: Transfer) -> None:
    if transfer.given_up:
        uid, hangs = min(transfer.given_up.items())
        raise poisoned(transfer.target, hangs, {"study_uid": transfer.study_uid, "image_uid": uid})


def what_is_left_out(notes: Collection[str], source: Pacs) -> str:
    """A sentence about rejection notes that are not copied; "" if there are none."""
    if not notes:
        return ""
    what = f"{len(notes)} rejection note{'s' if len(notes) > 1 else ''} of {source.server.name}"
    return (
        f"{what} {'are' if len(notes) > 1 else 'is'} left out, {min(notes)} for one: it says which images an archive"
        " hides, and is no image."
    )


# --- verify -----------------------------------------------------------------------------------------------------


def verify_study(
    transfer: Transfer, receipt: MigrationReceipt, *, digests: Digests, attempt: int = 1, moves: bool = False
) -> dict[str, Any]:
    """Prove that the target has all that the source has, bringing over what the source has got meanwhile.

    ``moves``: the source's copy is deleted next, so both servers are read for every image, as `delete_source` demands.

    Raises
    ------
    NotFound
        The source no longer has the study.
    StudyConflict
        Images differ although they bear the same UIDs (``details["different"]``), or the study grows faster than it is
        brought over.
    """
    transfer.leave_out(receipt.notes)
    seen = first = ListedImages.read_lists(transfer)
    _check_found(transfer, seen)
    _begin(transfer, receipt, seen)
    lost = seen.missing & receipt.added
    for _ in range(TOP_UPS):
        if not seen.missing - transfer.refused.keys():
            break
        _copy_missing(transfer, receipt, seen, attempt=attempt)
        seen = ListedImages.read_lists(transfer)
    touched = receipt.before is not None
    receipt.copied_sets = [
        replace(copied_set, digest=None) if copied_set.uids & lost else copied_set for copied_set in receipt.copied_sets
    ]
    copied = _note_copied_set(transfer, receipt, first)
    if touched:
        receipt.save(receipt)
    _check_accepted(transfer)
    _check_complete(transfer, seen)
    return {
        "images": len(seen.on_source),
        "images_on_target": len(seen.on_target),
        "topped_up": copied - len(lost),
        "lost": len(lost),
        "size_bytes": transfer.size_bytes,
        "notes": sorted(transfer.moot),
        **(_compare_all(transfer, seen) if moves else _compare(transfer, seen, receipt.copied_sets, digests)),
    }


def verify_moved(transfer: Transfer, receipt: MigrationReceipt, *, digests: Digests) -> dict[str, Any]:
    """As `verify_study`, when the source's copy is gone: the target still has all of it, as it passed.

    Raises
    ------
    StudyConflict
        The target has lost images.
    """
    on_target = _on_target(transfer, receipt.moved)
    moved = ListedImages({uid: on_target[uid] for uid in receipt.moved}, on_target)
    told = _compare(transfer, moved, receipt.copied_sets, digests, source_has=False)
    return {"images": len(receipt.moved), "images_on_target": len(on_target), "source_deleted": True, **told}


def _on_target(transfer: Transfer, moved: Collection[str]) -> dict[str, str]:
    """What the target lists, now that the source's copy is gone; `StudyConflict` if it lacks some of what was moved."""
    on_target = images_on(transfer.target, transfer.study_uid)
    if gone := set(moved) - on_target.keys():
        sentence = (
            f"{transfer.target.server.name} lacks {len(gone)} images of the study, {min(gone)} for one, and "
            f"{transfer.source.server.name} no longer has it."
        )
        error = transfer.error(StudyConflict, transfer.target, sentence)
        error.payload["details"] |= {"missing": sorted(gone)[:TOLD]}
        raise error
    return on_target


def _check_complete(transfer: Transfer, seen: ListedImages) -> None:
    if seen.missing:
        sentence = (
            f"The study on {transfer.source.server.name} grows: after {TOP_UPS} rounds {len(seen.missing)} images are "
            f"still missing on {transfer.target.server.name}. Verify the batch again when nothing is added any more."
        )
        raise transfer.error(StudyConflict, transfer.source, sentence)


def _compare(
    transfer: Transfer,
    seen: ListedImages,
    copied_sets: Sequence[CopiedSet],
    digests: Digests,
    *,
    source_has: bool = True,
) -> dict[str, Any]:
    """Compare what the target gives back with what passed, or with what the source gives now.

    What passed has been hashed on its way: where the target keeps bytes, the source is not asked again for what this
    batch has brought whole. Where a server does not keep bytes, both are read and compared element by element.
    """
    target = transfer.target
    told = {"digests": digests, "compared": 0, "compared_elements": 0, "not_kept_by": _not_kept_by(transfer)}
    wanted = _to_compare(seen, digests)
    if not wanted or not (target.keeps_bytes or source_has):
        return told
    given: dict[str, str] | None = None
    proven: set[str] = set()
    if target.keeps_bytes and (copied_sets or not source_has):
        if _is_all_one_copied_set(transfer, seen, copied_sets, wanted):
            return {**told, "compared": len(wanted)}
        given = digests_on(target, transfer.study_uid, seen.on_target, wanted)
        proven = {uid for copied_set in copied_sets if copied_set.is_among(given) for uid in copied_set.uids}
        if not source_has and (different := _not_as_they_passed(given, copied_sets, set(given) - proven)):
            raise _differ(transfer, Compared(different=different))
    found = Compared()
    if source_has:
        sides = (Side(transfer.source, seen.on_source, left_out=transfer.moot), Side(target, seen.on_target))
        found = _prove(transfer, *sides, wanted - proven, digests=given)
    return {**told, "compared": len(proven | found.by_bytes), "compared_elements": len(found.by_elements)}


def _compare_all(transfer: Transfer, seen: ListedImages) -> dict[str, Any]:
    """Read both servers for every image, because the source's copy goes next."""
    found = _prove_source(transfer, seen, seen.on_source.keys())
    compared = {"compared": len(found.by_bytes), "compared_elements": len(found.by_elements)}
    return {"digests": "all", **compared, "not_kept_by": _not_kept_by(transfer)}


def _not_kept_by(transfer: Transfer) -> list[str]:
    return [pacs.server.name for pacs in (transfer.source, transfer.target) if not pacs.keeps_bytes]


def _prove_source(transfer: Transfer, seen: ListedImages, wanted: Collection[str]) -> Compared:
    """`_prove` that the source's copy may go: the target may have had its own before."""
    source = Side(transfer.source, seen.on_source, goes=True, is_made=False, left_out=transfer.moot)
    return _prove(transfer, source, Side(transfer.target, seen.on_target), wanted)


def _prove(
    transfer: Transfer, one: Side, other: Side, wanted: Collection[str], *, digests: Mapping[str, str] | None = None
) -> Compared:
    """Prove that both servers have the same ``wanted`` images now.

    Of a copy that goes, ``transfer`` knows what is proven.

    Raises
    ------
    StudyConflict
        Some differ, or one server does not send them.
    """
    limit = transfer.max_spool_bytes
    found = compare(transfer.study_uid, one, other, wanted, max_spool_bytes=limit, digests=digests)
    if found.different:
        raise _differ(transfer, found)
    if one.goes or other.goes:
        transfer.proven |= found.same
    return found


def _is_all_one_copied_set(
    transfer: Transfer, seen: ListedImages, copied_sets: Sequence[CopiedSet], wanted: set[str]
) -> bool:
    """Whether the target has what passed in one pass and nothing else, which it takes no reading of UIDs to see."""
    if len(copied_sets) != 1 or not copied_sets[0].digest or not copied_sets[0].uids == wanted == seen.on_target.keys():
        return False
    return copied_sets[0].is_of(bare_digests_on(transfer.target, transfer.study_uid))


def _not_as_they_passed(given: Mapping[str, str], copied_sets: Sequence[CopiedSet], unproven: set[str]) -> list[str]:
    """The images of copied sets that are there whole and yet are not what passed, where the source cannot be asked."""
    whole = (
        copied_set for copied_set in copied_sets if copied_set.digest is not None and copied_set.uids <= given.keys()
    )
    return sorted(uid for copied_set in whole for uid in copied_set.uids & unproven)


def _differ(transfer: Transfer, found: Compared) -> StudyConflict:
    """``details["tags"]`` names the elements that differ, for the first of the images."""
    first = found.different[0]
    why = f" ({found.why[first]})" if first in found.why else ""
    sentence = (
        f"{len(found.different)} images on {transfer.target.server.name} are not what {transfer.source.server.name} "
        f"has, or had, under the same UIDs, {first} for one{why}; look at both before anything is deleted."
    )
    error = transfer.error(StudyConflict, transfer.target, sentence)
    error.payload["details"] |= {"different": found.different[:TOLD]}
    if found.tags:
        error.payload["details"] |= {"tags": found.tags}
    return error


def _to_compare(seen: ListedImages, digests: Digests) -> set[str]:
    """All images of the source, none, or one of each series: always the same one, whoever asks."""
    if digests != "sample":
        return set(seen.on_source) if digests == "all" else set()
    sample: dict[str, str] = {}
    for image, series in seen.on_source.items():
        sample[series] = min(sample.get(series, image), image, key=lambda uid: hashlib.sha256(uid.encode()).digest())
    return set(sample.values())


# --- the source's copy ------------------------------------------------------------------------------------------


def delete_source(transfer: Transfer, receipt: MigrationReceipt) -> None:
    """Delete the study from the source, where each of its images is proven to be the same on the target.

    What `verify_study` has not proven in this attempt is proven here; then both are looked at once more. What has to be
    known to take it back is written down before anything is deleted. Doing it again ends what an attempt that died has
    begun.

    Raises
    ------
    StudyConflict
        Images differ although they bear the same UIDs; or the target lost some as the source did.
    PacsMisanswered
        The source has got images meanwhile, or still lists some: it is verified again.
    InvalidRequest
        The settings forbid it, or both servers are one; nothing was written down.
    PacsRejected
        The source does not delete; or it has rejection notes that are of another archive, and would be lost.
    """
    source = transfer.source
    _check_allowed(transfer, source)
    check_two_archives(source, transfer.target)
    transfer.leave_out(receipt.notes)
    seen = ListedImages.read_lists(transfer)
    _check_nothing_is_lost(transfer)
    if not seen.missing and (unproven := seen.on_source.keys() - transfer.proven):
        _prove_source(transfer, seen, unproven)
        seen = ListedImages.read_lists(transfer)
    if seen.missing or seen.on_source.keys() - transfer.proven:
        sentence = f"{source.server.name} got images while the study was verified; it is verified again."
        raise transfer.error(PacsMisanswered, source, sentence)
    receipt.shared |= seen.on_source.keys() - receipt.added
    receipt.source_deleted = True
    receipt.hidden_before = hidden_on(source, transfer.study_uid)
    receipt.notes |= transfer.moot
    receipt.save(receipt)
    _remove_source(transfer, receipt, seen.on_source.keys())
    _on_target(transfer, seen.on_source)


def _check_nothing_is_lost(transfer: Transfer) -> None:
    """An archive's notes of what it hides go with its study. On another server they are objects like all others."""
    if transfer.source.hiding is None and (notes := what_is_left_out(transfer.moot, transfer.source)):
        name = transfer.source.server.name
        sentence = f"{name} keeps its copy, which is whole on both. {notes} Delete the study on {name} to lose it."
        raise transfer.error(PacsRejected, transfer.source, sentence)


def end_deletion(transfer: Transfer, receipt: MigrationReceipt) -> None:
    """End what an attempt that died has begun: the source may hide images that were to be deleted for good."""
    if receipt.hidden_before is not None:
        _remove_source(transfer, receipt, receipt.moved)


def _remove_source(transfer: Transfer, receipt: MigrationReceipt, proven: Collection[str]) -> None:
    source, study_uid = transfer.source, transfer.study_uid
    allowed, before = {*proven, *receipt.notes}, receipt.hidden_before
    removal = remove_study(source, study_uid, allowed, before=before, receipts=transfer.receipts)
    receipt.source_deleted = not removal.came and removal.deletion.fate is not DeletionFate.REFUSED
    if receipt.hidden_before is not None or not receipt.source_deleted:
        receipt.hidden_before = None
        receipt.save(receipt)
    if removal.came:
        sentence = f"{source.server.name} got images while its copy was deleted; it is verified again. {removal.note}"
        raise transfer.error(PacsMisanswered, source, sentence)
    if not receipt.source_deleted:
        sentence = f"{source.server.name} does not delete the study, which is whole on both. {removal.deletion.note}"
        raise transfer.error(PacsRejected, source, sentence)
    if images_on(source, study_uid):
        sentence = f"{source.server.name} still lists images of the study that it has deleted; it is looked at again."
        raise transfer.error(PacsMisanswered, source, sentence)


# --- undo -------------------------------------------------------------------------------------------------------


def undo_study(transfer: Transfer, receipt: MigrationReceipt) -> dict[str, Any]:
    """Take from the target what the batch added, and nothing else; ``transfer`` leads as it did when it was brought.

    Where the batch has deleted the source's copy, that is brought back and compared first. Nothing is removed of which
    the source has no copy that is proven to be the same.

    Raises
    ------
    InvalidRequest
        The settings forbid to delete on the target; nothing was brought back.
    StudyConflict
        The source lacks images that the target would lose, or has others under their UIDs; or the target lacks what
        should go back. Nothing is removed.
    """
    _check_allowed(transfer, transfer.target)
    left_out = _restore(transfer, receipt) if receipt.removing is None and receipt.source_deleted else set()
    seen = ListedImages.read_lists(transfer, notes_too=True)  # version 0.1.0 has copied them
    ours = (receipt.added | _by_earlier_attempt(receipt, seen)) & seen.on_target.keys() - left_out
    if receipt.removing is not None:
        ours &= receipt.removing
    if only_here := ours - seen.on_source.keys():
        sentence = (
            f"{transfer.source.server.name} does not have {len(only_here)} of the images that would be removed from "
            f"{transfer.target.server.name}, {min(only_here)} for one. Nothing was removed."
        )
        raise transfer.error(StudyConflict, transfer.source, sentence)
    goes = Side(transfer.target, seen.on_target, goes=True)
    _prove(transfer, Side(transfer.source, seen.on_source), goes, ours - transfer.proven)
    if receipt.removing is None:
        receipt.removing = frozenset(ours)
        receipt.hidden_before = hidden_on(transfer.target, transfer.study_uid)
        receipt.save(receipt)
    removal = _remove(transfer, receipt) if receipt.removing else Removal(Deletion(DeletionFate.NOT_THERE))
    restored = len(receipt.moved & seen.on_source.keys()) if receipt.source_deleted else 0
    left = images_on(transfer.target, transfer.study_uid).keys() - receipt.removing
    return {
        "removed": len(receipt.removing),
        "restored": restored,
        "left": len(left - receipt.added),
        "left_out": len(left & receipt.added),
        "hidden": removal.deletion.fate is DeletionFate.HIDDEN,
        "note": removal.note,
    }


def _check_allowed(transfer: Transfer, pacs: Pacs) -> None:
    if why := refusal(pacs, permanent=True):
        raise transfer.error(InvalidRequest, pacs, f"Refused: {why}")


def _remove(transfer: Transfer, receipt: MigrationReceipt) -> Removal:
    target, ours = transfer.target, receipt.removing or frozenset()
    before, receipts = receipt.hidden_before, transfer.receipts
    removal = remove_images(target, transfer.study_uid, ours, before=before, receipts=receipts)
    if removal.deletion.fate is DeletionFate.REFUSED:
        sentence = f"{target.server.name} does not remove what was added. {removal.deletion.note}"
        raise transfer.error(PacsRejected, target, sentence)
    return removal


def _restore(transfer: Transfer, receipt: MigrationReceipt) -> set[str]:
    """Bring back to the source what it had before the batch deleted it, and compare all of it.

    Returns what the source does not need back (`Outcome.is_moot`); it stays on the target.
    """
    back = replace(transfer, source=transfer.target, target=transfer.source)
    seen = ListedImages.read_lists(back)
    wanted = receipt.moved - seen.on_target.keys() - back.moot
    if gone := wanted - seen.on_source.keys():
        sentence = (
            f"{back.source.server.name} no longer has {len(gone)} of the images that have to go back to "
            f"{back.target.server.name}, {min(gone)} for one. Nothing was removed."
        )
        raise transfer.error(StudyConflict, back.source, sentence)
    if wanted:
        copy_images(back, wanted, on_source=seen.on_source, on_target=seen.on_target)
        back.hangs.forget(back.target, back.given_up)  # an operator who orders the undo again wants them sent
    moot = back.moot
    back.refused = {uid: outcome for uid, outcome in back.refused.items() if uid not in moot}
    _check_accepted(back)
    after = ListedImages.read_lists(back)
    if lacking := receipt.moved - moot - after.on_target.keys():
        sentence = f"{back.target.server.name} does not list {len(lacking)} of the images that were brought back to it."
        raise transfer.error(PacsMisanswered, back.target, sentence)
    goes = Side(back.source, after.on_source, goes=True, left_out=moot)
    _prove(back, goes, Side(back.target, after.on_target), (receipt.moved - moot) & after.on_source.keys())
    transfer.proven |= back.proven
    return moot
