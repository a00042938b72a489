"""Log lines of a job bear its id and stage, and never a patient, a credential or the query of a URL."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

_job_id: ContextVar[str] = ContextVar("job_id", default="-")

_BEFORE_AUTHORITY = re.compile(r"([^:/?#]*:)?//")
_IS_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?").fullmatch
_MAY_HIDE = re.compile(r"//|[?#@]")

FORMAT = "%(asctime)s %(levelname)s %(job_id)s %(name)s: %(message)s"


class _JobFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.job_id = _job_id.get()
        return True


@contextlib.contextmanager
def job_lines(job_id: str) -> Iterator[None]:
    """Every line logged inside belongs to this job."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


def configure(level: int | str = logging.INFO) -> None:
    """One handler on standard error for the whole process."""
    handler = logging.StreamHandler()
    handler.addFilter(_JobFilter())
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("urllib3", "botocore", "boto3", "s3transfer", "requests_oauth2client"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def where_it_broke(error: BaseException) -> str:
    """The error's type and frames without its text, which may quote a URL or a dataset."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__module__}.{type(error).__qualname__} at\n{frames}"


def shown_url(url: str) -> str:
    """``url`` as it may be shown: without userinfo, query and fragment, which is where credentials travel.

    What only resembles a URL is shown up to where a password may begin.
    """
    bare = re.split(r"[?#]", url, maxsplit=1)[0]
    start = _BEFORE_AUTHORITY.match(bare)
    if not start:
        return bare.rpartition("@")[2]
    authority, slash, path = bare[start.end() :].partition("/")
    host = authority.rpartition("@")[2]
    if not _IS_HOST_AND_PORT(host):  # a password with a slash or a question mark in it ends up here
        return f"{start[0]}…"
    return f"{start[0]}{host}{slash}{path}"


def shown_text(text: str, *, limit: int) -> str:
    """Text of others as it may stand in a line: what cannot be printed or encoded is replaced."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text[:limit])


def shown_job(job: object) -> str:
    """A job as Flower, events and logs may show it: fields and lists of them, nothing that is nested deeper."""
    if not isinstance(job, Mapping):
        return "{…}"
    hidden = ("version", "idempotency_key", "cursor")
    shown = {
        _shown_value(str(name)): _shown_field(str(name), value) for name, value in job.items() if name not in hidden
    }
    return shown_text(json.dumps(shown, ensure_ascii=False), limit=500)


def _shown_field(name: str, value: object) -> object:
    if name == "filters":  # a filter's value may be a patient's name
        return sorted(str(_shown_value(str(keyword))) for keyword in value) if isinstance(value, Mapping) else "…"
    return [_shown_value(one) for one in value] if isinstance(value, list) else _shown_value(value)


def _shown_value(value: object) -> object:
    if isinstance(value, str):
        return shown_url(value) if _MAY_HIDE.search(value) else value
    return value if value is None or isinstance(value, bool | int | float) else "…"
