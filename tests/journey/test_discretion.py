"""What Flower, logs and Redis show of a job: useful names, and neither credential nor patient."""

from __future__ import annotations

import redis as redis_client
import requests

from courier.messages import StudiesJob
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes
from sandbox.synthetic import image, new_uid

WAIT_S = 30
#: What Flower's list of tasks asks for.
TABLE = {"draw": 1, "start": 0, "length": 50, "order[0][column]": 0, "columns[0][data]": "name"}
SIGNATURE, PATIENT = "SIGNATURE-5f1c", "PLANTED-PATIENT"


def everything_in(url):
    """All keys and values of one Redis database, as one text."""
    with redis_client.Redis.from_url(url) as client:
        texts = []
        for key in client.scan_iter():
            read = {b"hash": client.hgetall, b"string": client.get, b"zset": lambda k: client.zrange(k, 0, -1)}
            read |= {b"list": lambda k: client.lrange(k, 0, -1), b"set": client.smembers}
            read |= {b"none": lambda _: "expired meanwhile"}
            texts.append(f"{key!r} {read[client.type(key)](key)!r}")
        return "\n".join(texts)


def named_in_flower(flower, courier):
    """Whether Flower follows the worker by now: it never learns the arguments of jobs that came before that."""
    probe = courier.upload("http://192.0.2.1/probe.dcm").id
    page = f"{flower.url}/task/{probe}"
    return parts.poll(lambda: "probe.dcm" in requests.get(page, timeout=10).text, timeout_s=2, every_s=0.1)


def test_results_with_metadata_show_none_of_it_in_flower_and_logs(worker, image_server, sandbox, put, tmp_path):
    running = worker(results={"metadata": "full"})
    study = new_uid()
    put(sandbox.msdicom, image(study, PatientID=PATIENT))
    with Processes(tmp_path / "flower") as children:
        flower = parts.flower(children, running.config)
        flower.child.wait_ready()
        with Courier(running.settings) as courier:
            assert parts.poll(lambda: named_in_flower(flower, courier), timeout_s=20, every_s=0.5)
            handles = [
                courier.metadata("study", study, reason=f"{PATIENT} has moved"),
                courier.enqueue(
                    "pacs.list_studies", StudiesJob, {"filters": {"PatientID": PATIENT}, "requested_by": PATIENT}
                ),
                courier.upload(image_server.put("next.dcm", image(study, PatientID=PATIENT)), reason=PATIENT),
            ]
            results = [handle.result(timeout_s=WAIT_S) for handle in handles]
        assert all(PATIENT in str(result) for result in results), "the results themselves do hold it"
        pages = [f"{flower.url}/task/{handle.id}" for handle in handles]
        assert parts.poll(
            lambda: all("SUCCESS" in requests.get(page, timeout=10).text for page in pages), timeout_s=WAIT_S
        )
        shown = "\n".join(requests.get(page, timeout=10).text for page in pages) + flower.child.log + running.log
        rows = requests.post(f"{flower.url}/tasks/datatable", timeout=10, data=TABLE).json()["data"]
        header = requests.get(f"{flower.url}/tasks", timeout=10).text
    assert PATIENT not in shown
    lines = {row["uuid"]: row["result"] for row in rows}
    found, listed, stored = (lines[handle.id] for handle in handles)
    link, shortened_uid = results[0]["servers"][0]["viewer_url"], f"{study[:8]}…{study[-8:]}"
    assert link in shown.replace("&amp;", "&")
    assert found == f"metadata of the study found on msdicom · study {shortened_uid}"
    assert "Result" in header
    assert listed == "listed 1 study · msdicom complete, dcm4chee complete"
    assert stored == f"stored on msdicom · study {shortened_uid}"
    assert study in results[2]["viewer_url"]


def test_flower_names_the_jobs_and_nobody_shows_a_credential_or_a_patient(
    worker, redis, plain, sandbox, image_server, tmp_path
):
    running = worker(results={"metadata": "uids"})
    with Processes(tmp_path / "flower") as children:
        flower = parts.flower(children, running.config)
        flower.child.wait_ready()
        with Courier(running.settings) as courier:
            slow = image_server.put("slow.dcm", image(new_uid()))
            sandbox.set_fault("msdicom", "store", latency_ms=1500, times=1)
            first = courier.upload(f"{slow}?sig={SIGNATURE}")
            assert parts.poll(lambda: first.stage() == "push", timeout_s=WAIT_S)
            inspected = str(courier._app.control.inspect(timeout=WAIT_S, limit=1).active())
            first.result(timeout_s=WAIT_S)
            urls = [image_server.put(f"image-{n}.dcm", image(new_uid(), PatientID=PATIENT)) for n in range(3)]
            bad = image_server.put("page.html", b"<html>")
            ours = courier.upload(f"{urls[0]}?sig={SIGNATURE}")
            theirs = plain.send_task("pacs.upload", kwargs={"job": {"image_url": f"{urls[1]}?sig={SIGNATURE}"}})
            refused = courier.upload(f"{bad}?sig={SIGNATURE}")
            assert ours.result(timeout_s=WAIT_S)["status"] == "stored"
            assert theirs.get(timeout=WAIT_S)["status"] == "stored"
            for _ in courier.as_completed([refused], timeout_s=WAIT_S):
                pass
            ids = [ours.id, theirs.id, refused.id]

        def page(job_id):
            return requests.get(f"{flower.url}/task/{job_id}", timeout=10)

        assert parts.poll(lambda: all(page(job_id).status_code == 200 for job_id in ids), timeout_s=WAIT_S)
        pages = "\n".join(page(job_id).text for job_id in ids)
        pages += requests.post(f"{flower.url}/tasks/datatable", timeout=10, data=TABLE).text
        log_of_flower = flower.child.log
    assert "pacs.upload" in pages
    for name in ("image-0.dcm", "image-1.dcm", "page.html"):
        assert name in pages
    assert "slow.dcm" in inspected
    shown = {
        "celery inspect": inspected,
        "Flower": pages,
        "Flower's log": log_of_flower,
        "the worker's log": running.log,
    }
    for database in (redis.broker_url, redis.result_backend, redis.ledger_url):
        shown[database] = everything_in(database)
    assert [place for place, text in shown.items() if SIGNATURE in text] == []
    assert [place for place, text in shown.items() if PATIENT in text] == []
