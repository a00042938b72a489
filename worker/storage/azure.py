"""An account of Azure's blob storage: its URLs, and the SDK's client with the credential that the settings name.

What an answer means is for those who ask: a source and a destination put it differently. The SDK is loaded with the
first ``az:`` URL.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from courier.settings import AzureSettings, SettingsError
from courier.urls import object_name
from worker.storage.network import NO_PROXY, Network, azure_transport

if TYPE_CHECKING:
    from azure.core.exceptions import HttpResponseError
    from azure.storage.blob import BlobServiceClient

_CONTAINER = r"(?i:az(?P<encoded>\+encoded)?)://(?P<container>\$root|[a-z0-9][a-z0-9-]{1,61}[a-z0-9])"
_AZURE_URL = re.compile(_CONTAINER + r"/(?P<blob>[^\x00-\x1f\\]+)").fullmatch
_AZURE_PREFIX = re.compile(_CONTAINER + r"/(?P<prefix>([^\x00-\x1f\\]*/)?)").fullmatch
_MAX_NAME = 1024
#: How long a URL that this worker signs for itself is good for; it is looked at when a fetch starts.
_SIGNED_FOR = timedelta(hours=1)

# At INFO the SDK writes every request's URL and headers.
logging.getLogger("azure").setLevel(logging.WARNING)


def container_and_blob(url: str) -> tuple[str, str] | None:
    """What ``az://container/path/to/blob`` names, taken as it stands, without percent-decoding and with its ``?`` and
    ``#``, or percent-encoded in ``az+encoded://container/blob``; None if malformed.

    Names with ``.`` or ``..`` between slashes are refused: on the way they would be taken for a path, and lead out of
    the container.
    """
    names = _read(_AZURE_URL(url), "blob")
    if names is None or {".", ".."} & set(names[1].replace("\\", "/").split("/")):
        return None
    return names


def container_and_prefix(url: str) -> tuple[str, str] | None:
    """What ``az://container/prefix/`` names; None if malformed."""
    return _read(_AZURE_PREFIX(url), "prefix")


def _read(match: re.Match[str] | None, what: str) -> tuple[str, str] | None:
    if match is None:
        return None
    name = object_name(match[what], encoded=match["encoded"] is not None)
    return None if name is None or len(name) > _MAX_NAME else (match["container"], name)


class AzureAccount:
    """The one account of the settings; shared by all threads. One attempt per request, because the job retries."""

    def __init__(
        self,
        settings: AzureSettings,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        network: Network = NO_PROXY,
    ) -> None:
        self._settings = settings
        self._network = network
        self._timeouts = {"connect_timeout_s": connect_timeout_s, "read_timeout_s": read_timeout_s}
        self._options: dict[str, Any] = {
            "retry_total": 0,
            "retry_connect": 0,
            "retry_read": 0,
            "retry_status": 0,
            "proxies": network.proxies,
        }
        self._lock = threading.Lock()
        self._service: BlobServiceClient | None = None
        self._credential: tuple[str, str] | None = None

    def service(self) -> BlobServiceClient:
        """The SDK's client. The credential is looked up each time, so that a token that is renewed in place is used.

        Raises
        ------
        SettingsError
            The credential is missing or malformed; the sentence does not quote it.
        """
        credential = self._settings.credential()
        with self._lock:
            if self._service is None or credential != self._credential:
                self._service, self._credential = self._connect(*credential), credential
            return self._service

    def url(self, container: str, blob: str) -> str:
        """Where the blob is read over plain http, with a signature in the query unless it is public.

        Raises
        ------
        SettingsError
            As above.
        """
        service = self.service()
        url = service.get_blob_client(container, blob).url
        key = getattr(service.credential, "account_key", None)
        return f"{url}?{_signature(service, container, blob, key)}" if key else url

    def close(self) -> None:
        if self._service is not None:
            self._service.close()

    def _connect(self, kind: str, credential: str) -> BlobServiceClient:
        from azure.storage.blob import BlobServiceClient  # noqa: PLC0415 (a worker that never sees Azure pays nothing)

        options = {**self._options, "transport": azure_transport(self._network, **self._timeouts)}
        try:
            if kind == "connection_string":
                return BlobServiceClient.from_connection_string(credential, **options)
            url = self._settings.account_url or ""
            return BlobServiceClient(url, credential=_spoken(kind, credential, url), **options)
        except (ValueError, KeyError) as error:
            raise SettingsError(f"the credential of azure ({kind}) is malformed ({type(error).__name__})") from None


def code_of(error: HttpResponseError) -> str:
    """The code by which Azure says what is wrong; "" if the answer has none."""
    code = getattr(error, "error_code", None) or ""
    return str(getattr(code, "value", code))  # an enumeration's member where the SDK knows it


def is_azure(headers: Mapping[str, str]) -> bool:
    """Whether an error answer may be Azure's: a page for people is none."""
    return "x-ms-request-id" in headers or not headers.get("Content-Type", "").startswith("text/html")


def _spoken(kind: str, credential: str, account_url: str) -> Any:
    if kind == "account_key":
        host, _, path = account_url.partition("://")[2].partition("/")
        account = path.strip("/") or host.partition(".")[0]  # in the path where one server stands for all accounts
        return {"account_name": account, "account_key": credential}
    return credential.removeprefix("?") or None


def _signature(service: BlobServiceClient, container: str, blob: str, key: str) -> str:
    """A token that reads this one blob, for a while."""
    from azure.core.exceptions import AzureError  # noqa: PLC0415 (as above)
    from azure.storage.blob import BlobSasPermissions, generate_blob_sas  # noqa: PLC0415 (as above)

    try:
        return generate_blob_sas(
            account_name=service.credential.account_name,
            container_name=container,
            blob_name=blob.replace("\\", "/"),  # as Azure reads it, and Azurite
            account_key=key,
            permission=BlobSasPermissions(read=True),
            expiry=datetime.now(UTC) + _SIGNED_FOR,
        )
    except (ValueError, AzureError) as error:
        raise SettingsError(f"the account key of azure is malformed ({type(error).__name__})") from None
