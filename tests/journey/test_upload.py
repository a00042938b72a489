"""One image's whole way: a real broker, a real worker process, both PACS of the sandbox."""

from __future__ import annotations

import hashlib

import pytest
import requests

from producer.errors import (
    ImageAlreadyExists,
    InvalidRequest,
    NotDicom,
    PacsUnavailable,
    SourceNotAllowed,
    SourceNotFound,
    StudyConflict,
)
from sandbox.synthetic import image, new_uid

WAIT_S = 30


def studies_on(url, study):
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return answer.json() if answer.status_code == 200 else []


def test_a_new_study_goes_to_the_preferred_server_and_the_payload_says_everything(courier, image_server, sandbox):
    study, sop = new_uid(), new_uid()
    body = image(study, sop=sop)
    url = image_server.put("a b.dcm", body)
    handle = courier.upload(f"{url}?signature=SECRET")
    payload = handle.result(timeout_s=WAIT_S)
    assert payload["operation"] == "upload"
    assert payload["job_id"] == handle.id
    assert (payload["status"], payload["study_action"]) == ("stored", "created")
    assert (payload["server_name"], payload["server_type"]) == ("msdicom", "msdicom")
    assert payload["route"] == {"reason": "new_study", "study_on": [], "candidates": ["msdicom", "dcm4chee"]}
    assert (payload["study_uid"], payload["image_uid"]) == (study, sop)
    assert payload["transfer_syntax_uid"] == "1.2.840.10008.1.2.1"
    assert (payload["size_bytes"], payload["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert payload["metadata"]["00100020"] == {"vr": "LO", "Value": ["SYNTHETIC"]}
    assert payload["viewer_url"].endswith(study)
    assert payload["source"] == url
    assert list(payload["timings_ms"]) == ["fetch", "identify", "check", "route", "push", "describe"]
    assert (payload["warnings"], payload["attempts"]) == ([], 1)
    assert handle.status() == handle.stage() == "done"
    assert len(studies_on(sandbox.msdicom, study)) == 1
    assert studies_on(sandbox.dcm4chee, study) == []


def test_the_next_image_of_a_study_follows_it_to_its_server(courier, image_server, sandbox, put):
    study = new_uid()
    put(sandbox.dcm4chee, image(study))
    payload = courier.upload(image_server.put("b.dcm", image(study))).result(timeout_s=WAIT_S)
    assert (payload["server_name"], payload["study_action"]) == ("dcm4chee", "updated")
    assert payload["route"]["reason"] == "study_exists"
    assert payload["route"]["study_on"] == ["dcm4chee"]
    assert len(studies_on(sandbox.dcm4chee, study)) == 2


def test_an_image_that_is_there_is_refused_with_the_name_of_the_server(courier, image_server, sandbox, put):
    study, sop = new_uid(), new_uid()
    put(sandbox.dcm4chee, image(study, sop=sop))
    with pytest.raises(ImageAlreadyExists) as caught:
        courier.upload(image_server.put("c.dcm", image(study, sop=sop))).result(timeout_s=WAIT_S)
    assert (caught.value.server_name, caught.value.server_type) == ("dcm4chee", "dcm4chee")


def test_the_same_uid_with_other_bytes_shows_both_digests(courier, image_server):
    study, sop = new_uid(), new_uid()
    first, second = image(study, sop=sop), image(study, sop=sop, InstanceNumber=2)
    courier.upload(image_server.put("d1.dcm", first)).result(timeout_s=WAIT_S)
    with pytest.raises(ImageAlreadyExists) as caught:
        courier.upload(image_server.put("d2.dcm", second)).result(timeout_s=WAIT_S)
    details = caught.value.details
    assert details["stored_sha256"] == hashlib.sha256(first).hexdigest()
    assert details["sha256"] == hashlib.sha256(second).hexdigest()
    assert details["same_bytes"] is False


def test_of_two_jobs_with_the_same_image_one_stores_and_one_is_told_who_has_it(courier, image_server, sandbox):
    sandbox.set_fault("msdicom", "store", latency_ms=300)
    url = image_server.put("e.dcm", image(new_uid()))
    handles = [courier.upload(url) for _ in range(4)]
    ends = [
        report.error.code if report.error else "stored" for _, report in courier.as_completed(handles, timeout_s=WAIT_S)
    ]
    assert sorted(ends) == ["image_already_exists"] * 3 + ["stored"]


def test_a_server_can_be_asked_for_but_never_splits_a_study(courier, image_server, sandbox):
    study = new_uid()
    asked = courier.upload(image_server.put("f.dcm", image(study)), server="dcm4chee").result(timeout_s=WAIT_S)
    assert (asked["server_name"], asked["route"]["reason"]) == ("dcm4chee", "requested")
    with pytest.raises(StudyConflict):
        courier.upload(image_server.put("g.dcm", image(study)), server="msdicom").result(timeout_s=WAIT_S)
    assert studies_on(sandbox.msdicom, study) == []


def test_a_silent_server_is_never_read_as_not_there(courier, image_server, sandbox):
    study = new_uid()
    sandbox.set_fault("msdicom", "*", refuse=True)
    with pytest.raises(PacsUnavailable) as caught:
        courier.upload(image_server.put("h.dcm", image(study))).result(timeout_s=WAIT_S)
    assert caught.value.server_name == "msdicom"
    assert studies_on(sandbox.dcm4chee, study) == []


def test_a_server_that_recovers_gets_the_job_done(courier, image_server, sandbox):
    sandbox.set_fault("dcm4chee", "query", status=500, times=1)
    payload = courier.upload(image_server.put("i.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
    assert payload["attempts"] == 2


def test_refusals_come_with_their_code_and_the_worker_lives_on(courier, image_server):
    with pytest.raises(NotDicom):
        courier.upload(image_server.put("page.html", b"<html>no image</html>")).result(timeout_s=WAIT_S)
    with pytest.raises(SourceNotFound):
        courier.upload(image_server.url("nothing.dcm")).result(timeout_s=WAIT_S)
    with pytest.raises(SourceNotAllowed):
        courier.upload("http://198.51.100.7/a.dcm").result(timeout_s=WAIT_S)
    with pytest.raises(InvalidRequest, match="msdicom, dcm4chee"):
        courier.upload(image_server.url("nothing.dcm"), server="elsewhere").result(timeout_s=WAIT_S)
    assert courier.upload(image_server.put("ok.dcm", image(new_uid()))).result(timeout_s=WAIT_S)["status"] == "stored"


def test_the_same_idempotency_key_is_one_job_for_library_and_plain_clients(courier, image_server, sandbox):
    study = new_uid()
    url = image_server.put("k.dcm", image(study))
    first = courier.upload(url, idempotency_key="order-7")
    assert courier.upload(url, idempotency_key="order-7").id == first.id
    plain = courier._app.send_task("pacs.upload", kwargs={"job": {"image_url": url, "idempotency_key": "order-7"}}).id
    payload = first.result(timeout_s=WAIT_S)
    assert courier.handle(plain).result(timeout_s=WAIT_S) == payload
    assert len(studies_on(sandbox.msdicom, study)) == 1
    with pytest.raises(InvalidRequest, match=first.id):
        courier.upload(image_server.url("another.dcm"), idempotency_key="order-7")
    other = courier._app.send_task("pacs.delete", kwargs={"job": {"uid": study, "idempotency_key": "order-7"}}).id
    with pytest.raises(InvalidRequest, match=first.id):
        courier.handle(other).result(timeout_s=WAIT_S)


def test_a_job_can_be_cancelled_until_it_is_pushed(courier, image_server, sandbox):
    sandbox.set_fault("msdicom", "query", latency_ms=1500)
    study = new_uid()
    handle = courier.upload(image_server.put("l.dcm", image(study)))
    assert handle.cancel()
    with pytest.raises(Exception, match="cancelled"):
        handle.result(timeout_s=WAIT_S)
    assert studies_on(sandbox.msdicom, study) == []
