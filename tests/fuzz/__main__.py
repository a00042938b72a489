"""``make fuzz``: thousands of cases per target, a table, and a reproducer for what was found.

python -m tests.fuzz [--cases 21000] [--seed N]
python -m tests.fuzz --replay TARGET FILE
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import secrets
import sys
import time
from pathlib import Path

from tests.fuzz.campaign import FailingCase, by_bytes, by_hypothesis
from tests.fuzz.meter import FuzzTally, FuzzTarget, run_case, warm_up
from tests.fuzz.targets import TARGETS

#: Where a case stands while it runs and, if it is a finding, stays.
CASES = Path(".run") / "fuzz"
#: Of wall time: a case that sleeps or loops in C is not interrupted but ends the run, with its stack.
STUCK_S = 60


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz")
    arguments.add_argument("--cases", type=int, default=21_000)
    arguments.add_argument("--seed", type=int, default=secrets.randbits(32))
    arguments.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"))
    asked = arguments.parse_args()
    if asked.replay:
        name, file = asked.replay
        replayed = next(target for target in TARGETS if target.name == name)
        warm_up(replayed)
        run_case(replayed, Path(file).read_bytes(), FuzzTally())
        print("No property fails on it.")
        return 0
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it remarks on every broken frame
    CASES.mkdir(parents=True, exist_ok=True)
    print(f"seed {asked.seed}\n\n| target | cases | refused | worst time | worst memory | memory ÷ input | findings |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    found = [finding for target in TARGETS for finding in _fuzz(target, asked.cases // len(TARGETS) + 1, asked.seed)]
    for number, finding in enumerate(found, 1):
        kept = CASES / f"{finding.target}-{number}.case"
        kept.write_bytes(finding.case)
        print(f"\n{finding.target} {finding.text}\n  {finding.case[:200]!r}")
        print(f"  python -m tests.fuzz --replay {finding.target} {kept}")
    return 1 if found else 0


def _fuzz(target: FuzzTarget, cases: int, seed: int) -> list[FailingCase]:
    """A third by Hypothesis, the rest by bytes; prints the target's line of the table."""
    tally, begun_s = FuzzTally(), time.monotonic()
    current = CASES / f"{target.name}.current"

    def watch(case: bytes) -> None:
        current.write_bytes(case)
        faulthandler.dump_traceback_later(STUCK_S, exit=True)

    found = by_hypothesis(target, cases // 3, tally, profile="fuzz", watch=watch)
    found += by_bytes(target, cases - cases // 3, tally, seed=seed, watch=watch)
    faulthandler.cancel_dump_traceback_later()
    current.unlink(missing_ok=True)
    print(
        f"| {target.name} | {tally.cases:,} | {tally.refused:,} | {tally.worst_s * 1000:.0f} ms "
        f"| {tally.worst_bytes / 1024:,.0f} KiB | {max(tally.worst_ratio, 0):.1f} | {len(found)} |",
        flush=True,
    )
    print(f"{target.name}: {time.monotonic() - begun_s:.0f} s", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
