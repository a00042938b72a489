"""A program that waits is told by Redis that there is something to read; nothing is lost, and nothing is left behind.

In most tests the safety net, reading everything once a second, is out of reach: what is found was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import queue
import statistics
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery import Celery
from redis import Redis

from courier.settings import Settings
from producer import Courier, client, notifications
from producer.errors import StillRunning
from sandbox import processes as parts
from sandbox.processes import Processes

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex")
TASK, JOB = "pacs.trace", {"version": 1, "uid": "1.2.3"}
WAIT_S = 30


class StoringBackend:
    """What a worker does to a job's entry in the result back-end."""

    def __init__(self, url):
        self.app = Celery(backend=url, broker="memory://", set_as_current=False)
        self.backend = self.app.backend

    def ends(self, handle):
        self.backend.store_result(handle.id, {"uid": handle.id}, "SUCCESS")

    def shows(self, handle, stage):
        self.backend.store_result(handle.id, {"stage": stage, "attempt": 1}, "PROGRESS")

    def close(self):
        self.backend.client.connection_pool.disconnect()
        self.app.close()


@pytest.fixture
def told(redis):
    worker = StoringBackend(redis.result_backend)
    yield worker
    worker.close()


@pytest.fixture
def courier(redis):
    with Courier(Settings.model_validate({"queue": parts.queue_settings(redis)})) as courier:
        yield courier


@pytest.fixture
def inspector(redis):
    with Redis(host=parts.HOST, port=redis.port, decode_responses=True) as inspector:
        yield inspector


@pytest.fixture
def told_alone(monkeypatch):
    """Nothing is read but what was told of, or after trouble."""
    monkeypatch.setattr(client, "_LEDGER_POLL_S", 600.0)


def submitted(courier, count=1):
    handles = [courier.handle(str(uuid.uuid4())) for _ in range(count)]
    for handle in handles:
        courier.ledger.submit(handle.id, task=TASK, job=JOB)
    return handles


def subscribers(inspector):
    return [one for one in inspector.client_list() if int(one["sub"]) or one["cmd"].endswith("subscribe")]


def subscribed(inspector, count=1):
    assert parts.poll(lambda: len(inspector.pubsub_channels()) == count, timeout_s=WAIT_S)


@contextlib.contextmanager
def waiting(handle):
    """A thread that waits for the handle's result; its future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(handle.result, timeout_s=WAIT_S)


def test_a_client_that_is_told_waits_less_than_half_of_what_one_that_polls_does(courier, told, redis):
    with Courier(Settings.model_validate({"queue": parts.queue_settings(redis)})) as polling:
        polling._notifications.close()
        late_s = {courier: [], polling: []}
        for number in range(20):
            handles = {each: submitted(each)[0] for each in late_s}
            with ThreadPoolExecutor(2) as pool:
                ends = {each: pool.submit(end_of, handle) for each, handle in handles.items()}
                time.sleep(0.15 + 0.005 * number)
                for each, handle in handles.items():
                    begun = time.monotonic()
                    told.ends(handle)
                    late_s[each].append(ends[each].result() - begun)
    assert statistics.median(late_s[courier]) < statistics.median(late_s[polling]) / 2


def end_of(handle):
    """When its result was there."""
    assert handle.result(timeout_s=WAIT_S) == {"uid": handle.id}
    return time.monotonic()


def test_each_stage_is_seen_as_soon_as_it_is_stored(courier, told, told_alone):
    (handle,) = submitted(courier)
    reports = courier.watch([handle], timeout_s=WAIT_S)
    assert next(reports)[1].stage == "queued"
    for stage in ("fetch", "push", "describe"):
        told.shows(handle, stage)
        assert next(reports)[1].stage == stage
    told.ends(handle)
    assert next(reports)[1].status == "done"
    assert next(reports, None) is None


def test_a_result_that_is_stored_between_the_first_look_and_the_subscription_is_found(
    courier, told, told_alone, monkeypatch
):
    (handle,) = submitted(courier)
    connect = courier._notifications.connect

    def late():
        told.ends(handle)
        return connect()

    monkeypatch.setattr(courier._notifications, "connect", late)
    assert handle.result(timeout_s=WAIT_S) == {"uid": handle.id}


def test_a_result_that_was_there_before_needs_no_subscription(courier, told, inspector, monkeypatch):
    monkeypatch.setattr(courier._notifications, "connect", pytest.fail)
    (handle,) = submitted(courier)
    told.ends(handle)
    assert handle.result(timeout_s=WAIT_S) == {"uid": handle.id}
    with pytest.raises(StillRunning):
        submitted(courier)[0].result(timeout_s=0)


@pytest.mark.parametrize("times", [1, 3])
def test_a_killed_subscription_loses_nothing(courier, told, told_alone, inspector, times):
    (handle,) = submitted(courier)
    with waiting(handle) as result:
        for _ in range(times - 1):
            subscribed(inspector)
            (killed,) = subscribers(inspector)
            inspector.client_kill_filter(_id=killed["id"])
            assert parts.poll(
                lambda old=killed: [one["id"] for one in subscribers(inspector)] not in ([], [old["id"]]),
                timeout_s=WAIT_S,
            )
        subscribed(inspector)
        key, kept = told.backend.get_key_for_task(handle.id), {"status": "SUCCESS", "result": {"uid": handle.id}}
        kept |= {"task_id": handle.id, "traceback": None, "children": []}
        with inspector.pipeline() as pipe:  # nothing comes between: the message is heard by no subscriber
            pipe.execute_command("SELECT", 1)
            pipe.execute_command("CLIENT", "KILL", "ID", subscribers(inspector)[0]["id"])
            pipe.set(key, told.backend.encode(kept))
            pipe.publish(key, "stored")
            assert pipe.execute()[-1] == 0
        assert result.result() == {"uid": handle.id}


def test_while_subscriptions_fail_results_are_polled(courier, told, told_alone, monkeypatch):
    def broken():
        raise notifications.redis.ConnectionError("no more clients")

    monkeypatch.setattr(courier._notifications, "connect", broken)
    (handle,) = submitted(courier)
    with waiting(handle) as result:
        time.sleep(0.3)
        told.ends(handle)
        assert result.result() == {"uid": handle.id}


def test_a_user_who_may_not_subscribe_polls_and_the_debug_log_says_so_once(redis, told, told_alone, inspector, caplog):
    inspector.acl_setuser("reader", enabled=True, passwords=["+word"], keys=["*"], commands=["+@all"], reset=True)
    try:
        urls = {
            name: url.replace("redis://", "redis://reader:word@") for name, url in parts.queue_settings(redis).items()
        }
        settings = Settings.model_validate({"queue": urls})
        with caplog.at_level(logging.DEBUG, logger="producer.notifications"), Courier(settings) as courier:
            for _ in range(3):
                (handle,) = submitted(courier)
                with waiting(handle) as result:
                    time.sleep(0.2)
                    told.ends(handle)
                    assert result.result() == {"uid": handle.id}
            assert subscribers(inspector) == []
    finally:
        inspector.acl_deluser("reader")
    assert [record.levelname for record in caplog.records if record.name == "producer.notifications"] == ["DEBUG"]


def test_results_in_another_back_end_are_polled(redis, told_alone, inspector):
    with Courier(
        Settings(), broker_url=redis.broker_url, ledger_url=redis.ledger_url, result_backend="cache+memory://"
    ) as courier:
        (handle,) = submitted(courier)
        with waiting(handle) as result:
            time.sleep(0.2)
            courier._app.backend.store_result(handle.id, {"uid": handle.id}, "SUCCESS")
            assert result.result() == {"uid": handle.id}
        assert subscribers(inspector) == []


def test_more_than_two_thousand_open_jobs_are_polled_until_there_are_fewer(courier, told, told_alone, inspector):
    handles = submitted(courier, 2001)
    ended = courier.as_completed(handles, timeout_s=WAIT_S)
    told.ends(handles[7])
    assert next(ended)[0] == handles[7]
    assert inspector.pubsub_channels() == []
    threading.Timer(0.2, told.ends, [handles[8]]).start()
    assert next(ended)[0] == handles[8]
    assert len(inspector.pubsub_channels()) == 2000
    for handle in (handles[2000], handles[0]):
        told.ends(handle)
        assert next(ended)[0] == handle
    ended.close()
    assert inspector.pubsub_channels() == []


def test_however_many_jobs_are_open_no_more_than_two_thousand_are_read_at_a_time(courier, monkeypatch):
    monkeypatch.setattr(client, "_LEDGER_POLL_S", 0.3)
    handles = [courier.handle(str(uuid.uuid4())) for _ in range(5000)]
    read, asked = [], []
    stored, standing = courier._stored_reports, courier.ledger.standing

    def ask(ids):
        asked.append(list(ids))
        if len(asked) == 5:
            raise TimeoutError("That will do.")
        return standing(asked[-1])

    monkeypatch.setattr(courier, "_stored_reports", lambda ids: read.append(list(ids)) or stored(ids))
    monkeypatch.setattr(courier.ledger, "standing", ask)
    with pytest.raises(TimeoutError, match="That will do"):
        next(courier.watch(handles))
    assert [len(read[0]), len(asked[0])] == [5000, 5000]
    for rounds in (read[1:], asked[1:]):
        assert {len(ids) for ids in rounds} == {2000}
    assert len({job_id for ids in asked[1:4] for job_id in ids}) == 5000, "each gets its turn"


def test_what_has_ended_is_no_longer_subscribed_to(courier, told, told_alone, inspector):
    handles = submitted(courier, 10)
    ended = courier.as_completed(handles, timeout_s=WAIT_S)
    for number, handle in enumerate(handles):
        told.ends(handle)
        assert next(ended)[0] == handle
        assert len(inspector.pubsub_channels()) in (0, 10 - number, 11 - number)
    assert next(ended, None) is None
    assert inspector.pubsub_channels() == []


def test_many_messages_are_read_together(courier, told, told_alone, inspector, monkeypatch):
    reads = []
    stored = courier._stored_reports
    monkeypatch.setattr(courier, "_stored_reports", lambda ids: reads.append(len(ids)) or stored(ids))
    handles = submitted(courier, 200)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(lambda: list(courier.as_completed(handles, timeout_s=WAIT_S)))
        subscribed(inspector, 200)
        time.sleep(0.2)
        reads.clear()
        with told.backend.client.pipeline() as pipe:
            for stage in ("fetch", "push", "describe") * 5:
                for handle in handles:
                    key = told.backend.get_key_for_task(handle.id)
                    pipe.publish(key, stage)
            pipe.execute()
        for handle in handles:
            told.ends(handle)
        assert len(ended.result()) == 200
    assert len(reads) < 150


# --- nothing is left behind -------------------------------------------------------------------------------------------


def test_twenty_threads_with_fifty_jobs_each_leave_no_subscription_and_no_connection(courier, told, inspector):
    submissions: queue.Queue = queue.Queue()

    def work():
        while (handle := submissions.get()) is not None:
            told.ends(handle)

    def wait(_):
        for handle in submitted(courier, 50):
            submissions.put(handle)
            assert handle.result(timeout_s=WAIT_S) == {"uid": handle.id}

    worker = threading.Thread(target=work)
    worker.start()
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(wait, range(20)))
    submissions.put(None)
    worker.join()
    assert inspector.pubsub_channels() == []
    assert inspector.pubsub_numpat() == 0
    assert parts.poll(lambda: len(subscribers(inspector)) <= 1, timeout_s=WAIT_S)
    assert courier._notifications._open == set()
    told.close()
    courier.close()
    assert parts.poll(lambda: databases(inspector) == {0}, timeout_s=WAIT_S), inspector.client_list()


def databases(inspector):
    """Those that a connection is open to; the broker's stay, because Celery shares them."""
    return {int(one["db"]) for one in inspector.client_list()} | {0}


def test_one_job_after_another_shares_a_connection(courier, told, inspector):
    def connections():
        return inspector.info("stats")["total_connections_received"]

    for number in range(40):
        (handle,) = submitted(courier)
        with waiting(handle) as result:
            subscribed(inspector)
            told.ends(handle)
            assert result.result() == {"uid": handle.id}
        assert inspector.pubsub_channels() == []
        if number == 3:
            before = connections()
    assert connections() == before


@pytest.mark.parametrize("end", ["iterator", "client", "forgotten"])
def test_closing_iterator_or_client_early_ends_the_subscription(courier, told, told_alone, inspector, end):
    handles = submitted(courier, 3)
    reports = courier.watch(handles, timeout_s=WAIT_S)
    for handle in handles:
        assert next(reports)[0] == handle
    told.shows(handles[0], "push")
    assert next(reports)[1].stage == "push"
    assert len(inspector.pubsub_channels()) == 3
    if end == "iterator":
        reports.close()
    elif end == "forgotten":
        del reports
        gc.collect()
    else:
        courier.close()
        assert parts.poll(lambda: subscribers(inspector) == [], timeout_s=WAIT_S)
        told.ends(handles[1])
        assert next(reports)[1].status == "done", "it goes on, and polls"
        reports.close()
    assert inspector.pubsub_channels() == []


def test_a_client_that_is_closed_while_another_thread_waits_gives_its_subscription_up(courier, told, inspector):
    (handle,) = submitted(courier)
    with waiting(handle) as result:
        subscribed(inspector)
        courier.close()
        assert parts.poll(lambda: subscribers(inspector) == [], timeout_s=WAIT_S)
        told.ends(handle)
        assert result.result() == {"uid": handle.id}


# --- a Redis that restarts, other threads, other processes ------------------------------------------------------------


def test_after_a_restart_of_redis_results_are_told_again(tmp_path, told_alone):
    with Processes(tmp_path) as running:
        redis = parts.redis(running, options=["--appendfsync", "always"])
        settings = Settings.model_validate({"queue": parts.queue_settings(redis)})
        with Courier(settings) as courier:
            worker = StoringBackend(redis.result_backend)
            first, second = submitted(courier, 2)
            reports = courier.watch([first, second], timeout_s=WAIT_S)
            assert [next(reports)[1].status for _ in range(2)] == ["queued", "queued"]
            worker.shows(first, "push")
            assert next(reports)[1].stage == "push"
            redis.child.kill()
            parts.redis(running, port=redis.port)
            worker.ends(first)
            assert next(reports) == (first, first.report())
            with ThreadPoolExecutor(1) as pool:
                last = pool.submit(next, reports)
                with Redis(host=parts.HOST, port=redis.port) as inspector:
                    subscribed(inspector)
                worker.ends(second)
                assert last.result()[1].result == {"uid": second.id}
            worker.close()


def test_tasks_of_an_event_loop_wait_in_its_threads(courier, told, told_alone, inspector):
    handles = submitted(courier, 8)

    async def all_of_them():
        results = asyncio.gather(*(asyncio.to_thread(handle.result, WAIT_S) for handle in handles[:4]))
        while len(inspector.pubsub_channels()) < 4:
            await asyncio.sleep(0.01)
        for handle in handles[:4]:
            await asyncio.to_thread(told.ends, handle)
        return await results

    assert asyncio.run(all_of_them()) == [{"uid": handle.id} for handle in handles[:4]]
    assert inspector.pubsub_channels() == []


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_waits_on_its_own_and_leaves_the_subscription_of_its_parent(courier, told, told_alone):
    first, second, before = submitted(courier, 3)
    told.ends(before)
    reports = courier.watch([first, second], timeout_s=WAIT_S)
    assert [next(reports)[1].status for _ in range(2)] == ["queued", "queued"]
    told.shows(first, "push")
    assert next(reports)[1].stage == "push"
    child = os.fork()
    if not child:
        try:
            before.result(timeout_s=WAIT_S)
            told.ends(first)
            ended = next(reports)[1].status
            reports.close()
            os._exit(0 if ended == "done" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(reports)[1].status == "done"
    told.ends(second)
    assert next(reports)[1].result == {"uid": second.id}
