"""What is asked of one bucket of S3, or of a store that speaks like it; and how nothing there is overwritten.

A write has the condition that no object of that name exists (``If-None-Match: *``). A store that ignores the condition
is found out by a probe, once per place; there the object is looked for before and after the write instead. A multipart
upload is aborted only if the records say that a job of ours began it. boto3 is loaded with the first S3 URL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Literal
from uuid import uuid4

from courier.errors import CourierError, InvalidRequest, SourceUnreachable
from worker.storage.credentials import Asking, StoreCredential
from worker.storage.network import unreachable
from worker.storage.refusals import ARCHIVED, IN_ARCHIVE, check_refusal, credential_trouble, is_code
from worker.storage.study_marks import CHUNK_BYTES, PROBE, Records, blocks_of, occupied, refusal

log = logging.getLogger(__name__)

#: One part of an upload, and so the memory that it takes. S3 takes 10,000 of them: 80 GB.
PART_BYTES = 8 * CHUNK_BYTES
_BUSY = frozenset(("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"))
#: Metadata by which an object is known again as the one that was just written.
_WRITTEN_AS = "pacs-write"
#: What S3 wants to hear again of a part when the upload is completed.
_OF_PART = ("ETag", "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")

#: An object is written by one request or in parts; a store may keep the condition of the one and not of the other.
Way = Literal["put", "parts"]
#: Sends the request that makes an object appear, under a condition if there is one.
_Appear = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class KnownBucket:
    """A bucket at an endpoint, and what this process knows of it: which ways of writing keep the condition."""

    name: str
    known: dict[Way, bool]
    records: Records


@dataclass(frozen=True)
class StoredObject:
    """An object as a store shows it: the ETag without quotes, the names of the metadata in small letters."""

    etag: str
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> StoredObject:
        metadata = {str(name).lower(): str(value) for name, value in answer.get("Metadata", {}).items()}
        return cls(_etag(answer), metadata)


@dataclass(frozen=True)
class _Write:
    """One object on its way. ``replaces`` is the ETag of the object that it may replace, "" if none."""

    key: str
    headers: Mapping[str, Any]
    replaces: str
    prevented: bool
    token: str


class Bucket:
    def __init__(self, client: Any, name: str, place: KnownBucket, credential: StoreCredential, *, beside: str) -> None:
        """``beside`` is the key of what is written, in whose folder a probe may be written too."""
        self._client = client
        self._credential = credential
        self._place = place
        self._beside = beside
        self.name = name

    def shown(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def head(self, key: str) -> StoredObject | None:
        """The object as it is now; None if it is not there."""
        with self._asking(self.shown(key)) as asking:
            try:
                answer = self._head(key)
            except self._client.exceptions.ClientError as error:
                if _status(error.response) != 404:
                    raise
                self._client.head_bucket(Bucket=self.name)  # a missing bucket has to be told from a missing object
                answer = None
            asking.accepted(partial(self._read_head, key))
        return None if answer is None else StoredObject.of(answer)

    def _read_head(self, key: str) -> None:
        with translated(self.shown(key)):
            self._head(key)

    def _head(self, key: str) -> Mapping[str, Any]:
        """A refusal is asked for again by a GET: to a HEAD, S3 gives no code that says whose trouble it is."""
        try:
            answer: Mapping[str, Any] = self._client.head_object(Bucket=self.name, Key=key)
        except self._client.exceptions.ClientError as error:
            if _status(error.response) in (400, 401, 403):
                self._client.get_object(Bucket=self.name, Key=key, Range="bytes=0-0")["Body"].close()
            raise
        return answer

    @contextmanager
    def _asking(self, shown: str) -> Iterator[Asking]:
        with self._credential.asking(shown, self.name) as asking, translated(shown):
            yield asking

    def etags(self, prefix: str) -> Iterator[tuple[str, str]]:
        """The keys below ``prefix`` with their ETags."""
        pages = iter(self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix))
        while True:
            with self._asking(self.shown(prefix)):
                page = next(pages, None)
            if page is None:
                return
            for entry in page.get("Contents", ()):
                yield str(entry["Key"]), _etag(entry)

    def read(self, key: str) -> Iterator[bytes]:
        """Whole, or `SourceUnreachable`. As a context manager, boto's reader would not compare lengths."""
        with self._asking(self.shown(key)):
            answer = self._client.get_object(Bucket=self.name, Key=key)
        with translated(self.shown(key)), closing(answer["Body"]) as body:
            while chunk := body.read(CHUNK_BYTES):
                yield chunk

    def write(
        self,
        key: str,
        chunks: Iterator[bytes],
        *,
        content_type: str,
        metadata: Mapping[str, str],
        replaces: str = "",
    ) -> tuple[int, bool]:
        """The size in bytes, and whether the store has promised that only the object with the ETag ``replaces``, if
        any, was replaced.

        Raises
        ------
        InvalidRequest
            Another object is there (``exists``).
        """
        self._end_ours(key)
        size_bytes = 0

        def counted(blocks: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal size_bytes
            for block in blocks:
                size_bytes += len(block)
                yield block

        blocks = counted(blocks_of(chunks, PART_BYTES))
        first = list(islice(blocks, 2))
        way: Way = "parts" if len(first) > 1 else "put"
        prevented, token = self._prevents_overwrites(way), uuid4().hex
        known_by = {} if prevented else {_WRITTEN_AS: token}
        headers = {"ContentType": content_type, "Metadata": {**metadata, **known_by}}
        write = _Write(key, headers, replaces, prevented, token)
        with self._asking(self.shown(key)):
            if way == "parts":
                self._in_parts(key, headers, chain(first, blocks), lambda appear: self._guarded(write, appear))
            else:
                self._guarded(write, self._put(key, headers, b"".join(first)))
        return size_bytes, prevented

    def _prevents_overwrites(self, way: Way) -> bool:
        """Whether the store refuses to write ``way`` over an object that is there; probed if no worker knows."""
        known = self._place.known
        if way not in known:
            noted = self._place.records.overwrites_prevented(f"{way} {self._place.name}")
            if noted is not None:
                known[way] = noted
                return noted
            try:
                return self.probe(way)
            except InvalidRequest as error:
                if error.details.get("reason") != "denied":
                    raise
                known[way] = False  # the probe may not be written, so nothing is known and nothing is relied upon
        return known[way]

    def probe(self, way: Way) -> bool:
        """Whether the store refuses to write ``way`` over an object that is there, tried now.

        Raises
        ------
        InvalidRequest
            The probe may not be written (``denied``), or there is no such bucket.
        """
        prevented = self._probe(way)
        self._place.known[way] = prevented
        self._place.records.note_overwrites(f"{way} {self._place.name}", prevented=prevented)
        return prevented

    def _probe(self, way: Way) -> bool:
        """Write an object of our own and try to write over it under the condition that nothing is there.

        The first write has the condition too: a bucket's policy may require it of all.
        """
        folder, slash, _ = self._beside.rpartition("/")
        key = f"{folder}{slash}{PROBE}{uuid4().hex}"
        versions: set[str | None] = set()

        def anew(appear: _Appear) -> Mapping[str, Any]:
            return appear(IfNoneMatch="*")

        with self._asking(self.shown(key)):
            try:
                versions.add(anew(self._put(key, {}, b"a probe, removed at once")).get("VersionId"))
                answer = (
                    self._in_parts(key, {}, [b"overwritten"], anew)
                    if way == "parts"
                    else anew(self._put(key, {}, b"overwritten"))
                )
                versions.add(answer.get("VersionId"))
                return False
            except self._client.exceptions.ClientError as error:
                if _is_occupied(error.response):
                    return True
                if _is_unknown_header(error.response):
                    return False
                raise
            finally:
                self._remove(key, versions)

    # --- one object -------------------------------------------------------------------------------------------

    def _put(self, key: str, headers: Mapping[str, Any], body: bytes) -> _Appear:
        def appear(**condition: str) -> Mapping[str, Any]:
            answer: Mapping[str, Any] = self._client.put_object(
                Bucket=self.name, Key=key, Body=body, **headers, **condition
            )
            return answer

        return appear

    def _in_parts(
        self,
        key: str,
        headers: Mapping[str, Any],
        blocks: Iterable[bytes],
        finish: Callable[[_Appear], Mapping[str, Any]],
    ) -> Mapping[str, Any]:
        """Upload ``blocks`` as parts, which ``finish`` makes an object; otherwise nothing is left of them."""
        at = {"Bucket": self.name, "Key": key}
        upload_id = str(self._client.create_multipart_upload(**at, **headers)["UploadId"])
        self._place.records.upload_begun(self.shown(key), upload_id)
        parts: list[dict[str, Any]] = []

        def appear(**condition: str) -> Mapping[str, Any]:
            answer: Mapping[str, Any] = self._client.complete_multipart_upload(
                **at, UploadId=upload_id, MultipartUpload={"Parts": parts}, **condition
            )
            return answer

        try:
            for number, block in enumerate(blocks, start=1):
                told = self._client.upload_part(**at, UploadId=upload_id, PartNumber=number, Body=block)
                parts.append({"PartNumber": number, **{name: told[name] for name in _OF_PART if name in told}})
            answer = finish(appear)
        except BaseException:
            self._abort(key, upload_id)
            raise
        self._place.records.upload_ended(self.shown(key), upload_id)
        return answer

    def _guarded(self, write: _Write, appear: _Appear) -> Mapping[str, Any]:
        """Let the object appear, unless another one is there.

        Where it is not known that the store keeps the condition it is sent all the same: it may be kept, and a bucket's
        policy may require it. A store that refuses it does without.
        """
        condition = {"IfMatch": f'"{write.replaces}"'} if write.replaces else {"IfNoneMatch": "*"}
        if write.replaces or not write.prevented:
            before = self.head(write.key)
            if (before.etag if before else "") != write.replaces:
                raise occupied(self.shown(write.key))
        if write.prevented:
            return appear(**condition)
        try:
            answer = appear(**condition)
        except self._client.exceptions.ClientError as error:
            if not _is_unknown_header(error.response):
                raise
            answer = appear()
        after = self.head(write.key)
        if after is None or (after.metadata.get(_WRITTEN_AS) != write.token and after.etag != _etag(answer)):
            raise occupied(self.shown(write.key))
        return answer

    def _end_ours(self, key: str) -> None:
        """Abort the uploads to ``key`` that a job of ours began and could not end: its worker was killed."""
        for upload_id in self._place.records.uploads_begun(self.shown(key)):
            self._abort(key, upload_id)

    def _abort(self, key: str, upload_id: str) -> None:
        from botocore import exceptions as boto  # noqa: PLC0415 (as in s3_destination.py)

        try:
            self._client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)
        except boto.ClientError as error:
            if _status(error.response) != 404:  # it is known still, so the next write tries it again
                return
        except boto.BotoCoreError:
            return
        self._place.records.upload_ended(self.shown(key), upload_id)

    def _remove(self, key: str, versions: Iterable[str | None]) -> None:
        from botocore import exceptions as boto  # noqa: PLC0415 (as in s3_destination.py)

        try:
            try:
                for version in versions:
                    of = {"VersionId": version} if version else {}
                    self._client.delete_object(Bucket=self.name, Key=key, **of)
            except boto.ClientError as error:
                if not any(versions) or _status(error.response) != 403:
                    raise
                self._client.delete_object(Bucket=self.name, Key=key)  # versions may need a right of their own
        except (boto.ClientError, boto.BotoCoreError) as error:
            sentence = "The probe %s could not be removed (%s); remove it, and allow s3:DeleteObject for such names."
            log.warning(sentence, self.shown(key), type(error).__name__)


@contextmanager
def translated(shown: str) -> Iterator[None]:
    """boto's errors end here; their own text is left out because it may quote more than the address."""
    from boto3.exceptions import Boto3Error  # noqa: PLC0415 (as in s3_destination.py)
    from botocore import exceptions as boto  # noqa: PLC0415

    try:
        with credential_trouble(shown, "downloads.s3", verb="written"):
            yield
    except boto.ClientError as error:
        raise _write_error(error.response, shown) from error
    except boto.NoRegionError as error:
        raise _denied(f"{shown} cannot be written ({type(error).__name__}); set downloads.s3.region.") from error
    except boto.ParamValidationError as error:
        raise refusal(f"{shown} is no name that S3 allows; write s3://bucket/key.", "not_allowed") from error
    except (boto.IncompleteReadError, boto.ResponseStreamingError) as error:
        raise SourceUnreachable(f"{shown} did not arrive whole; it is read again.") from error
    except (boto.BotoCoreError, Boto3Error) as error:
        raise unreachable(error, shown, verb="had at present") from error


def _write_error(answer: Mapping[str, Any], shown: str) -> CourierError:
    code, status = _code(answer), _status(answer)
    if _is_occupied(answer):
        return occupied(shown)
    check_refusal(code, status, shown, of="downloads.s3", verb="written", denied=_denied)
    if code in ("NoSuchKey", "NoSuchUpload"):
        return SourceUnreachable(f"{shown} was changed by another program meanwhile; it is tried again.")
    if 400 <= status < 500 and status not in (408, 409, 429) and code not in _BUSY:
        return _refused(shown, code, status)
    if 300 <= status < 400:
        came = f"was answered by a redirect (status {status})"
        return SourceUnreachable(f"{shown} {came}; check endpoint_url and region of downloads.s3.")
    return SourceUnreachable(f"{shown} cannot be written at present (status {status}); it is tried again.")


def _refused(shown: str, code: str, status: int) -> CourierError:
    if code == "NoSuchBucket" or status == 404:
        quoted = f" ({code})" if is_code(code) else ", or downloads.s3.endpoint_url is no S3"
        return refusal(f"{shown} cannot be written: there is no such bucket{quoted}.", "missing")
    if code in ARCHIVED:
        return _denied(f"{shown} {IN_ARCHIVE.format(code)}.")
    return _denied(f"{shown} may not be written ({code or status}); check what the worker's credentials allow.")


def _denied(sentence: str) -> CourierError:
    return refusal(sentence, "denied")


def _is_occupied(answer: Mapping[str, Any]) -> bool:
    return _status(answer) == 412 or _code(answer) == "PreconditionFailed"


def _is_unknown_header(answer: Mapping[str, Any]) -> bool:
    """Whether the store says that it cannot keep the condition at all."""
    return _status(answer) in (400, 405, 501) and _code(answer) not in _BUSY


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _code(answer: Mapping[str, Any]) -> str:
    return str(answer.get("Error", {}).get("Code", ""))


def _status(answer: Mapping[str, Any]) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
