"""No study is split, however many images of it race and however slow the servers are."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import requests

from producer import Courier
from sandbox.synthetic import image, new_uid

JOBS = {"sweep_s": 0.2, "backoff_base_s": 0.2}


def count_on(url, study):
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def upload_all(running, image_server, studies, images_per_study):
    urls = [image_server.put(f"{study}/{n}.dcm", image(study)) for study in studies for n in range(images_per_study)]
    random.Random(7).shuffle(urls)
    with Courier(running.settings) as courier:
        handles = [courier.upload(url) for url in urls]
        reports = [report for _, report in courier.as_completed(handles, timeout_s=150)]
    assert [report.error for report in reports if report.error] == []
    assert len(reports) == len(urls)
    return [report.result for report in reports]


@pytest.mark.parametrize("policy", ["preferred", "weighted"])
def test_sixty_racing_images_of_one_new_study_end_on_one_server(worker, image_server, sandbox, policy):
    sandbox.set_fault("msdicom", "*", latency_ms=[50, 300])
    sandbox.set_fault("dcm4chee", "*", latency_ms=[50, 300])
    study = new_uid()
    payloads = upload_all(worker(jobs=JOBS, routing={"policy": policy}), image_server, [study], 60)
    assert len({payload["server_name"] for payload in payloads}) == 1
    assert sorted((count_on(sandbox.msdicom, study), count_on(sandbox.dcm4chee, study))) == [0, 60]
    actions = Counter(payload["study_action"] for payload in payloads)
    assert actions == {"created": 1, "updated": 59}
    assert Counter(payload["route"]["reason"] for payload in payloads)["new_study"] == 1


def test_twenty_interleaved_studies_are_never_split_and_every_image_is_stored_once(worker, image_server, sandbox):
    sandbox.set_fault("msdicom", "*", latency_ms=[5, 60])
    sandbox.set_fault("dcm4chee", "*", latency_ms=[5, 60])
    studies = [new_uid() for _ in range(20)]
    payloads = upload_all(worker(jobs=JOBS, routing={"policy": "balanced"}), image_server, studies, 20)
    for study in studies:
        assert sorted((count_on(sandbox.msdicom, study), count_on(sandbox.dcm4chee, study))) == [0, 20]
    chosen = Counter({payload["study_uid"]: payload["server_name"] for payload in payloads}.values())
    assert abs(chosen["msdicom"] - chosen["dcm4chee"]) <= 2, "balanced shares new studies evenly"
    assert Counter(payload["study_action"] for payload in payloads)["created"] == 20
