"""What a batch of uploads has stored, looked at again: is it there, is it the same, and how is it undone.

Whether something was stored by the batch is said by its receipts, never guessed from what a server has.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

from courier.batches.store import CHUNK_ITEMS, Batches, ItemStatus, Settled, is_to_undo
from courier.errors import CourierError, InvalidUid, MissingUid, NotDicom, NotFound, PacsMisanswered, TryAgain, is_final
from worker.batches.coordinator import Answer, Desk
from worker.batches.removals import hidden_on, hide_images, only_hides
from worker.batches.study_copy import images_on
from worker.dicom.instances import identify
from worker.jobs.delete import forget_what_is_gone, remove
from worker.jobs.receipts import Receipts
from worker.jobs.same_bytes import COMPARED_BYTES, Arrival, Comparison, in_words, named
from worker.jobs.streamed_instance import whole
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs, Retrieved
from worker.pacs.stow import PREAMBLE

#: In so many chunks to both sides the other images of a study are looked for.
CHUNKS_AROUND = 50
#: Of so many images of a study that are another file, the elements are named; each is fetched once more for that.
NAMED = 3
#: Where a study has more images than this for each one that is wanted, they are fetched one by one.
WORTH_ALL = 2

_UNDONE: Mapping[DeletionFate, ItemStatus] = {
    DeletionFate.DELETED: "undone",
    DeletionFate.HIDDEN: "undone",
    DeletionFate.NOT_THERE: "not_there",
    DeletionFate.REFUSED: "refused",
}


@dataclass(frozen=True)
class Seen:
    """What a server has of the images of one study that a batch has stored, or found, there.

    ``others`` are the numbers of the items whose file is another one than the server's: as it comes back, where bytes
    are kept; else as far as the batch is known to have stored another under the same UID.
    """

    there: set[str]
    others: set[int]
    compared: Literal["bytes", "uids"]


def verify(done: Sequence[Settled], desk: Desk) -> list[Answer]:
    """Whether every image is where its receipt says, or was before; and the same file, where the server keeps bytes.

    Of the first images of a study that are another file, the elements that differ are named.
    """
    seen = _seen(done, desk)
    answers = {one.item.number: _verified(one, seen[_where(one)]) for one in done}
    return list((answers | _named(done, answers, seen, desk)).values())


def _verified(one: Settled, seen: Seen | CourierError) -> Settled | CourierError:
    if isinstance(seen, CourierError):
        return seen
    if one.result["image_uid"] not in seen.there:
        return _now(one, "missing", f"{one.server_name} does not have the image; retry the batch to store it again.")
    if one.item.number in seen.others:
        return _now(one, "differs", _difference(one, seen))
    return Settled(one.item, "verified", server=one.server_name, result={"compared": seen.compared})


def _named(
    done: Sequence[Settled],
    answers: Mapping[int, Settled | CourierError],
    seen: Mapping[tuple[str, str], Seen | CourierError],
    desk: Desk,
) -> dict[int, Settled | CourierError]:
    """Answers about images that are another file, with the elements that differ."""
    found: dict[int, Settled | CourierError] = {}
    tried: Counter[tuple[str, str]] = Counter()
    for one in done:
        answer, there = answers[one.item.number], seen[_where(one)]
        differs = isinstance(answer, Settled) and answer.status == "differs"
        if not (differs and isinstance(there, Seen) and there.compared == "bytes") or tried[_where(one)] >= NAMED:
            continue
        tried[_where(one)] += 1
        try:
            comparison = _compared(one, desk)
        except TryAgain:  # the files cannot be had at present, and it was said already that these differ
            break
        except CourierError:
            continue
        if isinstance(answer, Settled) and (words := in_words(comparison)):
            told = {"tags": list(comparison.tags), "made_by": list(comparison.made_by)}
            message = f"{answer.message.removesuffix('.')}: {words}."
            found[one.item.number] = replace(answer, message=message, result={**answer.result, **told})
    return found


def _compared(one: Settled, desk: Desk) -> Comparison:
    """The file of an item against what its server has; nothing is named of a file that is another one by now."""
    differs, pacs = Comparison(same=False), desk.tools.fleet[one.server_name]
    if int(one.result.get("size_bytes", 0)) > COMPARED_BYTES:
        return differs
    fetched = desk.tools.sources.fetch(one.item.text)
    desk.spent.add(requests=1, size_bytes=fetched.size_bytes)
    try:
        if fetched.sha256 != one.result["sha256"] or fetched.size_bytes > COMPARED_BYTES:
            return differs
        instance = identify(fetched.stream)
        arrival = Arrival(instance, fetched.size_bytes, fetched.sha256, fetched.source, open=fetched.open)
        return named(differs, pacs, arrival, desk.tools.fleet)
    finally:
        fetched.drop()


def _difference(one: Settled, seen: Seen) -> str:
    """Where no bytes could be compared, only what the batch itself has stored is known."""
    if seen.compared == "uids":
        return f"The batch has stored another file than this one on {one.server_name}, under the same UID."
    why = "than were sent" if one.status == "stored" else "than this file, which was not stored"
    return f"{one.server_name} has the image with other bytes {why}."


def undo(done: Sequence[Settled], desk: Desk, *, resumed: set[int]) -> list[Answer]:
    """Delete what the receipts prove to be the batch's own: those images, on that server, and as they were sent.

    ``resumed``: items that an earlier attempt may have deleted, if it came so far as to note it.
    """
    run, ledger = desk.run, desk.run.ledger
    stored = [one for one in done if one.status == "stored"]
    begun = resumed & set(desk.memo.get("undoing", ()))
    unclear = [one for one in done if "uncertain" in one.result]
    results: dict[int, Answer] = {one.item.number: None for one in stored}
    results |= {one.item.number: _not_ours(one) for one in done if one.status != "stored"}
    try:
        ours = _held(stored, desk)
        seen = _seen([*ours, *unclear], desk)
        results |= {one.item.number: _unclear(one, seen[_where(one)]) for one in unclear}
        ready = []
        for one in ours:
            number = one.item.number
            kept = _kept(one, seen[_where(one)], resumed=number in begun or _went_with_its_study(one, desk))
            if kept is None:
                ready.append(one)
            else:
                results[one.item.number] = kept
        if ready:
            desk.remember({"undoing": sorted(begun | {one.item.number for one in ready})})
        results |= _taken_away(ready, begun, desk)
    finally:
        ledger.let_go_images(job_id=run.job_id, fence=run.fence)
        ledger.let_go(run.job_id, fence=run.fence)
    gone = {one.result["study_uid"] for one in ours if isinstance(results[one.item.number], Settled)}
    forget_what_is_gone(gone, desk.tools)
    return [results[one.item.number] for one in done]


def _held(stored: Sequence[Settled], desk: Desk) -> list[Settled]:
    """Those that no other job is storing or deleting, and none begins to.

    Where images are only hidden, perhaps with their whole study, that is shut: nothing of ours comes into it meanwhile.
    """
    run, ledger = desk.run, desk.run.ledger
    hidden = [one for one in stored if _only_hides(one, desk)]
    if hidden:  # what an attempt that died has left of its own would keep the gates open
        ledger.let_go_images(job_id=run.job_id, fence=run.fence)
    shut = {
        study: run.is_free(ledger.shut(study, job_id=run.job_id, fence=run.fence))
        for study in dict.fromkeys(str(one.result["study_uid"]) for one in hidden)
    }
    others = [one for one in stored if one not in hidden]
    owners = ledger.hold_images([_uids(one) for one in others], job_id=run.job_id, fence=run.fence)
    held = [one for one, owner in zip(others, owners, strict=True) if run.is_free(owner)]
    return [*held, *(one for one in hidden if shut[str(one.result["study_uid"])])]


def _went_with_its_study(one: Settled, desk: Desk) -> bool:
    """Whether another chunk of this undo has hidden the study, and so the image with it."""
    if not _only_hides(one, desk):
        return False
    pass_of_batch = desk.run.job_id.partition(".undo.")[0] + ".undo."
    return desk.run.ledger.voided_study(one.server_name, one.result["study_uid"]).startswith(pass_of_batch)


def _only_hides(one: Settled, desk: Desk) -> bool:
    return only_hides(desk.tools.fleet[one.server_name])


def _taken_away(ready: Sequence[Settled], begun: set[int], desk: Desk) -> dict[int, Answer]:
    """What became of each: image by image, or by the study where images are only hidden."""
    by_study: dict[tuple[str, str], list[Settled]] = {}
    for one in ready:
        if _only_hides(one, desk):
            by_study.setdefault(_where(one), []).append(one)
    alone = [one for one in ready if _where(one) not in by_study]
    fleet = desk.tools.fleet
    told = dict(
        zip(by_study, fleet.gather([partial(_hidden, group, begun, desk) for group in by_study.values()]), strict=True)
    )
    results: dict[int, Answer] = {}
    for where, group in by_study.items():
        answer = told[where]
        results |= {one.item.number: answer for one in group} if isinstance(answer, CourierError) else answer
    return results | _deleted(alone, begun, desk)


def _deleted(images: Sequence[Settled], begun: set[int], desk: Desk) -> dict[int, Answer]:
    deletions = desk.tools.fleet.gather([partial(_delete, one, begun, desk) for one in images])
    return {one.item.number: _taken_back(one, deletion) for one, deletion in zip(images, deletions, strict=True)}


def _hidden(group: Sequence[Settled], begun: set[int], desk: Desk) -> dict[int, Answer]:
    """Hide images of a study: with the study, if all of them are the batch's, which is compared before and afterwards.

    What has come in between is shown again, and reported.
    """
    pacs, study_uid = desk.tools.fleet[group[0].server_name], str(group[0].result["study_uid"])
    name, receipts = pacs.server.name, Receipts.of(desk.run)
    ours = {str(one.result["image_uid"]) for one in group}
    before = hidden_on(pacs, study_uid)
    on_server = images_on(pacs, study_uid).keys()
    ours |= _in_other_chunks(group[0], on_server - ours, desk)
    if before is None or on_server != ours:
        return {one.item.number: _taken_back(one, _delete_or_error(one, begun, desk)) for one in group}
    removal = hide_images(pacs, study_uid, [Found("study", study_uid)], ours, before=before, receipts=receipts)
    deletion = removal.deletion
    if deletion.fate is DeletionFate.HIDDEN and not ours <= removal.hidden:
        sentence = f"{name} has not hidden all images of the study; they are looked at again."
        raise PacsMisanswered(sentence, server_name=name, server_type=pacs.server.type)
    note = removal.note or _other_count(deletion.images, len(ours), name)
    return {one.item.number: _noted(_taken_back(one, deletion), note) for one in group}


def _noted(answer: Settled | CourierError, note: str) -> Settled | CourierError:
    return replace(answer, message=note) if note and isinstance(answer, Settled) else answer


def _in_other_chunks(one: Settled, wanted: Collection[str], desk: Desk) -> set[str]:
    """Those of the ``wanted`` images of a study that the batch has stored there too, and that are still to be undone.

    Images of a study stand together in most orders, so chunks are read from here to both sides, and not all of them.
    """
    found: set[str] = set()
    if desk.batch is None:
        return found
    here = one.item.number // CHUNK_ITEMS
    around = [
        chunk for at in range(1, CHUNKS_AROUND) for chunk in (here - at, here + at) if 0 <= chunk < desk.batch.chunks
    ]
    batches = Batches(desk.run.ledger)
    for chunk in around:
        if found.issuperset(wanted):
            break
        rows = batches.chunk_rows(desk.batch, chunk, ("apply", "undo"))
        others = [row.settled for row in rows if row.settled.status == "stored" and is_to_undo(row)]
        found |= {str(other.result["image_uid"]) for other in others if _where(other) == _where(one)}
    return found & set(wanted)


def _other_count(counted: int | None, ours: int, name: str) -> str:
    if counted in (None, ours):
        return ""
    return f"{name} says that it has hidden {counted} images of the study, of which the batch has stored {ours}."


def _delete_or_error(one: Settled, begun: set[int], desk: Desk) -> Deletion | CourierError:
    try:
        return _delete(one, begun, desk)
    except CourierError as error:
        return error


def _not_ours(one: Settled) -> Settled:
    return _now(one, "kept", "It was there before, and so is not the batch's.")


def _unclear(one: Settled, seen: Seen | CourierError) -> Settled | CourierError:
    """Of an image that was given up although it may have arrived."""
    if isinstance(seen, CourierError):
        return seen
    if one.result["image_uid"] not in seen.there:
        return Settled(one.item, "not_there", server=one.server_name)
    name = one.server_name
    return _now(
        one, "kept", f"{name} has the image; whether the batch stored it is not known, so that is for you to say."
    )


def _kept(one: Settled, seen: Seen | CourierError, *, resumed: bool) -> Settled | CourierError | None:
    """Why an image is not to be deleted; None if it is."""
    if isinstance(seen, CourierError):
        return seen
    image_uid = one.result["image_uid"]
    if image_uid not in seen.there:
        return Settled(one.item, "undone" if resumed else "not_there", server=one.server_name)
    if one.item.number in seen.others:
        return _now(one, "kept", "It is another file now than the one that was stored, and so not the batch's.")
    return None


def _delete(one: Settled, begun: set[int], desk: Desk) -> Deletion:
    pacs, resumed = desk.tools.fleet[one.server_name], one.item.number in begun
    return remove(pacs, [_image(one)], Receipts.of(desk.run), permanent=True, resumed=resumed)


def _taken_back(one: Settled, deletion: Deletion | CourierError) -> Settled | CourierError:
    if is_final(deletion) and not isinstance(deletion, TryAgain):
        return Settled(one.item, "refused", deletion.payload["code"], deletion.message, server=one.server_name)
    if isinstance(deletion, CourierError):
        return deletion
    code, note = (deletion.code, deletion.note) if deletion.fate is DeletionFate.REFUSED else ("", "")
    hidden: dict[str, Any] = {"hidden": True} if deletion.fate is DeletionFate.HIDDEN else {}
    return Settled(one.item, _UNDONE[deletion.fate], code, note, server=one.server_name, result=hidden)


# --- asking the servers ---------------------------------------------------------------------------------------------


def _seen(stored: Sequence[Settled], desk: Desk) -> dict[tuple[str, str], Seen | CourierError]:
    """By server and study."""
    by_study: dict[tuple[str, str], list[Settled]] = {}
    for one in stored:
        by_study.setdefault(_where(one), []).append(one)
    fleet = desk.tools.fleet
    questions = [
        partial(_look, fleet[server], study, group, all_in=len(group) >= CHUNK_ITEMS)
        for (server, study), group in by_study.items()
    ]
    return dict(zip(by_study, fleet.gather(questions), strict=True))


def _look(pacs: Pacs, study_instance_uid: str, done: Sequence[Settled], *, all_in: bool) -> Seen:
    """``all_in``: so many images of the study were asked for that it may be far larger, and is not listed each time.

    Several items may be files of one image.
    """
    there = pacs.present(study_instance_uid, {str(one.result["image_uid"]) for one in done})
    if not pacs.keeps_bytes:
        return Seen(there, _unlike_what_was_stored(done), "uids")
    study = Found("study", study_instance_uid)
    most = WORTH_ALL * len(there)
    worth_all = bool(there) and not all_in and sum(1 for _ in islice(pacs.instances(study), most + 1)) <= most
    images = {_uids(one): _image(one) for one in done if one.result["image_uid"] in there}
    founds = [study] if worth_all else [images[uids] for uids in sorted(images)]
    digests = _digests(pacs, founds, bare=any(map(_may_lack_preamble, done)))
    return Seen(there, {one.item.number for one in done if one.result["sha256"] not in digests}, "bytes")


def _unlike_what_was_stored(done: Sequence[Settled]) -> set[int]:
    stored = {one.result["image_uid"]: one.result["sha256"] for one in done if one.status == "stored"}
    return {
        one.item.number
        for one in done
        if stored.get(one.result["image_uid"], one.result["sha256"]) != one.result["sha256"]
    }


def _may_lack_preamble(one: Settled) -> bool:
    """Of a file that was not stored nobody has noted whether it would have been given one."""
    return one.status != "stored" or bool(one.result.get("preamble_added"))


def _digests(pacs: Pacs, founds: Iterable[Found], *, bare: bool) -> set[str]:
    """Of all images below, as they come back; with ``bare`` also as they were before they were given a preamble."""
    digests: set[str] = set()
    for found in founds:
        try:
            with pacs.retrieve(found) as retrieved:
                for one in retrieved:
                    digests.update(_digests_of(one, bare=bare))
        except NotFound:
            continue  # gone since it was listed
        except (NotDicom, MissingUid, InvalidUid) as error:
            server, sentence = pacs.server, f"{pacs.server.name} sent an image that cannot be used. {error.message}"
            raise PacsMisanswered(sentence, server_name=server.name, server_type=server.type) from error
    return digests


def _digests_of(retrieved: Retrieved, *, bare: bool) -> Iterator[str]:
    full, without, skip = hashlib.sha256(), hashlib.sha256(), len(PREAMBLE)
    for chunk in whole(retrieved.chunks):
        full.update(chunk)
        if bare:
            without.update(chunk[skip:])
            skip = max(0, skip - len(chunk))
    yield full.hexdigest()
    if bare:
        yield without.hexdigest()


def _where(one: Settled) -> tuple[str, str]:
    return one.server_name, str(one.result["study_uid"])


def _image(one: Settled) -> Found:
    return Found("image", one.result["study_uid"], one.result["series_uid"], one.result["image_uid"])


def _uids(one: Settled) -> tuple[str, str, str]:
    """Image, study, series."""
    return one.result["image_uid"], one.result["study_uid"], one.result["series_uid"]


def _now(one: Settled, status: ItemStatus, message: str) -> Settled:
    return Settled(one.item, status, message=message, server=one.server_name)
