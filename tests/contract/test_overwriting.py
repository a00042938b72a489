"""Nothing at a destination is overwritten: S3 that keeps conditions (moto) and S3 that ignores them (rclone)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from botocore.exceptions import ClientError

from courier.errors import InvalidRequest, SourceUnreachable
from courier.ledger.jobs import Ledger
from courier.settings import DownloadSettings, S3Settings, Settings
from sandbox.synthetic import new_uid
from tests.servers.s3 import s3_client
from worker.jobs.attempt import Attempt
from worker.jobs.servers import status
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.storage.bucket import PART_BYTES, PROBE
from worker.storage.destinations import Archive, Destinations, StudyFingerprint
from worker.storage.sources import Sources

MARK = StudyFingerprint.of("1.2.3", ["1.2.3.4"])
SMALL, LARGE = [b"ours"], [b"x" * PART_BYTES, b"the end"]


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


class SharedBucket:
    """A new bucket, another program that uses it, and workers that may write to it."""

    def __init__(self, endpoint_url: str) -> None:
        self.theirs: Any = s3_client(endpoint_url)
        self.bucket = f"out-{new_uid().rpartition('.')[2][:20]}"
        self.theirs.create_bucket(Bucket=self.bucket)
        self.settings = DownloadSettings(
            s3=S3Settings(buckets=(self.bucket, "other-*"), endpoint_url=endpoint_url, region="us-east-1")
        )
        self.ledger = Ledger(fakeredis.FakeRedis(decode_responses=True))
        self.sent: list[str] = []

    def worker(self, ledger: Ledger | None = None) -> Destinations:
        """Another process; its requests are counted in ``sent``."""
        destinations = Destinations(self.settings, ledger or self.ledger)
        destinations._chosen("s3://")._bucket(self.url("x"), beside="")  # type: ignore[union-attr,call-arg]
        self.client_of(destinations).meta.events.register("before-call.s3", self._count)
        return destinations

    @staticmethod
    def client_of(destinations: Destinations) -> Any:
        return destinations._s3._client

    def _count(self, model: Any, **_: Any) -> None:
        self.sent.append(model.name)

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, body: bytes = b"theirs") -> None:
        self.theirs.put_object(Bucket=self.bucket, Key=key, Body=body)

    def read(self, key: str) -> bytes:
        content: bytes = self.theirs.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def keys(self) -> set[str]:
        return {one["Key"] for one in self.theirs.list_objects_v2(Bucket=self.bucket).get("Contents", ())}

    def begin_upload(self, key: str) -> str:
        return str(self.theirs.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"])

    def uploads(self) -> set[str]:
        try:
            found = self.theirs.list_multipart_uploads(Bucket=self.bucket)
        except self.theirs.exceptions.NoSuchUpload:  # how rclone says that there is none
            return set()
        return {one["UploadId"] for one in found.get("Uploads") or ()}


@pytest.fixture
def keeping(moto: str) -> SharedBucket:
    return SharedBucket(moto)


@pytest.fixture
def ignoring(rclone: str) -> SharedBucket:
    return SharedBucket(rclone)


@pytest.fixture(params=["keeping", "ignoring"])
def store(request: pytest.FixtureRequest) -> SharedBucket:
    found: SharedBucket = request.getfixturevalue(request.param)
    return found


def then(chunks: list[bytes], act: Callable[[], object]) -> Iterator[bytes]:
    """The chunks, and what another program does before the last of them has come."""
    yield from chunks[:-1]
    act()
    yield chunks[-1]


def reason(write: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        write()
    return str(caught.value.details["reason"])


# --- a question changes nothing -------------------------------------------------------------------------------------


def test_the_question_whether_a_destination_exists_leaves_uploads_to_it_alone(keeping: SharedBucket) -> None:
    theirs = {keeping.begin_upload(key) for key in ("a.zip", "a.zip/manifest.json", "a.zip/1/2.dcm")}
    worker = keeping.worker()
    assert worker.archive(keeping.url("a.zip")).read_fingerprint() is None
    assert worker.files(keeping.url("a.zip")).read_fingerprint() is None
    assert worker.files(keeping.url("a.zip")).names() == set()
    assert keeping.uploads() == theirs
    assert not {one for one in keeping.sent if one.startswith(("Abort", "Delete", "Put", "Create", "ListMultipart"))}


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_a_download_leaves_the_uploads_of_another_program_to_the_same_name_alone(
    keeping: SharedBucket, chunks: list[bytes]
) -> None:
    theirs = keeping.begin_upload("a.zip")
    keeping.worker().archive(keeping.url("a.zip")).write(iter(chunks), MARK)
    assert keeping.uploads() == {theirs}
    assert keeping.read("a.zip") == b"".join(chunks)


def test_an_upload_that_a_killed_worker_left_is_ended_by_the_next_write_and_no_other_one_is(
    keeping: SharedBucket,
) -> None:
    ours, theirs = keeping.begin_upload("a.zip"), keeping.begin_upload("a.zip")
    elsewhere = keeping.begin_upload("b.zip")
    for key, upload_id in (("a.zip", ours), ("b.zip", elsewhere), ("a.zip", "gone")):
        keeping.ledger.upload_begun(keeping.url(key), upload_id)
    keeping.worker().archive(keeping.url("a.zip")).write(iter(LARGE), MARK)
    assert keeping.uploads() == {theirs, elsewhere}
    assert keeping.ledger.uploads_begun(keeping.url("a.zip")) == set()
    assert keeping.ledger.uploads_begun(keeping.url("b.zip")) == {elsewhere}


def test_a_worker_that_is_killed_has_recorded_its_upload_and_one_that_fails_has_ended_it(keeping: SharedBucket) -> None:
    archive = keeping.worker().archive(keeping.url("a.zip"))
    seen: set[str] = set()

    def fail() -> None:
        seen.update(keeping.ledger.uploads_begun(keeping.url("a.zip")) & keeping.uploads())
        raise SourceUnreachable("The server is gone.")

    with pytest.raises(SourceUnreachable, match="server is gone"):
        archive.write(then([b"x" * PART_BYTES] * 3, fail), MARK)
    assert len(seen) == 1
    assert (keeping.uploads(), keeping.ledger.uploads_begun(keeping.url("a.zip")), keeping.keys()) == (
        set(),
        set(),
        set(),
    )


# --- what another program wrote meanwhile ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
@pytest.mark.parametrize("key", ["a.zip", "day?1/a#b.zip"])
def test_what_another_program_wrote_meanwhile_stays(store: SharedBucket, chunks: list[bytes], key: str) -> None:
    archive = store.worker().archive(store.url(key))
    assert archive.read_fingerprint() is None
    assert reason(lambda: archive.write(then(chunks, lambda: store.put(key)), MARK)) == "exists"
    assert (store.read(key), store.keys(), store.uploads()) == (b"theirs", {key}, set())
    assert store.ledger.uploads_begun(store.url(key)) == set()


def test_a_manifest_of_another_program_stays_and_the_download_is_none(store: SharedBucket) -> None:
    files = store.worker().files(store.url("study"))
    files.write("1/2.dcm", iter([b"ours"]))
    store.put("study/manifest.json")
    assert reason(lambda: files.finish(b"{}")) == "exists"
    assert store.read("study/manifest.json") == b"theirs"


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_a_file_that_appears_meanwhile_stays_and_is_looked_at_by_the_next_attempt(
    store: SharedBucket, chunks: list[bytes]
) -> None:
    files = store.worker().files(store.url("study"))
    assert files.names() == set()
    with pytest.raises(SourceUnreachable, match=r"study/1/2\.dcm"):
        files.write("1/2.dcm", then(chunks, lambda: store.put("study/1/2.dcm")))
    assert store.read("study/1/2.dcm") == b"theirs"


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_a_file_of_an_unfinished_download_is_replaced_only_as_it_was_seen(
    store: SharedBucket, chunks: list[bytes]
) -> None:
    store.put("study/1/2.dcm", b"half of it")
    files = store.worker().files(store.url("study"))
    assert files.names() == {"1/2.dcm"}
    with pytest.raises(SourceUnreachable):
        files.write("1/2.dcm", then(chunks, lambda: store.put("study/1/2.dcm", b"changed")))
    assert store.read("study/1/2.dcm") == b"changed"
    assert files.names() == {"1/2.dcm"}
    files.write("1/2.dcm", iter(chunks))
    assert store.read("study/1/2.dcm") == b"".join(chunks)


# --- stores that ignore the condition -------------------------------------------------------------------------------


def test_a_write_says_whether_the_store_prevents_that_anything_is_replaced(
    keeping: SharedBucket, ignoring: SharedBucket
) -> None:
    for store, prevented in ((keeping, True), (ignoring, False)):
        for chunks in (SMALL, LARGE):
            archive: Archive = store.worker().archive(store.url(f"{len(chunks)}.zip"))
            archive.write(iter(chunks), MARK)
            assert archive.overwrites_prevented is prevented
            assert store.read(f"{len(chunks)}.zip") == b"".join(chunks)
            assert archive.read_fingerprint() == MARK
        files = store.worker().files(store.url("study"))
        files.write("1/2.dcm", iter(SMALL))
        files.finish(b"{}")
        assert files.overwrites_prevented is prevented


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_where_nothing_is_prevented_what_another_program_wrote_after_ours_is_never_told_as_ours(
    ignoring: SharedBucket, monkeypatch: pytest.MonkeyPatch, chunks: list[bytes]
) -> None:
    worker = ignoring.worker()
    client = ignoring.client_of(worker)
    for name in ("put_object", "complete_multipart_upload"):
        inner = getattr(client, name)

        def overtaken(inner: Any = inner, **request: Any) -> Any:
            answer = inner(**request)
            if PROBE not in request["Key"]:
                ignoring.put(request["Key"], b"later")
            return answer

        monkeypatch.setattr(client, name, overtaken)
    archive = worker.archive(ignoring.url("a.zip"))
    assert reason(lambda: archive.write(iter(chunks), MARK)) == "exists"
    assert ignoring.read("a.zip") == b"later"


def test_a_store_that_keeps_one_condition_and_ignores_the_other_is_told_for_each(keeping: SharedBucket) -> None:
    worker = keeping.worker()

    def strip(request: Any, **_: Any) -> None:
        del request.headers["If-None-Match"]

    keeping.client_of(worker).meta.events.register("before-sign.s3.CompleteMultipartUpload", strip)
    small, large = worker.archive(keeping.url("small.zip")), worker.archive(keeping.url("large.zip"))
    small.write(iter(SMALL), MARK)
    large.write(iter(LARGE), MARK)
    assert (small.overwrites_prevented, large.overwrites_prevented) == (True, False)


def test_a_place_is_probed_once_for_all_workers_and_nothing_is_left_of_it(store: SharedBucket) -> None:
    first, second = store.worker(), store.worker()
    for worker in (first, first, second):
        number = len(store.keys())
        worker.archive(store.url(f"a/{number}.zip")).write(iter(SMALL), MARK)
    assert store.keys() == {f"a/{number}.zip" for number in range(3)}
    assert store.sent.count("DeleteObject") == 1
    assert store.sent.count("PutObject") == 3 + 2
    assert store.uploads() == set()


def test_only_places_with_a_name_are_probed_by_the_doctor(keeping: SharedBucket, ignoring: SharedBucket) -> None:
    assert keeping.worker().places == [keeping.url("")]
    assert (keeping.worker().probe(keeping.url("")), ignoring.worker().probe(ignoring.url(""))) == (True, False)
    assert keeping.keys() == ignoring.keys() == set()


def test_a_prefix_that_is_a_destination_is_never_probed_within(keeping: SharedBucket) -> None:
    worker, names = keeping.worker(), []
    client = keeping.client_of(worker)
    client.meta.events.register("before-parameter-build.s3.PutObject", lambda params, **_: names.append(params["Key"]))
    files = worker.files(keeping.url("day/study/"))
    files.write("1/2.dcm", iter(SMALL))
    assert [name.startswith(f"day/{PROBE}") for name in names] == [True, True, False]
    keeping.put(f"day/study/{PROBE}left")
    assert files.names() == {"1/2.dcm"}


def test_a_probe_that_may_not_be_removed_is_named_in_the_log(
    keeping: SharedBucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = keeping.worker()
    monkeypatch.setattr(keeping.client_of(worker), "delete_object", failing(403, "AccessDenied"))
    archive = worker.archive(keeping.url("a.zip"))
    archive.write(iter(SMALL), MARK)
    assert archive.overwrites_prevented
    (left,) = keeping.keys() - {"a.zip"}
    assert f"s3://{keeping.bucket}/{left}" in caplog.text


@pytest.mark.parametrize("may_delete_versions", [True, False])
def test_of_a_probe_in_a_bucket_with_versions_no_version_is_left_that_may_be_removed(
    keeping: SharedBucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, may_delete_versions: bool
) -> None:
    enabled = {"Status": "Enabled"}
    keeping.theirs.put_bucket_versioning(Bucket=keeping.bucket, VersioningConfiguration=enabled)
    worker = keeping.worker()
    client = keeping.client_of(worker)
    inner, fail = client.delete_object, failing(403, "AccessDenied")

    def delete(**request: Any) -> Any:
        return fail() if "VersionId" in request and not may_delete_versions else inner(**request)

    monkeypatch.setattr(client, "delete_object", delete)
    assert worker.probe(keeping.url(""))
    left = keeping.theirs.list_object_versions(Bucket=keeping.bucket)
    assert keeping.keys() == set()
    assert bool(left.get("Versions")) is not may_delete_versions
    assert not caplog.text


def failing(status: int, code: str) -> Callable[..., Any]:
    def fail(**_: Any) -> Any:
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, "any")  # type: ignore[arg-type]  # as much of an answer as is looked at

    return fail


@pytest.mark.parametrize(
    ("status", "code", "may_write"),
    [(403, "AccessDenied", True), (501, "NotImplemented", False), (400, "InvalidArgument", False)],
)
def test_where_a_probe_is_not_taken_nothing_counts_as_prevented(
    keeping: SharedBucket, monkeypatch: pytest.MonkeyPatch, status: int, code: str, may_write: bool
) -> None:
    worker = keeping.worker()
    client = keeping.client_of(worker)
    inner, fail = client.put_object, failing(status, code)

    def put(**request: Any) -> Any:
        refused = PROBE in request["Key"] if may_write else "IfNoneMatch" in request
        return fail() if refused else inner(**request)

    monkeypatch.setattr(client, "put_object", put)
    archive = worker.archive(keeping.url("a.zip"))
    assert reason(lambda: archive.write(then([b"a", b"b"], lambda: keeping.put("a.zip")), MARK)) == "exists"
    fresh = worker.archive(keeping.url("b.zip"))
    fresh.write(iter(SMALL), MARK)
    assert not fresh.overwrites_prevented
    assert keeping.keys() == {"a.zip", "b.zip"}


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_a_bucket_whose_policy_requires_the_condition_of_every_write_is_probed_and_written_to(
    keeping: SharedBucket, monkeypatch: pytest.MonkeyPatch, chunks: list[bytes]
) -> None:
    worker = keeping.worker()
    client = keeping.client_of(worker)
    for name in ("put_object", "complete_multipart_upload"):
        inner, fail = getattr(client, name), failing(403, "AccessDenied")

        def write(inner: Any = inner, fail: Any = fail, **request: Any) -> Any:
            return inner(**request) if "IfNoneMatch" in request else fail()

        monkeypatch.setattr(client, name, write)
    archive = worker.archive(keeping.url("a.zip"))
    archive.write(iter(chunks), MARK)
    assert archive.overwrites_prevented
    assert keeping.keys() == {"a.zip"}


@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_a_store_that_could_not_be_probed_is_asked_for_the_condition_all_the_same(
    keeping: SharedBucket, monkeypatch: pytest.MonkeyPatch, chunks: list[bytes]
) -> None:
    worker = keeping.worker()
    client = keeping.client_of(worker)
    inner, fail = client.put_object, failing(403, "AccessDenied")
    monkeypatch.setattr(client, "put_object", lambda **asked: (fail if PROBE in asked["Key"] else inner)(**asked))
    head = client.head_object

    def head_then_write(**asked: Any) -> Any:
        """Another program writes just after the object was looked for."""
        try:
            return head(**asked)
        finally:
            keeping.put(asked["Key"])

    monkeypatch.setattr(client, "head_object", head_then_write)
    archive = worker.archive(keeping.url("a.zip"))
    assert reason(lambda: archive.write(iter(chunks), MARK)) == "exists"
    assert keeping.read("a.zip") == b"theirs"
    assert keeping.uploads() == set()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (409, "ConditionalRequestConflict", SourceUnreachable),
        (412, "PreconditionFailed", InvalidRequest),
        (404, "NoSuchUpload", SourceUnreachable),
        (404, "NoSuchBucket", InvalidRequest),
        (503, "SlowDown", SourceUnreachable),
    ],
)
@pytest.mark.parametrize("chunks", [SMALL, LARGE], ids=["put", "parts"])
def test_an_answer_to_a_conditional_write_is_judged(
    keeping: SharedBucket,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    kind: type[Exception],
    chunks: list[bytes],
) -> None:
    worker = keeping.worker()
    worker.probe(keeping.url(""))
    for name in ("put_object", "complete_multipart_upload"):
        monkeypatch.setattr(keeping.client_of(worker), name, failing(status, code))
    with pytest.raises(kind):
        worker.archive(keeping.url("a.zip")).write(iter(chunks), MARK)
    assert keeping.uploads() == set()


def test_a_worker_tells_of_each_bucket_of_its_settings_if_it_is_asked(
    keeping: SharedBucket, ignoring: SharedBucket
) -> None:
    for store, overwrites in ((keeping, "prevented"), (ignoring, "not_prevented")):
        named = [store.bucket, "missing-bucket", "pattern-*"]
        s3 = store.settings.s3.model_copy(update={"buckets": tuple(named)})
        settings = Settings(downloads=DownloadSettings(s3=s3))
        destinations = Destinations(settings.downloads, store.ledger)
        services = Services(settings, store.ledger, Sources(settings.sources), Fleet([]), destinations=destinations)
        taken = store.ledger.take("j1", task="pacs.status", job={})
        attempt = Attempt("j1", taken.fence, 1, last=False, ledger=store.ledger)
        assert status({}, attempt, services)["places"] == []
        there, missing = status({"places": True}, attempt, services)["places"]
        assert (there["place"], there["overwrites"]) == (store.url(""), overwrites)
        assert (missing["place"], missing["overwrites"]) == ("s3://missing-bucket/", "unknown")
        assert "no such bucket" in missing["message"]
        assert store.keys() == set()


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_file_that_appears_meanwhile_in_a_folder_stays(tmp_path: Path) -> None:
    archive = Destinations(DownloadSettings(folders=(tmp_path,))).archive((tmp_path / "a.zip").as_uri())
    assert archive.read_fingerprint() is None
    act = lambda: (tmp_path / "a.zip").write_bytes(b"theirs")  # noqa: E731
    assert reason(lambda: archive.write(then([b"a", b"b"], act), MARK)) == "exists"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.zip": b"theirs"}
    assert archive.overwrites_prevented


def test_a_file_system_without_links_cannot_promise_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    archive = Destinations(DownloadSettings(folders=(tmp_path,))).archive((tmp_path / "a.zip").as_uri())
    archive.write(iter(SMALL), MARK)
    assert not archive.overwrites_prevented
    assert reason(lambda: archive.write(iter(SMALL), MARK)) == "exists"


def test_two_attempts_never_write_into_one_file(tmp_path: Path) -> None:
    url = (tmp_path / "a.zip").as_uri()
    first, second = (Destinations(DownloadSettings(folders=(tmp_path,))).archive(url) for _ in range(2))

    def overtake() -> None:
        with pytest.raises(SourceUnreachable, match="another attempt"):
            second.write(iter([b"second"]), MARK)

    first.write(then([b"fir", b"st"], overtake), MARK)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.zip": b"first"}


@pytest.mark.parametrize("left", ["half of it", "a link to a finished download"])
def test_what_a_killed_attempt_left_beside_is_written_anew_and_a_finished_download_is_not_emptied(
    tmp_path: Path, left: str
) -> None:
    finished, temporary = tmp_path / "moved away.zip", tmp_path / ".a.zip.unfinished"
    finished.write_bytes(b"finished")
    if left == "half of it":
        temporary.write_bytes(b"half of a longer one")
    else:
        os.link(finished, temporary)
    archive = Destinations(DownloadSettings(folders=(tmp_path,))).archive((tmp_path / "a.zip").as_uri())
    archive.write(iter(SMALL), MARK)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"moved away.zip": b"finished", "a.zip": b"ours"}
