"""Downloads into Azure's blob storage (Azurite), and what comes of an account that says no: whole, or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import fakeredis
import pytest
from azure.storage.blob import (
    BlobBlock,
    BlobServiceClient,
    ContainerClient,
    ContainerSasPermissions,
    generate_container_sas,
)

from courier.errors import CourierError, InvalidRequest, SourceUnauthorized, SourceUnreachable
from courier.ledger.jobs import Ledger
from courier.settings import AzureSettings, DownloadSettings, ServerSettings, Settings
from sandbox import processes as parts
from sandbox.processes import AZURITE_ACCOUNT, AZURITE_KEY, HOST, AzuritePart, SandboxPart
from sandbox.synthetic import image, new_uid
from worker.dicom.instances import identify
from worker.jobs.attempt import Attempt
from worker.jobs.download import download
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Part
from worker.pacs.registry import connect
from worker.storage.azure_destination import BLOCK_BYTES
from worker.storage.destinations import Destinations, StudyFingerprint

MARK = StudyFingerprint.of("1.2.3", ["1.2.3.4"])


def downloads(**azure: Any) -> DownloadSettings:
    return DownloadSettings(azure=AzureSettings.model_validate({"containers": ["out-*", "absent"], **azure}))


@dataclass
class AzureDownloadBench:
    """One server that has one study, one container, and a ledger."""

    services: Services
    container: ContainerClient
    jobs: int = 0
    study: str = field(default_factory=new_uid)
    files: dict[str, bytes] = field(default_factory=dict)

    def store(self, series: str, *, side: int = 64) -> None:
        sop = new_uid()
        content = image(self.study, series=series, sop=sop, side=side)
        (pacs,) = self.services.fleet
        pacs.store([Part(identify(io.BytesIO(content)), lambda: io.BytesIO(content), len(content))])
        self.files[f"{series}/{sop}.dcm"] = content

    def download(self, name: str, *, form: str = "zip", container: str | None = None) -> dict[str, Any]:
        self.jobs += 1
        job_id = f"j{self.jobs}"
        taken = self.services.ledger.take(job_id, task="pacs.download", job={"n": self.jobs})
        attempt = Attempt(job_id, taken.fence, 1, last=False, ledger=self.services.ledger)
        url = f"az://{container or self.container.container_name}/{name}"
        try:
            return download({"study_uid": self.study, "destination": url, "format": form}, attempt, self.services)
        finally:
            self.services.ledger.finish(attempt.job_id, attempt.fence, outcome={}, code="", task="", job={})

    def refusal(self, name: str, *, form: str = "zip", container: str | None = None) -> str:
        """The reason why a destination is refused."""
        with pytest.raises(InvalidRequest) as caught:
            self.download(name, form=form, container=container)
        return str(caught.value.details["reason"])

    def blobs(self) -> set[str]:
        return set(self.container.list_blob_names())

    def read(self, name: str) -> bytes:
        return self.container.get_blob_client(name).download_blob().readall()


@pytest.fixture(scope="module")
def account(azurite: AzuritePart) -> Iterator[BlobServiceClient]:
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        yield service


@pytest.fixture
def container(account: BlobServiceClient) -> ContainerClient:
    """A new one that may be written to."""
    return account.create_container(f"out-{random.randrange(10**9)}")


@pytest.fixture
def bench_with(sandbox: SandboxPart, container: ContainerClient) -> Callable[..., AzureDownloadBench]:
    def start(**azure: Any) -> AzureDownloadBench:
        server = ServerSettings.model_validate(
            {"name": "ward", "type": "msdicom", "url": sandbox.msdicom, "read_timeout_s": 5}
        )
        settings = Settings(downloads=downloads(**azure))
        services = Services(
            settings=settings,
            ledger=Ledger(fakeredis.FakeRedis(decode_responses=True)),
            sources=None,  # type: ignore[arg-type]  # nothing is fetched here
            fleet=Fleet([connect(server)]),
            destinations=Destinations(settings.downloads),
            rng=random.Random(1),
        )
        bench = AzureDownloadBench(services, container)
        for series in ("1", "1", "2"):
            bench.store(f"{bench.study}.{series}")
        return bench

    return start


@pytest.fixture
def bench(
    bench_with: Callable[..., AzureDownloadBench], azurite: AzuritePart, monkeypatch: pytest.MonkeyPatch
) -> AzureDownloadBench:
    monkeypatch.setenv("AZURE_SECRET", azurite.connection_string)
    return bench_with(connection_string_env="AZURE_SECRET")


def opened(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist() if name != "manifest.json"}


def test_an_archive_appears_whole_and_is_known_again_and_nothing_is_laid_over_it(bench: AzureDownloadBench) -> None:
    payload = bench.download("2026/ein study ü.zip")
    content = bench.read("2026/ein study ü.zip")
    assert opened(content) == bench.files
    assert (payload["archive_bytes"], payload["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    properties = bench.container.get_blob_client("2026/ein study ü.zip").get_blob_properties()
    assert properties.content_settings.content_type == "application/zip"
    assert bench.download("2026/ein study ü.zip")["status"] == "already_there"
    bench.store(f"{bench.study}.2")
    assert bench.refusal("2026/ein study ü.zip") == "exists"
    bench.container.upload_blob("mine.zip", b"mine")
    assert bench.refusal("mine.zip") == "exists"
    assert (bench.read("2026/ein study ü.zip"), bench.read("mine.zip")) == (content, b"mine")


def test_what_somebody_else_put_there_meanwhile_is_left_alone(bench: AzureDownloadBench) -> None:
    url = f"az://{bench.container.container_name}/a.zip"

    def chunks() -> Iterator[bytes]:
        yield b"ours"
        bench.container.upload_blob("a.zip", b"mine", overwrite=True)

    with pytest.raises(InvalidRequest, match="something else"):
        bench.services.destinations.archive(url).write(chunks(), MARK)
    assert bench.read("a.zip") == b"mine"


@pytest.mark.parametrize("block_id", ["1", "0f5e8a52-7a36-4a7f-9d0e-3c1b7c1d2e4f-1", "x" * 38])
def test_what_another_program_is_uploading_there_is_left_alone(bench: AzureDownloadBench, block_id: str) -> None:
    theirs = bench.container.get_blob_client("a.zip")
    theirs.stage_block(block_id, b"theirs")
    assert bench.refusal("a.zip") == "exists"
    theirs.commit_block_list([BlobBlock(block_id)])
    assert bench.read("a.zip") == b"theirs"


def test_the_question_whether_a_destination_exists_leaves_uploads_to_it_alone(bench: AzureDownloadBench) -> None:
    for name in ("a.zip", "study/manifest.json", "study/1/2.dcm"):
        bench.container.get_blob_client(name).stage_block("1", b"theirs")
    url = f"az://{bench.container.container_name}"
    assert bench.services.destinations.archive(f"{url}/a.zip").read_fingerprint() is None
    files = bench.services.destinations.files(f"{url}/study")
    assert (files.read_fingerprint(), files.names()) == (None, set())
    for name in ("a.zip", "study/manifest.json", "study/1/2.dcm"):
        bench.container.get_blob_client(name).commit_block_list([BlobBlock("1")])


def test_a_file_that_another_program_wrote_or_is_uploading_meanwhile_stays(bench: AzureDownloadBench) -> None:
    place = bench.services.destinations.files(f"az://{bench.container.container_name}/study")
    bench.container.upload_blob("study/1/seen.dcm", b"half of it")
    assert place.names() == {"1/seen.dcm"}

    def chunks(name: str) -> Iterator[bytes]:
        yield b"ours"
        bench.container.upload_blob(name, b"theirs", overwrite=True)

    for name in ("1/new.dcm", "1/seen.dcm"):
        with pytest.raises(SourceUnreachable, match=rf"study/{name}"):
            place.write(name, chunks(f"study/{name}"))
        assert bench.read(f"study/{name}") == b"theirs"
    theirs = bench.container.get_blob_client("study/1/other.dcm")
    theirs.stage_block("x" * 38, b"theirs")
    with pytest.raises(SourceUnreachable):
        place.write("1/other.dcm", iter([b"ours"]))
    theirs.commit_block_list([BlobBlock("x" * 38)])
    with pytest.raises(InvalidRequest, match="something else"):
        place.finish(b"".join(chunks("study/manifest.json")))
    assert bench.read("study/manifest.json") == b"theirs"
    assert place.names() == {"1/new.dcm", "1/seen.dcm", "1/other.dcm", "manifest.json"}
    place.write("1/seen.dcm", iter([b"ours"]))  # as it was seen
    assert bench.read("study/1/seen.dcm") == b"ours"


@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_name_with_a_question_mark_and_a_hash_is_told_whole(bench: AzureDownloadBench, form: str) -> None:
    name = "day?1/order#2?x=1"
    payload = bench.download(name, form=form)
    assert payload["destination"] == f"az://{bench.container.container_name}/{name}"
    assert bench.blobs() == (
        {name} if form == "zip" else {f"{name}/{file}" for file in (*bench.files, "manifest.json")}
    )
    assert bench.download(name, form=form)["status"] == "already_there"


def test_a_large_archive_goes_in_blocks_and_a_failed_one_is_never_seen(
    bench: AzureDownloadBench, sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        bench.store(f"{bench.study}.3", side=2400)
    monkeypatch.setattr("worker.jobs.download.COMPRESS_LEVEL", 0)
    sandbox.set_fault("msdicom", "retrieve", truncate=True)
    with pytest.raises(CourierError):
        bench.download("large.zip")
    assert bench.blobs() == set()
    sandbox.reset_faults()
    # What a worker that was killed had staged.
    bench.container.get_blob_client("large.zip").stage_block(f"{uuid4().hex}-00000", b"half of it")
    assert bench.blobs() == set()
    payload = bench.download("large.zip")
    assert payload["archive_bytes"] > 2 * BLOCK_BYTES
    listed, left = bench.container.get_blob_client("large.zip").get_block_list("all")
    assert ([block.size for block in listed][:2], len(listed), left) == ([BLOCK_BYTES, BLOCK_BYTES], 3, [])
    assert opened(bench.read("large.zip")) == bench.files


def test_files_are_resumed_and_whole_with_their_manifest(bench: AzureDownloadBench) -> None:
    first, second, _ = bench.files
    bench.container.upload_blob(f"study/{first}", bench.files[first])
    bench.container.upload_blob(f"study/{second}", b"half of it")
    # An account with folders lists these too.
    bench.container.upload_blob(f"study/{first.partition('/')[0]}", b"", metadata={"hdi_isfolder": "true"})
    payload = bench.download("study", form="files")
    assert payload["resumed"] == 1
    assert {name: bench.read(f"study/{name}") for name in bench.files} == bench.files
    manifest = json.loads(bench.read("study/manifest.json"))
    assert {entry["file"] for entry in manifest["instances"]} == set(bench.files)
    assert bench.download("study/", form="files")["status"] == "already_there"
    bench.container.upload_blob("mixed/mine.txt", b"mine")
    assert bench.refusal("mixed", form="files") == "exists"
    assert {name for name in bench.blobs() if name.startswith("mixed/")} == {"mixed/mine.txt"}


def test_files_that_were_cut_off_are_no_download_until_the_rest_has_come(
    bench: AzureDownloadBench, sandbox: SandboxPart
) -> None:
    sandbox.set_fault("msdicom", "retrieve", truncate=True)
    with pytest.raises(CourierError):
        bench.download("study", form="files")
    assert "study/manifest.json" not in bench.blobs()
    sandbox.reset_faults()
    assert bench.download("study", form="files")["status"] == "downloaded"
    assert bench.blobs() == {f"study/{name}" for name in (*bench.files, "manifest.json")}


def test_a_manifest_that_is_none_of_ours_is_something_else(bench: AzureDownloadBench) -> None:
    bench.container.upload_blob("study/manifest.json", b"{}")
    assert bench.refusal("study", form="files") == "exists"


@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_container_that_is_missing_and_an_endpoint_that_is_down_are_told_apart(
    bench: AzureDownloadBench, bench_with: Callable[..., AzureDownloadBench], form: str
) -> None:
    assert bench.refusal("a", form=form, container="absent") == "missing"
    down = bench_with(account_url=f"http://{HOST}:{parts.free_port()}/{AZURITE_ACCOUNT}")
    with pytest.raises(SourceUnreachable):
        down.download("a", form=form)


def test_only_the_containers_of_the_settings_are_written_to(
    bench: AzureDownloadBench, account: BlobServiceClient
) -> None:
    account.create_container(name := f"private-{random.randrange(10**9)}")
    for container in (name, "Out-1", "out-1/..", f"out-1/../{name}"):
        assert bench.refusal("a.zip", container=container) == "not_allowed"
    assert bench.refusal("a.zip?sig=secret") == "not_allowed"
    assert list(account.get_container_client(name).list_blob_names()) == []
    with pytest.raises(InvalidRequest):
        Destinations(DownloadSettings()).archive("az://out-1/a.zip")


@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_credential_that_may_not_write_is_denied_and_leaves_nothing(
    bench_with: Callable[..., AzureDownloadBench], azurite: AzuritePart, tmp_path: Path, form: str
) -> None:
    secret = tmp_path / "secret"
    bench = bench_with(account_url=azurite.url, sas_token_file=secret)
    name = bench.container.container_name
    secret.write_text(container_sas(name, ContainerSasPermissions(read=True, list=True)), encoding="utf-8")
    assert bench.refusal("a", form=form) == "denied"
    secret.write_text(container_sas(name, all_of_it(), minutes=-1), encoding="utf-8")
    with pytest.raises(SourceUnauthorized, match=r"downloads\.azure \(Auth"):
        bench.download("a", form=form)
    assert bench.blobs() == set()
    secret.write_text(container_sas(bench.container.container_name, all_of_it()), encoding="utf-8")
    assert bench.download("a", form=form)["status"] == "downloaded"


@pytest.mark.parametrize("key", ["d3Jvbmc=", "no base64!"])
def test_a_key_that_is_wrong_is_trouble_of_the_worker_and_not_told(
    bench_with: Callable[..., AzureDownloadBench], azurite: AzuritePart, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("AZURE_SECRET", key)
    bench = bench_with(account_url=azurite.url, account_key_env="AZURE_SECRET")
    with pytest.raises(SourceUnauthorized) as caught:
        bench.download("a.zip")
    assert key not in str(caught.value)


def test_a_credential_that_is_not_set_is_named(
    bench_with: Callable[..., AzureDownloadBench], azurite: AzuritePart
) -> None:
    bench = bench_with(account_url=azurite.url, account_key_env="NOT_SET")
    with pytest.raises(SourceUnauthorized, match="NOT_SET"):
        bench.download("a.zip")


def all_of_it() -> ContainerSasPermissions:
    return ContainerSasPermissions(read=True, list=True, write=True)


def container_sas(name: str, permission: ContainerSasPermissions, *, minutes: int = 1) -> str:
    expiry = datetime.now(UTC) + timedelta(minutes=minutes)
    return generate_container_sas(AZURITE_ACCOUNT, name, account_key=AZURITE_KEY, permission=permission, expiry=expiry)


# --- an account that says what Azurite never does -------------------------------------------------------------------


class No(BaseHTTPRequestHandler):
    """Answers every PUT with the status and the code of Azure that its server holds; a GET is cut off."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"a tenth of it")
        self.close_connection = True

    def do_PUT(self) -> None:
        self.server.asked.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.send_header("x-ms-error-code", self.server.code)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def no() -> Iterator[Any]:
    with HTTPServer((HOST, 0), No) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "AuthorizationPermissionMismatch", "denied"),
        (403, "UnauthorizedBlobOverwrite", "exists"),
        (404, "ContainerNotFound", "missing"),
        (409, "BlobAlreadyExists", "exists"),
        (409, "BlobImmutableDueToPolicy", "denied"),
        (409, "BlockCountExceedsLimit", "full"),
        (409, "ContainerBeingDeleted", None),
        (412, "LeaseIdMissing", "denied"),
        (413, "RequestBodyTooLarge", "full"),
        (429, "TooManyRequests", None),
        (500, "InternalError", None),
        (503, "ServerBusy", None),
        (507, "", "full"),
    ],
)
def test_a_no_is_judged_after_one_attempt(no: Any, status: int, code: str, reason: str | None) -> None:
    no.status, no.code = status, code
    account_url = f"http://{HOST}:{no.server_port}"
    archive = Destinations(downloads(account_url=account_url)).archive("az://out-1/a.zip")
    with pytest.raises(InvalidRequest if reason else SourceUnreachable) as caught:
        archive.write(iter([b"content"]), MARK)
    assert caught.value.details.get("reason") == reason
    assert len(no.asked) == 1


@pytest.mark.parametrize(
    ("status", "kind"), [(200, SourceUnreachable), (503, SourceUnreachable), (403, InvalidRequest)]
)
def test_what_cannot_be_read_back_is_asked_for_once(no: Any, status: int, kind: type[Exception]) -> None:
    no.status = status
    account_url = f"http://{HOST}:{no.server_port}"
    files = Destinations(downloads(account_url=account_url)).files("az://out-1/study/")
    with pytest.raises(kind, match=r"az://out-1/study/1\.dcm"):
        list(files.read("1.dcm"))
    assert len(no.asked) == 1
