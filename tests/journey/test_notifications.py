"""With a real worker a program has its result as soon as the worker has stored it."""

from __future__ import annotations

import statistics
import time

from producer import Courier
from sandbox.synthetic import image, new_uid


def test_an_upload_is_answered_sooner_than_to_a_client_that_polls(courier, steady, image_server):
    with Courier(steady.settings) as polling:
        polling._notifications.close()
        taken_s = {courier: [], polling: []}
        for number in range(15):
            for each, seconds in taken_s.items():
                url = image_server.put(f"{number}-{len(seconds)}-{id(each)}.dcm", image(new_uid()))
                begun = time.monotonic()
                assert each.upload(url).result(timeout_s=60)["status"] == "stored"
                seconds.append(time.monotonic() - begun)
    assert statistics.median(taken_s[courier]) < 0.75 * statistics.median(taken_s[polling])
