"""How a line of the log looks: JSON for machines, text on a terminal; in both, all that is known of its job.

What may be said of a job and of a URL is decided in ``courier/redaction.py``.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal

from pythonjsonlogger.json import JsonFormatter

from courier.redaction import about_line, frames_of, printable, shown_id, without_queries

log = logging.getLogger(__name__)

Shape = Literal["auto", "json", "text"]
_Exception = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

#: Loggers whose lines are ours. Every other library is never more talkative than INFO, whatever level is asked for: at
#: DEBUG Celery and kombu quote whole messages, HTTP libraries URLs and headers.
OURS: Final = ("courier", "producer", "worker", "sandbox")
#: The lines of deletions (worker/jobs/audit_lines.py), which are in the log at any level.
AUDIT: Final = "courier.audit"
#: What these say below their levels is of no use here, or quotes a URL with its query.
LEVELS: Final = {
    "urllib3": logging.ERROR,
    "botocore": logging.WARNING,
    "boto3": logging.WARNING,
    "s3transfer": logging.WARNING,
    "requests_oauth2client": logging.WARNING,
    "azure": logging.WARNING,
    "flower": logging.INFO,  # at DEBUG its API quotes jobs
}


class _JobFilter(logging.Filter):
    """Lays what is known of the job beside the record, in the thread that logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.about = about_line(record)
        return True


class _ChordFilter(logging.Filter):
    """A chord fails when a member of it does, also another application's: no fault of ours, and not ours to quote."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.args, tuple) and str(record.msg).startswith("Chord "):
            record.exc_info = None
            record.args = tuple(type(one).__name__ if isinstance(one, Exception) else one for one in record.args)
        return True


class TextLines(logging.Formatter):
    """``time LEVEL job logger: sentence [what is known of the job]``"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(job_id)s %(name)s: %(message)s%(more)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        about = dict(record.about)  # type: ignore[attr-defined]  # the filter's
        record.job_id = shown_id(str(about.pop("job_id", "-")))
        known = " ".join(f"{name}={printable(str(value))}" for name, value in {**about, **_audit(record)}.items())
        record.more = f" [{known}]" if known else ""
        record.message = _in_one_record(without_queries(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: _Exception) -> str:
        return frames_of(ei[1])


def _in_one_record(message: str) -> str:
    """``message`` so that no part of it looks like a record of its own, whatever control characters it quotes."""
    return "\n    ".join(printable(line) for line in message.split("\n"))


class JsonLines(JsonFormatter):
    """One object per line: time (RFC 3339, UTC), level, logger, message, what is known of the job, and exception."""

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:  # only these: what else hangs on a record may be a job's arguments
        when = datetime.fromtimestamp(record.created, UTC)
        log_data["time"] = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        log_data["message"] = without_queries(record.message)
        log_data.update(record.about)  # type: ignore[attr-defined]  # the filter's
        if audit := _audit(record):
            log_data["audit"] = audit
        if "exc_info" in message_dict:
            log_data["exception"] = message_dict["exc_info"]

    def formatException(self, ei: _Exception) -> str:
        return frames_of(ei[1])


def _audit(record: logging.LogRecord) -> dict[str, object]:
    """The fields of an audit line; {} of any other. What people write there may hold a URL with its query."""
    audit = getattr(record, "audit", None) if record.name == AUDIT else None
    if not isinstance(audit, Mapping):
        return {}
    return {name: without_queries(value) if isinstance(value, str) else value for name, value in audit.items()}


def configure(level: int | str = logging.INFO, *, shape: Shape = "auto") -> None:
    """One handler on standard error for the whole process. ``auto``: text on a terminal, JSON otherwise."""
    if shape == "auto":
        shape = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler()
    handler.addFilter(_JobFilter())
    handler.setFormatter(TextLines() if shape == "text" else JsonLines(json_ensure_ascii=False))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    number = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
    root.setLevel(max(number, logging.INFO))
    for name in OURS:
        logging.getLogger(name).setLevel(number)
    logging.getLogger(AUDIT).setLevel(logging.INFO)
    quiet()
    threading.excepthook = _say_that_a_thread_ended


def quiet() -> None:
    """Hold the libraries at their `LEVELS`, also in a program that sets up its log itself, as Flower does."""
    for name, least in LEVELS.items():
        logging.getLogger(name).setLevel(least)
    logging.getLogger("celery.backends.redis").filters[:] = [_ChordFilter()]


def _say_that_a_thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Python itself would print the error's text, which may quote a URL or a dataset."""
    if ended.exc_type is not SystemExit:
        name = ended.thread.name if ended.thread else "-"
        error = (ended.exc_type, ended.exc_value or ended.exc_type(), ended.exc_traceback)
        log.critical("The thread %s ended with an error", name, exc_info=error)
