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

from courier.urls import object_url

#: How many a page holds at most; S3 gives no more at a time.
PAGE_ENTRIES = 1000
#: As in a job.
MAX_URL = 8192
#: Files of patient CDs and of desktops, by their whole names in lower case.
_NO_IMAGES = {
    "dicomdir": "a directory of images, no image",
    "manifest.json": "the manifest of a download, no image",
    **dict.fromkeys((".ds_store", "thumbs.db", "lockfile", "version"), "no image by its name"),
}
#: Viewer programs and what belongs to them, web pages and papers. JPEG, TIFF, PNG and films are not here: they are
#: images, though not of DICOM, and have to be refused.
_IS_NO_IMAGE = re.compile(
    r"(?:readme|licen[cs]e)(?!.*\.(?:dcm|zip)\Z).*|.+\.(?:exe|dll|ocx|sys|msi|cab|bat|cmd|inf|ini|cfg|config|jar|class|so|dylib|app|lnk"
    r"|url|html?|css|js|json|xml|xslt?|xsd|dtd|rtf|pdf|docx?|chm|hlp|ico|gif|svg)",
    re.DOTALL,
).fullmatch


@dataclass(frozen=True)
class ListedObject:
    """One thing that was found, by the URL that fetches it.

    ``skip_reason`` is why it is not fetched: its name says that it is no image; or, if ``refused``, it cannot be
    read, so that an image may be missing.
    """

    url: str
    size_bytes: int | None = None
    skip_reason: str = ""
    refused: bool = False


class Listing(Protocol):
    """What can say what it has. It SHALL ask the policy first, SHALL hold one page at a time, SHALL NOT retry."""

    def pages(self, url: str) -> Iterator[list[ListedObject]]: ...


def listed_object(url: str, name: str, size_bytes: int | None = None, *, unreadable: str = "") -> ListedObject:
    """What is called ``name``: left out if its name says that it is no image, refused if it cannot be read."""
    url = object_url(url)
    if no_image := _no_image(name):
        return ListedObject(url[:MAX_URL], size_bytes, no_image)
    unreadable = unreadable or _unreadable(url, name)
    return ListedObject(url[:MAX_URL], size_bytes, unreadable, refused=bool(unreadable))


def paged(entries: Iterable[ListedObject]) -> Iterator[list[ListedObject]]:
    rest = iter(entries)
    while page := list(islice(rest, PAGE_ENTRIES)):
        yield page


def _no_image(name: str) -> str:
    """Why what is called ``name``, with the folders that it is in, is no image; "" if it may be one."""
    *folders, last = name.replace("\\", "/").split("/")
    if last.startswith("._") or "__MACOSX" in folders:
        return "made by macOS, no image"
    last = last.lower()
    return _NO_IMAGES.get(last, "no image by its name" if _IS_NO_IMAGE(last) else "")


def _unreadable(url: str, name: str) -> str:
    if len(url) > MAX_URL:
        return f"its URL has more than {MAX_URL} characters"
    return "an archive; list it by its own URL" if name.lower().endswith(".zip") else ""
