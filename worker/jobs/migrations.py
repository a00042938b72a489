"""Move or copy studies from one server to another: what is done to one study in each pass of such a batch.

How images get across is in `transfers`; here: which are brought over, what proves that they arrived, when the source's
copy may go, and how it is all taken back. Whoever calls has shut the study's gate (docs/batches.md, "Migrate").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from worker.errors import CourierError, NotFound, PacsMisanswered, PacsRejected, StudyConflict
from worker.jobs.downloads import to_ask
from worker.jobs.transfers import Transfer, bring, digests_on, images_on, pending
from worker.pacs.protocol import DeletionFate, Fate, Found

Digests = Literal["all", "sample", "none"]
#: So often in one verification a study that has grown is brought up to date before it is given up.
TOP_UPS = 3
#: After so many attempts, what a broken store has left behind on the target is removed (docs/pacs-oddities.md).
ATTEMPTS_BEFORE_REMOVAL = 3
#: A report names so many of the images that went wrong.
TOLD = 10


@dataclass(frozen=True)
class Memory:
    """What an earlier attempt at this very study wrote down, and how to write down more before it is acted upon."""

    earlier: Mapping[str, Any] | None
    remember: Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Seen:
    """Which images of a study both servers list, each with its series."""

    on_source: Mapping[str, str]
    on_target: Mapping[str, str]

    @property
    def missing(self) -> set[str]:
        return self.on_source.keys() - self.on_target.keys()

    @classmethod
    def look(cls, transfer: Transfer) -> Seen:
        study_uid = transfer.study_uid
        return cls(images_on(transfer.source, study_uid), images_on(transfer.target, study_uid))


@dataclass
class Account:
    """What a batch knows of a study that it has brought over: the receipts that verification and undo go by.

    ``parcels`` are the images that the batch put on the target in each pass, with one digest over what passed of them
    (None if an attempt that was cut short brought some). ``shared`` are those that both servers had anyway, as far as
    they will be needed: once the source's copy is deleted.
    """

    parcels: list[tuple[frozenset[str], str | None]] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)
    source_deleted: bool = False

    @property
    def added(self) -> set[str]:
        return {uid for uids, _ in self.parcels for uid in uids}

    @classmethod
    def of(cls, *results: Mapping[str, Any] | None) -> Account:
        """The account of a study after the passes that gave ``results``, in their order."""
        account = cls()
        for result in filter(None, results):
            account.parcels.append((frozenset(result["added"]), result.get("digest")))
            account.shared |= set(result.get("shared", ()))
            account.source_deleted |= bool(result.get("source_deleted"))
        return account


# --- survey -----------------------------------------------------------------------------------------------------


def survey_study(transfer: Transfer, others: Mapping[str, bool | None]) -> dict[str, Any]:
    """What a migration of the study would come to. ``others``: whether each further server has it; None, it is silent.

    Raises
    ------
    NotFound
        The source does not have it.
    """
    seen = Seen.look(transfer)
    _check_found(transfer, seen)
    warnings = [f"study_split: it is on {name} too" for name, there in others.items() if there]
    warnings += [f"{name} did not say whether it has the study" for name, there in others.items() if there is None]
    return {
        "images": len(seen.on_source),
        "images_on_target": len(seen.on_target),
        "missing": len(seen.missing),
        "warnings": warnings,
    }


# --- apply ------------------------------------------------------------------------------------------------------


def copy_study(transfer: Transfer, memory: Memory, *, attempt: int = 1) -> dict[str, Any]:
    """Bring over what the target lacks; what the batch added, what was there, and a digest over what passed.

    Raises
    ------
    NotFound
        The source does not have the study.
    StudyConflict, PacsRejected
        The target refuses some of the images for good; the others are there, ``details`` bear the result.
    CourierError
        A server failed; the next attempt brings what is left.
    """
    seen = Seen.look(transfer)
    _check_found(transfer, seen)
    before = _before(seen, memory)
    if seen.missing:
        _bring_missing(transfer, seen, attempt=attempt)
    result = {
        "images": len(seen.on_source.keys() | transfer.settled),
        "there_before": len(seen.on_source.keys() & before),
        **_brought(transfer, seen, before),
    }
    _check_accepted(transfer, result)
    return result


def _before(seen: Seen, memory: Memory) -> set[str]:
    """The images that were on the target before this pass touched the study, written down before it does."""
    if memory.earlier is None:
        memory.remember({"before": sorted(seen.on_target)})
        return set(seen.on_target)
    return set(memory.earlier["before"])


def _bring_missing(transfer: Transfer, seen: Seen, *, attempt: int) -> None:
    transfer.resumed = attempt > 1
    try:
        bring(transfer, seen.missing, on_source=seen.on_source, on_target=seen.on_target)
    except CourierError:
        if attempt >= ATTEMPTS_BEFORE_REMOVAL:
            _clear_pending(transfer)
        raise


def _brought(transfer: Transfer, first: Seen, before: Collection[str]) -> dict[str, Any]:
    """What this pass added to the target; what an earlier attempt at it did was there at the ``first`` look."""
    by_earlier_attempt = (first.on_target.keys() & first.on_source.keys()) - set(before)
    added = by_earlier_attempt | transfer.stored.keys()
    return {
        "added": sorted(added),
        "digest": None if by_earlier_attempt else digest_over(added, transfer.stored),
        "size_bytes": transfer.size_bytes,
        "warnings": sorted(transfer.warnings),
    }


def _clear_pending(transfer: Transfer) -> None:
    """Oddity: an image that is "being stored" for ever was left behind by a store that broke; deleting it helps."""
    for uid in pending(transfer):
        image = Found("image", transfer.study_uid, transfer.listed[uid], uid)
        transfer.target.delete(image, permanent=True)


def digest_over(uids: Collection[str], digests: Mapping[str, str]) -> str:
    """One digest for many images: of their UIDs and digests, in order of their UIDs."""
    lines = "".join(f"{uid} {digests[uid]}\n" for uid in sorted(uids))
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_found(transfer: Transfer, seen: Seen) -> None:
    if not seen.on_source:
        on_target = f"; {transfer.target.server.name} has {len(seen.on_target)} images of it" if seen.on_target else ""
        sentence = f"{transfer.source.server.name} does not have the study{on_target}."
        raise transfer.error(NotFound, transfer.source, sentence)


def _check_accepted(transfer: Transfer, result: Mapping[str, Any]) -> None:
    """The first image that the target will never take speaks for the others."""
    if not transfer.refused:
        return
    uid, outcome = min(transfer.refused.items())
    kind = StudyConflict if outcome.fate is Fate.CONFLICT else PacsRejected
    name, count = transfer.target.server.name, len(transfer.refused)
    said = outcome.message or "It names no reason."
    error = transfer.error(kind, transfer.target, f"{name} will not take {count} of the images, {uid} for one. {said}")
    error.payload["details"] |= {"refused": sorted(transfer.refused)[:TOLD], "result": dict(result)}
    raise error


# --- verify -----------------------------------------------------------------------------------------------------


def verify_study(
    transfer: Transfer, account: Account, memory: Memory, *, digests: Digests, attempt: int = 1
) -> dict[str, Any]:
    """Prove that the target has all that the source has, bringing over what the source has got meanwhile.

    Raises
    ------
    NotFound
        The source no longer has the study.
    StudyConflict
        Images differ although they bear the same UIDs, or the study grows faster than it is brought over.
    """
    seen = first = Seen.look(transfer)
    _check_found(transfer, seen)
    before = _before(seen, memory)
    lost = seen.missing & account.added
    for _ in range(TOP_UPS):
        if not seen.missing - transfer.refused.keys():
            break
        _bring_missing(transfer, seen, attempt=attempt)
        seen = Seen.look(transfer)
    brought = _brought(transfer, first, before)
    _check_accepted(transfer, brought)
    _check_complete(transfer, seen)
    parcels = [*account.parcels, (frozenset(brought["added"]), brought["digest"])]
    return {
        "images": len(seen.on_source),
        "images_on_target": len(seen.on_target),
        "topped_up": len(set(brought["added"]) - lost),
        "lost": len(lost),
        "digests": _compare(transfer, seen, parcels, digests),
        **brought,
    }


def _check_complete(transfer: Transfer, seen: Seen) -> None:
    if seen.missing:
        sentence = (
            f"The study on {transfer.source.server.name} grows: after {TOP_UPS} rounds {len(seen.missing)} images are "
            f"still missing on {transfer.target.server.name}. Verify the batch again when nothing is added any more."
        )
        raise transfer.error(StudyConflict, transfer.source, sentence)


def _compare(
    transfer: Transfer, seen: Seen, parcels: Sequence[tuple[frozenset[str], str | None]], digests: Digests
) -> dict[str, Any]:
    """Compare what the target gives back with what passed, or with what the source gives for images that did not pass.

    What passed has been hashed on its way, so the source is asked again for nothing that this batch has brought whole.
    """
    source, target = transfer.source, transfer.target
    not_kept_by = [pacs.server.name for pacs in (source, target) if not pacs.keeps_bytes]
    told = {"mode": digests, "compared": 0, "not_kept_by": not_kept_by}
    wanted = _to_compare(seen, digests)
    if not wanted or not target.keeps_bytes:
        return told
    given = digests_on(target, transfer.study_uid, seen.on_target, wanted)
    proven = _proven(given, parcels)
    rest = wanted - proven if source.keeps_bytes else set()
    expected = digests_on(source, transfer.study_uid, seen.on_source, rest) if rest else {}
    different = sorted(uid for uid in rest if expected.get(uid) is None or expected[uid] != given.get(uid))
    if different:
        sentence = (
            f"{len(different)} images on {target.server.name} are not what {source.server.name} has under the same "
            f"UIDs, {different[0]} for one; look at both before anything is deleted."
        )
        error = transfer.error(StudyConflict, target, sentence)
        error.payload["details"] |= {"different": different[:TOLD]}
        raise error
    return {**told, "compared": len(proven | rest)}


def _to_compare(seen: Seen, digests: Digests) -> set[str]:
    """All images of the source, none, or one of each series: always the same one, whoever asks."""
    if digests != "sample":
        return set(seen.on_source) if digests == "all" else set()
    sample: dict[str, str] = {}
    for image, series in seen.on_source.items():
        sample[series] = min(sample.get(series, image), image, key=lambda uid: hashlib.sha256(uid.encode()).digest())
    return set(sample.values())


def _proven(given: Mapping[str, str], parcels: Iterable[tuple[frozenset[str], str | None]]) -> set[str]:
    """The images whose digests are, together, those of what passed."""
    proven: set[str] = set()
    for uids, digest in parcels:
        if digest is not None and uids <= given.keys() and digest_over(uids, given) == digest:
            proven |= uids
    return proven


# --- the source's copy ------------------------------------------------------------------------------------------


def delete_source(transfer: Transfer, account: Account, verified: Mapping[str, Any], memory: Memory) -> dict[str, Any]:
    """Delete the study from the source, after `verify_study` and one more look at both; its result, completed.

    What has to be known to take it back is written down before anything is deleted.

    Raises
    ------
    PacsMisanswered
        The servers list something else than they did a moment ago: it is verified again.
    PacsRejected
        The source does not delete.
    """
    seen = Seen.look(transfer)
    if seen.missing:
        sentence = f"{transfer.source.server.name} got images while the study was verified; it is verified again."
        raise transfer.error(PacsMisanswered, transfer.source, sentence)
    added = account.added | set(verified["added"])
    result = {**verified, "shared": sorted(seen.on_source.keys() - added), "source_deleted": True}
    memory.remember({"deleting": result})
    return _delete_source(transfer, result)


def resume_deletion(transfer: Transfer, memory: Memory) -> dict[str, Any] | None:
    """The result of a verification that had come as far as deleting the source's copy, once that is done; else None."""
    result = (memory.earlier or {}).get("deleting")
    if result is None:
        return None
    seen = Seen.look(transfer)
    if seen.missing:
        sentence = f"{transfer.source.server.name} has images again that {transfer.target.server.name} lacks."
        raise transfer.error(StudyConflict, transfer.source, f"{sentence} Verify the batch again.")
    return _delete_source(transfer, result) if seen.on_source else result


def _delete_source(transfer: Transfer, result: dict[str, Any]) -> dict[str, Any]:
    source = transfer.source
    deletion = source.delete(Found("study", transfer.study_uid), permanent=True)
    if deletion.fate is DeletionFate.REFUSED:
        sentence = f"{source.server.name} does not delete the study, which is whole on both. {deletion.note}"
        raise transfer.error(PacsRejected, source, sentence)
    if images_on(source, transfer.study_uid):
        sentence = f"{source.server.name} still lists images of the study that it has deleted; it is looked at again."
        raise transfer.error(PacsMisanswered, source, sentence)
    return result


# --- undo -------------------------------------------------------------------------------------------------------


def undo_study(transfer: Transfer, account: Account, memory: Memory, *, attempt: int = 1) -> dict[str, Any]:
    """Take from the target what the batch added, and nothing else; ``transfer`` leads as it did when it was brought.

    Where the batch has deleted the source's copy, that is brought back and compared first. Nothing is removed of which
    the source has no copy.

    Raises
    ------
    StudyConflict
        The source lacks images that the target would lose, or the target lacks what should go back. Nothing is removed.
    """
    if memory.earlier is None and account.source_deleted:
        _restore(transfer, account, attempt=attempt)
    seen = Seen.look(transfer)
    ours = account.added & seen.on_target.keys()
    removed = len(memory.earlier["removing"]) if memory.earlier else len(ours)
    if only_here := ours - seen.on_source.keys():
        sentence = (
            f"{transfer.source.server.name} does not have {len(only_here)} of the images that would be removed from "
            f"{transfer.target.server.name}, {min(only_here)} for one. Nothing was removed."
        )
        raise transfer.error(StudyConflict, transfer.source, sentence)
    if memory.earlier is None:
        memory.remember({"removing": sorted(ours)})
    pieces = to_ask(Found("study", transfer.study_uid), seen.on_target, ours) if ours else []
    fates = {_remove(transfer, found) for found in pieces}
    restored = len(account.added | account.shared) if account.source_deleted else 0
    return {"removed": removed, "restored": restored, "hidden": DeletionFate.HIDDEN in fates}


def _remove(transfer: Transfer, found: Found) -> DeletionFate:
    deletion = transfer.target.delete(found, permanent=True)
    if deletion.fate is DeletionFate.REFUSED:
        sentence = f"{transfer.target.server.name} does not remove what was added. {deletion.note}"
        raise transfer.error(PacsRejected, transfer.target, sentence)
    return deletion.fate


def _restore(transfer: Transfer, account: Account, *, attempt: int) -> None:
    """Bring back to the source what it had before the batch deleted it, and compare all of it."""
    back = replace(transfer, source=transfer.target, target=transfer.source)
    seen = Seen.look(back)
    had = account.added | account.shared
    wanted = had - seen.on_target.keys()
    if gone := wanted - seen.on_source.keys():
        sentence = (
            f"{back.source.server.name} no longer has {len(gone)} of the images that have to go back to "
            f"{back.target.server.name}, {min(gone)} for one. Nothing was removed."
        )
        raise transfer.error(StudyConflict, back.source, sentence)
    back.resumed = attempt > 1
    if wanted:
        bring(back, wanted, on_source=seen.on_source, on_target=seen.on_target)
        _check_accepted(back, {})
    after = Seen.look(back)
    if lacking := had - after.on_target.keys():
        sentence = f"{back.target.server.name} does not list {len(lacking)} of the images that were brought back to it."
        raise transfer.error(PacsMisanswered, back.target, sentence)
    went_back = Seen({uid: after.on_source[uid] for uid in had & after.on_source.keys()}, after.on_target)
    _compare(back, went_back, [(frozenset(back.stored), digest_over(back.stored, back.stored))], "all")
