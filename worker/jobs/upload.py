"""An image's way from its URL into the PACS it belongs to: fetch, identify, check, route, push, describe.

The six steps are six functions below, called in order by `upload`. What makes a second delivery harmless is the
*checkpoint*: before the first byte is pushed, the ledger holds what goes where, so the next attempt looks there first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from courier.errors import (
    Cancelled,
    CourierError,
    ImageAlreadyExists,
    NeedsPerson,
    PacsMisanswered,
    Refused,
    SourceUnreachable,
    TryAgain,
)
from courier.ledger.jobs import IntentResult, IntentState, PushIntent, Receipt
from courier.messages import UploadJob, read_job
from courier.redaction import about
from courier.results import Dataset, Route, StudyAction, UploadPayload
from worker.dicom.instances import Instance, identify
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.hangs import Hangs, poisoned
from worker.jobs.knowledge import server_left
from worker.jobs.maintenance import check_not_known_there, names_not_asked, note_stored_elsewhere, warned
from worker.jobs.placement import (
    NOT_SENT,
    PENDINGS_BEFORE_REMOVAL,
    Placement,
    PlacementOrder,
    already_exists,
    answered,
    check_no_open_circuit,
    image_exists_error,
    image_of,
    refusal,
    reject_if_it_persists,
    settle,
    sole_target,
    uids_of,
    viewer_of,
)
from worker.jobs.receipts import Receipts
from worker.jobs.result_fields import allowed
from worker.jobs.routing import Decision, Exists, Follow, New, Presence, decide
from worker.jobs.same_bytes import Arrival, compare
from worker.jobs.services import Services
from worker.jobs.streamed_instance import digest_of
from worker.pacs import in_service
from worker.pacs.finding import find_known
from worker.pacs.protocol import Fate, Found, Outcome, Pacs, Part
from worker.pacs.stow import PREAMBLE
from worker.storage.sources import Fetched
from worker.storage.spool import CHUNK_BYTES

#: So much JSON may the metadata in a result be: those of an image with 100,000 frames are 32 MB.
MAX_METADATA_BYTES = 1_048_576
#: How soon to look again whether the other job with the same image has ended.
TURN_S = 0.5


@dataclass(frozen=True)
class UploadCheckpoint:
    """What is being pushed where, and why; written to the ledger before the push, read by the next attempt.

    ``uncertain`` says that a push of ours may have arrived although nobody told us so; ``pendings`` counts the answers
    that the server is storing the image already, ``faults`` those that it failed at it, since ``faulty_since_s``.
    ``hangs_seen`` is how often the server had hung at the file when the job was given up for it.
    """

    server: str
    instance: Instance
    size_bytes: int
    sha256: str
    source: str
    route: Route
    warnings: tuple[str, ...] = ()
    pendings: int = 0
    faults: int = 0
    faulty_since_s: float = 0
    hangs_seen: int = 0
    uncertain: bool = False
    stored: bool = False
    study_action: StudyAction = "updated"
    zero_preamble: bool = False
    not_asked: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Its fields, and those of the instance; nothing of it is changed later, so nothing is copied."""
        told = {**vars(self), "instance": vars(self.instance), "route": self.route.model_dump()}
        if not self.not_asked:  # a field that workers of the release before do not know
            del told["not_asked"]
        return told

    def placed(self, placed: Placement) -> UploadCheckpoint:
        """The same with the server that the image goes to."""
        return replace(self, server=placed.server, route=placed.route, warnings=(*self.warnings, *placed.warnings))

    @property
    def may_arrive(self) -> bool:
        """Whether the server may come to have the image without another push."""
        return self.uncertain or self.pendings > 0

    def is_about(self, instance: Instance, sha256: str) -> bool:
        return (self.instance.sop_instance_uid, self.sha256) == (instance.sop_instance_uid, sha256)

    @classmethod
    def from_json(cls, checkpoint: Mapping[str, Any]) -> UploadCheckpoint:
        known = dict(checkpoint)
        known["instance"] = Instance(**known["instance"])
        known["route"] = Route(**known["route"])
        known["warnings"] = tuple(known["warnings"])
        known["not_asked"] = tuple(known.get("not_asked", ()))
        return cls(**known)


@dataclass
class _CheckResult:
    """What the check found: a `Presence` per server, and the error of each server that gave none.

    ``elsewhere``: the servers that have the image in another study alone, each with that study.
    """

    answers: list[Presence]
    errors: dict[str, CourierError] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trip:
    """What all steps of one attempt share."""

    job: UploadJob
    attempt: Attempt
    services: Services


def upload(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Carry one image (design contract, section 6) and return the upload payload.

    Raises
    ------
    CourierError
        Any code of the source, the file or the servers; `TryAgain` leaves everything ready for another attempt.
    """
    trip = _Trip(read_job(UploadJob, message), attempt, services)
    checkpoint = UploadCheckpoint.from_json(attempt.checkpoint) if attempt.checkpoint else None
    if checkpoint is not None:
        about(study_uid=checkpoint.instance.study_instance_uid, server_name=checkpoint.server)
        _check_still_known(checkpoint, trip)
    if trip.job.server is not None:
        services.fleet[trip.job.server]  # an unknown name is refused before anything is fetched
    if attempt.cancelled and not (checkpoint and (checkpoint.may_arrive or checkpoint.stored)):
        raise Cancelled("The job was cancelled before anything was pushed.")
    if checkpoint is None or not _arrived(checkpoint, trip):
        checkpoint = (
            _bring_again(trip, checkpoint) if checkpoint and checkpoint.may_arrive else _bring(trip, checkpoint)
        )
    if not checkpoint.stored:
        checkpoint = _receipt(trip, checkpoint)
    return _describe(trip, checkpoint).as_json()


def _check_still_known(checkpoint: UploadCheckpoint, trip: _Trip) -> None:
    """Of what may be on a server that has left the settings nothing can be said, and it is stored on no other."""
    if checkpoint.server in trip.services.fleet.names or not (checkpoint.may_arrive or checkpoint.stored):
        return
    if trip.attempt.cancelled and not checkpoint.stored:
        raise _uncertain(Cancelled("The job was cancelled."), checkpoint)
    done = "stored the image on" if checkpoint.stored else "pushed the image, which may have arrived, to"
    raise server_left(checkpoint.server, done, details={**uids_of(checkpoint.instance), "may_be_on": checkpoint.server})


def _arrived(checkpoint: UploadCheckpoint, trip: _Trip) -> bool:
    """Whether an earlier attempt's push reached the server it was meant for.

    A dead letter has let go of its image: replayed, it holds it again first, or what is found may be another's.
    """
    if not (checkpoint.uncertain or checkpoint.stored):
        return False
    with trip.attempt.step("check"):
        _wait_for_turn(checkpoint.instance, trip.attempt)
        try:
            images = find_known(trip.services.fleet[checkpoint.server], image_of(checkpoint.instance))
            there = _is_in(images, checkpoint.instance.study_instance_uid)
        except CourierError as error:
            if not checkpoint.stored or _may_be_cured(error, trip.attempt):
                raise
            there = True
        return there and _is_no_others(checkpoint, _arrival(checkpoint), trip)


def _is_no_others(checkpoint: UploadCheckpoint, arrival: Arrival, trip: _Trip) -> bool:
    """True, unless another has stored the image since this job pushed it: then `ImageAlreadyExists`.

    Another job has left a receipt; another program, where the server keeps bytes, perhaps other bytes.
    """
    receipt, services = trip.attempt.ledger.receipt(checkpoint.instance.sop_instance_uid), trip.services
    if receipt is not None and receipt.job_id != trip.attempt.job_id:
        raise already_exists(checkpoint.server, arrival, services)
    if not checkpoint.stored:
        _check_same(checkpoint, arrival, services)
    return True


def _check_same(checkpoint: UploadCheckpoint, arrival: Arrival, services: Services) -> None:
    """`ImageAlreadyExists`, if what is there can be seen to be another file than the one that this job pushed."""
    found = compare(services.fleet[checkpoint.server], arrival, services.fleet)
    if found.same is False:
        raise image_exists_error(checkpoint.server, arrival, found, services)


def _may_be_cured(error: CourierError, attempt: Attempt) -> bool:
    """Whether another attempt may do better. If not, what is stored is stored, and never said to have failed."""
    return isinstance(error, TryAgain) and not error.is_lasting and not attempt.last


def _bring_again(trip: _Trip, earlier: UploadCheckpoint) -> UploadCheckpoint:
    """`_bring`, when an image has not arrived that still may: a job that is refused then looks again, and says so."""
    try:
        if trip.attempt.cancelled:
            raise Cancelled("The job was cancelled.")
        return _bring(trip, earlier)
    except Refused as refused:
        if _arrived(earlier, trip):
            return earlier
        if isinstance(refused, ImageAlreadyExists) and not earlier.uncertain:
            raise
        raise _uncertain(refused, earlier) from None


def _uncertain(refused: Refused, checkpoint: UploadCheckpoint) -> Refused:
    said = "The job was cancelled" if isinstance(refused, Cancelled) else refused.message.rstrip(".")
    return type(refused)(
        f"{said}; an earlier push of the image to {checkpoint.server} may still arrive, so look for it there.",
        server_name=refused.server_name,
        server_type=refused.server_type,
        details={**uids_of(checkpoint.instance), "may_be_on": checkpoint.server, **refused.details},
    )


def _bring(trip: _Trip, earlier: UploadCheckpoint | None) -> UploadCheckpoint:
    """Fetch, identify, check, route and push; the checkpoint then says where the image is.

    What would be fetched in vain is not: while another job has the image, or the circuit of a server is open.
    """
    attempt, services = trip.attempt, trip.services
    if attempt.wants:
        with attempt.step("check"):
            _take_turn(*attempt.wants, attempt=attempt)
    _check_servers(trip, earlier)
    with attempt.step("fetch"):
        fetched = services.sources.fetch(trip.job.image_url)
    pushed: UploadCheckpoint | None = None
    try:
        with fetched:
            pushed = _place(trip, fetched, earlier)
    except SourceUnreachable as error:  # its file could not be closed
        if pushed is None or _may_be_cured(error, attempt):
            raise
    return pushed


def _place(trip: _Trip, fetched: Fetched, earlier: UploadCheckpoint | None) -> UploadCheckpoint:
    """Identify, check, route and push what was fetched."""
    attempt, services = trip.attempt, trip.services
    with attempt.step("identify"):
        instance = identify(fetched.stream)
    about(study_uid=instance.study_instance_uid)
    with attempt.step("check"):
        _wait_for_turn(instance, attempt)
        in_service.renew()
        _check_in_service(trip, earlier)
        seen = _check(instance, services, target=sole_target(trip.job.server, services.fleet.names))
    if earlier is not None and not earlier.is_about(instance, fetched.sha256):
        earlier = None  # the source gives another file now: what an earlier attempt pushed proves nothing for it
    with attempt.step("route"):
        decision = decide(seen.answers)
        checkpoint = _checkpoint(instance, fetched, earlier, services)
        there = decision.server if isinstance(decision, Exists) else ""
        if earlier is not None and there not in seen.elsewhere and _may_be_ours(earlier, there):
            _is_no_others(earlier, _arrival(earlier, fetched), trip)
            return earlier
        checkpoint, intended = _route(trip, checkpoint, fetched, decision, seen)
    about(server_name=checkpoint.server)
    with attempt.step("push"):
        return _push(trip, checkpoint, fetched, intended, resumed=_may_be_ours(earlier, checkpoint.server))


def _check_in_service(trip: _Trip, earlier: UploadCheckpoint | None) -> None:
    """Wait for a server in maintenance that the job asks for, or where an earlier push may still arrive."""
    may_be_at = earlier.server if earlier is not None and earlier.may_arrive else None
    for name in filter(None, (trip.job.server, may_be_at)):
        if (suspension := in_service.in_maintenance().get(name)) is not None:
            raise in_service.suspended_error(trip.services.fleet[name].server, suspension)


def _checkpoint(
    instance: Instance, fetched: Fetched, earlier: UploadCheckpoint | None, services: Services
) -> UploadCheckpoint:
    names = services.fleet.names
    return UploadCheckpoint(
        server=names[0],
        instance=instance,
        size_bytes=fetched.size_bytes,
        sha256=fetched.sha256,
        source=fetched.source,
        route=Route(reason="study_exists", study_on=[], candidates=names),
        warnings=() if instance.has_preamble else ("preamble_added",),
        not_asked=tuple(names_not_asked(services.fleet)),
        pendings=earlier.pendings if earlier else 0,
        faults=earlier.faults if earlier else 0,
        faulty_since_s=earlier.faulty_since_s if earlier else 0,
        hangs_seen=earlier.hangs_seen if earlier else 0,
        zero_preamble=fetched.starts_with(PREAMBLE),
    )


def _may_be_ours(earlier: UploadCheckpoint | None, server: str) -> bool:
    """Whether an image that is on ``server`` now may have come there by an earlier attempt at this very job."""
    return earlier is not None and earlier.uncertain and earlier.server == server


def _check_servers(trip: _Trip, earlier: UploadCheckpoint | None) -> None:
    """`PacsUnavailable`, if the circuit of a server is open that has to be asked for the image, or is to store it."""
    known, left = trip.services.fleet.names, in_service.in_maintenance()
    names = [name for name in known if name not in left]
    expected = earlier.server if earlier and (earlier.may_arrive or earlier.server in names) else None
    target = trip.job.server or expected or (known[0] if len(known) == 1 else None)
    check_no_open_circuit(trip.services, names, changed=target if target in known else None)


def _wait_for_turn(instance: Instance, attempt: Attempt) -> None:
    _take_turn(instance.sop_instance_uid, instance.study_instance_uid, instance.series_instance_uid, attempt=attempt)


def _take_turn(image: str, study: str, series: str, *, attempt: Attempt) -> None:
    owner = attempt.ledger.lock_image(image, job_id=attempt.job_id, fence=attempt.fence, into=(study, series))
    if owner is not None:
        sentence = f"job {owner} is storing the same image, or deleting what it belongs to"
        raise Postpone(sentence, delay_s=TURN_S, owner=owner)


def _check(instance: Instance, services: Services, *, target: str | None) -> _CheckResult:
    """Ask every server that is not in maintenance for the image and for its study, all at the same time."""
    left = in_service.in_maintenance()
    asked = [pacs for pacs in services.fleet if pacs.server.name not in left]
    questions: list[Callable[[], list[Found]]] = []
    for pacs in asked:
        questions.append(partial(find_known, pacs, image_of(instance)))
        questions.append(partial(pacs.find, "study", instance.study_instance_uid))
    services.reserve([pacs.server for pacs in asked], 2)
    replies = iter(services.fleet.gather(questions))
    seen = _CheckResult([])
    for name in (pacs.server.name for pacs in asked):
        image, study = (answered(name, next(replies), target=target) for _ in range(2))
        for reply in (image, study):
            if isinstance(reply, CourierError):
                seen.errors.setdefault(name, reply)
        if not isinstance(image, CourierError) and image and not _is_in(image, instance.study_instance_uid):
            seen.elsewhere[name] = image[0].study_instance_uid
        seen.answers.append(Presence(name, image=_yes(image), study=_yes(study)))
    return seen


def _is_in(founds: Sequence[Found], study_uid: str) -> bool:
    return any(found.study_instance_uid == study_uid for found in founds)


def _yes(reply: list[Found] | CourierError) -> bool | None:
    return None if isinstance(reply, CourierError) else bool(reply)


def _route(
    trip: _Trip, checkpoint: UploadCheckpoint, fetched: Fetched, decision: Decision, seen: _CheckResult
) -> tuple[UploadCheckpoint, IntentResult]:
    """Where the image goes, and whether it is written down; for a study that is nowhere, by the claim."""

    def intent(placed: Placement) -> PushIntent:
        return _intent(trip.attempt, checkpoint.placed(placed))

    order = PlacementOrder(trip.attempt.job_id, trip.job.server, not_asked=checkpoint.not_asked, intent=intent)
    arrival = replace(_arrival(checkpoint, fetched), elsewhere=seen.elsewhere)
    if isinstance(decision, Follow | New):
        check_not_known_there(
            checkpoint.instance,
            in_service.in_maintenance(),
            trip.services.fleet,
            trip.services.ledger,
            study_is_elsewhere=isinstance(decision, Follow),
        )
    placed = settle(decision, arrival, order, errors=seen.errors, services=trip.services)
    if placed.intended.state is not IntentState.UNTRIED:
        trip.attempt.intended(intent(placed), placed.intended)
    return checkpoint.placed(placed), placed.intended


def _intent(attempt: Attempt, checkpoint: UploadCheckpoint) -> PushIntent:
    """What is written down before the push. From then on it may have arrived."""
    decision = {
        "server": checkpoint.server,
        "study_uid": checkpoint.instance.study_instance_uid,
        **checkpoint.route.model_dump(),
    }
    noted = replace(checkpoint, uncertain=True).as_json()
    return PushIntent(attempt.fence, noted, decision, checkpoint.server, checkpoint.sha256)


def _arrival(checkpoint: UploadCheckpoint, fetched: Fetched | None = None) -> Arrival:
    bare, opened = (None, None) if fetched is None else (partial(_bare_digest, fetched), fetched.open)
    return Arrival(
        checkpoint.instance,
        checkpoint.size_bytes,
        checkpoint.sha256,
        checkpoint.source,
        checkpoint.zero_preamble,
        bare,
        open=opened,
    )


def _bare_digest(fetched: Fetched) -> str:
    with fetched.open() as file:
        return digest_of(iter(partial(file.read, CHUNK_BYTES), b""))


def _push(
    trip: _Trip, checkpoint: UploadCheckpoint, fetched: Fetched, intended: IntentResult, *, resumed: bool
) -> UploadCheckpoint:
    """Send the image to its server and judge the answer for this instance."""
    services = trip.services
    pacs = services.fleet[checkpoint.server]
    hangs = Hangs(trip.attempt)
    note_stored_elsewhere([checkpoint.instance.study_instance_uid], checkpoint.not_asked, services.ledger)
    _intend(hangs, pacs, checkpoint, trip.attempt, intended, resumed=resumed)
    part = Part(checkpoint.instance, fetched.open, fetched.size_bytes)
    try:
        with hangs.sending(pacs, lambda: [checkpoint.sha256]):
            (outcome,) = pacs.store([part])
    except CourierError as error:
        if isinstance(error, NeedsPerson) or error.details.get("phase") in NOT_SENT:
            trip.attempt.write_intent(replace(checkpoint, uncertain=resumed).as_json())
        raise
    if outcome.fate is Fate.PENDING:
        _pending(replace(checkpoint, uncertain=resumed), pacs, trip.attempt)
    if outcome.is_doubtful:
        outcome = _doubtful(outcome, checkpoint, pacs, trip.attempt)
    return _apply_outcome(outcome, checkpoint, _arrival(checkpoint, fetched), resumed=resumed, services=services)


def _intend(
    hangs: Hangs, pacs: Pacs, checkpoint: UploadCheckpoint, attempt: Attempt, intended: IntentResult, *, resumed: bool
) -> None:
    """Write down what is about to be pushed, as far as that is not done yet."""
    if intended.state is IntentState.UNTRIED:
        intended = attempt.intend_push(_intent(attempt, checkpoint))
    if intended.state is IntentState.HUNG:
        _check_hangs(hangs, pacs, checkpoint, attempt, resumed=resumed)
        intent = _intent(attempt, checkpoint)
        attempt.write_intent(intent.checkpoint, decision=intent.decision)
    elif intended.troubled:
        hangs.note_troubled(pacs)


def _check_hangs(hangs: Hangs, pacs: Pacs, checkpoint: UploadCheckpoint, attempt: Attempt, *, resumed: bool) -> None:
    """`Poisoned`, if the server has hung at the file so often that it is not sent again, until it is replayed."""
    count = hangs.given_up(pacs, [checkpoint.sha256], {checkpoint.sha256: checkpoint.hangs_seen}).get(checkpoint.sha256)
    if count is not None:
        attempt.note(replace(checkpoint, uncertain=resumed, hangs_seen=count).as_json())
        raise poisoned(pacs, count, uids_of(checkpoint.instance))


def _apply_outcome(
    outcome: Outcome, checkpoint: UploadCheckpoint, arrival: Arrival, *, resumed: bool, services: Services
) -> UploadCheckpoint:
    match outcome.fate:
        case Fate.STORED:
            return replace(checkpoint, warnings=(*checkpoint.warnings, *outcome.warnings))
        case Fate.ALREADY_THERE if resumed:
            _check_same(checkpoint, arrival, services)
            return checkpoint
        case Fate.ALREADY_THERE:
            raise already_exists(checkpoint.server, arrival, services)
        case _:
            pacs = services.fleet[checkpoint.server]
            raise refusal(outcome, checkpoint.instance, pacs, pending_wait_s=services.settings.jobs.pending_wait_s)


def _pending(checkpoint: UploadCheckpoint, pacs: Pacs, attempt: Attempt) -> None:
    """Count the answers "being stored"; when they do not end, clear what a broken store left behind."""
    counted = replace(checkpoint, pendings=checkpoint.pendings + 1)
    if counted.pendings >= PENDINGS_BEFORE_REMOVAL:
        Receipts.of(attempt).delete(pacs, image_of(checkpoint.instance), permanent=True)
        counted = replace(counted, pendings=0)
    attempt.write_intent(counted.as_json())


def _doubtful(outcome: Outcome, checkpoint: UploadCheckpoint, pacs: Pacs, attempt: Attempt) -> Outcome:
    """Count the failures at the image; when others are stored and it never is, the fault is its own."""
    since_s = checkpoint.faulty_since_s or attempt.ledger.clock_s()
    counted = replace(checkpoint, uncertain=True, faults=checkpoint.faults + 1, faulty_since_s=since_s)
    attempt.note(counted.as_json())
    return reject_if_it_persists(outcome, counted.faults, since_s, pacs, attempt.ledger)


def _receipt(trip: _Trip, checkpoint: UploadCheckpoint) -> UploadCheckpoint:
    """Write down that the image is stored, and learn whether this job opened its study."""
    attempt, instance = trip.attempt, checkpoint.instance
    receipt = Receipt(attempt.job_id, checkpoint.server, checkpoint.sha256, checkpoint.size_bytes)
    added = replace(checkpoint, stored=True, study_action="updated")
    created = added if checkpoint.route.study_on else replace(added, study_action="created")
    opened = attempt.note_stored(
        instance.sop_instance_uid,
        instance.study_instance_uid,
        receipt,
        series_instance_uid=instance.series_instance_uid,
        first=created.as_json(),
        other=added.as_json(),
    )
    return created if opened else added


def _describe(trip: _Trip, checkpoint: UploadCheckpoint) -> UploadPayload:
    """Read the metadata back from the server that now has the image, and put the payload together."""
    attempt, services = trip.attempt, trip.services
    pacs = services.fleet[checkpoint.server]
    warnings = checkpoint.warnings
    with attempt.step("describe"):
        try:
            metadata = _metadata(pacs, checkpoint.instance)
        except CourierError as error:
            if _may_be_cured(error, attempt):
                raise
            metadata, warnings = {}, (*warnings, "metadata_unavailable")
        else:
            if metadata is None:
                metadata, warnings = {}, (*warnings, _warning_of_unseen(trip, checkpoint))
    shown, reduced = _allowed(metadata, trip.job, services)
    instance = checkpoint.instance
    return UploadPayload(
        job_id=attempt.job_id,
        study_action=checkpoint.study_action,
        server_name=pacs.server.name,
        server_type=pacs.server.type,
        route=checkpoint.route,
        study_uid=instance.study_instance_uid,
        series_uid=instance.series_instance_uid,
        image_uid=instance.sop_instance_uid,
        sop_class_uid=instance.sop_class_uid,
        transfer_syntax_uid=instance.transfer_syntax_uid,
        size_bytes=checkpoint.size_bytes,
        sha256=checkpoint.sha256,
        warnings=warned([*warnings, *reduced], checkpoint.not_asked),
        not_asked=list(checkpoint.not_asked),
        metadata=shown,
        viewer_url=viewer_of(pacs.server, instance),
        source=checkpoint.source,
        timings_ms=attempt.timings_ms,
        attempts=attempt.number,
    )


def _metadata(pacs: Pacs, instance: Instance) -> Dataset | None:
    """None if the server does not show the image."""
    datasets = pacs.metadata(image_of(instance))
    return datasets[0] if datasets else None


def _warning_of_unseen(trip: _Trip, checkpoint: UploadCheckpoint) -> str:
    """What a result warns of whose image was answered as stored and is not shown.

    Raises
    ------
    Refused
        It is hidden, or in another study; its receipt is void then.
    PacsMisanswered
        The server does not say why: it is looked for again. Where a server can hide images, or does not find it by its
        UID either, it never counts as stored.
    """
    pacs, instance, attempt = trip.services.fleet[checkpoint.server], checkpoint.instance, trip.attempt
    why = None if pacs.hiding is None else pacs.hiding.why_unseen(instance)
    if why is not None:
        study, series, image = instance.study_instance_uid, instance.series_instance_uid, instance.sop_instance_uid
        attempt.ledger.void(checkpoint.server, study, series, image, job_id=attempt.job_id)
        raise refusal(why, instance, pacs, pending_wait_s=trip.services.settings.jobs.pending_wait_s)
    what, details = f"{pacs.server.name} accepted the image but does not show it", uids_of(instance)
    error = PacsMisanswered(
        f"{what}; it is looked for again.", server_name=checkpoint.server, server_type=pacs.server.type, details=details
    )
    if pacs.hiding is not None or _may_be_cured(error, attempt):
        raise error
    if _is_not_found(pacs, instance):
        advice = "nor does it find it. Look there for the reason, then replay the job."
        raise PacsMisanswered(
            f"{what}, {advice}", server_name=checkpoint.server, server_type=pacs.server.type, details=details
        )
    return "metadata_unavailable"


def _is_not_found(pacs: Pacs, instance: Instance) -> bool:
    """Whether a server says for certain that it does not have the image; not, if it cannot be asked."""
    try:
        return not _is_in(find_known(pacs, image_of(instance)), instance.study_instance_uid)
    except CourierError:
        return False


def _allowed(metadata: Dataset, job: UploadJob, services: Services) -> tuple[Dataset, list[str]]:
    """As much metadata as the site allows in results, and warnings; a job may ask for less, never for more."""
    if job.metadata is False:
        return {}, []
    (shown,), warnings = allowed([metadata], services.settings.results, max_bytes=MAX_METADATA_BYTES)
    return shown, warnings
