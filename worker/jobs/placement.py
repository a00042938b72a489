"""Which server an image goes to, and why one will not have it: what a single upload and a batch of them share.

Decided by `worker/jobs/routing.py` over what the servers said; here it meets the claims. Nothing is pushed here. A
server is asked for one thing only: whether an image that it has is the file that came (`same_bytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from courier.errors import (
    CourierError,
    ImageAlreadyExists,
    PacsMisanswered,
    PacsRejected,
    PacsUnavailable,
    StudyConflict,
    first_to_wait_for,
)
from courier.ledger.breakers import CHANGES, CREDENTIAL, BreakerState, server_of
from courier.ledger.jobs import NO_INTENT, IntentResult, IntentState, Ledger, PushIntent
from courier.results import Route, RouteReason
from courier.settings import ServerSettings
from worker.dicom.instances import Instance
from worker.dicom.viewer import viewer_url
from worker.jobs.attempt import Postpone, ServerUnknown
from worker.jobs.routing import Decision, Exists, Follow, New, Open, choose
from worker.jobs.same_bytes import LEFT_TO_VERIFICATION, Arrival, Comparison, compare, in_words
from worker.jobs.services import Services
from worker.pacs.guard import circuit_open_error, slowed
from worker.pacs.in_service import in_maintenance, suspended, suspended_error
from worker.pacs.protocol import NOTHING_OR_WRONG_URL, Fate, Found, Outcome, Pacs
from worker.pacs.server_rates import STAY_S

T = TypeVar("T")

#: Phases of a call (worker/pacs/) in which the server cannot have seen anything of it.
NOT_SENT = ("resting", "connect")
#: By these a server, or a proxy before it, refuses a request without looking at its images: none of them is stored.
REFUSED_UNREAD = frozenset({411, 413, 414, 415, 431})
#: How soon to look again whether a job that follows a claim has ended.
CLAIM_AGAIN_S = 0.5
#: After so many answers "being stored", what is left of a broken store is removed (docs/pacs-oddities.md).
PENDINGS_BEFORE_REMOVAL = 3
#: After so many failures at one image, while the server stores others, the fault is taken for the image's.
FAULTS_OF_AN_IMAGE = 5


@dataclass(frozen=True)
class Placement:
    """Where an image goes, why, and what the result has to warn of. ``intended``: whether its push is written down."""

    server: str
    route: Route
    warnings: tuple[str, ...] = ()
    intended: IntentResult = NO_INTENT


@dataclass(frozen=True)
class PlacementOrder:
    """Who asks for a place: the job, and the server that it names, if it does.

    ``in_history`` says whether a claim is worth an entry in the study's history, ``compares`` whether the bytes of
    an image that is there already are compared now. ``not_asked`` are the servers that were in maintenance. ``intent``
    is what is written down, together with the claim of a new study, of a push to a place; not in a maintenance, when
    more is noted first.
    """

    job_id: str
    server: str | None = None
    in_history: bool = True
    compares: bool = True
    not_asked: Sequence[str] = ()
    intent: Callable[[Placement], PushIntent] | None = None


def open_circuits(services: Services, names: Sequence[str], *, changed: str | None = None) -> Sequence[CourierError]:
    """Errors of those of the servers ``names`` that may not be asked now, and of ``changed`` if it takes no changes.

    So are those that an operator has taken out of service, and those that have asked for fewer requests, if the next
    one would wait too long for its turn.

    To be asked before a file is fetched that would be of no use then. One whose circuit is half-open,
    and that no job is asking, may be asked.
    """
    asked = list(dict.fromkeys([*names, *([changed] if changed else [])]))
    left = {name: one for name, one in suspended(services.suspensions).items() if name in asked}
    errors: list[CourierError] = [suspended_error(services.fleet[name].server, one) for name, one in left.items()]
    if services.breakers is None:
        return errors
    names, asked = [name for name in names if name not in left], [name for name in asked if name not in left]
    changed = None if changed in left else changed
    if services.seem_well(asked):
        return errors
    changes = [] if changed is None else [changed + CHANGES]
    credentials = [name + CREDENTIAL for name in names]
    states = services.breakers.read([*names, *credentials, *changes])
    errors += [
        circuit_open_error(services.fleet[server_of(breaker)].server, breaker, state.pause_left_s, state.reason)
        for breaker, state in states.items()
        if state.pause_left_s is not None and (state.pause_left_s > 0 or state.probing)
    ]
    rates = {} if services.rates is None else services.rates.read(asked)
    return errors + [slowed(services.fleet[name].server, rate) for name, rate in rates.items() if rate.wait_s > STAY_S]


def check_no_open_circuit(services: Services, names: Sequence[str], *, changed: str | None = None) -> None:
    """`PacsUnavailable` or `PacsUnauthorized`, if one of those servers is `open_circuits`."""
    if errors := open_circuits(services, names, changed=changed):
        raise first_to_wait_for(errors)


def sole_target(server: str | None, names: Sequence[str]) -> str | None:
    """The one server that an image can go to, if that is known before any is asked."""
    return server or (names[0] if len(names) == 1 else None)


def answered(name: str, reply: T | CourierError, *, target: str | None) -> T | CourierError | list[Found]:
    """``reply``; but what is either "nothing" or a wrong url is nothing, if the image goes to that server in any case.

    Its answer to the push proves which of the two it was.
    """
    unclear = isinstance(reply, CourierError) and reply.details.get(NOTHING_OR_WRONG_URL)
    return [] if unclear and name == target else reply


def settle(
    decision: Decision,
    arrival: Arrival,
    order: PlacementOrder,
    *,
    errors: Mapping[str, CourierError],
    services: Services,
) -> Placement:
    """Where the image goes; for a study that is nowhere, by the claim.

    Raises
    ------
    ImageAlreadyExists
        It is on a server.
    CourierError
        The one of the first server in ``errors`` that leaves the question open.
    StudyConflict
        The study belongs to another server than the one that was asked for.
    PacsUnavailable
        No server takes new studies.
    ServerUnknown
        The study belongs to a server that other workers know and this one does not.
    """
    match decision:
        case Exists(server):
            raise already_exists(server, arrival, services, compares=order.compares)
        case Open(unanswered):
            raise first_to_wait_for([errors[name] for name in unanswered])
        case Follow(server, study_on):
            return _follow(order, server, study_on, candidates=services.fleet.names)
        case New():
            return _claim(arrival.instance.study_instance_uid, order, services)


def _follow(order: PlacementOrder, server: str, study_on: tuple[str, ...], *, candidates: Sequence[str]) -> Placement:
    if order.server is not None and order.server not in study_on:
        raise StudyConflict(
            f"The study is on {server}; leave out the server or name {server}, so that the study is not split.",
            server_name=server,
            details={"study_on": list(study_on), "requested": order.server},
        )
    reason: RouteReason = "requested" if order.server else "study_exists"
    route = Route(reason=reason, study_on=list(study_on), candidates=list(candidates))
    return Placement(order.server or server, route, ("study_split",) if len(study_on) > 1 else ())


def _claim(study_instance_uid: str, order: PlacementOrder, services: Services) -> Placement:
    healthy = _healthy(services, order.not_asked)
    candidates = [server.name for server in healthy]
    leaving = _to_leave(study_instance_uid, order, services)
    proposal = order.server or _proposal(study_instance_uid, healthy, order, services)
    reason: RouteReason = "requested" if order.server else "new_study"
    expected = Placement(proposal, Route(reason=reason, study_on=[], candidates=candidates))
    intent = order.intent(expected) if order.intent and not order.not_asked else None
    claim = services.ledger.claim_study(
        study_instance_uid,
        server=proposal,
        job_id=order.job_id,
        among=services.fleet.names,
        in_history=order.in_history,
        asked_for=order.server is not None,
        leaving=leaving,
        intent=intent,
    )
    if claim.intended.state is not IntentState.UNTRIED:
        return replace(expected, intended=claim.intended)
    if claim.server not in services.fleet.names:
        raise ServerUnknown(claim.server)
    _check_in_service(claim.server, study_instance_uid, order, services)
    if order.server is not None and claim.server != order.server:
        raise StudyConflict(
            f"No server has the study yet, but another image of it is on its way to {claim.server}, or may still arrive"
            f" there; leave out the server, name {claim.server}, or send the job again when that image's job has ended"
            " (a dead letter ends when it is purged).",
            server_name=claim.server,
            details={"study_on": [], "requested": order.server},
        )
    reason = "requested" if order.server else "new_study" if claim.first else "claimed"
    return Placement(claim.server, Route(reason=reason, study_on=[], candidates=candidates))


def _to_leave(study_instance_uid: str, order: PlacementOrder, services: Services) -> str | None:
    """The server in maintenance that the study belongs to, if it does."""
    claimed = _claimed(study_instance_uid, services) if order.not_asked else None
    return claimed if claimed in order.not_asked else None


def _proposal(study_instance_uid: str, healthy: list[ServerSettings], order: PlacementOrder, services: Services) -> str:
    """The server of a study that no job has claimed: the claim says whether one has. It need be none that takes new
    studies, if one has.
    """
    if not healthy:
        claimed = _claimed(study_instance_uid, services)
        if claimed is not None and claimed not in order.not_asked:
            return claimed
    return _choose(healthy, services)


def _check_in_service(server: str, study_instance_uid: str, order: PlacementOrder, services: Services) -> None:
    """That what is claimed for a server in maintenance waits for it, as images of the study are there, or may be.

    Raises
    ------
    Postpone
        A job that follows the claim is at work, and what it comes to decides whether the study may go elsewhere; or the
        maintenance has just ended.
    PacsUnavailable
        The job waits until the maintenance ends.
    """
    if server not in order.not_asked:
        return
    suspension = in_maintenance().get(server)
    if suspension is None or services.ledger.claim_is_in_use(study_instance_uid):
        sentence = f"another image of the study is on its way to {server}, which was not asked"
        raise Postpone(sentence, delay_s=CLAIM_AGAIN_S)
    raise suspended_error(services.fleet[server].server, suspension, ", and the study belongs to that server")


def _claimed(study_instance_uid: str, services: Services) -> str | None:
    """The server that the study belongs to, unless that has left the settings: all that are left have said no."""
    server = services.ledger.claimed_server(study_instance_uid)
    return server if server in services.fleet.names else None


def _healthy(services: Services, not_asked: Sequence[str]) -> list[ServerSettings]:
    """Servers that may be given a new study, the healthiest alone; all have answered, or nobody would ask for a place.

    Whether a server has the study is never guessed from this: it only chooses among those that do not have it.
    """
    out_of_service = {*not_asked, *suspended(services.suspensions)}
    servers = [pacs.server for pacs in services.fleet if pacs.server.name not in out_of_service]
    if services.breakers is None or not servers or services.seem_well([server.name for server in servers]):
        return servers
    names = [server.name for server in servers]
    ranks = {name: _rank(state) for name, state in services.breakers.states(names).items()}
    best = min(ranks.values())
    return [server for server in servers if ranks[server.name] == best < _OPEN]


_OPEN = 3


def _rank(state: BreakerState) -> int:
    """0: nothing is against it; 1: it failed lately; 2: its circuit is half-open; 3: its circuit is open."""
    if state.closed:
        return 1 if state.lately else 0
    return 2 if state.name == "half-open" else _OPEN


def _choose(healthy: list[ServerSettings], services: Services) -> str:
    if not healthy:
        raise _nobody(services)
    routing = services.settings.routing
    placed = services.ledger.placed() if routing.policy == "balanced" else {}
    return choose(healthy, routing, placed=placed, rng=services.rng)


def _nobody(services: Services) -> PacsUnavailable:
    """All circuits are open: the job waits for the one that is asked again first. Or all servers are out of service."""
    out_of_service = suspended(services.suspensions)
    names = [name for name in services.fleet.names if name not in out_of_service]
    if not names:
        first = services.fleet.names[0]
        return suspended_error(services.fleet[first].server, out_of_service[first], ", as all servers are")
    error = PacsUnavailable("No server takes new studies at present; the job waits for one.")
    if services.breakers is not None:
        states = services.breakers.states(names).values()
        error.open_circuit, error.is_attempt = min(states, key=lambda state: state.pause_left_s or 0).breaker, False
    return error


def already_exists(server: str, arrival: Arrival, services: Services, *, compares: bool = True) -> ImageAlreadyExists:
    """The error; ``compares``: the server is asked for the image, and its bytes are compared (`same_bytes`)."""
    pacs = services.fleet[server]
    found = compare(pacs, arrival, services.fleet) if compares else LEFT_TO_VERIFICATION
    return image_exists_error(server, arrival, found, services)


def image_exists_error(server: str, arrival: Arrival, found: Comparison, services: Services) -> ImageAlreadyExists:
    settings = services.fleet[server].server
    receipt = services.ledger.receipt(arrival.instance.sop_instance_uid)
    elsewhere = arrival.elsewhere.get(server)
    where = f"{server}, in another study ({elsewhere})" if elsewhere else server
    sentence = f"The image is already on {where}{_difference(found)}."
    link = viewer_of(settings, arrival.instance) if elsewhere is None else viewer_url(settings, study=elsewhere)
    return ImageAlreadyExists(
        sentence,
        server_name=server,
        server_type=settings.type,
        details={
            **uids_of(arrival.instance),
            "sha256": arrival.sha256,
            "stored_sha256": found.stored_sha256,
            "same_bytes": found.same,
            "same_bytes_reason": found.reason,
            **({"tags": list(found.tags), "made_by": list(found.made_by)} if found.tags else {}),
            "receipt_sha256": receipt.sha256 if receipt and receipt.server == server else None,
            "viewer_url": link,
            "source": arrival.source,
            **({"in_study_uid": elsewhere} if elsewhere else {}),
        },
    )


def _difference(found: Comparison) -> str:
    if found.same is not False:
        return ""
    words = in_words(found)
    return f", with other bytes: {words}" if words else ", with other bytes"


def refusal(outcome: Outcome, instance: Instance, pacs: Pacs, *, pending_wait_s: float) -> CourierError:
    """What a server's answer means for an image that it neither stored nor had before."""
    name = pacs.server.name
    context: dict[str, Any] = {
        "server_name": name,
        "server_type": pacs.server.type,
        "details": {"failure_reason": outcome.failure_reason, **uids_of(instance), **outcome.details},
    }
    said = f" ({outcome.message})" if outcome.message else ""
    match outcome.fate:
        case Fate.CONFLICT:
            if outcome.details.keys() & {"in_study_uid", "in_series_uid"}:
                sentence = f"{name} did not store the image{said}; correct its UIDs, or delete the image there."
                return StudyConflict(sentence, **context)
            return StudyConflict(f"{name} holds the study with other data{said}; correct the file.", **context)
        case Fate.REJECTED:
            advice = "." if "hidden_by" in outcome.details else "; correct the file."
            return PacsRejected(f"{name} will not take this image{said}{advice}", **context)
        case Fate.UNMENTIONED:
            return PacsMisanswered(f"{name} did not say what became of the image; it is sent again.", **context)
        case Fate.PENDING:
            sentence = f"{name} says that it is storing this image already."
            if pacs.server.deletions != "allow":
                sentence += f" {name} is protected, so what a broken store may have left behind is not removed."
            return PacsUnavailable(sentence, retry_after_s=pending_wait_s, **context)
        case _:
            return PacsUnavailable(f"{name} had trouble while storing the image{said}.", **context)


def is_refused_whole(error: CourierError) -> bool:
    """Whether ``error`` refuses all images of a request, perhaps because of one: each has to be sent alone."""
    return isinstance(error, PacsRejected) or (
        isinstance(error, PacsMisanswered) and error.details.get("status") == 400
    )


def reject_if_it_persists(outcome: Outcome, faults: int, since_s: float, pacs: Pacs, ledger: Ledger | None) -> Outcome:
    """``outcome``, a doubtful failure, after ``faults`` of them at the image since ``since_s``: perhaps a refusal.

    It is one if the server has stored other images meanwhile, and does not say that its storage or database is in
    trouble.
    """
    name = pacs.server.name
    if (
        faults < FAULTS_OF_AN_IMAGE
        or ledger is None
        or ledger.stored_last_s(name) <= since_s
        or not says_it_is_well(pacs)
    ):
        return outcome
    sentence = f"It has failed {faults} times at this image, and stored others meanwhile. {outcome.message}"
    return replace(outcome, fate=Fate.REJECTED, message=sentence.strip(), is_doubtful=False)


def says_it_is_well(pacs: Pacs) -> bool:
    """Whether a server answers, and does not say that its storage or database is in trouble."""
    try:
        return pacs.storage().is_well is not False and pacs.database().ok is not False
    except CourierError:
        return False


def image_of(instance: Instance) -> Found:
    return Found("image", instance.study_instance_uid, instance.series_instance_uid, instance.sop_instance_uid)


def uids_of(instance: Instance) -> dict[str, str]:
    return {
        "study_uid": instance.study_instance_uid,
        "series_uid": instance.series_instance_uid,
        "image_uid": instance.sop_instance_uid,
    }


def viewer_of(server: ServerSettings, instance: Instance) -> str:
    return viewer_url(
        server,
        study=instance.study_instance_uid,
        series=instance.series_instance_uid,
        image=instance.sop_instance_uid,
    )
