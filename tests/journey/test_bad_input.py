"""Whatever is sent ends with its code and one sentence, and the worker takes the next job.

All rows go through one worker at the same time: a bad one must not disturb its neighbours.
"""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Callable
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian
from redis import Redis

from courier.messages import MESSAGE_BYTES
from producer import Courier
from producer.errors import CourierError, InvalidRequest
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid

WAIT_S = 60


def without_preamble() -> bytes:
    return image(new_uid())[132:]


def recoded(syntax: str) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(image(new_uid())))
    if syntax == ExplicitVRBigEndian:
        ds.file_meta.TransferSyntaxUID = syntax
        out = io.BytesIO()
        pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
        return out.getvalue()
    ds.file_meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def sample(name: str) -> bytes:
    with open(str(get_testdata_file(name, download=False)), "rb") as file:
        return file.read()


def lacking(keyword: str) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(image(new_uid())))
    delattr(ds, keyword)
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def with_study_uid(uid: str) -> bytes:
    with pydicom.config.disable_value_validation():
        return image(uid, series=new_uid())


def short_of_its_length(handler: Any) -> None:
    body = image(new_uid())
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body) + 1000))
    handler.end_headers()
    handler.wfile.write(body)


def endless(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"\0" * 65536)


def silent(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    time.sleep(4)


CUT = image(new_uid())[:-3000]
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "empty-file": ({"body": b""}, "not_dicom"),
    "html-page": ({"body": b"<!doctype html><p>Sign in</p>"}, "not_dicom"),
    "cut-in-its-pixels": ({"body": CUT}, "not_dicom"),
    "dicomdir": ({"body": sample("DICOMDIR")}, "missing_uid"),
    "no-sop-instance-uid": ({"body": lacking("SOPInstanceUID")}, "missing_uid"),
    "no-study-instance-uid": ({"body": lacking("StudyInstanceUID")}, "missing_uid"),
    "uid-of-65-characters": ({"body": with_study_uid("1." + "2" * 63)}, "invalid_uid"),
    "uid-with-letters": ({"body": with_study_uid("1.2.abc")}, "invalid_uid"),
    "big-endian": ({"body": recoded(ExplicitVRBigEndian)}, "stored"),
    "deflated": ({"body": recoded(DeflatedExplicitVRLittleEndian)}, "stored"),
    "no-preamble": ({"body": without_preamble()}, "stored"),
    "shorter-than-announced": ({"behave": short_of_its_length}, "source_truncated"),
    "endless": ({"behave": endless}, "source_too_large"),
    "silent": ({"behave": silent}, "source_unreachable"),
    "redirect-to-a-forbidden-host": (
        {"status": 302, "headers": {"Location": "http://169.254.169.254/latest"}},
        "source_not_allowed",
    ),
    **{f"status-{status}": ({"status": status}, "source_denied") for status in (401, 403)},
    **{f"status-{status}": ({"status": status}, "source_not_found") for status in (404, 410)},
    **{f"status-{status}": ({"status": status}, "source_unreachable") for status in (429, 500, 503)},
}
MESSAGES: dict[str, tuple[Callable[[str], Any], str]] = {
    "password-in-the-url": (lambda url: {"image_url": url.replace("://", "://me:PASSWORD@")}, "source_not_allowed"),
    "unknown-server": (lambda url: {"image_url": url, "server": "elsewhere"}, "invalid_request"),
    "url-of-the-wrong-type": (lambda url: {"image_url": 5}, "invalid_request"),
    "no-url": (lambda url: {}, "invalid_request"),
    "no-object": (lambda url: ["image_url", url], "invalid_request"),
    "nothing": (lambda url: None, "invalid_request"),
    "wrong-scheme": (lambda url: {"image_url": "gopher://host/a"}, "source_not_allowed"),
    "file-outside-the-folders": (lambda url: {"image_url": "file:///etc/passwd"}, "source_not_allowed"),
    "newer-version": (lambda url: {"image_url": url, "version": 2, "shiny": True}, "invalid_request"),
    "unknown-field": (lambda url: {"image_url": url, "shiny": {"a": [1]}}, "stored"),
}


def end_of(courier: Courier, job_ids: list[str]) -> dict[str, tuple[str, CourierError | None]]:
    handles = [courier.handle(job_id) for job_id in job_ids]
    return {
        handle.id: (report.error.payload["code"] if report.error else report.result["status"], report.error)
        for handle, report in courier.as_completed(handles, timeout_s=WAIT_S)
    }


def test_bad_input_ends_with_its_code_and_one_helpful_sentence(worker, image_server):
    running = worker(
        jobs={"max_attempts": 2, "backoff_base_s": 0.1, "sweep_s": 0.1},
        sources={
            "allow_hosts": ["127.0.0.1:*"],
            "allow_private_networks": True,
            "max_bytes": 5_000_000,
            "idle_timeout_s": 1,
        },
    )
    sent = {}
    with Courier(running.settings) as courier:
        app = courier._app
        for name, (answer, code) in BODIES.items():
            url = image_server.put(f"{name}.dcm", **answer)
            sent[app.send_task("pacs.upload", kwargs={"job": {"image_url": f"{url}?sig=SECRET"}}).id] = (name, code)
        for name, (make, code) in MESSAGES.items():
            url = image_server.put(f"{name}.dcm", image(new_uid()))
            sent[app.send_task("pacs.upload", kwargs={"job": make(url)}).id] = (name, code)
        ends = end_of(courier, list(sent))
        assert {sent[job_id][0]: end[0] for job_id, end in ends.items()} == {name: code for name, code in sent.values()}
        for job_id, (_, error) in ends.items():
            if error is not None:
                assert error.message.endswith("."), f"{sent[job_id][0]}: {error.message}"
                assert "\n" not in error.message
                assert "SECRET" not in str(error.payload)
                assert "PASSWORD" not in str(error.payload)
        again = courier.upload(image_server.put("good.dcm", image(new_uid())))
        assert again.result(timeout_s=WAIT_S)["status"] == "stored"
    assert "SECRET" not in running.log
    assert "PASSWORD" not in running.log


PLANTED = "DOE-JANE-5551234"
#: Bodies that are no task, however well they are wrapped: as bytes with their content type, and headers.
NO_TASKS: dict[str, tuple[bytes, str, dict[str, Any]]] = {
    "no-json": (f"not json {PLANTED}".encode(), "application/json", {}),
    "no-object": (f'[[], {{}}, "{PLANTED}"]'.encode(), "application/json", {}),
    "task-is-a-number": (f'{{"task": 1, "id": "{PLANTED}"}}'.encode(), "application/json", {}),
    "task-is-a-list": (f'{{"task": ["{PLANTED}"]}}'.encode(), "application/json", {}),
    "task-without-id": (f'{{"task": "pacs.upload", "kwargs": {{"a": "{PLANTED}"}}}}'.encode(), "application/json", {}),
    "unknown-task-without-id": (f'{{"task": "pacs.{PLANTED}"}}'.encode(), "application/json", {}),
    "kwargs-are-a-list": (b'{"task": "pacs.upload", "id": "1", "kwargs": []}', "application/json", {}),
    "number": (b"5", "application/json", {}),
    "nothing": (b"", "application/json", {}),
    "deeply-nested": (b"[" * 100_000, "application/json", {}),
    "body-of-two-parts": (b"[[], {}]", "application/json", {"task": "pacs.upload", "id": "a"}),
    "body-of-wrong-parts": (b'["a", 5, null]', "application/json", {"task": "pacs.upload", "id": "a"}),
    "embed-is-nothing": (b"[[], {}, null]", "application/json", {"task": "pacs.upload", "id": "a"}),
    "id-is-a-number": (b"[[], {}, {}]", "application/json", {"task": "pacs.upload", "id": 5}),
    "header-without-id": (b"[[], {}, {}]", "application/json", {"task": "pacs.upload"}),
    "task-header-is-a-list": (b"[[], {}, {}]", "application/json", {"task": ["pacs.upload"], "id": "a"}),
    "time-limit-is-a-word": (b"[[], {}, {}]", "application/json", {"task": "pacs.upload", "id": "a", "timelimit": "x"}),
    "eta-is-a-word": (b"[[], {}, {}]", "application/json", {"task": "pacs.upload", "id": "a", "eta": PLANTED}),
    "pickle": (f"cbuiltins\neval\n{PLANTED}".encode(), "application/x-python-serialize", {}),
    "unknown-content-type": (PLANTED.encode(), "application/x-shiny", {}),
    "unknown-compression": (b"[[], {}, {}]", "application/json", {"compression": "application/x-shiny"}),
}
#: What anybody who reaches Redis can push onto the queue's list: no message, or one whose wrapping is torn.
NO_MESSAGES = [
    b"\xff\xfe",
    f"not json {PLANTED}".encode(),
    b"5",
    b"null",
    b"{}",
    f'{{"properties": "{PLANTED}"}}'.encode(),
    b'{"body": "%%%", "properties": {"body_encoding": "base64", "delivery_tag": "1"}}',
    b'{"body": "W10=", "headers": [], "properties": {"delivery_tag": "2", "delivery_info": {}}}',
    b'{"body": "W10=", "headers": [1], "properties": {"delivery_tag": {}, "delivery_info": {}}}',
    *(
        b'{"body": "W10=", "headers": {}, "properties": {"delivery_tag": %b, "delivery_info": '
        b'{"exchange": "", "routing_key": "pacs"}}}' % tag
        for tag in (b"true", b"null", b"[]", b"{}")
    ),
]


def test_what_is_no_job_is_thrown_away_and_neither_stops_the_worker_nor_is_quoted(worker, redis, image_server):
    running = worker()
    with Courier(running.settings) as courier, courier._app.connection_for_write() as connection:
        queue = connection.SimpleQueue("pacs")
        for body, content_type, headers in NO_TASKS.values():
            queue.put(body, serializer=None, content_type=content_type, content_encoding="utf-8", headers=dict(headers))
        queue.close()
        with Redis.from_url(redis.broker_url) as client:
            client.lpush("pacs", *NO_MESSAGES)
        send = courier._app.send_task
        unknown = send("pacs.nonsense", kwargs={"job": {"patient": PLANTED}}, queue="pacs")
        large = send("pacs.upload", kwargs={"job": {"image_url": image_server.url("a.dcm"), "note": PLANTED * 20_000}})
        for refused in (unknown, large):
            with pytest.raises(InvalidRequest, match="threw the message away"):
                courier.handle(refused.id).result(timeout_s=WAIT_S)
        handle = courier.upload(image_server.put("good.dcm", image(new_uid())))
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
        with Redis.from_url(redis.broker_url) as client:
            assert poll(lambda: client.hlen("pacs.unacked") == 0, timeout_s=WAIT_S), "they would come again"
    assert running.log.count("Threw a message away") == len(NO_TASKS) + 2
    assert running.log.count("Threw away what is no message") == len(NO_MESSAGES)
    assert PLANTED not in running.log
    assert "Connection to broker lost" not in running.log


def peak_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_a_compressed_message_is_thrown_away_without_being_unpacked(worker, redis, image_server):
    running = worker()
    before_kib = peak_kib(running.child.pid)
    with Courier(running.settings) as courier, courier._app.connection_for_write() as connection:
        bomb = zlib.compress(bytes(200 * 1024**2), 9)
        assert len(bomb) < MESSAGE_BYTES
        queue = connection.SimpleQueue("pacs")
        headers = {"task": "pacs.upload", "id": "bomb", "compression": "application/x-gzip"}
        queue.put(bomb, serializer=None, content_type="application/json", content_encoding="binary", headers=headers)
        queue.close()
        with pytest.raises(InvalidRequest, match="compressed"):
            courier.handle("bomb").result(timeout_s=WAIT_S)
        handle = courier.upload(image_server.put("good.dcm", image(new_uid())))
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
    assert peak_kib(running.child.pid) - before_kib < 100 * 1024


def test_a_job_that_is_too_large_is_refused_before_it_is_sent(redis):
    with (
        Courier(broker_url=redis.broker_url, result_backend=redis.result_backend) as courier,
        pytest.raises(InvalidRequest, match="bytes"),
    ):
        courier.studies(filters={"PatientID": "7" * MESSAGE_BYTES})
