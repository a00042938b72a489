"""A worker and a program that enqueues, whose ledger has a prefix of its own and lives on a Redis in cluster mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis import Redis

from producer import Courier
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import RedisPart, SandboxPart
from sandbox.synthetic import image, new_uid

TAGGED = "{courier-a}:"


def test_a_worker_does_all_its_work_below_the_prefix_on_a_redis_in_cluster_mode(
    redis: RedisPart, cluster_url: str, sandbox: SandboxPart, image_server: ImageServer, worker: Callable[..., Any]
) -> None:
    queue = {**parts.queue_settings(redis), "ledger_url": cluster_url, "key_prefix": TAGGED}
    running = worker(queue=queue, jobs={"sweep_s": 0.1})
    study = new_uid()
    urls = [image_server.put(f"{n}.dcm", image(study, side=16)) for n in range(6)]
    with Courier(running.settings) as courier:
        assert courier.upload(urls[0]).result(timeout_s=60)["status"] == "stored"
        assert courier.batch.upload(urls, requests_per_s=1000).result(timeout_s=60)["state"] == "done"
        assert courier.trace(study).result(timeout_s=30)["servers"]
        assert courier.delete("study", study).result(timeout_s=60)["servers"]
    with Redis.from_url(cluster_url, decode_responses=True) as client:
        keys = [str(key) for key in client.scan_iter("*")]
    assert [key for key in keys if not key.startswith(TAGGED)] == []
    assert {"job", "workers", "batch", "taken"} <= {key.removeprefix(TAGGED).partition(":")[0] for key in keys}
    with Redis.from_url(redis.ledger_url) as client:
        assert client.dbsize() == 0
