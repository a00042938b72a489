"""Everything secret is planted once, everything a worker leaves behind is read: nothing of it stands anywhere.

What necessarily stands somewhere, and how long, is asserted too; ``docs/secrets.md`` says it in words.
"""

from __future__ import annotations

import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import redis as redis_client
import requests
from celery import Celery
from click.testing import CliRunner
from kombu import pools

from courier.messages import StudiesJob
from producer import Courier
from producer.cli import main
from producer.errors import CourierError
from sandbox import processes as parts
from sandbox.processes import HOST, Processes, poll
from sandbox.synthetic import image, new_uid

WAIT_S = 30
PATIENT, PATIENT_ID = "PLANTEDNAME^ANNA", "PLANTEDID-4711"
PLANTED = {
    "the password of a server": "planted-password-1",
    "the token of a server": "planted-bearer-2",
    "the client's secret": "planted-client-secret-3",
    "the access token": "planted-access-token-4",
    "a SAS signature": "planted-sas-5",
    "an S3 signature": "planted-s3-signature-6",
    "an S3 access key": "planted-s3-key-7",
    "a password in a URL": "planted-userinfo-8",
    "a field that nobody knows": "planted-field-9",
    "the patient's name": "PLANTEDNAME",
    "the patient's id": PATIENT_ID,
}
SAS = f"sv=2024-11-04&se=2099-01-01T00%3A00Z&sig={PLANTED['a SAS signature']}"
S3 = (
    f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={PLANTED['an S3 access key']}%2F20990101%2Fs3"
    f"&X-Amz-Signature={PLANTED['an S3 signature']}"
)


def found_in(shown: dict[str, str]) -> list[tuple[str, str]]:
    return [(what, place) for place, text in shown.items() for what, secret in PLANTED.items() if secret in text]


def databases(redis) -> dict[str, str]:
    """Every key and value of every database of the server."""
    shown = {}
    with redis_client.Redis.from_url(redis.broker_url) as client:
        numbers = [int(name.removeprefix("db")) for name in client.info("keyspace")]
    for number in numbers:
        with redis_client.Redis.from_url(redis.broker_url, db=number) as client:
            url = redis.broker_url.rpartition("/")[0]
        with redis_client.Redis.from_url(f"{url}/{number}") as client:
            for key in client.scan_iter():
                read = {b"hash": client.hgetall, b"string": client.get, b"set": client.smembers}
                read[b"zset"] = lambda one, client=client: client.zrange(one, 0, -1)
                read[b"list"] = lambda one, client=client: client.lrange(one, 0, -1)
                value = read[client.type(key)](key)
                fields = value.items() if isinstance(value, dict) else [(b"", value)]
                for field, content in fields:
                    shown[f"redis {number} {key.decode()} {field.decode()}".strip()] = f"{key!r} {content!r}"
    return shown


@pytest.fixture
def token_endpoint():
    """Gives the planted token to whoever brings the planted secret."""

    class TokenHandler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            granted = PLANTED["the client's secret"] in body
            token = {"access_token": PLANTED["the access token"], "token_type": "Bearer", "expires_in": 3600}
            answer = json.dumps(token if granted else {"error": "invalid_client", "error_description": body}).encode()
            self.send_response(200 if granted else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((HOST, 0), TokenHandler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://{HOST}:{server.server_address[1]}/oauth2/v2.0/token"
    server.shutdown()
    server.server_close()


@pytest.fixture
def guarded(worker, sandbox, token_endpoint, tmp_path):
    """A worker whose servers are logged in to in each of the three ways, and whose results hold no metadata."""
    msdicom, dcm4chee = sandbox.servers()
    msdicom["auth"] = {
        "type": "oauth2",
        "token_url": token_endpoint,
        "client_id": "courier",
        "client_secret_env": "WARD_SECRET",
        "scope": "https://dicom.example/.default",
    }
    dcm4chee["auth"] = {"type": "basic", "username": "courier", "password_env": "WARD_PASSWORD"}
    again = {**msdicom, "name": "again", "type": "dicomweb"}
    again["auth"] = {"type": "bearer", "token_env": "WARD_TOKEN"}
    environ = {
        "WARD_SECRET": PLANTED["the client's secret"],
        "WARD_PASSWORD": PLANTED["the password of a server"],
        "WARD_TOKEN": PLANTED["the token of a server"],
    }

    def start(log_format: str, *, options: tuple[str, ...] = (), may_show_tracebacks: bool = False):
        return worker(
            options=options,
            may_show_tracebacks=may_show_tracebacks,
            servers=[msdicom, dcm4chee, again],
            environ=environ,
            results={"metadata": "none"},
            downloads={"folders": [str(tmp_path)]},
            jobs={"max_attempts": 1, "sweep_s": 0.2},
            logs={"format": log_format},
        )

    return start


def follow_events(redis, events: list[str], ending: threading.Event) -> threading.Thread:
    app = Celery(broker=redis.broker_url, set_as_current=False)

    def listen() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": lambda event: events.append(repr(event))})
            while not ending.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.3, wakeup=False)
                except TimeoutError:
                    continue

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    return thread


def jobs(courier, image_server, study, plain):
    """One of each kind that holds something secret; the ids of those that end, and of the one that dies."""
    put = image_server.put
    denied = put("denied.dcm", b"no", status=403)
    busy = put("busy.dcm", b"later", status=503)
    good = put("good.dcm", image(study, PatientName=PATIENT, PatientID=PATIENT_ID))
    other = put("other.dcm", image(new_uid(), PatientName=PATIENT, PatientID=PATIENT_ID))
    page = put("page.html", f"<html>{PATIENT} {PATIENT_ID}".encode())
    stored = courier.upload(f"{good}?{SAS}")
    yield stored
    stored.result(timeout_s=WAIT_S)
    yield courier.upload(f"{other}?{S3}")
    yield courier.upload(f"{page}?{S3}")
    yield courier.upload(f"{denied}?{SAS}")
    yield courier.upload(f"{busy}?{SAS}")
    yield courier.upload(f"http://u:{PLANTED['a password in a URL']}@{HOST}/a.dcm")
    filters = {"PatientName": PATIENT, "PatientID": PATIENT_ID}
    yield courier.enqueue("pacs.list_studies", StudiesJob, {"filters": filters})
    job = {"image_url": f"{good}?{SAS}", "note": PLANTED["a field that nobody knows"]}
    yield courier.handle(plain.send_task("pacs.upload", kwargs={"job": job}).id)
    odd = {"level": PLANTED["a field that nobody knows"], "uid": PATIENT_ID}
    yield courier.handle(plain.send_task("pacs.exists", kwargs={"job": odd}).id)
    yield courier.handle(plain.send_task("pacs.nonsense", kwargs={"job": job}).id)


def outcome_of(handle) -> str:
    try:
        return json.dumps(handle.result(timeout_s=WAIT_S))
    except CourierError as error:
        return "".join(traceback.format_exception(error)) + json.dumps(error.payload)


def pages_of(flower, ids) -> str:
    paths = ["tasks", "workers", "broker", "worker/worker0@courier", "api/tasks?limit=100", "api/workers", "metrics"]
    paths += [f"task/{job_id}" for job_id in ids] + [f"api/task/info/{job_id}" for job_id in ids]
    paths += [f"api/task/result/{job_id}" for job_id in ids]
    pages = [requests.get(f"{flower}/{path}", timeout=30, auth=("ops", "looks")).text for path in paths]
    columns = {"draw": 1, "start": 0, "length": 500, "order[0][column]": 0, "columns[0][data]": "name"}
    table = requests.post(f"{flower}/tasks/datatable", timeout=30, data=columns, auth=("ops", "looks")).text
    return "\n".join([*pages, table])


def printed(*arguments: str) -> str:
    ended = CliRunner().invoke(main, [*arguments, "--json"])
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_secret_stands_anywhere_once_jobs_are_over(
    guarded, redis, plain, image_server, tmp_path, monkeypatch, log_format
):
    running = guarded(log_format)
    monkeypatch.setenv("PACS_CONFIG", str(running.config))
    events, ending, study = [], threading.Event(), new_uid()
    listener = follow_events(redis, events, ending)
    with Processes(tmp_path / "flower") as children:
        port = parts.free_port()
        flower = children.start(
            "flower",
            [parts.sys.executable, "-m", "worker.flower", f"--port={port}"],
            ready=lambda _: parts.answers(f"http://{HOST}:{port}/healthcheck"),
            environ={"PACS_CONFIG": str(running.config), "FLOWER_BASIC_AUTH": "ops:looks"},
            grace_s=2,
        )
        flower.wait_ready()
        with Courier(running.settings) as courier:
            handles = list(jobs(courier, image_server, study, plain))
            outcomes = [outcome_of(handle) for handle in handles]
            assert '"status": "stored"' in outcomes[0], outcomes[0]
            later = [
                courier.metadata("study", study),
                courier.exists("study", study, metadata=True),
                courier.download(study, f"file://{tmp_path}/a.zip"),
                courier.trace(study),
                courier.status(),
            ]
            outcomes += [outcome_of(handle) for handle in later]
            later.append(courier.delete("study", study))  # not beside its download
            outcomes.append(outcome_of(later[-1]))
            handles += later
            ids = [handle.id for handle in handles]
            dead = [letter.job_id for letter in courier.dead.list()]
            assert [letter.error["code"] for letter in courier.dead.list()] == ["source_unreachable"]
            url = f"http://{HOST}:{port}"
            assert poll(lambda: "pacs.delete" in pages_of(url, ids[-1:]), timeout_s=WAIT_S)
            shown = {
                "outcomes and exceptions": "\n".join(outcomes),
                "Flower": pages_of(url, ids),
                "Flower's log": flower.log,
                "inspect": str(courier._app.control.inspect(timeout=WAIT_S, limit=1).stats()),
                "pacs result": printed("result", ids[0]),
                "pacs dead": printed("dead", "list") + printed("dead", "show", dead[0]),
                "pacs trace": printed("trace", study),
                "pacs doctor": printed("doctor"),
                "pacs upload": printed("upload", f"{image_server.url('denied.dcm')}?{SAS}"),
            }
            ending.set()
            listener.join(timeout=10)
            shown |= {"events": "\n".join(events), "the worker's log": running.log}
            assert "pacs.upload" in shown["events"]
            assert found_in(shown) == [], found_in(shown)
            died = {place for _, place in found_in(databases(redis))}
            assert died <= {f"redis 2 courier:job:{letter} job" for letter in letters(courier)}, "only to be replayed"
            for letter in letters(courier):
                courier.dead.purge(letter)
            assert found_in(databases(redis)) == []


def letters(courier) -> list[str]:
    return [letter.job_id for letter in courier.dead.list()]


def test_a_batch_of_signed_urls_shows_no_signature(guarded, redis, image_server, monkeypatch):
    """Its plan has to keep them, deflated, as long as it can be reported: ``docs/secrets.md``."""
    running = guarded("text")
    monkeypatch.setenv("PACS_CONFIG", str(running.config))
    urls = [image_server.put(f"{n}.dcm", image(new_uid(), PatientName=PATIENT)) for n in range(2)]
    urls.append(image_server.put("denied.dcm", b"no", status=403))
    with Courier(running.settings) as courier:
        job = courier.batch.upload([f"{url}?{SAS}" for url in urls], name="signed")
        outcome = json.dumps(job.result(timeout_s=WAIT_S))
        shown = {
            "outcome": outcome,
            "report": json.dumps(list(courier.batch.report(job.batch_id))),
            "pacs batch": printed("batch", "list") + printed("batch", "show", job.batch_id),
            "the worker's log": running.log,
        }
    assert "denied.dcm" in shown["report"]
    assert found_in(shown) == [], found_in(shown)


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_a_log_at_the_level_debug_shows_nothing_secret_either(guarded, plain, image_server, redis, pool):
    """Celery quotes the arguments of plain clients there, HTTP libraries their URLs and headers."""
    running = guarded("text", options=("--loglevel", "DEBUG", "--pool", pool), may_show_tracebacks=True)
    study = new_uid()
    with Courier(running.settings) as courier:
        handles = list(jobs(courier, image_server, study, plain))
        filters = {"PatientName": PATIENT, "PatientID": PATIENT_ID}
        asked = {
            "pacs.list_studies": {"filters": filters},
            "pacs.exists": {"level": "study", "uid": study, "note": PATIENT},
            "pacs.metadata": {"level": "study", "uid": study},
            "pacs.upload": {
                "image_url": image_server.put("new.dcm", image(new_uid(), PatientID=PATIENT_ID)) + f"?{S3}"
            },
        }
        for task, job in asked.items():
            note = plain.signature("reports.note", kwargs=filters)
            sent = plain.send_task(task, kwargs={"job": job}, link=note, link_error=note, countdown=0.1)
            handles.append(courier.handle(sent.id))
        wrong = plain.send_task("pacs.list_studies", kwargs={"job": {"filters": filters}}, shadow=5, link=note)
        handles.append(courier.handle(wrong.id))
        # The connections break in the middle: Celery, kombu and redis-py speak of it, with tracebacks.
        with redis_client.Redis.from_url(redis.broker_url) as client:
            client.client_kill_filter(_type="normal", skipme=True)
        pools.reset()  # this program's pooled ones are broken as well, and later tests would find them
        for handle in handles:
            outcome_of(handle)
    assert "INFO" in running.log
    assert "Threw a message away" in running.log
    assert " DEBUG " not in running.log, "nothing of ours says anything there yet: it would be a library"
    assert found_in({"the log": running.log}) == []
