"""Copies of studies that are kept before they are deleted: written as archives, and brought back from them.

What a download writes is said in `worker.batches.downloads`, how an image gets to a server in
`worker.batches.study_copy`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, ClassVar, cast

from courier.errors import (
    InvalidRequest,
    InvalidUid,
    MissingUid,
    NotDicom,
    PacsMisanswered,
    PacsRejected,
    SourceUnreachable,
    StudyConflict,
)
from courier.settings import ServerSettings
from worker.batches.coordinator import PassContext
from worker.batches.equality import Compared, Side, compare
from worker.batches.removals import hidden_on, remove_study, revoke
from worker.batches.study_copy import Transfer, copy_images, images_on
from worker.batches.throttle import metered
from worker.dicom.fingerprints import Rewrites
from worker.jobs.attempt import Attempt
from worker.jobs.download import archived
from worker.jobs.hangs import Hangs, poisoned
from worker.jobs.placement import check_no_open_circuit
from worker.jobs.receipts import Receipts
from worker.jobs.services import Services
from worker.jobs.streamed_instance import Incoming
from worker.pacs.protocol import Deletion, Found, Pacs, Retrieved, View
from worker.runtime.scratch import drop
from worker.storage.destinations import Archive, Destinations, StudyFingerprint
from worker.storage.study_marks import CHUNK_BYTES, MANIFEST, UNREADABLE, unpacked

_NOT_DELETED = "nothing was deleted. Order the deletion of this study again"
_NOT_STORED = "nothing was stored. Put an undamaged copy of it there, then undo the batch again"


@dataclass(frozen=True)
class Backup:
    """Where the copy of a study on one server lies.

    ``images_sha256`` is over the UIDs of its images, ``archive_sha256`` over the archive as it was written; None if an
    attempt wrote it that was interrupted then. ``hidden_before`` is what the server hid of the study when it was
    written; None where that is not known.
    """

    url: str
    images: int
    images_sha256: str
    overwrites_prevented: bool = True  # as the store promised when it was written
    archive_sha256: str | None = None
    hidden_before: Sequence[str] | None = None

    def fingerprint(self, study_uid: str) -> StudyFingerprint:
        return StudyFingerprint(study_uid, self.images, self.images_sha256)


def back_up(pacs: Pacs, study_uid: str, folder: str, attempt: Attempt, destinations: Destinations) -> Backup | None:
    """Write the server's copy of a study below ``folder``; None if it has none. What is there already stays.

    The name says what is in it: a study that has got more images since becomes a second archive.
    """
    founds = pacs.find("study", study_uid)
    if not founds:
        return None

    def place_for(fingerprint: StudyFingerprint) -> Archive:
        name = f"{study_uid}-{fingerprint.images_sha256[:12]}.zip"
        return destinations.archive(f"{folder.rstrip('/')}/{pacs.server.name}/{name}")

    before = hidden_on(pacs, study_uid)
    place, fingerprint, sha256 = archived(pacs, founds[0], place_for, attempt)
    hidden = None if before is None else sorted(before)
    return Backup(
        place.shown, fingerprint.images, fingerprint.images_sha256, place.overwrites_prevented, sha256, hidden
    )


def is_all_backed_up(pacs: Pacs, study_uid: str, backup: Backup, destinations: Destinations) -> bool:
    """Whether the archive is there and holds exactly the images that the server lists now."""
    now = StudyFingerprint.of(study_uid, images_on(pacs, study_uid))
    there = destinations.archive(backup.url).read_fingerprint()
    return there == now == backup.fingerprint(study_uid)


def remove_backed_up(pacs: Pacs, study_uid: str, backup: Backup, receipts: Receipts, *, resumed: bool) -> Deletion:
    """Delete the study for good, if it has the images that were kept, and no others.

    ``resumed``: an attempt that died may have hidden some or all of them.

    Raises
    ------
    InvalidRequest
        It has others. Nothing was deleted for good, and what that attempt has hidden is shown again.
    """
    before, now = backup.hidden_before, set(images_on(pacs, study_uid))
    by_us = (hidden_on(pacs, study_uid) or frozenset()) - set(before) if resumed and before is not None else set()
    if StudyFingerprint.of(study_uid, now | by_us) != backup.fingerprint(study_uid) and (now or by_us):
        revoke(pacs, study_uid, by_us, receipts)
        raise has_others(pacs, backup)
    now |= by_us
    removal = remove_study(pacs, study_uid, now, before=before, receipts=receipts)
    if removal.came:
        sentence = f"{pacs.server.name}: {removal.note} Nothing was deleted; order the deletion of this study again."
        raise InvalidRequest(sentence, server_name=pacs.server.name, server_type=pacs.server.type)
    return removal.deletion


def has_others(pacs: Pacs, backup: Backup) -> InvalidRequest:
    name = pacs.server.name
    sentence = f"{name} lists other images than {backup.url} holds; order the deletion of this study again."
    return InvalidRequest(sentence, server_name=name, server_type=pacs.server.type)


def prove(pacs: Pacs, study_uid: str, backup: Backup, services: Services) -> None:
    """Read the archive back, all of it, and compare it with what the server has now, before any of that is deleted.

    Raises
    ------
    StudyConflict
        It is gone or damaged: not the bytes that were written, or an image in it that is cut short, is not the one that
        the manifest names, or has not the digest that it had when it came from the server. Or the server has another
        image under one of its UIDs by now.
    SourceUnreachable
        It cannot be read at present.
    """
    with _opened(services.destinations.archive(backup.url), pacs, study_uid, backup, so=_NOT_DELETED) as copy:
        now = Side(pacs, images_on(pacs, study_uid), goes=True, is_made=False)
        _check_unchanged(study_uid, copy, now, services.settings.sources.max_bytes, so=_NOT_DELETED)


def restore(pacs: Pacs, study_uid: str, backup: Backup, context: PassContext) -> dict[str, Any]:
    """Bring back to the server what it lacks of a kept study, and compare all of it.

    Raises
    ------
    StudyConflict
        The archive is gone, or damaged, or not what was kept, or the server has got another image under one of the
        UIDs; nothing was stored.
    PacsRejected
        The server does not take some of the images back.
    PacsMisanswered
        The server does not show them as they were kept; it is tried again.
    """
    name, archive = pacs.server.name, context.services.destinations.archive(backup.url)
    check_no_open_circuit(context.services, [name], changed=name)
    with _opened(archive, pacs, study_uid, backup, so=_NOT_STORED) as copy:
        before = images_on(pacs, study_uid)
        limit = context.services.settings.sources.max_bytes
        _check_unchanged(study_uid, copy, Side(pacs, before), limit, so="nothing was stored")
        wanted = copy.series_of.keys() - before.keys()
        source = metered(cast(Pacs, copy), context.usage)
        receipts, check_may_go_on = Receipts.of(context.attempt), lambda _: context.attempt.check_ours()
        hangs = Hangs(context.attempt)
        transfer = Transfer(
            source, pacs, study_uid, resumed=True, receipts=receipts, check_may_go_on=check_may_go_on, hangs=hangs
        )
        if wanted:
            copy_images(transfer, wanted, on_source=copy.series_of, on_target=before)
        moot = _check_taken(transfer)
        back = copy.series_of.keys() - moot
        told = _check_restored(pacs, study_uid, copy, back, transfer.stored.keys(), limit)
        return {"restored": len(wanted - moot), **told, **({"left_out": sorted(moot)} if moot else {})}


def _check_taken(transfer: Transfer) -> set[str]:
    """The UIDs of what need not come back: notes that hid images which are gone."""
    moot = transfer.moot
    refused = {uid: outcome for uid, outcome in transfer.refused.items() if uid not in moot}
    if refused:
        uid, outcome = next(iter(refused.items()))
        name, server_type = transfer.target.server.name, transfer.target.server.type
        sentence = f"{name} does not take {len(refused)} images back, {uid} for one: {outcome.message}"
        raise PacsRejected(sentence, server_name=name, server_type=server_type)
    if transfer.given_up:
        # An operator who orders the undo again wants them sent.
        transfer.hangs.forget(transfer.target, transfer.given_up)
        uid, hangs = min(transfer.given_up.items())
        raise poisoned(transfer.target, hangs, {"study_uid": transfer.study_uid, "image_uid": uid})
    return moot


def _check_unchanged(study_uid: str, copy: _Copy, now: Side, limit: int, *, so: str) -> None:
    """What the server has of the copy ``now`` has to be what was kept; ``so`` ends the sentence."""
    found = _compare(study_uid, copy, now, copy.series_of.keys() & now.series_of.keys(), limit)
    if found.different:
        name, uid = now.pacs.server.name, found.different[0]
        sentence = f"{name} gives back another image under {uid} than was kept ({found.why[uid]}); {so}."
        raise _conflict(now.pacs, sentence)


def _check_restored(
    pacs: Pacs, study_uid: str, copy: _Copy, back: Collection[str], sent: Collection[str], limit: int
) -> dict[str, Any]:
    """What the server shows now against what was kept: the UIDs ``back``, and what was ``sent`` as it gives it back.

    What it had before has been compared already.
    """
    name, on_server = pacs.server.name, images_on(pacs, study_uid)
    if missing := set(back) - on_server.keys():
        sentence = f"{name} does not list {len(missing)} of the images that were brought back; it is looked at again."
        raise PacsMisanswered(sentence, server_name=name, server_type=pacs.server.type)
    found = _compare(study_uid, copy, Side(pacs, on_server), sent, limit)
    if found.different:
        uid = found.different[0]
        sentence = f"{name} gives back other images than were restored, {uid} for one ({found.why[uid]})."
        raise PacsMisanswered(sentence, server_name=name, server_type=pacs.server.type)
    return {"compared": "bytes" if pacs.keeps_bytes else "elements"}


def _compare(study_uid: str, copy: _Copy, side: Side, wanted: Collection[str], limit: int) -> Compared:
    return compare(study_uid, Side(cast(Pacs, copy), copy.series_of), side, wanted, max_spool_bytes=limit)


@dataclass(frozen=True)
class _Copy:
    """An archive that was read through, as the side that a transfer takes images from."""

    server: ServerSettings
    archive: zipfile.ZipFile
    entries: Mapping[str, Mapping[str, Any]]
    keeps_bytes: ClassVar = True
    rewrites: ClassVar = Rewrites()
    hiding: ClassVar = None

    @property
    def series_of(self) -> dict[str, str]:
        return {uid: str(entry["series_uid"]) for uid, entry in self.entries.items()}

    @contextmanager
    def retrieve(self, found: Found, *, view: View = "as_set") -> Iterator[Iterator[Retrieved]]:  # noqa: ARG002
        yield (
            Retrieved(str(entry["transfer_syntax_uid"]), self._chunks(entry))
            for uid, entry in self.entries.items()
            if found.series_instance_uid in (None, entry["series_uid"]) and found.sop_instance_uid in (None, uid)
        )

    def check(self, study_uid: str) -> None:
        """Read every image to its end; `_Damaged` if one is not what the manifest says, or something else is there."""
        if sorted(self.archive.namelist()) != sorted([MANIFEST, *(str(one["file"]) for one in self.entries.values())]):
            raise _Damaged("it does not hold the files that its manifest names")
        for uid, entry in self.entries.items():
            try:
                image = Incoming(self._chunks(entry), blame=lambda error: error)
                for _ in image.chunks():
                    pass
            except (NotDicom, MissingUid, InvalidUid) as error:
                raise _Damaged(f"{entry['file']} in it cannot be used: {error.message}") from error
            told, instance = (study_uid, entry["series_uid"], uid), image.instance
            if told != (instance.study_instance_uid, instance.series_instance_uid, instance.sop_instance_uid):
                raise _Damaged(f"{entry['file']} in it is another image than its manifest says")
            if (image.sha256, image.size_bytes) != (entry["sha256"], entry["size_bytes"]):
                raise _Damaged(f"{entry['file']} in it has not the digest of its manifest")

    def _chunks(self, entry: Mapping[str, Any]) -> Iterator[bytes]:
        with self.archive.open(str(entry["file"])) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


class _Damaged(Exception):
    """What is wrong with an archive."""


@contextmanager
def _opened(archive: Archive, pacs: Pacs, study_uid: str, backup: Backup, *, so: str) -> Iterator[_Copy]:
    """The archive on this machine's disk, read through and found to be what was kept; ``so`` ends the sentences."""
    if not _is_there(archive):
        raise _conflict(pacs, f"The backup {archive.shown} is not there any more; {so}.")
    with ExitStack() as files:
        with _room():
            file = tempfile.TemporaryFile()  # noqa: SIM115 - a full disk does not let it be closed as it should
            files.callback(drop, file)
            sha256 = _spool(archive.read(), file)
        with ExitStack() as stack:
            try:
                if backup.archive_sha256 not in (None, sha256):
                    raise _Damaged("its bytes are not those that were written")
                opened = stack.enter_context(unpacked(file))
                manifest = json.loads(opened.read(MANIFEST))
                copy = _Copy(pacs.server, opened, {str(entry["image_uid"]): entry for entry in manifest["instances"]})
                if StudyFingerprint.of(study_uid, copy.series_of) != backup.fingerprint(study_uid):
                    raise _Damaged("it does not hold the images that were kept")
                copy.check(study_uid)
            except (_Damaged, *UNREADABLE) as error:
                what = str(error) if isinstance(error, _Damaged) else f"it cannot be read ({type(error).__name__})"
                raise _conflict(pacs, f"The backup {archive.shown} is damaged: {what}; {so}.") from error
            yield copy


def _is_there(archive: Archive) -> bool:
    """What is there and is no archive of ours is there too: reading it says what is wrong with it."""
    try:
        return archive.read_fingerprint() is not None
    except InvalidRequest as error:
        if error.details.get("reason") != "exists":
            raise
        return True


def _spool(chunks: Iterable[bytes], file: IO[bytes]) -> str:
    """The SHA-256 of what has come."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        file.write(chunk)
    file.flush()  # or a full disk would only be noticed while it is read
    return digest.hexdigest()


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        sentence = f"The worker has no room to read the kept archive ({error.strerror}); free its temporary folder."
        raise SourceUnreachable(sentence) from error


def _conflict(pacs: Pacs, sentence: str) -> StudyConflict:
    return StudyConflict(sentence, server_name=pacs.server.name, server_type=pacs.server.type)
