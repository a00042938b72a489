"""Where images come from: one module per family of schemes, chosen here by the URL's scheme.

What is allowed is said in ``policy.py``, what a protocol's answers mean in its module. No DICOM is read here, and
nothing here tries twice.
"""

from __future__ import annotations

import re
import time
from typing import Protocol

from worker.errors import SourceNotAllowed
from worker.settings import SourceSettings
from worker.sources.azure import AzureSource
from worker.sources.folder import FolderSource
from worker.sources.http import HttpSource, Resolve, resolve
from worker.sources.s3 import S3Source
from worker.sources.spool import Fetched, Limits

__all__ = ["Fetched", "Source", "Sources"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15}):").match


class Source(Protocol):
    """One family of schemes.

    It SHALL raise only `worker.errors` of the source kind, whose sentences quote neither query nor credentials. It
    SHALL ask the policy before it asks the source, SHALL keep to the limits, SHALL NOT retry, and SHALL be safe to
    use from several threads at once.
    """

    def fetch(self, url: str, limits: Limits) -> Fetched: ...

    def close(self) -> None: ...


class Sources:
    """Every source that a worker may fetch from, behind one door; shared by all threads."""

    def __init__(self, settings: SourceSettings, *, resolve: Resolve = resolve) -> None:
        self._settings = settings
        http = HttpSource(settings, resolve=resolve)
        self._by_scheme: dict[str, Source] = {
            "http": http,
            "https": http,
            "file": FolderSource(settings),
            "s3": S3Source(settings),
            "az": AzureSource(settings),
        }

    def fetch(self, url: str) -> Fetched:
        """All bytes behind ``url``, hashed; close them when done.

        Raises
        ------
        SourceNotAllowed, SourceNotFound, SourceDenied, SourceTooLarge
            Trying again would end the same way.
        SourceUnreachable, SourceTruncated
            Time may cure it.
        """
        if any("\ud800" <= character <= "\udfff" for character in url):
            raise SourceNotAllowed("The URL is no valid Unicode text; correct the URL.")
        match = _SCHEME(url)
        scheme = match[1].lower() if match else ""
        source = self._by_scheme.get(scheme)
        if source is None:
            spoken = ", ".join(self._by_scheme)
            raise SourceNotAllowed(f"Images are fetched by {spoken}; this URL starts with none of them.")
        total_timeout_s = self._settings.total_timeout_s
        limits = Limits(self._settings.max_bytes, time.monotonic() + total_timeout_s, total_timeout_s)
        return source.fetch(url, limits)

    def close(self) -> None:
        """Let go of kept connections; a fetch that is under way ends on its own."""
        for source in self._by_scheme.values():
            source.close()
