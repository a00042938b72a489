"""A job that kills its worker is stopped, whatever id it comes under, and nobody else pays for it."""

from __future__ import annotations

import time

import pytest

from courier.ledger.jobs import job_id_for
from producer import Courier
from tests.chaos.judge import Picture, check_invariant
from tests.chaos.points import MID_PUSH

WAIT_S = 90
AREA = "a job that kills its worker"


@pytest.mark.slow
@pytest.mark.parametrize("pool", [pytest.param("threads", marks=pytest.mark.full), "processes"])
def test_a_job_that_kills_its_worker_is_a_dead_letter_and_all_that_died_with_it_are_stored(
    pool, crew, stops, sandbox, image_server, guarantee
):
    """The neighbours are as slow as the killer, so that they die with it whenever they run beside it."""
    sandbox.set_fault("msdicom", "*", latency_ms=300)
    orders = {}
    with Courier(crew.loaded()) as courier:
        for number in range(6):
            picture = Picture.new(side=700)
            if not number:
                poison = picture
                stops.kill_at(job_id_for(picture.sop), MID_PUSH)
            url = image_server.put(f"{number}.dcm", picture.body)
            orders[courier.upload(url, idempotency_key=picture.sop)] = picture
        killer = next(iter(orders))
        begun_s = time.monotonic()
        running, deaths = crew.start(pool=pool, stops=True, concurrency=len(orders)), 0
        while any(not handle.report().over for handle in orders) and time.monotonic() - begun_s < WAIT_S:
            if not running.alive:
                running, deaths = crew.start(pool=pool, stops=True, concurrency=len(orders)), deaths + 1
            time.sleep(0.1)
        reports = check_invariant(orders, courier, sandbox, timeout_s=WAIT_S, dead=["poisoned"])
        took_s = time.monotonic() - begun_s
        assert {handle.id for handle, report in reports.items() if report.error} == {killer.id}
        (letter,) = courier.dead.list()
        assert (letter.job_id, letter.code, letter.crash_count) == (killer.id, "poisoned", 3)
        assert deaths == (3 if pool == "threads" else 0)

        again = courier.upload(image_server.url("0.dcm"), idempotency_key="another id, the same content")
        assert again.id != killer.id
        stops.kill_at(again.id, MID_PUSH)
        check_invariant({again: poison}, courier, sandbox, timeout_s=WAIT_S, dead=["poisoned"])
        assert running.alive
        assert courier.dead.get(again.id).crash_count == 3, "it did not have to kill once more"
    name = "prefork" if pool == "processes" else pool
    fault = f"six jobs, one of which kills ({name})"
    guarantee.row(area=AREA, fault=fault, point="the killer", outcome="dead letter `poisoned` after 3 deaths")
    guarantee.row(area=AREA, fault=fault, point="its five neighbours", outcome="stored", recovery_s=took_s)
    guarantee.row(area=AREA, fault=fault, point="the same content under another id", outcome="dead letter at once")
