"""What of a URL and of a job may be shown, and what a line of the log says of its job."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import kombu.utils.json
import pytest
from celery.utils.saferepr import saferepr

from courier.messages import Job
from courier.redaction import (
    HIDDEN_FIELDS,
    SHOWN_FIELDS,
    about,
    about_study,
    job_lines,
    printable,
    redact_job,
    redact_url,
)
from worker.app import PacsTask, ShownResult
from worker.observability.log_format import OURS, configure
from worker.pacs.fleet import Fleet


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host.example/a.dcm?sig=x#y", "https://host.example/a.dcm"),
        ("https://user:secret@host.example/a@b.dcm", "https://host.example/a@b.dcm"),
        ("//user:secret@host.example/a.dcm", "//host.example/a.dcm"),
        ("user:secret@host.example/a.dcm", "host.example/a.dcm"),
        ("https://user:sec/ret@host.example/a.dcm", "https://…"),
        ("https://user:sec?ret@host.example/a.dcm", "https://…"),
        ("a.dcm?next=https://user:secret@host.example/", "a.dcm"),
        ("https://[2001:db8::1]:8080/a.dcm", "https://[2001:db8::1]:8080/a.dcm"),
        ("file:///images/a.dcm", "file:///images/a.dcm"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_credential(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_a_signed_url_is_hidden_wherever_in_a_job_it_stands() -> None:
    signed = "https://user:secret@host.example/a?sig=secret"
    job = {"image_url": [signed, {"deep": signed}], "extra": {"deep": signed}, signed: 1, "filters": {signed: "x"}}
    assert "secret" not in redact_job(job)
    assert "https://host.example/a" in redact_job(job)


def test_of_a_job_known_fields_are_shown_and_of_others_the_name_at_most() -> None:
    job = {"level": "study", "uid": "1.2.3", "note": "Doe^Jane", "Doe^Jane": 1, "permanent": True, "servers": ["a"]}
    assert json.loads(redact_job(job)) == {
        "level": "study",
        "uid": "1.2.3",
        "note": "…",
        "…": "…",
        "permanent": True,
        "servers": ["a"],
    }
    assert json.loads(redact_job({"level": "Doe", "uid": "Doe^Jane"})) == {"level": "…", "uid": "…"}


def test_every_field_of_a_job_is_shown_or_hidden_on_purpose() -> None:
    """A new one is to be put into `SHOWN_FIELDS` of courier/redaction.py if it may be seen in Flower."""

    def kinds(kind: type[Job]) -> Iterator[type[Job]]:
        for child in kind.__subclasses__():
            yield child
            yield from kinds(child)

    fields = {name for kind in kinds(Job) if kind.__module__.startswith("courier.") for name in kind.model_fields}
    assert fields - SHOWN_FIELDS - HIDDEN_FIELDS == set()


@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\u2028", "\x7f", "\u202e"])
def test_what_cannot_stand_in_a_line_is_replaced(text: str) -> None:
    assert printable(text, limit=10).isprintable()
    assert redact_job({"server": text}).encode()


@pytest.fixture
def lines() -> Iterator[Callable[..., Callable[[], list[str]]]]:
    """Configures logging afresh onto a stream of its own; what was before comes back."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    ours = {name: logging.getLogger(name).level for name in OURS}
    hook = threading.excepthook
    written = io.StringIO()

    def start(shape: Literal["auto", "json", "text"], level: int | str = logging.INFO) -> Callable[[], list[str]]:
        configure(level, shape=shape)
        handler = root.handlers[0]
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(written)
        return lambda: written.getvalue().splitlines()

    yield start
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    for name, level in ours.items():
        logging.getLogger(name).setLevel(level)
    threading.excepthook = hook


def work() -> None:
    log = logging.getLogger("worker.jobs.any")
    with job_lines("job-1", "pacs.upload"):
        about(stage="claimed", attempt=2)
        log.info("begun")
        about(stage="push", study_uid="1.2.3", server_name="msdicom")
        log.warning("Slow: %s", "https://user:secret@host.example/a?sig=secret#secret")
        about_study({"study_uid": "1.2\nsecret"})
    context = {"id": "job-1", "name": "pacs.upload", "kwargs": "secret", "return_value": "secret"}
    celery = logging.getLogger("celery.app.trace")
    celery.info("Task %(name)s[%(id)s] succeeded", context, extra={"data": context})
    celery.info("Task received", extra={"data": {"id": "job-2", "name": "pacs.delete"}})
    log.info("nobody's")


def test_json_lines_say_all_that_is_known_of_their_job_and_nothing_else(lines: Any) -> None:
    written = lines("json")
    work()
    begun, slow, succeeded, received, nobodys = (json.loads(line) for line in written())
    known = {"job_id": "job-1", "task": "pacs.upload", "attempt": 2}
    assert {name: begun[name] for name in (*known, "stage")} == known | {"stage": "claimed"}
    later = known | {"stage": "push", "study_uid": "1.2.3", "server_name": "msdicom"}
    usual = {"time", "level", "logger", "message"}
    for line in (slow, succeeded):
        assert {name: value for name, value in line.items() if name not in usual} == later
    assert {name: received[name] for name in received.keys() - usual} == {"job_id": "job-2", "task": "pacs.delete"}
    assert nobodys.keys() == usual
    assert slow["message"] == "Slow: https://host.example/a"
    assert slow["time"].endswith("Z")
    assert "secret" not in "".join(written())


def test_text_lines_say_the_same(lines: Any) -> None:
    written = lines("text")
    work()
    begun, slow, *_, nobodys = written()
    assert begun.endswith("INFO job-1 worker.jobs.any: begun [task=pacs.upload stage=claimed attempt=2]")
    assert "Slow: https://host.example/a [task=pacs.upload stage=push" in slow
    assert "study_uid=1.2.3 server_name=msdicom]" in slow
    assert nobodys.endswith("INFO - worker.jobs.any: nobody's")


@pytest.mark.parametrize("shape", ["json", "text"])
def test_a_traceback_is_logged_without_what_its_errors_say(lines: Any, shape: str) -> None:
    written, said = lines(shape), "".join(["sec", "ret"])
    try:
        try:
            raise ValueError(said)
        except ValueError as error:
            raise OSError(said) from error
    except OSError:
        logging.getLogger("any").exception("It broke")
    text = "\n".join(written())
    assert "secret" not in text
    assert "builtins.OSError" in text
    assert "builtins.ValueError" in text
    assert "Traceback (most recent call last)" in text


def test_a_thread_that_ends_with_an_error_is_logged_without_what_it_says(lines: Any) -> None:
    written, said = lines("json"), "".join(["sec", "ret"])

    def fail() -> None:
        raise ValueError(said)

    thread = threading.Thread(target=fail, name="any")
    thread.start()
    thread.join()
    (line,) = [json.loads(line) for line in written()]
    assert (line["level"], line["message"]) == ("CRITICAL", "The thread any ended with an error")
    assert "builtins.ValueError" in line["exception"]
    assert said not in line["exception"]


def test_without_a_terminal_lines_are_json(lines: Any) -> None:
    written = lines("auto")
    logging.getLogger("any").info("x")
    assert json.loads(written()[0])["message"] == "x"


def test_what_is_asked_of_servers_at_once_belongs_to_the_job_that_asks(lines: Any) -> None:
    written = lines("json")
    fleet = Fleet([])
    with job_lines("job-1"):
        fleet.gather([lambda: logging.getLogger("any").info("asking")] * 2)
    fleet.close()
    assert [json.loads(line)["job_id"] for line in written()] == ["job-1"] * 2


#: Libraries that quote messages, URLs, headers or datasets at DEBUG, and what they say there.
TALKATIVE = ("celery.pool", "celery.app.trace", "celery.worker.strategy", "kombu.pidbox", "kombu.transport.redis")
TALKATIVE += (
    "urllib3.connectionpool",
    "botocore.parsers",
    "boto3.resources",
    "azure.core.pipeline",
    "amqp",
    "billiard",
)
TALKATIVE += ("requests_oauth2client", "pydicom", "opentelemetry", "a library of tomorrow")


@pytest.mark.parametrize("level", ["DEBUG", "debug", logging.DEBUG, 1])
def test_at_no_level_a_library_says_what_is_for_its_own_developers(lines: Any, level: int | str) -> None:
    written = lines("json", level)
    for name in TALKATIVE:
        logger = logging.getLogger(name)
        assert not logger.isEnabledFor(logging.DEBUG), name
        logger.debug("TaskPool: Apply (kwargs:%r)", {"filters": {"PatientName": "secret"}})
    logging.getLogger("worker.jobs.any").debug("ours")
    assert [json.loads(line)["message"] for line in written()] == ["ours"]


def test_a_level_above_info_holds_for_libraries_too(lines: Any) -> None:
    written = lines("json", "ERROR")
    logging.getLogger("celery.worker").warning("x")
    logging.getLogger("worker.any").warning("x")
    logging.getLogger("worker.any").error("y")
    assert [json.loads(line)["message"] for line in written()] == ["y"]


FORGED = "2026-01-01 00:00:00,000 INFO job-1 worker.jobs.runner: Done after 1 attempt(s)"


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K\x1b[G"]
)
def test_a_control_character_begins_no_line_of_its_own(lines: Any, end: str) -> None:
    """Whether it stands in what is logged or in the job's id."""
    written = lines("text")
    logging.getLogger("celery.worker.strategy").info("Task %s received", f"x{end}{FORGED}")
    with job_lines(f"x{end}{FORGED}", "pacs.upload"):
        logging.getLogger("worker.any").info("begun")
    logging.getLogger("any").info("x", extra={"data": {"id": f"x{end}{FORGED}", "name": "pacs.upload"}})
    text = "\n".join(written())
    assert not any(line.startswith("2026-01-01") for line in text.splitlines())
    assert "\x1b" not in text
    assert "\r" not in text


@pytest.mark.parametrize("shape", ["json", "text"])
@pytest.mark.parametrize("job_id", ["order/7", "a@b", "Bestellung-ü", "a b", "x" * 255, "https://h/a?sig=secret"])
def test_a_job_is_named_by_any_id_that_celery_accepts_but_for_the_query_of_a_url(
    lines: Any, shape: str, job_id: str
) -> None:
    written = lines(shape)
    with job_lines(job_id):
        logging.getLogger("worker.any").info("begun")
    logging.getLogger("celery.app.trace").info("ended", extra={"data": {"id": job_id, "name": "pacs.upload"}})
    for line in written():
        assert job_id.partition("?")[0] in line
        assert "secret" not in line


def test_what_is_shown_of_a_result_is_not_what_is_stored_of_it():
    payload = {"operation": "upload", "server_name": "msdicom", "metadata": {"00100010": "P^N"}}
    shown = ShownResult(payload)
    assert saferepr(shown, PacsTask.resultrepr_maxsize) == "stored on msdicom"
    assert kombu.utils.json.loads(kombu.utils.json.dumps({"result": shown})) == {"result": payload}
