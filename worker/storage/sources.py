"""Where images come from: one module per family of schemes, chosen here by the URL's scheme.

What is allowed is said in ``policy.py``, what a protocol's answers mean in its module. No DICOM is read here, and
nothing here tries twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Protocol

from courier import extras
from courier.errors import SourceNotAllowed, SourceNotFound, SourceTooLarge
from courier.ledger.breakers import Breakers
from courier.redaction import redact_url
from courier.settings import SourceSettings, places_of
from courier.urls import ENCODED
from worker.storage.azure_source import AzureSource
from worker.storage.folder_source import FolderSource
from worker.storage.http import HttpSource, Resolve, resolve
from worker.storage.listing import ListedObject, Listing
from worker.storage.s3_source import S3Source
from worker.storage.spool import Fetched, Limits
from worker.storage.zip_source import Archives, is_archive, is_entry

__all__ = ["Fetched", "ListedObject", "Source", "Sources"]

#: How long the first byte of a source may take where only that is wanted.
TRY_S = 10.0
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15}):").match


class Source(Protocol):
    """One family of schemes.

    It SHALL raise only `courier.errors` of the source kind, whose sentences quote neither query nor credentials. It
    SHALL ask the policy before it asks the source, SHALL keep to the limits, SHALL NOT retry, and SHALL be safe to
    use from several threads at once.
    """

    def fetch(self, url: str, limits: Limits) -> Fetched: ...

    def close(self) -> None: ...


class NotInstalled:
    """The source of a store whose SDK is not installed: each URL is refused."""

    def __init__(self, extra: extras.Extra) -> None:
        self._extra = extra

    def fetch(self, url: str, limits: Limits) -> Fetched:  # noqa: ARG002 - the Protocol's
        raise self._refusal(url)

    def pages(self, url: str) -> Iterator[list[ListedObject]]:
        raise self._refusal(url)

    def close(self) -> None:
        """Nothing was opened."""

    def _refusal(self, url: str) -> SourceNotAllowed:
        return SourceNotAllowed(f"This worker reads no {_scheme(url)}:// URLs: {self._extra.remedy}.")


_Store = S3Source | AzureSource | NotInstalled


class Sources:
    """Every source that a worker may fetch from, behind one door; shared by all threads."""

    def __init__(
        self, settings: SourceSettings, *, resolve: Resolve = resolve, breakers: Breakers | None = None
    ) -> None:
        """``breakers`` are what all workers know of credentials that stores refuse."""
        self._settings = settings
        http = HttpSource(settings, resolve=resolve, breakers=breakers)
        folder = FolderSource(settings)
        s3 = S3Source(settings, breakers) if extras.S3.is_installed else NotInstalled(extras.S3)
        azure = AzureSource(settings, breakers) if extras.AZURE_BLOBS.is_installed else NotInstalled(extras.AZURE_BLOBS)
        stores: dict[str, _Store] = {"s3": s3, f"s3{ENCODED}": s3, "az": azure, f"az{ENCODED}": azure}
        self._by_scheme: dict[str, Source] = {"http": http, "https": http, "file": folder, **stores}
        self._listings: dict[str, Listing] = {"file": folder, **stores}
        self._archives = Archives(self._fetch, self._limits)

    def fetch(self, url: str) -> Fetched:
        """All bytes behind ``url``, hashed; close them when done.

        Raises
        ------
        SourceNotAllowed, SourceNotFound, SourceDenied, SourceTooLarge
            Trying again would end the same way.
        NotDicom
            The archive of which it is to be an entry is none, or damaged.
        SourceUnreachable, SourceTruncated
            Time may cure it.
        SourceUnauthorized
            The store, or the proxy, refuses the worker's own credential.
        """
        _check_text(url)
        if is_entry(url):
            return self._archives.fetch(url, self._limits())
        return self._fetch(url, self._limits())

    def pages(self, url: str) -> Iterator[list[ListedObject]]:
        """What ``url`` holds, page by page: below ``s3://bucket/prefix/``, ``az://container/prefix/`` and
        ``file:///folder/``, or in a ZIP file at any URL that can be fetched.

        Raises
        ------
        SourceNotAllowed
            As for a fetch, or it is nothing that can be listed.
        SourceNotFound
            It is not there, or there is nothing in it.
        CourierError
            As for a fetch.
        """
        _check_text(url)
        listing = self._listings.get(_scheme(url)) if url.endswith("/") else None
        if listing is None and not is_archive(url):
            raise SourceNotAllowed(
                "Only s3://bucket/prefix/, az://container/prefix/, file:///folder/ (with the slash at the end) and ZIP "
                "files can be listed; give other images by their URLs, in a file."
            )
        empty = True
        for page in (listing or self._archives).pages(url):
            empty = False
            yield page
        if empty:
            raise SourceNotFound(f"There is nothing in {redact_url(url)}; check the URL.")

    @property
    def places(self) -> list[str]:
        """The folders, buckets and containers of the settings, as URLs; those without a wildcard in their names."""
        return places_of(self._settings)

    def first_listed(self, place: str) -> str | None:
        """The URL of something in one of the `places`; None if nothing is in it, or nothing that can be fetched.

        Raises
        ------
        CourierError
            As for `pages`.
        """
        for page in self._listings[_scheme(place)].pages(place):
            for one in page:
                if not one.refused:
                    return one.url
        return None

    def try_reading(self, url: str) -> None:
        """Fetch no more than the first byte.

        Raises
        ------
        CourierError
            As for `fetch`.
        """
        try:
            self._fetch(url, Limits(1, time.monotonic() + TRY_S, TRY_S)).close()
        except SourceTooLarge:  # so it would be sent
            return

    def _fetch(self, url: str, limits: Limits) -> Fetched:
        source = self._by_scheme.get(_scheme(url))
        if source is None:
            spoken = ", ".join(self._by_scheme)
            raise SourceNotAllowed(f"Images are fetched by {spoken}; this URL starts with none of them.")
        return source.fetch(url, limits)

    def _limits(self) -> Limits:
        total_timeout_s = self._settings.total_timeout_s
        return Limits(self._settings.max_bytes, time.monotonic() + total_timeout_s, total_timeout_s)

    def close(self) -> None:
        """Let go of kept connections and archives; a fetch that is under way ends on its own."""
        self._archives.close()
        for source in self._by_scheme.values():
            source.close()


def _scheme(url: str) -> str:
    match = _SCHEME(url)
    return match[1].lower() if match else ""


def _check_text(url: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in url):
        raise SourceNotAllowed("The URL is no valid Unicode text; correct the URL.")
