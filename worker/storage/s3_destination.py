"""Downloads into S3 and what speaks like it: ``s3://bucket/key``, only into buckets that the settings name.

An object appears when its upload is complete; an upload that fails is aborted. What an archive holds stands in the
metadata of its object, so that it is known again without being read. How a bucket is written to without replacing
anything is said in ``bucket.py``. boto3 is loaded with the first such URL.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from courier.ledger.breakers import Breakers
from courier.settings import DownloadSettings
from courier.urls import refusal_reason
from worker.storage.bucket import Bucket, KnownBucket, Way, translated
from worker.storage.credentials import StoreCredential
from worker.storage.network import NO_PROXY, Network, s3_client
from worker.storage.study_marks import (
    MANIFEST,
    PROBE,
    OwnRecords,
    Records,
    StudyFingerprint,
    occupied,
    refusal,
    retried_if_taken,
)

_S3_URL = re.compile(r"(?i:s3)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})/(?P<key>[^\x00-\x1f]+)").fullmatch
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 60
_WAYS: tuple[Way, ...] = ("put", "parts")


class S3Destinations:
    def __init__(
        self,
        settings: DownloadSettings,
        records: Records | None = None,
        network: Network = NO_PROXY,
        breakers: Breakers | None = None,
    ) -> None:
        self._settings = settings.s3
        self._network = network
        self._credential = StoreCredential("downloads.s3", breakers, renew=self._renew)
        self._records = records or OwnRecords()
        self._lock = threading.Lock()
        self._client: Any = None
        self._places: dict[str, KnownBucket] = {}

    def archive(self, url: str) -> S3Archive:
        key = _parts(url)[1]
        return S3Archive(self._bucket(url, beside=key), key)

    def files(self, url: str) -> S3Files:
        name = _parts(url)[1].rstrip("/")
        return S3Files(self._bucket(url, beside=name), f"{name}/")

    def probe(self, place: str) -> bool:
        """Whether a bucket refuses to have an object written over another one; what was known before does not count.

        Raises
        ------
        InvalidRequest, SourceUnreachable
            It cannot be tried.
        """
        bucket = self._bucket(f"{place}x", beside="")
        bucket.head(PROBE)  # as each download does first
        return all([bucket.probe(way) for way in _WAYS])

    def _bucket(self, url: str, *, beside: str) -> Bucket:
        bucket, _ = _parts(url)
        if not any(fnmatchcase(bucket, pattern) for pattern in self._settings.buckets):
            sentence = f"The bucket {bucket} is not among downloads.s3.buckets; add it if downloads may go there."
            raise refusal(sentence, "not_allowed")
        shown = f"s3://{bucket}"
        with self._credential.reading(shown), translated(shown), self._lock:
            if self._client is None:
                self._client = s3_client(
                    self._settings,
                    self._network,
                    connect_timeout_s=CONNECT_TIMEOUT_S,
                    read_timeout_s=READ_TIMEOUT_S,
                )
            name = f"{self._settings.endpoint_url or self._settings.region or ''} {bucket}"
            place = self._places.setdefault(bucket, KnownBucket(name, {}, self._records))
            client = self._client
        return Bucket(client, bucket, place, self._credential, beside=beside)

    def _renew(self) -> None:
        """Have the next job look for credentials anew: boto reads those of a file once."""
        with self._lock:
            self._client = None


def _parts(url: str) -> tuple[str, str]:
    match = _S3_URL(url)
    if match is None:
        raise refusal("An S3 destination is written as s3://bucket/key, without credentials.", "not_allowed")
    if reason := refusal_reason(url):
        raise refusal(reason, "not_allowed")
    if {".", ".."} & set(match["key"].split("/")):  # a server, or a proxy before it, may take it for a path out of it
        raise refusal("An S3 destination has no . or .. between slashes; name the object itself.", "not_allowed")
    return match["bucket"], match["key"]


class S3Archive:
    def __init__(self, bucket: Bucket, key: str) -> None:
        self.shown = bucket.shown(key)
        self.overwrites_prevented = True
        self._bucket = bucket
        self._key = key

    def read_fingerprint(self) -> StudyFingerprint | None:
        there = self._bucket.head(self._key)
        if there is None:
            return None
        told = there.metadata
        try:
            return StudyFingerprint(told["pacs-study"], int(told["pacs-images"]), told["pacs-images-sha256"])
        except (KeyError, ValueError):
            raise occupied(self.shown) from None

    def write(self, chunks: Iterator[bytes], fingerprint: StudyFingerprint) -> int:
        metadata = {
            "pacs-study": fingerprint.study_uid,
            "pacs-images": str(fingerprint.images),
            "pacs-images-sha256": fingerprint.images_sha256,
        }
        size_bytes, self.overwrites_prevented = self._bucket.write(
            self._key, chunks, content_type="application/zip", metadata=metadata
        )
        return size_bytes

    def read(self) -> Iterator[bytes]:
        return self._bucket.read(self._key)


class S3Files:
    """Objects below a prefix; the download is whole when the manifest is among them."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.shown = bucket.shown(prefix)
        self.overwrites_prevented = True
        self._bucket = bucket
        self._prefix = prefix
        self._etags: dict[str, str] = {}

    def read_fingerprint(self) -> StudyFingerprint | None:
        if self._bucket.head(self._prefix + MANIFEST) is None:
            return None
        fingerprint = StudyFingerprint.of_manifest(b"".join(self._bucket.read(self._prefix + MANIFEST)))
        if fingerprint is None:
            raise occupied(self.shown)
        return fingerprint

    def names(self) -> set[str]:
        self._etags = {key.removeprefix(self._prefix): etag for key, etag in self._bucket.etags(self._prefix)}
        return {name for name in self._etags if name and PROBE not in name}

    def read(self, name: str) -> Iterator[bytes]:
        return self._bucket.read(self._prefix + name)

    def write(self, name: str, chunks: Iterator[bytes]) -> int:
        with retried_if_taken(self._bucket.shown(self._prefix + name)):
            return self._write(name, chunks, "application/dicom", self._etags.get(name, ""))

    def finish(self, manifest: bytes) -> None:
        self._write(MANIFEST, iter([manifest]), "application/json")

    def _write(self, name: str, chunks: Iterator[bytes], content_type: str, replaces: str = "") -> int:
        size_bytes, prevented = self._bucket.write(
            self._prefix + name, chunks, content_type=content_type, metadata={}, replaces=replaces
        )
        self.overwrites_prevented &= prevented
        return size_bytes
