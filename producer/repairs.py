"""A repair plan: how each split study would become whole on one server. Nothing is asked or changed here.

The plan is JSON Lines, for a person to read and for a batch to carry out: a header, one line per study, and a last
line with the totals. Without its last line a plan is not whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from producer.errors import InvalidRequest

VERSION = 1
NOTE = (
    "Nothing was changed by writing this file: no image was copied, moved or deleted. Each line below says what would "
    "be done for one study, in the order of its steps; a step is only to be taken when the one before it has succeeded."
)


def repair(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What would make one split study whole: copy to the server that keeps it, verify there, delete elsewhere.

    ``entry`` names all its differing images (`producer.audits.whole`). A deletion bears the number of images that
    were there: if there are others by then, the plan is out of date.
    """
    keep = entry["keep"]
    missing = [group for group in entry["only_on"] if keep not in group["servers"]]
    steps: list[dict[str, Any]] = [
        {
            "do": "copy",
            "from": group["servers"][0],
            "to": keep,
            "images": len(group["image_uids"]),
            "image_uids": group["image_uids"],
        }
        for group in missing
    ]
    steps.append({"do": "verify", "on": keep, "images": entry["images"]})
    steps += [
        {"do": "delete", "level": "study", "on": place["server_name"], "images": place["images"]}
        for place in entry["servers"]
        if place["server_name"] != keep
    ]
    return {"study_uid": entry["study_uid"], "keep": keep, "overlap": entry["overlap"], "steps": steps}


def check_new(path: Path) -> None:
    """Refuse a file that cannot be written, before there is anything to be written into it.

    Raises
    ------
    InvalidRequest
        It exists already, or its folder is none that may be written into.
    """
    if os.path.lexists(path):
        raise InvalidRequest(f"{path} exists already; a plan is not written over another.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidRequest(f"{path} cannot be written: there is no such folder, or nothing may be written into it.")


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Write ``path``, which appears whole or not at all.

    Raises
    ------
    InvalidRequest
        It exists already, or cannot be written.
    """
    temporary: Path | None = None
    try:
        check_new(path)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(number, "w", encoding="utf-8") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.link(temporary, path)  # unlike a rename it never replaces a file that somebody has put there meanwhile
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write(repairs: Iterable[Mapping[str, Any]], out: TextIO, *, servers: Iterable[str]) -> dict[str, int]:
    """Write a plan, as its repairs are read; returns its totals."""
    header = {
        "manifest": "pacs-courier/repair",
        "version": VERSION,
        "note": NOTE,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "servers": list(servers),
    }
    totals = {"studies": 0, "copies": 0, "deletions": 0}
    _line(header, out)
    for line in repairs:
        _line(line, out)
        totals["studies"] += 1
        totals["copies"] += sum(step["images"] for step in line["steps"] if step["do"] == "copy")
        totals["deletions"] += sum(step["images"] for step in line["steps"] if step["do"] == "delete")
    _line({"end": True, **totals}, out)
    return totals


def _line(document: Mapping[str, Any], out: TextIO) -> None:
    out.write(json.dumps(document) + "\n")
