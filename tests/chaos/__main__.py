"""``make chaos``: everything is killed, cut and starved at full size, and docs/guarantees.md tells what came of it.

python -m tests.chaos [--seed N] [words for pytest, after which nothing is written]
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time

import pytest

from tests.chaos.measured import BOOK, DOCUMENT, FRAME, Book, document, facts

#: Where tests repeat at full size what stands in `make test` at a smaller one.
REPEATED = ["tests/unit", "tests/contract"]


class _Keeper:
    """Keeps the book that pytest's tests have written."""

    book = Book()
    failed: list[str]

    def __init__(self) -> None:
        self.failed = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.book = session.config.stash.get(BOOK, Book())


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.chaos")
    arguments.add_argument("--seed", type=int, default=secrets.randbits(32))
    asked, words = arguments.parse_known_args()
    os.environ.update(CHAOS_FULL="1", CHAOS_SEED=str(asked.seed))
    print(f"seed {asked.seed}", flush=True)
    keeper, begun_s = _Keeper(), time.monotonic()
    status = pytest.main(["tests/chaos", "--timeout=900", "--durations=0", *words], plugins=[keeper])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or words:
        print("docs/guarantees.md is as it was.")
        return int(status)
    repeated = subprocess.run([sys.executable, "-m", "pytest", "-m", "full", *REPEATED], check=False).returncode
    known = facts(command="make chaos", seed=asked.seed, took_s=time.monotonic() - begun_s, failed=keeper.failed)
    DOCUMENT.write_text(document(keeper.book.rows, known, FRAME.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Wrote {DOCUMENT} from {len(keeper.book.rows)} measurements.")
    return int(status) or repeated


if __name__ == "__main__":
    sys.exit(main())
