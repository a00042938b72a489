"""What lies below a prefix, in a folder or in an archive: the URLs that fetch it, page after page.

Shapes, and which names are no image's. Each protocol's listing is in its module, asks the policy before it asks the
source, and holds one page at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from worker.urls import refusal_reason

#: How many a page holds at most; S3 gives no more at a time.
PAGE_ENTRIES = 1000
#: As in a job.
MAX_URL = 8192
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
_NO_IMAGES = {
    "DICOMDIR": "a directory of images, no image",
    "manifest.json": "the manifest of a download, no image",
    ".DS_Store": "no image",
    "Thumbs.db": "no image",
}


@dataclass(frozen=True)
class Listed:
    """One thing that was found, by the URL that fetches it. ``why_not``: why it is no image, or cannot be fetched."""

    url: str
    size_bytes: int | None = None
    why_not: str = ""


class Listing(Protocol):
    """What can say what it has. It SHALL ask the policy first, SHALL hold one page at a time, SHALL NOT retry."""

    def pages(self, url: str) -> Iterator[list[Listed]]: ...


def listed(url: str, name: str, size_bytes: int | None = None) -> Listed:
    """What is called ``name``, with the reason if its name says that it is no image."""
    return Listed(url, size_bytes, _why_not(url, name.rpartition("/")[2]))


def paged(entries: Iterable[Listed]) -> Iterator[list[Listed]]:
    rest = iter(entries)
    while page := list(islice(rest, PAGE_ENTRIES)):
        yield page


def _why_not(url: str, name: str) -> str:
    if _CONTROL.search(url):
        return "its name has characters that no URL may have"
    if refusal_reason(url):
        return "its name ends like a signature or a version in a URL; give it by a signed https:// URL"
    if len(url) > MAX_URL:
        return f"its URL has more than {MAX_URL} characters"
    if name.lower().endswith(".zip"):
        return "an archive; list it by its own URL"
    return _NO_IMAGES.get(name, "")
