"""The parts of Celery that its manual does not name do what our worker and our programs take them to do.

A test that fails with a new version of Celery names the function of ours that has to be looked at, in
``worker/runtime/celery_internals.py`` or ``courier/celery_internals.py`` unless another module is named.
"""

from __future__ import annotations

import datetime
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import fakeredis
import kombu.pools
import pytest
from celery import Celery, Task, states
from celery.app.trace import trace_task
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from celery.concurrency import get_implementation
from celery.events.dispatcher import EventDispatcher
from celery.exceptions import InvalidTaskError, SecurityError, TaskRevokedError, WorkerShutdown, WorkerTerminate
from celery.security.serialization import SecureSerializer
from celery.worker import WorkController, components, state
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kombu.message import Message

from courier.celery_internals import (
    EmbeddingAMQP,
    GuestCelery,
    certificate,
    certificates,
    disconnect,
    forget_result,
    json_signer,
    private_key,
    read_results,
    result_channel,
    store_probe,
    subscriber,
)
from worker.runtime import celery_internals, consumer, shortage
from worker.runtime.celery_internals import LeavingThreads, MarkingCelery
from worker.runtime.request import ShownRequest


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture(autouse=True)
def _state_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(state, "should_stop", None)
    monkeypatch.setattr(state, "should_terminate", None)
    yield
    state.reset_state()


@pytest.fixture
def app() -> Iterator[Celery]:
    with MarkingCelery("internals", set_as_current=False, broker="memory://", backend="cache+memory://") as app:
        yield app


class Numbered:
    """A request, as far as Celery's state knows one."""

    def __init__(self, number: str) -> None:
        self.id, self.name = number, "pacs.upload"


# --- the app ----------------------------------------------------------------------------------------------------------


def test_marking_celery_depends_on_who_makes_a_result_back_end_and_marks_a_job_as_failed() -> None:
    marked: list[Any] = []

    class AskedCelery(MarkingCelery):
        def mark_as_failure(self, mark: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            marked.append((args[0], type(args[1]), kwargs.get("store_result", True)))
            mark(*args, **kwargs)

    with AskedCelery("asked", set_as_current=False, broker="memory://", backend="cache+memory://") as app:

        @app.task(name="fails", shared=False)
        def fails() -> None:
            raise ValueError

        app.finalize()
        trace_task(fails, "one", (), {}, {"id": "one", "task": "fails", "is_eager": False}, app=app)
        assert marked == [("one", ValueError, True)], "Celery marks a failed job past MarkingCelery.mark_as_failure"
        assert app.backend.get_state("one") == states.FAILURE
        app.backend.mark_as_failure("two", KeyError(), store_result=False)
        assert app.backend.get_state("two") == states.PENDING


def test_marking_celery_depends_on_what_a_result_back_end_stores_of_an_error() -> None:
    class NamingCelery(MarkingCelery):
        def module_of(self, error: BaseException) -> str:
            return "named" if isinstance(error, KeyError) else super().module_of(error)

    with NamingCelery("naming", set_as_current=False, broker="memory://", backend="cache+memory://") as app:
        backend, stored = app.backend, {}
        for job_id, error in (("one", KeyError("k")), ("two", shortage.Escaped("e"))):
            backend.mark_as_failure(job_id, error)
            stored[job_id] = json.loads(backend.get(backend.get_key_for_task(job_id)))["result"]["exc_module"]
        assert stored == {"one": "named", "two": "worker.runtime.shortage"}
        of_celerys_own = backend.prepare_exception(KeyError("k"), "pickle")
        assert isinstance(of_celerys_own, KeyError), "Celery's tracer asks for the error itself"


def test_the_app_depends_on_what_keeps_a_failure_from_being_stored_and_followed() -> None:
    """`worker.app` calls it with ``store_result=False``, and with ``request=None`` so that nothing follows."""
    assert {"store_result", "request"} <= set(parameters(Backend.mark_as_failure))
    source = inspect.getsource(Backend.mark_as_failure)
    assert "if request:" in source, "what follows on a failure follows without a request, too"


def test_consume_no_other_queue_depends_on_where_the_selected_queues_are_kept(app: Celery) -> None:
    assert app.amqp.queues._consume_from is None
    celery_internals.consume_no_other_queue(app)
    before = set(app.amqp.queues.consume_from)
    assert set(app.amqp.queues._consume_from) == before == {"celery"}
    assert app.amqp.queues["one-that-is-sent-to"].name == "one-that-is-sent-to"
    assert set(app.amqp.queues.consume_from) == before


@pytest.mark.parametrize(("store_result", "there"), [(True, states.FAILURE), (False, states.PENDING)])
def test_fail_chain_depends_on_what_celery_does_to_the_rest_of_a_chain(
    app: Celery, store_result: bool, there: str
) -> None:
    assert parameters(app.backend._fail_chain)[:4] == ["chain", "exc", "traceback", "store_result"]
    name = f"follows-{store_result}"
    celery_internals.fail_chain(
        app.backend, [{"task": "a", "options": {"task_id": name}}], ValueError(), store_result=store_result
    )
    assert app.backend.get_state(name) == there


def test_is_chord_in_doubt_depends_on_how_a_worker_claims_the_body_of_a_chord(monkeypatch: pytest.MonkeyPatch) -> None:
    with Celery("chords", set_as_current=False, broker="memory://", backend="redis://chords.invalid") as app:
        backend: Any = app.backend
        backend.__dict__["client"] = fakeredis.FakeRedis()
        doubts: list[bool] = []

        def publish(*_: Any) -> None:
            doubts.append(celery_internals.is_chord_in_doubt(backend, "group"))

        monkeypatch.setattr(app.amqp, "_retry_publish", publish)
        backend.set_chord_size("group", 1)
        doubts.append(celery_internals.is_chord_in_doubt(backend, "group"))
        body = app.signature("a.body", task_id="body")
        request = SimpleNamespace(id="member", group="group", group_index=0, chord=body)
        backend.on_chord_part_return(request, states.SUCCESS, 1)
        doubts.append(celery_internals.is_chord_in_doubt(backend, "group"))
    assert doubts == [False, True, False], "before its members are counted, while its body is sent, and after"


def test_gather_events_depends_on_what_is_called_for_an_event_that_is_kept_back(app: Celery) -> None:
    dispatcher = EventDispatcher(app=app, enabled=False, buffer_group={"task"}, buffer_limit=100)
    dispatcher.enabled, dispatcher.producer = True, MagicMock()
    called: list[int] = []
    celery_internals.gather_events(dispatcher, lambda: called.append(1))
    dispatcher.send("task-succeeded")
    dispatcher.send("task-succeeded")
    assert called == [1, 1]
    dispatcher.producer.publish.assert_not_called()
    dispatcher.flush()
    dispatcher.producer.publish.assert_called_once()


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_name_pool_depends_on_where_celery_looks_for_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celery_internals.concurrency, "ALIASES", dict(celery_internals.concurrency.ALIASES))
    celery_internals.name_pool("threads", f"{LeavingThreads.__module__}:{LeavingThreads.__name__}")
    assert get_implementation("threads") is LeavingThreads


class Pool(LeavingThreads):
    under_way = 0
    asked = 0

    def release_jobs(self) -> int:
        self.asked += 1
        return self.under_way


def test_leaving_threads_depends_on_when_a_pool_starts_its_threads() -> None:
    pool = Pool(3)
    pool.start()
    try:
        assert pool.limit == pool.num_processes == 3
        assert len(pool.executor._threads) == 3
    finally:
        pool.stop()


def test_leaving_threads_depends_on_how_a_pool_is_given_a_job_and_says_what_came_of_it() -> None:
    told: list[Any] = []

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    pool = Pool(1)
    pool.start()
    try:
        pool.apply_async(fails, (1,), callback=told.append).get()
        pool.apply_async(lambda *given: (0, given, 0.1), (1, 2), callback=told.append).get()
    finally:
        pool.stop()
    failed, info, _ = told[0]
    assert failed
    assert isinstance(info.exception, shortage.Escaped) or isinstance(info.exception.exc, shortage.Escaped)
    assert told[1] == (0, (1, 2), 0.1)


def test_leaving_threads_depends_on_which_method_a_cold_shutdown_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    pool = Pool(1)
    pool.start()
    try:
        pool.apply_async(release.wait)
        monkeypatch.setattr(state, "should_terminate", 1)
        pool.stop()  # returns although a job runs
        pool.terminate()
        assert pool.asked == 1
        pool.terminate_job(1, 9)
    finally:
        release.set()


def test_the_pool_of_processes_says_of_a_lost_job_what_celery_says() -> None:
    """`worker.runtime.request` takes these errors for the pool's own words."""
    source = inspect.getsource(Request.on_failure)
    for name in ("Terminated", "Reject", "Ignore", "Retry", "WorkerLostError", "TimeLimitExceeded"):
        assert name in source, name


# --- what a worker has in hand ----------------------------------------------------------------------------------------


def handing(celerys: Callable[..., None], request: Any) -> None:
    request.hands.append("ours")
    celerys(request)


class Handed(Numbered):
    def __init__(self) -> None:
        super().__init__("handed")
        self.hands: list[Any] = []

    def execute_using_pool(self, pool: Any) -> None:
        self.hands.append(pool)


@pytest.mark.parametrize("uses_semaphore", [True, False])
def test_hand_over_by_depends_on_how_a_request_comes_to_the_pool(uses_semaphore: bool) -> None:
    worker = WorkController.__new__(WorkController)
    worker.pool = "the pool"
    worker._quick_acquire = lambda function, request: function(request)
    process = worker._process_task_sem if uses_semaphore else worker._process_task
    consumer = SimpleNamespace(controller=worker, on_task_request=process)
    celery_internals.hand_over_by(consumer, handing)
    request = Handed()
    consumer.on_task_request(request)
    assert request.hands == ["ours", "the pool"]


@pytest.mark.parametrize("how", ["apply_eta_task", "_limit_move_to_pool"])
def test_hand_over_by_depends_on_how_a_request_comes_to_the_pool_later(how: str) -> None:
    consumer = Consumer.__new__(Consumer)
    handed: list[Any] = []
    consumer.on_task_request, consumer.qos = handed.append, MagicMock()
    request = Numbered("later")
    getattr(consumer, how)(request)
    assert handed == [request]


def test_take_back_depends_on_who_frees_a_place_in_the_pool() -> None:
    source = inspect.getsource(components.Pool.create)
    assert "w._quick_release = w.semaphore.release" in source
    assert "w._quick_acquire = w.semaphore.acquire" in source
    assert "w.process_task = w._process_task_sem" in source
    released: list[int] = []
    consumer = SimpleNamespace(
        pool=SimpleNamespace(uses_semaphore=True), controller=SimpleNamespace(_quick_release=lambda: released.append(1))
    )
    request = Numbered("taken")
    state.task_reserved(request)
    celery_internals.take_back(consumer, request)
    assert (released, list(state.reserved_requests)) == ([1], [])


def test_in_hand_depends_on_where_celery_keeps_what_waits_for_a_slot_or_a_rate_limit() -> None:
    consumer = Consumer.__new__(Consumer)
    consumer.timer, consumer.task_buckets, consumer._limit_order = MagicMock(), {}, 0
    consumer.app = SimpleNamespace(tasks={"a": Task(), "b": SimpleNamespace(rate_limit="1/h")})
    consumer.reset_rate_limits()
    bucket = consumer.task_buckets["b"]
    assert consumer.task_buckets["a"] is None
    consumer.on_task_request = lambda _: None
    at_once, limited, reserved = Numbered("at once"), Numbered("limited"), Numbered("reserved")
    consumer._limit_task(at_once, bucket, 1)
    consumer._limit_task(limited, bucket, 1)
    state.reserved_requests.clear()
    state.task_reserved(reserved)
    worker = SimpleNamespace(consumer=consumer)
    assert celery_internals.in_hand(worker) == ["limited", "reserved"]
    state.task_ready(reserved)
    assert celery_internals.in_hand(worker) == ["limited"]


def test_revokes_depend_on_where_celery_keeps_its_requests_and_revoked_ids() -> None:
    """`worker.runtime.revokes`, which looks for stamps in all of them."""
    request = Numbered("kept")
    state.task_reserved(request)
    assert list(state.requests.values()) == [request]
    state.revoked.add("one")
    assert "one" in state.revoked
    state.revoked.discard("one")
    assert "one" not in state.revoked


def test_slots_depends_on_where_celery_counts_what_runs() -> None:
    worker = SimpleNamespace(pool=Pool(4))
    request = Numbered("runs")
    state.task_accepted(request)
    assert celery_internals.slots(worker) == (4, 1)
    state.task_ready(request)
    assert celery_internals.slots(worker) == (4, 0)


# --- the end of a worker ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 71, True])
def test_stop_depends_on_what_ends_a_worker(status: int) -> None:
    assert not celery_internals.is_told_to_stop()
    state.maybe_shutdown()
    celery_internals.stop(status)
    assert celery_internals.is_told_to_stop()
    with pytest.raises(WorkerShutdown) as ended:
        state.maybe_shutdown()
    assert ended.value.code == status


@pytest.mark.parametrize("how", ["should_stop", "should_terminate"])
@pytest.mark.parametrize(("status", "stopping"), [(None, False), (0, True), (1, True)])
def test_a_worker_that_was_told_to_stop_is_not_taken_for_stuck(
    monkeypatch: pytest.MonkeyPatch, how: str, status: int | None, stopping: bool
) -> None:
    """SIGTERM leaves the exit status 0 there; the worker then waits for its jobs, and its loop turns no more."""
    monkeypatch.setattr(consumer, "_waiting", lambda _: 0)
    monkeypatch.setattr(state, how, status)
    of_celery = SimpleNamespace(hub=object(), turns=1, taken=1)
    worker = SimpleNamespace(consumer=of_celery, pool=Pool(1), pool_cls=Pool, app=None)
    assert consumer.read_signs(worker).stopping is stopping


def test_is_told_to_terminate_depends_on_what_begins_a_cold_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not celery_internals.is_told_to_terminate()
    monkeypatch.setattr(state, "should_terminate", 0)
    assert celery_internals.is_told_to_terminate()
    with pytest.raises(WorkerTerminate):
        state.maybe_shutdown()


# --- courier/celery_internals.py --------------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Iterator[Any]:
    with Celery("results", set_as_current=False, broker="memory://", backend="redis://results.invalid") as app:
        app.backend.__dict__["client"] = fakeredis.FakeRedis()
        yield app.backend


@pytest.fixture
def stored(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Any], None]:
    """Stores a result as Celery does, without telling subscribers."""
    monkeypatch.setattr(type(backend), "set", lambda self, key, value, **_: self.client.set(key, value))

    def store(job_id: str, status: str, result: Any) -> None:
        backend.store_result(job_id, result, status)

    return store


def test_read_results_depends_on_how_a_back_end_keeps_what_it_stores(
    backend: Any, stored: Callable[[str, str, Any], None]
) -> None:
    stored("read-1", "SUCCESS", {"a": 1})
    found = read_results(backend, ["read-0", "read-1"])
    assert found.keys() == {"read-1"}
    assert (found["read-1"]["status"], found["read-1"]["result"]) == ("SUCCESS", {"a": 1})
    assert read_results(backend, []) == {}


def test_read_results_depends_on_what_a_memcached_answers(app: Celery) -> None:
    app.backend.store_result("read-1", {"a": 1}, "SUCCESS")
    assert read_results(app.backend, ["read-0", "read-1"])["read-1"]["result"] == {"a": 1}
    assert read_results(app.backend, ["read-0"]) == {}


@pytest.mark.parametrize(
    "result",
    [
        {"a": [1, {"b": None}], "ü": "山"},
        {"at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "as": "__type__"},
        [{"__type__": "not marked", "more": 1}],
        {"half": "\ud83d"},
    ],
)
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_read_results_depends_on_how_kombu_marks_values_that_json_has_no_kind_for(
    backend: Any, stored: Callable[[str, str, Any], None], result: Any, compression: str | None
) -> None:
    backend.compression = compression
    stored("read-1", "SUCCESS", result)
    (row,) = backend.mget([backend.get_key_for_task("read-1")])
    assert read_results(backend, ["read-1"])["read-1"] == backend.decode_result(row)
    assert read_results(backend, ["read-1"])["read-1"]["result"] == result


def test_read_results_depends_on_what_celery_makes_of_an_error(
    backend: Any, stored: Callable[[str, str, Any], None]
) -> None:
    stored("read-1", "FAILURE", ValueError("no"))
    found = read_results(backend, ["read-1"])["read-1"]["result"]
    assert (type(found), found.args) == (ValueError, ("no",))


def test_forget_result_depends_on_the_name_that_an_entry_has(
    backend: Any, stored: Callable[[str, str, Any], None]
) -> None:
    stored("forgotten", "PROGRESS", {"a": 1})
    assert backend.get_state("forgotten") == "PROGRESS"
    forget_result(backend, "forgotten")
    assert backend.get_state("forgotten") == states.PENDING


def test_store_probe_depends_on_where_a_back_end_has_its_client(backend: Any) -> None:
    assert isinstance(backend, RedisBackend)
    store_probe(backend)
    (name,) = backend.client.keys()
    assert name.startswith(b"celery-task-meta-probe-")
    assert backend.client.ttl(name) == 1


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")
def test_result_channel_depends_on_where_a_back_end_publishes_what_it_stores(backend: Any) -> None:
    with backend.client.pubsub() as pubsub:
        pubsub.subscribe(result_channel(backend, "told"))
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
        for kept, state in (({"stage": "push"}, "PROGRESS"), ({"uid": "1.2"}, states.SUCCESS)):
            backend.store_result("told", kept, state)
            message = pubsub.get_message(timeout=5)
            assert (message["type"], message["channel"]) == ("message", b"celery-task-meta-told")


def test_subscriber_depends_on_how_a_back_end_makes_its_client() -> None:
    url = "rediss://reader:secret@results.invalid:6390/3?ssl_cert_reqs=required"
    with Celery("results", set_as_current=False, broker="memory://", backend=url) as app:
        pool, own = app.backend.client.connection_pool, subscriber(app.backend).connection_pool
        assert own is not pool
        assert own.connection_class is pool.connection_class
        options = ("host", "port", "db", "username", "password", "ssl_cert_reqs", "socket_timeout", "client_name")
        assert [own.connection_kwargs[name] for name in options] == [pool.connection_kwargs[name] for name in options]
        assert own.connection_kwargs["password"] == "secret"
    with Celery("results", set_as_current=False, broker="memory://", backend="cache+memory://") as app:
        assert subscriber(app.backend) is None


def test_disconnect_depends_on_where_a_back_end_has_its_connections() -> None:
    with Celery("results", set_as_current=False, broker="memory://", backend="redis://results.invalid") as app:
        pool = app.backend.client.connection_pool
        pool.disconnect = MagicMock()
        app.close()
        pool.disconnect.assert_not_called()
        disconnect(app.backend)
        pool.disconnect.assert_called_once()


class Embedding(EmbeddingAMQP):
    def embedded(self, task_id: str, name: str) -> dict[str, Any]:
        return {"ours": [task_id, name]}


def test_embedding_amqp_depends_on_who_makes_the_body_of_a_message() -> None:
    with Celery("embedding", set_as_current=False, broker="memory://", backend="disabled://") as app:
        app.amqp_cls = Embedding
        app.send_task("a.task", task_id="sent", kwargs={"job": {}}, queue="embedding")
        with app.connection_for_read() as connection:
            message = connection.default_channel.basic_get("embedding")
            assert message.payload[2]["ours"] == ["sent", "a.task"]


def test_json_signer_depends_on_where_the_kind_of_what_is_signed_is_read(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    (tmp_path / "ours.crt").write_text(pem)
    kinds = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    parts = (
        private_key(key.private_bytes(serialization.Encoding.PEM, *kinds).decode()),
        certificate(pem),
        certificates(str(tmp_path / "*.crt")),
    )
    ours = json_signer(*parts)
    assert ours.deserialize(ours.serialize({"a": 1})) == {"a": 1}
    pickled = SecureSerializer(*parts, "sha256", serializer="pickle").serialize({"a": 1})
    with pytest.raises(SecurityError):
        ours.deserialize(pickled)
    for wrong in (private_key, certificate):
        with pytest.raises((SecurityError, ValueError)):
            wrong("no PEM")


def test_guest_celery_depends_on_which_url_of_a_broker_celery_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://of-the-program.invalid")
    with GuestCelery("guest", loader="app", set_as_current=False) as guest:
        guest.conf.update(broker_read_url="memory://ours", broker_write_url="memory://ours")
        assert guest.connection_for_read().transport_cls == guest.connection_for_write().transport_cls == "memory"
        assert guest.connection_for_write("redis://named.invalid").transport_cls == "redis"


def test_guest_celery_depends_on_what_would_make_it_the_app_of_a_django_program() -> None:
    assert Celery.builtin_fixups, "Celery keeps its fix-ups elsewhere"
    assert GuestCelery.builtin_fixups == frozenset()
    with GuestCelery("guest", loader="app", set_as_current=False) as guest:
        assert guest.fixups == set()


def test_guest_celery_depends_on_what_resizes_the_connections_of_all_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kombu.pools.get_limit()
    try:
        kombu.pools.set_limit(7)
        with Celery("host", set_as_current=False, broker="memory://") as host:
            host.conf.broker_pool_limit = 9
            assert host.pool.limit == 9
        assert kombu.pools.get_limit() == 9, "an app does not resize them any more: GuestCelery.pool is needless"
        kombu.pools.set_limit(7)
        with GuestCelery("guest", loader="app", set_as_current=False) as guest:
            guest.conf.update(broker_read_url="memory://", broker_write_url="memory://")
            assert guest.pool.limit == 7
        assert kombu.pools.get_limit() == 7
    finally:
        kombu.pools.set_limit(before)


# --- worker/runtime/consumer.py ---------------------------------------------------------------------------------------


def test_pacs_consumer_depends_on_these_methods_and_their_parameters() -> None:
    expected = {
        "create_task_handler": ["self", "promise"],
        "add_task_queue": ["self", "queue", "exchange", "exchange_type", "routing_key", "options"],
        "on_decode_error": ["self", "message", "exc"],
        "on_unknown_message": ["self", "body", "message"],
        "on_unknown_task": ["self", "body", "message", "exc"],
        "on_invalid_task": ["self", "body", "message", "exc"],
        "on_connection_error_before_connected": ["self", "exc"],
        "on_connection_error_after_connected": ["self", "exc"],
    }
    assert {name: parameters(getattr(Consumer, name)) for name in expected} == expected
    assert parameters(Consumer.call_soon)[:2] == ["self", "p"]


def test_pacs_consumer_depends_on_whom_celery_asks_about_a_message_that_is_no_job() -> None:
    asked: list[str] = []

    class AskedConsumer(Consumer):  # type: ignore[misc]  # celery is untyped
        def on_decode_error(self, message: Any, exc: BaseException) -> None:
            asked.append("decode")

        def on_unknown_message(self, body: object, message: Any) -> None:
            asked.append("message")

        def on_unknown_task(self, body: object, message: Any, exc: BaseException) -> None:
            asked.append("task")

        def on_invalid_task(self, body: object, message: Any, exc: BaseException) -> None:
            asked.append("invalid")

    def invalid(*_: Any) -> None:
        raise InvalidTaskError

    consumer = AskedConsumer.__new__(AskedConsumer)
    consumer.strategies, consumer.on_task_message = {"known": invalid}, set()
    consumer._maximum_prefetch_restored = True
    handle = consumer.create_task_handler()
    handle(MagicMock(headers=None))
    handle(MagicMock(headers={"task": "unknown"}))
    handle(MagicMock(headers={"task": "known"}))
    handle(MagicMock(headers={}, decode=MagicMock(side_effect=ValueError)))
    assert asked == ["message", "task", "invalid", "decode"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_pacs_consumer_depends_on_whom_celery_asks_when_redis_refuses(when: str) -> None:
    source = inspect.getsource(Consumer.start)
    assert f"self.on_connection_error_{when}_connected(exc)" in source


# --- worker/runtime/request.py ----------------------------------------------------------------------------------------


class AskedRequest(ShownRequest):
    calls: list[Any]

    def revoked(self) -> bool:
        self.calls.append("revoked")
        return True

    def acknowledge(self) -> None:
        self.calls.append("acknowledge")

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        self.calls.append(("on_failure", return_ok))


@pytest.fixture
def request_of_a_job(app: Celery) -> Any:
    @app.task(name="a.upload", acks_late=True, shared=False)
    def upload(job: Any) -> None:
        """Nothing."""

    app.finalize()
    task = app.amqp.as_task_v2("job-1", "a.upload", kwargs={"job": {"image_url": "https://host/a?secret"}})
    body = json.dumps(task.body)
    message = Message(
        body=body, headers=task.headers, content_type="application/json", content_encoding="utf-8", accept=None
    )
    pool = SimpleNamespace(apply_async=lambda *_, **__: None)
    kind = create_request_cls(AskedRequest, upload, pool, "host", None, app=app)
    made = kind(message, app=app, task=upload)
    made.calls = []
    return made


def test_shown_request_depends_on_these_methods_and_their_parameters() -> None:
    assert parameters(Request.on_failure) == ["self", "exc_info", "send_failed_event", "return_ok"]
    assert parameters(Request.info) == ["self", "safe"]
    assert parameters(Request.acknowledge) == ["self"]
    assert parameters(Request.revoked) == ["self"]
    assert parameters(Request.send_event) == ["self", "type", "fields"]
    assert isinstance(Request.argsrepr, property)
    assert isinstance(Request.kwargsrepr, property)
    assert isinstance(Request.request_dict, property)
    assert Request.acknowledged is False


def test_shown_request_depends_on_who_asks_whether_a_job_is_begun(request_of_a_job: Any) -> None:
    with pytest.raises(TaskRevokedError):
        request_of_a_job.execute_using_pool(SimpleNamespace(apply_async=lambda *_, **__: None))
    assert request_of_a_job.calls == ["revoked"]


def test_shown_request_depends_on_who_is_told_what_came_of_a_job(request_of_a_job: Any) -> None:
    request_of_a_job.on_success((1, SimpleNamespace(exception=ValueError()), 0.1))
    request_of_a_job.on_success((0, "stored", 0.1))
    assert request_of_a_job.calls == [("on_failure", True), "acknowledge"]


def test_shown_request_depends_on_what_celery_shows_of_a_job(request_of_a_job: Any) -> None:
    assert {"args", "kwargs"} <= Request.info(request_of_a_job).keys()
    assert "secret" not in json.dumps(request_of_a_job.info(), default=repr)


def test_the_task_depends_on_being_called_itself(app: Celery) -> None:
    """`worker.app.PacsTask` shows the result of a job in its own way."""

    class Called(Task):  # type: ignore[misc]  # celery is untyped
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return f"called {self.run(*args, **kwargs)}"

    @app.task(name="called", base=Called, shared=False)
    def called() -> str:
        return "once"

    app.finalize()
    trace_task(called, "id", (), {}, {"id": "id", "task": "called", "is_eager": False}, app=app)
    assert app.backend.get_result("id") == "called once"
