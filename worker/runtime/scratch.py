"""Temporary files on a full disk: what is said of it, and how such a file is given up. No file is opened here."""

from __future__ import annotations

import contextlib
from typing import IO, Any

from courier.errors import SourceUnreachable


def no_room(error: OSError) -> SourceUnreachable:
    """A full temporary folder is no fault of the job and none of the worker's code: time may cure it."""
    return SourceUnreachable(f"The worker has no room to keep the image ({error.strerror}); free its temporary folder.")


def drop(stream: IO[Any]) -> None:
    """Close a file whose bytes are not needed any more, also where a full disk does not take the rest of them."""
    with contextlib.suppress(OSError):
        stream.close()
