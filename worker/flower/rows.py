"""How Flower writes a job of ours in its list of tasks. Flower escapes all of it."""

from __future__ import annotations

import re
from typing import Any, Final

from courier.result_lines import shortened, shown_failure

_SINCE: Final = re.compile(r"^(waiting(?: for \S+)?) since \S+:")
_MOMENT: Final = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\.\d+Z")
#: Celery's representation of an error of ours: a worker of an older release says no more than this.
_CODE: Final = re.compile(r"'code': '([a-z_]{1,40})'")


def is_ours(task: Any) -> bool:
    """Whether an event's task is one of ours: other applications may use the same broker."""
    return str(getattr(task, "name", "") or "").startswith("pacs.")


def format_task(task: Any) -> Any:
    """``task`` (Flower's copy) with a result that fits into a column: without link, with short UIDs and few times."""
    if is_ours(task):
        task.result = readable(_SINCE.sub(r"\1:", shortened(line_of(task))))
    return task


def line_of(task: Any) -> str:
    """What an event's task says of how the job ended, or why it waits."""
    if task.result:
        return str(task.result)
    code = _CODE.search(str(task.exception or "")) if task.state == "FAILURE" else None
    return shown_failure({"code": code[1], "message": "see its details"}, refused=True) if code else ""


def readable(line: str) -> str:
    """``line`` with moments in UTC as people write them."""
    return _MOMENT.sub(r"\1 \2 UTC", line)
