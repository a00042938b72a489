"""What Celery sends, or counts, when a job has ended: ``link``, ``link_error``, ``chain`` and ``chord``.

Celery takes them from the message that ends the job. Here a job may be ended by another message than its first one, or
by two; so the ledger keeps its follow-ups, and the worker that ends the job sends them from there, each one noted. They
are sent as Celery sends them: ``celery/app/trace.py`` and ``celery/backends/base.py``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from celery import Celery, states
from celery.app.task import Context
from celery.canvas import signature
from celery.exceptions import CeleryError
from celery.result import denied_join_result
from kombu.exceptions import EncodeError

from courier.errors import CourierError, InvalidRequest
from courier.ledger.jobs import Attachment, PendingFollowUps
from courier.redaction import redact_job
from worker.runtime.celery_internals import fail_chain, is_chord_in_doubt
from worker.runtime.shortage import is_shortage

log = logging.getLogger(__name__)

#: What a message bears of them in its body, and how its headers say where its job stands in a canvas.
EMBEDDED: Final = ("callbacks", "errbacks", "chain", "chord")
PLACE: Final = ("group", "group_index", "root_id", "parent_id", "ignore_result")
#: What Celery raises of a signature that cannot be sent, by anybody and at any time.
UNSENDABLE: Final = (
    *(TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError),
    *(EncodeError, CeleryError),
)
#: Where signatures stand in another one.
_LINKED: Final = ("link", "link_error", "chain", "chord")
_MEMBERS: Final = ("tasks", "header", "body")

Note = Callable[[int], None]


def detach(request: Context) -> Attachment:
    """What the message of ``request`` bears for the ledger to keep. Celery finds none of the follow-ups any more, and
    sends none by itself.
    """
    embedded = {name: getattr(request, name, None) for name in EMBEDDED}
    place = {name: getattr(request, name, None) for name in (*PLACE, "stamped_headers", "stamps")}
    if place["root_id"] == request.id:
        del place["root_id"]
    request.update(dict.fromkeys(EMBEDDED))
    return attachment(embedded, place)


def attachment(embedded: Mapping[str, Any], place: Mapping[str, Any]) -> Attachment:
    """The same of a message that has come to no request."""
    follow_ups = {name: value for name, value in embedded.items() if value}
    headers = {name: value for name, value in place.items() if value or (value == 0 and value is not False)}
    text = json.dumps(headers) if headers else ""
    if not follow_ups:
        return Attachment(headers=text)
    digest = hashlib.sha256(json.dumps(follow_ups, sort_keys=True).encode()).hexdigest()[:16]
    named = {name: _named(value) for name, value in follow_ups.items()}
    return Attachment(json.dumps({**{name: headers[name] for name in PLACE if name in headers}, **named}), digest, text)


def _named(value: Any) -> Any:
    """``value``, one signature or a list, with an id for each task in it, so that it is the same task if it is sent
    twice; and with a repr for logs and events that shows none of its arguments.
    """
    if isinstance(value, list):
        return [_named(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    kind, options, kwargs = value.get("subtask_type"), dict(value.get("options") or {}), dict(value.get("kwargs") or {})
    options |= {name: _named(options[name]) for name in _LINKED if options.get(name)}
    if kind is None:
        options.setdefault("argsrepr", "(...)")
        options.setdefault(
            "kwargsrepr", redact_job(kwargs.get("job")) if str(value["task"]).startswith("pacs.") else "{...}"
        )
    else:
        kwargs |= {name: _named(kwargs[name]) for name in _MEMBERS if name in kwargs}
    if kind not in ("chain", "chunks"):  # these have the id of one of their members, or none
        options["task_id"] = options.get("task_id") or str(uuid.uuid4())
    return {**value, "options": options, "kwargs": kwargs}


@dataclass(frozen=True)
class End:
    """How a job ended. ``request`` is the one that Celery stores its result with."""

    job_id: str
    task: str
    outcome: dict[str, Any] | CourierError
    request: Context | None = None

    @property
    def state(self) -> str:
        return str(states.FAILURE if isinstance(self.outcome, CourierError) else states.SUCCESS)


def send(app: Celery, end: End, pending: PendingFollowUps, note: Note) -> int | None:
    """Send what is left of the ``pending`` follow-ups, store the result and count the job in its chord; how many have
    been sent by now. None: a worker may have died of sending a chord's body, so that this has to be done again later.

    ``note`` is told after each one. Raises what kombu and the result back-end do when they cannot be reached.
    """
    canvases = [json.loads(line) for line in pending.follow_ups.splitlines()]
    failed = isinstance(end.outcome, CourierError)
    with denied_join_result():  # else it would subscribe to the results, and hang while those are out of reach
        if failed:
            settled = _count(app, end, canvases)
        sent = 0
        for follow_up, options in _follow_ups(end, canvases):
            sent += 1
            if sent > pending.sent:
                _send(app, follow_up, end, options)
                note(sent)
        if not failed:
            settled = _count(app, end, canvases)
    return sent if settled else None


def _follow_ups(end: End, canvases: Iterable[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each with the options that it is sent with, always in the same order."""
    for canvas in canvases:
        above = {"parent_id": end.job_id, "root_id": canvas.get("root_id") or end.job_id}
        if isinstance(end.outcome, CourierError):
            for errback in canvas.get("errbacks", ()):
                yield errback, above
            continue
        for callback in canvas.get("callbacks", ()):
            yield callback, above
        if canvas.get("chain"):
            *rest, following = canvas["chain"]
            yield following, {**above, "chain": rest}


def _send(app: Celery, follow_up: dict[str, Any], end: End, options: Mapping[str, Any]) -> None:
    argument = end.job_id if isinstance(end.outcome, CourierError) else end.outcome
    try:
        signature(follow_up, app=app).apply_async((argument,), **options)
    except UNSENDABLE as error:
        if is_shortage(error):
            raise
        log.error("A follow-up of job %s cannot be sent, by any worker (%s)", end.job_id, type(error).__name__)
        refusal = InvalidRequest(f"This follow-up of job {end.job_id} cannot be sent ({type(error).__name__}).")
        if follow_up["options"].get("task_id"):
            app.backend.store_result(follow_up["options"]["task_id"], refusal, states.FAILURE)


def _count(app: Celery, end: End, canvases: Iterable[Mapping[str, Any]]) -> bool:
    """Store the result, and count it in the chords that wait for it, or for what would have followed.

    False if the body of a chord may not have been sent.
    """
    backend, groups = app.backend, []
    for canvas in canvases:
        place = Context({"id": end.job_id, "task": end.task, "delivery_info": {}, "args": (), "kwargs": {}, **canvas})
        if not place.ignore_result:
            backend.store_result(end.job_id, end.outcome, end.state, request=end.request or place)
        parts = [place] if place.chord else []
        if isinstance(end.outcome, CourierError) and place.chain:
            fail_chain(backend, place.chain, end.outcome, store_result=not place.ignore_result)
            parts += [_member(one) for one in place.chain if one["options"].get("chord")]
        for part in parts:  # one that Celery has counted already counts no more
            backend.on_chord_part_return(part, end.state, end.outcome)
            groups.append(part.group)
    return not any(is_chord_in_doubt(backend, group) for group in groups if group)


def _member(one: Mapping[str, Any]) -> Context:
    """A chained task as the member of a chord."""
    options = one["options"]
    return Context({**one, **options, "id": options.get("task_id"), "group": options.get("group_id")})
