"""Is every header and embed field of a message of the kind that Celery takes it for?

Celery reads them unchecked: one of the wrong kind breaks a worker's slot, its event loop or a process of its pool, in
the middle of a job. So a message is looked at as a whole before any of it is used. What stands in ``kwargs`` is checked
by the job itself (``courier/messages.py``). A test compares the names here with those that Celery reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from celery.app.task import Context
from celery.utils.time import maybe_iso8601
from kombu.compression import get_encoder
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from worker.runtime.kombu_internals import knows_serializer

#: The longest id that every broker and result back-end takes.
ID_LENGTH: Final = 255
#: How deep a message may be nested, in levels of JSON; Celery copies follow-ups by recursion, and a pool of processes
#: pickles all of it.
DEPTH: Final = 100
#: Follow-ups of one message take no more than this together, as JSON in ASCII, and its stamps no more than that: the
#: ledger keeps both with the job.
FOLLOW_UP_BYTES: Final = 128 * 1024
STAMP_BYTES: Final = 16 * 1024
#: Some limit has to be: numbers become times and scores in Redis.
_MOST: Final = 2**53


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds a control character")
    return text


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("it is no number of seconds")
    return number


def _moment(text: str) -> str:
    """A time as Celery reads it, and so far from the calendar's ends that no time zone leads over them."""
    read = maybe_iso8601(text)
    if read is None or not 1970 < read.year < 9999:
        raise ValueError("it is no time")
    return text


def _known_serializer(name: str) -> str:
    if not knows_serializer(name):
        raise ValueError("no serializer is called so")
    return name


def _known_compression(name: str) -> str:
    try:
        get_encoder(name)  # type: ignore[no-untyped-call]  # kombu is untyped
    except KeyError:
        raise ValueError("no compression is called so") from None
    return name


Text = Annotated[str, AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Seconds = Annotated[float, Field(ge=0, le=_MOST), AfterValidator(_finite)]
#: Seconds from now, perhaps past ones; Celery reckons a date of the calendar from them, whose last year is 9999.
Delay = Annotated[float, Field(ge=-(2**31), le=10**11), AfterValidator(_finite)]
Moment = Annotated[str, AfterValidator(_moment)]
JobId = Annotated[str, Field(min_length=1, max_length=ID_LENGTH), AfterValidator(_printable)]


class _Strict(BaseModel):
    """JSON's own kinds and no others: no number for a text, no truth for a number."""

    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


class CanvasPlace(_Strict):
    """Where a job stands in a canvas."""

    root_id: Text | None = None
    parent_id: Text | None = None
    group: Text | None = None
    group_index: Count | None = None
    ignore_result: bool | None = None


class Headers(CanvasPlace):  # type: ignore[no-redef]  # pydantic's plugin has a parameter `kwargs` of its own
    """What Celery reads of a message's headers; in its first protocol, of the body. Others may stand beside these."""

    task: Annotated[Text, Field(min_length=1)]
    id: JobId
    lang: Text | None = None
    meth: Text | None = None
    shadow: Text | None = None
    eta: Moment | None = None
    expires: Moment | None = None
    retries: Count | None = None
    timelimit: Annotated[list[Seconds | None], Field(min_length=2, max_length=2)] | None = None
    time_limit: Seconds | None = None
    soft_time_limit: Seconds | None = None
    taskset: Text | None = None
    groups: list[Text] | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    origin: Text | None = None
    replaced_task_nesting: Count | None = None
    stamped_headers: list[Text] | None = None
    stamps: dict[Text, Any] | None = None
    redelivered: bool | None = None
    utc: bool | None = None
    headers: dict[Text, Any] | None = None
    hostname: Text | None = None
    reply_to: Text | None = None
    correlation_id: Text | None = None
    properties: dict[Text, Any] | None = None
    delivery_info: dict[Text, Any] | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    is_eager: bool | None = None
    called_directly: bool | None = None
    logfile: Text | None = None
    loglevel: Text | Count | None = None
    # Follow-ups stand in the body, which may be signed.
    callbacks: None = None
    errbacks: None = None
    chain: None = None
    chord: None = None


class Options(_Strict):
    """What a follow-up is sent with."""

    task_id: JobId | None = None
    queue: Text | None = None
    exchange: Text | None = None
    exchange_type: Literal["direct", "topic", "fanout", "headers"] | None = None
    routing_key: Text | None = None
    route_name: Text | None = None
    priority: Annotated[int, Field(ge=-_MOST, le=_MOST)] | None = None
    delivery_mode: Literal[1, 2, "transient", "persistent"] | None = None
    serializer: Annotated[str, AfterValidator(_known_serializer)] | None = None
    compression: Annotated[str, AfterValidator(_known_compression)] | None = None
    content_type: Text | None = None
    content_encoding: Text | None = None
    countdown: Delay | None = None
    eta: Moment | None = None
    expires: Moment | Delay | None = None
    expiration: Seconds | None = None
    time_limit: Seconds | None = None
    soft_time_limit: Seconds | None = None
    timeout: Seconds | None = None
    confirm_timeout: Seconds | None = None
    retries: Count | None = None
    retry: bool | None = None
    retry_policy: dict[Text, Seconds | None] | None = None
    shadow: Text | None = None
    root_id: Text | None = None
    parent_id: Text | None = None
    group_id: Text | None = None
    group_index: Count | None = None
    reply_to: Text | None = None
    origin: Text | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    ignore_result: bool | None = None
    add_to_parent: bool | None = None
    replaced_task_nesting: Count | None = None
    mandatory: bool | None = None
    immediate: bool | None = None
    headers: dict[Text, Any] | None = None
    stamped_headers: list[Text] | None = None
    link: Signature | list[Signature] | None = None
    link_error: Signature | list[Signature] | None = None
    chain: list[Signature] | None = None
    chord: Signature | None = None

    @model_validator(mode="after")
    def _can_be_sent(self) -> Options:
        others = self.model_extra or {}
        if not all(name.isprintable() for name in others) or not OBJECTS.isdisjoint(others):
            raise ValueError("it names an option that no message can bear")
        if not set(self.stamped_headers or ()) <= set(others):
            raise ValueError("a stamp is missing")
        return self


#: Parameters of Celery's and kombu's functions that no JSON can stand for, or that they bring themselves.
OBJECTS: Final = frozenset(
    (
        *("app", "args", "body", "callbacks", "cls", "connection", "create_sent_event", "declare", "errback"),
        *("errbacks", "event_dispatcher", "immutable", "kwargs", "message", "name", "now", "on_return", "options"),
        *("partial_args", "producer", "properties", "publisher", "result_cls", "router", "self", "subtask_type"),
        *("task", "task_type", "tasks", "timezone", "type", "use_link"),
        *("body_result", "eager", "header", "header_delay", "interval", "max_retries", "trace"),
    )
)


class Signature(_Strict):  # type: ignore[no-redef]  # pydantic's plugin has a parameter `kwargs` of its own
    """A task to be sent: a follow-up, a member of one, or the body of a chord."""

    task: Annotated[Text, Field(min_length=1)]
    args: list[Any]
    kwargs: dict[str, Any]
    options: Options
    subtask_type: Literal["group", "chain", "chord", "chunks", "xmap", "xstarmap"] | None = None
    immutable: bool = False
    chord_size: Count | None = None

    @model_validator(mode="after")
    def _members(self) -> Signature:
        if self.subtask_type is not None:
            _MEMBERS[self.subtask_type].model_validate(self.kwargs)
        return self


class _Tasks(_Strict):
    tasks: Annotated[list[Signature], Field(min_length=1)]


class _Chord(_Strict):  # type: ignore[no-redef]  # pydantic's plugin has a parameter `kwargs` of its own
    header: Signature | Annotated[list[Signature], Field(min_length=1)]
    body: Signature
    kwargs: dict[str, Any] = {}
    partial_args: list[Any] = []


class _Map(_Strict):
    task: Signature | Text
    it: list[Any]


class _Chunks(_Map):
    n: Annotated[int, Field(ge=1, le=_MOST)]


_MEMBERS: Final[dict[str, type[_Strict]]] = {
    "group": _Tasks,
    "chain": _Tasks,
    "chord": _Chord,
    "chunks": _Chunks,
    "xmap": _Map,
    "xstarmap": _Map,
}


class Embed(_Strict):
    """What Celery reads of the third part of a body."""

    callbacks: list[Signature] | None = None
    errbacks: list[Signature] | None = None
    chain: list[Signature] | None = None
    chord: Signature | None = None


class Properties(_Strict):
    """What the broker says of a message, or its sender in the broker's place."""

    correlation_id: Text | None = None
    reply_to: Text | None = None
    priority: Annotated[int, Field(ge=-_MOST, le=_MOST)] | None = None


class DeliveryInfo(_Strict):
    exchange: Text | None = None
    routing_key: Text | None = None
    redelivered: bool | None = None


_HEADERS: Final = frozenset(Headers.model_fields)
_EMBED: Final = frozenset(Embed.model_fields)
#: Names by which Celery keeps the headers and embed fields of one request, in one namespace with its methods.
_OF_THE_REQUEST: Final = frozenset(dir(Context))

_Kind = TypeVar("_Kind", bound=_Strict)


def wrong_id(job_id: object) -> str | None:
    """Why no job can bear ``job_id``; None if one can."""
    if not isinstance(job_id, str) or not job_id:
        return "its id is none"
    if len(job_id) > ID_LENGTH:
        return f"its id is longer than {ID_LENGTH} characters"
    if not job_id.isprintable():
        return "its id holds a character that cannot be printed"
    if job_id.startswith("!"):  # the ledger's own marks do
        return "its id begins with an exclamation mark"
    return None


def wrong_depth(parts: object) -> str | None:
    """Whether the parts of a message are nested too deep for the worker to handle them; None if they are not."""
    return "it is nested too deep" if _deeper(parts, DEPTH) else None


def wrong_property(properties: object, delivery_info: object) -> str | None:
    """What is wrong with what the broker says of a message; None if nothing is."""
    return _wrong(Properties, properties, "property") or _wrong(DeliveryInfo, delivery_info, "delivery_info")


def wrong_header(headers: Mapping[str, Any]) -> str | None:
    """What is wrong with ``headers``, as the end of a sentence that quotes no value; None if nothing is."""
    if _size([headers.get("stamps"), headers.get("stamped_headers")]) > STAMP_BYTES:
        return f"its stamps take more than {STAMP_BYTES} bytes"
    return _wrong(Headers, headers, "header") or _stray(_HEADERS, headers, "header")


def wrong_follow_up(embed: Mapping[str, Any]) -> str | None:
    """What is wrong with the embed part of a body; None if nothing is."""
    if _size(embed) > FOLLOW_UP_BYTES:
        return f"its follow-ups (link, link_error, chain, chord) take more than {FOLLOW_UP_BYTES} bytes"
    of_the_headers = sorted((_HEADERS - _EMBED) & embed.keys())
    if of_the_headers:  # Celery would let them stand before those
        return f"its embed field {of_the_headers[0]} belongs into the headers"
    return _wrong(Embed, embed, "embed field") or _stray(_EMBED, embed, "embed field")


def sound_follow_ups(embed: object) -> dict[str, Any]:
    """Those follow-ups of a refused message that can be sent."""
    return {} if _deeper(embed, DEPTH) else _sound(Embed, embed)


def sound_place(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Where a refused message says that its job stands in a canvas."""
    return _sound(CanvasPlace, headers)


def _sound(kind: type[_Kind], values: object) -> dict[str, Any]:
    found = values if isinstance(values, Mapping) else {}
    names = [name for name in kind.model_fields if found.get(name) is not None]
    return {name: found[name] for name in names if _wrong(kind, {name: found[name]}, "") is None}


def _size(value: object) -> int:
    return len(json.dumps(value, default=str))


def _wrong(kind: type[_Kind], value: object, what: str) -> str | None:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][:1]
        name = first[0] if first and first[0] in kind.model_fields else ""
        return f"its {what}{f' {name}' if name else ''} is of the wrong kind"
    return None


def _stray(names: frozenset[str], value: Mapping[str, Any], what: str) -> str | None:
    for name in value:
        if not isinstance(name, str) or not name.isprintable():
            return f"the name of a {what} holds a control character"
        if name not in names and (name in _OF_THE_REQUEST or name.startswith("_")):
            return f"its {what} has a name that is Celery's own"
    return None


def _deeper(value: object, levels: int) -> bool:
    if levels < 0:
        return True
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_deeper(one, levels - 1) for one in inside)
