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
    """``url`` as it may be shown: without userinfo, query and fragment, which is where credentials travel."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return re.split(r"[?#]", url, maxsplit=1)[0]
    bare = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = bare.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def shown_job(job: object) -> str:
    """A job as Flower, events and logs may show it."""
    if not isinstance(job, Mapping):
        return "{…}"
    hidden = ("version", "idempotency_key", "cursor")
    shown = {str(name): _shown_field(str(name), value) for name, value in job.items() if name not in hidden}
    return json.dumps(shown, ensure_ascii=False)[:500]


def _shown_field(name: str, value: object) -> object:
    if name == "filters":  # a filter's value may be a patient's name
        return sorted(str(keyword) for keyword in value) if isinstance(value, Mapping) else "…"
    return shown_url(value) if isinstance(value, str) and ("://" in value or "?" in value) else value
