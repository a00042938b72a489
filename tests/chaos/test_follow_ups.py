"""A worker is killed around the moment at which it sends what follows on a job: it all comes, under the same ids."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest

from producer import Courier
from sandbox import processes as parts
from sandbox.processes import poll
from tests.canvases import ALL, PRIMITIVES, WAIT_S, Stage, stage
from tests.chaos.crew import Crew, Stops, control_url, send
from tests.chaos.points import BEFORE_FETCH, BEFORE_RESULT, CHORD_COMPLETE, FOLLOW_UP_SENT
from tests.chaos.test_storm import TIMES, Storm

AREA = "what follows on a job"
POINTS = (BEFORE_FETCH, BEFORE_RESULT, FOLLOW_UP_SENT)
#: Where the jobs stop at the last of these, by name; of the two members of the chord, the last one. The others go on.
STOPS = {
    **dict.fromkeys(("link", "link_error", "chain", "stamps"), FOLLOW_UP_SENT),
    **dict.fromkeys(("chord a", "chord b"), CHORD_COMPLETE),
}
#: What comes twice if the worker dies between sending and noting it. What is chained there is a job of ours.
TWICE = frozenset(("link", "link_error", "stamps"))


def crew_of(made: Stage, folder) -> Crew:
    queue, servers = parts.queue_settings(made.redis), made.sandbox.servers()
    return Crew(folder, queue=queue, servers=servers, control=control_url(made.redis))


@pytest.fixture(scope="module", params=POINTS)
def killed(request, redis_server, sandbox_server, tmp_path_factory):
    """The point, the canvases whose worker was killed there, and how long the rest took."""
    with stage(redis_server, sandbox_server, tmp_path_factory.mktemp("stage")) as made:
        canvases, stops = made.canvases, Stops(control_url(redis_server))
        crew = crew_of(made, tmp_path_factory.mktemp("crew"))
        with crew.processes:
            canvases.send()
            sent = request.param == FOLLOW_UP_SENT
            points = STOPS if sent else dict.fromkeys(canvases.jobs, request.param)
            for name, point in points.items():
                stops.at(canvases.jobs[name], point)
            doomed = crew.start(stops=True, concurrency=12)
            stops.reached(count=len(points) - sent, timeout_s=WAIT_S)
            crew.start(concurrency=12)
            send(doomed.pid, signal.SIGKILL)
            struck_s = time.monotonic()
            assert poll(lambda: set(ALL) <= set(canvases.calls()), timeout_s=WAIT_S), sorted(canvases.calls())
            took_s = time.monotonic() - struck_s
            print(f"{request.param}: {took_s:.1f} s")
            canvases.give_back()
            canvases.wait_for_all()
            yield request.param, canvases, took_s
        stops.close()
        assert crew.faults() == []


@pytest.mark.slow
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_a_killed_workers_follow_ups_are_sent_by_another(killed, primitive, guarantee):
    point, canvases, took_s = killed
    twice = point == FOLLOW_UP_SENT and primitive in TWICE
    canvases.check(primitive, most=2 if twice else 1)
    if twice:
        assert len(canvases.calls()[primitive]) == 2
    outcome = "another application's task came twice, under one id" if twice else "each came once"
    guarantee.row(area=AREA, fault="SIGKILL of the worker", point=point, outcome=outcome, recovery_s=took_s)


@pytest.mark.slow
def test_nothing_of_them_is_left_in_the_ledger(killed):
    assert poll(lambda: killed[1].kept() == {}, timeout_s=WAIT_S), killed[1].kept()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_a_storm_of_dying_workers_each_follow_up_comes_and_next_to_none_twice(
    redis_server, sandbox_server, tmp_path, guarantee, full, seed
):
    count = 1000 if full else 150
    with stage(redis_server, sandbox_server, tmp_path / "stage") as made:
        canvases, crew = made.canvases, crew_of(made, tmp_path / "crew")
        for dialect in ("msdicom", "dcm4chee"):
            made.sandbox.set_fault(dialect, "*", latency_ms=[5, 60])
        with crew.processes, Courier(crew.loaded(jobs=TIMES)) as courier:
            storm = Storm(crew, random.Random(seed))
            tags = [f"job {number}" for number in range(count)]
            for tag in tags:
                canvases.upload(tag).apply_async(link=canvases.after(tag), link_error=canvases.after(f"{tag} failed"))
            begun_s = time.monotonic()
            while len(canvases.calls()) < count * 0.95:
                assert time.monotonic() - begun_s < 400, f"{len(canvases.calls())} of {count}"
                storm.blow()
                time.sleep(0.2)
            storm.calm()
            time.sleep(2)
            canvases.give_back()
            came = poll(lambda: len(canvases.calls()) >= count, timeout_s=WAIT_S)
            missing = [tag for tag in tags if not {tag, f"{tag} failed"} & set(canvases.calls())]
            assert came, {tag: canvases.ledger.read_record(canvases.jobs[tag]) for tag in missing}
            canvases.wait_for_all()
            dead = {
                tag
                for tag, report in zip(tags, courier.reports(canvases.jobs.values()).values(), strict=True)
                if report.error
            }
        calls, deaths = canvases.calls(), sum(storm.ends.values())
        assert set(calls) == {f"{tag} failed" if tag in dead else tag for tag in tags}
        assert all({call["id"] for call in came} == {canvases.ids[tag]} for tag, came in calls.items())
        assert canvases.kept() == {} or set(canvases.kept()) <= dead
        repeated = sum(len(came) - 1 for came in calls.values())
        print(Counter(storm.ends), f"{repeated} of {count} came again")
        assert repeated <= deaths, "no more than a death can explain"
        outcome = f"each came under its id, {repeated} of {count} twice"
        guarantee.row(
            area=AREA, fault=f"{count} uploads, 4 workers, {deaths} deaths", outcome=outcome, point="all of it"
        )
