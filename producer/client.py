"""Enqueue jobs and follow them. The Celery client and the ledger's *submit* are all that is needed here.

The ledger is the one thing of the worker's floors that a producer shares: a job that is written down before its
message is sent cannot be lost with the message.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Self

import kombu
import kombu.exceptions
import kombu.pools
import redis
from celery import Celery
from celery.exceptions import BackendError
from kombu.connection import Connection

from courier import celery_internals, celery_settings, redis_urls, tracing
from courier.batches.store import Batches
from courier.ledger import peers
from courier.ledger.jobs import DueJob, Ledger, job_id_for, words_of
from courier.messages import (
    MESSAGE_BYTES,
    AuditJob,
    DeleteAllJob,
    DeleteJob,
    DownloadJob,
    ExistsJob,
    Job,
    Level,
    LookupJob,
    ServersJob,
    StudiesJob,
    TraceJob,
    UploadJob,
    read_job,
)
from courier.overview import JobList, JobQuery, Overview
from courier.queues import OLD_QUEUES, QUEUES, QueueContents, count, left_by_killed_workers
from courier.redaction import redact_job
from courier.settings import QueueSettings, Settings
from courier.telemetry import SendEvent, carrier, observe
from courier.waits import WOKEN
from producer.batches import BatchClient
from producer.dead_letters import DeadLetterClient
from producer.errors import (
    BrokerUnavailable,
    InvalidRequest,
    NotFound,
)
from producer.handle import Handle, Report, Result_co, newer, read_result, read_standing
from producer.notifications import Notifications, Rotation
from producer.results import (
    AuditResult,
    DatabaseResult,
    DeleteAllResult,
    DeleteResult,
    DownloadResult,
    FoundResult,
    StatusResult,
    StorageResult,
    StudiesResult,
    TraceResult,
    UploadResult,
)
from producer.server_orders import ServerClient

log = logging.getLogger(__name__)

_UNREACHABLE = (redis.ConnectionError, redis.TimeoutError, kombu.exceptions.OperationalError, BackendError)
#: While a program waits, all its jobs are read this often, whatever is published of them, and the ledger is asked for
#: those that the result back-end has no entry of.
_LEDGER_POLL_S = 1.0
#: How often a program looks whether it can still read the ledger.
_SCHEMA_S = 10.0
#: What Celery puts around a job.
_ENVELOPE_BYTES = 4096


class Courier:
    """A program's connection to the workers.

    Every method that enqueues a job takes ``requested_by`` and ``reason``, one line of text each (200 and 1000
    characters at most): they are kept with the job for history and audit, and shown by `trace`.

    Parameters
    ----------
    settings
        Read from ``PACS_CONFIG`` and the environment unless given.
    broker_url, result_backend, ledger_url
        Instead of those in the settings. With a ``broker_url`` but no ``ledger_url`` the job is written down when a
        worker first sees it, as for any plain Celery client.

    Raises
    ------
    SettingsError
        A setting is wrong, or one of these URLs.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        broker_url: str | None = None,
        result_backend: str | None = None,
        ledger_url: str | None = None,
    ) -> None:
        self.settings = settings or Settings.load()
        tracing.trace(self.settings.telemetry)
        queue = self.settings.queue.at(broker_url=broker_url, result_backend=result_backend, ledger_url=ledger_url)
        self._app = _celery(self.settings, queue)
        self._backend_lock, self._has_backend = threading.Lock(), False
        self._notifications = Notifications(self._backend)
        # Results have subscriptions of ours: with a back-end, Celery would subscribe to each one it sends, and not send
        # without it.
        self._sender = _celery(self.settings, queue.model_copy(update={"result_backend": "disabled://"}))
        jobs, results = self.settings.jobs, self.settings.results
        self._ledger = (
            None
            if broker_url and not ledger_url
            else Ledger.connect(
                queue.ledger_url, prefix=queue.key_prefix, grace_s=jobs.grace_s, keep_s=results.expires_s
            )
        )

        self._schema_read_until = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its connections. Those to the broker stay: Celery shares them among all apps of this program."""
        self._notifications.close()
        self._sender.close()
        self._app.close()
        celery_internals.disconnect(self._backend())
        if self._ledger is not None:
            self._ledger.close()

    def _backend(self) -> Any:
        """Where results are kept; if that is a Redis, one object for all threads, and so one pool of connections."""
        if not self._has_backend:
            with self._backend_lock:
                self._has_backend = self._app.backend is not None
        return self._app.backend

    def upload(
        self,
        image_url: str,
        *,
        server: str | None = None,
        idempotency_key: str | None = None,
        metadata: bool | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[UploadResult]:
        """Put the image at ``image_url`` (http, https, s3, az, file) into the PACS it belongs to.

        ``server`` asks for one server by name. The same ``idempotency_key`` twice is one job; with another wish it is
        `InvalidRequest`. A job that failed for a reason that can pass (``source_not_found``, ``source_denied``, a dead
        letter) is done again under its id. ``metadata=False`` leaves the DICOM metadata out of the result.
        """
        job = {
            "image_url": image_url,
            "server": server,
            "idempotency_key": idempotency_key,
            "metadata": metadata,
            **_stated(requested_by, reason),
        }
        return self.enqueue("pacs.upload", UploadJob, job)

    def exists(  # noqa: PLR0913 - each option by its name
        self,
        level: Level,
        uid: str,
        *,
        mode: str = "either",
        metadata: bool = False,
        study_uid: str | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[FoundResult]:
        """Who has the image, series or study that bears ``uid``.

        ``mode``: ``either`` (in order, the first that has it answers), ``both`` (one entry per server) or a server.
        ``study_uid``: only in that study; some servers find images and series only below their study.
        """
        job = {"level": level, "uid": uid, "mode": mode, "metadata": metadata, **_in_study(study_uid)}
        job |= _stated(requested_by, reason)
        return self.enqueue("pacs.exists", ExistsJob, job)

    def metadata(
        self,
        level: Level,
        uid: str,
        *,
        mode: str = "either",
        study_uid: str | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[FoundResult]:
        """The metadata of every image of the object that bears ``uid``; ``study_uid`` as in `exists`."""
        job = {"level": level, "uid": uid, "mode": mode, **_in_study(study_uid), **_stated(requested_by, reason)}
        return self.enqueue("pacs.metadata", LookupJob, job)

    def status(
        self, servers: Sequence[str] | None = None, *, requested_by: str | None = None, reason: str | None = None
    ) -> Handle[StatusResult]:
        """Who answers, how fast, and what each server says of itself; of all servers, or of those named."""
        return self.enqueue("pacs.status", ServersJob, {**_of(servers), **_stated(requested_by, reason)})

    def storage(
        self, servers: Sequence[str] | None = None, *, requested_by: str | None = None, reason: str | None = None
    ) -> Handle[StorageResult]:
        """How much room each server says that it has."""
        return self.enqueue("pacs.storage", ServersJob, {**_of(servers), **_stated(requested_by, reason)})

    def database(
        self, servers: Sequence[str] | None = None, *, requested_by: str | None = None, reason: str | None = None
    ) -> Handle[DatabaseResult]:
        """Whether each server's database works."""
        return self.enqueue("pacs.database", ServersJob, {**_of(servers), **_stated(requested_by, reason)})

    def delete(  # noqa: PLR0913 - each option by its name
        self,
        level: Level,
        uid: str,
        *,
        servers: Sequence[str] | None = None,
        permanent: bool = True,
        dry_run: bool = False,
        study_uid: str | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[DeleteResult]:
        """Delete what bears ``uid``, on every server or on those named.

        ``permanent=False`` only hides it, where a server can; ``dry_run`` says what would happen; ``study_uid`` as in
        `exists`.
        """
        job = {"level": level, "uid": uid, **_of(servers), "permanent": permanent, "dry_run": dry_run}
        more = {**_in_study(study_uid), **_stated(requested_by, reason)}
        return self.enqueue("pacs.delete", DeleteJob, {**job, **more})

    def studies(  # noqa: PLR0913 - each option by its name
        self,
        *,
        mode: str = "both",
        filters: Mapping[str, str] | None = None,
        limit: int = 500,
        cursor: str | None = None,
        newest_first: bool = False,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[StudiesResult]:
        """One page of the list of all servers' studies; its ``cursor`` asks for the next.

        `producer.studies.walk` goes through all pages, `producer.studies.StudyList` merges them.
        """
        job = {"mode": mode, "filters": dict(filters or {}), "limit": limit, "cursor": cursor}
        job["newest_first"] = newest_first
        return self.enqueue("pacs.list_studies", StudiesJob, {**job, **_stated(requested_by, reason)})

    def download(
        self,
        study_uid: str,
        destination: str,
        *,
        format: Literal["zip", "files"] = "zip",
        mode: str = "either",
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[DownloadResult]:
        """Bring a study to the ZIP file or folder that ``destination`` (file, s3) names; it overwrites nothing."""
        job = {"study_uid": study_uid, "destination": destination, "format": format, "mode": mode}
        return self.enqueue("pacs.download", DownloadJob, {**job, **_stated(requested_by, reason)})

    def audit(  # noqa: PLR0913 - each option by its name
        self,
        servers: Sequence[str] | None = None,
        *,
        filters: Mapping[str, str] | None = None,
        study_uid: str | None = None,
        maintenance: str | None = None,
        limit: int = 500,
        cursor: str | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[AuditResult]:
        """The studies that are on more than one server, ``limit`` at a time; ``cursor`` asks for the next.

        With ``study_uid`` that study alone, and the images in which its copies differ, ``limit`` at a time. With
        ``maintenance`` the studies alone that were stored elsewhere while that server was in maintenance.
        `producer.audits` goes through all pages.
        """
        job = {**_of(servers), "filters": dict(filters or {}), "study_uid": study_uid, "limit": limit, "cursor": cursor}
        job["maintenance"] = maintenance
        return self.enqueue("pacs.audit", AuditJob, {**job, **_stated(requested_by, reason)})

    def trace(self, uid: str, *, requested_by: str | None = None, reason: str | None = None) -> Handle[TraceResult]:
        """Why the image, series or study that bears ``uid`` is where it is."""
        return self.enqueue("pacs.trace", TraceJob, {"uid": uid, **_stated(requested_by, reason)})

    def delete_all(  # noqa: PLR0913 - each option by its name
        self,
        confirm: str = "",
        *,
        servers: Sequence[str] | None = None,
        permanent: bool = True,
        backup: str | None = None,
        confirm_studies: int | None = None,
        dry_run: bool = False,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[DeleteAllResult]:
        """Delete every study, on every server or on those named, as a batch that bears the handle's id.

        ``confirm`` has to be "delete all studies", but for a ``dry_run``, which only counts them. ``backup``: a folder,
        ``s3://…`` or ``az://…`` where a copy of each study is written first, from which the batch can be undone.
        """
        job = {
            **_of(servers),
            "confirm": confirm,
            "confirm_studies": confirm_studies,
            "permanent": permanent,
            "backup": backup,
            "dry_run": dry_run,
            **_stated(requested_by, reason),
        }
        job_id = str(uuid.uuid4())
        return self.enqueue("pacs.delete_all", DeleteAllJob, job, job_id=job_id, batch_id=job_id)

    @property
    def batch(self) -> BatchClient:
        """Batches: ordering them, how far they are, pausing, resuming, cancelling, undoing, and their reports."""
        if self._ledger is None:
            raise BrokerUnavailable("Batches are in the ledger; give ledger_url.")
        self._check_schema()
        return BatchClient(self._ledger, self.enqueue)

    @property
    def dead(self) -> DeadLetterClient:
        """Dead letters: listing, showing, replaying and purging them."""
        if self._ledger is None:
            raise BrokerUnavailable("Dead letters are in the ledger; give ledger_url.")
        self._check_schema()
        return DeadLetterClient(self._ledger, forget=self._forget, send=self._send)

    @property
    def servers(self) -> ServerClient:
        """Taking servers out of service, and back."""
        if self._ledger is None:
            raise BrokerUnavailable("Which servers are out of service is in the ledger; give ledger_url.")
        self._check_schema()
        return ServerClient(self._ledger, [server.name for server in self.settings.servers])

    @property
    def overview(self) -> Overview:
        """Questions to the ledger about jobs, servers and batches, which change nothing."""
        if self._ledger is None:
            raise BrokerUnavailable("Which jobs there are, the ledger says; give ledger_url.")
        self._check_schema()
        return Overview(self._ledger)

    def jobs(  # noqa: PLR0913 - each filter by its name
        self,
        *,
        states: Collection[str] = (),
        kind: str = "",
        code: str = "",
        server: str = "",
        since: datetime | None = None,
        before: datetime | None = None,
        limit: int = 50,
    ) -> JobList:
        """Open jobs and those that ended last, ``limit`` at most, with what each waits for or failed of.

        ``states`` are of running, waiting, queued, done, failed, dead; ``kind`` is a task without its ``pacs.``;
        ``code`` is why a job waits or failed; ``server`` has to do with it; it was enqueued ``since`` and ``before``
        (both with a time zone). A bounded number of jobs is looked at; the list's ``open_jobs`` says whether those were
        all.
        """
        since_s, before_s = (moment.timestamp() if moment else None for moment in (since, before))
        which = JobQuery(tuple(states), kind, code, server, since_s, before_s)
        with reachable():
            return self.overview.jobs(which, limit=limit)

    def enqueue(
        self, task: str, kind: type[Job], job: Mapping[str, Any], *, job_id: str | None = None, batch_id: str = ""
    ) -> Handle:
        """Write a job down and send its message. Wrong fields are refused here, before anything is sent.

        ``job_id`` is that of a job whose batch is planned already; ``batch_id`` the batch that a job is about.
        """
        job = {"version": 1, **{name: value for name, value in job.items() if value is not None}}
        read_job(kind, job)
        if len(json.dumps(job)) > MESSAGE_BYTES - _ENVELOPE_BYTES:
            raise InvalidRequest(f"The job is too large for a message, which is {MESSAGE_BYTES} bytes at most.")
        handle = Handle(job_id or job_id_for(job.get("idempotency_key")), self, batch_id)
        with observe(SendEvent(task, handle.id)):
            trace = carrier().get("traceparent", "")
            self._check_schema()
            with reachable():
                known = self._ledger is not None and not self._ledger.submit(
                    handle.id, task=task, job=job, trace=trace, again=True
                )
            if not known and job.get("idempotency_key"):
                with contextlib.suppress(BrokerUnavailable):
                    self._forget(handle.id)  # how the job failed that bore the key before
            if not known:
                self._send(DueJob(handle.id, task, job, trace))
        return handle

    def _check_schema(self) -> None:
        """Raise `BrokerUnavailable` where the ledger was written by a release that this one cannot read."""
        if self._ledger is None or time.monotonic() < self._schema_read_until:
            return
        with reachable():
            reason = peers.cannot_read(self._ledger.schema())
        if reason:
            raise BrokerUnavailable(reason)
        self._schema_read_until = time.monotonic() + _SCHEMA_S

    def _forget(self, job_id: str) -> None:
        with reachable():
            celery_internals.forget_result(self._backend(), job_id)

    def _send(self, due: DueJob) -> None:
        try:
            with reachable():
                self._sender.send_task(
                    due.task,
                    kwargs={"job": due.job},
                    task_id=due.job_id,
                    argsrepr="()",
                    kwargsrepr=redact_job(due.job),
                    headers={**due.headers, WOKEN: True, **({"traceparent": due.trace} if due.trace else {})},
                )
        except BrokerUnavailable:
            if self._ledger is None:
                raise
            log.warning("The message of job %s could not be sent; it is in the ledger and will be woken", due.job_id)
            with contextlib.suppress(redis.RedisError):
                self._ledger.unsent([due.job_id])

    @property
    def ledger(self) -> Ledger | None:
        """The ledger, if this program knows where it is."""
        return self._ledger

    def workers(self, timeout_s: float = 2.0) -> dict[str, list[str]]:
        """The workers that answer within ``timeout_s``, each with the queues it consumes.

        Workers of other applications answer too, and may bear the same name: those that consume none of our queues
        and are not in the ledger are left out, as are workers of version 0.1.
        """
        # A connection of its own: Redis may have closed those that the program has kept.
        with reachable(), self._app.connection_for_write() as connection:
            asked = {"reply": True, "timeout": timeout_s, "connection": connection}
            answers = self._app.control.broadcast("active_queues", **asked) or []
            known = self._ledger.workers(now_s=time.time()) if self._ledger else {}
        found: dict[str, list[str]] = {}
        for name, queues in (item for answer in answers for item in answer.items()):
            names = [queue["name"] for queue in queues] if isinstance(queues, list) else []
            ours = any(queue in QUEUES for queue in names)
            if ours or (name in known and name not in found and not any(queue in OLD_QUEUES for queue in names)):
                found[name] = names
        return found

    def queue_depths(self) -> dict[str, int]:
        """How many messages wait in each of the product's queues."""
        with reachable(), self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            return {name: _depth(connection, name) for name in QUEUES}

    def old_queues(self) -> tuple[list[QueueContents], int]:
        """What of ours lies in queues of version 0.1, and how many messages its workers had taken; Redis alone says."""
        with reachable(), self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            if connection.transport.driver_type != "redis":
                return [], 0
            return count(connection.default_channel), left_by_killed_workers(connection.default_channel)

    def check_backend(self) -> None:
        """Ask the result back-end anything, and have a Redis keep a probe for a second.

        Raises
        ------
        BrokerUnavailable
            It does not answer, or refuses.
        """
        self._stored_reports([f"probe-{uuid.uuid4()}"])
        with reachable():
            celery_internals.store_probe(self._backend())

    def handle(self, job_id: str, *, batch_id: str = "") -> Handle:
        """The handle of a job that any program has enqueued."""
        return Handle(job_id, self, batch_id)

    def cancel(self, job_id: str) -> bool:
        """Ask for a job to end before its push; False if it is over or unknown. A batch ends with its job."""
        if self._ledger is None:
            raise BrokerUnavailable("Cancelling needs the ledger; give ledger_url.")
        self._check_schema()
        with reachable():
            return Batches(self._ledger).cancel_job(job_id) in ("queued", "running", "waiting")

    def reports(self, job_ids: Iterable[str]) -> dict[str, Report]:
        """What is known of several jobs, read in one go: by the result back-end, and by the ledger of the others."""
        ids = list(job_ids)
        return self._refined(ids, self._stored_reports(ids))

    def _refined(self, ids: Iterable[str], stored: Mapping[str, Report]) -> dict[str, Report]:
        """What the result back-end says, and the ledger of those jobs that have not ended there.

        An entry of a job that waits is as old as its last attempt; the ledger knows whether it is woken by now.
        """
        ended = {job_id: report for job_id, report in stored.items() if report.over and not report.revoked}
        if self._ledger is None:
            return self._ledger_reports(job_id for job_id in ids if job_id not in stored) | dict(stored)
        asked = self._ledger_reports(job_id for job_id in ids if job_id not in ended)
        return ended | {job_id: newer(stored.get(job_id), report) for job_id, report in asked.items()}

    def _stored_reports(self, ids: Sequence[str]) -> dict[str, Report]:
        """What the result back-end says of those jobs that it has an entry of."""
        with reachable():
            rows = celery_internals.read_results(self._backend(), ids)
        return {job_id: read_result(row) for job_id, row in rows.items()}

    def _ledger_reports(self, job_ids: Iterable[str]) -> dict[str, Report]:
        """What the ledger says of jobs that the result back-end has no entry of, or no longer has one."""
        ids = list(job_ids)
        if self._ledger is None:
            return {job_id: Report("queued", "queued") for job_id in ids}
        self._check_schema()
        with reachable():
            known = self._ledger.standing(ids)
        unknown = {
            job_id: Report("unknown", "unknown", error=self._not_known(job_id)) for job_id in ids if job_id not in known
        }
        return {job_id: read_standing(standing) for job_id, standing in known.items()} | unknown

    def _not_known(self, job_id: str) -> NotFound:
        return NotFound(
            f"Neither the result back-end nor the ledger has an entry of job {job_id}. It was never enqueued, or its"
            f" outcome has expired (results.expires_s is {self.settings.results.expires_s} s), or a plain Celery client"
            " sent it and no worker has seen it yet."
        )

    def known(self, job_id: str) -> bool:
        """Whether the result back-end or the ledger has an entry of the job."""
        return self.reports([job_id])[job_id].status != ("queued" if self._ledger is None else "unknown")

    def must_know(self, job_id: str) -> Handle:
        """The handle of a job that exists; `NotFound` otherwise."""
        if not self.known(job_id):
            raise self._not_known(job_id)
        return self.handle(job_id)

    def as_completed(
        self, handles: Iterable[Handle[Result_co]], *, timeout_s: float | None = None
    ) -> Iterator[tuple[Handle[Result_co], Report[Result_co]]]:
        """Each handle with its last report, as they end. After ``timeout_s`` the rest is left out.

        Two handles of one job are both given.
        """
        for handle, report in self.watch(handles, timeout_s=timeout_s):
            if report.over:
                yield handle, report

    def watch(
        self, handles: Iterable[Handle[Result_co]], *, timeout_s: float | None = None
    ) -> Iterator[tuple[Handle[Result_co], Report[Result_co]]]:
        """Each handle with each change of its report, until all are over or ``timeout_s`` has passed.

        A job that is ``unknown`` is waited for as long as a message may need to reach a worker (``jobs.grace_s``).
        """
        open_handles: dict[str, list[Handle[Result_co]]] = {}
        for handle in handles:
            open_handles.setdefault(handle.id, []).append(handle)
        shown: dict[str, tuple[object, ...]] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for reports, at_the_end in self._polled(open_handles, deadline):
            for job_id, report in reports.items():
                if report.status == "unknown" and not at_the_end:
                    continue
                if shown.get(job_id) != (seen := (report.status, report.stage, report.waits_for)):
                    shown[job_id] = seen
                    for handle in open_handles[job_id]:
                        yield handle, report
                if report.over:
                    del open_handles[job_id]

    def _polled(self, job_ids: Mapping[str, Any], deadline: float | None) -> Iterator[tuple[dict[str, Report], bool]]:
        """Reports of what is left of ``job_ids``, as they are published; whether what is ``unknown`` now stays so."""
        patience = time.monotonic() + self.settings.jobs.grace_s
        ask_ledger_at = time.monotonic()
        read, asked, due = Rotation(job_ids), Rotation(job_ids), list(job_ids)
        with contextlib.closing(self._notifications.subscription()) as subscription:
            while job_ids:
                now = time.monotonic()
                last = deadline is not None and now >= deadline
                reports = self._stored_reports(due := list(job_ids) if last else due)
                if last or now >= ask_ledger_at:
                    new = [job_id for job_id in due if job_id not in reports or reports[job_id].revoked]
                    reports |= self._refined(due if last else new, reports)
                    ask_ledger_at = now + _LEDGER_POLL_S
                elif self._ledger is not None:
                    reports = {job_id: report for job_id, report in reports.items() if not report.revoked}
                yield reports, last or now >= patience
                if last or not job_ids:
                    return
                published = subscription.wait(job_ids, due, until=min(ask_ledger_at, deadline or ask_ledger_at))
                ask = time.monotonic() >= ask_ledger_at
                due = asked.next() if ask else read.next() if published is None else list(published)


def _depth(connection: Connection, queue: str) -> int:
    channel: Any = connection.default_channel
    try:
        return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:  # nothing was ever sent to it
        return 0


def _celery(settings: Settings, queue: QueueSettings) -> Celery:
    app = celery_internals.GuestCelery("pacs-producer", loader="app", set_as_current=False)
    app.backend_cls = queue.result_backend
    app.config_from_object(celery_settings)
    app.conf.update(
        **queue.for_celery,
        # The program's CELERY_BROKER_URL wins over the plain key.
        broker_read_url=queue.broker_url,
        broker_write_url=queue.broker_url,
        result_backend_thread_safe=queue.result_backend.partition("://")[0] in (*redis_urls.SCHEMES, "sentinel"),
        result_expires=settings.results.expires_s,
        task_publish_retry=False,
    )
    if settings.queue.signing.on:
        from courier import signing  # noqa: PLC0415  # loads cryptography, which only those need who sign

        signing.install(app, settings.queue.signing)
    return app


def _of(servers: Sequence[str] | None) -> dict[str, Sequence[str] | None]:
    """The names as a list; one name alone is passed on as it is, to be refused: it is a list of letters."""
    return {"servers": servers if servers is None or isinstance(servers, str) else list(servers)}


def _in_study(study_uid: str | None) -> dict[str, str]:
    """Only where it is given: an older worker refuses fields of a deletion that it does not know."""
    return {} if study_uid is None else {"study_uid": study_uid}


def _stated(requested_by: str | None, reason: str | None) -> dict[str, str | None]:
    return {"requested_by": requested_by, "reason": reason}


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Inside, what Redis refuses, or does not answer, is `BrokerUnavailable`."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise BrokerUnavailable(
            "Redis has no memory left and took nothing; give it more (maxmemory), then send the job again."
        ) from error
    except (redis.AuthenticationError, redis.ResponseError) as error:
        raise BrokerUnavailable(refusal(error)) from error
    except _UNREACHABLE as error:
        raise BrokerUnavailable(
            f"Redis cannot be reached ({type(error).__name__}); check BROKER_URL, RESULT_BACKEND and LEDGER_URL."
        ) from error


def refusal(error: redis.AuthenticationError | redis.ResponseError) -> str:
    """What Redis answered instead of doing what it was asked, and what to do; of the command nothing."""
    if isinstance(error, redis.exceptions.ClusterCrossSlotError | redis.exceptions.AskError):
        return (
            "Redis is in cluster mode: a ledger there needs a hash tag in queue.key_prefix, and in ledger_url the node"
            " that serves it; broker and results cannot be there (docs/settings.md)."
        )
    if isinstance(error, redis.exceptions.ReadOnlyError):
        return (
            "Redis is a replica that can only be read; name its primary in BROKER_URL, RESULT_BACKEND and LEDGER_URL."
        )
    return f"Redis refuses a command ({words_of(error)}); check BROKER_URL, RESULT_BACKEND and LEDGER_URL."
