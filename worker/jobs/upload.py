"""An image's way from its URL into the PACS it belongs to: fetch, identify, check, route, push, describe.

The six steps are six functions below, called in order by `upload`. What makes a second delivery harmless is the
*memo*: before the first byte is pushed, the ledger holds what goes where, so the next attempt looks there first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from courier.ledger.jobs import Receipt
from courier.messages import UploadJob, read_job
from courier.redaction import about
from courier.results import Dataset, Route, StudyAction, UploadPayload
from worker.dicom.instances import Instance, identify
from worker.jobs.attempt import NotYet, Run
from worker.jobs.hangs import Hangs, poisoned
from worker.jobs.knowledge import server_left
from worker.jobs.placement import (
    NOT_SENT,
    PENDINGS_BEFORE_REMOVAL,
    Wish,
    already_exists,
    answered,
    check_not_left_alone,
    image_of,
    judged_again,
    refusal,
    settle,
    sole_target,
    told_to_exist,
    uids_of,
    viewer_of,
)
from worker.jobs.receipts import Receipts
from worker.jobs.result_fields import allowed
from worker.jobs.routing import Answer, Decision, Exists, decide
from worker.jobs.same_bytes import Arrival, compare
from worker.jobs.services import Tools
from worker.jobs.streamed_instance import digest_of
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
class Memo:
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

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "route": self.route.model_dump()}

    @property
    def may_arrive(self) -> bool:
        """Whether the server may come to have the image without another push."""
        return self.uncertain or self.pendings > 0

    def is_about(self, instance: Instance, sha256: str) -> bool:
        return (self.instance.sop_instance_uid, self.sha256) == (instance.sop_instance_uid, sha256)

    @classmethod
    def from_json(cls, memo: Mapping[str, Any]) -> Memo:
        known = dict(memo)
        known["instance"] = Instance(**known["instance"])
        known["route"] = Route(**known["route"])
        known["warnings"] = tuple(known["warnings"])
        return cls(**known)


@dataclass
class _Seen:
    """What the check found: an `Answer` per server, and the error of each server that gave none.

    ``elsewhere``: the servers that have the image in another study alone, each with that study.
    """

    answers: list[Answer]
    errors: dict[str, CourierError] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trip:
    """What all steps of one attempt share."""

    job: UploadJob
    run: Run
    tools: Tools


def upload(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """Carry one image (design contract, section 6) and return the upload payload.

    Raises
    ------
    CourierError
        Any code of the source, the file or the servers; `TryAgain` leaves everything ready for another attempt.
    """
    trip = _Trip(read_job(UploadJob, message), run, tools)
    memo = Memo.from_json(run.memo) if run.memo else None
    if memo is not None:
        about(study_uid=memo.instance.study_instance_uid, server_name=memo.server)
        _check_still_known(memo, trip)
    if trip.job.server is not None:
        tools.fleet[trip.job.server]  # an unknown name is refused before anything is fetched
    if run.cancelled and not (memo and (memo.may_arrive or memo.stored)):
        raise Cancelled("The job was cancelled before anything was pushed.")
    if memo is None or not _arrived(memo, trip):
        memo = _bring_again(trip, memo) if memo and memo.may_arrive else _bring(trip, memo)
    if not memo.stored:
        memo = _receipt(trip, memo)
    return _describe(trip, memo).as_json()


def _check_still_known(memo: Memo, trip: _Trip) -> None:
    """Of what may be on a server that has left the settings nothing can be said, and it is stored on no other."""
    if memo.server in trip.tools.fleet.names or not (memo.may_arrive or memo.stored):
        return
    if trip.run.cancelled and not memo.stored:
        raise _uncertain(Cancelled("The job was cancelled."), memo)
    done = "stored the image on" if memo.stored else "pushed the image, which may have arrived, to"
    raise server_left(memo.server, done, details={**uids_of(memo.instance), "may_be_on": memo.server})


def _arrived(memo: Memo, trip: _Trip) -> bool:
    """Whether an earlier attempt's push reached the server it was meant for.

    A dead letter has let go of its image: replayed, it holds it again first, or what is found may be another's.
    """
    if not (memo.uncertain or memo.stored):
        return False
    with trip.run.step("check"):
        _wait_for_turn(memo.instance, trip.run)
        try:
            images = find_known(trip.tools.fleet[memo.server], image_of(memo.instance))
            there = _is_in(images, memo.instance.study_instance_uid)
        except CourierError as error:
            if not memo.stored or _may_be_cured(error, trip.run):
                raise
            there = True
        return there and _is_no_others(memo, _arrival(memo), trip)


def _is_no_others(memo: Memo, arrival: Arrival, trip: _Trip) -> bool:
    """True, unless another has stored the image since this job pushed it: then `ImageAlreadyExists`.

    Another job has left a receipt; another program, where the server keeps bytes, perhaps other bytes.
    """
    receipt, tools = trip.run.ledger.receipt(memo.instance.sop_instance_uid), trip.tools
    if receipt is not None and receipt.job_id != trip.run.job_id:
        raise already_exists(memo.server, arrival, tools)
    if not memo.stored:
        _check_same(memo, arrival, tools)
    return True


def _check_same(memo: Memo, arrival: Arrival, tools: Tools) -> None:
    """`ImageAlreadyExists`, if what is there can be seen to be another file than the one that this job pushed."""
    found = compare(tools.fleet[memo.server], arrival, tools.fleet)
    if found.same is False:
        raise told_to_exist(memo.server, arrival, found, tools)


def _may_be_cured(error: CourierError, run: Run) -> bool:
    """Whether another attempt may do better. If not, what is stored is stored, and never said to have failed."""
    return isinstance(error, TryAgain) and not error.is_lasting and not run.last


def _bring_again(trip: _Trip, earlier: Memo) -> Memo:
    """`_bring`, when an image has not arrived that still may: a job that is refused then looks again, and says so."""
    try:
        if trip.run.cancelled:
            raise Cancelled("The job was cancelled.")
        return _bring(trip, earlier)
    except Refused as refused:
        if _arrived(earlier, trip):
            return earlier
        if isinstance(refused, ImageAlreadyExists) and not earlier.uncertain:
            raise
        raise _uncertain(refused, earlier) from None


def _uncertain(refused: Refused, memo: Memo) -> Refused:
    said = "The job was cancelled" if isinstance(refused, Cancelled) else refused.message.rstrip(".")
    return type(refused)(
        f"{said}; an earlier push of the image to {memo.server} may still arrive, so look for it there.",
        server_name=refused.server_name,
        server_type=refused.server_type,
        details={**uids_of(memo.instance), "may_be_on": memo.server, **refused.details},
    )


def _bring(trip: _Trip, earlier: Memo | None) -> Memo:
    """Fetch, identify, check, route and push; the memo then says where the image is.

    What would be fetched in vain is not: while another job has the image, or a server is left alone.
    """
    run, tools = trip.run, trip.tools
    if run.wants:
        with run.step("check"):
            _take_turn(*run.wants, run=run)
    _check_servers(trip, earlier)
    with run.step("fetch"):
        fetched = tools.sources.fetch(trip.job.image_url)
    pushed: Memo | None = None
    try:
        with fetched:
            pushed = _place(trip, fetched, earlier)
    except SourceUnreachable as error:  # its file could not be closed
        if pushed is None or _may_be_cured(error, run):
            raise
    return pushed


def _place(trip: _Trip, fetched: Fetched, earlier: Memo | None) -> Memo:
    """Identify, check, route and push what was fetched."""
    run, tools = trip.run, trip.tools
    with run.step("identify"):
        instance = identify(fetched.stream)
    about(study_uid=instance.study_instance_uid)
    with run.step("check"):
        _wait_for_turn(instance, run)
        seen = _check(instance, tools, target=sole_target(trip.job.server, tools.fleet.names))
    if earlier is not None and not earlier.is_about(instance, fetched.sha256):
        earlier = None  # the source gives another file now: what an earlier attempt pushed proves nothing for it
    with run.step("route"):
        decision = decide(seen.answers)
        memo = _memo(instance, fetched, earlier, tools)
        there = decision.server if isinstance(decision, Exists) else ""
        if earlier is not None and there not in seen.elsewhere and _may_be_ours(earlier, there):
            _is_no_others(earlier, _arrival(earlier, fetched), trip)
            return earlier
        memo = _route(trip, memo, fetched, decision, seen)
    about(server_name=memo.server)
    with run.step("push"):
        return _push(trip, memo, fetched, resumed=_may_be_ours(earlier, memo.server))


def _memo(instance: Instance, fetched: Fetched, earlier: Memo | None, tools: Tools) -> Memo:
    names = tools.fleet.names
    return Memo(
        server=names[0],
        instance=instance,
        size_bytes=fetched.size_bytes,
        sha256=fetched.sha256,
        source=fetched.source,
        route=Route(reason="study_exists", study_on=[], candidates=names),
        warnings=() if instance.has_preamble else ("preamble_added",),
        pendings=earlier.pendings if earlier else 0,
        faults=earlier.faults if earlier else 0,
        faulty_since_s=earlier.faulty_since_s if earlier else 0,
        hangs_seen=earlier.hangs_seen if earlier else 0,
        zero_preamble=fetched.starts_with(PREAMBLE),
    )


def _may_be_ours(earlier: Memo | None, server: str) -> bool:
    """Whether an image that is on ``server`` now may have come there by an earlier attempt at this very job."""
    return earlier is not None and earlier.uncertain and earlier.server == server


def _check_servers(trip: _Trip, earlier: Memo | None) -> None:
    """`PacsUnavailable`, if a server is left alone that has to say whether it has the image, or is to store it."""
    names = trip.tools.fleet.names
    target = trip.job.server or (earlier.server if earlier else None) or (names[0] if len(names) == 1 else None)
    check_not_left_alone(trip.tools, names, changed=target if target in names else None)


def _wait_for_turn(instance: Instance, run: Run) -> None:
    _take_turn(instance.sop_instance_uid, instance.study_instance_uid, instance.series_instance_uid, run=run)


def _take_turn(image: str, study: str, series: str, *, run: Run) -> None:
    owner = run.ledger.hold_image(image, job_id=run.job_id, fence=run.fence, into=(study, series))
    if owner is not None:
        sentence = f"job {owner} is storing the same image, or deleting what it belongs to"
        raise NotYet(sentence, delay_s=TURN_S, owner=owner)


def _check(instance: Instance, tools: Tools, *, target: str | None) -> _Seen:
    """Ask every server for the image and for its study, all at the same time."""
    questions: list[Callable[[], list[Found]]] = []
    for pacs in tools.fleet:
        questions.append(partial(find_known, pacs, image_of(instance)))
        questions.append(partial(pacs.find, "study", instance.study_instance_uid))
    replies = iter(tools.fleet.gather(questions))
    seen = _Seen([])
    for name in tools.fleet.names:
        image, study = (answered(name, next(replies), target=target) for _ in range(2))
        for reply in (image, study):
            if isinstance(reply, CourierError):
                seen.errors.setdefault(name, reply)
        if not isinstance(image, CourierError) and image and not _is_in(image, instance.study_instance_uid):
            seen.elsewhere[name] = image[0].study_instance_uid
        seen.answers.append(Answer(name, image=_yes(image), study=_yes(study)))
    return seen


def _is_in(founds: Sequence[Found], study_uid: str) -> bool:
    return any(found.study_instance_uid == study_uid for found in founds)


def _yes(reply: list[Found] | CourierError) -> bool | None:
    return None if isinstance(reply, CourierError) else bool(reply)


def _route(trip: _Trip, memo: Memo, fetched: Fetched, decision: Decision, seen: _Seen) -> Memo:
    """Where the image goes; for a study that is nowhere, by the claim."""
    wish = Wish(trip.run.job_id, trip.job.server)
    arrival = replace(_arrival(memo, fetched), elsewhere=seen.elsewhere)
    placed = settle(decision, arrival, wish, errors=seen.errors, tools=trip.tools)
    return replace(memo, server=placed.server, route=placed.route, warnings=(*memo.warnings, *placed.warnings))


def _arrival(memo: Memo, fetched: Fetched | None = None) -> Arrival:
    bare, opened = (None, None) if fetched is None else (partial(_bare_digest, fetched), fetched.open)
    return Arrival(memo.instance, memo.size_bytes, memo.sha256, memo.source, memo.zero_preamble, bare, open=opened)


def _bare_digest(fetched: Fetched) -> str:
    with fetched.open() as file:
        return digest_of(iter(partial(file.read, CHUNK_BYTES), b""))


def _push(trip: _Trip, memo: Memo, fetched: Fetched, *, resumed: bool) -> Memo:
    """Send the image to its server and judge the answer for this instance."""
    tools = trip.tools
    pacs = tools.fleet[memo.server]
    hangs = Hangs(trip.run)
    _check_hangs(hangs, pacs, memo, trip.run, resumed=resumed)
    decision = {"server": memo.server, "study_uid": memo.instance.study_instance_uid, **memo.route.model_dump()}
    trip.run.intend(replace(memo, uncertain=True).as_json(), decision=decision)
    part = Part(memo.instance, fetched.open, fetched.size_bytes)
    try:
        with hangs.sending(pacs, lambda: [memo.sha256]):
            (outcome,) = pacs.store([part])
    except CourierError as error:
        if isinstance(error, NeedsPerson) or error.details.get("phase") in NOT_SENT:
            trip.run.intend(replace(memo, uncertain=resumed).as_json())
        raise
    if outcome.fate is Fate.PENDING:
        _pending(replace(memo, uncertain=resumed), pacs, trip.run)
    if outcome.is_doubtful:
        outcome = _doubtful(outcome, memo, pacs, trip.run)
    return _judge(outcome, memo, _arrival(memo, fetched), resumed=resumed, tools=tools)


def _check_hangs(hangs: Hangs, pacs: Pacs, memo: Memo, run: Run, *, resumed: bool) -> None:
    """`Poisoned`, if the server has hung at the file so often that it is not sent again, until it is replayed."""
    count = hangs.given_up(pacs, [memo.sha256], {memo.sha256: memo.hangs_seen}).get(memo.sha256)
    if count is not None:
        run.note(replace(memo, uncertain=resumed, hangs_seen=count).as_json())
        raise poisoned(pacs, count, uids_of(memo.instance))


def _judge(outcome: Outcome, memo: Memo, arrival: Arrival, *, resumed: bool, tools: Tools) -> Memo:
    match outcome.fate:
        case Fate.STORED:
            return replace(memo, warnings=(*memo.warnings, *outcome.warnings))
        case Fate.ALREADY_THERE if resumed:
            _check_same(memo, arrival, tools)
            return memo
        case Fate.ALREADY_THERE:
            raise already_exists(memo.server, arrival, tools)
        case _:
            pacs = tools.fleet[memo.server]
            raise refusal(outcome, memo.instance, pacs, pending_wait_s=tools.settings.jobs.pending_wait_s)


def _pending(memo: Memo, pacs: Pacs, run: Run) -> None:
    """Count the answers "being stored"; when they do not end, clear what a broken store left behind."""
    counted = replace(memo, pendings=memo.pendings + 1)
    if counted.pendings >= PENDINGS_BEFORE_REMOVAL:
        Receipts.of(run).delete(pacs, image_of(memo.instance), permanent=True)
        counted = replace(counted, pendings=0)
    run.intend(counted.as_json())


def _doubtful(outcome: Outcome, memo: Memo, pacs: Pacs, run: Run) -> Outcome:
    """Count the failures at the image; when others are stored and it never is, the fault is its own."""
    since_s = memo.faulty_since_s or run.ledger.clock_s()
    counted = replace(memo, uncertain=True, faults=memo.faults + 1, faulty_since_s=since_s)
    run.note(counted.as_json())
    return judged_again(outcome, counted.faults, since_s, pacs, run.ledger)


def _receipt(trip: _Trip, memo: Memo) -> Memo:
    """Write down that the image is stored, and learn whether this job opened its study."""
    run, instance = trip.run, memo.instance
    receipt = Receipt(run.job_id, memo.server, memo.sha256, memo.size_bytes)
    opened = run.ledger.stored(
        instance.sop_instance_uid,
        instance.study_instance_uid,
        receipt,
        series_instance_uid=instance.series_instance_uid,
    )
    action: StudyAction = "created" if opened and not memo.route.study_on else "updated"
    stored = replace(memo, stored=True, study_action=action)
    run.note(stored.as_json())  # too late to be cancelled: it is stored
    return stored


def _describe(trip: _Trip, memo: Memo) -> UploadPayload:
    """Read the metadata back from the server that now has the image, and put the payload together."""
    run, tools = trip.run, trip.tools
    pacs = tools.fleet[memo.server]
    warnings = memo.warnings
    with run.step("describe"):
        try:
            metadata = _metadata(pacs, memo.instance)
        except CourierError as error:
            if _may_be_cured(error, run):
                raise
            metadata, warnings = {}, (*warnings, "metadata_unavailable")
        else:
            if metadata is None:
                metadata, warnings = {}, (*warnings, _warning_of_unseen(trip, memo))
    shown, reduced = _allowed(metadata, trip.job, tools)
    instance = memo.instance
    return UploadPayload(
        job_id=run.job_id,
        study_action=memo.study_action,
        server_name=pacs.server.name,
        server_type=pacs.server.type,
        route=memo.route,
        study_uid=instance.study_instance_uid,
        series_uid=instance.series_instance_uid,
        image_uid=instance.sop_instance_uid,
        sop_class_uid=instance.sop_class_uid,
        transfer_syntax_uid=instance.transfer_syntax_uid,
        size_bytes=memo.size_bytes,
        sha256=memo.sha256,
        warnings=[*warnings, *reduced],
        metadata=shown,
        viewer_url=viewer_of(pacs.server, instance),
        source=memo.source,
        timings_ms=run.timings_ms,
        attempts=run.attempt,
    )


def _metadata(pacs: Pacs, instance: Instance) -> Dataset | None:
    """None if the server does not show the image."""
    datasets = pacs.metadata(image_of(instance))
    return datasets[0] if datasets else None


def _warning_of_unseen(trip: _Trip, memo: Memo) -> str:
    """What a result warns of whose image was answered as stored and is not shown.

    Raises
    ------
    Refused
        It is hidden, or in another study; its receipt is void then.
    PacsMisanswered
        The server does not say why: it is looked for again. Where a server can hide images, or does not find it by its
        UID either, it never counts as stored.
    """
    pacs, instance, run = trip.tools.fleet[memo.server], memo.instance, trip.run
    why = None if pacs.hiding is None else pacs.hiding.why_unseen(instance)
    if why is not None:
        study, series, image = instance.study_instance_uid, instance.series_instance_uid, instance.sop_instance_uid
        run.ledger.void(memo.server, study, series, image, job_id=run.job_id)
        raise refusal(why, instance, pacs, pending_wait_s=trip.tools.settings.jobs.pending_wait_s)
    what, details = f"{pacs.server.name} accepted the image but does not show it", uids_of(instance)
    error = PacsMisanswered(
        f"{what}; it is looked for again.", server_name=memo.server, server_type=pacs.server.type, details=details
    )
    if pacs.hiding is not None or _may_be_cured(error, run):
        raise error
    if _is_not_found(pacs, instance):
        advice = "nor does it find it. Look there for the reason, then replay the job."
        raise PacsMisanswered(
            f"{what}, {advice}", server_name=memo.server, server_type=pacs.server.type, details=details
        )
    return "metadata_unavailable"


def _is_not_found(pacs: Pacs, instance: Instance) -> bool:
    """Whether a server says for certain that it does not have the image; not, if it cannot be asked."""
    try:
        return not _is_in(find_known(pacs, image_of(instance)), instance.study_instance_uid)
    except CourierError:
        return False


def _allowed(metadata: Dataset, job: UploadJob, tools: Tools) -> tuple[Dataset, list[str]]:
    """As much metadata as the site allows in results, and warnings; a job may ask for less, never for more."""
    if job.metadata is False:
        return {}, []
    (shown,), warnings = allowed([metadata], tools.settings.results, max_bytes=MAX_METADATA_BYTES)
    return shown, warnings
