"""Dead letters: seen, replayed and purged by a person, whatever happens to Redis meanwhile."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

import pytest
import requests
from click.testing import CliRunner

from courier.settings import Settings
from producer import Courier
from producer.cli import main
from producer.errors import ImageAlreadyExists, NotFound, SourceUnreachable
from sandbox import processes as parts
from sandbox.processes import Processes, poll
from sandbox.synthetic import image, new_uid

WAIT_S = 30


@pytest.fixture(autouse=True)
def no_letters(courier):
    for letter in courier.dead.list():
        courier.dead.purge(letter.job_id)


def died(courier, url, error=SourceUnreachable):
    handle = courier.upload(url)
    with pytest.raises(error):
        handle.result(timeout_s=WAIT_S)
    return handle


def test_a_letter_says_why_and_ends_well_once_it_is_replayed(courier, pacs, image_server, sandbox):
    url = image_server.put("a.dcm", status=503)
    handle = died(courier, f"{url}?sig=SECRET")

    status, listed, _ = pacs("dead", "list")
    (letter,) = listed["letters"]
    assert (status, listed["operation"]) == (0, "dead_list")
    assert (letter["job_id"], letter["task"], letter["code"]) == (handle.id, "pacs.upload", "source_unreachable")
    assert (letter["attempts"], letter["deaths"], letter["replays"]) == (2, 0, 0)
    assert url in letter["about"]
    shown = [pacs("dead", "show", handle.id)[1], listed]
    printed = [CliRunner().invoke(main, ["dead", *words]).stdout for words in (["list"], ["show", handle.id])]
    assert "source_unreachable" in printed[1]
    assert "SECRET" not in str([*shown, *printed])

    image_server.put("a.dcm", image(new_uid()))
    dry = pacs("dead", "replay", handle.id, "--dry-run")
    assert (dry[0], dry[1]["job_ids"], handle.status()) == (0, [handle.id], "failed")
    sandbox.set_fault("msdicom", "query", latency_ms=700)
    assert pacs("dead", "replay", handle.id)[:2] == (
        0,
        {
            "operation": "dead_replay",
            "dry_run": False,
            "chosen": 1,
            "codes": {"source_unreachable": 1},
            "job_ids": [handle.id],
            "gone": [],
        },
    )
    assert handle.status() in ("queued", "running")
    payload = handle.result(timeout_s=WAIT_S)
    assert (payload["status"], payload["job_id"], payload["attempts"]) == ("stored", handle.id, 1)
    assert pacs("dead", "list")[1]["letters"] == []
    assert pacs("dead", "replay", handle.id)[0] == 1
    with pytest.raises(NotFound):
        courier.dead.get(handle.id)


def test_a_replay_knows_what_its_lost_attempt_had_stored(courier, pacs, image_server, sandbox):
    study = new_uid()
    sandbox.set_fault("msdicom", "store", latency_ms=800, commit_then_drop=True, times=1)
    handle = courier.upload(image_server.put("b.dcm", image(study)))
    for _, report in courier.watch([handle], timeout_s=WAIT_S):
        if report.stage == "push":
            sandbox.set_fault("msdicom", "query", status=500)
    assert report.error.code == "pacs_unavailable"
    _, shown, _ = pacs("dead", "show", handle.id)
    assert shown["begun"]
    assert [event["event"] for event in shown["trail"]] == ["claimed", "routed", "waiting", "ended"]
    assert study in shown["uids"]
    sandbox.reset_faults()
    assert courier.dead.replay(handle.id)
    assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
    answer = requests.get(f"{sandbox.msdicom}/studies/{study}/instances", timeout=10)
    assert len(answer.json()) == 1
    events = [event["event"] for event in courier.trace(study).result(timeout_s=WAIT_S)["timeline"]]
    assert "replayed" in events


def test_a_replay_finds_that_others_stored_it_meanwhile(courier, put, image_server, sandbox):
    body = image(new_uid())
    handle = died(courier, image_server.put("c.dcm", status=503))
    image_server.put("c.dcm", body)
    put(sandbox.dcm4chee, body)
    assert courier.dead.replay(handle.id)
    with pytest.raises(ImageAlreadyExists) as refused:
        handle.result(timeout_s=WAIT_S)
    assert refused.value.server_name == "dcm4chee"
    assert list(courier.dead.list()) == []


def test_a_replay_that_fails_again_is_a_dead_letter_again(courier, image_server):
    handle = died(courier, image_server.put("d.dcm", status=503))
    assert courier.dead.replay(handle.id)
    with pytest.raises(SourceUnreachable):
        handle.result(timeout_s=WAIT_S)
    assert poll(lambda: [one.job_id for one in courier.dead.list()] == [handle.id], timeout_s=WAIT_S)
    assert courier.dead.get(handle.id).replays == 1


def test_letters_are_chosen_by_code_by_time_or_all(courier, pacs, image_server):
    urls = [image_server.put(f"{name}.dcm", status=503) for name in "ef"]
    ids = {died(courier, url).id for url in urls}
    later = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    for words, chosen in (
        (["--code", "poisoned"], set()),
        (["--code", "source_unreachable"], ids),
        (["--since", "1h"], ids),
        (["--since", later], set()),
        (["--before", "1h"], set()),
        (["--before", later, "--code", "source_unreachable"], ids),
    ):
        assert {letter["job_id"] for letter in pacs("dead", "list", *words)[1]["letters"]} == chosen, words
        assert set(pacs("dead", "purge", "--dry-run", *words)[1]["job_ids"]) == chosen, words
    assert len(pacs("dead", "list", "--limit", "1")[1]["letters"]) == 1
    for wrong in ([], ["--all", "--code", "poisoned"], [*ids, "--all"], ["--since", "yesterday"]):
        assert CliRunner().invoke(main, ["dead", "purge", *wrong]).exit_code == 2, wrong
    assert pacs("dead", "purge", "--all")[0] == 1
    assert {letter.job_id for letter in courier.dead.list()} == ids, "nothing is purged without --yes"
    status, purged, _ = pacs("dead", "purge", "--all", "--yes")
    assert (status, set(purged["job_ids"]), purged["gone"]) == (0, ids, [])
    assert pacs("dead", "list")[1]["letters"] == []
    for job_id in ids:
        assert courier.handle(job_id).status() == "failed"
    assert pacs("dead", "purge", *ids)[0] == 1


def test_on_a_terminal_it_is_asked_first(courier, steady, image_server, monkeypatch):
    handle = died(courier, image_server.put("g.dcm", status=503))
    monkeypatch.setenv("PACS_CONFIG", str(steady.config))

    def answer(typed, *words):
        with CliRunner().isolation(input=typed) as (out, _, _):
            monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
            with pytest.raises(SystemExit) as ended:
                main(["dead", "purge", *words, handle.id])
            return ended.value.code, out.getvalue().decode()

    status, said = answer("n\n")
    assert (status, "Purge 1 dead letters?" in said, "Nothing was done." in said) == (1, True, True)
    assert courier.dead.get(handle.id)
    status, said = answer("", "--yes")
    assert (status, "Purge 1 dead letters?" in said) == (0, False)
    assert list(courier.dead.list()) == []


def test_letters_survive_the_death_of_redis(tmp_path, image_server, sandbox):
    with Processes(tmp_path / "kept") as running:
        redis = parts.redis(running, name="kept")
        tree = {
            "servers": sandbox.servers(),
            "queue": parts.queue_settings(redis),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": {"max_attempts": 1, "sweep_s": 0.1},
        }
        config = parts.write_settings(running.folder / "pacs.toml", tree)
        worker = parts.worker(running, config, name="worker")
        worker.wait_ready()
        with Courier(Settings.load({"PACS_CONFIG": str(config)})) as courier:
            handle = died(courier, image_server.put("h.dcm", status=503))
            before = courier.dead.get(handle.id)
            redis.child.kill()
            parts.redis(running, name="kept", port=redis.port)
            assert courier.dead.get(handle.id) == before
            image_server.put("h.dcm", image(new_uid()))
            assert courier.dead.replay(handle.id)
            assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
            assert list(courier.dead.list()) == []
