"""What `pacs upload` and `pacs result` say of what failed, of what kind of job it was, and where no worker answers."""

from __future__ import annotations

import json
import re
import uuid

import pytest

from courier.redaction import redact_url
from producer import Courier
from producer.cli.no_worker import SENTENCE
from sandbox import processes as parts
from sandbox.synthetic import image, new_uid
from tests.terminals import in_pipe, in_terminal

WAIT_S = 30


@pytest.fixture
def running(worker):
    return worker(jobs={"max_attempts": 1, "sweep_s": 0.1})


@pytest.fixture
def env(running):
    return {"PACS_CONFIG": str(running.config)}


def test_the_json_of_an_upload_that_failed_has_its_redacted_url_and_its_job_id(env, image_server):
    urls = [
        image_server.put("page.html", b"<html>"),
        image_server.put("down.dcm", status=503),
        f"{image_server.put('stored.dcm', image(new_uid()))}?sig=SECRET",
        "http://192.0.2.1/a.dcm?sig=SECRET",
    ]
    ended = in_pipe(["upload", *urls, "--json"], env=env)
    assert ended.status == 1
    assert "SECRET" not in ended.raw + ended.errors
    told = json.loads(ended.raw)
    assert [one["source"] for one in told] == [redact_url(url) for url in urls]
    assert all(uuid.UUID(one["job_id"]) for one in told)
    for one in told:
        again = json.loads(in_pipe(["result", one["job_id"], "--json"], env=env).raw)
        assert (again["source"], again["job_id"]) == (one["source"], one["job_id"])
        assert again.get("task", "pacs.upload") == "pacs.upload"
    open_one = json.loads(in_pipe(["upload", urls[1], "--timeout", "0", "--json"], env=env).raw)
    assert open_one[0]["source"] == urls[1]


def test_an_unknown_server_is_wrong_usage_of_an_upload_too(env, image_server):
    good, bad = image_server.put("a.dcm", image(new_uid())), image_server.put("page.html", b"<html>")
    for words in (["upload", good], ["upload", good, bad, "--json"], ["exists", "study", "1.2.3"]):
        ended = in_pipe([*words, "--server", "nope"], env=env)
        assert ended.status == 2, ended
        assert "nope" in ended.raw + ended.errors
    (told,) = json.loads(in_pipe(["upload", good, "--server", "nope", "--json"], env=env).raw)
    assert in_pipe(["result", told["job_id"]], env=env).status == 2
    assert in_pipe(["upload", bad], env=env).status == 1
    assert in_pipe(["upload", good, bad], env=env).status == 1


@pytest.mark.parametrize("columns", [80, None])
def test_a_result_says_what_kind_of_job_it_was_and_is_whole(running, env, image_server, columns):
    study = new_uid()
    with Courier(running.settings) as courier:
        stored = courier.upload(image_server.put("a.dcm", image(study)))
        payload = stored.result(timeout_s=WAIT_S)
        refused = courier.upload(image_server.put("page.html", b"<html>"))
        asked, missing = courier.exists("study", study), courier.delete("study", "1.2.3.4")
        for _ in courier.as_completed([refused, asked, missing], timeout_s=WAIT_S):
            pass
        batch = courier.batch.upload([image_server.put("b.dcm", image(study))])
        batch.result(timeout_s=WAIT_S)
        ids = {"upload": stored.id, "refused": refused.id, "exists": asked.id, "delete": missing.id, "batch": batch.id}
    shown = {name: said(["result", job_id], env, columns) for name, job_id in ids.items()}
    assert {name: re.findall(r"pacs\.[a-z.]+: \w+", text)[0] for name, text in shown.items()} == {
        "upload": "pacs.upload: done",
        "refused": "pacs.upload: failed",
        "exists": "pacs.exists: done",
        "delete": "pacs.delete: failed",
        "batch": "pacs.batch.upload: done",
    }
    assert document(shown["upload"]) == payload
    assert document(shown["refused"])["error"]["code"] == "not_dicom"
    assert document(shown["exists"])["servers"][0]["study_uid"] == study
    assert document(shown["batch"])["totals"]["stored"] == 1


def said(words, env, columns):
    ended = in_pipe(words, env=env) if columns is None else in_terminal(words, columns=columns, env=env)
    return ended.raw if columns is None else ended.shown


def document(text):
    return json.loads(text[text.index("\n{\n") :])


def test_a_command_that_waits_says_when_no_worker_answers_and_only_then(redis, tmp_path, worker):
    config = parts.write_settings(tmp_path / "pacs.toml", {"queue": parts.queue_settings(redis)})
    env = {"PACS_CONFIG": str(config)}
    for words in (
        ["upload", "http://192.0.2.1/a.dcm", "--json"],
        ["studies"],
        ["batch", "upload", "http://192.0.2.1/b"],
    ):
        ended = in_pipe([*words, "--timeout", "14"], env=env)
        assert (ended.status, ended.errors.count(SENTENCE)) == (3, 1), ended
        assert SENTENCE not in ended.raw
    assert SENTENCE in in_terminal(["storage", "--timeout", "14"], columns=80, env=env).shown
    assert SENTENCE not in in_pipe(["storage", "--timeout", "4"], env=env).errors


def test_a_command_that_waits_for_a_slow_server_is_not_told_of_a_worker(running, env, sandbox, image_server):
    sandbox.set_fault("msdicom", "store", latency_ms=13_000, times=1)
    ended = in_pipe(["upload", image_server.put("a.dcm", image(new_uid())), "--server", "msdicom"], env=env)
    assert (ended.status, SENTENCE in ended.errors) == (0, False), ended
