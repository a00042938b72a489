"""Images in Azure's blob storage: ``az://container/path/to/blob``, read with the worker's own credential.

Whoever may enqueue could read with that credential, so only containers that the settings name are read. The SDK signs
for the one blob; the fetch itself is `http`'s, because the SDK reads by ranges and repeats by itself those that fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceUnauthorized,
    SourceUnreachable,
    TryAgain,
)
from courier.ledger.breakers import Breakers
from courier.redaction import redact_url
from courier.settings import SettingsError, SourceSettings
from courier.urls import object_url, refusal_reason
from worker.storage.azure import AzureAccount, code_of, container_and_blob, container_and_prefix, is_azure
from worker.storage.credentials import Asking, StoreCredential
from worker.storage.http import HttpSource, error_of_answer
from worker.storage.listing import PAGE_ENTRIES, ListedObject, listed_object
from worker.storage.network import Network, unreachable
from worker.storage.policy import Policy
from worker.storage.refusals import ARCHIVED, IN_ARCHIVE, check_refusal, unauthorized
from worker.storage.spool import Fetched, Limits


class AzureSource:
    def __init__(self, settings: SourceSettings, breakers: Breakers | None = None) -> None:
        self._settings = settings.azure
        self._account = AzureAccount(
            settings.azure,
            connect_timeout_s=settings.connect_timeout_s,
            read_timeout_s=settings.idle_timeout_s,
            network=Network.of(settings),
        )
        self._credential = StoreCredential("sources.azure", breakers)
        # Where the account is was said by the operator, not by whoever enqueued; no answer leads elsewhere.
        anywhere = {"allow_hosts": ("*:*",), "allow_private_networks": True, "max_redirects": 0}
        policy = Policy(settings.model_copy(update={**anywhere, "proxy": None}))
        self._http = HttpSource(settings.model_copy(update=anywhere), policy=policy, breakers=breakers)

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
        with self._credential.asking(source, container) as asking:
            try:
                signed_url = self._account.url(container, blob)
            except SettingsError as error:
                raise _without_credential(source, error) from error
            judge = partial(_read_error, source, asking, partial(self._read_properties, container, blob, source))
            with _named(redact_url(signed_url), source):
                return replace(self._http.fetch(signed_url, limits, judge), source=source)

    def _read_properties(self, container: str, blob: str, source: str) -> None:
        with _listed_object(source):
            self._account.service().get_blob_client(container, blob).get_blob_properties()

    def pages(self, url: str) -> Iterator[list[ListedObject]]:
        """The blobs below ``az://container/prefix/``, a page of Azure's at a time."""
        names = container_and_prefix(url)
        if names is None:
            raise SourceNotAllowed("The Azure URL is malformed; write az://container/prefix/, without a signature.")
        if reason := refusal_reason(url):
            raise SourceNotAllowed(reason)
        container, prefix = names
        self._check(container)
        source = object_url(f"az://{container}/{prefix}")
        with self._credential.asking(source, container, counts=False), _listed_object(source):
            client = self._account.service().get_container_client(container)
            found = client.list_blobs(
                name_starts_with=prefix or None, include=["metadata"], results_per_page=PAGE_ENTRIES
            )
            pages = found.by_page()
            more = next(pages, None)
        while more is not None:
            page = [_blob(container, blob) for blob in more if not _is_folder(blob)]
            if page:
                yield page
            with self._credential.asking(source, container, counts=False), _listed_object(source):
                more = next(pages, None)

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
    except SourceUnauthorized as error:
        error.payload["message"] = error.message.replace(asked, source)
        raise
    except CourierError as error:
        sentence = error.message.replace(asked, source)
        if isinstance(error, TryAgain):
            raise type(error)(sentence, retry_after_s=error.retry_after_s) from error
        raise type(error)(sentence) from error


def _blob(container: str, blob: Any) -> ListedObject:
    url = f"az://{container}/{blob.name}"
    unreadable = "its name has . or .. between slashes" if container_and_blob(object_url(url)) is None else ""
    return listed_object(url, blob.name, blob.size, unreadable=unreadable)


def _is_folder(blob: Any) -> bool:
    """What an account with folders shows of these; and what other programs put in their place."""
    return (blob.metadata or {}).get("hdi_isfolder") == "true" or blob.name.endswith("/")


def _without_credential(source: str, error: SettingsError) -> SourceUnauthorized:
    return unauthorized(source, "sources.azure", "no credential", str(error), verb="read")


def _read_error(
    source: str, asking: Asking, again: Callable[[], object], status: int, headers: Mapping[str, str], shown: str
) -> CourierError | None:
    """What the answer of a fetch means; the code says more than the status where both are there."""
    code = headers.get("x-ms-error-code", "")
    refusal = _refusal(source, code, status, known=is_azure(headers)) or error_of_answer(status, headers, shown)
    if refusal is None:
        asking.accepted(again)
    return refusal


def _refusal(source: str, code: str, status: int, *, known: bool) -> CourierError | None:
    """What a client's error means; None where the status says all.

    Raises
    ------
    SourceUnauthorized, Doubt
        See `check_refusal`.
    """
    if not 400 <= status < 500 or status in (408, 429):
        return None
    if code in ARCHIVED:
        return SourceDenied(f"{source} {IN_ARCHIVE.format(code)}.")
    check_refusal(code, status, source, of="sources.azure", verb="read", denied=SourceDenied)
    if not code and not known:
        what = f"was answered by no storage of Azure (status {status})"
        return SourceUnreachable(f"{source} {what}; check account_url of sources.azure.")
    if status in (404, 410):
        return SourceNotFound(f"{source} is not there ({code or status}); check container and blob.")
    return SourceDenied(f"{source} may not be read ({code or status}); check what sources.azure may read there.")


@contextmanager
def _listed_object(source: str) -> Iterator[None]:
    """The SDK's errors end here; their own text is left out because it may quote more than the address."""
    from azure.core import exceptions as azure  # noqa: PLC0415 (as in worker/storage/azure.py)

    try:
        yield
    except SettingsError as error:
        raise _without_credential(source, error) from error
    except azure.HttpResponseError as error:
        known = is_azure(getattr(error.response, "headers", {}))
        refusal = _refusal(source, code_of(error), error.status_code or 0, known=known)
        raise refusal or SourceUnreachable(f"{source} cannot be listed at present; it is tried again.") from error
    except azure.AzureError as error:
        raise unreachable(error, source) from error
