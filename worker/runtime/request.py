"""A message in the hands of a pool: what of it may be shown, whether it is begun, and whether it comes again.

Celery makes one of each message (``Task.Request``). What a job is about is not this module's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.exceptions import Ignore, Reject, Retry, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker import state
from celery.worker.request import Request

from courier.errors import CourierError, Refused
from courier.redaction import redact_job
from courier.result_lines import shown_failure
from courier.waits import WOKEN, sentence
from worker.runtime import consumer, revokes, shortage

#: What a task ignores its message for that has to come again, before anything of the job was begun.
NOT_BEGUN = "not begun"
#: What a task ignores its message for that waits; why (`courier.results.Waiting`), comes next.
WAITS = "waits"
#: What a pool of processes says in the place of a job's own error.
OF_THE_POOL = (WorkerLostError, TimeLimitExceeded, Terminated, Reject, Ignore, Retry, SystemExit, KeyboardInterrupt)


class ShownRequest(Request):  # type: ignore[misc]  # celery is untyped
    """A message whose arguments are redacted for events and logs, also when its sender did not redact them."""

    acknowledged: bool
    #: How the job failed, in one line, for the event that says so.
    _ended = ""

    @property
    def argsrepr(self) -> str:
        return "()"

    @property
    def kwargsrepr(self) -> str:
        kwargs = self.kwargs
        return redact_job(kwargs.get("job") if isinstance(kwargs, dict) else None)

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - Celery's signature
        """What `inspect` and Flower's page of a worker say of a message: never its bare arguments."""
        return {**super().info(), "args": self.argsrepr, "kwargs": self.kwargsrepr}

    def acknowledge(self) -> None:
        """Its job has come to an end in the pool, or is in the ledger's hands."""
        super().acknowledge()
        if consumer.PacsConsumer.running is not None:
            consumer.PacsConsumer.running.returns.succeeded()

    def revoked(self) -> bool:
        """Whether the message is not to be begun now; see `revokes.heed`."""
        return revokes.heed(self)

    def send_event(self, type: str, **fields: Any) -> None:
        """What Flower shows as the job's result is why it waits, until it begins again, and in the end how it failed.

        For Celery's monitors a state of our own, as WAITING, comes after STARTED, and only RETRY leads out of it: so a
        job that was woken says that first. Other jobs say nothing more than Celery's own.
        """
        if type == "task-started":
            fields.setdefault("result", "")
            if self.request_dict.get(WOKEN):
                super().send_event("task-retried", result="")
        elif type == "task-failed":
            fields.setdefault("result", self._ended)
        super().send_event(type, **fields)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """What the pool says of a job that has no result. A worker at its limits is no fault of the job's."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)  # billiard wraps one that has a traceback
        self._ended = line_of(error)
        there = consumer.PacsConsumer.running
        if there is None or self.acknowledged:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        elif isinstance(error, Ignore) and error.args[:1] == (shortage.STARVED,):  # the ledger has put the job aside
            state.task_ready(self)
            super().acknowledge()
            there.returns.given_back()
            there.end_after_a_few(shortage.STARVED)
        elif isinstance(error, Ignore) and error.args[:1] == (WAITS,):
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
            if error.args[1]:
                self.send_event("task-waiting", **waiting_fields(error.args[1]))
        elif (cause := _cause_of_return(error, return_ok=return_ok)) is not None:
            state.task_ready(self)
            self.acknowledged = True
            there.call_soon(there.give_back, self.message, cause)
        else:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)


def waiting_fields(waiting: Mapping[str, Any]) -> dict[str, str]:
    """The fields of the event ``task-waiting``: the sentence and the code, the code alone, and the server.

    Monitors drop fields that Celery does not know, so code and server take the places of two that it does.
    """
    code, server = str(waiting.get("code") or ""), str(waiting.get("server_name") or "")
    return {"result": f"{sentence(waiting)} ({code})", "exchange": code, "routing_key": server}


def line_of(error: BaseException) -> str:
    """How a job failed, in one line; "" where the error is none of ours."""
    return shown_failure(error.payload, refused=isinstance(error, Refused)) if isinstance(error, CourierError) else ""


def _cause_of_return(error: BaseException, *, return_ok: bool) -> BaseException | None:
    """Why the message has to come again; ``return_ok`` where Celery's code around the job has not failed."""
    if isinstance(error, Ignore) and error.args[:1] == (NOT_BEGUN,):
        return shortage.NotBegun()
    return error if isinstance(error, shortage.Escaped) or not (return_ok or isinstance(error, OF_THE_POOL)) else None
