"""A server that stays away for longer than a job may wait for it."""

from __future__ import annotations

import pytest

from producer import Courier
from producer.errors import PacsUnavailable
from sandbox.synthetic import image, new_uid

WAIT_S = 30


def test_a_job_that_waited_as_long_as_it_may_is_a_dead_letter_and_goes_on_when_replayed(worker, sandbox, image_server):
    waits = {"max_wait_s": 3, "max_attempts": 50, "backoff_base_s": 0.1, "backoff_cap_s": 0.2, "sweep_s": 0.2}
    running = worker(jobs=waits, breaker={"failures": 2, "pause_s": 0.3, "pause_cap_s": 0.3})
    sandbox.set_fault("msdicom", "*", refuse=True)
    with Courier(running.settings) as courier:
        handle = courier.upload(image_server.put("a.dcm", image(new_uid())))
        with pytest.raises(PacsUnavailable) as caught:
            handle.result(timeout_s=WAIT_S)
        assert caught.value.server_name == "msdicom"
        letter = courier.dead.get(handle.id)
        assert letter.code == "pacs_unavailable"
        assert letter.attempts <= 4  # of its probes none counts
        sandbox.reset_faults()
        assert courier.dead.replay(handle.id)
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
