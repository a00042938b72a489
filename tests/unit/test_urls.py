"""What names an object in a URL and what is a credential: in the shown form, in sentences, in comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from courier.errors import InvalidRequest, SourceNotAllowed
from courier.ledger.jobs import _order_digest
from courier.redaction import redact_job, redact_url, without_queries
from courier.settings import AzureSettings, DownloadSettings, S3Settings, SourceSettings
from courier.urls import object_url
from producer.inputs import image_url, is_source
from worker.storage.azure import container_and_blob
from worker.storage.destinations import Destinations
from worker.storage.listing import listed_object
from worker.storage.s3_source import bucket_and_key
from worker.storage.sources import Sources
from worker.storage.zip_source import is_archive

#: Each names an object to its last sign.
OBJECTS = (
    "s3://imgs/order?1.dcm",
    "s3://imgs/order#1.dcm",
    "S3://imgs/day?1/order#2?x=1&y=2.dcm",
    "s3://imgs/100%3F.dcm",
    "s3://imgs/sig=1.dcm",
    "s3://imgs/versionId=1?a.dcm",
    "s3://imgs/a?versionId=1/b.dcm",
    "s3+encoded://imgs/a%0Ab%3Fx%3D1%23.dcm",
    "az+encoded://imgs/a%5Cb%E2%80%A8.dcm",
    "zip+s3+encoded://imgs/all%7F.zip!/order?1.dcm",
    "az://imgs/order?1.dcm",
    "az://imgs/order#1.dcm",
    "AZ://imgs/day#1/a?b=c.dcm",
    "file:///in/order?1.dcm",
    "file:///in/order#1.dcm",
    "file:/in/order%3F1.dcm",
    "zip+s3://imgs/all?1.zip!/order?1.dcm",
    "zip+az://imgs/all#1.zip!/order#1.dcm",
    "zip+file:///in/all%3F1.zip!/order?1.dcm",
    "zip+https://host/all.zip!/order?1.dcm",
    "zip+https://host/all.zip!/order%3Fid%3D1.dcm",
)
SIGNED = (
    "az://imgs/a.dcm?sv=2024-11-04&se=2099-01-01T00%3A00Z&sr=b&sp=r&sig=s3cr3t%2Fx",
    "az://imgs/a?b.dcm?sig=s3cr3t/x",
    "AZ://imgs/prefix?SIG=s3cr3t/",
    "s3://imgs/a.dcm?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=s3cr3t/1/s3&X-Amz-Signature=s3cr3t",
    "s3://imgs/a.dcm?AWSAccessKeyId=s3cr3t&Signature=s3cr3t&Expires=1",
    "s3://imgs/a.dcm?versionId=1&x-amz-security-token=s3cr3t",
)
VERSIONED = (
    "s3://imgs/a.dcm?versionId=abc",
    "s3://imgs/a?b.dcm?x=1&VersionId=abc",
    "az://imgs/a.dcm?versionid=2026-01-01T00:00:00.0000000Z",
    "az://imgs/a.dcm?snapshot=2026-01-01T00:00:00.0000000Z",
)


@pytest.mark.parametrize("url", OBJECTS)
def test_an_object_is_named_whole_wherever_its_url_is_shown(url: str) -> None:
    assert redact_url(url) == url
    for sentence in (f"{url} is not there; check the URL.", f"Fetched {url}", f"items [{url!r}, 'https://h/a?sig=x']"):
        assert url in without_queries(sentence)
        assert "sig=x" not in without_queries(sentence)
    assert json.loads(redact_job({"image_url": url}))["image_url"] == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/a.dcm?sig=s3cr3t#s3cr3t", "https://h/a.dcm"),
        ("zip+https://h/all.zip?sig=s3cr3t!/1.dcm", "zip+https://h/all.zip!/1.dcm"),
        ("zip+https://u:s3cr3t@h/all.zip?sig=s3cr3t!/a/1?x.dcm", "zip+https://h/all.zip!/a/1?x.dcm"),
        ("zip+https://h/all.zip!/1.dcm?sig=s3cr3t", "zip+https://h/all.zip!/1.dcm"),
        ("zip+https://h/all.zip?sig=s3cr3t", "zip+https://h/all.zip"),
        ("zip+az://imgs/all.zip?sig=s3cr3t!/1.dcm", "zip+az://imgs/all.zip"),
        ("s3://u:s3cr3t@imgs/order?1.dcm", "s3://imgs/order?1.dcm"),
        ("s3://imgs?s3cr3t/order.dcm", "s3://imgs"),
        ("file://u:s3cr3t@localhost/a?1.dcm", "file://localhost/a?1.dcm"),
        ("ftp://h/a?s3cr3t", "ftp://h/a"),
        ("xs3://imgs/a?s3cr3t", "xs3://imgs/a"),
    ],
)
def test_what_may_be_a_credential_is_cut_and_nothing_else(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert "s3cr3t" not in without_queries(f"Of {url} nothing came.")
    assert "s3cr3t" not in redact_job({"image_url": url})


def test_of_what_only_resembles_an_objects_url_nothing_is_shown_that_may_be_a_password() -> None:
    assert redact_url("s3://u:s3cr3t/x@imgs/order?1.dcm") == "s3://…"
    assert redact_url("zip+s3://u:s3cr3t/x@imgs/all.zip!/1.dcm") == "zip+s3://…"
    assert redact_url("file:a?s3cr3t") == "file:a"


def test_a_signed_url_beside_an_object_in_one_word_is_cut_in_a_line_all_the_same() -> None:
    assert without_queries("s3://b/a?1,https://h/x?sig=s3cr3t") == "s3://b/a?1,https://h/x"
    assert without_queries("zip+https://h/a.zip!/order?1.dcm came") == "zip+https://h/a.zip!/order?1.dcm came"


def test_two_objects_are_two_orders_and_a_url_that_is_signed_anew_is_one() -> None:
    def digest(url: str, **more: object) -> str:
        return _order_digest("pacs.upload", {"image_url": url, "idempotency_key": "order-7", **more})

    assert len({digest(url) for url in OBJECTS}) == len(OBJECTS)
    for one, two in (
        ("s3://imgs/order?1.dcm", "s3://imgs/order?2.dcm"),
        ("az://imgs/order#1.dcm", "az://imgs/order#2.dcm"),
        ("file:///in/a%3F1.dcm", "file:///in/a%3F2.dcm"),
        ("zip+https://h/all.zip?sig=x!/1.dcm", "zip+https://h/all.zip?sig=x!/2.dcm"),
        ("zip+https://h/all.zip!/a?id=1.dcm", "zip+https://h/all.zip!/a?id=2.dcm"),
        ("s3://imgs/a://b@c", "s3://imgs/a://d@c"),
    ):
        assert digest(one) != digest(two)
    for one, two in (
        ("https://h/a.dcm?sig=1", "https://h/a.dcm?sig=2"),
        ("https://h/a b.dcm?sig=1", "https://h/a b.dcm?sig=2"),
        ("zip+https://h/all.zip?sig=1!/1.dcm", "zip+https://h/all.zip?sig=2!/1.dcm"),
    ):
        assert digest(one) == digest(two)


@pytest.mark.parametrize("url", SIGNED)
def test_a_signature_at_an_objects_url_is_shown_nowhere_and_refused_in_words(url: str) -> None:
    assert "s3cr3t" not in redact_url(url) + without_queries(f"see {url}.") + redact_job({"destination": url})
    for sentence in refusals(url):
        assert "no signature" in sentence
        assert "s3cr3t" not in sentence


@pytest.mark.parametrize("url", VERSIONED)
def test_a_version_of_an_object_is_refused_in_words_and_never_taken_for_the_newest(url: str) -> None:
    for sentence in refusals(url):
        assert "older version" in sentence
    found = listed_object(
        url, url
    )  # a name that only looks so, in a bucket or container: the encoded form is that object
    assert (found.url, found.skip_reason) == (object_url(url), "")
    assert found.url.partition("://")[0] in ("s3+encoded", "az+encoded")
    assert unquote(found.url.partition("://")[2]) == url.partition("://")[2]


def refusals(url: str) -> list[str]:
    """What a source and a destination that may be used say of ``url``."""
    s3, azure = S3Settings(buckets=("*",)), AzureSettings(containers=("*",), account_url="https://account.example")
    with pytest.raises(SourceNotAllowed) as source:
        Sources(SourceSettings(s3=s3, azure=azure)).fetch(url)
    with pytest.raises(InvalidRequest) as destination:
        Destinations(DownloadSettings(s3=s3, azure=azure)).archive(url)
    assert destination.value.details["reason"] == "not_allowed"
    return [source.value.message, destination.value.message]


@pytest.mark.parametrize("name", ["a?b#c.zip", "a%3Fb%23c.zip", "a?b%23c.zip"])
def test_a_question_mark_and_a_hash_belong_to_the_name_of_a_file_destination(tmp_path: Path, name: str) -> None:
    destination = Destinations(DownloadSettings(folders=(tmp_path,))).archive(f"file://{tmp_path}/{name}")
    assert destination.shown == f"file://{tmp_path}/a%3Fb%23c.zip"


@pytest.mark.parametrize(
    ("url", "holds"),
    [
        ("s3://imgs/order#1.zip", True),
        ("az://imgs/order?1.zip", True),
        ("s3://imgs/all.zip?1", False),
        ("https://h/all.zip?1", True),
        ("https://h/a?1.zip", False),
    ],
)
def test_an_archive_is_told_by_the_end_of_its_whole_name(url: str, holds: bool) -> None:
    assert (is_archive(url), is_source(url)) == (holds, holds)


#: Names that no plain URL can have, or that a plain URL is refused for; and some that it can.
NAMES = (
    "p/bad\nname.dcm",
    "p/bad\r\n\tname.dcm",
    "p/\u2028\u2029\x85.dcm",
    "p/\x7f.dcm",
    "p/a.dcm?versionId=abc",
    "p/a.dcm?snapshot=abc",
    "p/a.dcm?sig=1#x",
    "p/back\\slash.dcm",
    "p/100%3F.dcm",
    "p/100%.dcm",
    "p/+ é&!@;=.dcm",
    "/p//a.dcm",
    " a.dcm ",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_every_name_that_a_store_lists_has_a_url_that_names_it_alone(scheme: str, name: str) -> None:
    found = listed_object(f"{scheme}://imgs/{name}", name, 5)
    assert (found.skip_reason, found.size_bytes) == ("", 5)
    read = bucket_and_key if scheme == "s3" else container_and_blob
    assert read(found.url) == ("imgs", name)
    assert image_url(found.url) == found.url, "so a plan file and a list may hold it"
    assert redact_url(found.url) == found.url
    assert len(found.url.splitlines()) == 1
    if not found.url.startswith(f"{scheme}+"):
        assert found.url == f"{scheme}://imgs/{name}", "a name that a plain URL can have is written as before"


def test_a_plain_url_is_never_decoded_and_an_encoded_one_always_is() -> None:
    assert bucket_and_key("s3://imgs/a%3Fb") == ("imgs", "a%3Fb")
    assert bucket_and_key("s3+encoded://imgs/a%3Fb") == ("imgs", "a?b")
    assert bucket_and_key("S3+Encoded://imgs/a%253Fb") == ("imgs", "a%3Fb")
    assert container_and_blob("az://imgs/a%5Cb") == ("imgs", "a%5Cb")
    assert container_and_blob("az+encoded://imgs/a%5cb") == ("imgs", "a\\b")
    assert is_source("s3+encoded://imgs/a%0A/")
    assert is_source("s3+encoded://imgs/a%0A.zip")


@pytest.mark.parametrize(
    "name", ["a?b", "a#b", "100%.dcm", "%zz", "%FF.dcm", "%ED%A0%80", "a/%2E%2E/b", "a/%2e/b", "", "a?versionId=1"]
)
@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_what_is_not_percent_encoded_is_refused_and_not_guessed(scheme: str, name: str) -> None:
    s3, azure = S3Settings(buckets=("*",)), AzureSettings(containers=("*",), account_url="https://account.example")
    with pytest.raises(SourceNotAllowed):
        Sources(SourceSettings(s3=s3, azure=azure)).fetch(f"{scheme}+encoded://imgs/{name}")


def test_a_backslash_leads_out_of_no_container() -> None:
    assert container_and_blob("az+encoded://imgs/a%5C..%5C..%5Cb") is None


def test_an_encoded_name_is_in_no_bucket_that_the_settings_do_not_name() -> None:
    with pytest.raises(SourceNotAllowed, match="not on the list"):
        Sources(SourceSettings(s3=S3Settings(buckets=("imgs",)))).fetch("s3+encoded://other/a%0A")
