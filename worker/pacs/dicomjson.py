"""Reading DICOM JSON (PS3.18 F) as servers really write it: numbers as strings, elements without Value.

Pure functions over parsed JSON; nothing here raises on a dataset that lacks something.
"""

from __future__ import annotations

from typing import Any

from courier.results import Dataset

STUDY_INSTANCE_UID = "0020000D"
SERIES_INSTANCE_UID = "0020000E"
SOP_INSTANCE_UID = "00080018"
REFERENCED_SOP_CLASS_UID = "00081150"
REFERENCED_SOP_INSTANCE_UID = "00081155"
WARNING_REASON = "00081196"
FAILURE_REASON = "00081197"
FAILED_SOP_SEQUENCE = "00081198"
REFERENCED_SOP_SEQUENCE = "00081199"
OTHER_FAILURES_SEQUENCE = "0008119A"
FAILED_ATTRIBUTES_SEQUENCE = "00741048"
ERROR_COMMENT = "00000902"


#: DICOM JSON has 13 to 22 bytes around each object and list (tag, "vr", "Value"); Python needs up to 200 for one.
_BYTES_PER_CONTAINER, _CONTAINERS_IN_ANY_CASE = 12, 1_000


def is_too_dense(body: bytes) -> bool:
    """Whether ``body`` has more objects and lists than DICOM JSON can have: parsed, it could take 24 times its size."""
    return body.count(b"{") + body.count(b"[") > _CONTAINERS_IN_ANY_CASE + len(body) // _BYTES_PER_CONTAINER


def values(ds: Dataset, tag: str) -> list[Any]:
    """The element's values; [] if it is absent, empty or not shaped as an element."""
    element = ds.get(tag)
    found = element.get("Value") if isinstance(element, dict) else None
    return found if isinstance(found, list) else []


def text(ds: Dataset, tag: str) -> str:
    """The first value as text without DICOM's padding (blanks and NUL); "" if there is none."""
    found = values(ds, tag)
    return str(found[0]).strip(" \0") if found and found[0] is not None else ""


def number(ds: Dataset, tag: str) -> int | None:
    """The first value as a whole number, whether it is written as 3, 3.0 or "3"."""
    try:
        return int(float(text(ds, tag)))
    except (ValueError, OverflowError):
        return None


def items(ds: Dataset, tag: str) -> list[Dataset]:
    """The items of a sequence."""
    return [item for item in values(ds, tag) if isinstance(item, dict)]
