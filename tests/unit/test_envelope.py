"""Every header and embed field that Celery reads is of the kind that it takes it for, or its message is no job."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signals, signature
from celery.app.amqp import AMQP
from celery.app.base import Celery as CeleryApp
from celery.app.task import Context, Task
from celery.canvas import Signature as CelerySignature
from celery.worker.request import Request
from kombu.messaging import Producer

from worker.runtime import envelope
from worker.runtime.consumer import unfit

HEADERS: dict[str, Any] = {"task": "pacs.upload", "id": "order/7"}
#: One value of each kind that JSON has, and the odd ones among them.
KINDS: dict[str, Any] = {
    "true": True,
    "number": 5,
    "negative": -1,
    "fraction": 0.5,
    "huge": 10**400,
    "infinite": float("inf"),
    "nan": float("nan"),
    "text": "words",
    "empty": "",
    "line break": "x\n2026-01-01 00:00:00,000 INFO - worker.app: forged",
    "terminal": "\x1b[2Kx",
    "surrogate": "\ud800",
    "list": [],
    "list of a number": [5],
    "list of a text": ["words"],
    "list of an object": [{"task": 5}],
    "object": {},
    "object of a number": {"a": 5},
}
TEXT, OBJECT = frozenset(("text", "empty")), frozenset(("object", "object of a number"))
LIST = frozenset(("list", "list of a number", "list of a text", "list of an object"))
TRUTH, COUNT = frozenset(("true",)), frozenset(("number",))
#: Of which kinds a header may be; what is not named here has a test of its own, or may be there in the body alone.
RIGHT: dict[str, frozenset[str]] = {
    **dict.fromkeys(("lang", "meth", "shadow", "root_id", "parent_id", "group", "taskset", "origin"), TEXT),
    **dict.fromkeys(("hostname", "logfile", "reply_to", "correlation_id"), TEXT),
    **dict.fromkeys(("argsrepr", "kwargsrepr"), TEXT | {"line break", "terminal", "surrogate"}),
    **dict.fromkeys(("retries", "group_index", "replaced_task_nesting"), COUNT),
    **dict.fromkeys(("time_limit", "soft_time_limit"), COUNT | {"fraction"}),
    **dict.fromkeys(("ignore_result", "redelivered", "utc", "is_eager", "called_directly"), TRUTH),
    **dict.fromkeys(("stamped_headers", "groups"), LIST - {"list of a number", "list of an object"}),
    **dict.fromkeys(("stamps", "headers", "properties", "delivery_info", "kwargs"), OBJECT),
    "loglevel": TEXT | COUNT,
    "task": TEXT - {"empty"},
    "id": TEXT - {"empty"},
    "args": LIST,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("header", sorted(envelope.Headers.model_fields))
def test_a_header_is_of_its_kind_or_the_message_is_no_job(header: str, kind: str) -> None:
    wrong = envelope.wrong_id(KINDS[kind]) if header == "id" else None
    wrong = wrong or envelope.wrong_header({**HEADERS, header: KINDS[kind]})
    assert (wrong is None) == (kind in RIGHT.get(header, frozenset()))
    if wrong is not None:
        assert header in wrong
        assert wrong.isprintable()
        assert "forged" not in wrong


@pytest.mark.parametrize("header", sorted(set(envelope.Headers.model_fields) - set(HEADERS)))
def test_a_header_may_be_empty(header: str) -> None:
    assert envelope.wrong_header({**HEADERS, header: None}) is None


@pytest.mark.parametrize(
    ("limits", "is_right"),
    [
        ([None, None], True),
        ([300, 250.5], True),
        ([300], False),
        ([300, 250, 200], False),
        ([True, None], False),
        (["300", None], False),
        ([-1, None], False),
        ([float("inf"), None], False),
        ({"0": 300}, False),
    ],
)
def test_a_time_limit_is_two_numbers_of_seconds(limits: object, is_right: bool) -> None:
    assert (envelope.wrong_header({**HEADERS, "timelimit": limits}) is None) == is_right


@pytest.mark.parametrize("header", ["eta", "expires"])
@pytest.mark.parametrize(
    ("moment", "is_right"),
    [
        ("2026-11-30T12:00:00+00:00", True),
        ("2026-11-30T12:00:00.123456Z", True),
        ("2026-11-30T12:00:00", True),
        ("9999-12-31T23:59:59-14:00", False),
        ("0001-01-01T00:00:00+14:00", False),
        ("2026-13-01T00:00:00", False),
        ("tomorrow", False),
        ("", False),
        (1_700_000_000, False),
        (True, False),
    ],
)
def test_a_moment_is_a_time_of_the_calendar(header: str, moment: object, is_right: bool) -> None:
    assert (envelope.wrong_header({**HEADERS, header: moment}) is None) == is_right


@pytest.mark.parametrize("name", ["update", "get", "clear", "children", "_children", "_protected", "__dict__", "a\nb"])
def test_a_header_does_not_bear_a_name_of_celerys_own(name: str) -> None:
    assert envelope.wrong_header({**HEADERS, name: "x"}) is not None
    assert envelope.wrong_follow_up({name: "x"}) is not None


def test_headers_of_others_are_let_through() -> None:
    others = {"traceparent": "00-1-2-01", "x-tenant": {"ward": 5}, "baggage": None, "tier": "gold"}
    assert envelope.wrong_header({**HEADERS, **others}) is None
    assert envelope.wrong_follow_up({"signed_for": ["pacs.upload", "order/7", 5]}) is None


@pytest.mark.parametrize("field", ["id", "task", "args", "kwargs", "delivery_info", "shadow", "retries", "stamps"])
def test_an_embed_field_stands_in_for_no_header(field: str) -> None:
    """Celery would let it: the job would be done under another id than that of its headers."""
    assert envelope.wrong_follow_up({field: None}) is not None


@pytest.mark.parametrize("field", ["callbacks", "errbacks", "chain", "chord"])
def test_follow_ups_stand_in_the_body(field: str) -> None:
    assert envelope.wrong_header({**HEADERS, field: [FOLLOW_UP]}) is not None


FOLLOW_UP: dict[str, Any] = {
    "task": "reports.note",
    "args": [],
    "kwargs": {},
    "options": {"task_id": "note-7", "reply_to": "me", "queue": "reports"},
    "subtask_type": None,
    "immutable": False,
}
EMBED: dict[str, Any] = {
    "callbacks": [FOLLOW_UP],
    "errbacks": [FOLLOW_UP],
    "chain": [FOLLOW_UP],
    "chord": {**FOLLOW_UP, "chord_size": 2},
}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"list"}))
@pytest.mark.parametrize("field", EMBED)
def test_a_follow_up_is_a_signature(field: str, kind: str) -> None:
    assert envelope.wrong_follow_up({**EMBED, field: KINDS[kind]}) is not None


def changed(path: str, value: object) -> dict[str, Any]:
    """A follow-up in which ``path`` is ``value``, or is left out."""
    found = copy.deepcopy(FOLLOW_UP)
    *above, last = path.split(".")
    place = found
    for name in above:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return found


GROUP = {**FOLLOW_UP, "task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [FOLLOW_UP]}}
CHORD = {**FOLLOW_UP, "subtask_type": "chord", "kwargs": {"header": [FOLLOW_UP], "body": FOLLOW_UP, "kwargs": {}}}


@pytest.mark.parametrize(
    "follow_up",
    [
        *(changed(field, value) for field in ("task", "args", "kwargs", "options") for value in (..., None, 5, True)),
        changed("task", ""),
        changed("task", "a\nb"),
        changed("kwargs", []),
        changed("subtask_type", "pickle"),
        changed("immutable", "yes"),
        changed("options.countdown", "soon"),
        *(changed(f"options.{name}", seconds) for name in ("countdown", "expires") for seconds in (1e12, -1e12)),
        {**GROUP, "kwargs": {"tasks": [changed("options.countdown", 2**53)]}},
        changed("options.eta", "soon"),
        changed("options.expires", "soon"),
        changed("options.task_id", 5),
        changed("options.queue", {"name": "reports"}),
        changed("options.exchange_type", "weird"),
        changed("options.serializer", "no such"),
        changed("options.compression", "no such"),
        changed("options.priority", "high"),
        changed("options.retry_policy", {"max_retries": "many"}),
        changed("options.time_limit", True),
        changed("options.headers", []),
        changed("options.stamped_headers", -1),
        changed("options.stamped_headers", ["tier"]),
        changed("options.link", {"task": 5}),
        changed("options.link_error", [changed("args", 5)]),
        changed("options.chain", FOLLOW_UP),
        changed("options.chord", [FOLLOW_UP]),
        *(changed(f"options.{name}", "x") for name in ("producer", "connection", "name", "args", "self", "app")),
        {**GROUP, "kwargs": {}},
        {**GROUP, "kwargs": {"tasks": []}},
        {**GROUP, "kwargs": {"tasks": [5]}},
        {**GROUP, "kwargs": {"tasks": FOLLOW_UP}},
        {**GROUP, "subtask_type": "chain", "kwargs": {"tasks": [changed("options.countdown", "soon")]}},
        {**CHORD, "kwargs": {"header": 5, "body": FOLLOW_UP}},
        {**CHORD, "kwargs": {"header": [FOLLOW_UP]}},
        {**CHORD, "kwargs": {"header": GROUP, "body": [FOLLOW_UP]}},
        {**FOLLOW_UP, "subtask_type": "chunks", "kwargs": {"task": "a", "it": [], "n": 0}},
        {**FOLLOW_UP, "subtask_type": "xmap", "kwargs": {"task": 5, "it": []}},
    ],
    ids=lambda follow_up: json.dumps(follow_up)[:80],
)
def test_a_follow_up_that_celery_could_not_send_is_refused_before_the_job_is_done(follow_up: dict[str, Any]) -> None:
    for field in ("callbacks", "errbacks", "chain"):
        assert envelope.wrong_follow_up({field: [FOLLOW_UP, follow_up]}) is not None
    assert envelope.wrong_follow_up({"chord": follow_up}) is not None


@pytest.mark.parametrize("option", ["countdown", "expires"])
@pytest.mark.parametrize("seconds", [-(2**31), -5, -0.5, 0, 1e11])
def test_a_follow_up_whose_time_is_past_or_far_away_is_accepted_and_sent(option: str, seconds: float) -> None:
    follow_up = changed(f"options.{option}", seconds)
    assert envelope.wrong_follow_up({"callbacks": [follow_up], "chord": follow_up}) is None
    app = Celery(broker="memory://", backend="cache+memory://", set_as_current=False)
    app.signature(follow_up).apply_async()  # Celery raises nothing


def nested(levels: int) -> dict[str, Any]:
    found = FOLLOW_UP
    for _ in range(levels):
        found = {**FOLLOW_UP, "options": {"link": [found]}}
    return found


@pytest.mark.parametrize(("levels", "is_right"), [(20, True), (60, False), (300, False)])
def test_follow_ups_of_follow_ups_end_somewhere(levels: int, is_right: bool) -> None:
    embed = {"callbacks": [nested(levels)]}
    assert (unfit(arrived(HEADERS, [[], {"job": {}}, embed])) is None) == is_right


def levels_of(kind: type, levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": found} if kind is dict else [found]
    return found


@pytest.mark.parametrize("kind", [dict, list])
@pytest.mark.parametrize(("levels", "is_right"), [(50, True), (500, False)])
@pytest.mark.parametrize("where", ["job", "beside", "args", "header", "stamps", "property", "delivery_info"])
def test_no_part_of_a_message_is_nested_deeper_than_a_pool_of_processes_can_bear(
    where: str, kind: type, levels: int, is_right: bool
) -> None:
    deep = levels_of(kind, levels)
    kwargs = {"job": {"job": {"server": deep}}, "beside": {"job": {}, "x": deep}, "args": {}}.get(where, {"job": {}})
    headers = {"header": {"x-other": deep}, "stamps": {"stamps": {"x": deep}}}.get(where, {})
    message = arrived({**HEADERS, **headers}, [[deep] if where == "args" else [], kwargs, {}])
    message.properties = {"x": deep} if where == "property" else {}
    message.delivery_info = {"x": deep} if where == "delivery_info" else {}
    reason = unfit(message)
    assert (reason is None) if is_right else ("nested too deep" in str(reason))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([{}, 5], {}),
        ([{}], {"job": {}}),
        ([], {"self": 1, "job": {}}),
        ([{}], {"self": 1}),
        ([None, None], {}),
    ],
)
def test_arguments_with_which_none_of_our_tasks_can_be_called_are_no_job(args: list[Any], kwargs: Any) -> None:
    for headers in (HEADERS, {**HEADERS, "task": "pacs.delete"}, {**HEADERS, "task": "pacs.batch.upload"}):
        assert "object job" in str(unfit(arrived(headers, [args, kwargs, {}])))


@pytest.mark.parametrize(("args", "kwargs"), [([{}], {}), ([], {"job": {}}), ([], {}), ([{}], {"x": 1})])
def test_a_job_may_stand_in_either_kind_of_arguments(args: list[Any], kwargs: Any) -> None:
    assert unfit(arrived(HEADERS, [args, kwargs, {}])) is None


@pytest.mark.parametrize("job_id", ["a\nb", "two\u00a0words", "\u202eb", "a\0"])
def test_an_id_that_is_wrong_is_named_before_what_repeats_it(job_id: str) -> None:
    message = arrived({**HEADERS, "id": job_id}, [[], {"job": {}}, {}])
    message.properties = {"correlation_id": job_id}
    assert unfit(message) == "its id holds a character that cannot be printed"


@pytest.mark.parametrize(
    ("properties", "delivery_info"),
    [
        (5, {}),
        ({}, []),
        ({"correlation_id": 5}, {}),
        ({"reply_to": {}}, {}),
        ({"priority": "high"}, {}),
        ({}, {"exchange": []}),
        ({}, {"routing_key": 5}),
        ({}, {"redelivered": "x"}),
        ({"correlation_id": "a\nb"}, {}),
    ],
)
def test_what_the_broker_says_of_a_message_is_of_its_kind_too(properties: Any, delivery_info: Any) -> None:
    assert envelope.wrong_property(properties, delivery_info) is not None


@pytest.mark.parametrize(
    "job_id",
    ["order/7", "a@b", "acc|1", "a=1", "a:b", "Bestellung-ü", "注文", "two words", "x" * 255, "{}", "%s", "../../etc"],
)
def test_any_text_that_celery_accepts_is_an_id(job_id: str) -> None:
    assert envelope.wrong_id(job_id) is None
    assert envelope.wrong_header({**HEADERS, "id": job_id}) is None


@pytest.mark.parametrize("job_id", ["", "x" * 256, "a\nb", "a\0b", "\u202eb", "!lost", 5, None, ["a"], True])
def test_an_id_is_one_line_of_text(job_id: object) -> None:
    assert envelope.wrong_id(job_id) is not None


# --- what Celery itself sends --------------------------------------------------------------------------------


@pytest.fixture
def sent() -> Iterator[list[tuple[dict[str, Any], list[Any]]]]:
    """Headers and bodies of all that is sent meanwhile, as they arrive."""
    messages: list[tuple[dict[str, Any], list[Any]]] = []

    def keep(headers: dict[str, Any], body: Any, **_: Any) -> None:
        messages.append(json.loads(json.dumps((headers, body))))

    signals.before_task_publish.connect(keep, weak=False)
    yield messages
    signals.before_task_publish.disconnect(keep)


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery(broker="memory://", backend="cache+memory://", set_as_current=False)
    yield app
    app.close()


def upload(app: Celery, name: str = "a", **options: Any) -> CelerySignature:
    return signature("pacs.upload", kwargs={"job": {"image_url": f"http://h/{name}"}}, app=app, **options)


def test_whatever_celery_sends_of_itself_is_a_job(app: Celery, sent: list[tuple[dict[str, Any], list[Any]]]) -> None:
    note, failed = signature("note", args=(1,), app=app), signature("failed", immutable=True, app=app)
    soon = datetime.now(UTC) + timedelta(minutes=1)
    app.send_task("pacs.upload", kwargs={"job": {"image_url": "x\ny"}}, countdown=1, expires=60, priority=3)
    app.send_task("pacs.upload", eta=soon, expires=soon, shadow="night run", retries=2, headers={"x-tenant": "ward"})
    app.send_task("pacs.upload", time_limit=300, soft_time_limit=250, ignore_result=True, task_id="order/7")
    upload(app).apply_async(link=[note, upload(app, "b")], link_error=failed)
    with_options = note.set(queue="reports", countdown=3, expires=60, priority=9, serializer="json", retry=False)
    with_options.set(retry_policy={"max_retries": 3, "interval_start": 0.2})
    upload(app).apply_async(link=with_options)
    (upload(app) | note | group([note, failed]) | note).apply_async()
    chain(upload(app), chain(note, failed), note).apply_async(link_error=failed)
    group([upload(app, str(number)) for number in range(3)]).apply_async()
    chord([upload(app), upload(app, "b") | note], note).apply_async(link_error=failed)
    chord(group([upload(app), chord([upload(app, "c")], note)]), note | failed).apply_async()
    stamped = upload(app)
    stamped.link(note)
    stamped.stamp(tier="gold", ward=["a", "b"])
    stamped.apply_async()
    ours = [(headers, body) for headers, body in sent if headers["task"] == "pacs.upload"]
    assert len(ours) > 12
    assert any(headers["stamped_headers"] for headers, _ in ours)
    for field in ("callbacks", "errbacks", "chain", "chord"):
        assert any(body[2][field] for _, body in ours), field
    for headers, (_, _, embed) in ours:
        assert envelope.wrong_header(headers) is None, headers
        assert envelope.wrong_follow_up(embed) is None, embed


def test_the_first_version_of_celerys_protocol_is_a_job(app: Celery) -> None:
    message = app.amqp.as_task_v1("order/7", "pacs.upload", kwargs={"job": {}}, countdown=3, callbacks=[FOLLOW_UP])
    body = json.loads(json.dumps(message.body))
    assert unfit(arrived({}, body)) is None
    assert unfit(arrived({}, {**body, "callbacks": 5})) is not None
    assert unfit(arrived({}, {**body, "timelimit": True})) is not None
    assert unfit(arrived({"id": 5}, body)) is not None


def arrived(headers: dict[str, Any], body: Any) -> Any:
    """A message of kombu's, as far as it is looked at."""
    return SimpleNamespace(
        headers=headers,
        payload=body,
        body=b"x",
        content_type="application/json",
        content_encoding="utf-8",
        properties={},
        delivery_info={},
    )


@pytest.mark.parametrize("loop", ["celery.map", "celery.starmap", "celery.chunks", "celery.chord_unlock"])
def test_celerys_loops_over_tasks_are_no_jobs(loop: str) -> None:
    assert "runs no jobs here" in str(unfit(arrived({**HEADERS, "task": loop}, [[], {}, {}])))


@pytest.mark.parametrize("field", ["content_type", "content_encoding"])
@pytest.mark.parametrize("kind", [5, ["application/json"], {"a": 1}, True])
def test_a_content_type_is_text(field: str, kind: object) -> None:
    message = arrived(HEADERS, [[], {}, {}])
    setattr(message, field, kind)
    assert unfit(message) is not None


# --- what Celery reads ----------------------------------------------------------------------------------------


def test_every_field_that_celery_reads_is_known(app: Celery) -> None:
    """A new one of a new Celery is to be put into worker/runtime/envelope.py, with its kind."""
    known = {*envelope.Headers.model_fields, *envelope.Embed.model_fields}
    fields = {name for name, value in vars(Context).items() if not (name.startswith("_") or callable(value))}
    assert fields - {"children"} - known == set()
    message = app.amqp.as_task_v2("order/7", "pacs.upload")
    assert {*message.headers, *message.body[2]} - known == set()
    source = inspect.getsource(Request)
    for line in source.splitlines():
        for before in ("_request_dict.get('", "_request_dict['"):
            if before in line:
                assert line.split(before)[1].split("'")[0] in known, line


def test_every_parameter_of_sending_is_an_option_with_a_kind_or_none_that_json_can_bear() -> None:
    functions = [
        Task.apply_async,
        CeleryApp.send_task,
        AMQP.as_task_v2,
        Producer.publish,
        CelerySignature.__init__,
        CelerySignature.apply_async,
        group.__init__,
        group.apply_async,
        chain.__init__,
        chain.run,
        chord.__init__,
        chord.run,
    ]
    known = {*envelope.Options.model_fields, *envelope.OBJECTS}
    for function in functions:
        parameters = {
            name for name, one in inspect.signature(function).parameters.items() if one.kind is not one.VAR_KEYWORD
        }
        assert parameters - known - {"body", "header", "ex"} == set(), function
