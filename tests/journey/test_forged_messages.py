"""Messages whose ids are unusual, and such whose headers or follow-ups are of the wrong kind, beside good jobs.

A real worker with two slots gets them all, on threads, on processes, and where messages are signed. What is wrong ends
as `invalid_request` under its id and nothing of it is done; no slot is held, and no process of the pool ends.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import chunks, signature
from celery.security.certificate import Certificate
from celery.security.key import PrivateKey
from celery.security.serialization import SecureSerializer
from kombu.serialization import registry
from redis import Redis

from courier.settings import Settings
from producer import Courier
from producer.errors import CourierError, InvalidRequest
from sandbox import processes as parts
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid
from tests.chaos.crew import children_of
from tests.journey.test_signing import make_pair

WAIT_S = 60
FORGED = "2026-01-01 00:00:00,000 INFO job-1 worker.jobs.runner: Done after 1 attempt(s)"
FOLLOW_UP = {
    "task": "reports.note",
    "args": [],
    "kwargs": {},
    "options": {"queue": "reports"},
    "subtask_type": None,
    "immutable": True,
}

#: What is wrong with a header: name and value.
HEADERS: list[tuple[str, Any]] = [
    ("shadow", 5),
    ("shadow", ["x"]),
    ("shadow", f"x\n{FORGED}"),
    ("shadow", f"x\r{FORGED}"),
    ("timelimit", True),
    ("timelimit", [1]),
    ("timelimit", [True, "x"]),
    ("timelimit", {"hard": 1}),
    ("stamped_headers", -1),
    ("stamped_headers", "tier"),
    ("stamped_headers", [["tier"]]),
    ("stamps", [1]),
    ("eta", 5),
    ("eta", f"x\n{FORGED}"),
    ("eta", "9999-12-31T23:59:59-14:00"),
    ("expires", True),
    ("expires", "0001-01-01T00:00:00+14:00"),
    ("retries", "x"),
    ("group", 5),
    ("group", f"x\n{FORGED}"),
    ("group_index", "x"),
    ("root_id", {"a": 1}),
    ("root_id", f"x\n{FORGED}"),
    ("parent_id", [1]),
    ("ignore_result", "no"),
    ("replaced_task_nesting", "x"),
    ("origin", 5),
    ("argsrepr", 5),
    ("kwargsrepr", ["x"]),
    ("delivery_info", "x"),
    ("headers", "x"),
    ("lang", 5),
    ("get", "x"),
    ("_children", 5),
    ("callbacks", [FOLLOW_UP]),
    ("chord", FOLLOW_UP),
    ("is_eager", "x"),
    ("compression", "application/x-gzip"),
    ("x-other", json.loads("[" * 400 + "]" * 400)),
    ("stamps", json.loads('{"a":' * 400 + "1" + "}" * 400)),
]
#: What is wrong with the third part of a body.
EMBEDS: list[dict[str, Any]] = [
    {"callbacks": 5},
    {"callbacks": "reports.note"},
    {"callbacks": FOLLOW_UP},
    {"callbacks": [5]},
    {"callbacks": [{"task": "reports.note"}]},
    {"callbacks": [{**FOLLOW_UP, "options": {"countdown": "soon"}}]},
    {"callbacks": [{**FOLLOW_UP, "options": {"serializer": "no such"}}]},
    {"callbacks": [{**FOLLOW_UP, "options": {"stamped_headers": ["tier"]}}]},
    {"callbacks": [{**FOLLOW_UP, "subtask_type": "no such"}]},
    {"errbacks": True},
    {"errbacks": [["x"]]},
    {"chain": 5},
    {"chain": "reports.note"},
    {"chain": {"task": "reports.note"}},
    {"chain": [5]},
    {"chain": [None]},
    {"chord": 5},
    {"chord": "reports.note"},
    {"chord": [FOLLOW_UP]},
    {"chord": {**FOLLOW_UP, "chord_size": "x"}},
    {"id": "another-job"},
    {"delivery_info": 5},
    {"kwargs": {"job": {}}},
]
PROPERTIES: list[dict[str, Any]] = [
    {"correlation_id": 5},
    {"reply_to": ["x"]},
    {"priority": "x"},
    {"other": json.loads("[" * 400 + "]" * 400)},
]
#: What is wrong with the first part of a body, or with what stands beside the job in the second.
ARGUMENTS: list[tuple[list[Any], dict[str, Any]]] = [
    ([{}, 5], {}),
    ([{}], {}),
    ([], {"self": 5}),
    ([], {"beside": json.loads("[" * 400 + "]" * 400)}),
]

Encode = Callable[[str, list[Any]], tuple[str, str]]


@dataclass
class Door:
    """A queue to which anything can be pushed, as any program can that reaches Redis."""

    courier: Courier
    broker: Redis
    encode: Encode

    def push(
        self,
        url: str,
        job_id: str,
        *,
        args: Any = (),
        beside: Any = None,
        embed: Any = None,
        properties: Any = None,
        **headers: Any,
    ) -> str:
        embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **(embed or {})}
        content_type, body = self.encode(job_id, [list(args), {"job": {"image_url": url}, **(beside or {})}, embed])
        message = {
            "body": body,
            "content-type": content_type,
            "content-encoding": "utf-8",
            "headers": {"lang": "py", "task": "pacs.upload", "id": job_id, **headers},
            "properties": {
                "delivery_tag": str(uuid.uuid4()),
                "delivery_info": {"exchange": "", "routing_key": "pacs"},
                "correlation_id": job_id,
                **(properties or {}),
            },
        }
        self.broker.lpush("pacs", json.dumps(message))
        return job_id

    def ends(self, ids: list[str]) -> dict[str, str]:
        """The code, or the status, under each id."""
        found = {}
        handles = [self.courier.handle(job_id) for job_id in ids]
        for handle, report in self.courier.as_completed(handles, timeout_s=WAIT_S):
            found[handle.id] = report.error.payload["code"] if report.error else report.result["status"]
        return found


def plainly(job_id: str, body: list[Any]) -> tuple[str, str]:
    return "application/json", json.dumps(body)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "trusted").mkdir()
    _, certificate = make_pair(folder, "ours")
    (folder / "trusted" / certificate.name).write_bytes(certificate.read_bytes())
    return folder


@pytest.fixture(params=["threads", "processes", "threads, signed", "processes, signed"])
def door(request: pytest.FixtureRequest, worker: Any, redis: Any, keys: Path) -> Iterator[tuple[Any, Door]]:
    pool, _, signed = str(request.param).partition(", ")
    queue: dict[str, Any] = parts.queue_settings(redis)
    encode: Encode = plainly
    if signed:
        queue["signing"] = {
            "key_file": str(keys / "ours.key"),
            "certificate_file": str(keys / "ours.crt"),
            "trusted_folder": str(keys / "trusted"),
        }
        ours = SecureSerializer(
            PrivateKey((keys / "ours.key").read_text()), Certificate((keys / "ours.crt").read_text()), digest="sha256"
        )

        def signedly(job_id: str, body: list[Any]) -> tuple[str, str]:
            body = copy.deepcopy(body)
            body[2]["signed_for"] = ["pacs.upload", job_id, int(time.time())]
            return "application/data", ours.serialize(body)

        encode = signedly
    running = worker(
        concurrency=2,
        options=("--pool", pool),
        queue=queue,
        logs={"format": "text"},
        jobs={"sweep_s": 0.2, "grace_s": 5},
    )
    with (
        Courier(Settings.model_validate({"queue": queue})) as courier,
        Redis.from_url(redis.broker_url, decode_responses=True) as broker,
    ):
        yield running, Door(courier, broker, encode)
    if signed:
        registry.unregister("auth")


def test_forged_messages_end_under_their_ids_and_disturb_no_job(door: tuple[Any, Door], image_server: Any) -> None:
    running, queue = door
    children = children_of(running.child.pid)
    never = image_server.put("never.dcm", image(new_uid()))
    good, forged = [], []

    def put_a_good_one() -> None:
        url = image_server.put(f"good-{len(good)}.dcm", image(new_uid()))
        good.append(queue.push(url, f"good/{uuid.uuid4()}"))

    put_a_good_one()
    for name, value in HEADERS:
        forged.append(queue.push(never, f"{name}/{uuid.uuid4()}", **{name: value}))
        if len(forged) % 8 == 0:
            put_a_good_one()
    for embed in EMBEDS:
        forged.append(queue.push(never, f"embed/{uuid.uuid4()}", embed=embed))
    for properties in PROPERTIES:
        forged.append(queue.push(never, f"properties/{uuid.uuid4()}", properties=properties))
    for args, beside in ARGUMENTS:
        forged.append(queue.push(never, f"arguments/{uuid.uuid4()}", args=args, beside=beside))
    for job_id in ("a\nb", f"x\n{FORGED}", "\u202ea", "x" * 256, "!lost"):
        forged.append(queue.push(never, job_id))
    for loop in ("celery.map", "celery.starmap", "celery.chunks", "celery.chord_unlock"):
        forged.append(queue.push(never, f"loop/{uuid.uuid4()}", task=loop))
    put_a_good_one()
    ends = queue.ends([*forged, *good])
    assert {job_id: ends[job_id] for job_id in forged} == dict.fromkeys(forged, "invalid_request")
    assert {job_id: ends[job_id] for job_id in good} == dict.fromkeys(good, "stored")
    assert [path for path in image_server.requests if "never.dcm" in path] == []
    assert poll(lambda: queue.broker.hlen("pacs.unacked") == 0, timeout_s=WAIT_S), "a slot is held"
    assert children_of(running.child.pid) == children, "a process of the pool has ended"
    lines = running.log.splitlines()
    assert [line for line in lines if line.startswith("2026-01-01") or line.strip().startswith("2026-01-01")] == []
    assert running.log.count("Threw a message away") == len(forged)
    for _ in range(4):
        put_a_good_one()
    assert set(queue.ends(good[-4:]).values()) == {"stored"}


UNUSUAL = ["order/7", "a@b", "acc|1", "a=1", "a:b", "Bestellung-ü", "注文 7", "two words", "%s {}", "../7", "x" * 255]


def test_any_id_that_celery_accepts_ends_and_means_one_job(door: tuple[Any, Door], image_server: Any) -> None:
    running, queue = door
    urls = {job_id: image_server.put(f"{n}.dcm", image(new_uid())) for n, job_id in enumerate(UNUSUAL)}
    assert queue.ends([queue.push(url, job_id) for job_id, url in urls.items()]) == dict.fromkeys(UNUSUAL, "stored")
    for job_id in ("order/7", "Bestellung-ü"):
        assert queue.courier.handle(job_id).result(timeout_s=WAIT_S)["job_id"] == job_id
    assert queue.ends([queue.push(image_server.url("gone.dcm"), "gone/7")]) == {"gone/7": "source_not_found"}
    before = len(image_server.requests)
    queue.push(urls["a@b"], "a@b")
    other = image_server.put("other.dcm", image(new_uid()))
    for job_id in ("order/7", "gone/7"):
        queue.push(other, job_id)
        assert poll(lambda job_id=job_id: f"The id {job_id} belongs to another job" in running.log, timeout_s=WAIT_S)
    assert poll(lambda: queue.broker.hlen("pacs.unacked") == 0, timeout_s=WAIT_S)
    with pytest.raises(InvalidRequest, match="The id gone/7 belongs to another job"):
        queue.courier.handle("gone/7").result(timeout_s=WAIT_S)
    # Celery itself keeps a success: what was stored under the id stays the truth about it.
    for job_id in ("order/7", "a@b"):
        assert queue.courier.handle(job_id).result(timeout_s=WAIT_S)["source"] == urls[job_id]
    assert len(image_server.requests) == before


def test_a_loop_over_our_tasks_is_refused_and_not_put_back_for_ever(
    worker: Any, redis: Any, plain: Any, image_server: Any
) -> None:
    worker(concurrency=2)
    upload = signature("pacs.upload", app=plain)
    url = image_server.put("a.dcm", image(new_uid()))
    one = upload.clone(kwargs={"job": {"image_url": url}})
    # As `Task.map`, `starmap` and `chunks` of a program send it that has a task of this name.
    loops = [
        plain.send_task("celery.map", kwargs={"task": dict(one), "it": [{"image_url": url}]}),
        plain.send_task("celery.starmap", kwargs={"task": dict(one), "it": [[{"image_url": url}]]}),
        plain.send_task("celery.chunks", args=(dict(one), [[{"image_url": url}]], 1)),
    ]
    ours = chunks(upload, [({"image_url": url},)], 1, app=plain).group().apply_async()
    with Courier(broker_url=redis.broker_url, result_backend=redis.result_backend) as courier:
        for loop in (*loops, *ours.results):
            with pytest.raises(CourierError, match="runs no jobs here"):
                courier.handle(loop.id).result(timeout_s=WAIT_S)
    with Redis.from_url(redis.broker_url) as broker:
        assert poll(lambda: broker.hlen("pacs.unacked") == 0, timeout_s=WAIT_S)
    assert image_server.requests == []


@pytest.mark.parametrize("job_id", ["a:items", "order/7", "two words", "x" * 201])
def test_a_batch_bears_an_id_that_can_be_part_of_its_keys(worker: Any, redis: Any, plain: Any, job_id: str) -> None:
    worker(concurrency=2)
    plain.send_task(
        "pacs.delete_all", kwargs={"job": {"confirm": "delete all studies"}}, task_id=job_id, queue="pacs.batches"
    )
    with (
        Courier(broker_url=redis.broker_url, result_backend=redis.result_backend) as courier,
        pytest.raises(InvalidRequest, match="A batch bears its job's id"),
    ):
        courier.handle(job_id).result(timeout_s=WAIT_S)
