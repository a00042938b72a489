"""Downloads from the sandbox's two PACS and a real Orthanc, into folders and S3 (moto): whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from courier.errors import (
    Cancelled,
    CourierError,
    InvalidRequest,
    NotFound,
    PacsMisanswered,
    PacsUnavailable,
    SourceUnreachable,
)
from courier.ledger.jobs import Ledger
from courier.settings import DownloadSettings, S3Settings, ServerSettings, Settings
from sandbox import processes as parts
from sandbox.processes import HOST, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.servers.s3 import s3_client
from worker.batches.coordinator import Coordinator
from worker.batches.downloads import download_all
from worker.dicom.instances import Instance, Reading, identify
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.download import download, to_ask
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Found, Part
from worker.pacs.registry import connect
from worker.storage.destinations import Destinations

SERVERS = {
    "msdicom": lambda request: request.getfixturevalue("sandbox").msdicom,
    "dcm4chee": lambda request: request.getfixturevalue("sandbox").dcm4chee,
    "orthanc": lambda request: request.getfixturevalue("orthanc"),
}


@dataclass
class DownloadBench:
    """One server, one folder that downloads may go to, and a ledger."""

    services: Services
    folder: Path
    jobs: int = 0
    study: str = field(default_factory=new_uid)
    files: dict[str, bytes] = field(default_factory=dict)

    def store(self, series: str, *, side: int = 64) -> str:
        """One more image of the study on the server; its name in a download."""
        sop = new_uid()
        content = image(self.study, series=series, sop=sop, side=side)
        (pacs,) = self.services.fleet
        pacs.store([Part(identify(io.BytesIO(content)), lambda: io.BytesIO(content), len(content))])
        self.files[f"{series}/{sop}.dcm"] = content
        return f"{series}/{sop}.dcm"

    def run(self) -> Attempt:
        self.jobs += 1
        taken = self.services.ledger.take(f"j{self.jobs}", task="pacs.download", job={"n": self.jobs})
        return Attempt(f"j{self.jobs}", taken.fence, 1, last=False, ledger=self.services.ledger)

    def download(self, destination: str, **more: object) -> dict[str, Any]:
        attempt = self.run()
        try:
            return download({"study_uid": self.study, "destination": destination, **more}, attempt, self.services)
        finally:
            self.services.ledger.finish(attempt.job_id, attempt.fence, outcome={}, code="", task="", job={})

    def url(self, name: str) -> str:
        return (self.folder / name).as_uri()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "COURIERTESTKEY",
        "AWS_SECRET_ACCESS_KEY": "couriertestsecret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


def bench_on(kind: str, url: str, folder: Path, s3: str | None = None) -> DownloadBench:
    server = ServerSettings.model_validate({"name": "ward", "type": kind, "url": url, "read_timeout_s": 5})
    downloads = DownloadSettings(
        folders=(folder,), s3=S3Settings(buckets=("out", "absent"), endpoint_url=s3, region="us-east-1")
    )
    ledger = Ledger(fakeredis.FakeRedis(decode_responses=True))
    services = Services(
        settings=Settings(downloads=downloads),
        ledger=ledger,
        sources=None,  # type: ignore[arg-type]  # nothing is fetched here
        fleet=Fleet([connect(server)]),
        destinations=Destinations(downloads, ledger),
        rng=random.Random(1),
    )
    bench = DownloadBench(services, folder)
    for series in ("1", "1", "2"):
        bench.store(f"{bench.study}.{series}")
    return bench


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> DownloadBench:
    return bench_on("msdicom", request.getfixturevalue("sandbox").msdicom, tmp_path)


@pytest.fixture
def bucket(moto: str) -> Iterator[Any]:
    """An empty bucket "out" that may be written to."""
    client = s3_client(moto)
    client.create_bucket(Bucket="out")
    for entry in client.list_objects_v2(Bucket="out").get("Contents", ()):
        client.delete_object(Bucket="out", Key=entry["Key"])
    yield client
    client.close()


@pytest.fixture
def cloud(bucket: Any, moto: str, request: pytest.FixtureRequest, tmp_path: Path) -> DownloadBench:
    return bench_on("msdicom", request.getfixturevalue("sandbox").msdicom, tmp_path, s3=moto)


def opened(content: bytes | Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The images of an archive, and its manifest."""
    with zipfile.ZipFile(io.BytesIO(content) if isinstance(content, bytes) else content) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    return files, json.loads(files.pop("manifest.json"))


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", SERVERS)
def test_a_study_comes_as_an_archive_with_a_manifest_that_is_true(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bench = bench_on(kind, SERVERS[kind](request), tmp_path)
    payload = bench.download(bench.url("new/folder/study.zip"))
    target = tmp_path / "new/folder/study.zip"
    files, manifest = opened(target)
    assert files.keys() == bench.files.keys()
    assert manifest["study_uid"] == bench.study
    for entry in manifest["instances"]:
        content = files[entry["file"]]
        assert entry["file"] == f"{entry['series_uid']}/{entry['image_uid']}.dcm"
        assert (entry["size_bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert identify(io.BytesIO(content)).sop_instance_uid == entry["image_uid"]
    if kind != "dcm4chee":
        assert files == bench.files
    assert (payload["status"], payload["instances"], payload["format"]) == ("downloaded", 3, "zip")
    assert (payload["server_name"], payload["server_type"]) == ("ward", kind)
    assert payload["size_bytes"] == manifest["size_bytes"] == sum(map(len, files.values()))
    assert payload["archive_bytes"] == target.stat().st_size
    assert payload["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert everything_below(tmp_path) == {"new/folder/study.zip"}


@pytest.mark.parametrize("form", ["zip", "files"])
def test_the_same_download_again_changes_nothing_and_another_is_never_laid_over_it(
    bench: DownloadBench, form: str
) -> None:
    bench.download(bench.url("a"), format=form)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in bench.folder.rglob("*")}
    assert bench.download(bench.url("a"), format=form)["status"] == "already_there"
    bench.store(f"{bench.study}.1")
    with pytest.raises(InvalidRequest, match="something else") as caught:
        bench.download(bench.url("a"), format=form)
    assert caught.value.details["reason"] == "exists"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in bench.folder.rglob("*")} == before


def test_a_folder_of_files_holds_what_the_archive_would(bench: DownloadBench) -> None:
    payload = bench.download(bench.url("study"), format="files")
    assert everything_below(bench.folder) == {f"study/{name}" for name in (*bench.files, "manifest.json")}
    assert all((bench.folder / "study" / name).read_bytes() == content for name, content in bench.files.items())
    assert (payload["size_bytes"], payload["resumed"]) == (sum(map(len, bench.files.values())), 0)


@pytest.mark.parametrize("cut", ["cleanly", True])
@pytest.mark.parametrize("form", ["zip", "files"])
def test_an_answer_that_was_cut_off_leaves_nothing_that_looks_whole(
    bench: DownloadBench, sandbox: Any, form: str, cut: object
) -> None:
    sandbox.set_fault("msdicom", "retrieve", truncate=cut)
    with pytest.raises((PacsMisanswered, PacsUnavailable)):
        bench.download(bench.url("study"), format=form)
    assert not (bench.folder / "study").exists()
    if form == "zip":
        assert everything_below(bench.folder) == set()
    sandbox.reset_faults()
    assert bench.download(bench.url("study"), format=form)["status"] == "downloaded"
    assert not list(bench.folder.glob("*unfinished"))


def test_files_that_an_earlier_attempt_left_are_checked_and_kept(bench: DownloadBench) -> None:
    first, second, _ = bench.files
    left = bench.folder / "study.unfinished"
    for name, content in ((first, bench.files[first]), (second, b"half of"), (f"{first}.unfinished", b"")):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_bytes(content)
    payload = bench.download(bench.url("study"), format="files")
    assert payload["resumed"] == 1
    assert (bench.folder / "study" / second).read_bytes() == bench.files[second]
    assert len(json.loads((bench.folder / "study/manifest.json").read_text())["instances"]) == 3


def test_what_is_missing_is_asked_for_in_the_largest_pieces() -> None:
    series_of = {"1.1": "1", "1.2": "1", "2.1": "2"}
    study = Found("study", "9")
    assert to_ask(study, series_of, ["1.1", "1.2", "2.1"]) == [study]
    assert to_ask(study, series_of, ["1.2", "2.1"]) == [Found("series", "9", "2"), Found("image", "9", "1", "1.2")]
    assert to_ask(study, series_of, []) == []


def test_a_study_that_changes_while_it_is_downloaded_is_not_delivered(
    bench: DownloadBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pacs,) = bench.services.fleet
    listed = list(pacs.instances(Found("study", bench.study)))
    bench.store(f"{bench.study}.2")
    monkeypatch.setattr(pacs, "instances", lambda _: iter(listed))
    with pytest.raises(PacsMisanswered, match="did not list"):
        bench.download(bench.url("a.zip"))
    monkeypatch.undo()
    listed = list(pacs.instances(Found("study", bench.study)))
    pacs.delete(next(one for one in listed), permanent=True)
    monkeypatch.setattr(pacs, "instances", lambda _: iter(listed))
    with pytest.raises(PacsMisanswered, match="3 of 4 images"):
        bench.download(bench.url("a.zip"))
    assert everything_below(bench.folder) == set()


def test_only_the_folders_of_the_settings_are_written_to(
    bench: DownloadBench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (bench.folder / "link").symlink_to(outside)
    for url in (
        (outside / "a.zip").as_uri(),
        bench.url("link/a.zip"),
        bench.url("../a.zip"),
        bench.folder.as_uri(),
        "file://elsewhere/a.zip",
        "file:a.zip",
        "s3://elsewhere/a.zip",
        "s3:/out",
        "az://account/container/a.zip",
        "ftp://host/a.zip",
        "a.zip",
    ):
        with pytest.raises(InvalidRequest) as caught:
            bench.download(url)
        assert caught.value.details["reason"] == "not_allowed"
    assert everything_below(outside) == everything_below(bench.folder) == set()


def test_a_link_that_is_put_in_the_way_later_leads_nowhere(
    bench: DownloadBench, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    archive = bench.services.destinations.archive(bench.url("sub/a.zip"))
    (bench.folder / "sub").symlink_to(outside)
    monkeypatch.setattr(bench.services.destinations, "archive", lambda _: archive)
    with pytest.raises(InvalidRequest) as caught:
        bench.download(bench.url("sub/a.zip"))
    assert caught.value.details["reason"] == "not_allowed"
    assert everything_below(outside) == set()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EACCES, "denied"), (errno.EROFS, "denied")],
)
@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_disk_that_takes_no_more_is_named_and_left_clean(
    bench: DownloadBench, monkeypatch: pytest.MonkeyPatch, number: int, reason: str, form: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidRequest) as caught:
        bench.download(bench.url("a"), format=form)
    assert caught.value.details["reason"] == reason
    assert everything_below(bench.folder) == set()


def test_trouble_that_may_pass_is_tried_again(bench: DownloadBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "trouble")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SourceUnreachable):
        bench.download(bench.url("a.zip"))


def test_a_file_of_somebody_else_is_left_alone(bench: DownloadBench) -> None:
    (bench.folder / "a.zip").write_bytes(b"mine")
    (bench.folder / "b").mkdir()
    (bench.folder / "b/mine.txt").write_bytes(b"mine")
    for name, form in (("a.zip", "zip"), ("a.zip", "files"), ("b", "files"), ("b", "zip")):
        with pytest.raises(InvalidRequest) as caught:
            bench.download(bench.url(name), format=form)
        assert caught.value.details["reason"] == "exists"
    assert everything_below(bench.folder) == {"a.zip", "b/mine.txt"}


def test_two_jobs_do_not_write_to_one_place_at_once(bench: DownloadBench) -> None:
    url = bench.url("a.zip")
    holder = bench.run()
    bench.services.ledger.lock_destination(
        hashlib.sha256(url.encode()).hexdigest(), job_id=holder.job_id, fence=holder.fence
    )
    with pytest.raises(Postpone, match="j1"):
        bench.download(url)


def test_a_cancelled_job_ends_while_it_transfers(bench: DownloadBench) -> None:
    attempt = bench.run()
    bench.services.ledger.cancel(attempt.job_id)
    with pytest.raises(Cancelled):
        download({"study_uid": bench.study, "destination": bench.url("a.zip")}, attempt, bench.services)
    assert everything_below(bench.folder) == set()


def test_a_study_that_nobody_has_and_fields_that_are_wrong_are_refused(bench: DownloadBench) -> None:
    bench.study = new_uid()
    with pytest.raises(NotFound):
        bench.download(bench.url("a.zip"))
    for wrong in ({"format": "tar"}, {"mode": "elsewhere"}, {"destination": ""}):
        with pytest.raises(InvalidRequest):
            bench.download(**{"destination": bench.url("a.zip"), **wrong})


def test_an_archive_in_s3_appears_whole_and_is_known_again(cloud: DownloadBench, bucket: Any) -> None:
    payload = cloud.download("s3://out/2026/study.zip")
    content = bucket.get_object(Bucket="out", Key="2026/study.zip")["Body"].read()
    assert opened(content)[0] == cloud.files
    assert (payload["archive_bytes"], payload["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert cloud.download("s3://out/2026/study.zip")["status"] == "already_there"
    bucket.put_object(Bucket="out", Key="mine.zip", Body=b"mine")
    with pytest.raises(InvalidRequest, match="something else"):
        cloud.download("s3://out/mine.zip")


def test_a_large_archive_goes_to_s3_in_parts_and_a_failed_one_leaves_none(
    cloud: DownloadBench, bucket: Any, sandbox: Any
) -> None:
    for _ in range(2):
        cloud.store(f"{cloud.study}.3", side=2400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.jobs.download.COMPRESS_LEVEL", 0)
        sandbox.set_fault("msdicom", "retrieve", truncate=True)
        with pytest.raises(CourierError):
            cloud.download("s3://out/large.zip")
        assert bucket.list_objects_v2(Bucket="out").get("Contents", []) == []
        assert bucket.list_multipart_uploads(Bucket="out").get("Uploads", []) == []
        sandbox.reset_faults()
        killed, theirs = (bucket.create_multipart_upload(Bucket="out", Key="large.zip")["UploadId"] for _ in range(2))
        cloud.services.ledger.upload_begun("s3://out/large.zip", killed)
        payload = cloud.download("s3://out/large.zip")
    assert payload["archive_bytes"] > 2 * 8 * 1_048_576
    assert bucket.head_object(Bucket="out", Key="large.zip")["ETag"].strip('"').endswith("-3")
    assert opened(bucket.get_object(Bucket="out", Key="large.zip")["Body"].read())[0] == cloud.files
    (left,) = bucket.list_multipart_uploads(Bucket="out")["Uploads"]
    assert left["UploadId"] == theirs
    bucket.abort_multipart_upload(Bucket="out", Key="large.zip", UploadId=theirs)


@pytest.fixture(scope="module")
def ignoring(rclone: str) -> str:
    """An S3 that ignores the conditions of a write, with the bucket "out"."""
    keys = {"aws_access_key_id": "COURIERTESTKEY", "aws_secret_access_key": "couriertestsecret"}
    client = s3_client(rclone, **keys)
    client.create_bucket(Bucket="out")
    client.close()
    return rclone


@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_download_says_whether_its_store_prevents_that_anything_is_overwritten(
    bucket: Any, moto: str, ignoring: str, sandbox: Any, tmp_path: Path, form: str
) -> None:
    for endpoint, warnings in ((moto, []), (ignoring, ["overwrite_not_prevented"])):
        bench = bench_on("msdicom", sandbox.msdicom, tmp_path, s3=endpoint)
        place = f"s3://out/{bench.study}/a?b"
        assert bench.download(place, format=form)["warnings"] == warnings
        again = bench.download(place, format=form)
        assert (again["status"], again["warnings"], again["destination"]) == ("already_there", [], place)


def overtaken(bench: DownloadBench, place: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next download finds that another attempt has brought the same while it was at work."""
    (pacs,) = bench.services.fleet
    retrieve = pacs.retrieve

    def overtake(found: Found, **view: Any) -> Any:
        monkeypatch.setattr(pacs, "retrieve", retrieve)
        monkeypatch.setattr(bench.services.ledger, "lock_destination", lambda *_, **__: None)  # it has lost its lease
        assert bench.download(place, format=form)["status"] == "downloaded"
        return retrieve(found, **view)

    monkeypatch.setattr(pacs, "retrieve", overtake)


def test_the_same_archive_that_another_attempt_brings_meanwhile_is_already_there(
    cloud: DownloadBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken(cloud, "s3://out/twice.zip", "zip", monkeypatch)
    assert cloud.download("s3://out/twice.zip")["status"] == "already_there"


def test_files_that_another_attempt_brings_meanwhile_are_looked_at_again_and_then_already_there(
    cloud: DownloadBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken(cloud, "s3://out/twice", "files", monkeypatch)
    with pytest.raises(SourceUnreachable, match="tried again"):
        cloud.download("s3://out/twice", format="files")
    assert cloud.download("s3://out/twice", format="files")["status"] == "already_there"


def test_files_in_s3_are_resumed_and_whole_with_their_manifest(cloud: DownloadBench, bucket: Any) -> None:
    first, *_ = cloud.files
    bucket.put_object(Bucket="out", Key=f"study/{first}", Body=cloud.files[first])
    payload = cloud.download("s3://out/study", format="files")
    assert payload["resumed"] == 1
    keys = {entry["Key"] for entry in bucket.list_objects_v2(Bucket="out")["Contents"]}
    assert keys == {f"study/{name}" for name in (*cloud.files, "manifest.json")}
    assert cloud.download("s3://out/study/", format="files")["status"] == "already_there"
    bucket.put_object(Bucket="out", Key="mixed/mine.txt", Body=b"mine")
    with pytest.raises(InvalidRequest, match="something else"):
        cloud.download("s3://out/mixed", format="files")


@pytest.mark.parametrize("form", ["zip", "files"])
def test_a_bucket_that_is_missing_and_an_endpoint_that_is_down_are_told_apart(
    cloud: DownloadBench, moto: str, sandbox: Any, tmp_path: Path, form: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        cloud.download("s3://absent/a", format=form)
    assert caught.value.details["reason"] == "missing"
    down = bench_on("msdicom", sandbox.msdicom, tmp_path, s3=f"http://{HOST}:{parts.free_port()}")
    with pytest.raises(SourceUnreachable):
        down.download("s3://out/a", format=form)


def test_a_study_that_a_batch_deletes_is_kept_in_s3_and_comes_back(
    batch_site: Callable[..., BatchSite], bucket: Any, moto: str, sandbox: SandboxPart
) -> None:
    s3 = {"buckets": ["out"], "endpoint_url": moto, "region": "us-east-1"}
    site, study = batch_site(sandbox.servers(), downloads={"s3": s3}), new_uid()
    uids = site.put("msdicom", study)
    payload(site.delete(study, servers=["msdicom"], backup="s3://out/kept"))
    (entry,) = bucket.list_objects_v2(Bucket="out")["Contents"]
    assert entry["Key"].startswith(f"kept/{site.batch}/msdicom/{study}-")
    assert site.on("msdicom", study) == set()
    payload(site.go_on(Coordinator.undo, "undo"))
    assert (site.ends("undo"), site.on("msdicom", study)) == (["undone"], uids)


def test_what_a_batch_writes_to_a_store_that_prevents_nothing_has_the_warning(
    batch_site: Callable[..., BatchSite], ignoring: str, sandbox: SandboxPart
) -> None:
    s3 = {"buckets": ["out"], "endpoint_url": ignoring, "region": "us-east-1"}
    site, study = batch_site(sandbox.servers(), downloads={"s3": s3}), new_uid()
    site.put("msdicom", study)
    message = {"items": [study], "destination": f"s3://out/{study}"}
    payload(site.see_to_its_end("pacs.batch.download", download_all, site.batch, message))
    (row,) = site.rows
    assert (row.outcome.status, row.outcome.result["warnings"]) == ("downloaded", ["overwrite_not_prevented"])
    site.batch = "backups"
    payload(site.delete(study, servers=["msdicom"], backup="s3://out/kept"))
    (row,) = site.rows
    assert (row.outcome.status, row.outcome.result["warnings"]) == ("deleted", ["overwrite_not_prevented"])


def test_the_first_bytes_of_a_file_say_whose_it_is() -> None:
    content = image(new_uid())
    reading, told = Reading(), list[tuple[int, Instance]]()
    for at in range(0, len(content), 16):
        reading.feed(content[at : at + 16])
        if reading.instance is not None:
            told.append((at, reading.instance))
    assert told[0][0] < 1500
    assert {instance for _, instance in told} == {identify(io.BytesIO(content))}
