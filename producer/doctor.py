"""Is everything there that a job needs, and does it work: one finding per part, each with what to do about it.

It enqueues two questions: one about the servers, because a worker that answers a ping may still carry nothing, and one
about the places of sources and downloads, which a worker reads from, or writes a probe to that it removes at once: what
counts are its credentials and mounts. Otherwise the doctor only looks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import redis

from courier import tracing
from courier.ledger.jobs import SCHEMA, SILENT_S, Ledger
from courier.ledger.peers import Peers, cannot_read, release_of, schema_of
from courier.messages import StatusJob
from courier.queues import NAMED, OLD_QUEUES
from courier.settings import Settings, SettingsError, TelemetrySettings
from producer.client import Courier, refusal
from producer.errors import BrokerUnavailable, CourierError, StillRunning

#: How long a worker has to carry a question to all servers.
CARRY_S = 20.0
#: A job that nobody looked at for so long after it was due: no sweeper is at work.
OVERDUE_S = 30.0
#: How long a collector or a worker's port for metrics may take to be connected to.
LISTEN_S = 2.0
#: Clocks further apart than this make log lines and deadlines hard to compare.
CLOCK_S = 2.0

State = Literal["ok", "warning", "failed", "unavailable"]


@dataclass(frozen=True)
class Finding:
    """One line. ``unavailable`` is a failure of reachability; ``advice`` says what to do, "" if nothing."""

    check: str
    state: State
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(load: Callable[[], Settings] = Settings.load) -> Iterator[Finding]:
    """Look at everything, in the order in which a job meets it; what cannot work without another part is left out."""
    try:
        settings = load()
    except SettingsError as error:
        yield Finding("settings", "failed", str(error), "Correct that key (docs/settings.md).")
        return
    if not settings.servers:
        yield Finding("settings", "failed", "No servers are configured.", "Name a pacs.toml in PACS_CONFIG.")
        return
    yield Finding("settings", "ok", f"{len(settings.servers)} servers: {', '.join(s.name for s in settings.servers)}")
    yield from _patience(settings)
    yield from _proxy(settings)
    yield from _telemetry(settings.telemetry)
    try:
        courier = Courier(settings)
    except SettingsError as error:
        yield Finding("signing", "failed", str(error), "Correct that key (docs/signing.md).")
        return
    with courier:
        queues = _queues(courier)
        backend = _answers("result back-end", courier.check_backend, "RESULT_BACKEND")
        ledger = list(_ledger(courier.ledger)) if courier.ledger else []
        yield from (*queues, backend, *ledger)
        if queues[0].state == "ok":
            yield from _old_queues(courier)
        if all(finding.state != "unavailable" for finding in (*queues, backend, *ledger)):
            yield from _workers(courier)


def _patience(settings: Settings) -> Iterator[Finding]:
    """A watchdog must not take a server's allowed silence for the end of all work."""
    slowest = max(settings.servers, key=lambda server: server.read_timeout_s)
    if settings.worker.watchdog_s and settings.worker.hung_s <= slowest.read_timeout_s:
        found = f"worker.hung_s is {settings.worker.hung_s:g} s, read_timeout_s of {slowest.name} is not less"
        yield Finding("watchdog", "warning", found, "Set worker.hung_s to more: a patient worker would be ended.")


def _proxy(settings: Settings) -> Iterator[Finding]:
    """Through a proxy a worker sees no address of a source."""
    if settings.sources.proxy is not None:
        found = "workers fetch through a proxy and check host names alone: which addresses they lead to it has to check"
        advice = "Let the proxy refuse private, loopback and link-local addresses (docs/settings.md)."
        yield Finding("sources.proxy", "warning", found, advice)


def _telemetry(telemetry: TelemetrySettings) -> Iterator[Finding]:
    """Only what is switched on; that it is off is no finding."""
    if telemetry.otlp_endpoint is not None:
        where = urlsplit(telemetry.otlp_endpoint)
        port = where.port or (443 if where.scheme == "https" else 80)
        if not tracing.can_trace():
            advice = "pip install 'pacs-courier[telemetry]', or take telemetry.otlp_endpoint out."
            yield Finding("traces", "warning", "OpenTelemetry is not installed here", advice)
        elif not _listens(where.hostname or "", port):
            found = f"nobody listens at {where.hostname}:{port}"
            yield Finding("traces", "warning", found, "Start the collector, or correct telemetry.otlp_endpoint.")
        else:
            yield Finding("traces", "ok", f"go to {where.hostname}:{port}")
    if telemetry.metrics_port:
        host = "127.0.0.1" if telemetry.metrics_host in ("0.0.0.0", "::") else telemetry.metrics_host  # noqa: S104
        found = f"{host}:{telemetry.metrics_port}"
        if _listens(host, telemetry.metrics_port):
            yield Finding("metrics", "ok", f"are served at {found}")
        else:
            advice = "On the worker's machine: start it again with these settings. From elsewhere it cannot be seen."
            yield Finding("metrics", "warning", f"nobody listens at {found}", advice)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=LISTEN_S):
            return True
    except OSError:
        return False


def _answers(check: str, ask: Callable[[], object], variable: str) -> Finding:
    try:
        ask()
    except BrokerUnavailable as error:
        return Finding(check, "unavailable", str(error), f"Start Redis, or correct {variable}.")
    return Finding(check, "ok", "answers")


def _queues(courier: Courier) -> list[Finding]:
    try:
        depths = courier.queue_depths()
    except BrokerUnavailable as error:
        return [Finding("broker", "unavailable", str(error), "Start the broker, or correct BROKER_URL.")]
    waiting = ", ".join(f"{name}: {depth}" for name, depth in depths.items())
    return [Finding("broker", "ok", "answers"), Finding("queues", "ok", f"messages waiting: {waiting}")]


def _old_queues(courier: Courier) -> Iterator[Finding]:
    """What of ours lies where version 0.1 read; what other applications have there is no business of ours."""
    reads = courier.settings.queue.read_old_queues
    try:
        found, left = courier.old_queues()
    except BrokerUnavailable as error:
        yield Finding("old queues", "unavailable", str(error), "Start the broker, or correct BROKER_URL.")
        return
    for one in found:
        yield Finding(f"old queue {one.queue}", "warning", str(one), one.advice(reads=reads))
    if left:
        advice = "If no such worker runs any more, set queue.read_old_queues and restart a worker (docs/upgrade.md)."
        yield Finding("old queues", "warning", f"workers of version 0.1 had taken {left} messages", advice)


def _ledger(ledger: Ledger) -> Iterator[Finding]:
    try:
        before_s = time.time()
        away_s = ledger.clock_s() - (before_s + time.time()) / 2
        load = ledger.load(overdue_s=OVERDUE_S)
        ledger.probe()
        kept, schema = ledger.safekeeping(), ledger.schema()
    except (redis.AuthenticationError, redis.ResponseError) as error:
        yield Finding("ledger", "unavailable", refusal(error), "Correct LEDGER_URL or queue.key_prefix.")
        return
    except redis.RedisError as error:
        sentence = f"The ledger cannot be reached ({type(error).__name__})."
        yield Finding("ledger", "unavailable", sentence, "Start Redis, or correct LEDGER_URL.")
        return
    if reason := cannot_read(schema):
        yield Finding("ledger", "unavailable", reason, "Upgrade this installation: docs/upgrade.md.")
        return
    yield Finding("ledger", "ok", f"answers; {load.open} jobs are open")
    yield _persistence(kept)
    yield _eviction(kept)
    clock = f"this machine and Redis are {abs(away_s):.1f} s apart"
    if abs(away_s) > CLOCK_S:
        yield Finding("clock", "warning", clock, "Let both machines keep time by NTP.")
    else:
        yield Finding("clock", "ok", clock)
    if load.overdue:
        overdue = f"{load.overdue} jobs were due more than {OVERDUE_S:.0f} s ago"
        yield Finding("due jobs", "failed", overdue, "Start a worker: its sweeper wakes them.")
    else:
        yield Finding("due jobs", "ok", "none is overdue")
    if load.dead:
        yield Finding("dead letters", "warning", f"{load.dead}", "See why, and replay or drop them: pacs dead")
    else:
        yield Finding("dead letters", "ok", "none")


def _persistence(kept: dict[str, str]) -> Finding:
    if "appendonly" not in kept:
        return Finding("persistence", "warning", "Redis does not say", "Make sure that its append-only file is on.")
    if kept["appendonly"] == "yes":
        return Finding("persistence", "ok", "the append-only file is on")
    advice = "Set appendonly yes: a crash of Redis would lose jobs."
    return Finding("persistence", "failed", "the append-only file is off", advice)


def _eviction(kept: dict[str, str]) -> Finding:
    policy = kept.get("maxmemory-policy")
    if policy is None:
        return Finding("eviction", "warning", "Redis does not say", "Make sure that its policy is noeviction.")
    if policy == "noeviction" or kept.get("maxmemory") == "0":
        return Finding("eviction", "ok", f"nothing is evicted (policy {policy}, maxmemory {kept.get('maxmemory')})")
    return Finding("eviction", "failed", f"policy {policy}", "Set maxmemory-policy noeviction: jobs would vanish.")


def _workers(courier: Courier) -> Iterator[Finding]:
    """Who answers, who consumes what, and whether a job is really carried; that job asks the servers."""
    try:
        workers = courier.workers()
    except BrokerUnavailable as error:
        yield Finding("workers", "unavailable", str(error), "Start the broker, or correct BROKER_URL.")
        return
    if not workers:
        advice = "Start one: celery -A worker.app worker"
        yield Finding("workers", "failed", "no worker answers", advice)
        if courier.ledger is not None:  # one of version 0.1 is no answer, and has to be stopped all the same
            yield from (finding for finding in _progress(courier.ledger, set()) if finding.state != "ok")
        return
    yield Finding("workers", "ok", f"{len(workers)} answer: {', '.join(sorted(workers))}")
    if courier.ledger is not None:
        yield from _progress(courier.ledger, set(workers))
    consumed = {queue for queues in workers.values() for queue in queues}
    orphans = [queue for queue in NAMED if queue not in consumed]
    if orphans:
        named = ", ".join(orphans)
        yield Finding("consumers", "failed", f"nobody consumes {named}", f"Start a worker with -Q {','.join(orphans)}")
    begun_s = time.monotonic()
    try:
        payload = courier.status().result(timeout_s=CARRY_S)
    except StillRunning:
        found = f"a question was not carried within {CARRY_S:.0f} s"
        yield Finding(
            "progress", "failed", found, "All slots are busy or stuck: look at Flower, restart what is stuck."
        )
        return
    except CourierError as error:
        yield Finding("progress", "failed", str(error), "Look into the worker's log.")
        return
    yield Finding("progress", "ok", f"a question was carried in {time.monotonic() - begun_s:.1f} s")
    yield from (_server(entry) for entry in payload["servers"])
    well = [entry for entry in payload["servers"] if entry["status"] == "up"]
    yield from _places(courier, (well or payload["servers"])[0]["server_name"])


def _places(courier: Courier, server: str) -> Iterator[Finding]:
    """Whether a worker can read from the places of sources and write to those of downloads."""
    try:
        question = courier.enqueue("pacs.status", StatusJob, {"servers": [server], "places": True})
        payload = question.result(timeout_s=CARRY_S)
    except StillRunning:
        found = f"the places of sources and downloads were not tried within {CARRY_S:.0f} s"
        yield Finding("places", "warning", found, "Run this again when workers have free slots.")
        return
    except CourierError as error:
        yield Finding("places", "warning", str(error), "Look into the worker's log.")
        return
    yield from (_place(entry) for entry in payload.get("places", ()))


def _place(entry: dict[str, Any]) -> Finding:
    """One place, as the worker on ``host`` found it. An older worker tells of buckets for downloads alone."""
    use, state = entry.get("use", "download"), entry.get("state", "usable")
    check = f"{'source' if use == 'source' else 'place'} {entry['place']}"
    by = f" (tried on {entry['host']})" if entry.get("host") else ""
    if state in ("refused", "silent", "unknown") or entry["message"]:
        kind: State = "unavailable" if state == "silent" else "failed" if state == "refused" else "warning"
        return Finding(check, kind, entry["message"] + by, _to_do(entry["place"], use, state))
    if use == "source":
        found = "can be listed and read" if state == "usable" else "can be listed; nothing that could be read is in it"
        return Finding(check, "ok", found + by)
    if entry["overwrites"] == "prevented":
        return Finding(check, "ok", f"can be written; its store prevents that an object is overwritten{by}")
    advice = "Let no other program write there, or take a store that keeps If-None-Match (docs/jobs.md)."
    return Finding(
        check, "warning", f"can be written; its store does not prevent that an object is overwritten{by}", advice
    )


def _to_do(place: str, use: str, state: str) -> str:
    section = f"{use}s"
    if place.startswith("file:"):
        return f"Mount it on every worker, give their user the right to it, or take it out of {section}.folders."
    store = "azure" if place.startswith("az:") else "s3"
    if state == "silent":
        return f"Let the worker reach the store, or correct its address in {section}.{store}."
    return f"Correct {section}.{store}, or what its credential may do there (docs/settings.md)."


def _progress(ledger: Ledger, answering: set[str]) -> Iterator[Finding]:
    """What the workers' own watchdogs say: a worker that answers may still do nothing."""
    now_s = ledger.clock_s()
    told = ledger.workers(now_s=now_s)
    for name in sorted(answering | {name for name, said in told.items() if now_s - said["at"] < SILENT_S}):
        yield _worker(name, told.get(name), now_s)
    peers = Peers.of(ledger)
    if peers.difference:
        advice = f"Give all workers one list. {peers.consequence}"
        yield Finding("servers of the workers", "warning", peers.difference, advice)


def _worker(name: str, said: Mapping[str, Any] | None, now_s: float) -> Finding:
    check, advice = f"worker {name}", "Restart it; its log says where it is stuck (docs/observability.md)."
    if said is None or now_s - said["at"] > SILENT_S + said["every_s"]:
        return Finding(check, "failed", "answers, but its watchdog has said nothing lately", advice)
    if not said["ok"]:
        return Finding(check, "failed", f"is stuck: {said['complaint']}", advice)
    if schema_of(said) < SCHEMA:
        found = f"is of version {release_of(said)}: it cannot read what newer workers write"
        if "schema" not in said:
            found += f", reads {', '.join(OLD_QUEUES)}, and throws away what is not its own there"
        return Finding(check, "failed", found, "Stop it with SIGTERM, and start the new version (docs/upgrade.md).")
    if said.get("stopped_queues"):
        found = f"reads {', '.join(said['stopped_queues'])} no more: another application's message was the first there"
        return Finding(
            check, "warning", found, "If no old queue holds messages of ours, set queue.read_old_queues = false."
        )
    if said["complaint"]:
        return Finding(check, "warning", said["complaint"], "Look again in a minute.")
    return Finding(check, "ok", f"gets on; version {release_of(said)}")


def _server(entry: Mapping[str, Any]) -> Finding:
    check = f"server {entry['server_name']}"
    if entry.get("suspension"):
        command = "resume" if entry["suspension"]["state"] == "paused" else "maintenance --end"
        advice = f"When that is over: pacs server {command} {entry['server_name']}"
        return Finding(check, "warning", f"{entry['status']}. {entry['note']}", advice)
    if entry["status"] == "up":
        known = " ".join(told for name in ("product", "version") if (told := entry[name]) != "unknown")
        what = f"{known}. " if known else ""
        if entry.get("rate_limit"):
            advice = "Jobs go on at that rate. Ask its operator for a higher limit, or lower its max_concurrency."
            return Finding(check, "warning", f"up, {entry['latency_ms']:.0f} ms. {what}{entry['note']}".strip(), advice)
        if warnings := entry.get("warnings"):
            advice = "Nothing has to be done for uploads and batches; for the rest, name the study as well."
            return Finding(check, "warning", f"up, but: {' '.join(warnings)}", advice)
        return Finding(check, "ok", f"up, {entry['latency_ms']:.0f} ms. {what}{entry['note']}".strip())
    reason = entry["error"]["message"] if entry["error"] else entry["note"]
    if entry["status"] == "not responding":
        return Finding(check, "unavailable", f"not responding. {reason}", "Start it, or correct its url.")
    advice = "Correct its url." if "check the server's url" in reason else "Look at the server itself."
    return Finding(check, "unavailable", f"degraded. {reason}", advice)
