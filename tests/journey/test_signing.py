"""Signed messages: a real worker does what a trusted key asked for, and throws everything else away."""

from __future__ import annotations

import datetime
import json
import shutil
import time
import uuid
from pathlib import Path

import pytest
from celery.security.certificate import Certificate
from celery.security.key import PrivateKey
from celery.security.serialization import SecureSerializer
from celery.utils.serialization import b64decode, b64encode
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kombu.serialization import registry
from redis import Redis

from courier.settings import Settings, SettingsError
from producer import Courier
from producer.doctor import examine
from producer.errors import InvalidRequest
from sandbox import processes as parts
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid

WAIT_S = 30
PLANTED = "PLANTED-9a1"


def make_pair(folder: Path, name: str, *, days: int = 30) -> tuple[Path, Path]:
    """A key and its self-signed certificate."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(tz=datetime.UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_file, certificate_file = folder / f"{name}.key", folder / f"{name}.crt"
    key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    certificate_file.write_bytes(signed.public_bytes(pem))
    return key_file, certificate_file


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """``worker`` and ``program`` are trusted, ``stranger`` is not."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "trusted").mkdir()
    for name in ("worker", "program", "stranger"):
        _, certificate_file = make_pair(folder, name)
        if name != "stranger":
            shutil.copy(certificate_file, folder / "trusted")
    return folder


def signing(keys: Path, name: str) -> dict[str, str]:
    return {
        "key_file": str(keys / f"{name}.key"),
        "certificate_file": str(keys / f"{name}.crt"),
        "trusted_folder": str(keys / "trusted"),
    }


@pytest.fixture
def unregistered():
    """The serializer is the whole process's; the next test does not sign."""
    yield
    registry.unregister("auth")


def settings_of(redis, keys: Path, name: str) -> Settings:
    queue = {**parts.queue_settings(redis), "signing": signing(keys, name)}
    return Settings.model_validate({"queue": queue, "jobs": {"grace_s": 1}})


@pytest.fixture
def signing_worker(worker, redis, keys):
    return worker(
        queue={**parts.queue_settings(redis), "signing": signing(keys, "worker")},
        jobs={"sweep_s": 0.2, "backoff_base_s": 0.1, "grace_s": 1},
    )


@pytest.fixture
def signing_courier(redis, keys, unregistered):
    with Courier(settings_of(redis, keys, "program")) as courier:
        yield courier


def serializer(keys: Path, name: str) -> SecureSerializer:
    key, certificate = (keys / f"{name}.{end}" for end in ("key", "crt"))
    return SecureSerializer(PrivateKey(key.read_text()), Certificate(certificate.read_text()), digest="sha256")


def put(queue, body: bytes | str, headers: dict, content_type: str = "application/data") -> None:
    queue.put(body, serializer=None, content_type=content_type, content_encoding="utf-8", headers=headers)


def envelope(job_id: str, url: str, **embedded) -> tuple:
    embedded = {"signed_for": ["pacs.upload", job_id, int(time.time())], **embedded}
    return [], {"job": {"image_url": url}}, embedded


def tampered(signed: bytes) -> bytes:
    return b64encode(b64decode(signed).replace(b"a.dcm", b"b.dcm"))


def as_pickle(signed: bytes) -> bytes:
    """The same, with another content type: Celery does not sign that."""
    return b64encode(b64decode(signed).replace(b"application/json", b"application/x-python-serialize"))


def test_what_no_trusted_key_signed_is_thrown_away_and_its_sender_told(
    signing_worker, signing_courier, redis, image_server, keys
):
    url = f"{image_server.put('a.dcm', image(new_uid()))}?sig={PLANTED}"
    trusted, stranger = serializer(keys, "program"), serializer(keys, "stranger")
    ids = {}

    def headers(words: str, task: str = "pacs.upload") -> dict:
        ids[words] = job_id = str(uuid.uuid4())
        return {"task": task, "id": job_id, "lang": "py"}

    with signing_courier._app.connection_for_write() as connection:
        queue = connection.SimpleQueue("pacs")
        head = headers("not signed")
        put(queue, json.dumps(envelope(head["id"], url)), head, "application/json")
        head = headers("stranger")
        put(queue, stranger.serialize(envelope(head["id"], url)), head)
        head = headers("tampered")
        put(queue, tampered(trusted.serialize(envelope(head["id"], url))), head)
        head = headers("pickle")
        put(queue, as_pickle(trusted.serialize(envelope(head["id"], url))), head)
        head = headers("other task", "pacs.download")
        put(queue, trusted.serialize(envelope(head["id"], url)), head)
        head = headers("other id")
        put(queue, trusted.serialize(envelope("another", url)), head)
        head = headers("old")
        long_ago = ["pacs.upload", head["id"], int(time.time()) - 100_000]
        put(queue, trusted.serialize(envelope(head["id"], url, signed_for=long_ago)), head)
        head = headers("celery alone")
        put(queue, trusted.serialize(([], {"job": {"image_url": url}}, {})), head)
        first_protocol = {
            "task": "pacs.upload",
            "id": str(uuid.uuid4()),
            "args": [],
            "kwargs": {"job": {"image_url": url}},
        }
        put(queue, trusted.serialize(first_protocol), {})
        queue.close()
    reasons = {
        "not signed": "it is not signed",
        **dict.fromkeys(("stranger", "tampered", "pickle"), "its signature is none of a trusted key"),
        **dict.fromkeys(("other task", "other id", "celery alone"), "it was signed for another task or id"),
        "old": "its signature is too old",
    }
    for words, job_id in ids.items():
        with pytest.raises(InvalidRequest, match=reasons[words]):
            signing_courier.handle(job_id).result(timeout_s=WAIT_S)
    good = signing_courier.upload(image_server.put("good.dcm", image(new_uid())))
    assert good.result(timeout_s=WAIT_S)["status"] == "stored"
    assert [path for path in image_server.requests if "a.dcm" in path] == []
    assert signing_worker.log.count("Threw a message away") == len(ids) + 1
    assert PLANTED not in signing_worker.log


def test_uploads_wake_ups_batches_and_inspection_go_signed_and_results_stay_json(
    signing_worker, signing_courier, redis, sandbox, image_server
):
    first = signing_courier.upload(image_server.put("a.dcm", image(new_uid())))
    assert first.result(timeout_s=WAIT_S)["status"] == "stored"
    with Redis.from_url(redis.result_backend) as client:
        assert json.loads(client.get(f"celery-task-meta-{first.id}"))["status"] == "SUCCESS"
    lost = str(uuid.uuid4())
    job = {"version": 1, "image_url": image_server.put("b.dcm", image(new_uid()))}
    assert signing_courier.ledger.submit(lost, task="pacs.upload", job=job), "its message never comes"
    assert signing_courier.handle(lost).result(timeout_s=WAIT_S)["status"] == "stored"
    assert f"Woke job {lost}" in signing_worker.log
    batch = signing_courier.delete_all("delete all studies")
    batch.result(timeout_s=WAIT_S)
    assert poll(lambda: signing_courier.batch.get(batch.id).state == "done", timeout_s=WAIT_S)
    assert list(signing_courier.workers()) != []
    assert "Threw" not in signing_worker.log


def test_a_command_to_workers_that_is_not_signed_is_not_followed(signing_worker, signing_courier, plain):
    plain.control.broadcast("shutdown")
    assert poll(lambda: "it is not signed" in signing_worker.log, timeout_s=WAIT_S)
    assert list(signing_courier.workers()) != []


def test_a_copy_that_is_unsigned_does_not_end_the_job_of_its_id(signing_worker, signing_courier, plain, image_server):
    """The ledger has the job: it is woken, signed, and done."""
    job_id = str(uuid.uuid4())
    job = {"version": 1, "image_url": image_server.put("a.dcm", image(new_uid()))}
    signing_courier.ledger.submit(job_id, task="pacs.upload", job=job)
    plain.send_task("pacs.upload", kwargs={"job": job}, task_id=job_id)
    states = {report.status for _, report in signing_courier.watch([signing_courier.handle(job_id)], timeout_s=WAIT_S)}
    assert "done" in states
    assert "failed" not in states
    assert "it is not signed" in signing_worker.log


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda keys, mine: mine | {"key_file": str(keys / "nowhere.key")}, "key_file: .*cannot be read"),
        (lambda keys, mine: mine | {"key_file": mine["certificate_file"]}, "key_file: .*in PEM and of an RSA key"),
        (lambda keys, mine: mine | {"certificate_file": mine["key_file"]}, "certificate_file: .*in PEM"),
        (
            lambda keys, mine: mine | {"certificate_file": str(keys / "worker.crt")},
            "what key_file signs does not verify",
        ),
        (lambda keys, mine: mine | {"trusted_folder": str(keys / "nowhere")}, "lie in trusted_folder"),
        (lambda keys, mine: signing(keys, "stranger"), "lie in trusted_folder"),
        (lambda keys, mine: mine | {"trusted_folder": str(keys / "old")}, "trusted_folder: .*has expired"),
        (lambda keys, mine: {"key_file": mine["key_file"]}, "signing also needs certificate_file and trusted_folder"),
    ],
)
def test_keys_that_do_not_fit_stop_the_start_with_one_sentence(keys, tmp_path, spoil, sentence):
    if not (keys / "old").exists():
        (keys / "old").mkdir()
        make_pair(keys / "old", "old", days=-1)
    tree = {"queue": {"signing": spoil(keys, signing(keys, "program"))}}
    config = parts.write_settings(tmp_path / "pacs.toml", tree)
    with pytest.raises(SettingsError, match=sentence) as error:
        Courier(Settings.load({"PACS_CONFIG": str(config)}))
    assert "\n" not in str(error.value)


def test_the_doctor_names_a_key_that_does_not_fit(keys):
    wrong = signing(keys, "worker") | {"key_file": str(keys / "program.key")}
    server = {"name": "one", "type": "msdicom", "url": "http://127.0.0.1:1"}
    settings = Settings.model_validate({"servers": [server], "queue": {"signing": wrong}})
    found = {finding.check: finding for finding in examine(lambda: settings)}
    assert found["signing"].state == "failed"
    assert "what key_file signs does not verify" in found["signing"].found


@pytest.fixture
def guarded_worker(worker, redis, keys):
    """A worker that takes orders that delete from ``program`` alone."""
    signed = {**signing(keys, "worker"), "destructive_senders": ["program"]}
    queue = {**parts.queue_settings(redis), "signing": signed}
    return worker(queue=queue, jobs={"sweep_s": 0.2, "backoff_base_s": 0.1, "grace_s": 1}, logs={"format": "json"})


def test_only_the_certificates_that_a_setting_names_may_send_orders_that_delete(
    guarded_worker, redis, keys, unregistered, sandbox, put
):
    """The order of any other is refused before a server is asked; the audit line names the certificate."""
    study, other = new_uid(), new_uid()
    for uid in (study, other):
        put(sandbox.msdicom, image(uid))
    with Courier(settings_of(redis, keys, "worker")) as clerk:
        assert clerk.exists("study", study).result(timeout_s=WAIT_S)["servers"][0]["server_name"] == "msdicom"
        sandbox.load(anew=True)
        orders = [
            clerk.delete("study", study),
            clerk.delete("study", study, permanent=False),
            clerk.batch.delete([study]),
            clerk.batch.migrate([study], from_server="msdicom", to_server="dcm4chee", delete_source=True),
        ]
        for order in orders:
            with pytest.raises(InvalidRequest) as refused:
                order.result(timeout_s=WAIT_S)
            assert refused.value.details == {"reason": "sender_not_allowed", "sender": "worker"}
        assert sandbox.load()["msdicom"]["total"] == 0, "a server was asked"
        planned = clerk.batch.delete([study], dry_run=True)
        planned.result(timeout_s=WAIT_S)
        with pytest.raises(InvalidRequest):
            clerk.batch.apply(planned.id).result(timeout_s=WAIT_S)
        forged = clerk.handle(str(uuid.uuid4()))
        clerk._sender.send_task(
            "pacs.delete",
            kwargs={"job": {"level": "study", "uid": study}},
            task_id=forged.id,
            headers={"verified_sender": "program"},
        )
        with pytest.raises(InvalidRequest):
            forged.result(timeout_s=WAIT_S)
    registry.unregister("auth")
    with Courier(settings_of(redis, keys, "program")) as desk:
        assert (
            desk.delete("study", study, requested_by="r.lee").result(timeout_s=WAIT_S)["servers"][0]["status"]
            == "deleted"
        )
        desk.batch.delete([other], reason="ticket 7").result(timeout_s=WAIT_S)
    lines = [json.loads(line) for line in guarded_worker.log.splitlines() if line.startswith("{")]
    audits = {line["audit"]["study_uid"]: line["audit"] for line in lines if line["logger"] == "courier.audit"}
    assert set(audits) == {study, other}
    assert {audit["sender"] for audit in audits.values()} == {"program"}
    assert (audits[study]["requested_by"], audits[other]["reason"]) == ("r.lee", "ticket 7")
    assert audits[other]["batch_kind"] == "delete"
