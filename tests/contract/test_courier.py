"""What a program that enqueues leaves behind."""

from __future__ import annotations

import traceback
import uuid

import pytest
from redis import Redis

from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes
from worker.settings import Settings, SettingsError

SECRET = "PLANTED"


def databases_in_use(port):
    with Redis(host=parts.HOST, port=port, decode_responses=True) as client:
        return {int(entry["db"]) for entry in client.client_list() if entry["cmd"] != "client|list"}


def test_a_courier_that_is_closed_leaves_no_connection_to_results_and_ledger(tmp_path):
    with Processes(tmp_path) as running:
        redis = parts.redis(running)
        with Courier(Settings.model_validate({"queue": parts.queue_settings(redis)})) as courier:
            assert not courier.known(str(uuid.uuid4()))
            assert databases_in_use(redis.port) >= {1, 2}
        assert not databases_in_use(redis.port) & {1, 2}


@pytest.mark.parametrize("name", ["broker_url", "result_backend", "ledger_url"])
def test_urls_given_in_code_are_read_as_those_of_the_settings(name):
    with pytest.raises(SettingsError, match=f"setting {name}: it is no URL") as caught:
        Courier(Settings(), **{name: f"redis://:{SECRET}@host:port/0"})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
