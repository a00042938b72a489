"""One job of each kind that something follows on, and what another application's worker saw of that.

A test sets up a `stage`, sends them all (`Canvases.send`), has something happen to them, and checks what followed
(`Canvases.check`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from celery import Celery, chain, chord, group, signature
from celery.canvas import Signature
from celery.result import AsyncResult

from courier import celery_settings
from courier.ledger.jobs import Ledger
from courier.settings import Settings
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import Child, Processes, RedisPart, SandboxPart, poll
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
#: What a worker of ours has taken and not ended; the other application's has Celery's own name for that.
UNACKED, UNACKED_INDEX = (celery_settings.broker_transport_options[f"unacked_{kind}"] for kind in ("key", "index_key"))
QUICK = {"lease_s": 2, "grace_s": 2, "sweep_s": 0.2, "backoff_base_s": 0.1, "backoff_cap_s": 0.5}
#: What the tests ask of it, by the primitive that is tested.
PRIMITIVES = ("link", "link_error", "chain", "chord", "failed chord", "group", "stamps")


def _foreign_worker(processes: Processes, redis_part: RedisPart) -> Child:
    """The other application's worker, on the same broker and result back-end."""
    command = [sys.executable, "-m", "celery", "-A", "tests.foreign", "worker", "--pool", "threads", "-Q", "mine"]
    command += ["--concurrency", "4", "--without-mingle", "--without-gossip", "--hostname", "foreign@mine"]
    environ = {
        "FOREIGN_BROKER": redis_part.broker_url,
        "FOREIGN_BACKEND": redis_part.result_backend,
        "FOREIGN_CALLS": redis_part.url(7),
    }
    child = processes.start(
        "foreign", [*command, "--loglevel", "INFO"], ready=lambda it: "foreign@mine ready." in it.log, environ=environ
    )
    child.wait_ready()
    return child


@dataclass
class Stage:
    """A client, another application's worker, and workers of ours as a test starts them."""

    redis: RedisPart
    sandbox: SandboxPart
    processes: Processes
    canvases: Canvases
    queue: Mapping[str, Any]
    settings: Settings = field(init=False)

    def config(self, **jobs: Any) -> Path:
        tree = {
            "servers": self.sandbox.servers(),
            "queue": {**parts.queue_settings(self.redis), **self.queue},
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": {**QUICK, **jobs},
            "breaker": {"failures": 1000},
        }
        path = parts.write_settings(self.processes.folder / f"pacs{len(self.processes.children)}.toml", tree)
        self.settings = Settings.load({"PACS_CONFIG": str(path)})
        return path

    def worker(self, *, jobs: Mapping[str, Any] | None = None) -> Child:
        name = f"ours{len(self.processes.children)}"
        child = parts.worker(self.processes, self.config(**(jobs or {})), name=name, concurrency=12)
        child.wait_ready()
        return child

    def sicken(self) -> None:
        for dialect in ("msdicom", "dcm4chee"):
            self.sandbox.set_fault(dialect, "query", status=503)


@contextlib.contextmanager
def stage(redis_part: RedisPart, sandbox: SandboxPart, folder: Path, **queue: Any) -> Iterator[Stage]:
    """All emptied and calm; at the end no worker may have logged a fault. ``queue``: more settings of that section."""
    redis_part.flush()
    sandbox.reset_faults()
    sandbox.empty()
    plain = Celery(broker=redis_part.broker_url, backend=redis_part.result_backend, set_as_current=False)
    with ImageServer() as images, Processes(folder) as processes:
        canvases = Canvases(plain, redis_part, images, sandbox.dcm4chee)
        try:
            _foreign_worker(processes, redis_part)
            yield Stage(redis_part, sandbox, processes, canvases, queue)
        finally:
            canvases.close()
        for child in processes.children:
            assert "Traceback (most recent call last)" not in child.log, child.log_tail(60)
            assert "SECRET" not in child.log


class Canvases:
    """``jobs`` are the ids of those that are sent first, ``results`` what a client waits for, by name."""

    def __init__(self, plain: Celery, redis_part: RedisPart, image_server: ImageServer, stored_at: str) -> None:
        self.plain, self._images, self._stored_at = plain, image_server, stored_at
        self._calls = redis.Redis.from_url(redis_part.url(7), decode_responses=True)
        self.broker_url = redis_part.broker_url
        self._broker = redis.Redis.from_url(redis_part.broker_url)
        self.ledger = Ledger.connect(redis_part.ledger_url)
        self.jobs: dict[str, str] = {}
        self.results: dict[str, AsyncResult] = {}
        self.ids: dict[str, str] = {}

    def close(self) -> None:
        self._calls.close()
        self._broker.close()
        self.ledger.close()
        consumer = self.plain.backend.result_consumer
        consumer.subscribed_to.clear()  # or a result that is collected later connects to unsubscribe
        consumer.stop()
        self.plain.backend.client.connection_pool.disconnect()
        self.plain.close()

    def upload(self, name: str = "", *, fails: bool = False) -> Signature:
        """Of a new image; one that ``fails`` is there already. With a ``name`` it is one of `jobs`."""
        body = image(new_uid())
        if fails:
            stow(self._stored_at, body)
        url = self._images.put(f"{uuid.uuid4()}.dcm", body)
        job = {"image_url": f"{url}?sig=SECRET", "metadata": False}
        found = signature("pacs.upload", kwargs={"job": job}, app=self.plain, immutable=True)
        found.set(queue=celery_settings.task_default_queue, task_id=str(uuid.uuid4()))
        if name:
            self.jobs[name] = found.options["task_id"]
        return found

    def after(self, tag: str, *, named: bool = True) -> Signature:
        found = signature("mine.after", kwargs={"tag": tag}, app=self.plain, queue="mine")
        if named:
            self.ids[tag] = str(uuid.uuid4())
            found.set(task_id=self.ids[tag])
        return found

    def send(self) -> None:
        """One canvas for each primitive."""
        ours = self.upload()
        ours.link(self.after("ours"))
        both = group([self.after("one of a group", named=False), self.after("other of a group", named=False)])
        first = self.upload("link")
        self.results["ours"] = self.plain.AsyncResult(ours.options["task_id"])
        self.results["link"] = first.apply_async(link=[self.after("link"), ours, both])
        failing = self.upload("link_error", fails=True)
        self.results["link_error"] = failing.apply_async(link=self.after("never"), link_error=self.after("link_error"))
        self.results["chain"] = chain(self.upload("chain"), self.upload(), self.after("chain")).apply_async()
        header = [self.upload("chord a"), self.upload("chord b")]
        self.results["chord"] = chord(header)(self.after("chord"))
        header = [self.upload("bad chord a"), self.upload("bad chord b", fails=True)]
        body = self.after("never either")
        body.link_error(self.after("failed chord"))
        self.results["failed chord"] = chord(header)(body)
        members = group([self.upload("group a"), self.upload("group b")])
        self.results["group"] = members.apply_async()
        stamped, after = self.upload("stamps"), self.after("stamps")
        for one in (stamped, after):
            one.stamp(order="7")
        stamped.link(after)
        self.results["stamps"] = stamped.apply_async()

    def headers(self) -> dict[str, dict[str, Any]]:
        """Those of each message that waits, by the job's name."""
        rows = self._broker.lrange(celery_settings.task_default_queue, 0, -1)
        by_id = {headers["id"]: headers for headers in (json.loads(row)["headers"] for row in rows)}
        return {name: by_id[job_id] for name, job_id in self.jobs.items() if job_id in by_id}

    def copies(self) -> list[bytes]:
        """Each message that waits, as a broker would deliver it a second time."""
        found = []
        for raw in self._broker.lrange(celery_settings.task_default_queue, 0, -1):
            message = json.loads(raw)
            message["properties"]["delivery_tag"] = str(uuid.uuid4())
            found.append(json.dumps(message).encode())
        return found

    def deliver(self, messages: list[bytes]) -> None:
        self._broker.lpush(celery_settings.task_default_queue, *messages)

    def give_back(self) -> None:
        """Messages that workers held when they died, as the broker gives them back after its two hours."""
        for tag, row in self._broker.hgetall(UNACKED).items():
            message, _, routing_key = json.loads(row)
            self._broker.lpush(routing_key, json.dumps(message))
            self._broker.hdel(UNACKED, tag)
            self._broker.zrem(UNACKED_INDEX, tag)

    def is_quiet(self) -> bool:
        """No message waits or is at work."""
        names = (celery_settings.task_default_queue, "mine")
        return not any(self._broker.llen(name) for name in names) and not any(
            self._broker.hlen(name) for name in (UNACKED, "unacked")
        )

    def states(self) -> dict[str, str]:
        return {name: self.ledger.read_record(job_id).get("state", "") for name, job_id in self.jobs.items()}

    def wait_until_all_are(self, *states: str) -> None:
        found = poll(lambda: set(self.states().values()) <= set(states), timeout_s=WAIT_S)
        assert found, self.states()

    def wait_for_all(self, *tags: str) -> None:
        """Until these were called, and until there is nothing more to come."""
        assert poll(lambda: set(tags) <= set(self.calls()), timeout_s=WAIT_S), sorted(self.calls())
        assert poll(self.is_quiet, timeout_s=WAIT_S)
        time.sleep(1)
        assert poll(self.is_quiet, timeout_s=WAIT_S)

    def calls(self) -> dict[str, list[dict[str, Any]]]:
        """By tag, each call of the other application's task."""
        found = defaultdict(list)
        for row in self._calls.lrange("calls", 0, -1):
            call = json.loads(row)
            found[call["tag"]].append(call)
        return dict(found)

    def check(self, primitive: str, *, most: int = 1) -> None:
        """What followed on the job of this ``primitive``; each was called once, or ``most`` times under one id."""
        getattr(Checks(self, most=most), primitive.replace(" ", "_"))()

    def kept(self) -> dict[str, dict[str, str]]:
        """What the ledger still has of follow-ups, by job."""
        names = ("follow_ups", "telling_ms", "followed")
        rows = {
            name: self.ledger.client.hmget(self.ledger.key("job", job_id), names) for name, job_id in self.jobs.items()
        }
        return {name: dict(zip(names, row, strict=True)) for name, row in rows.items() if any(row)}


#: The tags of all calls that follow where every job ends as it should.
ALL = (
    *("link", "ours", "one of a group", "other of a group", "link_error", "chain", "chord", "failed chord", "stamps"),
)


class Checks:
    """What followed on the job of each primitive; each follow-up was called once, or ``most`` times under one id."""

    def __init__(self, canvases: Canvases, *, most: int = 1) -> None:
        self._canvases, self._most = canvases, most
        self._calls = canvases.calls()
        assert not {"never", "never either"} & set(self._calls)

    def called(self, tag: str) -> dict[str, Any]:
        calls = self._calls[tag]
        assert 1 <= len(calls) <= self._most, calls
        assert {call["id"] for call in calls} == {self._canvases.ids.get(tag, calls[0]["id"])}
        assert all("SECRET" not in json.dumps([call["argsrepr"], call["kwargsrepr"]]) for call in calls)
        return calls[0]

    def result(self, job_id: str) -> Any:
        return self._canvases.plain.AsyncResult(job_id).get(timeout=WAIT_S)

    def payload(self, name: str) -> Any:
        return self.result(self._canvases.jobs[name])

    def link(self) -> None:
        call, job_id = self.called("link"), self._canvases.jobs["link"]
        assert (call["args"], call["parent_id"], call["root_id"]) == ([self.payload("link")], job_id, job_id)
        for tag in ("one of a group", "other of a group"):
            assert self.called(tag)["args"] == [self.payload("link")]
        ours = self.result(self._canvases.results["ours"].id)
        assert (ours["status"], ours["attempts"]) == ("stored", 1)
        assert self.called("ours")["args"] == [ours]

    def link_error(self) -> None:
        assert self.called("link_error")["args"] == [self._canvases.jobs["link_error"]]

    def chain(self) -> None:
        (stored,) = self.called("chain")["args"]
        result = self._canvases.results["chain"]
        assert (stored["job_id"], self.result(result.id)) == (result.parent.id, "chain")

    def chord(self) -> None:
        assert self.called("chord")["args"] == [[self.payload("chord a"), self.payload("chord b")]]
        assert self.result(self._canvases.results["chord"].id) == "chord"

    def failed_chord(self) -> None:
        self.called("failed chord")
        assert self._canvases.results["failed chord"].state == "FAILURE"

    def group(self) -> None:
        results = self._canvases.results["group"]
        metas = [self._canvases.plain.backend.get_task_meta(one.id, cache=False) for one in results]
        assert [meta["result"]["status"] for meta in metas] == ["stored", "stored"]
        assert [meta["group_id"] for meta in metas] == [results.id, results.id]

    def stamps(self) -> None:
        assert self.called("stamps")["stamps"] == {"order": "7"}
