"""The Celery app of a worker process: its tools, its sweeper, and what it lets others see.

Started with ``celery -A worker.app worker``. No job's work lives here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import signal
import threading
import time
import uuid
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import billiard
import kombu.exceptions
import redis
from celery import Task, bootsteps, signals
from celery.exceptions import (
    BackendError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
    WorkerShutdown,
)
from celery.result import denied_join_result

from courier import celery_settings, extras, queues, signing, telemetry, tracing
from courier.batches.progress import is_at_work
from courier.batches.store import CHUNK_TASK, Batches
from courier.celery_internals import forget_result, store_probe
from courier.errors import CourierError, InvalidRequest
from courier.json_text import EncodedResult
from courier.ledger import peers
from courier.ledger.breakers import Breakers
from courier.ledger.jobs import Attachment, DueJob, Ledger, TakeState, passes, words_of
from courier.ledger.latencies import Latencies
from courier.ledger.line import Line
from courier.ledger.slots import Slots
from courier.ledger.suspensions import Suspensions
from courier.redaction import redact_job, shown_id
from courier.result_lines import shown_result
from courier.settings import ServerSettings, Settings, SettingsError
from courier.waits import WOKEN
from worker.jobs.attempt import Heartbeat
from worker.jobs.batch_slots import BatchSlots
from worker.jobs.services import Services
from worker.observability import instrumentation
from worker.observability.log_format import configure, quiet
from worker.pacs.fleet import Fleet
from worker.pacs.guard import Guard
from worker.pacs.registry import connect
from worker.pacs.server_rates import ServerRates
from worker.runtime import celery_internals, consumer, kombu_internals, revokes, shortage, watchdog
from worker.runtime.request import ShownRequest
from worker.runtime.room import ALONE_S, Room
from worker.storage import s3_source
from worker.storage.azure import AzureAccount
from worker.storage.destinations import Destinations
from worker.storage.network import Network
from worker.storage.sources import Sources

if TYPE_CHECKING:
    from worker.observability.metrics import Outlook

log = logging.getLogger(__name__)

#: How long a server may think about how it is.
PROBE_TIMEOUT_S = 10.0
#: A job that nobody looked at for so long after it was due is overdue.
OVERDUE_S = 30.0
#: How long a process that is about to end waits for its own sweep.
LAST_SWEEP_S = 5.0
#: How often a worker looks whether it can release more jobs, while some stand in line.
LINE_S = 0.02
#: How soon the watchdog of a worker that begins says something.
SOON_S = 10.0
#: How long an event may wait for others.
EVENTS_S = 0.1
#: So many objects more than before may there be until Python looks for cycles among them.
NEW_OBJECTS = 5_000
#: After these another worker does the job.
GOES_ON = (WorkerLostError, Terminated)
#: What Redis, kombu and the result backend raise when they cannot be reached.
BROKER_ERRORS = (redis.RedisError, kombu.exceptions.OperationalError, BackendError)


class ShownResult(UserDict[str, Any]):
    """A result that Celery stores as it is, and of which events and logs have one line without metadata.

    Celery would cut the text of a dict, which takes nearly a millisecond, and may show a patient. ``text`` is its JSON,
    if it is encoded already.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        super().__init__(result)
        self.text = result.text if isinstance(result, EncodedResult) else ""

    def __json__(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text) if self.text else self.data
        return found

    def __repr__(self) -> str:
        return shown_result(self.data)


class PacsTask(Task):  # type: ignore[misc]  # celery is untyped
    """What all doors share. A `CourierError` is an answer, not a crash: it is logged in one line."""

    Request = ShownRequest
    throws = (CourierError,)
    resultrepr_maxsize = 1000

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result, shown as `shown_result` does. The request is on Celery's stack already."""
        result = self.run(*args, **kwargs)
        return ShownResult(result) if isinstance(result, dict) else result

    def after_return(self, status: str, retval: object, task_id: str, *_: object) -> None:  # noqa: ARG002 - Celery's
        """The result back-end has it. Should this be lost, a sweep publishes the outcome once more."""
        if isinstance(retval, TimeLimitExceeded) or (
            isinstance(retval, InvalidRequest) and retval.details.get("taken")
        ):
            return  # it is not the outcome of the job that bears this id
        heartbeat().published(task_id)


def _settings() -> Settings:
    try:
        return Settings.load()
    except SettingsError as error:
        raise SystemExit(f"pacs-courier: {error}") from None


settings = _settings()


def _correct_celerys_options() -> None:
    """Have Celery read the URLs as the settings give them, in a form that it knows.

    The command `celery` takes these two variables for its options ``-b`` and ``--result-backend``, as they are written,
    and hands them on by variables of its own, which come before the configuration.
    """
    for name, url in (("BROKER_URL", settings.queue.broker_url), ("RESULT_BACKEND", settings.queue.result_backend)):
        if os.environ.get(name) and os.environ.get(f"CELERY_{name}") == os.environ[name]:
            os.environ[f"CELERY_{name}"] = url


_correct_celerys_options()


class PacsCelery(celery_internals.MarkingCelery):
    """Celery, which calls a job failed whose result it could not store; the job may well be done."""

    def mark_as_failure(self, mark: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        _publish_failure(mark, *args, **kwargs)

    def text_of(self, result: object) -> str:
        return result.text if isinstance(result, ShownResult) else ""

    def module_of(self, error: BaseException) -> str:
        """Of our errors the module that programs import, of this version and of 0.1."""
        return "producer.errors" if isinstance(error, CourierError) else super().module_of(error)


def _publish_failure(
    publish: Callable[..., None],
    job_id: str,
    error: BaseException,
    *args: Any,
    store_result: bool = True,
    **kwargs: Any,
) -> None:
    """Nothing is told where only telling has failed: the outcome is in the ledger, and a sweep tells it.

    Nor is it where a process of the pool was ended in the middle of a job that the ledger goes on with. Nothing follows
    on such a job either, yet.
    """
    if isinstance(error, TimeLimitExceeded) and _goes_on(job_id):
        return
    publishing = isinstance(error, BackendError)
    if publishing or isinstance(error, GOES_ON):
        kwargs["request"] = None
    publish(job_id, error, *args, store_result=store_result and not publishing, **kwargs)


quiet()
app = PacsCelery("pacs", task_cls=PacsTask, include=["worker.tasks"])
app.config_from_object(celery_settings)
app.conf.update(
    **settings.queue.for_celery,
    result_expires=settings.results.expires_s,
    # What is stored is read before: a connection that has died shows then, and needs no PING.
    redis_backend_health_check_interval=None,
    worker_consumer=f"{consumer.__name__}:{consumer.PacsConsumer.__name__}",
)
kombu_internals.install()
# Celery's `--pool prefork` means whatever the settings say, which is threads; `--pool processes` means what it says.
celery_internals.name_pool("threads", "worker.pool:ThreadPool")
try:
    signing.install(app, settings.queue.signing)
except SettingsError as error:
    raise SystemExit(f"pacs-courier: {error}") from None


#: Who dies together: this process and, where the pool forks, its children.
_WORKER = uuid.uuid4().hex


def _ledger() -> Ledger:
    return Ledger.connect(settings.queue.ledger_url, worker=_WORKER, **LEDGER_OPTIONS)


#: What the settings say of the ledger, beside where it is.
LEDGER_OPTIONS: Final[Mapping[str, Any]] = {
    "prefix": settings.queue.key_prefix,
    "lease_s": settings.jobs.lease_s,
    "grace_s": settings.jobs.grace_s,
    "keep_s": settings.results.expires_s,
    "claim_s": settings.routing.claim_s,
}


def _is_written_down(job_id: str) -> bool:
    return bool(_ledger_beside().read_record(job_id))


def _goes_on(job_id: str) -> bool:
    try:
        return _is_written_down(job_id)
    except redis.RedisError:  # a job whose process was ended has most likely been begun
        return True


def _dead_letter(job_id: str, task: str, job: Mapping[str, Any], attached: Attachment, error: CourierError) -> bool:
    ledger = _ledger_beside()
    ledger.submit(job_id, task=task, job=job)
    ledger.wake_now(job_id, by_sweeper=True)
    taken = ledger.take(job_id, task=task, job=job, attached=attached)
    if taken.state is TakeState.YOURS:
        outcome = {"error": error.payload}
        ledger.end_as_dead_letter(job_id, taken.fence, outcome=outcome, code=error.code, task=task, job=job)
    return taken.state is TakeState.YOURS


@functools.cache
def _ledger_beside() -> Ledger:
    """For what this process asks of the ledger outside of jobs; children of the pool have their own `services`."""
    return _ledger()


class _LedgerCanceller:
    def job(self, job_id: str, *, unless_taken: bool = False) -> str:
        ledger = _ledger_beside()
        if unless_taken:
            return ledger.cancel(job_id, unless="taken", mark=True)
        return Batches(ledger).cancel_job(job_id, mark=True)

    def stamps(self, header: str, values: Sequence[str]) -> None:
        _ledger_beside().cancel_stamped(header, values)


revokes.install(_LedgerCanceller())
consumer.PacsConsumer.is_written_down = staticmethod(_is_written_down)
consumer.PacsConsumer.count_return = staticmethod(lambda job_id: _ledger_beside().count_return(job_id))
consumer.PacsConsumer.dead_letter = staticmethod(_dead_letter)
consumer.PacsConsumer.published = staticmethod(lambda job_id: _ledger_beside().published(job_id))

#: How many jobs this process does at a time, as far as it has been told.
_pool_size = int(app.conf.worker_concurrency or 8)


def batch_slots(pool_size: int) -> int:
    """How many of them may be chunks of batches, or single jobs that were released together: a quarter of the slots,
    one at least, is for jobs that were enqueued just now.
    """
    return max(1, pool_size - max(1, pool_size // 4))


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _take_from_no_other_queue(**_: Any) -> None:
    celery_internals.consume_no_other_queue(app)
    if queues.JOBS in app.amqp.queues.consume_from:
        app.amqp.queues.select_add(app.amqp.queues[queues.DUE])


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _see_pool_size(instance: Any = None, **_: Any) -> None:
    global _pool_size  # noqa: PLW0603 - the command line says it after this module was loaded, before its tools are made
    _pool_size = int(getattr(instance, "concurrency", None) or _pool_size)


_building = threading.RLock()


def services() -> Services:
    """This process's tools, made at its first job: no connection is made before a fork."""
    with _building:  # the first jobs come on several threads at once
        return _services()


_guards: list[Guard] = []


@functools.cache
def _services() -> Services:
    tracing.trace(settings.telemetry)
    ledger = _ledger()
    prefix, cap_s = settings.queue.key_prefix, settings.jobs.retry_after_cap_s
    breakers = Breakers(ledger.client, settings.breaker, retry_after_cap_s=cap_s, prefix=prefix)
    rates = ServerRates(ledger.client, retry_after_cap_s=cap_s, prefix=prefix)
    suspensions = Suspensions(ledger.client, [server.name for server in settings.servers], prefix=prefix)
    slots = Slots(ledger.client, prefix=prefix)
    latencies = Latencies(ledger.client, prefix=prefix)
    guard = Guard(breakers, slots, settings.servers, rates=rates, suspensions=suspensions, latencies=latencies)
    fleet = Fleet([connect(server, guard) for server in settings.servers])
    _guards.append(guard)
    return Services(
        settings=settings,
        ledger=ledger,
        breakers=breakers,
        seem_well=guard.seem_well,
        reserve=guard.reserve,
        suspensions=suspensions,
        rates=rates,
        sources=Sources(settings.sources, breakers=breakers),
        destinations=Destinations(settings.downloads, ledger, Network.of(settings.sources), breakers),
        fleet=fleet,
        probes=Fleet([connect(_impatient(server)) for server in settings.servers], threads=8),
        wake=wake,
        bulk=Fleet(fleet),
        batch_slots=BatchSlots(batch_slots(_pool_size)),
    )


def _impatient(server: ServerSettings) -> ServerSettings:
    """The server as it is asked how it is: by few connections, that soon call a silence a silence."""
    read_timeout_s = min(server.read_timeout_s, PROBE_TIMEOUT_S)
    return server.model_copy(update={"read_timeout_s": read_timeout_s, "max_concurrency": 2})


def heartbeat() -> Heartbeat:
    """What keeps this process's jobs alive."""
    with _building:
        return _heartbeat()


@functools.cache
def _heartbeat() -> Heartbeat:
    return Heartbeat(services().ledger, _publish)


def ready() -> tuple[Services, Heartbeat]:
    """This process's tools and its pulse, with all threads that a job needs: before one is claimed.

    Raises
    ------
    RuntimeError
        The system gives no more threads.
    """
    with _building:
        _start_threads()
        return _services(), _heartbeat()


@functools.cache
def _start_threads() -> None:
    services = _services()
    _heartbeat().start()
    for guard in _guards:
        guard.start()
    for fleet in (services.fleet, services.probes, services.bulk):
        if fleet is not None:
            fleet.start()


@contextlib.contextmanager
def or_no_start() -> Iterator[None]:
    """A worker that gets no threads ends before it takes a message, and says so in one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not shortage.is_shortage(error):
            raise
        log.critical(shortage.NO_START, shortage.EXIT_STATUS)
        raise WorkerShutdown(shortage.EXIT_STATUS) from None


class Threads(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Starts the threads that jobs need, where they run in this process; a child of a pool starts its own."""

    def start(self, parent: Any) -> None:
        if celery_internals.runs_threads(parent):
            with or_no_start():
                ready()


_sweeping = threading.Lock()


def release_jobs() -> int:
    """Give up the jobs that are under way in this process, which is about to end; returns how many."""
    _sweeping.acquire(timeout=LAST_SWEEP_S)  # for good: a sweep of ours would find them due, and die before it says so
    return heartbeat().release() if _heartbeat.cache_info().currsize else 0


def _publish(job_id: str, meta: dict[str, Any]) -> None:
    """Show where a job is. Progress is a courtesy: without a result backend the job goes on."""
    try:
        app.backend.store_result(job_id, meta, "PROGRESS")
    except BROKER_ERRORS as error:
        log.warning("Progress could not be shown: %s", type(error).__name__)


class Sweeper(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Wakes jobs that are due: lost messages, dead holders, back-offs that are over. Harmless if many run."""

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._stop = threading.Event()

    def start(self, parent: Any) -> None:
        with or_no_start():
            threading.Thread(target=self._loop, args=(parent,), name="sweeper", daemon=True).start()

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        self._stop.set()

    def _loop(self, worker: Any) -> None:
        ledger, room = _ledger(), Room(batch_slots(_pool_size))
        next_s, in_line, depth = time.monotonic() + settings.jobs.sweep_s, 0, None
        while not room.wait(
            self._stop, _pause_s(next_s, in_line), releasing=in_line > 0, alone=consumer.quiet_s() > ALONE_S
        ):
            try:
                with _sweeping:
                    if time.monotonic() < next_s:
                        release_line(ledger, _line(room.size, depth))
                    else:
                        next_s = time.monotonic() + settings.jobs.sweep_s
                        depth = _depth_of_line() if in_line else None
                        self._sweep(worker, ledger, _line(room.size, depth))
                    in_line = ledger.waiting_in_line()
            except Exception as error:  # noqa: BLE001 - without its sweeper a worker would wake nobody any more
                in_line = 0
                telemetry.count("sweep_failed")
                log.warning("Could not sweep: %s; trying again", type(error).__name__)

    @staticmethod
    def _sweep(worker: Any, ledger: Ledger, line: Line) -> None:
        if held := celery_internals.in_hand(worker):
            ledger.in_hand(held)
        sweep(ledger, line)
        _look_into_old_queues()


def _pause_s(next_s: float, in_line: int) -> float:
    """Until the next sweep, or until it is looked again whether more of the jobs in line can be released."""
    left_s = max(0.0, next_s - time.monotonic())
    return min(left_s, LINE_S) if in_line else left_s


def _line(room: int, depth: int | None) -> Line:
    """Where single jobs that are due stand in line; ``depth`` is as in `Line`."""
    return Line(_queue_of_line(), queues.IN_LINE, room=room, depth=depth)


def _queue_of_line() -> str:
    return queues.DUE if queues.DUE in app.amqp.queues.consume_from else queues.JOBS


def _depth_of_line() -> int | None:
    queue = _queue_of_line()
    return _queues({queue}).get(queue, (queue, None))[1]


_old_queues = queues.OldQueues(reads=settings.queue.read_old_queues)


def _look_into_old_queues() -> None:
    if _old_queues.idle:
        return
    try:
        with app.connection_for_write() as connection:
            if connection.transport.driver_type == "redis":  # of others no list can be looked at
                _old_queues.report_and_move(connection.default_channel)
    except BROKER_ERRORS as error:
        log.warning("Could not look into the queues of version 0.1: %s; trying again", type(error).__name__)


def sweep(ledger: Ledger, line: Line | None = None) -> int:
    """Send a message for every job that is due, or whose circuit has closed; returns how many.

    None is sent again that may be in its queue, and of the jobs in line no more than there is room for.
    """
    ledger.wake_parked()
    _requeue_lost(ledger)
    telemetry.count("sweep")
    return release_line(ledger, line or _line(batch_slots(_pool_size), None))


def release_line(ledger: Ledger, line: Line) -> int:
    """Send the messages of the jobs that are due, as far as there is room in the queue of those that stand in line."""
    # The other workers say what they have in hand as often as this one.
    due = ledger.sweep(queues=_queues, settle_s=2 * settings.jobs.sweep_s, line=line)
    for number, job in enumerate(due):
        try:
            _send(job)
        except BROKER_ERRORS:
            ledger.unsent(job.job_id for job in due[number:])
            raise
        log.info("Woke job %s (%s)", job.job_id, job.task, extra={"job_id": job.job_id, "task": job.task})
    telemetry.count("woken", len(due))
    return len(due)


def _queues(names: set[str]) -> dict[str, tuple[str, int]]:
    """The queue of each task, and how many messages wait there; {} if the broker does not answer.

    A name may be that of a queue, too.
    """
    queue_of = {
        name: name if name in queues.QUEUES else app.amqp.router.route({}, name)["queue"].name for name in names if name
    }
    try:
        depths = consumer.depths(app, set(queue_of.values()))
    except BROKER_ERRORS as error:
        log.warning("The broker does not say what is in its queues: %s", type(error).__name__)
        return {}
    return {name: (queue, depths[queue]) for name, queue in queue_of.items()}


def _requeue_lost(ledger: Ledger) -> None:
    """Look again for what nobody answered to although its queue is empty: the message died with its worker.

    Where messages wait in line, theirs may be among them, and another one would only make the line longer.
    """
    dispatched = ledger.dispatched()
    if dispatched:
        known = _queues(set(dispatched.values()))
        ledger.requeue_lost(job_id for job_id, where in dispatched.items() if known.get(where, ("", 1))[1] == 0)


def _send(job: DueJob) -> None:
    trace = job.trace or telemetry.carrier().get("traceparent", "")
    woken = {} if job.task == CHUNK_TASK else {WOKEN: True}  # of pieces of a batch no wait is shown
    with denied_join_result():  # else it would subscribe to the result, and wake nobody while that is out of reach
        app.send_task(
            job.task,
            kwargs={"job": job.job},
            task_id=job.job_id,
            argsrepr="()",
            kwargsrepr=redact_job(job.job),
            headers={**job.headers, **woken, **({"traceparent": trace} if trace else {})},
            **({"queue": job.queue} if job.queue else {}),
        )


def wake(jobs: Sequence[DueJob]) -> None:
    """Send the messages of jobs that the ledger knows. It does not matter if that fails: they are due later."""
    for number, job in enumerate(jobs):
        try:
            _send(job)
        except BROKER_ERRORS as error:
            log.warning("Messages could not be sent now: %s", type(error).__name__)
            with contextlib.suppress(redis.RedisError):
                services().ledger.unsent(job.job_id for job in jobs[number:])
            return


def replay(ledger: Ledger, job_id: str) -> bool:
    """Queue a dead letter again under its id, as `Courier.dead.replay`; False if it is none."""
    due = ledger.replay(job_id)
    if due is None:
        return False
    forget_result(app.backend, job_id)  # before the message: should the job end at once, its new result stays
    try:
        _send(due)
    except BROKER_ERRORS as error:
        log.warning("The message of job %s is sent later: %s", shown_id(job_id), type(error).__name__)
        ledger.unsent([job_id])
    return True


def ask_a_worker(task: str, *, timeout_s: float) -> dict[str, Any] | None:
    """What a look-up comes to that any worker can do; None if none has done it within ``timeout_s``.

    A message that no worker has taken by then ends as cancelled.
    """
    job_id, until = str(uuid.uuid4()), time.monotonic() + timeout_s
    with denied_join_result():
        app.send_task(
            task, kwargs={"job": {}}, task_id=job_id, argsrepr="()", kwargsrepr=redact_job({}), expires=timeout_s
        )
    while time.monotonic() < until:
        meta = app.backend.get_task_meta(job_id, cache=False)
        if meta["status"] in ("SUCCESS", "FAILURE"):
            return meta["result"] if isinstance(meta["result"], dict) else None
        time.sleep(0.2)
    return None


app.steps["worker"].add(Threads)
app.steps["worker"].add(Sweeper)


class WatchedOver(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Lets a watchdog look whether this worker gets anywhere, and say so to whoever asks."""

    def start(self, parent: Any) -> None:
        ledger = _ledger()
        dog = watchdog.Watchdog(
            functools.partial(consumer.read_signs, parent),
            watchdog_s=settings.worker.watchdog_s,
            hung_s=settings.worker.hung_s,
            publish=functools.partial(_publish_health, parent.hostname, ledger),
            end=_end_hard,
        )
        with or_no_start():
            dog.start()


def _publish_health(name: str, ledger: Ledger, report: watchdog.HealthReport) -> None:
    if settings.worker.health_file is not None:
        watchdog.write(settings.worker.health_file, report)
    with contextlib.suppress(redis.RedisError):
        report = dataclasses.replace(report, stopped_queues=tuple(_old_queues.stopped))
        if reason := _report_health(name, ledger, report):
            _stop(reason)


_begun = threading.Event()


def _report_health(name: str, ledger: Ledger, report: watchdog.HealthReport) -> str:
    """Say it to the others; why this worker cannot begin or go on beside them, "" if it can."""
    say = peers.say if _begun.is_set() else peers.begin
    reason = say(ledger, name, dataclasses.asdict(report), settings.servers)
    _begun.set()
    if not reason:
        _look_at_the_others(ledger)
    return reason


_remarks: set[str] = set()


def _look_at_the_others(ledger: Ledger) -> None:
    """Say once what is wrong with workers beside this one."""
    others = peers.Peers.of(ledger)
    remarks = {
        f"Worker {name} is too old to run beside this one; stop it (docs/upgrade.md)." for name in others.too_old
    }
    if others.difference:
        remarks.add(f"{others.difference} {others.consequence}")
    for remark in sorted(remarks - _remarks):
        log.warning("%s", remark)
    _remarks.clear()
    _remarks.update(remarks)


def _stop(reason: str) -> None:
    """Take no further message, let the jobs under way end, and end."""
    if not celery_internals.is_told_to_stop():
        log.critical(
            "%s This worker takes no more jobs and ends itself with exit status %d.", reason, peers.EXIT_STATUS
        )
        celery_internals.stop(peers.EXIT_STATUS)


def _end_hard() -> None:
    """End this process and the children of its pool at once: nothing that is stuck is waited for."""
    for child in billiard.active_children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    os._exit(watchdog.EXIT_STATUS)


app.steps["worker"].add(WatchedOver)
app.steps["consumer"].add(consumer.Turns)
app.steps["consumer"].add(consumer.HeardSignals)


class EventsTogether(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Sends the events for Flower ten times a second, together: one by one they are a tenth of a job's work."""

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._due = False

    def start(self, parent: Any) -> None:
        self._due = False  # after a lost connection nothing is left of what was due
        if parent.hub is not None and parent.event_dispatcher is not None:
            celery_internals.gather_events(parent.event_dispatcher, functools.partial(self._gather, parent))

    def stop(self, parent: Any) -> None:
        self._send(parent)

    def _gather(self, parent: Any) -> None:
        if not self._due:
            self._due = True
            parent.hub.call_soon(parent.hub.call_later, EVENTS_S, self._send, parent)  # timers are its own thread's

    def _send(self, parent: Any) -> None:
        self._due = False
        if parent.event_dispatcher is not None:
            parent.event_dispatcher.flush()


app.steps["consumer"].add(EventsTogether)


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _needs_servers(**_: Any) -> None:
    """Stop the start for want of a server or of its secret, not the first job."""
    if foreign := queues.not_ours(app.amqp.queues.consume_from):
        raise SystemExit(
            f"pacs-courier: -Q {','.join(foreign)}: the queues are called {', '.join(queues.NAMED)} since version 0.2,"
            " and in the old ones may be messages of other applications, which would be lost; set"
            " queue.read_old_queues = true to have messages of PACS Courier moved out of them (docs/upgrade.md)"
        )
    if not settings.servers:
        raise SystemExit("pacs-courier: no [[servers]] are set; name a pacs.toml in PACS_CONFIG (docs/settings.md)")
    try:
        for server in settings.servers:
            connect(server)
        _needs_extras()
        _needs_stores()
    except SettingsError as error:
        raise SystemExit(f"pacs-courier: {error}") from None


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _joins_the_others(sender: Any = None, **_: Any) -> None:
    """Begin beside no worker, and on no ledger, of a release that does not go with this one.

    Where Redis is away, the first look of the watchdog that reaches it makes up for this.
    """
    ledger = _ledger()
    try:
        reason = _report_health(sender.hostname, ledger, watchdog.HealthReport(True, "", SOON_S))
    except redis.RedisError as error:
        log.warning("The ledger does not serve now (%s); its version is looked at later", words_of(error))
        reason = ""
    finally:
        ledger.close()
    if reason := reason or _no_results():
        raise SystemExit(f"pacs-courier: {reason}")


def _no_results() -> str:
    """Why no result can be stored in a Redis that answers, in one sentence; "" if one can."""
    try:
        store_probe(app.backend)
    except (redis.AuthenticationError, redis.ResponseError) as error:
        if isinstance(error, redis.AuthenticationError) or not passes(error):
            return (
                f"Redis refuses to store a result ({words_of(error)}); correct result_backend, or what its user may do."
            )
    except redis.RedisError:
        pass  # it is away: Celery waits for it
    return ""


def _needs_extras() -> None:
    """The SDKs of those stores that the settings name."""
    for name, section in (("sources", settings.sources), ("downloads", settings.downloads)):
        needed = {
            f"{name}.s3.buckets": (section.s3.buckets, extras.S3),
            f"{name}.azure.containers": (section.azure.containers, extras.AZURE_BLOBS),
        }
        for key, (named, extra) in needed.items():
            if named and not extra.is_installed:
                raise SettingsError(f"setting {key} cannot be followed: {extra.remedy}, or leave the key out")


def _needs_stores() -> None:
    """What the stores are known by that images come from and studies go to: authorities, credentials."""
    Sources(settings.sources).close()
    timeout_s = settings.sources.connect_timeout_s
    for azure in (settings.sources.azure, settings.downloads.azure):
        if azure.containers:
            account = AzureAccount(azure, connect_timeout_s=timeout_s, read_timeout_s=timeout_s)
            account.url("container", "blob")  # signed, so that a malformed key shows
            account.close()
    if settings.sources.s3.buckets or settings.downloads.s3.buckets:
        s3_source.check_credentials()


def outlook() -> Outlook:
    """What a scrape asks of the ledger and the broker."""
    from worker.observability.metrics import Outlook  # noqa: PLC0415 (only where metrics are on)

    ledger = _ledger_beside()
    load = ledger.load(overdue_s=OVERDUE_S)
    server_names = [server.name for server in settings.servers]
    breakers = Breakers(ledger.client, prefix=settings.queue.key_prefix)
    suspensions = Suspensions(ledger.client, prefix=settings.queue.key_prefix).read(server_names)
    batches = Batches(ledger).list()
    return Outlook(
        servers_digests=len(peers.Peers.of(ledger).servers_digests),
        queues=consumer.depths(app, queues.QUEUES),
        open=load.open,
        overdue=load.overdue,
        dead=load.dead,
        parked=ledger.parked(),
        batches=Counter(batch.state for batch in batches),
        settled={batch.id: batch.settled for batch in batches if is_at_work(batch, time.time())},
        oldest_message_s=ledger.oldest_message_s(),
        breakers={name: state.name for name, state in breakers.states(server_names).items()},
        suspended={name: suspensions[name].state if name in suspensions else "" for name in server_names},
    )


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _collect_less_often(**_: Any) -> None:
    """The metadata of one image are a thousand objects, for which Python would look for cycles once or more per job.

    What was loaded stays until the end, where looking through it would take half a second.
    """
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    gc.freeze()


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _measure(**_: Any) -> None:
    try:
        instrumentation.measure(settings.telemetry, outlook)
    except SettingsError as error:
        raise SystemExit(f"pacs-courier: {error}") from None


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]  # celery is untyped
@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _note_published(**_: Any) -> None:
    """This process ends: there is no next beat."""
    if _heartbeat.cache_info().currsize:
        _heartbeat().note_published()


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _forget_measures(pid: int | None = None, **_: Any) -> None:
    """A child of the prefork pool has ended: what it had in flight is no longer."""
    instrumentation.forget(settings.telemetry, pid or os.getpid())


@signals.setup_logging.connect  # type: ignore[untyped-decorator]  # celery is untyped
def _logging(loglevel: int | str = logging.INFO, **_: Any) -> None:
    configure(loglevel, shape=settings.logs.format)
