"""The real `pacs` command in a real pseudo-terminal or pipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACS = str(Path(sys.executable).with_name("pacs"))
#: What colours a text, moves the cursor and makes a link: all that we send to a terminal beside text.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\|[\r\x07]")
_WAIT_S = 60


@dataclass(frozen=True)
class Ended:
    """``raw`` is all that reached the terminal, or standard output; ``errors`` is standard error of a pipe."""

    status: int
    raw: str
    errors: str = ""

    @property
    def shown(self) -> str:
        """The text without colours and links; a break in it is one that we sent, not one of the terminal."""
        return _CONTROL.sub("", self.raw)

    def selects(self, word: str) -> bool:
        """Whether a double click on ``word`` selects it, whole and alone."""
        return re.search(rf"(?:^|\s){re.escape(word)}(?:\s|$)", self.shown, re.MULTILINE) is not None


def environment(more: Mapping[str, str]) -> dict[str, str]:
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")
    return {
        **{name: text for name, text in os.environ.items() if name not in left_out},
        "TERM": "xterm-256color",
        **more,
    }


def in_terminal(
    words: Sequence[str],
    *,
    columns: int,
    env: Mapping[str, str],
    typed: str = "",
    argv: Sequence[str] = (PACS,),
    cwd: Path | None = None,
) -> Ended:
    """Run it on a terminal of so many columns, and type ``typed`` into it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([*argv, *words], **streams, env=environment(env), cwd=cwd, start_new_session=True) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        killer = threading.Timer(_WAIT_S, process.kill)
        killer.start()
        parts = []
        with contextlib.suppress(OSError):  # the end of the last process on the terminal
            while part := os.read(ours, 65_536):
                parts.append(part)
        status = process.wait()
        killer.cancel()
    os.close(ours)
    return Ended(status, b"".join(parts).decode("utf-8"))


def in_pipe(
    words: Sequence[str], *, env: Mapping[str, str], given: bytes = b"", argv: Sequence[str] = (PACS,)
) -> Ended:
    """Run it with pipes for all three standard streams."""
    done = subprocess.run(
        [*argv, *words], input=given, capture_output=True, env=environment(env), timeout=_WAIT_S, check=False
    )
    return Ended(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


def in_shell(line: str, *, env: Mapping[str, str]) -> Ended:
    """Run a line of bash, in which ``pacs`` is the command."""
    return in_pipe(["-c", line.replace("pacs ", f"{PACS} ", 1)], env=env, argv=("bash",))
