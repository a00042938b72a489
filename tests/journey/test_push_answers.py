"""What each documented answer to a push leads to, through a real worker."""

from __future__ import annotations

import pydicom
import pytest
import requests

from producer import Courier
from producer.errors import ImageAlreadyExists, PacsRejected, StudyConflict
from sandbox.synthetic import image, new_uid

WAIT_S = 60


@pytest.fixture
def courier(worker):
    running = worker(jobs={"max_attempts": 6, "backoff_base_s": 0.05, "sweep_s": 0.1, "pending_wait_s": 0.5})
    with Courier(running.settings) as courier:
        yield courier


def badly_formed(**keywords):
    with pydicom.config.disable_value_validation():
        return image(new_uid(), **keywords)


def images_of(url, study):
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def test_trouble_is_tried_again_and_ends_with_one_stored_image(courier, image_server, sandbox):
    rows = [
        ("msdicom", {"transient_272": True}),
        ("dcm4chee", {"transient_272": True}),
        ("dcm4chee", {"disk_full": "A700"}),
        ("msdicom", {"lose_last_part": True}),
        ("msdicom", {"truncate": True}),
        ("dcm4chee", {"truncate": True}),
        ("msdicom", {"status": 503}),
        ("dcm4chee", {"status": 500}),
        ("msdicom", {"reset_after_bytes": 1000}),
    ]
    for server, fault in rows:
        study = new_uid()
        sandbox.set_fault(server, "store", **fault, times=1)
        url = image_server.put(f"{study}.dcm", image(study))
        payload = courier.upload(url, server=server).result(timeout_s=WAIT_S)
        assert (payload["status"], payload["server_name"]) == ("stored", server), fault
        assert payload["attempts"] > 1, fault
        assert images_of(getattr(sandbox, server), study) == 1, fault


def test_what_a_broken_store_left_behind_is_removed_and_sent_again(courier, image_server, sandbox):
    study = new_uid()
    sandbox.set_fault("msdicom", "store", pending_45071="never", times=1)
    payload = courier.upload(image_server.put("stuck.dcm", image(study))).result(timeout_s=WAIT_S)
    assert (payload["status"], payload["server_name"]) == ("stored", "msdicom")
    assert images_of(sandbox.msdicom, study) == 1


def test_an_image_that_another_program_is_storing_is_waited_for_and_then_called_theirs(courier, image_server, sandbox):
    sandbox.set_fault("msdicom", "store", pending_45071=0.3, times=1)
    handle = courier.upload(image_server.put("theirs.dcm", image(new_uid())))
    with pytest.raises(ImageAlreadyExists) as caught:
        handle.result(timeout_s=WAIT_S)
    assert caught.value.server_name == "msdicom"


def test_an_image_that_somebody_else_stored_meanwhile_is_not_called_ours(courier, image_server, sandbox):
    study, sop = new_uid(), new_uid()
    body = image(study, sop=sop)
    sandbox.set_fault("msdicom", "store", latency_ms=1500, times=1)
    handle = courier.upload(image_server.put("raced.dcm", body))
    for _, report in courier.watch([handle], timeout_s=WAIT_S):
        if report.stage == "push":
            requests.post(
                f"{sandbox.msdicom}/studies",
                data=body,
                headers={"Content-Type": "application/dicom", "Accept": "application/dicom+json"},
                timeout=10,
            ).raise_for_status()
    with pytest.raises(ImageAlreadyExists) as caught:
        handle.result(timeout_s=WAIT_S)
    assert caught.value.server_name == "msdicom"


def test_refusals_of_a_server_come_with_its_reason_and_are_not_repeated(courier, image_server, sandbox):
    study = new_uid()
    first = courier.upload(image_server.put("one.dcm", image(study)), server="dcm4chee")
    assert first.result(timeout_s=WAIT_S)["warnings"] == []
    other_name = image_server.put("two.dcm", image(study, PatientName="Another^Name"))
    with pytest.raises(StudyConflict) as conflict:
        courier.upload(other_name).result(timeout_s=WAIT_S)
    assert conflict.value.details["failure_reason"] == 42872
    long_id = image_server.put("three.dcm", badly_formed(PatientID="X" * 70))
    with pytest.raises(PacsRejected) as rejected:
        courier.upload(long_id, server="msdicom").result(timeout_s=WAIT_S)
    assert rejected.value.details["failure_reason"] == 43264
    assert "X" * 70 not in str(rejected.value.payload)


def test_what_msdicom_stores_in_spite_of_is_a_success_with_warnings(courier, image_server):
    url = image_server.put("odd.dcm", badly_formed(Modality="LONGER-THAN-SIXTEEN"))
    payload = courier.upload(url).result(timeout_s=WAIT_S)
    assert payload["status"] == "stored"
    assert any("0008,0060" in warning for warning in payload["warnings"])
