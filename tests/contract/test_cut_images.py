"""Images that end too early inside answers that are whole, and backups that are no longer what was written.

Between the workers and a server the images of an answer are changed, and its framing is made anew, so it is intact.
Driven by hand over a real Redis: both sandbox dialects, a real Orthanc, folders, S3 (moto) and Azurite.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from azure.storage.blob import BlobServiceClient

from courier.errors import PacsMisanswered, SourceUnreachable, StudyConflict
from courier.settings import DownloadSettings, S3Settings
from sandbox.processes import HOST, AzuritePart, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.servers.s3 import s3_client
from worker.batches import deletions
from worker.batches.backups import Backup, back_up, prove
from worker.batches.coordinator import Coordinator
from worker.batches.study_copy import Transfer, bare_digests_on, digests_on, images_on
from worker.batches.study_migration import MigrationReceipt, copy_study, delete_source, undo_study, verify_study
from worker.dicom.instances import identify
from worker.jobs.download import download
from worker.jobs.runner import Done, Failed, JobResult
from worker.jobs.same_bytes import Arrival, compare
from worker.pacs.multipart import read_parts
from worker.pacs.protocol import Pacs
from worker.pacs.transport import Answer, Request, Transport
from worker.storage.destinations import Destinations

Change = Callable[[bytes], bytes]
WHERE: dict[str, Callable[[pytest.FixtureRequest], str]] = {
    "msdicom": lambda request: str(request.getfixturevalue("sandbox").msdicom),
    "dcm4chee": lambda request: str(request.getfixturevalue("sandbox").dcm4chee),
    "orthanc": lambda request: str(request.getfixturevalue("orthanc")),
}


class Spoiler:
    """Changes the images that servers send, if there is a ``change``; ``announced``: parts tell their old lengths."""

    def __init__(self) -> None:
        self.change: Change | None = None
        self.announced = False
        self.server: str | None = None
        self.spoiled = 0

    def cut(self, missing_bytes: int, *, announced: bool = False, server: str | None = None) -> None:
        self.change, self.announced, self.server = (lambda content: content[:-missing_bytes]), announced, server

    def calm(self) -> None:
        self.change = None

    def blocks(self, blocks: Iterator[bytes], content_type: str) -> Iterator[bytes]:
        change, boundary = self.change, content_type.partition("boundary=")[2].split(";")[0].strip('"').encode()
        assert change is not None
        for part in read_parts(blocks, content_type, error=PacsMisanswered):
            content = b"".join(part.chunks)
            length = f"Content-Length: {len(content)}\r\n" if self.announced else ""
            head = f"Content-Type: application/dicom; transfer-syntax={part.transfer_syntax_uid or '*'}\r\n{length}\r\n"
            body = change(content)
            self.spoiled += body != content
            yield b"--" + boundary + b"\r\n" + head.encode() + body + b"\r\n"
        yield b"--" + boundary + b"--\r\n"


@pytest.fixture
def spoiler(monkeypatch: pytest.MonkeyPatch) -> Spoiler:
    spoiler, stream = Spoiler(), Transport.stream

    @contextmanager
    def spoiled(self: Transport, request: Request) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        with stream(self, request) as (answer, blocks):
            kind = answer.headers.get("Content-Type", "")
            ours = spoiler.change is not None and spoiler.server in (None, self.server.name)
            if ours and answer.status == 200 and kind.startswith("multipart/related"):
                yield answer, spoiler.blocks(blocks, kind)
            else:
                yield answer, blocks

    monkeypatch.setattr(Transport, "stream", spoiled)
    return spoiler


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "KEY",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


class DownloadStore:
    """A place that downloads and backups go to, and what lies there."""

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        self.url, self.settings = url, settings

    def names(self) -> set[str]:
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        raise NotImplementedError

    def write(self, name: str, content: bytes) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def unfinish(self) -> None:
        """Make of a finished download one that lacks its manifest."""
        for name in self.names():
            if name.endswith("manifest.json"):
                self.delete(name)

    @property
    def archive(self) -> str:
        (name,) = (name for name in self.names() if name.endswith(".zip"))
        return name


class FolderStore(DownloadStore):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder.as_uri(), {"folders": [str(folder)]})
        self.folder = folder

    def names(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def delete(self, name: str) -> None:
        (self.folder / name).unlink()

    def unfinish(self) -> None:
        super().unfinish()
        (self.folder / "study").rename(self.folder / "study.unfinished")


class S3Store(DownloadStore):
    def __init__(self, endpoint: str) -> None:
        self.bucket = f"cut-{new_uid()[-12:].strip('.')}"
        super().__init__(
            f"s3://{self.bucket}/below",
            {"s3": {"buckets": [self.bucket], "endpoint_url": endpoint, "region": "us-east-1"}},
        )
        self.client = s3_client(endpoint)
        self.client.create_bucket(Bucket=self.bucket)

    def names(self) -> set[str]:
        return {entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())}

    def read(self, name: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=self.bucket, Key=name)["Body"].read()
        return content

    def write(self, name: str, content: bytes) -> None:
        metadata: dict[str, str] = {}
        with suppress(self.client.exceptions.ClientError):
            metadata = self.client.head_object(Bucket=self.bucket, Key=name)["Metadata"]
        self.client.put_object(Bucket=self.bucket, Key=name, Body=content, Metadata=metadata)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=name)


class AzureStore(DownloadStore):
    def __init__(self, azurite: AzuritePart, folder: Path) -> None:
        name = f"cut-{new_uid()[-12:].strip('.')}"
        file = folder / "connection-string"
        file.write_text(azurite.connection_string)
        super().__init__(f"az://{name}/below", {"azure": {"containers": [name], "connection_string_file": str(file)}})
        self.service = BlobServiceClient.from_connection_string(azurite.connection_string)
        self.container = self.service.create_container(name)

    def names(self) -> set[str]:
        return set(self.container.list_blob_names())

    def read(self, name: str) -> bytes:
        return self.container.get_blob_client(name).download_blob().readall()

    def write(self, name: str, content: bytes) -> None:
        blob, metadata = self.container.get_blob_client(name), {}
        if blob.exists():
            metadata = blob.get_blob_properties().metadata
        blob.upload_blob(content, overwrite=True, metadata=metadata)

    def delete(self, name: str) -> None:
        self.container.delete_blob(name)


@contextmanager
def opened_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DownloadStore]:
    if kind == "folder":
        (tmp_path / "out").mkdir()
        yield FolderStore(tmp_path / "out")
    elif kind == "s3":
        s3 = S3Store(request.getfixturevalue("moto"))
        yield s3
        s3.client.close()
    else:
        blobs = AzureStore(request.getfixturevalue("azurite"), tmp_path)
        yield blobs
        blobs.service.close()


@pytest.fixture(params=["folder", "s3", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DownloadStore]:
    with opened_store(request.param, request, tmp_path) as place:
        yield place


@pytest.fixture
def folder(tmp_path: Path) -> FolderStore:
    (tmp_path / "out").mkdir()
    return FolderStore(tmp_path / "out")


@pytest.fixture(params=WHERE)
def anywhere(request: pytest.FixtureRequest, batch_site: Callable[..., BatchSite], folder: FolderStore) -> BatchSite:
    """One server of any dialect, called ward."""
    server = {"name": "ward", "type": request.param, "url": WHERE[request.param](request)}
    return batch_site([server], downloads=folder.settings)


def ward(
    batch_site: Callable[..., BatchSite], sandbox: SandboxPart, store: DownloadStore, **sections: Any
) -> BatchSite:
    return batch_site(
        [{"name": "ward", "type": "msdicom", "url": sandbox.msdicom}], downloads=store.settings, **sections
    )


def downloaded(site: BatchSite, study: str, url: str, form: str) -> JobResult:
    message = {"study_uid": study, "destination": url, "format": form}
    return site.see_to_its_end("pacs.download", download, new_uid(), message)


# --- downloads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing_bytes", "announced"), [(20, False), (1, False), (20, True), (10_000, True)])
@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_download_of_an_image_that_ends_early_is_tried_again_and_nothing_looks_whole(
    anywhere: BatchSite, folder: FolderStore, spoiler: Spoiler, form: str, missing_bytes: int, announced: bool
) -> None:
    study = new_uid()
    for _ in range(2):
        anywhere.put_file("ward", image(study, side=128))
    spoiler.cut(missing_bytes, announced=announced)
    failed = downloaded(anywhere, study, f"{folder.url}/{form}", form)
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.server_name) == ("pacs_misanswered", "ward")
    assert spoiler.spoiled >= 2, "it is tried again"
    assert not folder.names()
    spoiler.calm()
    payload(downloaded(anywhere, study, f"{folder.url}/{form}", form))


@pytest.mark.parametrize("form", ["zip", "files"])
def test_nothing_is_left_in_any_store_that_vouches_for_a_cut_image(
    store: DownloadStore, batch_site: Callable[..., BatchSite], sandbox: SandboxPart, spoiler: Spoiler, form: str
) -> None:
    site, study = ward(batch_site, sandbox, store), new_uid()
    bad, *_ = site.put("ward", study, 3)
    spoiler.change = cut_only(bad)
    failed = downloaded(site, study, f"{store.url}/study", form)
    assert isinstance(failed, Failed)
    assert failed.error.code == "pacs_misanswered"
    left = store.names()
    assert not left if form == "zip" else not any(bad in name or "manifest" in name for name in left)
    spoiler.calm()
    told = payload(downloaded(site, study, f"{store.url}/study", form))
    assert (told["instances"], told.get("resumed") or 0) == (3, len(left))


def cut_only(image_uid: str) -> Change:
    return lambda content: content[:-5] if image_uid.encode() in content else content


def test_an_image_with_two_study_uids_is_the_servers_fault(
    folder: FolderStore, batch_site: Callable[..., BatchSite], sandbox: SandboxPart, spoiler: Spoiler
) -> None:
    site, study = ward(batch_site, sandbox, folder), new_uid()
    site.put("ward", study, 1)
    spoiler.change = lambda content: content + b"\x20\x00\x0d\x00UI\x04\x001.2\x00"
    failed = downloaded(site, study, f"{folder.url}/a.zip", "zip")
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.server_name) == ("pacs_misanswered", "ward")
    assert "two Study Instance UIDs" in failed.error.message
    assert not folder.names()


# --- `files` downloads that are resumed -----------------------------------------------------------------------------


def resumed(site: BatchSite, study: str, store: DownloadStore) -> tuple[dict[str, Any], dict[str, Any]]:
    told = payload(downloaded(site, study, f"{store.url}/study", "files"))
    (name,) = (name for name in store.names() if name.endswith("manifest.json"))
    return told, json.loads(store.read(name))


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:5000], lambda c: c[:-1], lambda c: c[:200], lambda c: b"", lambda c: c + b"x" * 99]
)
def test_what_an_earlier_attempt_has_left_and_is_not_proven_whole_is_written_anew(
    store: DownloadStore, batch_site: Callable[..., BatchSite], sandbox: SandboxPart, spoil: Change
) -> None:
    site, study = ward(batch_site, sandbox, store), new_uid()
    contents = {}
    for _ in range(3):
        sop = new_uid()
        contents[sop] = image(study, series=f"{study}.1", sop=sop, side=128)
        site.put_file("ward", contents[sop])
    payload(downloaded(site, study, f"{store.url}/study", "files"))
    store.unfinish()
    left = sorted(name for name in store.names() if name.endswith(".dcm"))
    store.write(left[0], spoil(store.read(left[0])))
    told, manifest = resumed(site, study, store)
    assert told["resumed"] == 2
    assert {one["image_uid"]: one["size_bytes"] for one in manifest["instances"]} == {
        uid: len(content) for uid, content in contents.items()
    }
    for one in manifest["instances"]:
        (name,) = (name for name in store.names() if name.endswith(one["file"]))
        assert store.read(name) == contents[one["image_uid"]]


class Cutting:
    """A TCP proxy to ``target``; it closes each connection after ``after`` bytes of answers, if that is set."""

    def __init__(self, target: str) -> None:
        host, _, port = target.partition("://")[2].partition("/")[0].partition(":")
        self._to = (host, int(port))
        self.after: int | None = None
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                for one, other, is_answer in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pump, args=(one, other, is_answer), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, is_answer: bool) -> None:
        sent = 0
        with suppress(OSError):
            while data := one.recv(65536):
                if is_answer and self.after is not None and sent + len(data) > self.after:
                    other.sendall(data[: max(0, self.after - sent)])
                    break
                other.sendall(data)
                sent += len(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            if is_answer:
                end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def cutting(moto: str) -> Iterator[Cutting]:
    proxy = Cutting(moto)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("after", [300_000, 2_000_000])
def test_an_object_that_does_not_arrive_whole_is_no_object(moto: str, cutting: Cutting, after: int) -> None:
    s3 = S3Store(moto)
    s3.write("below/a.dcm", bytes(2_500_000))
    url = f"http://{HOST}:{cutting.port}"
    settings = DownloadSettings(s3=S3Settings(buckets=("*",), endpoint_url=url, region="us-east-1"))
    files = Destinations(settings).files(s3.url)
    archive = Destinations(settings).archive(f"{s3.url}/a.dcm")
    assert sum(map(len, files.read("a.dcm"))) == 2_500_000
    cutting.after = after
    for place in (files.read("a.dcm"), archive.read()):
        with pytest.raises(SourceUnreachable, match=r"whole|at present"):
            list(place)
    s3.client.close()


# --- migrations -----------------------------------------------------------------------------------------------------

WAYS = [("msdicom", "dcm4chee"), ("dcm4chee", "msdicom"), ("orthanc", "msdicom"), ("msdicom", "orthanc")]


@pytest.fixture(params=WAYS, ids="-to-".join)
def way(request: pytest.FixtureRequest, batch_site: Callable[..., BatchSite]) -> tuple[BatchSite, Pacs, Pacs]:
    servers = [{"name": kind, "type": kind, "url": WHERE[kind](request)} for kind in request.param]
    site = batch_site(servers)
    source, target = request.param
    return site, site.fleet[source], site.fleet[target]


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize(("missing_bytes", "announced"), [(1, False), (20, True)])
def test_a_migration_never_pushes_a_cut_image_and_takes_the_others_on_the_next_attempt(
    way: tuple[BatchSite, Pacs, Pacs], spoiler: Spoiler, spooled: bool, missing_bytes: int, announced: bool
) -> None:
    site, source, target = way
    study = new_uid()
    uids = {new_uid() for _ in range(3)}
    for uid in uids:
        site.put_file(source.server.name, image(study, sop=uid, side=300))
    spoiler.cut(missing_bytes, announced=announced, server=source.server.name)
    transfer, receipt = Transfer(source, target, study), MigrationReceipt()
    transfer.spooled = spooled
    with pytest.raises(PacsMisanswered) as caught:
        copy_study(transfer, receipt)
    assert caught.value.server_name == source.server.name
    assert spoiler.spoiled
    assert images_on(target, study) == {}
    spoiler.calm()
    copy_study(Transfer(source, target, study), receipt)
    assert set(images_on(target, study)) == uids


def test_what_a_server_gives_back_cut_is_no_difference_but_a_bad_answer(
    way: tuple[BatchSite, Pacs, Pacs], spoiler: Spoiler
) -> None:
    site, source, target = way
    study = new_uid()
    for _ in range(2):
        site.put_file(source.server.name, image(study, side=64))
    receipt = MigrationReceipt()
    copy_study(Transfer(source, target, study), receipt)
    spoiler.cut(9, server=target.server.name)
    for ask in (
        lambda: digests_on(target, study, images_on(target, study), set(images_on(target, study))),
        lambda: bare_digests_on(target, study),
    ):
        with pytest.raises(PacsMisanswered, match="cut short"):
            ask()
    if target.keeps_bytes:
        with pytest.raises(PacsMisanswered, match="cut short"):
            verify_study(Transfer(source, target, study), receipt, digests="all")


def test_an_undo_of_a_move_removes_nothing_while_the_target_gives_back_cut_images(
    way: tuple[BatchSite, Pacs, Pacs], spoiler: Spoiler
) -> None:
    site, source, target = way
    study = new_uid()
    for _ in range(2):
        site.put_file(source.server.name, image(study, side=64))
    transfer, receipt = Transfer(source, target, study), MigrationReceipt()
    copy_study(transfer, receipt)
    verify_study(transfer, receipt, digests="all")
    delete_source(transfer, receipt)
    uids = set(images_on(target, study))
    spoiler.cut(9, server=target.server.name)
    with pytest.raises(PacsMisanswered):
        undo_study(Transfer(source, target, study), receipt)
    assert (set(images_on(target, study)), images_on(source, study)) == (uids, {})
    spoiler.calm()
    assert undo_study(Transfer(source, target, study), receipt)["removed"] == 2
    assert set(images_on(source, study)) == uids


# --- backups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing_bytes", "announced"), [(20, False), (1, False), (20, True)])
def test_a_study_whose_images_come_cut_is_neither_kept_nor_deleted(
    anywhere: BatchSite, folder: FolderStore, spoiler: Spoiler, missing_bytes: int, announced: bool
) -> None:
    study = new_uid()
    uids = anywhere.put("ward", study)
    spoiler.cut(missing_bytes, announced=announced)
    anywhere.delete(study, backup=folder.url)
    assert anywhere.ends() == ["pacs_misanswered"]
    assert anywhere.on("ward", study) == uids
    assert not folder.names()
    assert spoiler.spoiled >= 2, "it was tried again"
    spoiler.calm()
    anywhere.batch = "C"
    payload(anywhere.delete(study, backup=folder.url))
    assert (anywhere.ends(), anywhere.on("ward", study)) == (["deleted"], set())


def flipped(content: bytes) -> bytes:
    """With another byte in what is packed first."""
    at = content.index(b".dcm") + 200
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def packed_anew(content: bytes, change: Callable[[str, bytes], bytes | None], *, more: str = "") -> bytes:
    """Another archive, sound in itself."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            if (changed := change(name, old.read(name))) is not None:
                new.writestr(name, changed)
        if more:
            new.writestr(more, b"more")
    return made.getvalue()


def with_a_cut_image(content: bytes) -> bytes:
    """An archive as version 0.1 wrote it: whole in itself, of an image that is not."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        manifest = json.loads(old.read("manifest.json"))
        entry = manifest["instances"][0]
        cut = old.read(entry["file"])[:-30]
    entry |= {"size_bytes": len(cut), "sha256": hashlib.sha256(cut).hexdigest()}

    def change(name: str, found: bytes) -> bytes:
        return cut if name == entry["file"] else json.dumps(manifest).encode() if name == "manifest.json" else found

    return packed_anew(content, change)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-300],
    "half": lambda content: content[: len(content) // 2],
    "nothing": lambda _: b"",
    "another byte": flipped,
    "no archive": lambda _: b"<html>",
    "an image less": lambda content: packed_anew(content, lambda n, c: None if n.endswith("1.dcm") else c),
    "an image replaced": lambda content: packed_anew(content, lambda n, c: c[:-1] + b"\7" if n.endswith("dcm") else c),
    "a cut image": with_a_cut_image,
    "a file more": lambda content: packed_anew(content, lambda _, c: c, more="x"),
    "another manifest": lambda content: packed_anew(content, lambda n, c: b"[]" if n == "manifest.json" else c),
}


def put_two(site: BatchSite, study: str) -> set[str]:
    uids = {f"{study}.1.1", f"{study}.1.2"}
    for uid in uids:
        site.put_file("ward", image(study, sop=uid, side=16))
    return uids


@pytest.fixture(
    params=[("folder", damage) for damage in DAMAGE]
    + [(f, d) for f in ("s3", "azure") for d in ("cut", "nothing", "another byte")],
    ids="-".join,
)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[DownloadStore, str]]:
    kind, damage = request.param
    with opened_store(kind, request, tmp_path) as place:
        yield place, damage


def test_a_study_stays_if_its_backup_is_no_longer_whole_when_it_is_to_be_deleted(
    damaged: tuple[DownloadStore, str],
    batch_site: Callable[..., BatchSite],
    sandbox: SandboxPart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, damage = damaged
    site, study = ward(batch_site, sandbox, store), new_uid()
    uids = put_two(site, study)

    def kept_and_damaged(*args: Any) -> Backup | None:
        kept = back_up(*args)
        store.write(store.archive, DAMAGE[damage](store.read(store.archive)))
        return kept

    monkeypatch.setattr(deletions, "back_up", kept_and_damaged)
    payload(site.delete(study, backup=store.url))
    assert site.ends() == ["study_conflict"]
    assert "damaged" in site.rows[0].outcome.message
    assert site.on("ward", study) == uids


def test_a_study_stays_if_its_backup_is_gone_when_it_is_to_be_deleted(
    store: DownloadStore, batch_site: Callable[..., BatchSite], sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, study = ward(batch_site, sandbox, store), new_uid()
    uids = put_two(site, study)

    def kept_and_lost(*args: Any) -> Backup | None:
        kept = back_up(*args)
        store.delete(store.archive)
        return kept

    monkeypatch.setattr(deletions, "back_up", kept_and_lost)
    payload(site.delete(study, backup=store.url))
    assert (site.ends(), site.on("ward", study)) == (["study_conflict"], uids)
    assert "not there any more" in site.rows[0].outcome.message


def test_a_damaged_backup_brings_nothing_back_and_says_what_is_wrong(
    damaged: tuple[DownloadStore, str], batch_site: Callable[..., BatchSite], sandbox: SandboxPart
) -> None:
    store, damage = damaged
    site, study = ward(batch_site, sandbox, store), new_uid()
    uids = put_two(site, study)
    payload(site.delete(study, backup=store.url))
    assert (site.ends(), site.on("ward", study)) == (["deleted"], set())
    name = store.archive
    good = store.read(name)
    store.write(name, DAMAGE[damage](good))
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["study_conflict"]
    assert f"The backup {store.url}" in site.rows[0].passes["undo"].message
    assert site.on("ward", study) == set()
    store.write(name, good)
    payload(site.go_on(Coordinator.undo, "undo"))
    assert (site.ends("undo"), site.on("ward", study)) == (["undone"], uids)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "a cut image"])
def test_a_backup_whose_digest_died_with_its_attempt_is_proven_by_its_manifest(
    damage: str, folder: FolderStore, batch_site: Callable[..., BatchSite], sandbox: SandboxPart
) -> None:
    site, study = ward(batch_site, sandbox, folder), new_uid()
    put_two(site, study)
    payload(site.delete(study, backup=folder.url))
    told = Backup(**site.rows[0].outcome.result["kept"]["ward"])
    assert told.archive_sha256
    unknown, services = replace(told, archive_sha256=None), site.services
    prove(site.fleet["ward"], study, unknown, services)
    folder.write(folder.archive, DAMAGE[damage](folder.read(folder.archive)))
    with pytest.raises(StudyConflict, match="damaged"):
        prove(site.fleet["ward"], study, unknown, services)


def test_a_cut_image_in_a_backup_of_version_0_1_is_found(
    folder: FolderStore, batch_site: Callable[..., BatchSite], sandbox: SandboxPart
) -> None:
    site, study = ward(batch_site, sandbox, folder), new_uid()
    put_two(site, study)
    payload(site.delete(study, backup=folder.url))
    told = Backup(**{**site.rows[0].outcome.result["kept"]["ward"], "archive_sha256": None})
    folder.write(folder.archive, with_a_cut_image(folder.read(folder.archive)))
    with pytest.raises(StudyConflict, match="cut short"):
        prove(site.fleet["ward"], study, told, site.services)


# --- uploads in batches ----------------------------------------------------------------------------------------------


def test_the_verification_of_an_upload_does_not_say_that_a_cut_answer_differs(
    folder: FolderStore,
    batch_site: Callable[..., BatchSite],
    sandbox: SandboxPart,
    spoiler: Spoiler,
    image_server: Any,
) -> None:
    sources = {"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True}
    site, study = ward(batch_site, sandbox, folder, sources=sources), new_uid()
    urls = [image_server.put(f"{n}.dcm", image(study, side=64)) for n in range(2)]
    payload(site.upload(*urls))
    spoiler.cut(9)
    site.go_on(Coordinator.verify, "verify")
    assert site.ends("verify") == ["pacs_misanswered"] * 2
    spoiler.calm()
    assert isinstance(site.go_on(Coordinator.verify, "verify"), Done)
    assert site.ends("verify") == ["verified"] * 2


@pytest.mark.parametrize("missing_bytes", [1, 500])
def test_a_cut_answer_does_not_say_that_the_bytes_are_others(
    anywhere: BatchSite, spoiler: Spoiler, missing_bytes: int
) -> None:
    study = new_uid()
    content = image(study, side=64)
    anywhere.put_file("ward", content)
    arrival = Arrival(identify(io.BytesIO(content)), len(content), hashlib.sha256(content).hexdigest(), "file")
    pacs = anywhere.fleet["ward"]
    spoiler.cut(missing_bytes)
    assert compare(pacs, arrival).same is None
    spoiler.calm()
    assert compare(pacs, arrival).same is (True if pacs.keeps_bytes else None)
