"""With a real worker a program has its result as soon as the worker has stored it."""

from __future__ import annotations

import statistics
import time
from datetime import datetime

from producer import Courier
from sandbox.synthetic import image, new_uid


def waited_s(courier: Courier, url: str) -> float:
    """How long the result of an upload lay there before its program had it."""
    handle = courier.upload(url)
    assert handle.result(timeout_s=60)["status"] == "stored"
    answered_s = time.time()
    stored = courier._app.backend.get_task_meta(handle.id)["date_done"]
    return answered_s - datetime.fromisoformat(stored).timestamp()


def test_an_upload_is_answered_sooner_than_to_a_client_that_polls(courier, steady, image_server):
    with Courier(steady.settings) as polling:
        polling._notifications.close()
        waits_s = {courier: [], polling: []}
        for number in range(15):
            for each, seconds in waits_s.items():
                url = image_server.put(f"{number}-{len(seconds)}-{id(each)}.dcm", image(new_uid()))
                seconds.append(waited_s(each, url))
    assert statistics.median(waits_s[courier]) < 0.75 * statistics.median(waits_s[polling]), waits_s
