"""What a test needs and this machine does not have: a failure in CI, elsewhere one of the last lines of the run."""

from __future__ import annotations

import os
from collections import Counter
from typing import NoReturn

import pytest

_SIGN = "left out: "


def missing(what: str) -> NoReturn:
    """End the test. ``what`` says in a sentence what is not here, and how to get it."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    left_out(what)


def left_out(what: str) -> NoReturn:
    """End the test, in CI too, without a failure."""
    pytest.skip(f"{_SIGN}{what}")


def summary(skipped: list[pytest.TestReport]) -> list[str]:
    """A line for each thing that was not here."""
    reasons = [str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple)]
    counts = Counter(reason.partition(_SIGN)[2] for reason in reasons if _SIGN in reason)
    return [f"Left out, tests that need what is not here ({count}): {what}" for what, count in sorted(counts.items())]
