"""Finds the demo (`make run`) that runs on this machine, for commands that no setting tells where Redis is.

A demo leaves its settings in ``.run/demo-PID/pacs.toml`` below the folder that it was started in. Nothing here loads
Celery, Redis or pydantic: shell completion asks it too.
"""

from __future__ import annotations

import os
import socket
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

#: One of these says where Redis is, or may: then no demo is looked for.
_SETTINGS: Final = ("PACS_CONFIG", "BROKER_URL", "RESULT_BACKEND", "LEDGER_URL")
_ANSWER_S: Final = 0.2


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment says nothing of where Redis is."""
    return not any(environ.get(name) for name in _SETTINGS) and not any(name.startswith("PACS__") for name in environ)


def running_demos(folder: Path | None = None) -> list[Path]:
    """The settings of the demos of this user that run, started in ``folder`` (the current one) or one above it."""
    start = (folder or Path.cwd()).resolve()
    for place in (start, *start.parents):
        found = [path for path in sorted(place.glob(".run/demo-*/pacs.toml")) if _runs(path)]
        if found:
            return found
    return []


def _runs(settings: Path) -> bool:
    """Whether the demo that has left ``settings`` lives. The files of one that died stay, and its number may be taken
    by another process: so its Redis has to answer as well. Those of another user are not trusted.
    """
    try:
        if settings.stat().st_uid != os.getuid():
            return False
        os.kill(int(settings.parent.name.removeprefix("demo-")), 0)
        url = tomllib.loads(settings.read_text(encoding="utf-8"))["queue"]["broker_url"]
        parts = urlsplit(str(url))
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=_ANSWER_S):
            return True
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextmanager
def used_if_alone() -> Iterator[None]:
    """Inside, the one demo that runs here is the one that commands ask, if no setting says otherwise; it is said on
    standard error.

    Raises
    ------
    click.UsageError
        Several run.
    """
    demos = running_demos() if is_wanted(os.environ) else []
    if len(demos) > 1:
        named = "\n".join(f"  PACS_CONFIG={shown(path)}" for path in demos)
        raise click.UsageError(f"PACS_CONFIG is not set, and {len(demos)} demos run here. Name one of them:\n{named}")
    if not demos:
        yield
        return
    if sys.stderr is not None:
        from producer.terminal import errors_console, plain  # noqa: PLC0415 (loads rich)

        sentence = f"pacs: PACS_CONFIG is not set; asking the demo that runs here: {shown(demos[0])}"
        errors_console.print(plain(sentence), soft_wrap=True)
    os.environ["PACS_CONFIG"] = str(demos[0])
    try:
        yield
    finally:
        os.environ.pop("PACS_CONFIG", None)


def shown(path: Path) -> str:
    """``path`` as it may be typed from here."""
    return os.path.relpath(path)
