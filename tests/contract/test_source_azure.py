"""Images in Azure's blob storage: Azurite, its signatures and their expiry, and a server that breaks the rules."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import pytest
from azure.storage.blob import (
    AccountSasPermissions,
    BlobSasPermissions,
    BlobServiceClient,
    ContentSettings,
    ResourceTypes,
    generate_account_sas,
    generate_blob_sas,
)

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
from courier.settings import AzureSettings, SourceSettings
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import AZURITE_ACCOUNT, AZURITE_KEY, HOST, AzuritePart
from worker.storage.sources import Sources

BODY = b"0123456789abcdef" * 50_000
NAME = "2024/a b%20ü+.dcm"
URL = f"az://images/{NAME}"
WRONG_KEY = "d3Jvbmc="


@pytest.fixture(scope="module")
def writer(azurite: AzuritePart) -> Iterator[BlobServiceClient]:
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        for container in ("images", "private"):
            service.create_container(container).upload_blob(NAME, BODY)
        yield service


@pytest.fixture
def sas(writer: BlobServiceClient) -> str:
    return account_sas()


def account_sas(*, expires_s: int = 60) -> str:
    return generate_account_sas(
        AZURITE_ACCOUNT,
        AZURITE_KEY,
        ResourceTypes(object=True, container=True),
        AccountSasPermissions(read=True, list=True),
        datetime.now(UTC) + timedelta(seconds=expires_s),
    )


def sources(url: str, monkeypatch: pytest.MonkeyPatch, *, key: str = AZURITE_KEY, **changes: Any) -> Sources:
    monkeypatch.setenv("AZURE_SECRET", key)
    azure = AzureSettings(containers=("images", "nothing-*"), account_url=url, account_key_env="AZURE_SECRET")
    return Sources(SourceSettings(azure=azure, **changes))


def refused(fetching: Sources, url: str, kind: type[CourierError]) -> CourierError:
    with pytest.raises(kind) as caught:
        fetching.fetch(url)
    fetching.close()
    for secret in (AZURITE_KEY, WRONG_KEY, "sig=", "http://"):
        assert secret not in str(caught.value)
    return caught.value


def test_a_blob_is_fetched_with_the_digest_of_its_bytes(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sources(azurite.url, monkeypatch).fetch(URL) as fetched:
        assert fetched.stream.read() == BODY
        assert fetched.size_bytes == len(BODY)
        assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()
        assert fetched.source == URL


def test_every_kind_of_credential_reads(
    azurite: AzuritePart, sas: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    monkeypatch.setenv("AZURE_SECRET", azurite.connection_string)
    for content, settings in (
        ("", {"connection_string_env": "AZURE_SECRET"}),
        (azurite.connection_string, {"connection_string_file": file}),
        (f"BlobEndpoint={azurite.url};SharedAccessSignature={sas};", {"connection_string_file": file}),
        (AZURITE_KEY, {"account_url": azurite.url, "account_key_file": file}),
        (sas, {"account_url": azurite.url, "sas_token_file": file}),
        (f"?{sas}\n", {"account_url": f"{azurite.url}/", "sas_token_file": file}),
    ):
        file.write_text(content, encoding="utf-8")
        fetching = Sources(SourceSettings(azure=AzureSettings.model_validate({"containers": ["*"], **settings})))
        with fetching.fetch(URL) as fetched:
            assert fetched.size_bytes == len(BODY)
        fetching.close()


def test_a_public_container_needs_no_credential_and_a_private_one_does(
    azurite: AzuritePart, writer: BlobServiceClient
) -> None:
    writer.create_container("public", public_access="blob").upload_blob("a.dcm", BODY)
    fetching = Sources(SourceSettings(azure=AzureSettings(containers=("*",), account_url=azurite.url)))
    fetching.fetch("az://public/a.dcm").close()
    with pytest.raises((SourceUnauthorized, SourceNotFound)):
        fetching.fetch(URL)
    fetching.close()


def test_a_token_that_is_renewed_in_its_file_is_used_without_a_restart(
    azurite: AzuritePart, sas: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(account_sas(expires_s=-60), encoding="utf-8")
    azure = AzureSettings(containers=("images",), account_url=azurite.url, sas_token_file=file)
    fetching = Sources(SourceSettings(azure=azure))
    with pytest.raises(SourceUnauthorized, match=r"sources\.azure"):
        fetching.fetch(URL)
    file.write_text(sas, encoding="utf-8")
    fetching.fetch(URL).close()
    fetching.close()


def test_one_account_serves_all_threads(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching = sources(azurite.url, monkeypatch)

    def fetch(_: int) -> bool:
        with fetching.fetch(URL) as fetched:
            return fetched.stream.read() == BODY

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(32)))
    fetching.close()


@pytest.mark.parametrize("url", ["az://images/nothing.dcm", "az://nothing-here/a.dcm"])
def test_a_missing_blob_or_container_is_not_found(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    assert url in refused(sources(azurite.url, monkeypatch), url, SourceNotFound).message


def test_a_container_that_is_not_listed_is_refused_though_the_worker_could_read_it(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(sources(azurite.url, monkeypatch), f"az://private/{NAME}", SourceNotAllowed)
    assert "sources.azure.containers" in error.message
    refused(Sources(SourceSettings()), URL, SourceNotAllowed)


@pytest.mark.parametrize(
    "url",
    [
        "az:",
        "az://images",
        "az://images/",
        "az:///a.dcm",
        "az://images/../private/a.dcm",
        "az://images/x/./a.dcm",
        "az://images/x\\..\\..\\private/a.dcm",
        "az://images/a.dcm?sig=secret",
        "az://images/a\n.dcm",
        "az://Images/a.dcm",
        "az://me:secret@images/a.dcm",
        "az://images:80/a.dcm",
    ],
)
def test_a_url_that_is_none_or_would_lead_out_of_its_container_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(sources("http://localhost/none", monkeypatch), url, SourceNotAllowed)
    assert "secret" not in error.message


def test_a_blob_larger_than_allowed_is_refused(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(sources(azurite.url, monkeypatch, max_bytes=1000), URL, SourceTooLarge)


@pytest.mark.parametrize("key", [WRONG_KEY, "no base64!"])
def test_a_wrong_key_is_told_with_the_advice_to_check_it(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    assert "azure" in refused(sources(azurite.url, monkeypatch, key=key), URL, SourceUnauthorized).message


def test_a_credential_that_is_missing_or_malformed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    for content, settings, sentence in (
        (None, {"connection_string_env": "NOT_SET"}, "NOT_SET"),
        (None, {"connection_string_file": file}, "cannot be read"),
        ("hush", {"connection_string_file": file}, "malformed"),
        ("AccountKey=hush", {"connection_string_file": file}, "malformed"),
    ):
        if content:
            file.write_text(content, encoding="utf-8")
        fetching = Sources(SourceSettings(azure=AzureSettings.model_validate({"containers": ["*"], **settings})))
        error = refused(fetching, URL, SourceUnauthorized)
        assert sentence in error.message
        assert "hush" not in error.message


def test_an_endpoint_that_is_down_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(sources(f"http://{HOST}:{parts.free_port()}/x", monkeypatch), URL, SourceUnreachable)
    assert URL in error.message


def test_a_blob_stored_as_gzip_is_unpacked(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ContentSettings(content_encoding="gzip")
    writer.get_blob_client("images", "a.dcm.gz").upload_blob(gzip.compress(BODY), content_settings=settings)
    with sources(azurite.url, monkeypatch).fetch("az://images/a.dcm.gz") as fetched:
        assert fetched.stream.read() == BODY


def test_nothing_of_azure_is_loaded_before_the_first_such_url() -> None:
    code = (
        "import sys; from worker.storage.sources import Sources; from courier.settings import SourceSettings; "
        "Sources(SourceSettings()); print(*sorted(name for name in sys.modules if name.startswith('azure.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # Looking whether the SDK is installed loads the package that it is in, which is empty.
    assert set(loaded.split()) <= {"azure.storage"}


@pytest.mark.parametrize("name", ["order?{}.dcm", "a#b/order?x={}&y", "100%3F-{}"])
def test_a_question_mark_and_a_hash_belong_to_the_name(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fetching = sources(azurite.url, monkeypatch)
    for number in (1, 2):
        blob = writer.get_blob_client("images", f"odd/{name.format(number)}")
        blob.upload_blob(f"image {number}".encode(), overwrite=True)
    listed = [one.url for page in fetching.pages("az://images/odd/") for one in page if not one.skip_reason]
    for number in (1, 2):
        url = f"az://images/odd/{name.format(number)}"
        assert url in listed
        with fetching.fetch(url) as fetched:
            assert (fetched.stream.read(), fetched.source) == (f"image {number}".encode(), url)
    missing = f"az://images/odd/{name.format(3)}"
    assert missing in refused(fetching, missing, SourceNotFound).message


@pytest.mark.parametrize("name", ["bad\nname.dcm", "\x7f.dcm", "\u2028.dcm", "a.dcm?snapshot=x", "a?sig=1"])
def test_a_name_that_no_plain_url_can_have_is_listed_among_the_others_and_fetched(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fetching = sources(azurite.url, monkeypatch)
    folder = f"odd-{name.encode().hex()}"
    for blob in ("good.dcm", name):
        writer.get_blob_client("images", f"{folder}/{blob}").upload_blob(blob.encode(), overwrite=True)
    found = {one.url: one for page in fetching.pages(f"az://images/{folder}/") for one in page}
    encoded = f"az+encoded://images/{folder}/{quote(name)}"
    assert set(found) == {f"az://images/{folder}/good.dcm", encoded}
    assert not any(one.skip_reason for one in found.values())
    with fetching.fetch(encoded) as fetched:
        assert (fetched.stream.read(), fetched.source) == (name.encode(), encoded)
    missing = f"{encoded}%0A"
    assert missing in refused(fetching, missing, SourceNotFound).message


def test_a_backslash_in_a_name_is_sent_as_it_is_for_azure_to_say_what_it_means(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.get_blob_client("images", "back\\slash.dcm").upload_blob(b"one", overwrite=True)
    fetching, url = sources(azurite.url, monkeypatch), "az+encoded://images/back%5Cslash.dcm"
    with fetching.fetch(url) as fetched:
        assert (fetched.stream.read(), fetched.source) == (b"one", url)
    (page,) = fetching.pages("az://images/back/")  # Azurite, as Azure, stores it with a slash
    assert [one.url for one in page] == ["az://images/back/slash.dcm"]


@pytest.mark.parametrize("parameter", ["versionid", "snapshot"])
def test_a_version_or_a_snapshot_is_never_taken_for_the_newest(
    azurite: AzuritePart, monkeypatch: pytest.MonkeyPatch, parameter: str
) -> None:
    fetching = sources(azurite.url, monkeypatch)
    assert "older version" in refused(fetching, f"{URL}?{parameter}=2026-01-01", SourceNotAllowed).message


# --- a server that breaks the rules ---------------------------------------------------------------------------------


def test_a_body_shorter_than_announced_is_truncated_after_one_attempt(
    image_server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: x\r\n\r\nabc")

    image_server.put("images/a.dcm", behave=short)
    refused(sources(image_server.base, monkeypatch), "az://images/a.dcm", SourceTruncated)
    assert len(image_server.requests) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, SourceUnreachable),
        (401, SourceUnauthorized),
        (403, SourceDenied),
        (404, SourceNotFound),
        (409, SourceDenied),
        (429, SourceUnreachable),
        (500, SourceUnreachable),
        (503, SourceUnreachable),
    ],
)
def test_an_error_is_judged_after_one_attempt_and_retry_after_is_kept(
    image_server: ImageServer, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[CourierError]
) -> None:
    headers = {"Retry-After": "7", "Location": image_server.put("elsewhere", b"x")}
    image_server.put("images/a.dcm", b"", status=status, headers=headers)
    error = refused(sources(image_server.base, monkeypatch), "az://images/a.dcm", kind)
    if status in (429, 500, 503):
        assert getattr(error, "retry_after_s", None) == 7
    assert len(image_server.requests) == 1


def test_an_endpoint_that_falls_silent_is_unreachable(
    image_server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
        handler.connection.recv(1)  # until the client has hung up

    image_server.put("images/a.dcm", behave=silent)
    refused(sources(image_server.base, monkeypatch, idle_timeout_s=0.2), "az://images/a.dcm", SourceUnreachable)


# --- https URLs with a shared access signature (SAS), which are plain http ------------------------------------------


def signed(writer: BlobServiceClient, name: str = NAME, *, expires_s: int = 60) -> str:
    token = generate_blob_sas(
        AZURITE_ACCOUNT,
        "images",
        name,
        account_key=AZURITE_KEY,
        permission=BlobSasPermissions(read=True),
        expiry=datetime.now(UTC) + timedelta(seconds=expires_s),
    )
    return f"{writer.get_blob_client('images', name).url}?{token}"


def over_http() -> Sources:
    return Sources(SourceSettings(allow_hosts=(f"{HOST}:*",), allow_private_networks=True))


def test_a_signed_url_is_fetched_and_shown_without_its_signature(writer: BlobServiceClient) -> None:
    url = signed(writer)
    fetching = over_http()
    with fetching.fetch(url) as fetched:
        assert fetched.sha256 == hashlib.sha256(BODY).hexdigest()
        assert fetched.source == url.partition("?")[0]
    fetching.close()


def test_a_signed_url_that_expired_or_was_changed_or_is_not_signed_is_denied(writer: BlobServiceClient) -> None:
    url, _, query = signed(writer).partition("?")
    changed = urlencode(dict(parse_qsl(query)) | {"sig": "AAAA"})
    other = signed(writer, "other.dcm").partition("?")[2]
    for wrong in (signed(writer, expires_s=-60), f"{url}?{changed}", f"{url}?{other}", url):
        with pytest.raises(SourceDenied) as caught:
            over_http().fetch(wrong)
        assert "sig" not in str(caught.value).replace("signature", "")


def test_a_missing_blob_behind_a_signed_url_is_not_found(writer: BlobServiceClient) -> None:
    with pytest.raises(SourceNotFound):
        over_http().fetch(signed(writer, "nothing.dcm"))


def test_a_prefix_is_listed_page_by_page_with_urls_that_fetch(
    azurite: AzuritePart, writer: BlobServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = writer.get_container_client("images")
    names = [f"many/{number}.dcm" for number in range(12)] + ["many/a b/ü+%20.dcm", "many/DICOMDIR"]
    for name in names:
        container.upload_blob(name, b"0123456789")
    monkeypatch.setattr("worker.storage.azure_source.PAGE_ENTRIES", 5)
    fetching = sources(azurite.url, monkeypatch)
    pages = list(fetching.pages("az://images/many/"))
    assert [len(page) for page in pages] == [5, 5, 4]
    found = {one.url: one for page in pages for one in page}
    assert set(found) == {f"az://images/{name}" for name in names}
    assert {one.size_bytes for one in found.values()} == {10}
    assert [one.url for one in found.values() if one.skip_reason] == ["az://images/many/DICOMDIR"]
    fetching.fetch("az://images/many/a b/ü+%20.dcm").close()
    assert URL in {one.url for page in fetching.pages("az://images/") for one in page}
    for url, kind in (
        ("az://images/nothing/", SourceNotFound),
        ("az://nothing-here/", SourceNotFound),
        ("az://private/", SourceNotAllowed),
        ("az://images/a?b/", SourceNotFound),
        ("az://images/a?sv=1&sig=b/", SourceNotAllowed),
    ):
        with pytest.raises(kind):
            list(fetching.pages(url))
    fetching.close()
    nowhere = f"http://{HOST}:{parts.free_port()}/{AZURITE_ACCOUNT}"
    for url, key, kind in ((azurite.url, WRONG_KEY, SourceUnauthorized), (nowhere, AZURITE_KEY, SourceUnreachable)):
        broken = sources(url, monkeypatch, key=key)
        with pytest.raises(kind) as caught:
            list(broken.pages("az://images/"))
        assert AZURITE_KEY not in str(caught.value)
        broken.close()
