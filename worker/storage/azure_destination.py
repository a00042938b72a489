"""Downloads into Azure's blob storage: ``az://container/path/to/blob``, only into containers that the settings name.

A blob's blocks are staged out of sight, and the list of them that makes it appear comes last, on the condition that
nothing of that name is there. What an archive holds stands in its blob's metadata. Blocks that are in no list are never
seen; Azure drops them with the next list of that blob, or after a week. So no list is sent where another program has
staged blocks: that would end its upload.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from urllib3 import PoolManager, Timeout
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from courier.errors import CourierError, SourceUnauthorized, SourceUnreachable
from courier.ledger.breakers import Breakers
from courier.settings import DownloadSettings, SettingsError
from courier.urls import refusal_reason
from worker.storage.azure import AzureAccount, code_of, container_and_blob, is_azure
from worker.storage.credentials import Asking, StoreCredential
from worker.storage.network import NO_PROXY, Network, unreachable
from worker.storage.refusals import ARCHIVED, IN_ARCHIVE, check_refusal, unauthorized
from worker.storage.study_marks import (
    CHUNK_BYTES,
    MANIFEST,
    PROBE,
    StudyFingerprint,
    blocks_of,
    occupied,
    refusal,
    retried_if_taken,
)

if TYPE_CHECKING:
    from azure.core.exceptions import HttpResponseError
    from azure.storage.blob import ContainerClient

#: One block, and so the memory that it takes. A blob has 50,000 of them at most: 400 GB.
BLOCK_BYTES = 8 * CHUNK_BYTES
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 60
#: ``InvalidBlobOrBlock`` is how another program's unfinished upload shows: all its blocks' ids have one length.
_TAKEN = frozenset(
    ("BlobAlreadyExists", "ConditionNotMet", "InvalidBlobOrBlock", "InvalidBlobType", "UnauthorizedBlobOverwrite")
)
#: The ids of our blocks; those that a killed worker has left look the same.
_OUR_BLOCK = re.compile(r"[0-9a-f]{32}-[0-9]{5}").fullmatch
_FULL = frozenset(("BlockCountExceedsLimit", "BlockListTooLong", "RequestBodyTooLarge"))
_BUSY = frozenset(("AccountBeingCreated", "ContainerBeingDeleted", "OperationTimedOut", "ServerBusy"))
_ADVICE = "check the credential of downloads.azure and what it may do"


class AzureDestinations:
    def __init__(
        self, settings: DownloadSettings, network: Network = NO_PROXY, breakers: Breakers | None = None
    ) -> None:
        self._settings = settings.azure
        self._account = AzureAccount(
            settings.azure, connect_timeout_s=CONNECT_TIMEOUT_S, read_timeout_s=READ_TIMEOUT_S, network=network
        )
        self._credential = StoreCredential("downloads.azure", breakers)
        self._network = network
        self._pools: PoolManager | None = None

    def archive(self, url: str) -> AzureArchive:
        return AzureArchive(*self._place(url))

    def files(self, url: str) -> AzureFiles:
        container, name = self._place(url)
        return AzureFiles(container, name.rstrip("/") + "/")

    def probe(self, place: str) -> bool:
        """Whether what a download asks is allowed: to read, to list and to write. Azure keeps its conditions.

        Raises
        ------
        InvalidRequest, SourceUnreachable
            It cannot be written.
        """
        container, name = self._place(f"{place}{PROBE}{uuid4().hex}")
        container.head(name)
        next(container.etags(name), None)
        container.stage(name)
        return True

    def _place(self, url: str) -> tuple[_Container, str]:
        names = container_and_blob(url)
        if names is None:
            sentence = "An Azure destination is written as az://container/path/to/blob, without a signature."
            raise refusal(sentence, "not_allowed")
        if reason := refusal_reason(url):
            raise refusal(reason, "not_allowed")
        container, blob = names
        if not any(fnmatchcase(container, pattern) for pattern in self._settings.containers):
            sentence = f"The container {container} is not among downloads.azure.containers; add it to write there."
            raise refusal(sentence, "not_allowed")
        shown = f"az://{container}"
        with self._credential.reading(shown), _translated(shown):
            client = self._account.service().get_container_client(container)
        if self._pools is None:
            timeout = Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
            self._pools = self._network.pools(retries=False, timeout=timeout)
        return _Container(client, container, self._account, self._credential, self._pools), blob


class _Container:
    """What is asked of one container."""

    def __init__(
        self,
        client: ContainerClient,
        name: str,
        account: AzureAccount,
        credential: StoreCredential,
        pools: PoolManager,
    ) -> None:
        self._client = client
        self.name = name
        self._account = account
        self._credential = credential
        self._pools = pools

    @contextmanager
    def _asking(self, shown: str) -> Iterator[Asking]:
        with self._credential.asking(shown, self.name) as asking, _translated(shown):
            yield asking

    def _read_properties(self, name: str) -> None:
        """With the credential as it is then, which may be another one."""
        with _translated(self.shown(name)):
            self._account.service().get_blob_client(self.name, name).get_blob_properties()

    def shown(self, name: str) -> str:
        return f"az://{self.name}/{name}"

    def head(self, name: str) -> Mapping[str, str] | None:
        """The metadata of a blob; None if it is not there."""
        from azure.core.exceptions import ResourceNotFoundError  # noqa: PLC0415 (as in worker/storage/azure.py)

        shown = self.shown(name)
        with self._asking(shown) as asking:
            try:
                metadata = self._client.get_blob_client(name).get_blob_properties().metadata
            except ResourceNotFoundError as error:
                if code_of(error) == "ContainerNotFound" or not is_azure(getattr(error.response, "headers", {})):
                    raise
                metadata = None
            asking.accepted(partial(self._read_properties, name))
        return metadata

    def etags(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The blobs below ``prefix`` with their ETags, without what an account with folders shows of these."""
        shown = self.shown(prefix)
        pages = self._client.list_blobs(name_starts_with=prefix, include=["metadata"]).by_page()
        while True:
            with self._asking(shown):
                page = next(pages, None)
                blobs = [] if page is None else list(page)
            if page is None:
                return
            for blob in blobs:
                if (blob.metadata or {}).get("hdi_isfolder") != "true":
                    yield blob.name, blob.etag or ""

    def stage(self, name: str) -> None:
        """Write a block that no list will name: it is never seen and needs no right to delete; Azure forgets it."""
        with self._asking(self.shown("")) as asking:
            self._client.get_blob_client(name).stage_block(f"{uuid4().hex}-00000", b"a probe")
            asking.accepted()

    def read(self, name: str) -> Iterator[bytes]:
        """In one request: the SDK's own download tries three times where a body is cut off, and sleeps between."""
        shown = self.shown(name)
        with self._asking(shown):
            answer = self._pools.request(
                "GET", self._account.url(self.name, name), redirect=False, preload_content=False
            )
            if answer.status != 200:
                answer.close()
                raise _unreadable(shown, answer)
        try:
            yield from answer.stream(CHUNK_BYTES, decode_content=False)
        except HTTPError as error:
            raise SourceUnreachable(f"{shown} cannot be read at present; it is tried again.") from error
        finally:
            answer.close()

    def write(
        self,
        name: str,
        chunks: Iterator[bytes],
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        replaces: str = "",
    ) -> int:
        """The size in bytes. Nothing is replaced but the blob that has the ETag ``replaces``."""
        from azure.core import MatchConditions  # noqa: PLC0415 (as in worker/storage/azure.py)
        from azure.storage.blob import BlobBlock, ContentSettings  # noqa: PLC0415

        blob = self._client.get_blob_client(name)
        blocks: list[BlobBlock] = []
        attempt, size_bytes = uuid4().hex, 0
        condition: dict[str, Any] = {"match_condition": MatchConditions.IfMissing}
        if replaces:
            condition = {"match_condition": MatchConditions.IfNotModified, "etag": replaces}
        with self._asking(self.shown(name)) as asking:
            for block in blocks_of(chunks, BLOCK_BYTES):
                blocks.append(BlobBlock(f"{attempt}-{len(blocks):05}"))
                blob.stage_block(blocks[-1].id, block, length=len(block))
                asking.accepted()
                size_bytes += len(block)
            if not all(_OUR_BLOCK(staged.id) for staged in blob.get_block_list("uncommitted")[1]):
                raise occupied(self.shown(name))
            blob.commit_block_list(
                blocks,
                content_settings=ContentSettings(content_type=content_type),
                metadata=dict(metadata or {}),
                **condition,
            )
        return size_bytes


class AzureArchive:
    overwrites_prevented = True  # Azure keeps its conditions

    def __init__(self, container: _Container, name: str) -> None:
        self.shown = container.shown(name)
        self._container = container
        self._name = name

    def read_fingerprint(self) -> StudyFingerprint | None:
        metadata = self._container.head(self._name)
        if metadata is None:
            return None
        try:
            return StudyFingerprint(
                metadata["pacs_study"], int(metadata["pacs_images"]), metadata["pacs_images_sha256"]
            )
        except (KeyError, ValueError):
            raise occupied(self.shown) from None

    def write(self, chunks: Iterator[bytes], fingerprint: StudyFingerprint) -> int:
        metadata = {
            "pacs_study": fingerprint.study_uid,
            "pacs_images": str(fingerprint.images),
            "pacs_images_sha256": fingerprint.images_sha256,
        }
        return self._container.write(self._name, chunks, content_type="application/zip", metadata=metadata)

    def read(self) -> Iterator[bytes]:
        return self._container.read(self._name)


class AzureFiles:
    """Blobs below a prefix; the download is whole when the manifest is among them."""

    overwrites_prevented = True

    def __init__(self, container: _Container, prefix: str) -> None:
        self.shown = container.shown(prefix)
        self._container = container
        self._prefix = prefix
        self._etags: dict[str, str] = {}

    def read_fingerprint(self) -> StudyFingerprint | None:
        if self._container.head(self._prefix + MANIFEST) is None:
            return None
        fingerprint = StudyFingerprint.of_manifest(b"".join(self._container.read(self._prefix + MANIFEST)))
        if fingerprint is None:
            raise occupied(self.shown)
        return fingerprint

    def names(self) -> set[str]:
        self._etags = {name.removeprefix(self._prefix): etag for name, etag in self._container.etags(self._prefix)}
        return self._etags.keys() - {""}

    def read(self, name: str) -> Iterator[bytes]:
        return self._container.read(self._prefix + name)

    def write(self, name: str, chunks: Iterator[bytes]) -> int:
        # An unfinished download may have left the name with bytes that are not the image's.
        etag = self._etags.get(name, "")
        with retried_if_taken(self._container.shown(self._prefix + name)):
            return self._container.write(self._prefix + name, chunks, content_type="application/dicom", replaces=etag)

    def finish(self, manifest: bytes) -> None:
        self._container.write(self._prefix + MANIFEST, iter([manifest]), content_type="application/json")


@contextmanager
def _translated(shown: str) -> Iterator[None]:
    """The SDK's errors end here; their own text is left out because it may quote more than the address."""
    from azure.core import exceptions as azure  # noqa: PLC0415 (as in worker/storage/azure.py)

    try:
        yield
    except SettingsError as error:
        raise _without_credential(shown, error) from error
    except azure.HttpResponseError as error:
        raise _write_error(error, shown) from error
    except (azure.AzureError, HTTPError) as error:
        raise unreachable(error, shown, verb="had at present") from error


def _without_credential(shown: str, error: SettingsError) -> SourceUnauthorized:
    return unauthorized(shown, "downloads.azure", "no credential", str(error), verb="had")


def _denied(sentence: str) -> CourierError:
    return refusal(sentence, "denied")


def _unreadable(shown: str, answer: BaseHTTPResponse) -> CourierError:
    code, status = answer.headers.get("x-ms-error-code", ""), answer.status
    if code in ARCHIVED:
        return _denied(f"{shown} {IN_ARCHIVE.format(code)}.")
    check_refusal(code, status, shown, of="downloads.azure", verb="read", denied=_denied)
    return SourceUnreachable(f"{shown} cannot be read at present (status {status}); it is tried again.")


def _refused(shown: str, code: str, status: int, *, known: bool) -> CourierError:
    if code in ARCHIVED:
        return _denied(f"{shown} {IN_ARCHIVE.format(code)}.")
    if not known:
        what = f"was answered by no storage of Azure (status {status})"
        return SourceUnreachable(f"{shown} {what}; check account_url of downloads.azure.")
    if status == 404:
        return refusal(f"{shown} cannot be written: there is no such container ({code or status}).", "missing")
    return _denied(f"{shown} may not be written ({code or status}); {_ADVICE}.")


def _write_error(error: HttpResponseError, shown: str) -> CourierError:
    """What an error answer means.

    Raises
    ------
    SourceUnauthorized, Doubt
        See `check_refusal`.
    """
    code, status = code_of(error), error.status_code or 0
    if code in _TAKEN:
        return occupied(shown)
    if code in _FULL or status in (413, 507):
        return refusal(f"{shown} cannot be written: it is more than Azure takes or has room for.", "full")
    check_refusal(code, status, shown, of="downloads.azure", verb="written", denied=_denied)
    if 400 <= status < 500 and status not in (408, 429) and code not in _BUSY:
        return _refused(shown, code, status, known=is_azure(getattr(error.response, "headers", {})))
    return SourceUnreachable(f"{shown} cannot be written at present (status {status}); it is tried again.")
