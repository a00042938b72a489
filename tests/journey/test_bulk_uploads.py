"""Batches of uploads over a real broker, by workers that get killed, beside single jobs for the same images."""

from __future__ import annotations

import io
import time
import zipfile

import pytest
import requests

from courier.messages import BatchJob, BatchUploadJob
from producer import Courier
from producer.errors import Cancelled, CourierError, ImageAlreadyExists
from sandbox.synthetic import image, new_uid

WAIT_S = 60
QUICK = {"max_attempts": 5, "backoff_base_s": 0.1, "sweep_s": 0.1, "lease_s": 1.5, "grace_s": 2, "max_deaths": 5}


def order(courier, *, timeout_s=WAIT_S, **fields):
    handle = courier.enqueue("pacs.batch.upload", BatchUploadJob, fields)
    return handle.id, handle.result(timeout_s=timeout_s)


def send_order(courier, what, batch):
    return courier.enqueue(f"pacs.batch.{what}", BatchJob, {"batch_id": batch}).result(timeout_s=WAIT_S)


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def statuses(courier, batch, which=None):
    rows = list(courier.batch.report(batch))
    return [(row[which] if which else row)["status"] for row in rows]


def count(url, study):
    answer = requests.get(
        f"{url}/studies/{study}/instances",
        headers={"Accept": "application/dicom+json"},
        params={"limit": 200},
        timeout=10,
    )
    return len(answer.json()) if answer.status_code == 200 else 0


def put(image_server, study, number=1):
    return [image_server.put(f"{new_uid()}.dcm", image(study, side=8)) for _ in range(number)]


def test_a_batch_is_uploaded_verified_and_undone(worker, image_server, sandbox):
    old, studies = new_uid(), [new_uid() for _ in range(6)]
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        (before,) = put(image_server, old)
        courier.upload(before, server="dcm4chee").result(timeout_s=WAIT_S)
        urls = [url for study in studies for url in put(image_server, study, 30)]
        urls += [before, *put(image_server, old), image_server.url("absent.dcm")]
        batch, result = order(courier, items=urls)
        assert result["state"] == "done"
        assert statuses(courier, batch) == ["stored"] * 180 + ["already_there", "stored", "refused"]
        assert statuses(courier, batch, "verify") == ["verified"] * 182 + ["open"]
        row = list(courier.batch.report(batch))[181]
        assert (row["server_name"], row["result"]["study_uid"]) == ("dcm4chee", old)
        assert [count(sandbox.msdicom, study) for study in studies] == [30] * 6
        send_order(courier, "undo", batch)
        assert statuses(courier, batch, "undo") == ["undone"] * 180 + ["kept", "undone", "open"]
        assert [count(sandbox.msdicom, study) for study in studies] == [0] * 6
        assert count(sandbox.dcm4chee, old) == 1


@pytest.mark.parametrize("wishes", [("retry", "undo"), ("undo",)])
def test_what_may_have_arrived_when_a_batch_was_cancelled_is_still_the_batchs(worker, image_server, sandbox, wishes):
    study = new_uid()
    urls = put(image_server, study, 4)
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        sandbox.set_fault("msdicom", "store", latency_ms=1000, commit_then_drop=True)
        fetched = len(image_server.requests)
        handle = courier.enqueue("pacs.batch.upload", BatchUploadJob, {"items": urls})
        until(lambda: len(image_server.requests) >= fetched + 4)
        courier.batch.pause(handle.id)
        until(lambda: count(sandbox.msdicom, study) == 4)
        courier.batch.cancel(handle.id)
        with pytest.raises(Cancelled):
            handle.result(timeout_s=WAIT_S)
        sandbox.reset_faults()
        assert statuses(courier, handle.id) == ["open"] * 4
        for what in wishes:
            send_order(courier, what, handle.id)
        retried = "retry" in wishes
        assert statuses(courier, handle.id) == ["stored" if retried else "open"] * 4
        assert statuses(courier, handle.id, "undo") == ["undone" if retried else "kept"] * 4
        assert count(sandbox.msdicom, study) == (0 if retried else 4)


def test_a_worker_killed_between_a_push_and_its_record_stores_nothing_twice(worker, image_server, sandbox):
    study = new_uid()
    urls = put(image_server, study, 60)
    doomed = worker(jobs=QUICK)
    with Courier(doomed.settings) as courier:
        sandbox.set_fault("msdicom", "store", latency_ms=1500)
        handle = courier.enqueue("pacs.batch.upload", BatchUploadJob, {"items": urls})
        until(lambda: count(sandbox.msdicom, study) >= 1)
        doomed.kill()
        assert set(statuses(courier, handle.id)) == {"open"}
        sandbox.reset_faults()
        fetched, arrived = len(image_server.requests), count(sandbox.msdicom, study)
        worker(jobs=QUICK)
        handle.result(timeout_s=WAIT_S)
        assert statuses(courier, handle.id) == ["stored"] * 60
        assert statuses(courier, handle.id, "verify") == ["verified"] * 60
        assert count(sandbox.msdicom, study) == 60
        assert len(image_server.requests) - fetched <= 60 - arrived  # what had arrived was asked for, not fetched again


def test_single_jobs_and_a_batch_with_the_same_images_store_each_once(worker, image_server, sandbox):
    study = new_uid()
    urls = put(image_server, study, 50)
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        sandbox.set_fault("msdicom", "store", latency_ms=100)
        singles = [courier.upload(url) for url in urls[:5]]
        handle = courier.enqueue("pacs.batch.upload", BatchUploadJob, {"items": urls})
        singles += [courier.upload(url) for url in urls[5:10]]
        handle.result(timeout_s=WAIT_S)
        by_batch = statuses(courier, handle.id)
        by_single = [_ending(single) for single in singles]
        assert sorted(zip(by_batch[:10], by_single, strict=True)) == sorted(
            [("stored", "already_there") if one == "stored" else ("already_there", "stored") for one in by_batch[:10]]
        )
        assert by_batch[10:] == ["stored"] * 40
        assert count(sandbox.msdicom, study) == 50


def _ending(handle):
    try:
        return handle.result(timeout_s=WAIT_S)["status"]
    except ImageAlreadyExists:
        return "already_there"


def test_a_folder_and_an_archive_are_uploaded_by_their_names(worker, image_server, sandbox, tmp_path):
    study = new_uid()
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(7):
        (folder / "deep" / f"{number}.dcm").write_bytes(image(study, side=8))
    (folder / "readme.txt").write_text("This is no image.")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.dcm", image(study, side=8))
    running = worker(
        jobs=QUICK, sources={"allow_hosts": ["127.0.0.1:*"], "allow_private_networks": True, "folders": [str(folder)]}
    )
    with Courier(running.settings) as courier:
        batch, _ = order(courier, source=f"file://{folder}/")
        assert sorted(statuses(courier, batch)) == ["skipped", *["stored"] * 7]
        batch, _ = order(courier, source=image_server.put("four.zip", packed.getvalue()))
        assert statuses(courier, batch) == ["stored"] * 4
        assert count(sandbox.msdicom, study) == 11


def test_a_server_that_stays_silent_leaves_failures_that_a_retry_mends(worker, image_server, sandbox):
    urls = put(image_server, new_uid(), 30)
    running = worker(jobs={**QUICK, "max_attempts": 2})
    with Courier(running.settings) as courier:
        sandbox.set_fault("dcm4chee", "query", status=503)
        batch, _ = order(courier, items=urls)
        assert set(statuses(courier, batch)) == {"failed"}
        assert {row["code"] for row in courier.batch.report(batch)} == {"pacs_unavailable"}
        sandbox.reset_faults()
        send_order(courier, "retry", batch)
        assert statuses(courier, batch) == ["stored"] * 30


def test_images_that_verify_finds_missing_are_stored_again_by_a_retry(worker, image_server, sandbox):
    study = new_uid()
    urls = put(image_server, study, 6)
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        batch, _ = order(courier, items=urls)
        gone = list(courier.batch.report(batch))[2]["result"]["image_uid"]
        series = list(courier.batch.report(batch))[2]["result"]["series_uid"]
        requests.delete(f"{sandbox.msdicom}/studies/{study}/series/{series}/instances/{gone}", timeout=10)
        send_order(courier, "verify", batch)
        found = ["verified"] * 2 + ["missing"] + ["verified"] * 3
        assert statuses(courier, batch, "verify") == found
        assert courier.batch.reach(courier.batch.get(batch), "retry") == {("msdicom", "missing"): 1}
        result = send_order(courier, "retry", batch)
        assert result["passes"]["apply"]["totals"] == {"stored": 6}
        assert result["passes"]["verify"]["totals"] == {"verified": 6}
        assert count(sandbox.msdicom, study) == 6
        send_order(courier, "undo", batch)
        assert count(sandbox.msdicom, study) == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"items": ["plain.dcm"]}, "no URL"),
        ({"items": ["https://h/a.dcm"], "server": "nowhere"}, "No server is called"),
        ({"source": "http://127.0.0.1/page"}, "can be listed"),
    ],
)
def test_an_order_that_makes_no_sense_says_so_and_does_nothing(worker, image_server, fields, said):
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier, pytest.raises(CourierError, match=said):
        order(courier, **fields)
