"""The real `pacs` command in a real pseudo-terminal or pipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forks
from tests.forks import PACS

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
    process = forks.spawn([*argv, *words], **streams, env=environment(env), cwd=cwd, start_new_session=True)
    os.close(theirs)
    os.write(ours, typed.encode())
    with _killed_in_the_end(process.pid):
        parts = []
        with contextlib.suppress(OSError):  # the end of the last process on the terminal
            while part := os.read(ours, 65_536):
                parts.append(part)
        status = process.wait()
    os.close(ours)
    return Ended(status, b"".join(parts).decode("utf-8"))


def in_pipe(
    words: Sequence[str], *, env: Mapping[str, str], given: bytes = b"", argv: Sequence[str] = (PACS,)
) -> Ended:
    """Run it with pipes for all three standard streams."""
    (stdin, typed), (shown, stdout), (complained, stderr) = os.pipe(), os.pipe(), os.pipe()
    streams: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    process = forks.spawn([*argv, *words], **streams, env=environment(env), start_new_session=True)
    for theirs in streams.values():
        os.close(theirs)
    with _killed_in_the_end(process.pid), ThreadPoolExecutor() as readers:
        told = [readers.submit(_read_all, ours) for ours in (shown, complained)]
        with contextlib.suppress(BrokenPipeError), open(typed, "wb") as writer:
            writer.write(given)
        status = process.wait()
        return Ended(status, *(each.result().decode("utf-8") for each in told))


def _read_all(ours: int) -> bytes:
    with open(ours, "rb") as reader:
        return reader.read()


@contextlib.contextmanager
def _killed_in_the_end(group: int) -> Iterator[None]:
    killer = threading.Timer(_WAIT_S, os.killpg, (group, signal.SIGKILL))
    killer.start()
    yield
    killer.cancel()


def in_shell(line: str, *, env: Mapping[str, str]) -> Ended:
    """Run a line of bash, in which ``pacs`` is the command."""
    return in_pipe(["-c", line.replace("pacs ", f"{PACS} ", 1)], env=env, argv=("bash",))
