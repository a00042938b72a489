"""What may be said of a job in a log: its id and how far it is; never a patient, a credential or the query of a URL.

How a line looks is said in ``worker/observability/log_format.py``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import traceback
import unicodedata
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from courier.urls import ENTRY, ZIP, bare, entry_of, names_object, signature_at

#: What is known of the job at work here; and of the one before it, of which Celery still speaks once it has ended.
_line: ContextVar[dict[str, object] | None] = ContextVar("line", default=None)
_last: ContextVar[dict[str, object] | None] = ContextVar("last", default=None)

_BEFORE_AUTHORITY = re.compile(r"([^:/?#]*:)?//")
_IS_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?").fullmatch
_MAY_HIDE = re.compile(r"//|[?#@]")

#: The fields of jobs that may be shown, and those that say nothing to a reader; of any other its value is hidden.
SHOWN_FIELDS = frozenset(
    (
        "image_url",
        "server",
        "servers",
        "level",
        "uid",
        "study_uid",
        "mode",
        "filters",
        "limit",
        "newest_first",
        "metadata",
        "places",
        "permanent",
        "dry_run",
        "confirm",
        "confirm_studies",
        "destination",
        "format",
        "batch_id",
        "name",
        "which",
        "chunk",
        "round",
        "width",
        "source",
        "items",
        "from_server",
        "to_server",
        "delete_source",
        "digests",
        "planned",
        "everything",
        "backup",
        "keep",
        "verify",
        "window",
        "requests_per_s",
        "bytes_per_s",
    )
)
#: What people write of a job (``requested_by``, ``reason``) may name a patient: it is for the ledger's history alone.
HIDDEN_FIELDS = frozenset(
    ("version", "idempotency_key", "cursor", "requested_by", "reason", "follow_up_of", "maintenance")
)
REQUESTED_BY_LENGTH: Final = 200
REASON_LENGTH: Final = 1000
_IS_FIELD = re.compile(r"[a-z][a-z_]{0,31}", re.ASCII).fullmatch
_IS_UID = re.compile(r"[0-9.]{1,64}", re.ASCII).fullmatch
#: Whoever mixes up fields may put a patient where a UID belongs.
_SHAPES = {"uid": _IS_UID, "study_uid": _IS_UID, "level": re.compile("image|series|study").fullmatch}
_IS_NAME = re.compile(r"[\w.:-]{1,200}", re.ASCII).fullmatch
_NO_TEXT: Final = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
_USER = re.compile(r"://[^\s/@'\"]*@")
_AFTER_SCHEME = re.compile(r"://[^\s'\"<>]*")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]*\Z")
_SCHEME_SIGNS = 16
#: A query of http within what else is an object's name: two URLs that no blank separates, more likely.
_INNER_QUERY = re.compile(r"(?<=.)(?<!zip\+)(https?://[^?#]*)[?#].*", re.IGNORECASE)
#: In an entry of an archive: what was to be the query of the archive's URL, and was written at the wrong end.
_MISPLACED_QUERY = re.compile(r"[?#].*=.*", re.DOTALL)


@contextlib.contextmanager
def job_lines(job_id: str, task: str = "") -> Iterator[None]:
    """Every line logged inside belongs to this job."""
    line: dict[str, object] = {"job_id": job_id}
    if task:
        line["task"] = task
    token = _line.set(line)
    try:
        yield
    finally:
        _line.reset(token)
        _last.set(line)


def about(**known: object) -> None:
    """From here on lines of the job at work say this too: ``study_uid``, ``server_name``, ``stage``, ``attempt``.

    Without a job at work it says nothing.
    """
    line = _line.get()
    if line is not None:
        line.update(known)


def about_study(message: Mapping[str, Any]) -> None:
    """The same, with the study that a job's message names, if it names one."""
    uid = message.get("study_uid") or (message.get("uid") if message.get("level") == "study" else None)
    if isinstance(uid, str) and _IS_UID(uid):
        about(study_uid=uid)


def about_line(record: logging.LogRecord) -> Mapping[str, object]:
    """What is known of the job that ``record`` is about: of the one at work, or that which the record itself names."""
    line = _line.get()
    if line is not None:
        return {**line, "job_id": without_queries(str(line["job_id"]))}
    job_id, task = getattr(record, "job_id", None), getattr(record, "task", "")
    told = getattr(record, "data", None)  # Celery's: name and id of a task, and more that is not for a log
    if isinstance(told, Mapping):
        job_id, task = told.get("id"), told.get("name")
    if not isinstance(job_id, str):
        return {}
    last = _last.get()
    known = dict(last) if last is not None and last["job_id"] == job_id else {}
    job_id = without_queries(job_id)
    if known:
        return {**known, "job_id": job_id}
    return {"job_id": job_id, "task": task} if isinstance(task, str) and _IS_NAME(task) else {"job_id": job_id}


def without_queries(sentence: str) -> str:
    """``sentence`` of whomever, its URLs without userinfo, query and fragment; an object's URL has no query."""
    if "://" not in sentence:
        return sentence
    sentence = _USER.sub("://", sentence)

    def shown(found: re.Match[str]) -> str:
        scheme = _SCHEME.search(sentence, max(found.start() - _SCHEME_SIGNS, 0), found.start())
        before = scheme[0] if scheme else ""
        return _INNER_QUERY.sub(r"\1", _without_query(before + found[0]))[len(before) :]

    return _AFTER_SCHEME.sub(shown, sentence)


def _without_query(url: str) -> str:
    """``url`` up to its query; the entry that a ``zip+`` URL names stays."""
    if url[: len(ZIP)].lower() != ZIP:
        return bare(url[: signature_at(url)])
    archive, entry = entry_of(url)
    at = signature_at(archive)
    shown = f"{url[: len(ZIP)]}{bare(archive[:at])}"
    if not entry or at is not None:
        return shown
    return f"{shown}{ENTRY}{entry if names_object(archive) else _MISPLACED_QUERY.sub('', entry)}"


def frames_of(error: BaseException | None) -> str:
    """A traceback as it may be logged: types and frames of the error and its causes, and none of their texts."""
    parts = []
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        parts.append(f"Traceback (most recent call last):\n{frames}{kind}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nwhich came of:\n\n".join(parts)


def job_in_hand() -> str | None:
    """The job that this thread works for, if it does."""
    line = _line.get()
    return None if line is None else str(line["job_id"])


def where_it_broke(error: BaseException) -> str:
    """The error's type and frames without its text, which may quote a URL or a dataset."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__module__}.{type(error).__qualname__} at\n{frames}"


def redact_url(url: str) -> str:
    """``url`` as it may be shown: without userinfo, query and fragment, which is where credentials travel.

    Of an ``s3:``, ``az:`` or ``file:`` URL the whole name is shown: ``?`` and ``#`` belong to it. What only resembles a
    URL is shown up to where a password may begin.
    """
    shown = _without_query(url)
    start = _BEFORE_AUTHORITY.match(shown)
    if not start:
        return shown if names_object(shown) else shown.rpartition("@")[2]
    authority, slash, path = shown[start.end() :].partition("/")
    host = authority.rpartition("@")[2]
    if not _IS_HOST_AND_PORT(host):  # a password with a slash or a question mark in it ends up here
        return f"{start[0]}…"
    return f"{start[0]}{host}{slash}{path}"


def shown_id(job_id: str) -> str:
    """A job's id as it may stand in a line: in quotation marks where it would not be seen where it ends."""
    if _IS_NAME(job_id):
        return job_id
    return printable(json.dumps(without_queries(job_id)[:300], ensure_ascii=False))


def printable(text: str, *, limit: int | None = None) -> str:
    """Text of others as it may stand in a line: what controls a terminal, breaks the line or cannot be encoded is
    written as an escape (``\\x1b``).
    """
    text = text[:limit]
    return text if text.isprintable() else "".join(sign if _is_text(sign) else _escaped(sign) for sign in text)


def _is_text(sign: str) -> bool:
    return sign in "\u200c\u200d" or unicodedata.category(sign) not in _NO_TEXT


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def is_one_line(text: str) -> bool:
    """Whether ``text`` shows as one line that says what it holds: no control or format characters, no line breaks.

    The joiners of Persian and Indian scripts and the wide space of Japanese names are text.
    """
    return all(map(_is_text, text))


def stated(job: Mapping[str, Any]) -> dict[str, str]:
    """``requested_by`` and ``reason`` of a job, as far as they may be kept: "" where there is none, or none fit."""
    lengths = {"requested_by": REQUESTED_BY_LENGTH, "reason": REASON_LENGTH}
    told = {name: job.get(name) for name in lengths}
    return {
        name: text if isinstance(text, str) and len(text) <= lengths[name] and is_one_line(text) else ""
        for name, text in told.items()
    }


def redact_job(job: object) -> str:
    """A job as Flower, events and logs may show it: the fields that are known, and nothing that is nested deeper.

    Of a field that nobody knows only the name is shown: whoever sent it may have meant anything by it.
    """
    if not isinstance(job, Mapping):
        return "{…}"
    return printable(json.dumps(redacted_fields(job), ensure_ascii=False), limit=500)


def redacted_fields(job: Mapping[Any, Any]) -> dict[str, object]:
    """The fields of `redact_job`, by their names."""
    return {
        name if _IS_FIELD(name) else "…": _shown_field(name, value)
        for name, value in ((str(name), value) for name, value in job.items())
        if name not in HIDDEN_FIELDS
    }


def _shown_field(name: str, value: object) -> object:
    if name == "filters":  # a filter's value may be a patient's name
        return sorted(str(_shown_value(str(keyword))) for keyword in value) if isinstance(value, Mapping) else "…"
    if name not in SHOWN_FIELDS or (name in _SHAPES and not (isinstance(value, str) and _SHAPES[name](value))):
        return "…"
    return [_shown_value(one) for one in value] if isinstance(value, list) else _shown_value(value)


def _shown_value(value: object) -> object:
    if isinstance(value, str):
        return redact_url(value) if _MAY_HIDE.search(value) else value
    return value if value is None or isinstance(value, bool | int | float) else "…"
