"""Images by the thousand: the kind of batch whose items are the URLs of images to upload (docs/batches.md).

What a single upload does step by step (`worker/jobs/upload.py`) happens here to a *load* of images at a time: one step
in the ledger holds them all, a server is asked per study, and one STOW carries many. While a load is pushed the next
one is fetched. What makes a second attempt harmless is the checkpoint again: before a load is pushed it says what goes
where.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from courier.batches.planner import Planned
from courier.batches.store import CHUNK_ITEMS, NOWHERE, Batch, Item, ItemOutcome, ItemStatus, Pass, Row, is_to_undo
from courier.errors import (
    CourierError,
    ImageAlreadyExists,
    InvalidRequest,
    NeedsPerson,
    PacsMisanswered,
    PacsUnavailable,
    Refused,
    SourceNotAllowed,
    TryAgain,
    is_final,
    waits_for_server,
)
from courier.ledger.breakers import is_suspension
from courier.ledger.jobs import StoredImage
from courier.messages import BatchUploadJob, read_job
from courier.redaction import redact_url
from worker.batches.confirmations import Command
from worker.batches.coordinator import ItemResult as Result
from worker.batches.coordinator import PassContext, PassHandler, order, unbegun
from worker.batches.upload_checks import undo, verify
from worker.dicom.instances import Instance, identify
from worker.jobs.attempt import Attempt, ServerUnknown
from worker.jobs.hangs import Hangs, poisoned
from worker.jobs.knowledge import server_left
from worker.jobs.maintenance import check_not_known_there, note_stored_elsewhere, warned
from worker.jobs.placement import (
    NOT_SENT,
    PENDINGS_BEFORE_REMOVAL,
    REFUSED_UNREAD,
    Placement,
    PlacementOrder,
    already_exists,
    answered,
    image_of,
    is_refused_whole,
    open_circuits,
    refusal,
    reject_if_it_persists,
    settle,
    sole_target,
)
from worker.jobs.receipts import Receipts
from worker.jobs.routing import Decision, Exists, Follow, Presence, decide
from worker.jobs.same_bytes import Arrival
from worker.jobs.services import Services
from worker.jobs.unseen import as_shown
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import in_maintenance, suspended_error
from worker.pacs.protection import check_allowed
from worker.pacs.protocol import Fate, Outcome, Pacs, Part
from worker.storage.sources import Fetched, ListedObject

#: So many images, or bytes, make a load; so many are fetched at a time, and wait fetched for the next load to begin.
LOAD_IMAGES = 25
FIRST_IMAGES = 10  # the first is small, so that a push begins soon
LOAD_BYTES = 16 * 1_048_576
FETCHES = 4
#: What the headers of a part of a request take, more or less.
FRAMING_BYTES = 512
#: What is larger waits on the disk and not in memory.
MEMORY_BYTES = 1_048_576


#: What an image is known by.
_UIDS = ("image", "study", "series")
_IS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}:[^\s\x00-\x1f\x7f]{1,8191}").fullmatch


@dataclass(frozen=True)
class Pushed:
    """What the checkpoint holds of one image that was to be pushed, or was.

    ``uncertain`` says that it may have arrived although nobody told us so; ``alone`` that the next request has to
    bear it alone, because nobody knows which image of the last one was bad. ``faults`` counts the answers that the
    server failed at it, since ``faulty_since_s``; ``hangs_seen`` is how often it had hung at it when it was given up.
    """

    server: str
    study_uid: str
    series_uid: str
    image_uid: str
    sha256: str
    size_bytes: int
    preamble_added: bool = False
    uncertain: bool = True
    alone: bool = False
    pendings: int = 0
    faults: int = 0
    faulty_since_s: float = 0
    hangs_seen: int = 0
    #: Servers in maintenance, which may have the image, or its study, as well.
    not_asked: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        if not self.not_asked:  # a field that workers of the release before do not know
            del told["not_asked"]
        return told

    def is_about(self, image: _Image) -> bool:
        return (self.image_uid, self.sha256) == (image.instance.sop_instance_uid, image.fetched.sha256)

    @property
    def receipt(self) -> dict[str, Any]:
        told = ("study_uid", "series_uid", "image_uid", "sha256", "size_bytes")
        added = {"preamble_added": True} if self.preamble_added else {}
        return {**{name: getattr(self, name) for name in told}, **added}

    @property
    def doubtful_receipt(self) -> dict[str, Any]:
        return {**self.receipt, "uncertain": True, **({"not_asked": list(self.not_asked)} if self.not_asked else {})}


@dataclass(frozen=True)
class _Image:
    """An item whose bytes are here."""

    item: Item
    fetched: Fetched
    instance: Instance

    @property
    def arrival(self) -> Arrival:
        return Arrival(self.instance, self.fetched.size_bytes, self.fetched.sha256, self.fetched.source)

    @property
    def uids(self) -> tuple[str, str, str]:
        """Image, study, series."""
        one = self.instance
        return one.sop_instance_uid, one.study_instance_uid, one.series_instance_uid


@dataclass
class _ImageLoad:
    """Images that travel together; ``placed`` are those that go anywhere."""

    images: list[_Image]
    placed: list[tuple[_Image, Placement]] = field(default_factory=list)

    def close(self) -> None:
        _close(self.images)


class ImageUploads:
    """The kind: its items are URLs; the server of an item is the one it shall go to, if anybody said so.

    A result of ``apply`` is the receipt of the image, if there is one.
    """

    group_items = CHUNK_ITEMS

    @property
    def passes(self) -> Mapping[Pass, PassHandler]:
        return {"apply": self.apply, "verify": self.verify, "undo": self.undo}

    def check(self, item: Planned) -> Planned:
        """Whether a worker may fetch it is said when it does."""
        if not _IS_URL(item.text):
            raise InvalidRequest(f"{redact_url(item.text)!r} is no URL; write https://…, s3://…, az://… or file:///….")
        return item

    def pages(self, context: PassContext) -> Iterator[Sequence[Planned]]:
        """All that a worker finds below the order's source."""
        order = context.batch.order
        source, server = order.get("source"), str(order.get("server") or "")
        if source is None:
            raise InvalidRequest("A batch of uploads needs items, or a source that lists them.")
        for page in context.services.sources.pages(source):
            yield [_planned(one, server) for one in page]

    def apply(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[Result]:  # noqa: ARG002
        """What an earlier attempt may have done is in its own notes, with where and what."""
        server = str(context.batch.order.get("server") or "")
        if server:
            context.services.fleet[server]  # an unknown name is refused before anything is fetched
        wanted = [item if item.server or not server else replace(item, server=server) for item in items]
        return Uploads(context).execute(wanted)

    def refuse_forbidden(self, command: Command, batch: Batch, fleet: Fleet) -> None:
        if command == "undo" and batch.order.get("server"):
            check_allowed(fleet.known([batch.order["server"]]), permanent=True)

    def study_at_stake(self, command: Command, row: Row, batch: Batch, fleet: Fleet) -> str | None:  # noqa: ARG002
        """An undo deletes the images that the batch has stored."""
        if command != "undo" or row.outcome.status != "stored" or not is_to_undo(row):
            return None
        return str(row.outcome.result["study_uid"])

    def leave(self, items: Sequence[Item], context: PassContext) -> list[ItemOutcome]:
        """What may have arrived of items that are left open: their receipts, for a retry or an undo."""
        pushed = {int(number): Pushed(**row) for number, row in context.checkpoint.get("pushed", {}).items()}
        return [
            ItemOutcome(item, "open", server=one.server, result=one.doubtful_receipt)
            for item in items
            if (one := pushed.get(item.number)) is not None and one.uncertain
        ]

    def verify(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[Result]:  # noqa: ARG002
        return verify([context.known(item) for item in items], context)

    def undo(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[Result]:
        return undo([context.known(item) for item in items], context, resumed=resumed)


KIND = ImageUploads()


def upload_all(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """`pacs.batch.upload`: plan it and see it through; it bears the job's id.

    Raises
    ------
    InvalidRequest
        No server is called as the one that all shall go to.
    CourierError
        As of any order of a batch.
    """
    with unbegun(attempt, services):
        server = read_job(BatchUploadJob, message).server
        if server is not None:
            services.fleet[server]
    return order(message, attempt, services, kind=KIND, name="upload", form=BatchUploadJob)


class Uploads:
    """One attempt at the items of a group. ``results`` holds what became of each, by its number."""

    def __init__(self, context: PassContext) -> None:
        self._context = context
        self._attempt, self._services = context.attempt, context.services
        self._hangs = Hangs(context.attempt)
        self._checkpoint = {int(number): Pushed(**row) for number, row in context.checkpoint.get("pushed", {}).items()}
        for number, row in context.rows.items():  # tried as often as it may be in another round, and never cleared up
            if number not in self._checkpoint and "uncertain" in row.outcome.result:
                self._checkpoint[number] = Pushed(server=row.outcome.server, **row.outcome.result)
        self._others: dict[int, Pushed] = {}  # of items of the chunk that come in another group
        #: Of items whose images another job had: image, study and series.
        self._wants = {int(number): tuple(uids) for number, uids in context.checkpoint.get("wants", {}).items()}
        self._written = self._known  # as the ledger has it
        self._near: list[_Image] = []  # the load that is asked about while another is pushed
        self._locking = threading.Lock()
        self._on: dict[str, set[str]] = {}  # study → servers that are known to have it
        #: Servers that did not answer, to a question or to a push: what more goes there waits for the next attempt.
        self._silent: dict[str, CourierError] = {}
        self._down: dict[str, CourierError] = {}
        self._receipts: deque[Pushed] = deque()  # of images that are stored, not yet in the ledger
        #: Servers in maintenance, which are not asked, also if that ends meanwhile.
        self._left = {name: one for name, one in in_maintenance().items() if name in self._services.fleet.names}
        for name, suspension in self._left.items():
            self._down[name] = suspended_error(self._services.fleet[name].server, suspension)
        self.results: dict[int, Result] = {}

    @property
    def _asked(self) -> list[str]:
        """The servers that are asked for each image."""
        return [name for name in self._services.fleet.names if name not in self._left]

    def execute(self, items: Sequence[Item]) -> list[Result]:
        """Upload them; one result per item, in their order. An error leaves its item open; None: another has it."""
        numbers = {item.number for item in items}
        self._others = {number: pushed for number, pushed in self._checkpoint.items() if number not in numbers}
        self._checkpoint = {number: pushed for number, pushed in self._checkpoint.items() if number in numbers}
        try:
            with self._attempt.step("check"):
                self._recover(items)
                waiting = [item for item in items if item.number not in self.results]
                self._check_locked(waiting)
                self._check_servers(waiting)
            with self._attempt.step("carry"):
                self._pipeline([item for item in items if item.number not in self.results])
            self._write_down()
        finally:
            self._release()
        return [self._last_word(item) for item in items]

    def _last_word(self, item: Item) -> Result:
        """Given up, an image that may have arrived is still known as ours to whoever tries again."""
        result, pushed = self.results[item.number], self._checkpoint.get(item.number)
        if not isinstance(result, CourierError) or pushed is None or not pushed.uncertain:
            return result
        if not is_final(result) and (not self._attempt.last or is_suspension(result.open_circuit)):
            return result
        told = pushed.doubtful_receipt
        sentence = f"{result.message} It may have arrived on {pushed.server}: retry the batch to make sure."
        return ItemOutcome(item, "failed", result.payload["code"], sentence, server=pushed.server, result=told)

    # --- what an earlier attempt has left ---------------------------------------------------------------------

    def _recover(self, items: Sequence[Item]) -> None:
        """Look for what an earlier attempt may have stored, before anything is fetched again."""
        by_study: dict[tuple[str, str], list[tuple[Item, Pushed]]] = {}
        for item in items:
            pushed = self._checkpoint.get(item.number)
            if pushed is None or not pushed.uncertain:
                continue
            if pushed.server not in self._services.fleet.names:
                self.results[item.number] = server_left(pushed.server, "pushed the image to", then="")
            else:
                by_study.setdefault((pushed.server, pushed.study_uid), []).append((item, pushed))
        wanted = {key: [pushed.image_uid for _, pushed in group] for key, group in by_study.items()}
        for key, there in _present(wanted, self._services).items():
            for item, pushed in by_study[key]:
                if isinstance(there, CourierError):
                    self.results[item.number] = _result_of_error(item, there, pushed.server)
                elif pushed.image_uid in there:
                    self._note_stored(item, pushed)

    # --- fetching while pushing -------------------------------------------------------------------------------

    def _pipeline(self, items: Sequence[Item]) -> None:
        """Three loads are under way: one is fetched, one is asked about, one is pushed; all in the job's context."""
        recent: deque[_ImageLoad] = deque(maxlen=3)
        asked: Future[_ImageLoad] | None = None
        pushed: Future[None] | None = None
        with (
            ThreadPoolExecutor(1, thread_name_prefix="ask") as asker,
            ThreadPoolExecutor(1, thread_name_prefix="push") as pusher,
            closing(self._loads(items)) as loads,
        ):
            try:
                for images in loads:
                    recent.append(_ImageLoad(images))
                    if asked is not None:
                        ready = asked.result()
                        _wait(pushed)
                        pushed = pusher.submit(copy_context().run, self._push_load, ready)
                    asked = asker.submit(copy_context().run, self._ask_about, recent[-1])
                _wait(pushed)
                if asked is not None:
                    self._push_load(asked.result())
            finally:
                asker.shutdown()
                pusher.shutdown()
                for load in recent:
                    load.close()

    def _loads(self, items: Sequence[Item]) -> Generator[list[_Image]]:
        """The items that can be had, some at a time; what became of the others is in the results."""
        load: list[_Image] = []
        first = len(items) > LOAD_IMAGES
        try:
            with closing(self._fetched(items)) as fetched:
                for item, got in fetched:
                    if isinstance(got, CourierError):
                        self.results[item.number] = _result_of_error(item, got)
                        continue
                    load.append(got)
                    if _is_full(load, FIRST_IMAGES if first else LOAD_IMAGES):
                        ready, load, first = load, [], False
                        yield ready
            if load:
                ready, load = load, []
                yield ready
        finally:
            _close(load)

    def _fetched(self, items: Sequence[Item]) -> Generator[tuple[Item, _Image | CourierError]]:
        """In their order, a few ahead of who asks."""
        ahead: deque[tuple[Item, Future[_Image | CourierError]]] = deque()
        with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as fetcher:
            try:
                for item in items:
                    ahead.append((item, fetcher.submit(copy_context().run, self._fetch, item)))
                    if len(ahead) > 2 * FETCHES:
                        yield _next(ahead)
                while ahead:
                    yield _next(ahead)
            finally:
                for _, future in ahead:
                    future.cancel()
                    future.add_done_callback(_close_unwanted)

    def _fetch(self, item: Item) -> _Image | CourierError:
        if self._silent:  # and so could be said of no image that it is nowhere
            return next(iter(self._silent.values()))
        if item.server in self._down:
            return self._down[item.server]
        self._context.usage.add(requests=1)
        try:
            fetched = self._services.sources.fetch(item.text)
        except CourierError as error:
            return error
        self._context.usage.add(size_bytes=fetched.size_bytes)
        try:
            if fetched.size_bytes > MEMORY_BYTES:
                fetched.to_disk()
            return _Image(item, fetched, identify(fetched.stream))
        except CourierError as error:
            fetched.drop()
            return error
        except BaseException:
            fetched.drop()
            raise

    # --- a load -----------------------------------------------------------------------------------------------

    def _ask_about(self, load: _ImageLoad) -> _ImageLoad:
        load.placed = self._placed(self._locked(load.images))
        return load

    def _push_load(self, load: _ImageLoad) -> None:
        try:
            self._push(load.placed)
            self._write_down()
        finally:
            load.close()
            with self._locking:
                self._release(but=self._near)

    def _locked(self, load: Sequence[_Image]) -> list[_Image]:
        """Those that nobody else is storing or deleting; the others wait for their turn."""
        attempt = self._attempt
        with self._locking:  # or the load before would let go of them with its own
            self._near = list(load)
            owners = attempt.ledger.lock_images([one.uids for one in load], job_id=attempt.job_id, fence=attempt.fence)
        for image, owner in zip(load, owners, strict=True):
            if attempt.is_free(owner):
                self._wants.pop(image.item.number, None)
            else:
                self._wants[image.item.number] = image.uids
                self.results[image.item.number] = None
        return [image for image, owner in zip(load, owners, strict=True) if owner is None]

    def _check_locked(self, items: Sequence[Item]) -> None:
        """What another job had at the last attempt, and has still, is not fetched again to find that out."""
        attempt = self._attempt
        wants = [(item, uids) for item in items if len(uids := self._wants.get(item.number, ())) == len(_UIDS)]
        images = [(uids[0], uids[1], uids[2]) for _, uids in wants]
        owners = attempt.ledger.lock_images(images, job_id=attempt.job_id, fence=attempt.fence)
        waiting = [item for (item, _), owner in zip(wants, owners, strict=True) if not attempt.is_free(owner)]
        self.results.update({item.number: None for item in waiting})

    def _check_servers(self, items: Sequence[Item]) -> None:
        """For a server whose circuit is open no file is fetched: nothing could be said, or stored, there."""
        targets = sorted({item.server for item in items} & set(self._services.fleet.names))
        for error in open_circuits(self._services, self._asked):
            self._silent.setdefault(str(error.server_name), error)
        for target in targets:
            for error in open_circuits(self._services, [], changed=target):
                self._down.setdefault(target, error)

    def _placed(self, images: Sequence[_Image]) -> list[tuple[_Image, Placement]]:
        """Where each goes. Those that go nowhere are in the results."""
        answers = self._ask_about_images(images)
        settled: dict[tuple[str, str, Decision], Placement | CourierError] = {}
        placed = []
        for image in images:
            decision = decide(answers[image.instance.sop_instance_uid])
            if (known := self._known_at_one_not_asked(image, decision)) is not None:
                self.results[image.item.number] = known
                continue
            key = (image.item.server, image.instance.study_instance_uid, decision)
            if key not in settled or isinstance(decision, Exists):
                settled[key] = self._settle(image, decision)
            found = settled[key]
            if isinstance(found, Placement):
                placed.append((image, found))
            else:
                self._refuse_or_recognise(image, decision, found)
        return placed

    def _settle(self, image: _Image, decision: Decision) -> Placement | CourierError:
        order = PlacementOrder(
            self._attempt.job_id,
            image.item.server or None,
            in_history=False,
            compares=False,
            not_asked=list(self._left),
        )
        try:
            return settle(decision, image.arrival, order, errors=self._silent, services=self._services)
        except CourierError as error:
            return error
        except ServerUnknown as wait:
            return PacsUnavailable(f"It {wait.message}.", server_name=wait.reason.server_name)

    def _known_at_one_not_asked(self, image: _Image, decision: Decision) -> CourierError | None:
        """Why an image waits for a server in maintenance: it, or its study, is known to be there, or may be."""
        if not self._left or isinstance(decision, Exists):
            return None
        pushed = self._checkpoint.get(image.item.number)
        if pushed is not None and (pushed.uncertain or pushed.pendings) and pushed.server in self._left:
            server = self._services.fleet[pushed.server].server
            return suspended_error(server, self._left[pushed.server], ", and the image may be there")
        elsewhere, services = isinstance(decision, Follow), self._services
        try:
            check_not_known_there(
                image.instance, self._left, services.fleet, services.ledger, study_is_elsewhere=elsewhere
            )
        except CourierError as error:
            return error
        return None

    def _refuse_or_recognise(self, image: _Image, decision: Decision, error: CourierError) -> None:
        pushed = self._checkpoint.get(image.item.number)
        if isinstance(decision, Exists) and pushed and self._may_be_ours(image, decision.server):
            self._note_stored(image.item, pushed)
        else:
            self.results[image.item.number] = _result_of_error(image.item, error)

    def _may_be_ours(self, image: _Image, server: str) -> bool:
        """Whether an image that is on ``server`` now may have come there by an earlier attempt."""
        pushed = self._checkpoint.get(image.item.number)
        return pushed is not None and pushed.uncertain and pushed.server == server and pushed.is_about(image)

    def _ask_about_images(self, images: Sequence[_Image]) -> dict[str, list[Presence]]:
        """What each server says of each image, all asked at the same time: first for its study, then for the images of
        the studies that it has.
        """
        names = self._asked
        by_study: dict[str, list[str]] = {}
        for image in images:
            by_study.setdefault(image.instance.study_instance_uid, []).append(image.instance.sop_instance_uid)
        wanted = {image.item.server or None for image in images}
        target = sole_target(wanted.pop() if len(wanted) == 1 else None, self._services.fleet.names)
        has_study = self._ask_for_studies(list(by_study), target)
        there = _present({key: by_study[key[1]] for key, has in has_study.items() if has}, self._services)
        for (name, _), reply in there.items():
            if isinstance(reply, CourierError):
                self._silent.setdefault(name, reply)
        answers: dict[str, list[Presence]] = {}
        for study, uids in by_study.items():
            for uid in uids:
                answers[uid] = [
                    Presence(name, image=_has(uid, there.get((name, study), set())), study=has_study[name, study])
                    if has_study[name, study] is not None
                    else Presence(name, image=None, study=None)
                    for name in names
                ]
        return answers

    def _ask_for_studies(self, studies: Sequence[str], target: str | None) -> dict[tuple[str, str], bool | None]:
        """By server and study. One that a server had a moment ago is not asked for again."""
        fleet = self._services.fleet
        found: dict[tuple[str, str], bool | None] = {}
        questions: list[tuple[str, str]] = []
        for name in self._asked:
            for study in studies:
                known = name in self._on.get(study, ()) and name not in self._silent
                found[name, study] = True if known else None
                if not known and name not in self._silent:
                    questions.append((name, study))
        replies = fleet.gather([partial(fleet[name].find, "study", study) for name, study in questions])
        for (name, study), said in zip(questions, replies, strict=True):
            reply = answered(name, said, target=target)
            if isinstance(reply, CourierError):
                self._silent.setdefault(name, reply)
                continue
            found[name, study] = bool(reply)
            if reply:
                self._on.setdefault(study, set()).add(name)
        return found

    # --- the push ---------------------------------------------------------------------------------------------

    def _push(self, found: Sequence[tuple[_Image, Placement]]) -> None:
        """Write down what goes where, send it, and judge the answers image by image."""
        placed = self._without_hangs(self._each_once(found))
        if not placed:
            return
        resumed = {image.item.number for image, to in placed if self._may_be_ours(image, to.server)}
        for image, to in placed:
            self._checkpoint[image.item.number] = self._pushed(image, to.server)
        self._send_alone_what_hung(placed)
        studies = list(dict.fromkeys(image.instance.study_instance_uid for image, _ in placed))
        note_stored_elsewhere(studies, self._left, self._services.ledger)
        self._context.save_checkpoint(self._as_json())
        self._written = self._known
        by_server: dict[str, list[_Image]] = {}
        for image, to in sorted(placed, key=lambda pair: pair[0].instance.study_instance_uid):
            by_server.setdefault(to.server, []).append(image)
        requests = [
            (self._services.fleet[server], request)
            for server, images in by_server.items()
            for request in self._requests(images, self._services.fleet[server])
        ]
        answers = self._services.fleet.gather(
            [partial(_store, pacs, request, self._hangs) for pacs, request in requests]
        )
        for (pacs, request), answer in zip(requests, answers, strict=True):
            if isinstance(answer, CourierError):
                self._not_answered(request, pacs, answer, resumed)
            else:
                for image, outcome in zip(request, answer, strict=True):
                    self._apply_outcome(image, outcome, pacs, resumed=image.item.number in resumed)

    def _each_once(self, found: Sequence[tuple[_Image, Placement]]) -> list[tuple[_Image, Placement]]:
        """Of several items with one image only one is pushed; the others look again what became of it.

        And nothing goes to a server that has failed a push meanwhile.
        """
        pushers = {pushed.image_uid: number for number, pushed in self._checkpoint.items() if pushed.uncertain}
        placed = []
        for image, to in found:
            number = image.item.number
            if to.server in self._down:
                self.results[number] = self._down[to.server]
            elif pushers.setdefault(image.instance.sop_instance_uid, number) == number:
                placed.append((image, to))
            else:
                self.results[number] = None
        return placed

    def _without_hangs(self, placed: Sequence[tuple[_Image, Placement]]) -> list[tuple[_Image, Placement]]:
        """Those at whose files their servers have not hung too often; the others have failed."""
        left = []
        for server, images in _by_server(placed).items():
            pacs, seen = self._services.fleet[server], {one.sha256: one.hangs_seen for one in self._checkpoint.values()}
            given_up = self._hangs.given_up(pacs, [image.fetched.sha256 for image in images], seen)
            for image, to in placed:
                hangs = given_up.get(image.fetched.sha256)
                if to.server == server and hangs is None:
                    left.append((image, to))
                elif to.server == server:
                    self.results[image.item.number] = self._given_up(image, pacs, int(hangs or 0))
        return left

    def _given_up(self, image: _Image, pacs: Pacs, hangs: int) -> ItemOutcome:
        """A file that is not sent again. A retry sends it once more, and knows whether it may have arrived before."""
        error, uncertain = poisoned(pacs, hangs, {}), self._may_be_ours(image, pacs.server.name)
        receipt = self._pushed(image, pacs.server.name).receipt
        self._checkpoint.pop(image.item.number, None)
        result = {**receipt, "uncertain": uncertain, "hangs_seen": hangs}
        return ItemOutcome(image.item, "failed", error.code, error.message, server=pacs.server.name, result=result)

    def _send_alone_what_hung(self, placed: Sequence[tuple[_Image, Placement]]) -> None:
        for server, images in _by_server(placed).items():
            counted = self._hangs.counted(self._services.fleet[server], [one.fetched.sha256 for one in images])
            for image in images:
                if image.fetched.sha256 in counted:
                    self._note(image.item.number, alone=True)

    def _pushed(self, image: _Image, server: str) -> Pushed:
        earlier = self._checkpoint.get(image.item.number)
        same = earlier is not None and earlier.is_about(image)
        uid, study, series = image.uids
        return Pushed(
            server=server,
            study_uid=study,
            series_uid=series,
            image_uid=uid,
            sha256=image.fetched.sha256,
            size_bytes=image.fetched.size_bytes,
            preamble_added=not image.instance.has_preamble,
            alone=earlier.alone if earlier and same else False,
            pendings=earlier.pendings if earlier and same else 0,
            faults=earlier.faults if earlier and same else 0,
            faulty_since_s=earlier.faulty_since_s if earlier and same else 0,
            hangs_seen=earlier.hangs_seen if earlier and same else 0,
            not_asked=list(self._left),
        )

    def _requests(self, images: Sequence[_Image], pacs: Pacs) -> Iterator[list[_Image]]:
        """As few as the server's limit allows; what has to travel alone does."""
        request: list[_Image] = []
        size_bytes = 0
        for image in images:
            if self._checkpoint[image.item.number].alone:
                yield [image]
                continue
            size_bytes += image.fetched.size_bytes + FRAMING_BYTES
            if request and pacs.request_bytes is not None and size_bytes > pacs.request_bytes:
                yield request
                request, size_bytes = [], image.fetched.size_bytes + FRAMING_BYTES
            request.append(image)
        if request:
            yield request

    def _not_answered(self, request: Sequence[_Image], pacs: Pacs, error: CourierError, resumed: set[int]) -> None:
        """A request that failed as a whole. Refused as a whole, each image is tried alone before it is refused."""
        if isinstance(error, PacsUnavailable) or waits_for_server(error):
            self._down[pacs.server.name] = error
        for image in request:
            number = image.item.number
            if is_refused_whole(error) and len(request) > 1:  # images before the bad one may be stored
                unread = error.details.get("status") in REFUSED_UNREAD
                self._note(number, uncertain=number in resumed or not unread, alone=True)
                name = pacs.server.name
                self.results[number] = PacsMisanswered(
                    f"{name} refuses {len(request)} images together; each is sent alone.", server_name=name
                )
                continue
            if isinstance(error, Refused | NeedsPerson) or error.details.get("phase") in NOT_SENT:
                self._note(number, uncertain=number in resumed)
                if is_suspension(error.open_circuit) and number not in resumed:
                    del self._checkpoint[number]  # nothing of the study is there by this job, so it may go elsewhere
            self.results[number] = _result_of_error(image.item, error, pacs.server.name)

    def _apply_outcome(self, image: _Image, outcome: Outcome, pacs: Pacs, *, resumed: bool) -> None:
        item, pushed = image.item, self._checkpoint[image.item.number]
        name = pacs.server.name
        if outcome.fate is Fate.STORED or (outcome.fate is Fate.ALREADY_THERE and resumed):
            self._on.setdefault(pushed.study_uid, set()).add(name)
            self._note_stored(item, pushed, outcome.warnings)
            return
        if outcome.fate is Fate.ALREADY_THERE:
            del self._checkpoint[item.number]
            there = already_exists(name, image.arrival, self._services, compares=False)
            self.results[item.number] = _result_of_error(item, there, name)
            return
        if outcome.is_doubtful:
            outcome = self._doubtful(image, outcome, pacs)
        wait_s = self._services.settings.jobs.pending_wait_s
        error = refusal(outcome, image.instance, pacs, pending_wait_s=wait_s)
        if outcome.fate is Fate.PENDING:
            error = self._pending(image, pacs, error, resumed=resumed)
        elif outcome.fate is Fate.UNMENTIONED:
            self._note(item.number, alone=True)
        elif isinstance(error, Refused):
            del self._checkpoint[item.number]
        self.results[item.number] = _result_of_error(item, error, name)

    def _doubtful(self, image: _Image, outcome: Outcome, pacs: Pacs) -> Outcome:
        """Count the failures at the image, which is sent alone then: an answer for several explains but one."""
        pushed, ledger = self._checkpoint[image.item.number], self._attempt.ledger
        since_s = pushed.faulty_since_s or ledger.clock_s()
        self._note(image.item.number, alone=True, faults=pushed.faults + 1, faulty_since_s=since_s)
        return reject_if_it_persists(outcome, pushed.faults + 1, since_s, pacs, ledger)

    def _pending(self, image: _Image, pacs: Pacs, error: CourierError, *, resumed: bool) -> CourierError:
        """Count the answers "being stored"; when they do not end, clear what a broken store left behind."""
        pendings = self._checkpoint[image.item.number].pendings + 1
        if pendings >= PENDINGS_BEFORE_REMOVAL:
            try:
                Receipts.of(self._attempt).delete(pacs, image_of(image.instance), permanent=True)
            except CourierError as trouble:
                return trouble
            pendings = 0
        self._note(image.item.number, pendings=pendings, uncertain=resumed)
        return error

    # --- the ledger -------------------------------------------------------------------------------------------

    def _note(self, number: int, **changes: Any) -> None:
        self._checkpoint[number] = replace(self._checkpoint[number], **changes)

    def _note_stored(self, item: Item, pushed: Pushed, warnings: Iterable[str] = ()) -> None:
        self._receipts.append(pushed)
        self.results[item.number] = _stored(item, pushed, warnings)

    def _write_receipts(self) -> None:
        """Before its image is let go: a claim without a receipt counts as one under which nothing is stored."""
        by_server: dict[str, list[StoredImage]] = {}
        while self._receipts:
            one = self._receipts.popleft()
            stored = StoredImage(one.image_uid, one.study_uid, one.series_uid, one.sha256, one.size_bytes)
            by_server.setdefault(one.server, []).append(stored)
        for server, images in by_server.items():
            self._attempt.ledger.stored_many(server, images, job_id=self._attempt.job_id)

    def _write_down(self) -> None:
        """What the servers said since: above all, where one made clear that an image there is not ours."""
        if self._known != self._written:
            self._context.save_checkpoint(self._as_json())
            self._written = self._known

    def _as_json(self) -> dict[str, Any]:
        checkpoint = {**self._others, **self._checkpoint}
        told: dict[str, Any] = {"pushed": {str(number): pushed.as_json() for number, pushed in checkpoint.items()}}
        return {**told, "wants": {str(number): uids for number, uids in self._wants.items()}} if self._wants else told

    @property
    def _known(self) -> tuple[dict[int, Pushed], dict[int, tuple[str, ...]]]:
        """What the next attempt has to know."""
        return dict(self._checkpoint), dict(self._wants)

    def _release(self, *, but: Iterable[_Image] = ()) -> None:
        """Of all but what may be on its way into a server still: who asks for it next has to find it decided."""
        self._write_receipts()
        unclear = {
            (pushed.image_uid, pushed.study_uid)
            for number, pushed in {**self._others, **self._checkpoint}.items()
            if (pushed.uncertain or pushed.pendings) and not isinstance(self.results.get(number), ItemOutcome)
        }
        unclear |= {one.uids[:2] for one in but}
        self._attempt.ledger.release_images(
            job_id=self._attempt.job_id,
            fence=self._attempt.fence,
            but={image_uid for image_uid, _ in unclear},
            following={study_uid for _, study_uid in unclear},
        )


def _planned(one: ListedObject, server: str) -> Planned:
    """What was found, as a plan has it; what is left out or refused comes to no server."""
    code = SourceNotAllowed.code if one.refused else ""
    return Planned(one.url, "" if one.skip_reason else server, one.size_bytes, one.skip_reason, code)


def _stored(item: Item, pushed: Pushed, warnings: Iterable[str] = ()) -> ItemOutcome:
    said = warned(list(warnings), pushed.not_asked)
    told = {"warnings": said, "not_asked": list(pushed.not_asked)}
    more = {name: value for name, value in told.items() if value}
    return ItemOutcome(item, "stored", server=pushed.server, result={**pushed.receipt, **more})


def _result_of_error(item: Item, error: CourierError, server: str = "") -> ItemOutcome | CourierError:
    """What an error makes of an item; what time may cure leaves it open. A file that came to no server is at none."""
    if isinstance(error, TryAgain) or waits_for_server(error):
        return error
    server = error.server_name or server or NOWHERE
    if isinstance(error, ImageAlreadyExists):
        told = ("study_uid", "series_uid", "image_uid", "sha256")  # whether it is the same file, verify says
        result = {name: error.details[name] for name in told}
        return ItemOutcome(item, "already_there", error.code, error.message, server=server, result=result)
    status: ItemStatus = "failed" if isinstance(error, NeedsPerson) else "refused"
    return ItemOutcome(item, status, error.payload["code"], error.message, server=server)


def _present(
    wanted: Mapping[tuple[str, str], Sequence[str]], services: Services
) -> dict[tuple[str, str], set[str] | CourierError]:
    """By server and study: those of the images that are there."""
    fleet = services.fleet
    replies = fleet.gather([partial(fleet[name].present, study, uids) for (name, study), uids in wanted.items()])
    return dict(zip(wanted, replies, strict=True))


def _has(uid: str, there: set[str] | CourierError) -> bool | None:
    return None if isinstance(there, CourierError) else uid in there


def _is_full(load: Sequence[_Image], at_most: int) -> bool:
    return len(load) >= at_most or sum(image.fetched.size_bytes for image in load) >= LOAD_BYTES


def _part(image: _Image) -> Part:
    return Part(image.instance, image.fetched.open, image.fetched.size_bytes)


def _by_server(placed: Iterable[tuple[_Image, Placement]]) -> dict[str, list[_Image]]:
    by_server: dict[str, list[_Image]] = {}
    for image, to in placed:
        by_server.setdefault(to.server, []).append(image)
    return by_server


def _store(pacs: Pacs, images: Sequence[_Image], hangs: Hangs) -> list[Outcome]:
    with hangs.sending(pacs, lambda: [image.fetched.sha256 for image in images]):
        outcomes = pacs.store([_part(image) for image in images])
    return as_shown(pacs, [image.instance for image in images], outcomes)


def _wait(pushed: Future[None] | None) -> None:
    if pushed is not None:
        pushed.result()


def _next(ahead: deque[tuple[Item, Future[_Image | CourierError]]]) -> tuple[Item, _Image | CourierError]:
    item, future = ahead.popleft()
    return item, future.result()


def _close(images: Iterable[_Image]) -> None:
    for image in images:
        image.fetched.drop()


def _close_unwanted(future: Future[_Image | CourierError]) -> None:
    if not future.cancelled() and future.exception() is None and isinstance(got := future.result(), _Image):
        got.fetched.drop()
