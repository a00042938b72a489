"""Credentials of the worker that stores and servers refuse: whose trouble it is, and that jobs wait, not fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from courier.errors import (
    CourierError,
    InvalidRequest,
    PacsUnauthorized,
    SourceDenied,
    SourceNotFound,
    SourceUnauthorized,
    SourceUnreachable,
)
from courier.ledger.breakers import BREAKER, Breakers
from courier.ledger.slots import Slots
from courier.settings import (
    PREFIX,
    AzureSettings,
    DownloadSettings,
    S3Settings,
    ServerSettings,
    SettingsError,
    SourceSettings,
)
from sandbox.images import ImageServer
from sandbox.processes import HOST, RedisPart, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches.coordinator import Coordinator
from worker.batches.uploads import upload_all
from worker.jobs.runner import Deferred, Failed
from worker.jobs.services import Services
from worker.pacs.credentials import Fixed
from worker.pacs.guard import Guard
from worker.pacs.guarded import GuardedTransport
from worker.pacs.transport import Request
from worker.storage.destinations import Destinations
from worker.storage.s3_source import check_credentials
from worker.storage.sources import Sources
from worker.storage.study_marks import StudyFingerprint

KEY_ID, SECRET = "COURIERTESTS", "hush-hush-secret"
ACCOUNT_KEY = "aHVzaC1odXNoLXNlY3JldA=="


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AZURE_KEY": ACCOUNT_KEY,
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def sources(image_server: ImageServer, client: fakeredis.FakeRedis) -> Iterator[Sources]:
    sources = Sources(source_settings(image_server), breakers=Breakers(client))
    yield sources
    sources.close()


def s3(image_server: ImageServer) -> S3Settings:
    return S3Settings(buckets=("*",), endpoint_url=image_server.base, region="us-east-1")


def azure(image_server: ImageServer) -> AzureSettings:
    return AzureSettings(containers=("*",), account_url=f"{image_server.base}/account", account_key_env="AZURE_KEY")


def source_settings(image_server: ImageServer) -> SourceSettings:
    hosts = {"allow_hosts": (f"{HOST}:*",), "allow_private_networks": True}
    return SourceSettings.model_validate({**hosts, "s3": s3(image_server), "azure": azure(image_server)})


def of_s3(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{SECRET} {KEY_ID}</Message></Error>".encode()


def answer(images: ImageServer, name: str, status: int, code: str, *, body: bytes | None = None) -> None:
    """Have both stores answer so for ``images/name``."""
    images.put(f"images/{name}", of_s3(code) if body is None else body, status=status)
    headers = {"x-ms-error-code": code, "x-ms-request-id": "1"} if code else {}
    images.put(f"account/images/{name}", body or b"", status=status, headers=headers)


def error_of(ask: Callable[[], object]) -> CourierError:
    with pytest.raises(CourierError) as caught:
        ask()
    for secret in (SECRET, KEY_ID, ACCOUNT_KEY, "sig="):
        assert secret not in str(caught.value) + repr(caught.value.payload)
    return caught.value


@pytest.mark.parametrize(
    ("scheme", "status", "code", "kind", "advice"),
    [
        ("s3", 400, "ExpiredToken", SourceUnauthorized, "the session token has expired"),
        ("s3", 403, "RequestTimeTooSkewed", SourceUnauthorized, "keep time by NTP"),
        ("s3", 403, "InvalidAccessKeyId", SourceUnauthorized, "give the worker the new one"),
        ("s3", 403, "SignatureDoesNotMatch", SourceUnauthorized, "the secret key is not that of the access key"),
        ("s3", 400, "AuthorizationHeaderMalformed", SourceUnauthorized, "set region"),
        ("s3", 401, "AuthFailure", SourceUnauthorized, "(AuthFailure)"),
        ("s3", 403, "AccessDenied", SourceDenied, "check what the worker's credential may do"),
        ("s3", 403, "InvalidObjectState", SourceDenied, "is archived (InvalidObjectState): restore it"),
        ("s3", 404, "NoSuchBucket", SourceNotFound, "no such bucket (NoSuchBucket)"),
        ("s3", 404, "NoSuchKey", SourceNotFound, "no such object (NoSuchKey)"),
        ("az", 403, "AuthenticationFailed", SourceUnauthorized, "the worker's clock is wrong"),
        ("az", 403, "AuthorizationFailure", SourceUnauthorized, "sources.azure (AuthorizationFailure)"),
        ("az", 401, "NoAuthenticationInformation", SourceUnauthorized, "renew"),
        ("az", 403, "KeyBasedAuthenticationNotPermitted", SourceUnauthorized, "use a SAS token"),
        ("az", 403, "AuthorizationPermissionMismatch", SourceDenied, "check what the worker's credential may do"),
        ("az", 409, "BlobArchived", SourceDenied, "is archived (BlobArchived): restore it"),
        ("az", 404, "ContainerNotFound", SourceNotFound, "(ContainerNotFound)"),
    ],
)
def test_a_refusal_is_quoted_with_its_remedy_and_without_secrets(
    sources: Sources,
    image_server: ImageServer,
    scheme: str,
    status: int,
    code: str,
    kind: type[CourierError],
    advice: str,
) -> None:
    answer(image_server, "a.dcm", status, code)
    error = error_of(lambda: sources.fetch(f"{scheme}://images/a.dcm"))
    assert type(error) is kind
    assert advice in error.message
    assert code in error.message
    assert (error.open_circuit is not None) == (kind is SourceUnauthorized)


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_while_a_credential_is_refused_neither_fetches_nor_lists_are_sent_and_another_store_goes_on(
    sources: Sources, image_server: ImageServer, client: fakeredis.FakeRedis, scheme: str
) -> None:
    status, code = (400, "ExpiredToken") if scheme == "s3" else (403, "AuthenticationFailed")
    answer(image_server, "a.dcm", status, code)
    error_of(lambda: sources.fetch(f"{scheme}://images/a.dcm"))
    asked = len(image_server.requests)
    again = error_of(lambda: sources.fetch(f"{scheme}://other/b.dcm"))
    listing = error_of(lambda: list(sources.pages(f"{scheme}://images/")))
    assert again.open_circuit == listing.open_circuit == f"credential:sources.{'s3' if scheme == 's3' else 'azure'}"
    assert len(image_server.requests) == asked
    sources.fetch(image_server.put("by-http.dcm", b"x")).close()
    other = "az" if scheme == "s3" else "s3"
    image_server.put("images/b.dcm", b"b")
    image_server.put("account/images/b.dcm", b"b")
    sources.fetch(f"{other}://images/b.dcm").close()
    client.hset(f"{PREFIX}{BREAKER}{again.open_circuit}", "until_ms", 0)
    fresh = Sources(source_settings(image_server), breakers=Breakers(client))
    fresh.fetch(f"{scheme}://images/b.dcm").close()
    assert not client.exists(f"{PREFIX}{BREAKER}{again.open_circuit}")
    fresh.close()


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_one_denied_object_does_not_stop_the_others_of_its_credential(
    sources: Sources, image_server: ImageServer, scheme: str
) -> None:
    for name in ("images/a.dcm", "account/images/a.dcm"):
        image_server.put(name, b"a")
    answer(image_server, "denied.dcm", 403, "AccessDenied" if scheme == "s3" else "AuthorizationFailure")
    for _ in range(8):
        assert type(error_of(lambda: sources.fetch(f"{scheme}://images/denied.dcm"))) is SourceDenied if _ else True
        sources.fetch(f"{scheme}://images/a.dcm").close()


def test_rights_that_were_taken_away_are_the_credentials_trouble_and_not_the_senders(
    sources: Sources, image_server: ImageServer
) -> None:
    image_server.put("images/a.dcm", b"a")
    sources.fetch("s3://images/a.dcm").close()
    for name in ("a.dcm", "b.dcm"):
        answer(image_server, name, 403, "AccessDenied")
    error = error_of(lambda: sources.fetch("s3://images/b.dcm"))
    assert (error.code, error.open_circuit) == ("source_unauthorized", "credential:sources.s3/images")
    assert "AccessDenied" in error.message


def of_a_head(images: ImageServer, name: str, status: int, code: str) -> None:
    """As S3: the code stands in the body, which no answer to a HEAD has."""
    images.put(f"images/{name}", of_s3(code), status=status)


def test_an_object_that_has_gone_meanwhile_shows_that_the_credential_is_in_order(
    sources: Sources, image_server: ImageServer
) -> None:
    image_server.put("images/a.dcm", b"a")
    sources.fetch("s3://images/a.dcm").close()
    of_a_head(image_server, "a.dcm", 404, "NoSuchKey")
    answer(image_server, "denied.dcm", 403, "AccessDenied")
    for _ in range(8):
        assert type(error_of(lambda: sources.fetch("s3://images/denied.dcm"))) is SourceDenied


@pytest.fixture
def broken_credentials(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """boto looks for them in the files alone, and finds what the parameter says."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "config"
    file.write_text(str(request.param))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(file))


#: Half-written, of a program that is not there or gives no JSON, of a token and of a profile that are not there.
BROKEN = [
    "[default]\naws_access_key_id = A\naws_secret_acc",
    "[default]\ncredential_process = /nonexistent/program\n",
    "[default]\ncredential_process = /bin/echo no-json\n",
    "[default]\nrole_arn = arn:aws:iam::1:role/x\nweb_identity_token_file = /nonexistent/token\n",
    "[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = nowhere\n",
]


@pytest.mark.parametrize("broken_credentials", BROKEN, indirect=True, ids=range(len(BROKEN)))
@pytest.mark.usefixtures("broken_credentials")
def test_credentials_that_cannot_be_read_are_the_workers_trouble_and_jobs_wait_for_them(
    sources: Sources, image_server: ImageServer, client: fakeredis.FakeRedis
) -> None:
    destinations = Destinations(DownloadSettings(s3=s3(image_server)), breakers=Breakers(client))
    questions: dict[str, list[Callable[[], object]]] = {
        "sources": [lambda: sources.fetch("s3://images/a.dcm"), lambda: list(sources.pages("s3://images/"))],
        "downloads": [lambda: destinations.archive("s3://images/a.zip").read_fingerprint()],
    }
    for of, asks in questions.items():
        for ask in asks:
            error = error_of(ask)
            assert (error.code, error.open_circuit) == ("source_unauthorized", f"credential:{of}.s3")
    assert image_server.requests == []


@pytest.mark.parametrize("broken_credentials", BROKEN[:3], indirect=True, ids=range(3))
@pytest.mark.usefixtures("broken_credentials")
def test_a_worker_with_credentials_that_cannot_be_read_does_not_start() -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        check_credentials()


@pytest.mark.parametrize("query", ["?X-Amz-Signature=abc", "?sv=2024&sig=abc"])
def test_a_signed_url_that_is_refused_is_the_senders_own_credential(
    sources: Sources, image_server: ImageServer, query: str
) -> None:
    url = image_server.put("images/a.dcm", of_s3("ExpiredToken"), status=403) + query
    error = error_of(lambda: sources.fetch(url))
    assert (type(error), error.open_circuit) == (SourceDenied, None)


@pytest.mark.parametrize("body", [b"<html>nothing here</html>", b"nothing here", b"", b"<html><p>unclosed"])
@pytest.mark.parametrize("url", ["s3://images/a.dcm", "s3://images/"])
def test_a_404_of_something_that_is_no_s3_does_not_say_that_the_object_is_missing(
    sources: Sources, image_server: ImageServer, body: bytes, url: str
) -> None:
    image_server.put("images/a.dcm", body, status=404)
    image_server.put("images", body, status=404)
    error = error_of(lambda: sources.fetch(url) if not url.endswith("/") else list(sources.pages(url)))
    assert type(error) is SourceUnreachable
    assert "answered by no S3" in error.message
    assert "endpoint_url" in error.message


def test_a_page_for_people_is_no_answer_of_azure(sources: Sources, image_server: ImageServer) -> None:
    for status in (404, 400, 410):
        headers = {"Content-Type": "text/html; charset=utf-8"}
        image_server.put("account/images/a.dcm", b"<html>", status=status, headers=headers)
        error = error_of(lambda: sources.fetch("az://images/a.dcm"))
        assert type(error) is SourceUnreachable
        assert "account_url" in error.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("body", [b"", b"<Error><Code>TemporaryRedirect</Code></Error>", b"<html>"])
def test_a_redirect_to_itself_is_no_fault_of_the_worker(
    sources: Sources, image_server: ImageServer, status: int, body: bytes
) -> None:
    for name in ("images/a.dcm", "images"):
        image_server.put(name, body, status=status, headers={"Location": f"{image_server.base}/{name}"})
    for ask in (lambda: sources.fetch("s3://images/a.dcm"), lambda: list(sources.pages("s3://images/"))):
        error = error_of(ask)
        assert type(error) is SourceUnreachable
        assert f"status {status}" in error.message
    assert len(image_server.requests) == 2
    archive = Destinations(DownloadSettings(s3=s3(image_server))).archive("s3://images/a.dcm")
    assert type(error_of(archive.read_fingerprint)) is SourceUnreachable


# --- downloads ------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "of"), [("s3://images/a.zip", "downloads.s3"), ("az://images/a.zip", "downloads.azure")]
)
def test_a_destination_whose_credential_is_refused_is_not_asked_again(
    image_server: ImageServer, client: fakeredis.FakeRedis, url: str, of: str
) -> None:
    settings = DownloadSettings(s3=s3(image_server), azure=azure(image_server))
    image_server.put("images/a.zip", of_s3("ExpiredToken"), status=400)
    image_server.put("account/images/a.zip", status=403, headers={"x-ms-error-code": "AuthenticationFailed"})
    destinations = Destinations(settings, breakers=Breakers(client))
    error = error_of(lambda: list(destinations.archive(url).read()))
    assert (error.code, error.open_circuit) == ("source_unauthorized", f"credential:{of}")
    asked = len(image_server.requests)
    questions: list[Callable[[], object]] = [
        lambda: destinations.archive(url).read_fingerprint(),
        lambda: destinations.archive(url).write(iter([b"x"]), StudyFingerprint("1.2", 1, "")),
        lambda: destinations.files(url).names(),
    ]
    for ask in questions:
        assert error_of(ask).open_circuit == f"credential:{of}"
    assert len(image_server.requests) == asked


@pytest.mark.parametrize(
    ("status", "code", "resting"),
    [
        (400, "ExpiredToken", "credential:downloads.s3"),
        (403, "InvalidAccessKeyId", "credential:downloads.s3"),
        (403, "RequestTimeTooSkewed", "credential:downloads.s3"),
        (403, "AccessDenied", None),
    ],
)
def test_a_destination_that_is_looked_at_first_says_whose_trouble_it_is(
    image_server: ImageServer, client: fakeredis.FakeRedis, status: int, code: str, resting: str | None
) -> None:
    of_a_head(image_server, "a.zip", status, code)
    destinations = Destinations(DownloadSettings(s3=s3(image_server)), breakers=Breakers(client))
    error = error_of(destinations.archive("s3://images/a.zip").read_fingerprint)
    assert (type(error), error.open_circuit) == (SourceUnauthorized if resting else InvalidRequest, resting)
    assert code in error.message


@pytest.mark.parametrize("scheme", ["s3", "az"])
def test_that_a_credential_can_be_read_does_not_say_that_a_store_accepts_it(
    image_server: ImageServer, client: fakeredis.FakeRedis, scheme: str
) -> None:
    image_server.put("images/a.zip", of_s3("ExpiredToken"), status=400)
    image_server.put("account/images/a.zip", status=403, headers={"x-ms-error-code": "AuthenticationFailed"})
    settings = DownloadSettings(s3=s3(image_server), azure=azure(image_server))
    name = str(
        error_of(
            Destinations(settings, breakers=Breakers(client)).archive(f"{scheme}://images/a.zip").read_fingerprint
        ).open_circuit
    )
    client.hset(f"{PREFIX}{BREAKER}{name}", "until_ms", 0)
    Destinations(settings, breakers=Breakers(client)).archive(f"{scheme}://images/a.zip")
    assert not Breakers(client).read([name])[name].closed


def test_a_destination_that_lets_be_read_and_not_written_is_denied_as_before(
    image_server: ImageServer, client: fakeredis.FakeRedis
) -> None:
    denied = {"x-ms-error-code": "AuthorizationFailure", "x-ms-request-id": "1"}
    image_server.put("account/images/a.zip", status=404, headers={"x-ms-error-code": "BlobNotFound"})
    archive = Destinations(DownloadSettings(azure=azure(image_server)), breakers=Breakers(client)).archive(
        "az://images/a.zip"
    )
    assert archive.read_fingerprint() is None
    image_server.put("account/images/b.zip", status=403, headers=denied)
    other = Destinations(DownloadSettings(azure=azure(image_server)), breakers=Breakers(client))
    other.archive("az://images/a.zip").read_fingerprint()
    error = error_of(other.archive("az://images/b.zip").read_fingerprint)
    assert isinstance(error, InvalidRequest)
    assert error.details["reason"] == "denied"


# --- servers ------------------------------------------------------------


@pytest.fixture
def pacs(image_server: ImageServer, client: fakeredis.FakeRedis) -> GuardedTransport:
    server = ServerSettings(name="a", type="dicomweb", url=f"{image_server.base}/dicom-web")
    guard = Guard(Breakers(client), Slots(client), [server])
    return GuardedTransport(server, Fixed("Basic eDp5"), guard=guard)


def get(pacs: GuardedTransport, path: str) -> str | None:
    """The breaker that the job would wait for; "" if it would not."""
    try:
        pacs.exchange(Request("GET", f"/dicom-web/{path}"))
    except PacsUnauthorized as error:
        return error.open_circuit or ""
    return None


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_every_question_refuses_the_credential(
    pacs: GuardedTransport, image_server: ImageServer, status: int
) -> None:
    image_server.put("dicom-web/studies", status=status)
    assert get(pacs, "studies?limit=1") == "a:credential"
    assert get(pacs, "series") == "a:credential"
    assert len(image_server.requests) == 1


def test_a_403_for_one_study_is_that_studys_while_the_server_answers_other_questions(
    pacs: GuardedTransport, image_server: ImageServer
) -> None:
    image_server.put("dicom-web/studies", b"[]")
    image_server.put("dicom-web/studies/1.2/metadata", status=403)
    assert get(pacs, "studies") is None
    assert [get(pacs, "studies/1.2/metadata") for _ in range(8)] == [""] * 8
    assert get(pacs, "studies") is None
    image_server.put("dicom-web/studies", status=403)
    assert get(pacs, "studies/1.2/metadata") == "a:credential"


def test_a_403_of_something_beside_dicomweb_is_not_the_credentials(
    pacs: GuardedTransport, image_server: ImageServer
) -> None:
    image_server.put("dicom-web/configuration", status=403)
    assert get(pacs, "configuration") == ""
    image_server.put("dicom-web/studies", b"[]")
    assert get(pacs, "studies") is None


# --- a batch ------------------------------------------------------------


class GuardedSite(BatchSite):
    """With what all workers know of credentials and servers."""

    @property
    def services(self) -> Services:
        return replace(super().services, breakers=Breakers(self.ledger.client))

    def wake(self) -> bool:
        """What the sweeper does for those that wait for a circuit breaker; never the end."""
        return self.ledger.wake_parked() < 0

    def renew(self, settings: SourceSettings) -> None:
        self.sources.close()
        self.sources = Sources(settings, breakers=Breakers(self.ledger.client))


@pytest.fixture
def site(redis: RedisPart, sandbox: SandboxPart, image_server: ImageServer) -> Iterator[GuardedSite]:
    settings: Mapping[str, Any] = {"sources": source_settings(image_server).model_dump()}
    site = GuardedSite(redis.ledger_url, sandbox.servers(), **settings)
    site.renew(site.settings.sources)
    yield site
    site.close()


def test_the_items_of_a_batch_wait_for_a_credential_and_none_is_refused(
    site: GuardedSite, image_server: ImageServer
) -> None:
    study = new_uid()
    files = {f"{number:03}.dcm": image(study, sop=new_uid(), side=8) for number in range(40)}
    for number, (name, content) in enumerate(files.items()):
        if number < 25:
            image_server.put(f"images/{name}", content)
        else:
            image_server.put(f"images/{name}", of_s3("ExpiredToken"), status=400)
    message = {"items": [f"s3://images/{name}" for name in files], "server": "msdicom"}

    def waits() -> bool:
        return bool(site.ledger.parked())

    parked = site.see_to_its_end("pacs.batch.upload", upload_all, site.batch, message, until=waits)
    assert isinstance(parked, Deferred)
    assert set(site.ends()) <= {"stored", "open"}
    assert len(image_server.requests) < 40
    for name, content in files.items():
        image_server.put(f"images/{name}", content)
    site.ledger.client.hset(f"{PREFIX}{BREAKER}credential:sources.s3", "until_ms", 0)
    ended = site.see_to_its_end("pacs.batch.upload", upload_all, site.batch, message, until=site.wake)
    assert payload(ended)["state"] == "done"
    assert set(site.ends()) == {"stored"}


def test_items_that_waited_in_vain_have_failed_and_retry_finds_them(
    site: GuardedSite, image_server: ImageServer
) -> None:
    content = image(new_uid(), sop=new_uid(), side=8)
    image_server.put("images/a.dcm", of_s3("InvalidAccessKeyId"), status=403)
    site.settings = site.settings.model_copy(
        update={"jobs": site.settings.jobs.model_copy(update={"max_wait_s": 0.001})}
    )
    site.upload("s3://images/a.dcm", server="msdicom")
    (row,) = site.rows
    assert (row.outcome.status, row.outcome.code) == ("failed", "source_unauthorized")
    image_server.put("images/a.dcm", content)
    site.ledger.client.delete(f"{PREFIX}{BREAKER}credential:sources.s3")
    assert not isinstance(site.go_on(Coordinator.retry, "retry"), Failed)
    assert site.ends() == ["stored"]
