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

from courier.batches.store import CHUNK_ITEMS, Batches, ItemOutcome, ItemStatus, is_to_undo
from courier.errors import CourierError, InvalidUid, MissingUid, NotDicom, NotFound, PacsMisanswered, TryAgain, is_final
from worker.batches.coordinator import ItemResult, PassContext
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
class CheckedItems:
    """What a server has of the images of one study that a batch has stored, or found, there.

    ``others`` are the numbers of the items whose file is another one than the server's: as it comes back, where bytes
    are kept; else as far as the batch is known to have stored another under the same UID.
    """

    there: set[str]
    others: set[int]
    compared: Literal["bytes", "uids"]


def verify(done: Sequence[ItemOutcome], context: PassContext) -> list[ItemResult]:
    """Whether every image is where its receipt says, or was before; and the same file, where the server keeps bytes.

    Of the first images of a study that are another file, the elements that differ are named.
    """
    seen = _check_studies(done, context)
    answers = {one.item.number: _verified(one, seen[_where(one)]) for one in done}
    return list((answers | _named(done, answers, seen, context)).values())


def _verified(one: ItemOutcome, seen: CheckedItems | CourierError) -> ItemOutcome | CourierError:
    if isinstance(seen, CourierError):
        return seen
    if one.result["image_uid"] not in seen.there:
        return _now(one, "missing", f"{one.server_name} does not have the image; retry the batch to store it again.")
    if one.item.number in seen.others:
        return _now(one, "differs", _difference(one, seen))
    return ItemOutcome(one.item, "verified", server=one.server_name, result={"compared": seen.compared})


def _named(
    done: Sequence[ItemOutcome],
    answers: Mapping[int, ItemOutcome | CourierError],
    seen: Mapping[tuple[str, str], CheckedItems | CourierError],
    context: PassContext,
) -> dict[int, ItemOutcome | CourierError]:
    """Answers about images that are another file, with the elements that differ."""
    found: dict[int, ItemOutcome | CourierError] = {}
    tried: Counter[tuple[str, str]] = Counter()
    for one in done:
        answer, there = answers[one.item.number], seen[_where(one)]
        differs = isinstance(answer, ItemOutcome) and answer.status == "differs"
        if (
            not (differs and isinstance(there, CheckedItems) and there.compared == "bytes")
            or tried[_where(one)] >= NAMED
        ):
            continue
        tried[_where(one)] += 1
        try:
            comparison = _compared(one, context)
        except TryAgain:  # the files cannot be had at present, and it was said already that these differ
            break
        except CourierError:
            continue
        if isinstance(answer, ItemOutcome) and (words := in_words(comparison)):
            told = {"tags": list(comparison.tags), "made_by": list(comparison.made_by)}
            message = f"{answer.message.removesuffix('.')}: {words}."
            found[one.item.number] = replace(answer, message=message, result={**answer.result, **told})
    return found


def _compared(one: ItemOutcome, context: PassContext) -> Comparison:
    """The file of an item against what its server has; nothing is named of a file that is another one by now."""
    differs, pacs = Comparison(same=False), context.services.fleet[one.server_name]
    if int(one.result.get("size_bytes", 0)) > COMPARED_BYTES:
        return differs
    fetched = context.services.sources.fetch(one.item.text)
    context.usage.add(requests=1, size_bytes=fetched.size_bytes)
    try:
        if fetched.sha256 != one.result["sha256"] or fetched.size_bytes > COMPARED_BYTES:
            return differs
        instance = identify(fetched.stream)
        arrival = Arrival(instance, fetched.size_bytes, fetched.sha256, fetched.source, open=fetched.open)
        return named(differs, pacs, arrival, context.services.fleet)
    finally:
        fetched.drop()


def _difference(one: ItemOutcome, seen: CheckedItems) -> str:
    """Where no bytes could be compared, only what the batch itself has stored is known."""
    if seen.compared == "uids":
        return f"The batch has stored another file than this one on {one.server_name}, under the same UID."
    why = "than were sent" if one.status == "stored" else "than this file, which was not stored"
    return f"{one.server_name} has the image with other bytes {why}."


def undo(done: Sequence[ItemOutcome], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
    """Delete what the receipts prove to be the batch's own: those images, on that server, and as they were sent.

    ``resumed``: items that an earlier attempt may have deleted, if it came so far as to note it.
    """
    attempt, ledger = context.attempt, context.attempt.ledger
    stored = [one for one in done if one.status == "stored"]
    begun = resumed & set(context.checkpoint.get("undoing", ()))
    unclear = [one for one in done if "uncertain" in one.result]
    results: dict[int, ItemResult] = {one.item.number: None for one in stored}
    results |= {one.item.number: _not_ours(one) for one in done if one.status != "stored"}
    try:
        ours = _locked(stored, context)
        seen = _check_studies([*ours, *unclear], context)
        results |= {one.item.number: _unclear(one, seen[_where(one)]) for one in unclear}
        ready = []
        for one in ours:
            number = one.item.number
            kept = _kept(one, seen[_where(one)], resumed=number in begun or _went_with_its_study(one, context))
            if kept is None:
                ready.append(one)
            else:
                results[one.item.number] = kept
        if ready:
            context.save_checkpoint({"undoing": sorted(begun | {one.item.number for one in ready})})
        results |= _taken_away(ready, begun, context)
    finally:
        ledger.release_images(job_id=attempt.job_id, fence=attempt.fence)
        ledger.release(attempt.job_id, fence=attempt.fence)
    gone = {one.result["study_uid"] for one in ours if isinstance(results[one.item.number], ItemOutcome)}
    forget_what_is_gone(gone, context.services)
    return [results[one.item.number] for one in done]


def _locked(stored: Sequence[ItemOutcome], context: PassContext) -> list[ItemOutcome]:
    """Those that no other job is storing or deleting, and none begins to.

    Where images are only hidden, perhaps with their whole study, that is shut: nothing of ours comes into it meanwhile.
    """
    attempt, ledger = context.attempt, context.attempt.ledger
    hidden = [one for one in stored if _only_hides(one, context)]
    if hidden:  # what an attempt that died has left of its own would keep the study from being locked for delete
        ledger.release_images(job_id=attempt.job_id, fence=attempt.fence)
    locked_studies = {
        study: attempt.is_free(ledger.lock_for_delete(study, job_id=attempt.job_id, fence=attempt.fence))
        for study in dict.fromkeys(str(one.result["study_uid"]) for one in hidden)
    }
    others = [one for one in stored if one not in hidden]
    owners = ledger.lock_images([_uids(one) for one in others], job_id=attempt.job_id, fence=attempt.fence)
    locked = [one for one, owner in zip(others, owners, strict=True) if attempt.is_free(owner)]
    return [*locked, *(one for one in hidden if locked_studies[str(one.result["study_uid"])])]


def _went_with_its_study(one: ItemOutcome, context: PassContext) -> bool:
    """Whether another chunk of this undo has hidden the study, and so the image with it."""
    if not _only_hides(one, context):
        return False
    pass_of_batch = context.attempt.job_id.partition(".undo.")[0] + ".undo."
    return context.attempt.ledger.voided_study(one.server_name, one.result["study_uid"]).startswith(pass_of_batch)


def _only_hides(one: ItemOutcome, context: PassContext) -> bool:
    return only_hides(context.services.fleet[one.server_name])


def _taken_away(ready: Sequence[ItemOutcome], begun: set[int], context: PassContext) -> dict[int, ItemResult]:
    """What became of each: image by image, or by the study where images are only hidden."""
    by_study: dict[tuple[str, str], list[ItemOutcome]] = {}
    for one in ready:
        if _only_hides(one, context):
            by_study.setdefault(_where(one), []).append(one)
    alone = [one for one in ready if _where(one) not in by_study]
    fleet = context.services.fleet
    told = dict(
        zip(
            by_study,
            fleet.gather([partial(_hidden, group, begun, context) for group in by_study.values()]),
            strict=True,
        )
    )
    results: dict[int, ItemResult] = {}
    for where, group in by_study.items():
        answer = told[where]
        results |= {one.item.number: answer for one in group} if isinstance(answer, CourierError) else answer
    return results | _deleted(alone, begun, context)


def _deleted(images: Sequence[ItemOutcome], begun: set[int], context: PassContext) -> dict[int, ItemResult]:
    deletions = context.services.fleet.gather([partial(_delete, one, begun, context) for one in images])
    return {one.item.number: _taken_back(one, deletion) for one, deletion in zip(images, deletions, strict=True)}


def _hidden(group: Sequence[ItemOutcome], begun: set[int], context: PassContext) -> dict[int, ItemResult]:
    """Hide images of a study: with the study, if all of them are the batch's, which is compared before and afterwards.

    What has come in between is shown again, and reported.
    """
    pacs, study_uid = context.services.fleet[group[0].server_name], str(group[0].result["study_uid"])
    name, receipts = pacs.server.name, Receipts.of(context.attempt)
    ours = {str(one.result["image_uid"]) for one in group}
    before = hidden_on(pacs, study_uid)
    on_server = images_on(pacs, study_uid).keys()
    ours |= _in_other_chunks(group[0], on_server - ours, context)
    if before is None or on_server != ours:
        return {one.item.number: _taken_back(one, _delete_or_error(one, begun, context)) for one in group}
    removal = hide_images(pacs, study_uid, [Found("study", study_uid)], ours, before=before, receipts=receipts)
    deletion = removal.deletion
    if deletion.fate is DeletionFate.HIDDEN and not ours <= removal.hidden:
        sentence = f"{name} has not hidden all images of the study; they are looked at again."
        raise PacsMisanswered(sentence, server_name=name, server_type=pacs.server.type)
    note = removal.note or _other_count(deletion.images, len(ours), name)
    return {one.item.number: _noted(_taken_back(one, deletion), note) for one in group}


def _noted(answer: ItemOutcome | CourierError, note: str) -> ItemOutcome | CourierError:
    return replace(answer, message=note) if note and isinstance(answer, ItemOutcome) else answer


def _in_other_chunks(one: ItemOutcome, wanted: Collection[str], context: PassContext) -> set[str]:
    """Those of the ``wanted`` images of a study that the batch has stored there too, and that are still to be undone.

    Images of a study stand together in most orders, so chunks are read from here to both sides, and not all of them.
    """
    found: set[str] = set()
    if context.batch is None:
        return found
    here = one.item.number // CHUNK_ITEMS
    around = [
        chunk for at in range(1, CHUNKS_AROUND) for chunk in (here - at, here + at) if 0 <= chunk < context.batch.chunks
    ]
    batches = Batches(context.attempt.ledger)
    for chunk in around:
        if found.issuperset(wanted):
            break
        rows = batches.chunk_rows(context.batch, chunk, ("apply", "undo"))
        others = [row.outcome for row in rows if row.outcome.status == "stored" and is_to_undo(row)]
        found |= {str(other.result["image_uid"]) for other in others if _where(other) == _where(one)}
    return found & set(wanted)


def _other_count(counted: int | None, ours: int, name: str) -> str:
    if counted in (None, ours):
        return ""
    return f"{name} says that it has hidden {counted} images of the study, of which the batch has stored {ours}."


def _delete_or_error(one: ItemOutcome, begun: set[int], context: PassContext) -> Deletion | CourierError:
    try:
        return _delete(one, begun, context)
    except CourierError as error:
        return error


def _not_ours(one: ItemOutcome) -> ItemOutcome:
    return _now(one, "kept", "It was there before, and so is not the batch's.")


def _unclear(one: ItemOutcome, seen: CheckedItems | CourierError) -> ItemOutcome | CourierError:
    """Of an image that was given up although it may have arrived."""
    if isinstance(seen, CourierError):
        return seen
    if one.result["image_uid"] not in seen.there:
        return ItemOutcome(one.item, "not_there", server=one.server_name)
    name = one.server_name
    return _now(
        one, "kept", f"{name} has the image; whether the batch stored it is not known, so that is for you to say."
    )


def _kept(one: ItemOutcome, seen: CheckedItems | CourierError, *, resumed: bool) -> ItemOutcome | CourierError | None:
    """Why an image is not to be deleted; None if it is."""
    if isinstance(seen, CourierError):
        return seen
    image_uid = one.result["image_uid"]
    if image_uid not in seen.there:
        return ItemOutcome(one.item, "undone" if resumed else "not_there", server=one.server_name)
    if one.item.number in seen.others:
        return _now(one, "kept", "It is another file now than the one that was stored, and so not the batch's.")
    return None


def _delete(one: ItemOutcome, begun: set[int], context: PassContext) -> Deletion:
    pacs, resumed = context.services.fleet[one.server_name], one.item.number in begun
    return remove(pacs, [_image(one)], Receipts.of(context.attempt), permanent=True, resumed=resumed)


def _taken_back(one: ItemOutcome, deletion: Deletion | CourierError) -> ItemOutcome | CourierError:
    if is_final(deletion) and not isinstance(deletion, TryAgain):
        return ItemOutcome(one.item, "refused", deletion.payload["code"], deletion.message, server=one.server_name)
    if isinstance(deletion, CourierError):
        return deletion
    code, note = (deletion.code, deletion.note) if deletion.fate is DeletionFate.REFUSED else ("", "")
    hidden: dict[str, Any] = {"hidden": True} if deletion.fate is DeletionFate.HIDDEN else {}
    return ItemOutcome(one.item, _UNDONE[deletion.fate], code, note, server=one.server_name, result=hidden)


# --- asking the servers ---------------------------------------------------------------------------------------------


def _check_studies(
    stored: Sequence[ItemOutcome], context: PassContext
) -> dict[tuple[str, str], CheckedItems | CourierError]:
    """By server and study."""
    by_study: dict[tuple[str, str], list[ItemOutcome]] = {}
    for one in stored:
        by_study.setdefault(_where(one), []).append(one)
    fleet = context.services.fleet
    questions = [
        partial(_check_study, fleet[server], study, group, all_in=len(group) >= CHUNK_ITEMS)
        for (server, study), group in by_study.items()
    ]
    return dict(zip(by_study, fleet.gather(questions), strict=True))


def _check_study(pacs: Pacs, study_instance_uid: str, done: Sequence[ItemOutcome], *, all_in: bool) -> CheckedItems:
    """``all_in``: so many images of the study were asked for that it may be far larger, and is not listed each time.

    Several items may be files of one image.
    """
    there = pacs.present(study_instance_uid, {str(one.result["image_uid"]) for one in done})
    if not pacs.keeps_bytes:
        return CheckedItems(there, _unlike_what_was_stored(done), "uids")
    study = Found("study", study_instance_uid)
    most = WORTH_ALL * len(there)
    worth_all = bool(there) and not all_in and sum(1 for _ in islice(pacs.instances(study), most + 1)) <= most
    images = {_uids(one): _image(one) for one in done if one.result["image_uid"] in there}
    founds = [study] if worth_all else [images[uids] for uids in sorted(images)]
    digests = _digests(pacs, founds, bare=any(map(_may_lack_preamble, done)))
    return CheckedItems(there, {one.item.number for one in done if one.result["sha256"] not in digests}, "bytes")


def _unlike_what_was_stored(done: Sequence[ItemOutcome]) -> set[int]:
    stored = {one.result["image_uid"]: one.result["sha256"] for one in done if one.status == "stored"}
    return {
        one.item.number
        for one in done
        if stored.get(one.result["image_uid"], one.result["sha256"]) != one.result["sha256"]
    }


def _may_lack_preamble(one: ItemOutcome) -> bool:
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


def _where(one: ItemOutcome) -> tuple[str, str]:
    return one.server_name, str(one.result["study_uid"])


def _image(one: ItemOutcome) -> Found:
    return Found("image", one.result["study_uid"], one.result["series_uid"], one.result["image_uid"])


def _uids(one: ItemOutcome) -> tuple[str, str, str]:
    """Image, study, series."""
    return one.result["image_uid"], one.result["study_uid"], one.result["series_uid"]


def _now(one: ItemOutcome, status: ItemStatus, message: str) -> ItemOutcome:
    return ItemOutcome(one.item, status, message=message, server=one.server_name)
