"""Why an image is where it is: after uploads that went well, waited, and were refused."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from producer.cli import main
from producer.errors import ImageAlreadyExists, InvalidUid, NotFound
from sandbox.synthetic import image, new_uid

WAIT_S = 30


def events(trace, job_id):
    return [event["event"] for event in trace["timeline"] if event["job_id"] == job_id]


def test_the_way_of_an_image_is_told_from_its_claim_to_its_place(courier, pacs, image_server, sandbox):
    study, sop = new_uid(), new_uid()
    sandbox.set_fault("dcm4chee", "query", status=500, times=1)
    upload = courier.upload(image_server.put("a.dcm", image(study, sop=sop)))
    upload.result(timeout_s=WAIT_S)
    again = courier.upload(image_server.url("a.dcm"))
    with pytest.raises(ImageAlreadyExists):
        again.result(timeout_s=WAIT_S)
    status, trace, _ = pacs("trace", sop)
    assert (status, trace["operation"], trace["level"]) == (0, "trace", "image")
    assert (trace["server_name"], trace["server_type"]) == ("msdicom", "msdicom")
    assert trace["viewer_url"].endswith(study)
    assert "its study was new" in trace["why"]
    assert events(trace, upload.id) == ["waiting", "claimed", "routed", "stored", "ended"]
    assert events(trace, again.id) == ["ended"]
    assert "image_already_exists" in trace["timeline"][-1]["text"]
    assert (trace["claim"]["server_name"], trace["claim"]["opened_by"]) == ("msdicom", upload.id)
    assert (trace["receipt"]["job_id"], trace["held_by"], trace["storing"]) == (upload.id, None, [])
    assert {job["job_id"]: (job["state"], job["attempts"]) for job in trace["jobs"]} == {
        upload.id: ("done", 2),
        again.id: ("done", 1),
    }
    shown = CliRunner().invoke(main, ["trace", sop], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Stored on msdicom." in shown.stdout

    of_study = courier.trace(study).result(timeout_s=WAIT_S)
    assert (of_study["level"], of_study["server_name"]) == ("study", "msdicom")
    assert "claimed" in events(of_study, upload.id)
    of_series = courier.trace(f"{study}.1").result(timeout_s=WAIT_S)
    assert (of_series["level"], of_series["servers"][0]["study_uid"]) == ("series", study)


def shown(uid):
    """What the terminal shows: the present state, and the history."""
    result = CliRunner().invoke(main, ["trace", uid], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    now, _, history = result.stdout.partition("history, as the ledger remembers it")
    answers = now.partition("now, as the servers say")[2]
    return [line.split() for line in answers.splitlines() if line.startswith(("msdicom", "dcm4chee"))], history


def test_a_trace_on_the_terminal_tells_what_is_from_what_was(courier, pacs, image_server, sandbox):
    study, sop = new_uid(), new_uid()
    courier.upload(image_server.put("c.dcm", image(study, sop=sop))).result(timeout_s=WAIT_S)
    now, history = shown(sop)
    assert now == [["msdicom", "yes"], ["dcm4chee", "no"]]
    assert "there now" in history
    assert pacs("delete", "study", study, "--yes")[0] == 0
    now, history = shown(sop)
    assert now == [["msdicom", "no"], ["dcm4chee", "no"]]
    assert "deletion ordered" in history
    assert "there now" not in history


def test_what_others_put_there_is_found_and_said_to_be_theirs(courier, put, sandbox):
    study = new_uid()
    put(sandbox.dcm4chee, image(study))
    trace = courier.trace(study).result(timeout_s=WAIT_S)
    assert (trace["server_name"], trace["timeline"], trace["claim"]) == ("dcm4chee", [], None)
    assert "opened there by others" in trace["why"]


def test_a_silent_server_is_part_of_the_answer_and_the_ledger_still_knows(courier, pacs, image_server, sandbox):
    study, sop = new_uid(), new_uid()
    courier.upload(image_server.put("b.dcm", image(study, sop=sop))).result(timeout_s=WAIT_S)
    sandbox.set_fault("msdicom", "*", refuse=True)
    status, trace, _ = pacs("trace", sop)
    assert (status, trace["servers"][0]["status"]) == (3, "unavailable")
    assert (trace["server_name"], trace["level"]) == ("msdicom", "image")
    assert "last word is msdicom" in trace["why"]


def test_what_nobody_knows_is_not_found(courier, pacs):
    with pytest.raises(NotFound):
        courier.trace(new_uid()).result(timeout_s=WAIT_S)
    with pytest.raises(InvalidUid):
        courier.trace("1.2.x")
    assert pacs("trace", new_uid())[0] == 1
    assert pacs("trace", "*")[0] == 2
