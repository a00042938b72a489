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
    Refused,
    TryAgain,
    Unauthorized,
    from_payload,
    is_resting,
)
from courier.ledger.breakers import circuit_open
from courier.ledger.jobs import (
    CLOSED_MEANWHILE_S,
    NOTHING_ATTACHED,
    Attachment,
    Claim,
    ClaimState,
    HandedBack,
    LeaseLost,
    PendingFollowUps,
    Wait,
    passes,
    words_of,
)
from courier.messages import MESSAGE_BYTES
from courier.redaction import about, about_study, shown_url, where_it_broke
from courier.settings import JobSettings
from courier.telemetry import End, JobSeen, count, watching
from courier.waits import WORKER_SHORTAGE, WaitReason, noted_in, sentence
from worker.jobs.attempt import NotYet, Pulse, Run
from worker.jobs.delete_lock import ASK_AGAIN_S, SOON_AGAIN, is_deleting, is_given_up
from worker.jobs.knowledge import check_knows_servers
from worker.jobs.services import Tools
from worker.pacs.server_rates import SPREAD_S
from worker.runtime.shortage import MAX_RETURNS, PAUSE_S, STARVED, Returns, dead_letter, is_shortage, why

log = logging.getLogger(__name__)

#: Somebody waits for the answer to these: they do not sit out a server's illness, but end after their attempts.
SOMEBODY_WAITS: Final = frozenset({"pacs.exists", "pacs.metadata", "pacs.list_studies"})

#: How long a job waits whose server asked for fewer requests, where the rate could not be lowered (Redis was away).
SLOWED_S: Final = 1.0

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
class Parked:
    """Not over: a worker will be woken for it, or is at it already. ``waits`` says why this attempt put it aside."""

    @property
    def waits(self) -> str:
        return ""


@dataclass(frozen=True)
class Starved(Parked):
    """Put aside, because this worker gets no thread, memory or file. It takes none of the job's attempts."""


@dataclass(frozen=True)
class NotTaken:
    """The ledger did not say whose job it is, or has lost it. The message may be all there is: it has to come again."""


Verdict = Done | Failed | Parked | NotTaken
Work = Callable[[Mapping[str, Any], Run, Tools], dict[str, Any]]


def carry(  # noqa: PLR0913 - what a message is, and what there is to work with
    work: Work,
    *,
    task: str,
    job_id: str,
    message: object,
    tools: Tools,
    pulse: Pulse,
    trace: str = "",
    queue: str = "",
    attached: Attachment = NOTHING_ATTACHED,
) -> Verdict:
    """Do what is left to do of one delivered message, however often it is delivered.

    ``trace`` is the W3C ``traceparent`` it came with, kept for whoever has to wake the job, ``queue`` what it was
    taken from, ``attached`` what it bears besides.

    The verdict of a job that is over is the recorded one, whoever did it.
    """
    job: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    limits = tools.settings.jobs
    try:
        claim = tools.ledger.claim(
            job_id, task=task, job=job, max_deaths=limits.max_deaths, trace=trace, queue=queue, attached=attached
        )
    except redis.RedisError as error:
        log.warning("The ledger did not take the claim (%s); the message is given back", type(error).__name__)
        return NotTaken()
    if claim.state in _TAKEN:
        return _refused(job_id, claim, attached)
    if claim.state is not ClaimState.YOURS:
        return _recorded(claim)
    about(stage="claimed", attempt=claim.attempt)
    about_study(job)
    run = Run(
        job_id=job_id,
        task=task,
        fence=claim.fence,
        attempt=claim.attempt,
        last=claim.attempt >= limits.max_attempts or claim.waited_s >= limits.max_wait_s,
        ledger=tools.ledger,
        cancelled=claim.cancelled,
        memo=claim.memo,
        wants=claim.wants,
        attachments=claim.attachments,
        clock=tools.clock,
    )
    seen = JobSeen(task, job_id, claim.attempt)
    try:
        with watching(seen), noted_in(run.meanwhile), pulse.beating(run):
            verdict = _attempt(work, claim, job, run, tools, task=task)
            if isinstance(verdict, _Park | _Rest):
                verdict = _foreseen(verdict, run, pulse)
            verdict = _record(verdict, run, task=task, job=job, tools=tools)
            seen.end, seen.code = _ending(verdict)
    except (LeaseLost, redis.RedisError) as error:
        return _let_go(error, run, job, trace=trace, tools=tools, pulse=pulse)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        return _starved(error, run, task=task, job=job, tools=tools)
    _returns.succeeded()
    return verdict


_returns = Returns()

#: Why a message is refused whose id the ledger knows.
_TAKEN: Final = {
    ClaimState.OTHER: "The id {} belongs to another job; send this one under its own id.",
    ClaimState.FULL: "The id {} has too many follow-ups already; send this job, with its own, under its own id.",
}


def _refused(job_id: str, claim: Claim, attached: Attachment) -> Failed:
    """What a refused message bears hears of the refusal; but a chord that waits for the job of this id goes on."""
    refusal = InvalidRequest(_TAKEN[claim.state].format(job_id), details={"taken": True})
    log.warning("Refused: %s", refusal)
    if not attached.follow_ups:
        return Failed(refusal)
    follow_ups = json.loads(attached.follow_ups)
    if follow_ups.get("group") == json.loads(claim.attachments.headers or "{}").get("group"):
        follow_ups.pop("chord", None)
    return Failed(refusal, PendingFollowUps(json.dumps(follow_ups)))


def _starved(error: Exception, run: Run, *, task: str, job: Mapping[str, Any], tools: Tools) -> Verdict:
    """Another worker may have what this one lacks; a job that starves while others are done has to be looked at."""
    log.error("Put the job aside, because %s", why(error))
    try:
        verdict: Verdict = Starved()
        if _returns.given_back(lambda: tools.ledger.count_return(run.job_id)) >= MAX_RETURNS:
            verdict = _record(Failed(dead_letter(why(error))), run, task=task, job=job, tools=tools)
        else:
            tools.ledger.park(
                run.job_id, run.fence, delay_s=PAUSE_S, code=WORKER_SHORTAGE, message=STARVED, wait="steady"
            )
    except (LeaseLost, redis.RedisError) as lost:
        log.warning("Let go of the job: %s", type(lost).__name__)
    return verdict


def _let_go(error: Exception, run: Run, job: Mapping[str, Any], *, trace: str, tools: Tools, pulse: Pulse) -> Verdict:
    """The ledger did not take the verdict: where Redis refuses it for good the job ends, else it is handed back."""
    count("lease_lost", int(isinstance(error, LeaseLost)))
    log.warning(
        "Let go of the job: %s", words_of(error) if isinstance(error, redis.RedisError) else "its lease is lost"
    )
    if isinstance(error, redis.RedisError) and not passes(error):
        with contextlib.suppress(LeaseLost, redis.RedisError):
            return _record(_refused_by_redis(error, run, tools), run, task=run.task, job=job, tools=tools)
    return _handed_back(run, job, trace, pulse)


def _handed_back(run: Run, job: Mapping[str, Any], trace: str, pulse: Pulse) -> Verdict:
    """Now, or as soon as Redis is there again. Where the ledger has lost its keys, the message is given back, too."""
    try:
        became = _hand_back(run, job, trace, returned=True)
    except redis.RedisError:
        pulse.owe(lambda: _hand_back(run, job, trace, returned=False))
        return Parked()
    return NotTaken() if became is HandedBack.RESTORED else Parked()


def _hand_back(run: Run, job: Mapping[str, Any], trace: str, *, returned: bool) -> HandedBack:
    """This worker lives: an attempt that the ledger knows nothing of is neither an attempt nor a death."""
    memo = run.memo if run.noted is None else run.noted
    became = run.ledger.hand_back(
        run.job_id,
        run.fence,
        task=run.task,
        job=job,
        attempt=run.attempt,
        memo=memo,
        trace=trace,
        attachments=run.attachments,
        returned=returned,
    )
    if became is HandedBack.RESTORED:
        log.warning("Redis has lost the record of job %s; it is written down again and goes on", run.job_id)
    return became


def _ending(verdict: Verdict) -> tuple[End, str]:
    match verdict:
        case Done():
            return "done", "done"
        case Failed(error):
            return "refused" if isinstance(error, Refused) else "dead", str(error.payload["code"])
        case _Park() | _Rest():
            return "parked", verdict.reason.code
        case _:
            return "lost", ""


def _recorded(claim: Claim) -> Verdict:
    if claim.outcome is None:
        return Parked()
    if "error" in claim.outcome:
        return Failed(from_payload(claim.outcome["error"]), claim.pending)
    return Done(claim.outcome["payload"], claim.pending)


@dataclass(frozen=True)
class _Aside(Parked):
    """Put aside by this attempt. ``waiting`` is what watchers of the job are told meanwhile (`Waiting`)."""

    reason: WaitReason
    waiting: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def waits(self) -> str:
        return sentence(self.waiting) if self.waiting else ""


@dataclass(frozen=True)
class _Park(_Aside):
    delay_s: float
    wait: Wait = "counts"


@dataclass(frozen=True)
class _Rest(_Aside):
    """Until a server that is left alone is well again, or a credential that was refused is accepted."""

    breaker: str
    counts: bool


def _foreseen(verdict: _Park | _Rest, run: Run, pulse: Pulse) -> _Park | _Rest:
    """Tell watchers why the job is put aside, before it is: after that another attempt may speak for it."""
    if not run.shown:
        return verdict
    if isinstance(verdict, _Park):
        growing = verdict.wait == "growing"
        waiting = run.ledger.foresee(run.job_id, run.fence, verdict.reason, delay_s=verdict.delay_s, growing=growing)
    else:
        waiting = run.ledger.foresee(
            run.job_id, run.fence, verdict.reason, delay_s=CLOSED_MEANWHILE_S, breaker=verdict.breaker
        )
    pulse.show(run, {"stage": "waiting", "attempt": run.attempt, **waiting})
    return replace(verdict, waiting=waiting)


def _attempt(work: Work, claim: Claim, job: Mapping[str, Any], run: Run, tools: Tools, *, task: str) -> Verdict:
    limits = tools.settings.jobs
    try:
        _fit_to_try(claim, job, limits)
        check_knows_servers(task, job, claim.servers, tools)
        return Done(work(job, run, tools))
    except TryAgain as error:
        return _again(error, claim, run, tools, task=task)
    except CourierError as error:
        breaker = _to_wait_for(error, claim, limits, task)
        return Failed(error) if breaker is None else _rest(error, breaker)
    except NotYet as wait:
        how: Wait = "steady" if wait.steady else "growing"
        return _Park(wait.reason, wait.delay_s, how)
    except LeaseLost:
        raise
    except redis.RedisError as error:
        if passes(error):
            raise
        return _refused_by_redis(error, run, tools)
    except Exception as error:
        if is_shortage(error):
            raise
        log.error("A fault of the worker itself: %s", where_it_broke(error))
        fault = Poisoned(
            f"The worker itself failed on this job ({type(error).__name__}); report it, then replay the job."
        )
        return Failed(fault) if run.last else _park(fault, run, limits, tools.rng)


def _again(error: TryAgain, claim: Claim, run: Run, tools: Tools, *, task: str) -> Verdict:
    limits = tools.settings.jobs
    if error.is_lasting or is_given_up(error, job_id=run.job_id, ledger=tools.ledger, last=run.last):
        return Failed(error)
    if isinstance(error, PacsUnavailable) and error.slow_down and claim.waited_s < limits.max_wait_s:
        return _slowed(error, claim, limits)
    breaker = _to_wait_for(error, claim, limits, task)
    if breaker is not None:
        return _rest(error, breaker)
    return Failed(error) if run.last else _park(error, run, limits, tools.rng)


def _refused_by_redis(error: redis.RedisError, run: Run, tools: Tools) -> Verdict:
    """A command of the job was answered with an error that is not of the moment; in the same words again and again, it
    will always be.
    """
    refusals = tools.ledger.refused(run.job_id, run.fence, error)
    log.error("Redis refused a command of the job (%d): %s; %s", refusals, words_of(error), where_it_broke(error))
    fault = Poisoned(
        f"Redis refused a command of this job ({words_of(error)}); report it, then replay the job.",
        details={"refusals": refusals},
    )
    if run.last or refusals >= MAX_REFUSALS:
        return Failed(fault)
    return _park(fault, run, tools.settings.jobs, tools.rng)


def _fit_to_try(claim: Claim, job: Mapping[str, Any], limits: JobSettings) -> None:
    if len(json.dumps(job)) > MESSAGE_BYTES - _AROUND_BYTES:  # it may have come in UTF-8, but would be woken in ASCII
        raise InvalidRequest(
            f"The job is too large to be woken by a message, which is {MESSAGE_BYTES} bytes at most and takes six or"
            " more for each character that is not ASCII; send a smaller one."
        )
    if claim.cancelled and claim.memo is None:  # what has begun is cancelled where the work can tell how far it came
        raise Cancelled("The job was cancelled before it began.")
    if claim.deaths >= limits.max_deaths:
        raise Poisoned(
            f"The worker died {claim.deaths} times while doing this; it is not tried again until it is replayed.",
            details={"deaths": claim.deaths},
        )


def _to_wait_for(error: CourierError, claim: Claim, limits: JobSettings, task: str) -> str | None:
    """The circuit breaker that the job sits out, if it may still wait."""
    if not is_resting(error) or task in SOMEBODY_WAITS or claim.waited_s >= limits.max_wait_s:
        return None
    return None if _is_attempt(error) and claim.attempt >= limits.max_attempts else error.resting


def _is_attempt(error: CourierError) -> bool:
    """Whether the job has used up one of its attempts: not where it was not the job's turn, nor the job's fault."""
    return not isinstance(error, Unauthorized) and (not isinstance(error, PacsUnavailable) or error.is_attempt)


def _name_source(error: CourierError, task: str, job: Mapping[str, Any]) -> None:
    """The URL of a failed upload, as the result of one that is done has it: the record of the job loses it now."""
    url = job.get("image_url")
    if task == "pacs.upload" and isinstance(url, str):
        error.payload["details"] = {"source": shown_url(url), **error.details}


def _park(error: CourierError, run: Run, limits: JobSettings, rng: random.Random) -> _Park:
    """Back off; what the other side asked for comes first, so that not everybody is back at the same moment."""
    asked_s = (error.retry_after_s or 0) if isinstance(error, TryAgain) else 0
    if is_deleting(error) and run.attempt > SOON_AGAIN:
        asked_s = ASK_AGAIN_S
    delay_s = min(asked_s, limits.retry_after_cap_s) + backoff_s(run.attempt, limits, rng)
    return _Park(_reason(error), delay_s)


def _slowed(error: PacsUnavailable, claim: Claim, limits: JobSettings) -> _Park:
    """The server asked for fewer requests: how long the job waits is decided in ``worker/pacs/server_rates.py``."""
    asked_s = SLOWED_S if error.retry_after_s is None else error.retry_after_s
    delay_s = min(asked_s, limits.retry_after_cap_s + SPREAD_S, limits.max_wait_s - claim.waited_s)
    return _Park(_reason(error), delay_s, "server")


def _rest(error: CourierError, breaker: str) -> _Rest:
    asked = _is_attempt(error)
    reason = _reason(error, breaker)
    if asked:
        reason = replace(reason, message=f"{error.message.rstrip('.')}; {circuit_open(breaker)}")
    return _Rest(reason, breaker, counts=asked)


def _reason(error: CourierError, subject: str = "") -> WaitReason:
    return WaitReason(error.payload["code"], error.message, error.server_name or "", subject)


def backoff_s(attempt: int, limits: JobSettings, rng: random.Random) -> float:
    """Exponential with full jitter: anything up to base × 2^(attempt - 1), capped."""
    return rng.uniform(0, min(limits.backoff_cap_s, limits.backoff_base_s * 2.0 ** (attempt - 1)))


def _record(verdict: Verdict, run: Run, *, task: str, job: Mapping[str, Any], tools: Tools) -> Verdict:
    """Write the verdict into the ledger, which refuses it if another attempt has taken over."""
    ledger = tools.ledger
    match verdict:
        case Done(payload):
            ended = {"payload": payload}
            pending = ledger.finish(run.job_id, run.fence, outcome=ended, code="done", task=task, job=job)
            log.info("Done after %s attempt(s)", run.attempt)
            return Done(payload, pending)
        case Failed(error):
            _name_source(error, task, job)
            end = ledger.finish if isinstance(error, Refused) else ledger.bury
            ended, code = {"error": error.payload}, error.payload["code"]
            pending = end(run.job_id, run.fence, outcome=ended, code=code, task=task, job=job)
            log.info("%s: %s", "Refused" if isinstance(error, Refused) else "Dead letter", error)
            return Failed(error, pending)
        case _Park(reason):
            ledger.park(
                run.job_id,
                run.fence,
                delay_s=verdict.delay_s,
                code=reason.code,
                message=reason.message,
                wait=verdict.wait,
                server_name=reason.server_name,
                subject=reason.subject,
            )
            log.info("Parked for at least %.1f s: %s", verdict.delay_s, reason.message)
        case _Rest(reason):
            ledger.park_for(
                verdict.breaker,
                run.job_id,
                run.fence,
                max_wait_s=tools.settings.jobs.max_wait_s,
                code=reason.code,
                message=reason.message,
                counts=verdict.counts,
                server_name=reason.server_name,
            )
            log.info("Parked until %s is well again: %s", verdict.breaker, reason.message)
    return verdict
