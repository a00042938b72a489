"""All split studies, page after page, as a program wants them. No table, no colour, no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from producer.client import Courier
from producer.errors import NotFound
from producer.results import AuditResult

Entry = Mapping[str, Any]

#: Split studies per page, and differing images per page of one study.
PAGE, IMAGES_PER_PAGE = 500, 5000


def pages(
    courier: Courier,
    *,
    servers: Sequence[str] | None = None,
    filters: Mapping[str, str] | None = None,
    maintenance: str | None = None,
    limit: int = PAGE,
    timeout_s: float | None = None,
) -> Iterator[AuditResult]:
    """The pages of an audit, one after the other; ``limit`` and ``timeout_s`` are of one page.

    Each page reads the lists of all servers anew, so a large ``limit`` is quicker.

    Raises
    ------
    CourierError
        A page could not be had: what came before is not the whole.
    """
    cursor = None
    while True:
        handle = courier.audit(servers, filters=filters, maintenance=maintenance, limit=limit, cursor=cursor)
        page = handle.result(timeout_s=timeout_s)
        yield page
        cursor = page["cursor"]
        if cursor is None:
            return


def whole(
    courier: Courier, entry: Entry, *, servers: Sequence[str] | None = None, timeout_s: float | None = None
) -> dict[str, Any] | None:
    """The entry with every differing image; as it is, if none was left out. None: the study is no longer split."""
    if is_whole(entry):
        return dict(entry)
    uids: dict[tuple[str, ...], list[str]] = {}
    cursor = None
    while True:
        handle = courier.audit(servers, study_uid=entry["study_uid"], limit=IMAGES_PER_PAGE, cursor=cursor)
        try:
            page = handle.result(timeout_s=timeout_s)
        except NotFound:
            return None
        if not page["entries"]:
            return None
        for group in page["entries"][0]["only_on"]:
            uids.setdefault(tuple(group["servers"]), []).extend(group["image_uids"])
        cursor = page["cursor"]
        if cursor is None:
            groups = [{"servers": list(on), "images": len(found), "image_uids": found} for on, found in uids.items()]
            return {**page["entries"][0], "only_on": groups}


def is_whole(entry: Entry) -> bool:
    """Whether every image that differs is named."""
    return all(len(group["image_uids"]) == group["images"] for group in entry["only_on"])
