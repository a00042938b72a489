"""A worker without the SDKs of S3 and Azure: URLs and settings that need one are refused in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from celery import Celery

from courier import extras, signing
from courier.errors import CourierError, InvalidRequest, SourceNotAllowed
from courier.settings import DownloadSettings, ServerSettings, SettingsError, SigningSettings, SourceSettings
from worker.pacs.credentials import credentials
from worker.storage.destinations import Destinations
from worker.storage.sources import Sources

S3 = "boto3 is not installed; run pip install 'pacs-courier[s3]'."
BLOBS = "azure-storage-blob is not installed; run pip install 'pacs-courier[azure]'."
ACCOUNT = {"containers": ["images"], "account_url": "https://account.blob.core.windows.net"}
BOTH = {"s3": {"buckets": ["images"]}, "azure": ACCOUNT}
REFUSALS = [
    ("s3://images/1.dcm", f"This worker reads no s3:// URLs: {S3}"),
    ("S3://images/1.dcm", f"This worker reads no s3:// URLs: {S3}"),
    ("s3+encoded://images/a%20b.dcm", f"This worker reads no s3+encoded:// URLs: {S3}"),
    ("s3://another/archive.zip#entry=1.dcm", f"This worker reads no s3:// URLs: {S3}"),
    ("az://images/1.dcm", f"This worker reads no az:// URLs: {BLOBS}"),
    ("az+encoded://images/a%20b.dcm", f"This worker reads no az+encoded:// URLs: {BLOBS}"),
]


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes modules ones that are not installed."""

    def hidden(*modules: str) -> None:
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)

    return hidden


@pytest.fixture
def bare(hide: Callable[..., None]) -> None:
    hide("boto3", "botocore", "azure", "azure.core", "azure.identity", "azure.storage", "azure.storage.blob")


def refused(action: Callable[[], object]) -> CourierError:
    with pytest.raises(CourierError) as caught:
        action()
    return caught.value


def listed(pages: Iterable[object]) -> Callable[[], object]:
    return lambda: list(pages)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("settings", [{}, BOTH], ids=["no store is set", "both are set"])
@pytest.mark.parametrize(("url", "sentence"), REFUSALS)
def test_an_image_in_a_store_whose_sdk_is_missing_is_refused(settings, url, sentence):
    sources = Sources(SourceSettings.model_validate(settings))
    for error in (refused(lambda: sources.fetch(url)), refused(lambda: sources.try_reading(url.partition("#")[0]))):
        assert (type(error), error.message) == (SourceNotAllowed, sentence)
    sources.close()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s3://images/monday/", f"This worker reads no s3:// URLs: {S3}"),
        ("az://images/", f"This worker reads no az:// URLs: {BLOBS}"),
        ("az://images/monday.zip", f"This worker reads no az:// URLs: {BLOBS}"),
    ],
)
def test_a_prefix_and_an_archive_there_are_not_listed_either(url, sentence):
    sources = Sources(SourceSettings.model_validate(BOTH))
    error = refused(listed(sources.pages(url)))
    assert (type(error), error.message) == (SourceNotAllowed, sentence)
    if url.endswith("/"):
        assert refused(lambda: sources.first_listed(url)).message == sentence
    sources.close()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s3://images/1.zip", f"This worker writes to no s3:// URLs: {S3}"),
        ("az://images/1.zip", f"This worker writes to no az:// URLs: {BLOBS}"),
        ("AZ://another/1.zip", f"This worker writes to no az:// URLs: {BLOBS}"),
    ],
)
def test_nothing_is_written_to_a_store_whose_sdk_is_missing(url, sentence):
    destinations = Destinations(DownloadSettings.model_validate(BOTH))
    for action in (destinations.archive, destinations.files, destinations.probe):
        error = refused(lambda action=action: action(url))
        assert (type(error), error.message) == (InvalidRequest, sentence)
        assert error.details == {"field": "destination", "reason": "not_allowed"}


@pytest.mark.usefixtures("bare")
def test_files_are_read_and_written_without_either(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"an image")
    sources = Sources(SourceSettings.model_validate({"folders": [tmp_path]}))
    fetched = sources.fetch(f"file://{tmp_path}/1.dcm")
    assert fetched.size_bytes == 8
    fetched.close()
    assert [one.url for page in sources.pages(f"file://{tmp_path}/") for one in page] == [f"file://{tmp_path}/1.dcm"]
    sources.close()
    destinations = Destinations(DownloadSettings.model_validate({"folders": [tmp_path]}))
    assert destinations.archive(f"file://{tmp_path}/2.zip").read_fingerprint() is None


def test_one_sdk_alone_is_enough_for_its_own_store(hide):
    hide("azure.storage.blob")
    sources = Sources(SourceSettings.model_validate({}))
    assert "add it to sources.s3.buckets" in refused(lambda: sources.fetch("s3://images/1.dcm")).message
    assert refused(lambda: sources.fetch("az://images/1.dcm")).message.endswith(BLOBS)
    assert extras.AZURE_IDENTITY.is_installed
    sources.close()


IDENTITY = {"type": "azure_identity", "scope": "https://dicom.healthcareapis.azure.com/.default"}
NO_IDENTITY = (
    "setting servers.cloud.auth.type: azure_identity cannot be used: azure-identity is not installed; "
    "run pip install 'pacs-courier[azure]'"
)


@pytest.mark.parametrize("missing", [("azure.identity",), ("azure", "azure.core", "azure.identity")])
def test_a_server_with_an_identity_of_azure_needs_the_extra(hide, missing):
    server = ServerSettings.model_validate(
        {"name": "cloud", "type": "dicomweb", "url": "https://dicom.example.org/v2", "auth": IDENTITY}
    )
    hide(*missing)
    with pytest.raises(SettingsError) as caught:
        credentials(server)
    assert str(caught.value) == NO_IDENTITY


def test_a_program_that_signs_without_cryptography_says_what_to_install(hide, tmp_path):
    hide("cryptography")
    settings = SigningSettings.model_validate(
        {"key_file": tmp_path / "key", "certificate_file": tmp_path / "crt", "trusted_folder": tmp_path}
    )
    with pytest.raises(SettingsError) as caught:
        signing.install(Celery("signs", set_as_current=False), settings)
    sentence = "cryptography is not installed; run pip install 'pacs-courier[signing]'"
    assert str(caught.value) == f"setting queue.signing cannot be followed: {sentence}"
