"""Downloads into S3 and what speaks like it: ``s3://bucket/key``, only into buckets that the settings name.

An object appears when its upload is complete; an upload that fails is aborted. What an archive holds stands in the
metadata of its object, so that it is known again without being read. boto3 is loaded with the first such URL.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from worker.destinations.mark import CHUNK_BYTES, MANIFEST, Mark, refusal, something_else
from worker.errors import CourierError, SourceUnreachable
from worker.settings import DownloadSettings
from worker.urls import refusal_reason

_S3_URL = re.compile(r"(?i:s3)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})/(?P<key>[^\x00-\x1f]+)").fullmatch
#: One part of an upload, and so the memory that it takes. S3 takes 10,000 of them: 80 GB.
PART_BYTES = 8 * CHUNK_BYTES
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 60
_BUSY = frozenset(("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"))


class S3Destinations:
    def __init__(self, settings: DownloadSettings) -> None:
        self._settings = settings.s3
        self._lock = threading.Lock()
        self._client: Any = None

    def archive(self, url: str) -> S3Archive:
        return S3Archive(self._bucket(url), _parts(url)[1])

    def files(self, url: str) -> S3Files:
        return S3Files(self._bucket(url), _parts(url)[1].rstrip("/") + "/")

    def _bucket(self, url: str) -> _Bucket:
        bucket, _ = _parts(url)
        if not any(fnmatchcase(bucket, pattern) for pattern in self._settings.buckets):
            sentence = f"The bucket {bucket} is not among downloads.s3.buckets; add it if downloads may go there."
            raise refusal(sentence, "not_allowed")
        with self._lock:
            if self._client is None:
                self._client = self._connect()
        return _Bucket(self._client, bucket)

    def _connect(self) -> Any:
        """One client for all threads. One attempt, because the job retries; the endpoint from the settings alone."""
        import boto3  # noqa: PLC0415 (a worker that never sees S3 does not pay for it)
        from botocore.config import Config  # noqa: PLC0415

        config = Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=32,
            ignore_configured_endpoint_urls=True,
        )
        with _translated("The S3 endpoint"):
            return boto3.session.Session().client(
                "s3", endpoint_url=self._settings.endpoint_url, region_name=self._settings.region, config=config
            )


def _parts(url: str) -> tuple[str, str]:
    match = _S3_URL(url)
    if match is None:
        raise refusal("An S3 destination is written as s3://bucket/key, without credentials.", "not_allowed")
    if reason := refusal_reason(url):
        raise refusal(reason, "not_allowed")
    if {".", ".."} & set(match["key"].split("/")):  # a server, or a proxy before it, may take it for a path out of it
        raise refusal("An S3 destination has no . or .. between slashes; name the object itself.", "not_allowed")
    return match["bucket"], match["key"]


class _Bucket:
    """What is asked of one bucket."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self.name = name

    def shown(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def head(self, key: str) -> Mapping[str, str] | None:
        """The metadata of an object; None if it is not there."""
        with _translated(self.shown(key)):
            try:
                answer = self._client.head_object(Bucket=self.name, Key=key)
            except self._client.exceptions.ClientError as error:
                if _status(error.response) != 404:
                    raise
                self._client.head_bucket(Bucket=self.name)  # a missing bucket has to be told from a missing object
                return None
        metadata: Mapping[str, str] = answer.get("Metadata", {})
        return metadata

    def keys(self, prefix: str) -> Iterator[str]:
        with _translated(self.shown(prefix)):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                for entry in page.get("Contents", ()):
                    yield str(entry["Key"])

    def read(self, key: str) -> Iterator[bytes]:
        with _translated(self.shown(key)), self._client.get_object(Bucket=self.name, Key=key)["Body"] as body:
            while chunk := body.read(CHUNK_BYTES):
                yield chunk

    def write(self, key: str, chunks: Iterator[bytes], *, content_type: str, metadata: Mapping[str, str]) -> int:
        from boto3.s3.transfer import TransferConfig  # noqa: PLC0415 (as above)

        content = _Readable(chunks)
        with _translated(self.shown(key)):
            self._client.upload_fileobj(
                content,
                self.name,
                key,
                ExtraArgs={"ContentType": content_type, "Metadata": dict(metadata)},
                Config=TransferConfig(
                    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False
                ),
            )
        return content.size_bytes

    def clear_unfinished(self, key: str) -> None:
        """Remove the uploads of ``key`` that nobody will complete: their worker was killed."""
        with _translated(self.shown(key)):
            answer = self._client.list_multipart_uploads(Bucket=self.name, Prefix=key)
            for upload in answer.get("Uploads", ()):
                if upload["Key"] == key:
                    self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload["UploadId"])


class S3Archive:
    def __init__(self, bucket: _Bucket, key: str) -> None:
        self.shown = bucket.shown(key)
        self._bucket = bucket
        self._key = key

    def look(self) -> Mark | None:
        metadata = self._bucket.head(self._key)
        if metadata is None:
            self._bucket.clear_unfinished(self._key)
            return None
        try:
            return Mark(metadata["pacs-study"], int(metadata["pacs-images"]), metadata["pacs-images-sha256"])
        except (KeyError, ValueError):
            raise something_else(self.shown) from None

    def write(self, chunks: Iterator[bytes], mark: Mark) -> int:
        metadata = {
            "pacs-study": mark.study_uid,
            "pacs-images": str(mark.images),
            "pacs-images-sha256": mark.images_sha256,
        }
        return self._bucket.write(self._key, chunks, content_type="application/zip", metadata=metadata)

    def read(self) -> Iterator[bytes]:
        return self._bucket.read(self._key)


class S3Files:
    """Objects below a prefix; the download is whole when the manifest is among them."""

    def __init__(self, bucket: _Bucket, prefix: str) -> None:
        self.shown = bucket.shown(prefix)
        self._bucket = bucket
        self._prefix = prefix

    def look(self) -> Mark | None:
        if self._bucket.head(self._prefix + MANIFEST) is None:
            return None
        mark = Mark.of_manifest(b"".join(self._bucket.read(self._prefix + MANIFEST)))
        if mark is None:
            raise something_else(self.shown)
        return mark

    def names(self) -> set[str]:
        return {key.removeprefix(self._prefix) for key in self._bucket.keys(self._prefix)} - {""}

    def read(self, name: str) -> Iterator[bytes]:
        return self._bucket.read(self._prefix + name)

    def write(self, name: str, chunks: Iterator[bytes]) -> int:
        return self._bucket.write(self._prefix + name, chunks, content_type="application/dicom", metadata={})

    def finish(self, manifest: bytes) -> None:
        key = self._prefix + MANIFEST
        self._bucket.write(key, iter([manifest]), content_type="application/json", metadata={})


class _Readable:
    """An iterator of bytes as the file that boto3 reads from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        pieces, have = [self._rest], len(self._rest)
        while size < 0 or have < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            pieces.append(chunk)
            have += len(chunk)
        content = b"".join(pieces)
        taken, self._rest = (content, b"") if size < 0 else (content[:size], content[size:])
        self.size_bytes += len(taken)
        return taken


@contextmanager
def _translated(shown: str) -> Iterator[None]:
    """boto's errors end here; their own text is left out because it may quote more than the address."""
    from boto3.exceptions import Boto3Error  # noqa: PLC0415 (as above)
    from botocore import exceptions as boto  # noqa: PLC0415

    try:
        yield
    except boto.ClientError as error:
        raise _judge(error.response, shown) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.NoRegionError) as error:
        sentence = f"{shown} cannot be written ({type(error).__name__}); check the worker's credentials and region."
        raise refusal(sentence, "denied") from error
    except boto.ParamValidationError as error:
        raise refusal(f"{shown} is no name that S3 allows; write s3://bucket/key.", "not_allowed") from error
    except (boto.BotoCoreError, Boto3Error) as error:
        raise SourceUnreachable(f"{shown} cannot be written at present; it is tried again.") from error


def _judge(answer: Mapping[str, Any], shown: str) -> CourierError:
    code, status = str(answer.get("Error", {}).get("Code", "")), _status(answer)
    if code == "NoSuchBucket" or status == 404:
        return refusal(f"{shown} cannot be written: there is no such bucket.", "missing")
    if 400 <= status < 500 and status not in (408, 409, 429) and code not in _BUSY:
        return refusal(f"{shown} may not be written (status {status}); check the worker's credentials.", "denied")
    return SourceUnreachable(f"{shown} cannot be written at present (status {status}); it is tried again.")


def _status(answer: Mapping[str, Any]) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
