"""How a job is carried to its end: claim, attempt, and one of done, refused, parked or dead.

This is the only place that decides whether to try again. What the work is lives in the other modules here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import redis

from courier.errors import (
    Cancelled,
    CourierError,
    InvalidRequest,
    PacsUnavailable,
    Poisoned,
    TryAgain,
    Unauthorized,
    from_payload,
    waits_for_server,
)
from courier.json_text import EncodedResult
from courier.ledger.breakers import circuit_open, is_suspension
from courier.ledger.jobs import (
    CLOSED_MEANWHILE_S,
    NO_SENDER,
    NOTHING_ATTACHED,
    Attachment,
    HandedBack,
    LeaseLost,
    PendingFollowUps,
    Sender,
    TakeResult,
    TakeState,
    Wait,
    passes,
    words_of,
)
from courier.messages import MESSAGE_BYTES
from courier.redaction import about, about_study, redact_url, where_it_broke
from courier.settings import JobSettings
from courier.telemetry import End, JobEvent, count, observe
from courier.waits import SERVER_MAINTENANCE, SERVER_PAUSED, WORKER_SHORTAGE, WaitReason, noted_in
from worker.jobs.attempt import Attempt, Heartbeat, Postpone
from worker.jobs.delete_lock import ASK_AGAIN_S, SOON_AGAIN, is_deleting, is_given_up
from worker.jobs.knowledge import check_knows_servers
from worker.jobs.services import Services
from worker.pacs import in_service
from worker.pacs.server_rates import SPREAD_S
from worker.runtime.shortage import MAX_RETURNS, PAUSE_S, STARVED, Returns, dead_letter, is_shortage, why

log = logging.getLogger(__name__)

#: Somebody waits for the answer to these: they do not sit out a server's illness, but end after their attempts.
SOMEBODY_WAITS: Final = frozenset({"pacs.exists", "pacs.metadata", "pacs.list_studies"})

#: How long a job waits whose server asked for fewer requests, where the rate could not be lowered (Redis was away).
SLOWED_S: Final = 1.0

#: How soon a job goes on without a server whose maintenance has begun in the middle of an attempt.
WITHOUT_IT_S: Final = 0.2

#: These may take long, so they obey an operator in the middle of an attempt.
_OBEYS_MIDWAY: Final = frozenset({"pacs.batch.chunk"})

#: A job to which Redis gives the same error so often is a dead letter.
MAX_REFUSALS: Final = 3

#: What Celery puts around a job in the body of a message.
_AROUND_BYTES: Final = 128


@dataclass(frozen=True)
class Done:
    """``follow_ups`` are to be sent before anybody is told, as far as the ledger has any that are not sent yet."""

    payload: dict[str, Any]
    follow_ups: PendingFollowUps | None = None


@dataclass(frozen=True)
class Failed:
    error: CourierError
    follow_ups: PendingFollowUps | None = None


@dataclass(frozen=True)
class Deferred:
    """Not over: a worker will be woken for it, or is at it already. ``waiting`` (`Waiting`) is what watchers of the job
    are told meanwhile, {} if this attempt did not put it aside.
    """

    waiting: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Starved(Deferred):
    """Put aside, because this worker gets no thread, memory or file. It takes none of the job's attempts."""


@dataclass(frozen=True)
class NotTaken:
    """The ledger did not say whose job it is, or has lost it. The message may be all there is: it has to come again."""


JobResult = Done | Failed | Deferred | NotTaken
Work = Callable[[Mapping[str, Any], Attempt, Services], dict[str, Any]]


def execute(  # noqa: PLR0913 - what a message is, and what there is to work with
    work: Work,
    *,
    task: str,
    job_id: str,
    message: object,
    services: Services,
    heartbeat: Heartbeat,
    trace: str = "",
    queue: str = "",
    attached: Attachment = NOTHING_ATTACHED,
    sender: Sender = NO_SENDER,
) -> JobResult:
    """Do what is left to do of one delivered message, however often it is delivered.

    ``trace`` is the W3C ``traceparent`` it came with, kept for whoever has to wake the job, ``queue`` what it was
    taken from, ``attached`` what it bears besides, ``sender`` who signed it.

    The verdict of a job that is over is the recorded one, whoever did it.
    """
    job: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    limits = services.settings.jobs
    try:
        taken = services.ledger.take(
            job_id,
            task=task,
            job=job,
            max_deaths=limits.max_deaths,
            trace=trace,
            queue=queue,
            attached=attached,
            sender=sender,
        )
    except redis.RedisError as error:
        log.warning("The ledger did not take the claim (%s); the message is given back", type(error).__name__)
        return NotTaken()
    if taken.state in _TAKEN:
        return _refused(job_id, taken, attached)
    if taken.state is not TakeState.YOURS:
        return _recorded(taken)
    about(stage="claimed", attempt=taken.attempt)
    about_study(job)
    attempt = Attempt(
        job_id=job_id,
        task=task,
        fence=taken.fence,
        number=taken.attempt,
        last=taken.attempt >= limits.max_attempts or taken.waited_s >= limits.max_wait_s,
        ledger=services.ledger,
        cancelled=taken.cancelled,
        checkpoint=taken.checkpoint,
        wants=taken.wants,
        attachments=taken.attachments,
        sender=taken.sender,
        clock=services.clock,
    )
    seen = JobEvent(task, job_id, taken.attempt)
    try:
        with observe(seen), noted_in(attempt.meanwhile), heartbeat.keep_alive(attempt):
            with in_service.viewed_by_attempt(services.suspensions, live=task in _OBEYS_MIDWAY) as view:
                result = _attempt(work, taken, job, attempt, services, task=task)
                result = _without_the_server(result, view)
            if isinstance(result, _Defer | WaitForServer):
                result = _foreseen(result, attempt, heartbeat)
            result = _record(result, attempt, task=task, job=job, services=services)
            seen.end, seen.code = _ending(result)
    except (LeaseLost, redis.RedisError) as error:
        return _release(error, attempt, job, trace=trace, services=services, heartbeat=heartbeat)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        return _starved(error, attempt, task=task, job=job, services=services)
    _returns.succeeded()
    return result


_returns = Returns()

#: Why a message is refused whose id the ledger knows.
_TAKEN: Final = {
    TakeState.OTHER: "The id {} belongs to another job; send this one under its own id.",
    TakeState.FULL: "The id {} has too many follow-ups already; send this job, with its own, under its own id.",
}


def _refused(job_id: str, taken: TakeResult, attached: Attachment) -> Failed:
    """What a refused message bears hears of the refusal; but a chord that waits for the job of this id goes on."""
    refusal = InvalidRequest(_TAKEN[taken.state].format(job_id), details={"taken": True})
    log.warning("Refused: %s", refusal)
    if not attached.follow_ups:
        return Failed(refusal)
    follow_ups = json.loads(attached.follow_ups)
    if follow_ups.get("group") == json.loads(taken.attachments.headers or "{}").get("group"):
        follow_ups.pop("chord", None)
    return Failed(refusal, PendingFollowUps(json.dumps(follow_ups)))


def _starved(error: Exception, attempt: Attempt, *, task: str, job: Mapping[str, Any], services: Services) -> JobResult:
    """Another worker may have what this one lacks; a job that starves while others are done has to be looked at."""
    log.error("Put the job aside, because %s", why(error))
    try:
        result: JobResult = Starved()
        if _returns.given_back(lambda: services.ledger.count_return(attempt.job_id)) >= MAX_RETURNS:
            result = _record(Failed(dead_letter(why(error))), attempt, task=task, job=job, services=services)
        else:
            services.ledger.park(
                attempt.job_id, attempt.fence, delay_s=PAUSE_S, code=WORKER_SHORTAGE, message=STARVED, wait="steady"
            )
    except (LeaseLost, redis.RedisError) as lost:
        log.warning("Let go of the job: %s", type(lost).__name__)
    return result


def _release(
    error: Exception, attempt: Attempt, job: Mapping[str, Any], *, trace: str, services: Services, heartbeat: Heartbeat
) -> JobResult:
    """The ledger did not take the verdict: where Redis refuses it for good the job ends, else it is handed back."""
    count("lease_lost", int(isinstance(error, LeaseLost)))
    log.warning(
        "Let go of the job: %s", words_of(error) if isinstance(error, redis.RedisError) else "its lease is lost"
    )
    if isinstance(error, redis.RedisError) and not passes(error):
        with contextlib.suppress(LeaseLost, redis.RedisError):
            return _record(
                _refused_by_redis(error, attempt, services), attempt, task=attempt.task, job=job, services=services
            )
    return _handed_back(attempt, job, trace, heartbeat)


def _handed_back(attempt: Attempt, job: Mapping[str, Any], trace: str, heartbeat: Heartbeat) -> JobResult:
    """Now, or as soon as Redis is there again. Where the ledger has lost its keys, the message is given back, too."""
    try:
        became = _hand_back(attempt, job, trace, returned=True)
    except redis.RedisError:
        heartbeat.owe(lambda: _hand_back(attempt, job, trace, returned=False))
        return Deferred()
    return NotTaken() if became is HandedBack.RESTORED else Deferred()


def _hand_back(attempt: Attempt, job: Mapping[str, Any], trace: str, *, returned: bool) -> HandedBack:
    """This worker lives: an attempt that the ledger knows nothing of is neither an attempt nor a death."""
    checkpoint = attempt.checkpoint if attempt.noted is None else attempt.noted
    became = attempt.ledger.hand_back(
        attempt.job_id,
        attempt.fence,
        task=attempt.task,
        job=job,
        attempt=attempt.number,
        checkpoint=checkpoint,
        trace=trace,
        attachments=attempt.attachments,
        sender=attempt.sender,
        returned=returned,
    )
    if became is HandedBack.RESTORED:
        log.warning("Redis has lost the record of job %s; it is written down again and goes on", attempt.job_id)
    return became


def _ending(result: JobResult) -> tuple[End, str]:
    match result:
        case Done():
            return "done", "done"
        case Failed(error):
            return "refused" if error.is_answer else "dead", str(error.payload["code"])
        case _Defer() | WaitForServer():
            return "parked", result.reason.code
        case _:
            return "lost", ""


def _recorded(taken: TakeResult) -> JobResult:
    if taken.outcome is None:
        return Deferred()
    if "error" in taken.outcome:
        return Failed(from_payload(taken.outcome["error"]), taken.pending)
    return Done(taken.outcome["payload"], taken.pending)


@dataclass(frozen=True)
class _Aside(Deferred):
    """Put aside by this attempt."""

    reason: WaitReason


@dataclass(frozen=True)
class _Defer(_Aside):
    delay_s: float
    wait: Wait = "counts"


@dataclass(frozen=True)
class WaitForServer(_Aside):
    """Until the circuit of a server closes, or a credential that was refused is accepted."""

    breaker: str
    counts: bool
    error: CourierError


def _foreseen(result: _Defer | WaitForServer, attempt: Attempt, heartbeat: Heartbeat) -> _Defer | WaitForServer:
    """Tell watchers why the job is put aside, before it is: after that another attempt may speak for it."""
    if not attempt.shown:
        return result
    if isinstance(result, _Defer):
        growing = result.wait == "growing"
        waiting = attempt.ledger.foresee(
            attempt.job_id, attempt.fence, result.reason, delay_s=result.delay_s, growing=growing
        )
    else:
        waiting = attempt.ledger.foresee(
            attempt.job_id, attempt.fence, result.reason, delay_s=CLOSED_MEANWHILE_S, breaker=result.breaker
        )
    attempt.shown = False  # no beat that is under way shows a stage after this
    heartbeat.show(attempt, {"stage": "waiting", "attempt": attempt.number, **waiting})
    return replace(result, waiting=waiting)


def _attempt(
    work: Work, taken: TakeResult, job: Mapping[str, Any], attempt: Attempt, services: Services, *, task: str
) -> JobResult:
    limits = services.settings.jobs
    try:
        _fit_to_try(taken, job, limits)
        check_knows_servers(task, job, taken.servers, services)
        return Done(work(job, attempt, services))
    except TryAgain as error:
        return _again(error, taken, attempt, services, task=task)
    except CourierError as error:
        breaker = _to_wait_for(error, taken, limits, task)
        return Failed(error) if breaker is None else _wait_for_server(error, breaker)
    except Postpone as wait:
        how: Wait = "steady" if wait.steady else "growing"
        return _Defer(wait.reason, wait.delay_s, how)
    except LeaseLost:
        raise
    except redis.RedisError as error:
        if passes(error):
            raise
        return _refused_by_redis(error, attempt, services)
    except Exception as error:
        if is_shortage(error):
            raise
        log.error("A fault of the worker itself: %s", where_it_broke(error))
        fault = Poisoned(
            f"The worker itself failed on this job ({type(error).__name__}); report it, then replay the job."
        )
        return Failed(fault) if attempt.last else _defer(fault, attempt, limits, services.rng)


def _without_the_server(result: JobResult, view: in_service.ServiceView) -> JobResult:
    """``result``; but a job that would wait for a server whose maintenance has just begun looks how it goes without."""
    if isinstance(result, WaitForServer) and view.is_news(result.error):
        return _Defer(result.reason, WITHOUT_IT_S, "steady")
    return result


def _again(error: TryAgain, taken: TakeResult, attempt: Attempt, services: Services, *, task: str) -> JobResult:
    limits = services.settings.jobs
    if error.is_lasting or is_given_up(error, job_id=attempt.job_id, ledger=services.ledger, last=attempt.last):
        return Failed(error)
    if isinstance(error, PacsUnavailable) and error.slow_down and taken.waited_s < limits.max_wait_s:
        return _slowed(error, taken, limits)
    breaker = _to_wait_for(error, taken, limits, task)
    if breaker is not None:
        return _wait_for_server(error, breaker)
    return Failed(error) if attempt.last else _defer(error, attempt, limits, services.rng)


def _refused_by_redis(error: redis.RedisError, attempt: Attempt, services: Services) -> JobResult:
    """A command of the job was answered with an error that is not of the moment; in the same words again and again, it
    will always be.
    """
    refusals = services.ledger.refused(attempt.job_id, attempt.fence, error)
    log.error("Redis refused a command of the job (%d): %s; %s", refusals, words_of(error), where_it_broke(error))
    fault = Poisoned(
        f"Redis refused a command of this job ({words_of(error)}); report it, then replay the job.",
        details={"refusals": refusals},
    )
    if attempt.last or refusals >= MAX_REFUSALS:
        return Failed(fault)
    return _defer(fault, attempt, services.settings.jobs, services.rng)


def _fit_to_try(taken: TakeResult, job: Mapping[str, Any], limits: JobSettings) -> None:
    if len(json.dumps(job)) > MESSAGE_BYTES - _AROUND_BYTES:  # it may have come in UTF-8, but would be woken in ASCII
        raise InvalidRequest(
            f"The job is too large to be woken by a message, which is {MESSAGE_BYTES} bytes at most and takes six or"
            " more for each character that is not ASCII; send a smaller one."
        )
    if (
        taken.cancelled and taken.checkpoint is None
    ):  # what has begun is cancelled where the work can tell how far it came
        raise Cancelled("The job was cancelled before it began.")
    if taken.crash_count >= limits.max_deaths:
        raise Poisoned(
            f"The worker died {taken.crash_count} times while doing this; it is not tried again until it is replayed.",
            details={"deaths": taken.crash_count},
        )


def _to_wait_for(error: CourierError, taken: TakeResult, limits: JobSettings, task: str) -> str | None:
    """The circuit breaker that the job sits out, if it may still wait. What an operator has ordered every job does."""
    if is_suspension(error.open_circuit):
        return error.open_circuit
    if not waits_for_server(error) or task in SOMEBODY_WAITS or taken.waited_s >= limits.max_wait_s:
        return None
    return None if _is_attempt(error) and taken.attempt >= limits.max_attempts else error.open_circuit


def _is_attempt(error: CourierError) -> bool:
    """Whether the job has used up one of its attempts: not where it was not the job's turn, nor the job's fault."""
    return not isinstance(error, Unauthorized) and (not isinstance(error, PacsUnavailable) or error.is_attempt)


def _name_source(error: CourierError, task: str, job: Mapping[str, Any]) -> None:
    """The URL of a failed upload, as the result of one that is done has it: the record of the job loses it now."""
    url = job.get("image_url")
    if task == "pacs.upload" and isinstance(url, str):
        error.payload["details"] = {"source": redact_url(url), **error.details}


def _defer(error: CourierError, attempt: Attempt, limits: JobSettings, rng: random.Random) -> _Defer:
    """Back off; what the other side asked for comes first, so that not everybody is back at the same moment."""
    asked_s = (error.retry_after_s or 0) if isinstance(error, TryAgain) else 0
    if is_deleting(error) and attempt.number > SOON_AGAIN:
        asked_s = ASK_AGAIN_S
    delay_s = min(asked_s, limits.retry_after_cap_s) + backoff_s(attempt.number, limits, rng)
    return _Defer(_reason(error), delay_s)


def _slowed(error: PacsUnavailable, taken: TakeResult, limits: JobSettings) -> _Defer:
    """The server asked for fewer requests: how long the job waits is decided in ``worker/pacs/server_rates.py``."""
    asked_s = SLOWED_S if error.retry_after_s is None else error.retry_after_s
    delay_s = min(asked_s, limits.retry_after_cap_s + SPREAD_S, limits.max_wait_s - taken.waited_s)
    return _Defer(_reason(error), delay_s, "server")


def _wait_for_server(error: CourierError, breaker: str) -> WaitForServer:
    asked = _is_attempt(error)
    reason = _reason(error, breaker)
    if asked:
        reason = replace(reason, message=f"{error.message.rstrip('.')}; {circuit_open(breaker)}")
    return WaitForServer(reason, breaker, counts=asked, error=error)


def _reason(error: CourierError, subject: str = "") -> WaitReason:
    code = error.payload["code"]
    if is_suspension(error.open_circuit):
        code = SERVER_PAUSED if error.details.get(in_service.STATE) == "paused" else SERVER_MAINTENANCE
    return WaitReason(code, error.message, error.server_name or "", subject)


def backoff_s(attempt: int, limits: JobSettings, rng: random.Random) -> float:
    """Exponential with full jitter: anything up to base × 2^(attempt - 1), capped."""
    return rng.uniform(0, min(limits.backoff_cap_s, limits.backoff_base_s * 2.0 ** (attempt - 1)))


def _record(result: JobResult, attempt: Attempt, *, task: str, job: Mapping[str, Any], services: Services) -> JobResult:
    """Write the verdict into the ledger, which refuses it if another attempt has taken over."""
    ledger = services.ledger
    match result:
        case Done(payload):
            encoded = EncodedResult.of(payload)
            pending = ledger.finish(
                attempt.job_id,
                attempt.fence,
                outcome={"payload": encoded},
                text=f'{{"payload":{encoded.text}}}',
                code="done",
                task=task,
                job=job,
            )
            log.info("Done after %s attempt(s)", attempt.number)
            return Done(encoded, pending)
        case Failed(error):
            _name_source(error, task, job)
            end = ledger.finish if error.is_answer else ledger.end_as_dead_letter
            ended, code = {"error": error.payload}, error.payload["code"]
            pending = end(attempt.job_id, attempt.fence, outcome=ended, code=code, task=task, job=job)
            log.info("%s: %s", "Refused" if error.is_answer else "Dead letter", error)
            return Failed(error, pending)
        case _Defer(reason):
            ledger.park(
                attempt.job_id,
                attempt.fence,
                delay_s=result.delay_s,
                code=reason.code,
                message=reason.message,
                wait=result.wait,
                server_name=reason.server_name,
                subject=reason.subject,
            )
            log.info("Parked for at least %.1f s: %s", result.delay_s, reason.message)
        case WaitForServer(reason):
            ledger.park_for(
                result.breaker,
                attempt.job_id,
                attempt.fence,
                max_wait_s=services.settings.jobs.max_wait_s,
                code=reason.code,
                message=reason.message,
                counts=result.counts,
                server_name=reason.server_name,
            )
            until = (
                "the server is in service" if is_suspension(result.breaker) else f"the circuit {result.breaker} closes"
            )
            log.info("Parked until %s: %s", until, reason.message)
    return result
