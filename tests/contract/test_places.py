"""The places of sources and downloads, tried by a worker: folders, S3 (one that checks signatures too) and Azurite."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from azure.storage.blob import AccountSasPermissions, BlobServiceClient, ResourceTypes, generate_account_sas

from courier.ledger.jobs import Ledger
from courier.results import PlaceEntry
from courier.settings import AzureSettings, DownloadSettings, S3Settings, Settings, SourceSettings
from sandbox import processes as parts
from sandbox.processes import AZURITE_ACCOUNT, AZURITE_KEY, AzuritePart
from sandbox.synthetic import new_uid
from tests.contract.conftest import S3_KEY_ID, S3_SECRET
from tests.servers.s3 import s3_client
from worker.jobs import places
from worker.jobs.places import tried_places
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.storage.destinations import Destinations
from worker.storage.sources import Sources
from worker.storage.study_marks import PROBE


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": S3_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AZURE_SECRET": AZURITE_KEY,
    }.items():
        monkeypatch.setenv(name, value)


Tried = Callable[..., list[PlaceEntry]]


@pytest.fixture
def tried() -> Iterator[Tried]:
    """What a worker with these settings finds."""
    opened: list[Sources] = []

    def find(
        sources: dict[str, Any] | None = None, downloads: dict[str, Any] | None = None, *, wait_s: float = 30
    ) -> list[PlaceEntry]:
        settings = Settings(sources=SourceSettings(**sources or {}), downloads=DownloadSettings(**downloads or {}))
        ledger = Ledger(fakeredis.FakeRedis(decode_responses=True))
        opened.append(Sources(settings.sources))
        destinations = Destinations(settings.downloads, ledger)
        services = Services(settings, ledger, opened[-1], Fleet([]), destinations=destinations, rng=random.Random(1))
        return tried_places(services, wait_s=wait_s)

    yield find
    for one in opened:
        one.close()


def entries_of(entries: list[PlaceEntry]) -> list[tuple[str, str, str]]:
    return [(entry.use, entry.state, entry.overwrites) for entry in entries]


# Folders


def test_a_folder_of_images_is_listed_and_read_and_one_of_downloads_is_left_as_it_was(
    tried: Tried, tmp_path: Path
) -> None:
    images, out, empty = (tmp_path / name for name in ("images", "out", "empty"))
    for folder in (images / "deep", out, empty):
        folder.mkdir(parents=True)
    (images / "deep" / "a.dcm").write_bytes(b"x" * 5000)
    (out / "theirs.zip").write_bytes(b"theirs")
    entries = tried({"folders": (images, empty)}, {"folders": (out,)})
    assert entries_of(entries) == [
        ("source", "usable", "unknown"),
        ("source", "empty", "unknown"),
        ("download", "usable", "prevented"),
    ]
    assert [entry.place for entry in entries] == [f"{folder.as_uri()}/" for folder in (images, empty, out)]
    assert {entry.message for entry in entries} == {""}
    assert all(entry.host for entry in entries)
    assert [(one.name, one.read_bytes()) for one in out.iterdir()] == [("theirs.zip", b"theirs")]


def test_a_folder_that_is_not_mounted_here_is_said_to_be_missing(tried: Tried, tmp_path: Path) -> None:
    nowhere = tmp_path / "not mounted"
    source, download = tried({"folders": (nowhere,)}, {"folders": (nowhere,)})
    assert (source.state, download.state) == ("refused", "refused")
    assert "is not there" in source.message
    assert "is not there" in download.message
    assert not nowhere.exists()  # trying makes nothing


def test_a_folder_that_cannot_be_written_takes_no_downloads(tried: Tried) -> None:
    (entry,) = tried(downloads={"folders": (Path("/proc/self"),)})
    assert entry.state == "refused"
    assert "cannot be written" in entry.message


def test_a_full_disk_is_named(tried: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (entry,) = tried(downloads={"folders": (tmp_path,)})
    assert (entry.state, "disk is full" in entry.message) == ("refused", True)
    assert list(tmp_path.iterdir()) == []


def test_a_mount_that_hangs_costs_the_others_nothing_and_one_thread_in_all(
    tried: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ask = threading.Event(), Sources.first_listed
    hanging, well = tmp_path / "hanging", tmp_path / "well"
    well.mkdir()

    def listed(self: Sources, place: str) -> str | None:
        if "hanging" in place:
            gate.wait(30)
        return ask(self, place)

    monkeypatch.setattr(Sources, "first_listed", listed)
    settings = Settings(sources=SourceSettings(folders=(hanging, well)))
    services = Services(
        settings, Ledger(fakeredis.FakeRedis(decode_responses=True)), Sources(settings.sources), Fleet([])
    )
    begun = time.monotonic()
    try:
        for _ in range(3):
            assert [entry.state for entry in tried_places(services, wait_s=0.3)] == ["silent", "empty"]
        assert [thread.name for thread in threading.enumerate()].count(f"try {hanging.as_uri()}/") == 1
        (silent, _) = tried_places(services, wait_s=0.3)
        assert "did not answer" in silent.message
    finally:
        gate.set()
    assert time.monotonic() - begun < 5


# S3


@pytest.fixture
def bucket(rclone: str) -> Iterator[tuple[Any, str]]:
    """A bucket of a store that checks signatures, and another program's client of it."""
    client = s3_client(rclone, aws_access_key_id=S3_KEY_ID, aws_secret_access_key=S3_SECRET)
    name = f"try-{new_uid().rpartition('.')[2][:20]}"
    client.create_bucket(Bucket=name)
    yield client, name
    client.close()


def s3(endpoint_url: str, *buckets: str) -> dict[str, Any]:
    return {"s3": S3Settings(buckets=buckets, endpoint_url=endpoint_url, region="us-east-1")}


def keys(client: Any, name: str) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket=name).get("Contents", ())]


def test_a_bucket_is_listed_and_read_and_written_and_left_as_it_was(
    tried: Tried, rclone: str, bucket: tuple[Any, str]
) -> None:
    client, name = bucket
    assert entries_of(tried(s3(rclone, name))) == [("source", "empty", "unknown")]
    client.put_object(Bucket=name, Key="2024/a b.dcm", Body=b"x" * 100_000)
    entries = tried(s3(rclone, name, "scans-*"), s3(rclone, name))
    assert entries_of(entries) == [("source", "usable", "unknown"), ("download", "usable", "not_prevented")]
    assert keys(client, name) == ["2024/a b.dcm"]


def test_no_more_than_the_beginning_of_an_object_is_asked_for(
    tried: Tried, rclone: str, bucket: tuple[Any, str]
) -> None:
    client, name = bucket
    client.put_object(Bucket=name, Key="large.dcm", Body=bytes(64 * 1024**2))
    begun = time.monotonic()
    assert entries_of(tried(s3(rclone, name))) == [("source", "usable", "unknown")]
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_a_wrong_credential_is_told_and_not_quoted(
    tried: Tried, rclone: str, bucket: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "swordfish")
    for entry in tried(s3(rclone, bucket[1]), s3(rclone, bucket[1])):
        assert entry.state in ("refused", "unknown")
        assert entry.message
        assert "swordfish" not in entry.message
        assert S3_SECRET not in entry.message


def test_a_bucket_that_is_not_there_is_told_for_both(tried: Tried, moto: str) -> None:
    source, download = tried(s3(moto, "absent-bucket"), s3(moto, "absent-bucket"))
    assert (source.state, download.state) == ("refused", "refused")
    assert "is not there" in source.message
    assert "no such bucket" in download.message


def test_a_store_that_nobody_serves_is_silent(tried: Tried) -> None:
    nowhere = f"http://{parts.HOST}:{parts.free_port()}"
    source, download = tried(s3(nowhere, "images"), s3(nowhere, "images"))
    assert (source.state, download.state) == ("silent", "silent")


def test_an_object_that_is_listed_and_may_not_be_read_is_told_without_its_key(
    tried: Tried, rclone: str, bucket: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from courier.errors import SourceDenied  # noqa: PLC0415
    from worker.storage.s3_source import S3Source  # noqa: PLC0415

    client, name = bucket
    client.put_object(Bucket=name, Key="Mustermann.dcm", Body=b"x")

    def denied(self: S3Source, url: str, limits: Any) -> None:
        raise SourceDenied(f"{url} may not be read (status 403); check it.")

    monkeypatch.setattr(S3Source, "fetch", denied)
    (entry,) = tried(s3(rclone, name))
    assert entry.state == "refused"
    assert "Mustermann" not in entry.message
    assert f"the first image in s3://{name}/ may not be read" in entry.message


# Azure


@pytest.fixture
def container(azurite: AzuritePart) -> Iterator[Any]:
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        yield service.create_container(f"try-{new_uid().rpartition('.')[2][:20]}")


def azure(url: str, container: str, **credential: str) -> dict[str, Any]:
    credential = credential or {"account_key_env": "AZURE_SECRET"}
    return {"azure": AzureSettings.model_validate({"containers": (container,), "account_url": url, **credential})}


def test_a_container_is_listed_and_read_and_written_and_left_as_it_was(
    tried: Tried, azurite: AzuritePart, container: Any
) -> None:
    place = azure(azurite.url, container.container_name)
    assert entries_of(tried(place)) == [("source", "empty", "unknown")]
    container.upload_blob("a/b.dcm", b"x" * 100_000)
    assert entries_of(tried(place, place)) == [("source", "usable", "unknown"), ("download", "usable", "prevented")]
    assert [blob.name for blob in container.list_blobs()] == ["a/b.dcm"]
    assert PROBE not in str(list(container.list_blobs()))


@pytest.mark.parametrize(
    ("rights", "source", "download"),
    [
        ({"read": True, "list": True, "write": True}, "usable", "usable"),
        ({"read": True, "list": True}, "usable", "refused"),
        ({"read": True, "write": True}, "unknown", "refused"),  # a download lists what an unfinished one has left
        ({"list": True, "write": True}, "refused", "refused"),
    ],
)
def test_each_right_that_a_signature_lacks_is_found(
    tried: Tried,
    azurite: AzuritePart,
    container: Any,
    monkeypatch: pytest.MonkeyPatch,
    rights: dict[str, bool],
    source: str,
    download: str,
) -> None:
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415

    container.upload_blob("a.dcm", b"x" * 1000)
    resources, until = ResourceTypes(object=True, container=True), datetime.now(UTC) + timedelta(minutes=5)
    token = generate_account_sas(AZURITE_ACCOUNT, AZURITE_KEY, resources, AccountSasPermissions(**rights), until)
    monkeypatch.setenv("AZURE_TOKEN", token)
    place = azure(azurite.url, container.container_name, sas_token_env="AZURE_TOKEN")
    entries = tried(place, place)
    assert [entry.state for entry in entries] == [source, download]
    assert "sig=" not in str(entries)
    assert [blob.name for blob in container.list_blobs()] == ["a.dcm"]


def test_a_container_that_is_not_there_is_told_for_both(tried: Tried, azurite: AzuritePart) -> None:
    place = azure(azurite.url, "absent")
    assert [entry.state for entry in tried(place, place)] == ["refused", "refused"]


def test_without_any_place_nothing_is_tried(tried: Tried) -> None:
    assert tried() == []
    assert tried(s3("http://127.0.0.1:1", "scans-*"), s3("http://127.0.0.1:1", "*")) == []


def test_a_worker_that_fails_at_a_place_owns_to_it(
    tried: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(places, "_failed", None)
    (entry,) = tried({"folders": (tmp_path / "absent",)})
    assert (entry.state, "see its log" in entry.message) == ("unknown", True)
