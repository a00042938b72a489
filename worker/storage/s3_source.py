"""Images in S3 and what speaks like it: ``s3://bucket/key``, read with the worker's own credentials.

Whoever may enqueue could read with those credentials, so only buckets that the settings name are read. boto3 is loaded
with the first such URL. A key is taken as it stands, without percent-decoding and with its ``?`` and ``#``, as Amazon's
own tools do; in ``s3+encoded://bucket/key`` it is percent-encoded.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from urllib3.exceptions import HTTPError

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTruncated,
    SourceUnreachable,
)
from courier.ledger.breakers import Breakers
from courier.redaction import redact_url
from courier.settings import SettingsError, SourceSettings
from courier.urls import ENCODED, object_name, refusal_reason
from worker.runtime.botocore_internals import make_answers, unreadable_answer
from worker.runtime.deadlines import timed
from worker.storage.credentials import StoreCredential
from worker.storage.encoding import decoded, is_plain
from worker.storage.listing import PAGE_ENTRIES, ListedObject, listed_object
from worker.storage.network import Network, close_what_failed, reading_credentials, s3_client, unreachable
from worker.storage.refusals import ARCHIVED, IN_ARCHIVE, check_refusal, credential_trouble, is_code
from worker.storage.spool import Fetched, Limits, spool

_BUCKET = r"(?i:s3(?P<encoded>\+encoded)?)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,254})"
_S3_URL = re.compile(_BUCKET + r"/(?P<key>[^\x00-\x1f]+)").fullmatch
_S3_PREFIX = re.compile(_BUCKET + r"/(?P<prefix>([^\x00-\x1f]*/)?)").fullmatch
_READ_BYTES = 65_536
_BUSY = frozenset(("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"))
#: Until when the calling thread's answers have to be there; boto offers no other way in.
_asking = threading.local()
_CREDENTIALS = "check the credentials of the worker and what they may read"


class S3Source:
    def __init__(self, settings: SourceSettings, breakers: Breakers | None = None) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._client: Any = None
        self._credential = StoreCredential("sources.s3", breakers, renew=self._renew)

    def fetch(self, url: str, limits: Limits) -> Fetched:
        bucket, key = bucket_and_key(url)
        self._check(bucket)
        source = redact_url(url)
        _asking.deadline_s = limits.deadline_s
        try:
            return self._fetched(bucket, key, source, limits)
        except SourceUnreachable:
            limits.check_time(source)
            raise

    def _fetched(self, bucket: str, key: str, source: str, limits: Limits) -> Fetched:
        with self._credential.asking(source, bucket) as asking:
            with _translated(source):
                answer = self._connected().get_object(Bucket=bucket, Key=key)
            asking.accepted(partial(self._read_one_byte, bucket, key, source))
        # Not the body's own ``with``: that gives the bare stream, past its checksum and the translation of its errors.
        with closing(answer["Body"]) as body:
            encoding = str(answer.get("ContentEncoding", ""))
            size_bytes: int | None = answer.get("ContentLength")
            limits.check_size(size_bytes or 0, source)
            return spool(
                decoded(_chunks(body, source), encoding, source=source),
                source=source,
                limits=limits,
                announced_bytes=size_bytes if is_plain(encoding) else None,
            )

    def _read_one_byte(self, bucket: str, key: str, source: str) -> None:
        """By a GET of one byte: S3 answers a HEAD that it refuses without a code."""
        with _translated(source):
            self._connected().get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()

    def pages(self, url: str) -> Iterator[list[ListedObject]]:
        """The objects below ``s3://bucket/prefix/``, a page of S3's at a time."""
        bucket, prefix = _bucket_and_prefix(url)
        self._check(bucket)
        source = redact_url(url)
        more: dict[str, str] = {}
        while True:
            _asking.deadline_s = time.monotonic() + self._settings.total_timeout_s
            with self._credential.asking(source, bucket, counts=False), _translated(source):
                answer = self._connected().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=PAGE_ENTRIES, **more)
            found = ((one["Key"], one.get("Size")) for one in answer.get("Contents", ()))
            page = [_listed_object(bucket, key, size) for key, size in found if not key.endswith("/")]
            if page:
                yield page
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def _check(self, bucket: str) -> None:
        if not any(fnmatchcase(bucket, pattern) for pattern in self._settings.s3.buckets):
            raise SourceNotAllowed(
                f"The bucket {bucket} is not on the list of allowed sources; "
                "add it to sources.s3.buckets if images may be fetched from it."
            )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _renew(self) -> None:
        """Have the next request look for credentials anew: boto reads those of a file once."""
        with self._lock:
            self._client = None

    def _connected(self) -> Any:
        """The one client of this process; making one takes a tenth of a second and is not safe among threads."""
        with self._lock:
            if self._client is None:
                self._client = _client(self._settings)
            return self._client


def check_credentials() -> None:
    """Whether the worker has any at all; asked where the SDK looks for them: variables, files, the machine's role.

    Raises
    ------
    SettingsError
        It has none, or what names them leads nowhere.
    """
    import boto3  # noqa: PLC0415 (as below)
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415

    try:
        with reading_credentials():
            if boto3.session.Session().get_credentials() is not None:
                return
        reason = "there are none"
    except BotoCoreError as error:
        reason = f"they cannot be read ({type(error).__name__})"
    raise SettingsError(
        f"buckets of S3 are set, which need the worker's AWS credentials, but {reason}; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or leave the buckets out"
    )


def bucket_and_key(url: str) -> tuple[str, str]:
    bucket, key = _read(_S3_URL(url), "key", url)
    if _leads_out(key):
        raise SourceNotAllowed("The S3 URL has . or .. between slashes; name the object itself.")
    return bucket, key


def _bucket_and_prefix(url: str) -> tuple[str, str]:
    return _read(_S3_PREFIX(url), "prefix", url)


def _read(match: re.Match[str] | None, what: str, url: str) -> tuple[str, str]:
    """The bucket, and the key or prefix in it that ``match`` has found in the URL."""
    encoded = match is not None and match["encoded"] is not None
    name = object_name(match[what], encoded=encoded) if match else None
    if match is None or name is None:
        written = f"write s3{ENCODED}://bucket/{what} percent-encoded" if encoded else f"write s3://bucket/{what}"
        raise SourceNotAllowed(f"The S3 URL is malformed; {written}, without user name or password.")
    if reason := refusal_reason(url):
        raise SourceNotAllowed(reason)
    return match["bucket"], name


def _leads_out(key: str) -> bool:
    """Whether a server, or a proxy before it, may take the key for a path that leads out of the bucket."""
    return not {".", ".."}.isdisjoint(key.split("/"))


def _listed_object(bucket: str, key: str, size_bytes: int | None) -> ListedObject:
    unreadable = "its name has . or .. between slashes" if _leads_out(key) else ""
    return listed_object(f"s3://{bucket}/{key}", key, size_bytes, unreadable=unreadable)


def _client(settings: SourceSettings) -> Any:
    client = s3_client(
        settings.s3,
        Network.of(settings),
        connect_timeout_s=settings.connect_timeout_s,
        read_timeout_s=settings.idle_timeout_s,
    )
    make_answers(client, partial(_answer, settings.idle_timeout_s))
    return client


def _answer(idle_timeout_s: float, sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
    """An answer that keeps to the time of the calling thread's fetch: boto's time-out is of a single wait."""
    answer = http.client.HTTPResponse(sock, *args, **kwargs)
    timed(answer, sock, deadline_s=_asking.deadline_s, idle_timeout_s=idle_timeout_s)
    return answer


def _chunks(body: Any, source: str) -> Iterator[bytes]:
    with _translated(source):
        while chunk := body.read(_READ_BYTES):
            yield chunk


@contextmanager
def _translated(source: str) -> Iterator[None]:
    """boto's errors end here; their own text is left out because it may quote more than the address."""
    from botocore import exceptions as boto  # noqa: PLC0415

    try:
        with credential_trouble(source, "sources.s3", verb="read"):
            yield
    except boto.ClientError as error:
        raise _read_error(error.response, source) from error
    except (boto.IncompleteReadError, boto.ResponseStreamingError, boto.FlexibleChecksumError) as error:
        raise SourceTruncated(f"{source} did not arrive whole; it is fetched again from the start.") from error
    except boto.ParamValidationError as error:
        raise SourceNotAllowed(f"{source} is no name that S3 allows; write s3://bucket/key.") from error
    except (boto.ConnectionError, boto.HTTPClientError, HTTPError) as error:
        raise unreachable(error, source) from error
    except boto.BotoCoreError as error:
        raise SourceDenied(f"{source} cannot be asked for ({type(error).__name__}); {_CREDENTIALS}.") from error
    except (unreadable_answer(), ValueError) as error:
        close_what_failed(error)
        raise _no_s3(source, "an answer that cannot be read") from error


def _read_error(answer: Mapping[str, Any], source: str) -> CourierError:
    """What an error answer of S3 means for the job; the code says more than the status where both are there.

    Raises
    ------
    SourceUnauthorized, Doubt
        See `check_refusal`.
    """
    code, status = str(answer.get("Error", {}).get("Code", "")), _status(answer)
    if code in ARCHIVED:
        return SourceDenied(f"{source} {IN_ARCHIVE.format(code)}.")
    if 300 <= status < 400 and not _is_elsewhere(answer):
        return _no_s3(source, f"a redirect, status {status}")
    if 300 <= status < 400:
        return SourceDenied(f"{source} is in another region; set sources.s3.region.")
    check_refusal(code, status, source, of="sources.s3", verb="read", denied=SourceDenied)
    if status in (404, 410) or code.startswith("NoSuch"):
        return _gone(source, code, status)
    if 400 <= status < 500 and status not in (408, 429) and code not in _BUSY:
        return SourceDenied(f"{source} may not be read ({code or status}); {_CREDENTIALS}.")
    retry_after = str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return SourceUnreachable(
        f"{source} cannot be had at present (status {status}); it is tried again.",
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
    )


def _gone(source: str, code: str, status: int) -> CourierError:
    if not is_code(code):
        return _no_s3(source, f"status {status} without a code of S3's")
    what = "bucket" if code == "NoSuchBucket" else "object"
    return SourceNotFound(f"{source} is not there: the store has no such {what} ({code}); check bucket and key.")


def _no_s3(source: str, came: str) -> SourceUnreachable:
    return SourceUnreachable(f"{source} was answered by no S3 ({came}); check sources.s3.endpoint_url.")


def _is_elsewhere(answer: Mapping[str, Any]) -> bool:
    """Whether a redirect is S3's own: to the region of the bucket."""
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return "x-amz-bucket-region" in headers or answer.get("Error", {}).get("Code") == "PermanentRedirect"


def _status(answer: Mapping[str, Any]) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
