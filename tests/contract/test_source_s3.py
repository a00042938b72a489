"""Images in S3: moto for its answers, rclone for signatures and their expiry, and a server that breaks the rules."""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pytest

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTooLarge,
    SourceTruncated,
    SourceUnauthorized,
    SourceUnreachable,
)
from courier.settings import S3Settings, SourceSettings
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import HOST
from tests.servers.s3 import s3_client
from worker.storage.sources import Sources

KEY_ID, SECRET = "COURIERTESTKEY", "couriertestsecret"
BODY = b"0123456789abcdef" * 5000


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The worker's own, from the environment alone."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


def client(endpoint_url: str) -> Any:
    return s3_client(endpoint_url, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET)


def filled(endpoint_url: str) -> str:
    writer = client(endpoint_url)
    writer.create_bucket(Bucket="images")
    writer.create_bucket(Bucket="private")
    for bucket, key in (("images", "2024/a b.dcm"), ("private", "a.dcm")):
        writer.put_object(Bucket=bucket, Key=key, Body=BODY)
    writer.close()
    return endpoint_url


@pytest.fixture(scope="module")
def filled_moto(moto: str) -> str:
    return filled(moto)


@pytest.fixture(scope="module")
def filled_rclone(rclone: str) -> str:
    return filled(rclone)


@pytest.fixture(params=["filled_moto", "filled_rclone"])
def endpoint(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def sources(endpoint_url: str, **changes: Any) -> Sources:
    s3 = S3Settings(buckets=("images", "nothing-*"), endpoint_url=endpoint_url, region="us-east-1")
    return Sources(SourceSettings(allow_hosts=(f"{HOST}:*",), allow_private_networks=True, s3=s3, **changes))


def refused(fetching: Sources, url: str, kind: type[CourierError]) -> CourierError:
    with pytest.raises(kind) as caught:
        fetching.fetch(url)
    fetching.close()
    for secret in (SECRET, KEY_ID, "Signature="):
        assert secret not in str(caught.value)
    return caught.value


def test_an_object_is_fetched_with_the_digest_of_its_bytes(endpoint: str) -> None:
    with sources(endpoint).fetch("s3://images/2024/a b.dcm") as fetched:
        assert fetched.stream.read() == BODY
        assert fetched.size_bytes == len(BODY)
        assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()
        assert fetched.source == "s3://images/2024/a b.dcm"


def test_one_client_serves_all_threads(endpoint: str) -> None:
    fetching = sources(endpoint)

    def fetch(_: int) -> bool:
        with fetching.fetch("s3://images/2024/a b.dcm") as fetched:
            return fetched.stream.read() == BODY

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(32)))
    fetching.close()


@pytest.mark.parametrize("url", ["s3://images/nothing.dcm", "s3://nothing-here/a.dcm"])
def test_a_missing_key_or_bucket_is_not_found(endpoint: str, url: str) -> None:
    refused(sources(endpoint), url, SourceNotFound)


def test_a_bucket_that_is_not_listed_is_refused_though_the_worker_could_read_it(endpoint: str) -> None:
    error = refused(sources(endpoint), "s3://private/a.dcm", SourceNotAllowed)
    assert "sources.s3.buckets" in error.message


def test_an_object_larger_than_allowed_is_refused(endpoint: str) -> None:
    refused(sources(endpoint, max_bytes=1000), "s3://images/2024/a b.dcm", SourceTooLarge)


@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "UNKNOWN")])
def test_wrong_credentials_are_trouble_of_the_worker(
    filled_rclone: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    error = refused(sources(filled_rclone), "s3://images/2024/a b.dcm", SourceUnauthorized)
    assert "credentials of sources.s3" in error.message


def test_missing_credentials_are_told_with_the_advice_to_check_them(
    filled_moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = refused(sources(filled_moto), "s3://images/2024/a b.dcm", SourceUnauthorized)
    assert "NoCredentialsError; check" in error.message


def test_an_endpoint_that_is_down_is_unreachable() -> None:
    refused(sources(f"http://{HOST}:{parts.free_port()}"), "s3://images/a.dcm", SourceUnreachable)


def test_the_endpoint_comes_from_the_settings_and_never_from_the_environment(
    filled_moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, f"http://{HOST}:{parts.free_port()}")
    sources(filled_moto).fetch("s3://images/2024/a b.dcm").close()


def test_an_object_stored_as_gzip_is_unpacked(filled_moto: str) -> None:
    writer = client(filled_moto)
    writer.put_object(Bucket="images", Key="a.dcm.gz", Body=gzip.compress(BODY), ContentEncoding="gzip")
    writer.close()
    with sources(filled_moto).fetch("s3://images/a.dcm.gz") as fetched:
        assert fetched.stream.read() == BODY


def test_nothing_of_boto_is_loaded_before_the_first_such_url() -> None:
    code = (
        "import sys; from worker.storage.sources import Sources; from courier.settings import SourceSettings; "
        "Sources(SourceSettings()); sys.exit('boto3' in sys.modules or 'botocore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("key", ["order?{}.dcm", "a#b/order?x={}&y", "100%3F-{}", "order {}?+.dcm"])
def test_a_question_mark_and_a_hash_belong_to_the_key(endpoint: str, key: str) -> None:
    writer, fetching = client(endpoint), sources(endpoint)
    for number in (1, 2):
        writer.put_object(Bucket="images", Key=f"odd/{key.format(number)}", Body=f"image {number}".encode())
    writer.close()
    listed = [one.url for page in fetching.pages("s3://images/odd/") for one in page]
    for number in (1, 2):
        url = f"s3://images/odd/{key.format(number)}"
        assert url in listed
        with fetching.fetch(url) as fetched:
            assert (fetched.stream.read(), fetched.source) == (f"image {number}".encode(), url)
    missing = f"s3://images/odd/{key.format(3)}"
    with pytest.raises(SourceNotFound) as caught:
        fetching.fetch(missing)
    assert missing in caught.value.message
    fetching.close()


@pytest.mark.parametrize("name", ["bad\nname.dcm", "tab\t.dcm", "\x7f.dcm", "\u2028.dcm", "a.dcm?versionId=abc"])
def test_a_key_that_no_plain_url_can_have_is_listed_among_the_others_and_fetched(filled_rclone: str, name: str) -> None:
    writer, fetching = client(filled_rclone), sources(filled_rclone)
    folder = f"odd-{name.encode().hex()}"
    for key in ("good.dcm", name):
        writer.put_object(Bucket="images", Key=f"{folder}/{key}", Body=key.encode())
    writer.close()
    found = {one.url: one for page in fetching.pages(f"s3://images/{folder}/") for one in page}
    encoded = f"s3+encoded://images/{folder}/{quote(name)}"
    assert set(found) == {f"s3://images/{folder}/good.dcm", encoded}
    assert not any(one.skip_reason for one in found.values())
    with fetching.fetch(encoded) as fetched:
        assert (fetched.stream.read(), fetched.source) == (name.encode(), encoded)
    assert (
        encoded.replace("odd-", "even-") in refused(fetching, encoded.replace("odd-", "even-"), SourceNotFound).message
    )
    fetching.close()


def test_a_prefix_that_no_plain_url_can_have_is_listed(filled_rclone: str) -> None:
    writer, fetching = client(filled_rclone), sources(filled_rclone)
    writer.put_object(Bucket="images", Key="two\nlines/a.dcm", Body=b"a")
    writer.close()
    (page,) = fetching.pages("s3+encoded://images/two%0Alines/")
    assert [one.url for one in page] == ["s3+encoded://images/two%0Alines/a.dcm"]
    fetching.close()


def test_of_a_key_a_version_is_never_taken_for_the_newest(filled_moto: str) -> None:
    error = refused(sources(filled_moto), "s3://images/2024/a b.dcm?versionId=abc", SourceNotAllowed)
    assert "older version" in error.message


# --- a server that breaks the rules ---------------------------------------------------------------------------------


def test_a_body_shorter_than_announced_is_truncated(image_server: ImageServer) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: x\r\n\r\nabc")

    image_server.put("images/a.dcm", behave=short)
    refused(sources(image_server.base), "s3://images/a.dcm", SourceTruncated)


def test_a_body_whose_checksum_is_wrong_is_truncated(image_server: ImageServer) -> None:
    image_server.put("images/a.dcm", b"abc", headers={"x-amz-checksum-crc32": "AAAAAA=="})
    refused(sources(image_server.base), "s3://images/a.dcm", SourceTruncated)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "ExpiredToken", SourceUnauthorized),
        (403, "AccessDenied", SourceDenied),
        (403, "InvalidObjectState", SourceDenied),
        (404, "NoSuchKey", SourceNotFound),
        (429, "TooManyRequests", SourceUnreachable),
        (500, "InternalError", SourceUnreachable),
        (503, "SlowDown", SourceUnreachable),
    ],
)
def test_an_error_is_judged_after_one_attempt_and_retry_after_is_kept(
    image_server: ImageServer, status: int, code: str, kind: type[CourierError]
) -> None:
    body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
    image_server.put("images/a.dcm", body, status=status, headers={"Retry-After": "7"})
    error = refused(sources(image_server.base), "s3://images/a.dcm", kind)
    assert getattr(error, "retry_after_s", 7) == 7
    assert len(image_server.requests) == 1


@pytest.mark.parametrize("status", [200, 500])
def test_an_endpoint_that_is_no_s3_is_unreachable(image_server: ImageServer, status: int) -> None:
    headers = {"Last-Modified": "once upon a time"}
    image_server.put("images/a.dcm", b"<html>not <xml", status=status, headers=headers)
    refused(sources(image_server.base), "s3://images/a.dcm", SourceUnreachable)
    gc.collect()  # Python warns of a connection that is left open, which fails the test


def test_an_endpoint_that_does_not_say_how_long_an_object_is_may_end_it(image_server: ImageServer) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")

    image_server.put("images/a.dcm", behave=chunked)
    with sources(image_server.base).fetch("s3://images/a.dcm") as fetched:
        assert fetched.stream.read() == b"abc"


def test_an_endpoint_that_falls_silent_is_unreachable(image_server: ImageServer) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: x\r\n\r\nabc")
        handler.connection.recv(1)  # until the client has hung up

    image_server.put("images/a.dcm", behave=silent)
    refused(sources(image_server.base, idle_timeout_s=0.2), "s3://images/a.dcm", SourceUnreachable)


@pytest.mark.parametrize(
    ("head", "drop_of"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: x\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"HTTP/1.1 503 SlowDown\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    ],
    ids=["object", "a chunk's length", "head", "error"],
)
@pytest.mark.parametrize("url", ["s3://images/a.dcm", "s3://images/"])
def test_an_endpoint_that_drips_is_ended_by_the_total_time(
    image_server: ImageServer, url: str, head: bytes, drop_of: bytes
) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):  # the client has hung up
            handler.wfile.write(head)
            while True:
                time.sleep(0.03)
                handler.wfile.write(drop_of)

    image_server.put("images/a.dcm", behave=drip)
    image_server.put("images", behave=drip)
    source = sources(image_server.base, idle_timeout_s=0.4, total_timeout_s=0.5)
    started_at = time.monotonic()
    if url.endswith("/"):
        with pytest.raises(SourceUnreachable):
            list(source.pages(url))
    else:
        assert "total_timeout_s" in refused(source, url, SourceUnreachable).message
    assert 0.4 < time.monotonic() - started_at < 3


# --- presigned URLs, which are plain http ---------------------------------------------------------------------------


def presigned(endpoint_url: str, key: str = "2024/a b.dcm", *, expires_s: int = 60) -> str:
    signer = client(endpoint_url)
    url = signer.generate_presigned_url("get_object", Params={"Bucket": "images", "Key": key}, ExpiresIn=expires_s)
    signer.close()
    return str(url)


def test_a_presigned_url_is_fetched_and_shown_without_its_signature(endpoint: str) -> None:
    with sources(endpoint).fetch(presigned(endpoint)) as fetched:
        assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()
        assert fetched.source == f"{endpoint}/images/2024/a%20b.dcm"


def test_a_presigned_url_that_has_expired_is_denied(filled_rclone: str) -> None:
    refused(sources(filled_rclone), presigned(filled_rclone, expires_s=-10), SourceDenied)


def test_a_presigned_url_that_was_changed_is_denied(filled_rclone: str) -> None:
    url = presigned(filled_rclone)
    query = dict(parse_qsl(urlsplit(url).query)) | {"X-Amz-Signature": "0" * 64}
    refused(sources(filled_rclone), f"{url.partition('?')[0]}?{urlencode(query)}", SourceDenied)


def test_an_unsigned_url_is_denied_and_a_missing_object_is_not_found(filled_rclone: str) -> None:
    refused(sources(filled_rclone), f"{filled_rclone}/images/2024/a%20b.dcm", SourceDenied)
    refused(sources(filled_rclone), presigned(filled_rclone, "nothing.dcm"), SourceNotFound)


def test_a_prefix_is_listed_page_by_page_with_urls_that_fetch(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.storage.s3_source.PAGE_ENTRIES", 20)
    writer = client(endpoint)
    keys = [f"many/{number:04}.dcm" for number in range(25)] + ["many/a b/ü+&%.dcm", "many/DICOMDIR"]
    for key in keys:
        writer.put_object(Bucket="images", Key=key, Body=BODY[:10])
    writer.close()
    fetching = sources(endpoint)
    pages = list(fetching.pages("s3://images/many/"))
    assert len(pages) == 2
    found = {one.url: one for page in pages for one in page}
    assert set(found) == {f"s3://images/{key}" for key in keys}
    assert {one.size_bytes for one in found.values()} == {10}
    assert [one.url for one in found.values() if one.skip_reason] == ["s3://images/many/DICOMDIR"]
    fetching.fetch("s3://images/many/a b/ü+&%.dcm").close()
    assert "s3://images/2024/a b.dcm" in {one.url for page in fetching.pages("s3://images/") for one in page}
    for url, kind in (
        ("s3://images/nothing/", SourceNotFound),
        ("s3://nothing-here/", SourceNotFound),
        ("s3://private/", SourceNotAllowed),
        ("s3:///many/", SourceNotAllowed),
    ):
        with pytest.raises(kind):
            list(fetching.pages(url))
    fetching.close()
    with pytest.raises(SourceUnreachable):
        list(sources(f"http://{HOST}:{parts.free_port()}").pages("s3://images/"))
