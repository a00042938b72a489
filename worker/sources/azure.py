"""Images in Azure's blob storage: ``az://container/path/to/blob``, read with the worker's own credential.

Whoever may enqueue could read with that credential, so only containers that the settings name are read. The SDK signs
for the one blob; the fetch itself is `http`'s, because the SDK reads by ranges and repeats by itself those that fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from worker.azure import AzureAccount, container_and_blob, container_and_prefix
from worker.errors import CourierError, SourceDenied, SourceNotAllowed, SourceNotFound, SourceUnreachable, TryAgain
from worker.logs import shown_url
from worker.settings import SettingsError, SourceSettings
from worker.sources.http import HttpSource
from worker.sources.listing import PAGE_ENTRIES, Listed, listed
from worker.sources.spool import Fetched, Limits
from worker.urls import object_url, refusal_reason


class AzureSource:
    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings.azure
        self._account = AzureAccount(
            settings.azure, connect_timeout_s=settings.connect_timeout_s, read_timeout_s=settings.idle_timeout_s
        )
        # Where the account is was said by the operator, not by whoever enqueued; no answer leads elsewhere.
        anywhere = {"allow_hosts": ("*:*",), "allow_private_networks": True, "max_redirects": 0}
        self._http = HttpSource(settings.model_copy(update=anywhere))

    def fetch(self, url: str, limits: Limits) -> Fetched:
        names = container_and_blob(url)
        if names is None:
            raise SourceNotAllowed(
                "The Azure URL is malformed; write az://container/path/to/blob, without a signature."
            )
        if reason := refusal_reason(url):
            raise SourceNotAllowed(reason)
        container, blob = names
        self._check(container)
        source = object_url(f"az://{container}/{blob}")
        try:
            signed_url = self._account.url(container, blob)
        except SettingsError as error:
            raise SourceDenied(f"{source} cannot be asked for: {error}.") from error
        with _named(shown_url(signed_url), source):
            return replace(self._http.fetch(signed_url, limits), source=source)

    def pages(self, url: str) -> Iterator[list[Listed]]:
        """The blobs below ``az://container/prefix/``, a page of Azure's at a time."""
        names = container_and_prefix(url)
        if names is None:
            raise SourceNotAllowed("The Azure URL is malformed; write az://container/prefix/, without a signature.")
        if reason := refusal_reason(url):
            raise SourceNotAllowed(reason)
        container, prefix = names
        self._check(container)
        source = object_url(f"az://{container}/{prefix}")
        with _listed(source):
            client = self._account.service().get_container_client(container)
            found = client.list_blobs(
                name_starts_with=prefix or None, include=["metadata"], results_per_page=PAGE_ENTRIES
            )
            for blobs in found.by_page():
                page = [_blob(container, blob) for blob in blobs if not _is_folder(blob)]
                if page:
                    yield page

    def _check(self, container: str) -> None:
        if not any(fnmatchcase(container, pattern) for pattern in self._settings.containers):
            raise SourceNotAllowed(
                f"The container {container} is not on the list of allowed sources; "
                "add it to sources.azure.containers if images may be fetched from it."
            )

    def close(self) -> None:
        self._http.close()
        self._account.close()


@contextmanager
def _named(asked: str, source: str) -> Iterator[None]:
    """What the fetch says of the URL that was ``asked`` for, said of the one that the job names."""
    try:
        yield
    except SourceDenied as error:
        advice = "check the credential of sources.azure and what it may read, and that the blob is not archived"
        raise SourceDenied(f"{source} may not be read; {advice}.") from error
    except CourierError as error:
        sentence = error.message.replace(asked, source)
        if isinstance(error, TryAgain):
            raise type(error)(sentence, retry_after_s=error.retry_after_s) from error
        raise type(error)(sentence) from error


def _blob(container: str, blob: Any) -> Listed:
    url = f"az://{container}/{blob.name}"
    unreadable = "its name has . or .. between slashes" if container_and_blob(object_url(url)) is None else ""
    return listed(url, blob.name, blob.size, unreadable=unreadable)


def _is_folder(blob: Any) -> bool:
    """What an account with folders shows of these; and what other programs put in their place."""
    return (blob.metadata or {}).get("hdi_isfolder") == "true" or blob.name.endswith("/")


@contextmanager
def _listed(source: str) -> Iterator[None]:
    """The SDK's errors end here; their own text is left out because it may quote more than the address."""
    from azure.core import exceptions as azure  # noqa: PLC0415 (as in worker/azure.py)

    try:
        yield
    except SettingsError as error:
        raise SourceDenied(f"{source} cannot be asked for: {error}.") from error
    except azure.HttpResponseError as error:
        status = error.status_code or 0
        if status == 404:
            raise SourceNotFound(f"{source} is not there; check the container.") from error
        if 400 <= status < 500 and status not in (408, 429):
            advice = "check the credential of sources.azure and whether it may list"
            raise SourceDenied(f"{source} may not be listed (status {status}); {advice}.") from error
        raise SourceUnreachable(f"{source} cannot be listed at present; it is tried again.") from error
    except azure.AzureError as error:
        raise SourceUnreachable(f"{source} cannot be reached; it is tried again.") from error
