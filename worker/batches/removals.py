"""Images of a study removed from a server after a comparison that allowed to remove these, and no others.

Other programs store into a study while it is compared. So it is looked at again directly before the removal. A server
that can hide is given no deletion for good before it is known what was hidden: what came in between is shown again.
Oddity: "Each rejection leaves a note".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from worker.batches.study_copy import images_on
from worker.jobs.download import to_ask
from worker.jobs.receipts import Receipts
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs

#: A report names so many of the images that came in between.
TOLD = 10
#: Of several pieces of one study, the fate that says most.
_WORST_FIRST = (DeletionFate.REFUSED, DeletionFate.HIDDEN, DeletionFate.DELETED, DeletionFate.NOT_THERE)


@dataclass(frozen=True)
class Removal:
    """What a server made of a removal. ``hidden`` are the images that it hides of the study now.

    ``came``: images that came in between. They are shown, those of ``revoked`` again.
    """

    deletion: Deletion
    came: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    hidden: frozenset[str] = frozenset()

    @property
    def note(self) -> str:
        """About what came in between; "" if nothing did."""
        if not self.came:
            return ""
        uids = ", ".join(self.came[:TOLD])
        if self.revoked:
            return (
                f"{len(self.came)} images that came in between were hidden with the study, and are shown again: {uids}."
            )
        return f"{len(self.came)} images came in between, and stay: {uids}."


def only_hides(pacs: Pacs) -> bool:
    """Whether the server hides the images that are deleted there, and shows them again if that was too much."""
    return pacs.hiding is not None and pacs.deletion("image", permanent=True).fate is DeletionFate.HIDDEN


def hidden_on(pacs: Pacs, study_uid: str) -> frozenset[str] | None:
    """What the server hides of a study after deletions; None where it hides nothing, or the account may not look."""
    images = None if pacs.hiding is None else pacs.hiding.images(study_uid)
    return None if images is None else frozenset(str(one.sop_instance_uid) for one in images)


def remove_study(
    pacs: Pacs, study_uid: str, allowed: Collection[str], *, before: Collection[str] | None, receipts: Receipts
) -> Removal:
    """Delete a study for good, if all of its images are ``allowed`` to go; else nothing of it.

    ``before``: what `hidden_on` said before the first attempt hid anything; where that is not known, the images are
    hidden one by one. With ``came`` in the answer nothing was deleted for good, and what was hidden is shown again, as
    far as the account may.
    """
    on_server = images_on(pacs, study_uid)
    if extra := sorted(on_server.keys() - set(allowed)):
        return Removal(Deletion(DeletionFate.REFUSED, _GROWN), came=tuple(extra))
    study = Found("study", study_uid)
    if not only_hides(pacs):
        return Removal(receipts.delete(pacs, study, permanent=True))
    pieces = [study] if before is not None else _one_by_one(study_uid, on_server)
    removal = hide_images(pacs, study_uid, pieces, allowed, before=before, receipts=receipts)
    if not removal.came and removal.deletion.fate is not DeletionFate.REFUSED:
        removal = _delete_hidden(pacs, study_uid, removal, receipts)
    if removal.came:
        revoke(pacs, study_uid, removal.hidden & set(allowed) - set(before or ()), receipts)
    return removal


def remove_images(
    pacs: Pacs, study_uid: str, allowed: Collection[str], *, before: Collection[str] | None, receipts: Receipts
) -> Removal:
    """Delete the ``allowed`` images of a study, and leave the others.

    For good, or where that is not possible they are hidden. ``before``: see `remove_study`.
    """
    on_server, study = images_on(pacs, study_uid), Found("study", study_uid)
    ours = {uid: series for uid, series in on_server.items() if uid in allowed}
    if not only_hides(pacs):
        pieces = to_ask(study, on_server, ours) if ours else []
        return Removal(_worst(receipts.delete(pacs, piece, permanent=True) for piece in pieces))
    pieces = _one_by_one(study_uid, ours) if before is None else to_ask(study, on_server, ours)
    removal = hide_images(pacs, study_uid, pieces, allowed, before=before, receipts=receipts)
    if len(ours) == len(on_server) and not removal.came and removal.deletion.fate is not DeletionFate.REFUSED:
        return _delete_hidden(pacs, study_uid, removal, receipts)
    return removal


def hide_images(
    pacs: Pacs,
    study_uid: str,
    pieces: Iterable[Found],
    allowed: Collection[str],
    *,
    before: Collection[str] | None,
    receipts: Receipts,
) -> Removal:
    """Hide ``pieces`` of a study, and show again what is hidden beside the ``allowed`` images and those ``before``.

    Without ``before`` the pieces have to be images, which can hide no others.
    """
    deletion = _worst([receipts.delete(pacs, piece, permanent=False) for piece in pieces])
    if pacs.hiding is None or before is None:
        return Removal(deletion)
    images = pacs.hiding.images(study_uid) or []
    known = {*allowed, *before}
    late = {str(one.sop_instance_uid): one for one in images if one.sop_instance_uid not in known}
    for one in late.values():
        receipts.show_again(pacs, one)
    came = tuple(sorted(late))
    hidden = frozenset(str(one.sop_instance_uid) for one in images) - late.keys()
    return Removal(deletion, came=came, revoked=came, hidden=hidden)


def revoke(pacs: Pacs, study_uid: str, uids: Collection[str], receipts: Receipts) -> None:
    """Show again those of the images ``uids`` that the server hides; the others stay hidden."""
    hidden = [] if pacs.hiding is None else pacs.hiding.images(study_uid) or []
    ours = [one for one in hidden if one.sop_instance_uid in uids]
    for found in [Found("study", study_uid)] if ours and len(ours) == len(hidden) else ours:
        receipts.show_again(pacs, found)


_GROWN = "It has got images meanwhile; nothing was deleted."


def _delete_hidden(pacs: Pacs, study_uid: str, removal: Removal, receipts: Receipts) -> Removal:
    """The server refuses it where an image came after the others were hidden; that one was never hidden."""
    deletion = receipts.delete_hidden(pacs, study_uid)
    if deletion.fate is DeletionFate.REFUSED and (came := images_on(pacs, study_uid)):
        return replace(removal, came=tuple(sorted(came)))
    return replace(removal, deletion=deletion)


def _one_by_one(study_uid: str, series_of: Mapping[str, str]) -> list[Found]:
    return [Found("image", study_uid, series, uid) for uid, series in series_of.items()]


def _worst(deletions: Iterable[Deletion]) -> Deletion:
    found = sorted(deletions, key=lambda one: _WORST_FIRST.index(one.fate))
    return found[0] if found else Deletion(DeletionFate.NOT_THERE)
