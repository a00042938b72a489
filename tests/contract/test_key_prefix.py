"""The prefix of all keys: every script on a Redis in cluster mode, and two deployments on one database."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
from limits import RateLimitItemPerSecond
from redis import Redis, ResponseError
from redis.commands.core import Script
from redis.exceptions import ReadOnlyError

from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches, ItemOutcome
from courier.ledger import peers
from courier.ledger.breakers import Breakers
from courier.ledger.jobs import (
    Attachment,
    IntentState,
    LeaseLost,
    Ledger,
    PendingFollowUps,
    PushIntent,
    Receipt,
    StoredCheckpoint,
    StoredImage,
    TakeState,
)
from courier.ledger.slots import Slots
from courier.settings import BreakerSettings, Settings
from courier.waits import WaitReason
from producer import Courier, doctor
from producer.errors import BrokerUnavailable
from sandbox.processes import RedisPart
from worker.batches.throttle import _limiter
from worker.pacs.server_rates import ServerRates

TAGGED = "{courier-a}:"


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The scripts that were registered and did not run. Each runs as one that Redis holds to its slots (``#!lua``)."""
    waiting: set[str] = set()
    register, call = Redis.register_script, Script.__call__

    def registered(self: Redis, script: str) -> Script:
        waiting.add(script)
        return register(self, f"#!lua\n{script}")

    def called(self: Script, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        assert keys, "a client of a cluster would not know where to send it"
        waiting.discard(str(self.script).removeprefix("#!lua\n"))
        return call(self, keys, args, client)

    monkeypatch.setattr(Redis, "register_script", registered)
    monkeypatch.setattr(Script, "__call__", called)
    return waiting


JOB = {"image_url": "https://a/b"}


def take(ledger: Ledger, job_id: str, **more: Any) -> int:
    ledger.wake_now(job_id, by_sweeper=True)
    taken = ledger.take(job_id, task="t", job={**JOB, **more})
    assert taken.state is TakeState.YOURS, taken
    return taken.fence


def end(ledger: Ledger, job_id: str, fence: int, **more: Any) -> None:
    ledger.finish(job_id, fence, outcome={"payload": {}}, code="done", task="t", job={**JOB, **more})
    ledger.published(job_id)


def live_jobs(ledger: Ledger) -> None:
    ledger.submit("u", task="t", job=JOB)
    fence = take(ledger, "u")
    assert ledger.heartbeat("u", fence)
    assert ledger.lock_image("1.2.1.1", job_id="u", fence=fence, into=["1.2", "1.2.1"]) is None
    assert ledger.claim_study("1.2", server="a", job_id="u").first
    assert ledger.claim_study("1.2", server="a", job_id="u", among=["a"], asked_for=True).server == "a"
    assert ledger.write_intent("u", fence, {"pending": "a"})
    assert ledger.intend_push("u", PushIntent(fence, {}, {"server": "a"}, "a", "00")).state is IntentState.WRITTEN
    checkpoint = StoredCheckpoint(fence, {"stored": True}, {})
    receipt = Receipt("u", "a", "00", 1)
    assert ledger.stored("1.2.1.1", "1.2", receipt, series_instance_uid="1.2.1", checkpoint=checkpoint)
    assert ledger.foresee("u", fence, WaitReason("c", "m"), delay_s=0)["code"] == "c"
    ledger.park("u", fence, delay_s=0, code="c", message="m")
    fence = take(ledger, "u")
    assert ledger.refused("u", fence, ResponseError("ERR no")) == 1
    end(ledger, "u", fence)
    with contextlib.suppress(LeaseLost):  # it has no follow-ups
        ledger.followed("u", PendingFollowUps("", 0, 0), sent=0)
    ledger.cancel_stamped("ward", ["7"])
    assert ledger.is_cancelled_by_stamp([("ward", "7")])
    assert ledger.deleting_for_s("u", "a", "1.2") < 60
    assert [note.event for note in ledger.uid_record("1.2.1.1").history] == ["routed", "stored", "waiting", "ended"]
    assert ledger.move_claim("1.2", server="b", job_id="u")
    ledger.forget_study("1.2")
    ledger.copying("b", "1.2", job_id="u")
    ledger.copied("b", "1.2", job_id="u", images=2)
    ledger.void("a", "1.2", None, None, job_id="u")
    ledger.void("a", "1.2", "1.2.1", "1.2.1.1", job_id="u")
    assert ledger.receipt("1.2.1.1") is None


def follow_ups(ledger: Ledger) -> None:
    taken = ledger.take("f", task="t", job=JOB, attached=Attachment("[1]", "h"))
    pending = ledger.finish("f", taken.fence, outcome={"payload": {}}, code="done", task="t", job=JOB)
    assert pending is not None
    ledger.followed("f", pending, sent=1, all_of_them=True)
    ledger.published("f")


def jobs_over_many_images(ledger: Ledger) -> None:
    fence = take(ledger, "many")
    images = [("1.3.1.1", "1.3", "1.3.1"), ("1.4.1.1", "1.4", "1.4.1")]
    assert ledger.lock_images(images, job_id="many", fence=fence) == [None, None]
    ledger.claim_study("1.3", server="a", job_id="many")
    ledger.stored_many("a", [StoredImage(image, study, series, "00", 1) for image, study, series in images], job_id="m")
    assert ledger.lock_for_delete("1.3", job_id="other", fence=take(ledger, "other")) == "many"
    ledger.release("other", fence=1)
    ledger.release_images(job_id="many", fence=fence, but=["1.4.1.1"], following=["1.4"])
    ledger.release_images(job_id="many", fence=fence)
    assert ledger.lock_destination("ab", job_id="many", fence=fence) is None
    ledger.release_destination(job_id="many", fence=fence)
    end(ledger, "many", fence)
    end(ledger, "other", 1)


def lost_and_dead_jobs(ledger: Ledger) -> None:
    keyed = {"idempotency_key": "k"}
    fence = take(ledger, "d", **keyed)
    ledger.hand_back("d", fence, task="t", job={**JOB, **keyed}, attempt=1)
    fence = take(ledger, "d", **keyed)
    ledger.end_as_dead_letter("d", fence, outcome={"error": {"code": "c"}}, code="c", task="t", job={**JOB, **keyed})
    (letter,) = ledger.dead_letters()
    assert letter.job_id == "d"
    assert ledger.submit("d", task="t", job={**JOB, **keyed}, again=True)
    fence = take(ledger, "d", **keyed)
    ledger.end_as_dead_letter("d", fence, outcome={"error": {"code": "c"}}, code="c", task="t", job={**JOB, **keyed})
    assert ledger.replay("d")
    fence = take(ledger, "d", **keyed)
    ledger.end_as_dead_letter("d", fence, outcome={"error": {"code": "c"}}, code="c", task="t", job={**JOB, **keyed})
    assert ledger.purge("d")
    ledger.submit("w", task="t", job=JOB)
    ledger.in_hand(["w"])
    ledger.wake_now("w")
    ledger.client.zadd(ledger.key("due"), {"w": 0})
    ledger.sweep(queues=lambda _: {"t": ("q", 0)})
    ledger.requeue_lost(ledger.dispatched())
    assert ledger.cancel("w") == "queued"
    assert ledger.count_return("w") == 1
    assert set(ledger.standing(["u", "w"])) == {"u", "w"}
    assert ledger.load(overdue_s=60).open == 2, "the outcome of d is not told"


def breakers_and_slots(ledger: Ledger, prefix: str) -> None:
    breakers = Breakers(ledger.client, BreakerSettings(pause_s=0.05), prefix=prefix)
    slots = Slots(ledger.client, prefix=prefix)
    assert breakers.failed("a", retry_after_s=0.05).name == "open"
    fence = take(ledger, "p")
    assert ledger.foresee("p", fence, WaitReason("c", "m", "a", "a"), delay_s=0, breaker="a")["next_try"]
    ledger.park_for("a", "p", fence, max_wait_s=10, code="c", message="m")
    assert ledger.parked() == {"a": 1}
    time.sleep(0.06)
    assert ledger.wake_parked() == 1
    assert breakers.probe("a", "token", for_s=5)[0]
    assert breakers.renew("a", "token", for_s=5)
    assert breakers.succeeded("a", probe="token").closed
    assert breakers.states(["a", "b"])["a"].closed
    with slots.slot("a", limit=1, wait_s=1):
        slots.tend()
    ledger.note_hang("a", ["f"])
    ledger.note_answer("a")
    assert ledger.hangs("a", ["f"])[1]["f"].count == 1
    rates = ServerRates(ledger.client, prefix=prefix)
    assert rates.lower("a", status=429, retry_after_s=None, cuts=0, measured_per_s=0).cuts == 1
    assert rates.take("a").wait_s > 0
    assert rates.read(["a", "b"])["b"].per_s is None


def batches(ledger: Ledger) -> None:
    store = Batches(ledger)
    store.open("B", kind="noop", order={}, servers={"a": "msdicom"}, concurrency=4)
    assert store.take("B", "B") is None
    with Planner(store, "B") as planner:
        planner.add_all([Planned("1.2", "a"), Planned("1.3", "a", skip="not ours")])
        planner.freeze()
    fence = take(ledger, "B")
    assert store.begin("B", "apply", job_id="B", out_of=["planning"])
    assert (store.pause("B"), store.resume("B")) == ("paused", "running")
    batch = store.get("B")
    assert batch is not None
    (job,) = store.fill(batch, "apply")
    chunk_fence = ledger.take(job.job_id, task=job.task, job=job.job).fence
    (row, _) = store.chunk_rows(batch, 0, ["apply"])
    failed = ItemOutcome(row.item, "failed", "c", "m", {"size_bytes": 1})
    store.record_outcomes(batch, "apply", 0, [failed], job_id=job.job_id, fence=chunk_fence)
    assert store.end_chunk("B", "apply", 0)
    assert store.open_chunks(batch, "apply") == []
    assert store.end_pass("B", "apply", "done")
    store.expire("B")
    assert store.reopen(batch, "apply", ["failed"]) == 1
    assert store.reopen_missing(batch) == 0
    store.forget_pass(batch, "apply")
    assert store.steer("B", "cancelled", out_of=["done"]) == "cancelled"
    assert [one.id for one in store.list()] == ["B"]
    end(ledger, "B", fence)


def whole_life(ledger: Ledger, prefix: str) -> None:
    live_jobs(ledger)
    follow_ups(ledger)
    jobs_over_many_images(ledger)
    lost_and_dead_jobs(ledger)
    breakers_and_slots(ledger, prefix)
    batches(ledger)
    ledger.report_health("w", '{"at": 1e12, "every_s": 10, "ok": true, "complaint": ""}')
    ledger.upload_begun("s3://b/k", "1")
    ledger.note_overwrites("s3://b", prevented=True)


@pytest.mark.parametrize("prefix", [TAGGED, "a-b.c:{d:e}:"])
def test_with_a_hash_tag_every_script_and_pipeline_runs_on_a_redis_in_cluster_mode(
    cluster_url: str, unused: set[str], prefix: str
) -> None:
    ledger = Ledger.connect(cluster_url, prefix=prefix)
    whole_life(ledger, prefix)
    keys = [str(key) for key in ledger.client.scan_iter("*")]
    assert [key for key in keys if not key.startswith(prefix)] == []
    assert len({ledger.client.execute_command("CLUSTER", "KEYSLOT", key) for key in keys}) == 1
    assert not unused, "these scripts did not run"
    ledger.close()


def test_without_a_hash_tag_a_redis_in_cluster_mode_refuses(cluster_url: str) -> None:
    ledger = Ledger.connect(cluster_url)
    with pytest.raises(ResponseError, match="same slot"):
        ledger.submit("j", task="t", job=JOB)
    (finding,) = doctor._ledger(ledger)
    assert (finding.state, "needs a hash tag in queue.key_prefix" in finding.found) == ("unavailable", True)
    ledger.close()


@pytest.mark.parametrize(
    ("database", "prefix", "sentence"),
    [(0, "courier:", "needs a hash tag in queue.key_prefix"), (2, TAGGED, "DB index is out of range")],
)
def test_a_program_and_a_worker_say_in_one_sentence_that_such_a_redis_refuses(
    cluster_server: RedisPart, database: int, prefix: str, sentence: str
) -> None:
    queue = {"broker_url": "memory://", "result_backend": "cache+memory://"}
    settings = Settings.model_validate(
        {"queue": {**queue, "ledger_url": cluster_server.url(database), "key_prefix": prefix}}
    )
    with Courier(settings) as courier:
        with pytest.raises(BrokerUnavailable, match=sentence):
            courier.upload("https://host/a.dcm")
        assert courier.ledger is not None
        assert "cluster mode" in (reason := peers.begin(courier.ledger, "w", {})) or sentence in reason


def test_a_redis_that_is_another_one_for_a_while_is_no_reason_not_to_begin(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Ledger) -> int:
        raise ReadOnlyError("You can't write against a read only replica.")

    ledger = Ledger.connect(redis_url)
    monkeypatch.setattr(Ledger, "schema", fails)
    with pytest.raises(ReadOnlyError):
        peers.begin(ledger, "w", {})
    ledger.close()


def test_two_deployments_on_one_database_do_not_see_each_other(redis_url: str, unused: set[str]) -> None:
    prefixes = ("courier:", "courier:b:", "{c}:")  # one of them begins with another
    ledgers = [Ledger.connect(redis_url, prefix=prefix) for prefix in prefixes]
    for ledger, prefix in zip(ledgers, prefixes, strict=True):
        whole_life(ledger, prefix)  # the same ids, images, batches and servers, each time anew
        assert [batch.id for batch in Batches(ledger).list()] == ["B"]
        assert list(ledger.workers(now_s=1e12)) == ["w"]
    Breakers(ledgers[0].client, prefix=prefixes[0]).failed("a", retry_after_s=60)
    states = [
        Breakers(one.client, prefix=prefix).states(["a"])["a"] for one, prefix in zip(ledgers, prefixes, strict=True)
    ]
    assert [state.closed for state in states] == [False, True, True]
    for ledger in ledgers:
        ledger.close()


def test_rates_are_counted_below_the_prefix(redis_url: str) -> None:
    ledger = Ledger.connect(redis_url, prefix=TAGGED)
    services: Any = SimpleNamespace(ledger=ledger)
    assert _limiter(services).hit(RateLimitItemPerSecond(5), "B", "items")
    assert all(str(key).startswith(TAGGED) for key in ledger.client.scan_iter("*"))
    ledger.close()
