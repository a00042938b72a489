"""``python -m worker.health``: exit status 0 if this machine's worker gets anywhere, 1 if not, 2 if nobody can say.

For a container's health check. It reads what the worker's watchdog laid down last and asks nobody: while Redis is
away, a worker is well.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from courier.settings import Settings, SettingsError

#: A watchdog may be late by this before its silence counts.
PATIENCE_S = 45.0


def verdict(path: Path, *, now_s: float) -> tuple[bool, str]:
    """Whether the worker that writes ``path`` is well, and in words."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        age_s, every_s = now_s - float(report["at"]), float(report["every_s"])
        ok, complaint = bool(report["ok"]), str(report["complaint"])
    except FileNotFoundError:
        return False, f"No worker has written {path} yet."
    except (OSError, ValueError, LookupError, TypeError):
        return False, f"{path} cannot be read, or no worker wrote it."
    if age_s > every_s + PATIENCE_S:
        return False, f"The worker said nothing for {age_s:.0f} s: it is gone, or its process is stuck."
    if not ok:
        return False, f"The worker is stuck: {complaint}."
    return True, f"The worker gets on; it said so {max(age_s, 0):.0f} s ago." + (
        f" But: {complaint}." * bool(complaint)
    )


def main() -> int:
    try:
        path = Settings.load().worker.health_file
    except SettingsError as error:
        print(f"pacs-courier: {error}", file=sys.stderr)  # noqa: T201 - a command
        return 2
    if path is None:
        print("pacs-courier: set worker.health_file, where the worker says how it is", file=sys.stderr)  # noqa: T201
        return 2
    ok, sentence = verdict(path, now_s=time.time())
    print(sentence)  # noqa: T201
    return 0 if ok else 1
