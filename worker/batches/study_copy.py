"""Images of one study on their way from one server to another, straight through: none is kept.

What is asked for in which pieces, how it is cut into requests, and what an answer means for each image. When a study
is brought over, and what is checked afterwards, is said elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import TypeVar

from courier.errors import (
    CourierError,
    InvalidUid,
    MissingUid,
    NotDicom,
    NotFound,
    PacsMisanswered,
    PacsRejected,
    PacsUnavailable,
)
from worker.dicom.instances import title_code
from worker.jobs.download import to_ask
from worker.jobs.hangs import Hangs
from worker.jobs.placement import is_refused_whole, reject_if_it_persists
from worker.jobs.receipts import Receipts
from worker.jobs.streamed_instance import Incoming, digest_of
from worker.jobs.unseen import as_shown
from worker.pacs.notes import KEY_OBJECT, REJECTION_TITLES
from worker.pacs.protocol import Fate, Found, Outcome, Pacs, Part, StreamedInstance
from worker.storage.spool import Limits, spool

#: A request ends after so many images or so many bytes: what breaks off later leaves what was answered.
REQUEST_IMAGES = 50
REQUEST_BYTES = 64 * 1_048_576
#: How long one image may take that has to be spooled.
SPOOL_TIMEOUT_S = 3600.0
#: A document that may be a rejection note is read up to here, which is enough for a hundred thousand images.
NOTE_BYTES = 16 * 1_048_576
LEFT_OUT = "It is a rejection note of an archive."
LENGTH_REQUIRED = 411
NOT_FOUND = 404

ErrorKind = TypeVar("ErrorKind", bound=CourierError)


@dataclass
class Transfer:
    """One study on its way, and what has come of each image.

    ``resumed``: an earlier attempt may have pushed some of it, so what is there already may be ours.
    ``check_may_go_on`` is called before each request, with the number of images that are stored.
    """

    source: Pacs
    target: Pacs
    study_uid: str
    resumed: bool = False
    receipts: Receipts = field(default_factory=Receipts)
    check_may_go_on: Callable[[int], None] = lambda _: None
    max_spool_bytes: int = 4 * 1024**3
    pending_wait_s: float | None = None
    #: What we stored, with the digest of what passed.
    stored: dict[str, str] = field(default_factory=dict)
    #: What somebody else stored meanwhile.
    there: set[str] = field(default_factory=set)
    refused: dict[str, Outcome] = field(default_factory=dict)
    size_bytes: int = 0
    warnings: set[str] = field(default_factory=set)
    #: Whether images are spooled one by one, because the target does not take what has no announced length.
    spooled: bool = False
    #: The images that the source lists, or has sent, each with its series.
    listed: dict[str, str] = field(default_factory=dict)
    #: What was sent once and not answered for, and so may be ours where it is there already.
    unanswered: set[str] = field(default_factory=set)
    #: How often the target failed at an image, and since when; earlier attempts included.
    faults: dict[str, tuple[int, float]] = field(default_factory=dict)
    hangs: Hangs = field(default_factory=Hangs)
    #: How often the target had hung at images when they were given up for it, by a batch that is tried again.
    hangs_seen: Mapping[str, int] = field(default_factory=dict)
    #: Images that are not sent again, and how often the target hung at each.
    given_up: dict[str, int] = field(default_factory=dict)
    #: What an answer left open.
    unclear: dict[str, Outcome] = field(default_factory=dict)
    #: What both servers were read for in this attempt, and have the same of, so that one copy may go.
    proven: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.spooled = not self.target.accepts_streams

    @property
    def leaves_notes(self) -> bool:
        """Whether rejection notes stay behind: where one of the servers heeds them."""
        return self.source.hiding is not None or self.target.hiding is not None

    def leave_out(self, note_uids: Iterable[str]) -> None:
        """They are rejection notes, which are not sent."""
        for uid in note_uids:
            self.refused.setdefault(uid, Outcome(uid, Fate.REJECTED, message=LEFT_OUT, is_moot=True))

    @property
    def moot(self) -> set[str]:
        """What was refused and is not missed (`Outcome.is_moot`)."""
        return {uid for uid, outcome in self.refused.items() if outcome.is_moot}

    @property
    def settled(self) -> set[str]:
        return self.stored.keys() | self.there | self.refused.keys() | self.given_up.keys()

    def error(self, kind: type[ErrorKind], pacs: Pacs, sentence: str, **more: object) -> ErrorKind:
        details = {"study_uid": self.study_uid}
        server = pacs.server
        return kind(sentence, server_name=server.name, server_type=server.type, details=details, **more)


def images_on(pacs: Pacs, study_uid: str) -> dict[str, str]:
    """The images of a study that a server lists, each with its series; {} if the server says that it has no such study.

    Only where it lists none it is asked for the study, too: silence about images is not yet "not there".
    """
    return {str(image.sop_instance_uid): str(image.series_instance_uid) for image in listed_on(pacs, study_uid)}


def listed_on(pacs: Pacs, study_uid: str) -> list[Found]:
    """The same, as the server lists them."""
    try:
        images = list(pacs.instances(Found("study", study_uid)))
    except PacsMisanswered as error:
        if error.details.get("status") != NOT_FOUND:  # so do some answer for the images of a study that is not there
            raise
        images = []
    if not images and pacs.find("study", study_uid):
        raise _misanswered(pacs, study_uid, f"{pacs.server.name} lists the study but none of its images.")
    return images


def copy_images(
    transfer: Transfer, wanted: Collection[str], *, on_source: Mapping[str, str], on_target: Collection[str]
) -> None:
    """Bring the ``wanted`` images to the target; ``transfer`` says what came of each.

    What the source sends although neither server had listed it is brought along, because the study has grown. An image
    of which an answer says nothing is sent once more, alone, so that one bad file among several is told from the rest.

    Raises
    ------
    CourierError
        A server failed; what was stored before that stays, and is known to ``transfer`` as far as it was answered.
    """
    transfer.receipts.copying(transfer.target, transfer.study_uid)
    try:
        _copy_images(transfer, wanted, on_source=on_source, on_target=on_target)
    finally:
        if transfer.stored:
            transfer.receipts.copied(transfer.target, transfer.study_uid, len(transfer.stored))


def _copy_images(
    transfer: Transfer, wanted: Collection[str], *, on_source: Mapping[str, str], on_target: Collection[str]
) -> None:
    transfer.listed = dict(on_source)
    transfer.unclear.clear()
    transfer.given_up = transfer.hangs.given_up(transfer.target, wanted, transfer.hangs_seen)
    hung = transfer.hangs.counted(transfer.target, wanted).keys() - transfer.given_up.keys()
    first = set(wanted) - hung - transfer.given_up.keys()
    _pass(transfer, first, known=on_source.keys() | set(on_target), alone=False)
    again = {uid for uid, outcome in transfer.unclear.items() if _is_to_go_alone(outcome, transfer)}
    transfer.unanswered |= again
    for uid in again:
        del transfer.unclear[uid]
    again |= hung
    _pass(transfer, again, known=transfer.listed.keys() | set(on_target), alone=True)
    _check_all_came(transfer, wanted)


def _is_to_go_alone(outcome: Outcome, transfer: Transfer) -> bool:
    """An answer for several images may say nothing of one, and explains the failure of one alone."""
    return outcome.fate is Fate.UNMENTIONED or (outcome.is_doubtful and bool(transfer.stored))


def digests_on(
    pacs: Pacs,
    study_uid: str,
    series_of: Mapping[str, str],
    wanted: Collection[str],
    *,
    only_listed: bool = False,
    left_out: Collection[str] = (),
) -> dict[str, str]:
    """The SHA-256 of what a server gives back for each of the ``wanted`` images, without its preamble.

    It is empty for a UID under which it gives back two different images. ``only_listed``, ``left_out``: see `received`.
    """
    digests: dict[str, str] = {}
    for image in received(pacs, study_uid, series_of, wanted, only_listed=only_listed, left_out=left_out):
        for _ in image.chunks():
            pass
        uid = image.instance.sop_instance_uid
        if digests.setdefault(uid, image.sha256) != image.sha256:
            digests[uid] = ""
    return {uid: digest for uid, digest in digests.items() if uid in wanted}


def bare_digests_on(pacs: Pacs, study_uid: str) -> list[str]:
    """The same for all images of a study, in no order and without reading whose they are."""
    try:
        with pacs.retrieve(Found("study", study_uid)) as parts:
            return [digest_of(part.chunks) for part in parts]
    except NotFound as error:
        raise _misanswered(pacs, study_uid, f"{pacs.server.name} lists the study and does not send it.") from error
    except (NotDicom, MissingUid, InvalidUid) as error:
        raise _unreadable(pacs, study_uid, error) from error


# --- one way through --------------------------------------------------------------------------------------------


def _pass(transfer: Transfer, wanted: set[str], *, known: set[str], alone: bool) -> None:
    """Ask for ``wanted`` and send it on, ``alone`` or many to a request; the rest again, if it has to be spooled."""
    if not wanted:
        return
    spooled = transfer.spooled
    transfer.check_may_go_on(len(transfer.stored))  # also before the source is asked for anything
    source, moot = transfer.source, transfer.moot
    with closing(received(source, transfer.study_uid, transfer.listed, wanted, left_out=moot)) as images:
        arriving = _Arriving(_without_notes(transfer, images), lambda uid: uid in wanted or uid not in known)
        while transfer.spooled == spooled and arriving.more():
            transfer.check_may_go_on(len(transfer.stored))
            _send(transfer, arriving, alone=alone)
        arriving.check()
    if transfer.spooled != spooled:
        _pass(transfer, wanted - transfer.settled, known=known | transfer.settled, alone=alone)


def _without_notes(transfer: Transfer, images: Iterator[Incoming]) -> Iterator[Incoming]:
    """``images`` without rejection notes, where one of the servers heeds them; of what may be one, nothing is sent."""
    for image in images:
        instance = image.instance
        if not transfer.leaves_notes or instance.sop_class_uid != KEY_OBJECT:
            yield image
            continue
        title = _title(image)
        if title in REJECTION_TITLES:
            transfer.leave_out([instance.sop_instance_uid])
        elif title is None and transfer.target.hiding is not None:
            sentence = "Whether it is a rejection note cannot be told, and such a note hides the images that it names."
            _apply_outcome(transfer, image, Outcome(instance.sop_instance_uid, Fate.REJECTED, message=sentence))
        else:
            yield image


def _title(image: Incoming) -> str | None:
    """The code of a document's title; None where it cannot be told."""
    content = image.ahead(NOTE_BYTES)
    try:
        return None if content is None else title_code(BytesIO(content))
    except NotDicom:
        return None


def _send(transfer: Transfer, arriving: _Arriving, *, alone: bool) -> None:
    """One request. A target that wants to know its length (RFC 9110 15.5.12) is given spooled images from now on."""
    if transfer.spooled:
        _spool_and_send(transfer, arriving.take())
        return
    share = _RequestImages(arriving, 1 if alone else REQUEST_IMAGES)
    try:
        with transfer.hangs.sending(transfer.target, lambda: [one.instance.sop_instance_uid for one in share.sent]):
            outcomes = transfer.target.store_stream(share)
    except (PacsRejected, PacsMisanswered) as error:
        if error.details.get("status") == LENGTH_REQUIRED:
            transfer.spooled = True
            return
        _refused_as_a_whole(transfer, share.sent, error)
        return
    outcomes = as_shown(transfer.target, [image.instance for image in share.sent], outcomes)
    for image, outcome in zip(share.sent, outcomes, strict=True):
        _apply_outcome(transfer, image, outcome)


def _spool_and_send(transfer: Transfer, image: Incoming) -> None:
    limits = Limits(transfer.max_spool_bytes, time.monotonic() + SPOOL_TIMEOUT_S, SPOOL_TIMEOUT_S)
    with spool(image.chunks(), source=f"An image of {transfer.source.server.name}", limits=limits) as fetched:
        try:
            with transfer.hangs.sending(transfer.target, lambda: [image.instance.sop_instance_uid]):
                (outcome,) = transfer.target.store([Part(image.instance, fetched.open, fetched.size_bytes)])
        except (PacsRejected, PacsMisanswered) as error:
            _refused_as_a_whole(transfer, [image], error)
        else:
            _apply_outcome(transfer, image, *as_shown(transfer.target, [image.instance], [outcome]))


def _refused_as_a_whole(transfer: Transfer, sent: list[Incoming], error: CourierError) -> None:
    """A request that is refused for good says something of its image only if it had but one."""
    if error.server_name != transfer.target.server.name or not is_refused_whole(error):
        raise error
    fate = Fate.REJECTED if len(sent) == 1 and isinstance(error, PacsRejected) else Fate.UNMENTIONED
    for image in sent:
        _apply_outcome(transfer, image, Outcome(image.instance.sop_instance_uid, fate, message=error.message))


def _apply_outcome(transfer: Transfer, image: Incoming, outcome: Outcome) -> None:
    uid = image.instance.sop_instance_uid
    transfer.listed.setdefault(uid, image.instance.series_instance_uid)
    if outcome.is_doubtful:
        outcome = _doubtful(transfer, uid, outcome)
    may_be_ours = transfer.resumed or uid in transfer.unanswered
    if outcome.fate is Fate.STORED or (outcome.fate is Fate.ALREADY_THERE and may_be_ours):
        transfer.stored[uid] = image.sha256
        transfer.size_bytes += image.size_bytes
        transfer.warnings |= set(outcome.warnings)
    elif outcome.fate is Fate.ALREADY_THERE:
        transfer.there.add(uid)
    elif outcome.fate in (Fate.CONFLICT, Fate.REJECTED):
        transfer.refused[uid] = outcome
    else:
        transfer.unclear[uid] = outcome


def _doubtful(transfer: Transfer, uid: str, outcome: Outcome) -> Outcome:
    """Count the failures at the image; when others are stored and it never is, the fault is its own."""
    ledger = transfer.receipts.ledger
    if ledger is None:
        return outcome
    faults, since_s = transfer.faults.get(uid, (0, ledger.clock_s()))
    transfer.faults[uid] = (faults + 1, since_s)
    return reject_if_it_persists(outcome, faults + 1, since_s, transfer.target, ledger)


def _check_all_came(transfer: Transfer, wanted: Collection[str]) -> None:
    """An error for what is neither stored nor refused: the next attempt asks for that alone."""
    source, target = transfer.source, transfer.target
    if transfer.unclear:
        outcome = next(iter(transfer.unclear.values()))
        count = len(transfer.unclear)
        if outcome.fate is Fate.UNMENTIONED:
            named = f"{count} images, {min(transfer.unclear)} for one"
            sentence = f"{target.server.name} did not say what became of {named}; they are sent again."
            raise transfer.error(PacsMisanswered, target, sentence)
        sentence = f"{target.server.name} had trouble while storing {count} images ({outcome.message})."
        wait_s = transfer.pending_wait_s if outcome.fate is Fate.PENDING else None
        error = transfer.error(PacsUnavailable, target, sentence, retry_after_s=wait_s)
        error.payload["details"] |= outcome.details
        if outcome.failure_reason is not None:
            error.payload["details"] |= {"failure_reason": outcome.failure_reason}
        raise error
    if missing := set(wanted) - transfer.settled:
        sentence = f"{source.server.name} did not send {len(missing)} of the images that it lists; it is asked again."
        raise transfer.error(PacsMisanswered, source, sentence)


def pending(transfer: Transfer) -> list[str]:
    """The images of which the target says that they are being stored, by us or by what was left behind."""
    return [uid for uid, outcome in transfer.unclear.items() if outcome.fate is Fate.PENDING]


# --- images as they arrive --------------------------------------------------------------------------------------


class _Arriving:
    """Those images of an answer that are wanted, one ahead, so that no request is begun for nothing.

    An error between two images waits until the request before it has its answer; one in the middle of an image is the
    request's, which it breaks off.
    """

    def __init__(self, images: Iterator[Incoming], is_wanted: Callable[[str], bool]) -> None:
        self._images: Iterator[Incoming] | None = images
        self._is_wanted = is_wanted
        self._seen: set[str] = set()
        self._ahead: Incoming | None = None
        self._error: CourierError | None = None

    def more(self) -> bool:
        """Whether there is another; what was left of the one before is skipped."""
        if self._ahead is None and self._images is not None:
            self._ahead = self._next(self._images)
        return self._ahead is not None

    def take(self) -> Incoming:
        """The one that `more` has found."""
        image, self._ahead = self._ahead, None
        assert image is not None  # noqa: S101 - whoever takes has asked
        return image

    def check(self) -> None:
        """Raise what the images ended with, if it was an error."""
        if self._error is not None:
            raise self._error

    def _next(self, images: Iterator[Incoming]) -> Incoming | None:
        try:
            for image in images:
                uid = image.instance.sop_instance_uid
                if uid not in self._seen and self._is_wanted(uid):
                    self._seen.add(uid)
                    return image
        except CourierError as error:
            self._error = error
        self._images = None
        return None


class _RequestImages:
    """As many of the arriving images as go into one request; ``sent`` are those that have begun to pass."""

    def __init__(self, arriving: _Arriving, most_images: int) -> None:
        self.sent: list[Incoming] = []
        self._arriving = arriving
        self._most_images = most_images

    def __iter__(self) -> Iterator[StreamedInstance]:
        size_bytes = 0
        while len(self.sent) < self._most_images and size_bytes < REQUEST_BYTES and self._arriving.more():
            image = self._arriving.take()
            self.sent.append(image)
            yield StreamedInstance(image.instance, image.chunks())
            size_bytes += image.size_bytes


def received(
    pacs: Pacs,
    study_uid: str,
    series_of: Mapping[str, str],
    wanted: Collection[str],
    *,
    only_listed: bool = False,
    left_out: Collection[str] = (),
) -> Generator[Incoming]:
    """The images that a server sends when it is asked for ``wanted``, others among them, but those ``left_out``.

    What does not belong to the study, cannot be read or ends too early is an error of the server. With ``only_listed``
    so is an image that ``series_of``, the server's list, lacks, and images come as the server shows them.
    """
    name, blame = pacs.server.name, partial(_unreadable, pacs, study_uid)
    try:
        for asked in to_ask(Found("study", study_uid), series_of, wanted):
            with pacs.retrieve(asked, view="as_shown" if only_listed else "as_set") as parts:
                for part in parts:
                    image = Incoming(part.chunks, blame=blame, with_preamble=False)
                    if image.instance.study_instance_uid != study_uid:
                        raise _misanswered(pacs, study_uid, f"{name} sent an image of another study.")
                    if image.instance.sop_instance_uid in left_out:
                        continue
                    if only_listed and image.instance.sop_instance_uid not in series_of:
                        sentence = f"{name} sent an image that it does not list; nothing was deleted."
                        raise _misanswered(pacs, study_uid, sentence)
                    yield image
    except NotFound as error:
        sentence = f"{name} lost a part of the study meanwhile; it is looked at again."
        raise _misanswered(pacs, study_uid, sentence) from error


def _unreadable(pacs: Pacs, study_uid: str, error: CourierError) -> PacsMisanswered:
    sentence = f"{pacs.server.name} sent an image that cannot be used. {error.message}"
    return _misanswered(pacs, study_uid, sentence)


def _misanswered(pacs: Pacs, study_uid: str, sentence: str) -> PacsMisanswered:
    server, details = pacs.server, {"study_uid": study_uid}
    return PacsMisanswered(sentence, server_name=server.name, server_type=server.type, details=details)
