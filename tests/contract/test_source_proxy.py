"""Sources and stores through a proxy, over TLS with an authority of the operator's own, and as other makers need it."""

from __future__ import annotations

import base64
import logging
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fakeredis
import pytest
import trustme
from azure.storage.blob import BlobServiceClient

from courier.errors import CourierError, SourceDenied, SourceNotAllowed, SourceUnauthorized, SourceUnreachable
from courier.ledger.breakers import Breakers
from courier.settings import Settings, SettingsError, SourceSettings
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import AZURITE_KEY, HOST, AzuritePart
from tests.servers.connect_proxy import ConnectProxy
from worker.storage.destinations import Destinations
from worker.storage.network import Network
from worker.storage.sources import Sources
from worker.storage.study_marks import StudyFingerprint

NAME, PASSWORD = "images.example", "hush hush/pass"
BODY = b"an image"
LIST = (
    b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>'
    b"<Contents><Key>a.dcm</Key><Size>8</Size></Contents></ListBucketResult>"
)
BLOBS = (
    b'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs><Blob><Name>a.dcm</Name><Properties>'
    b"<Content-Length>8</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob></Blobs><NextMarker/></EnumerationResults>"
)
MARK = StudyFingerprint("1.2", 1, "0" * 64)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": parts.HOST,
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AZURE_KEY": AZURITE_KEY,
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    with ConnectProxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    authority, file = trustme.CA(), tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(file)
    return authority, file


@pytest.fixture
def secure(image_server: ImageServer, authority: tuple[trustme.CA, Path]) -> ImageServer:
    """The server speaks TLS now, with a certificate for a name that resolves nowhere, and for loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority[0].issue_cert(NAME, f"images.{NAME}", HOST).configure_cert(context)
    server = image_server._server
    server.socket = context.wrap_socket(server.socket, server_side=True)
    image_server.base = image_server.base.replace("http://", "https://")
    return image_server


def filled(images: ImageServer) -> ImageServer:
    """An http source, a bucket and a container of an account, as far as they are asked here."""
    for path in ("a.dcm", "images/a.dcm", "account/images/a.dcm"):
        images.put(path, BODY)
    images.put("images", LIST, headers={"Content-Type": "application/xml"})
    azure = {"Content-Type": "application/xml", "x-ms-request-id": "1"}
    images.put("account/images", BLOBS, headers=azure)
    return images


def port_of(images: ImageServer) -> int:
    return int(images.base.rpartition(":")[2])


def settings(images: ImageServer, host: str = NAME, **more: Any) -> Settings:
    base = f"{images.base.partition('://')[0]}://{host}:{port_of(images)}"
    s3 = {"buckets": ["*"], "endpoint_url": base, "region": "us-east-1"}
    azure = {"containers": ["*"], "account_url": f"{base}/account", "account_key_env": "AZURE_KEY"}
    hosts = {"allow_hosts": [f"{host}:*"], "allow_private_networks": True}
    sources = {**hosts, "s3": s3, "azure": azure, "connect_timeout_s": 2, **more}
    return Settings.model_validate({"sources": sources, "downloads": {"s3": s3, "azure": azure}})


def questions(tree: Settings, images: ImageServer) -> dict[str, Callable[[], object]]:
    """All that leaves for a source or a store: fetched, listed, and looked at where downloads go."""
    sources = Sources(tree.sources)
    destinations = Destinations(tree.downloads, network=Network.of(tree.sources))
    host = str(tree.sources.s3.endpoint_url)
    return {
        "http": lambda: sources.fetch(f"{host}/a.dcm").close(),
        "s3": lambda: sources.fetch("s3://images/a.dcm").close(),
        "az": lambda: sources.fetch("az://images/a.dcm").close(),
        "list s3": lambda: list(sources.pages("s3://images/")),
        "list az": lambda: list(sources.pages("az://images/")),
        "download s3": lambda: list(destinations.archive("s3://images/a.dcm").read()),
        "download az": lambda: list(destinations.archive("az://images/a.dcm").read()),
        "files s3": lambda: destinations.files("s3://images/study").names(),
        "files az": lambda: destinations.files("az://images/study").names(),
    }


ALL = ["http", "s3", "az", "list s3", "list az", "download s3", "download az", "files s3", "files az"]


def error_of(ask: Callable[[], object]) -> CourierError:
    with pytest.raises(CourierError) as caught:
        ask()
    for secret in ("hush", AZURITE_KEY, "sig=", "proxyuser"):
        assert secret not in str(caught.value) + repr(caught.value.payload)
    return caught.value


# --- through a proxy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_all_that_leaves_for_a_source_or_a_store_goes_through_the_proxy(
    request: pytest.FixtureRequest,
    proxy: ConnectProxy,
    image_server: ImageServer,
    authority: tuple[trustme.CA, Path],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    tls: bool,
) -> None:
    images = filled(request.getfixturevalue("secure") if tls else image_server)
    monkeypatch.setenv("NO_PROXY", "*")  # which means nothing here
    monkeypatch.setenv("no_proxy", "*")
    tree = settings(images, proxy=proxy.url, ca_file=str(authority[1]))
    questions(tree, images)[which]()
    assert len(proxy.requests) >= 1
    target = f"{NAME}:{port_of(images)}"
    for method, path in proxy.requests:
        if tls:
            assert (method, path) == ("CONNECT", target)
        else:
            assert path.startswith(f"http://{target}/")
    assert images.requests


@pytest.mark.parametrize("which", ALL)
def test_the_environment_leads_nothing_through_a_proxy(
    proxy: ConnectProxy, image_server: ImageServer, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.lower(), proxy.url)
    questions(settings(filled(image_server), HOST), image_server)[which]()
    assert proxy.requests == []
    assert image_server.requests


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (407, SourceUnauthorized, "status 407"),
        (502, SourceUnreachable, "502"),
        (403, SourceNotAllowed, "status 403"),
    ],
)
def test_what_a_proxy_answers_instead_of_connecting_is_told(
    proxy: ConnectProxy,
    secure: ImageServer,
    authority: tuple[trustme.CA, Path],
    status: int,
    kind: type[CourierError],
    said: str,
    which: str,
) -> None:
    proxy.status = status
    account = proxy.url.replace("http://", "http://proxyuser:hush@")
    tree = settings(filled(secure), proxy=account, ca_file=str(authority[1]))
    error = error_of(questions(tree, secure)[which])
    assert type(error) is kind
    assert said in error.message
    assert "proxy" in error.message
    assert secure.requests == []


@pytest.mark.parametrize("which", ["http", "s3", "az", "download s3", "download az"])
def test_the_proxy_of_an_http_source_refuses_the_credential_too(
    proxy: ConnectProxy, image_server: ImageServer, which: str
) -> None:
    proxy.status = 407
    error = error_of(questions(settings(filled(image_server), proxy=proxy.url), image_server)[which])
    assert type(error) is SourceUnauthorized
    assert "sources.proxy" in error.message


def test_a_407_of_the_host_behind_the_proxy_is_the_hosts_own(
    proxy: ConnectProxy, secure: ImageServer, authority: tuple[trustme.CA, Path]
) -> None:
    images = filled(secure)
    images.put("odd.dcm", status=407)
    with fakeredis.FakeRedis(decode_responses=True) as client:
        tree = settings(images, proxy=proxy.url, ca_file=str(authority[1]))
        sources = Sources(tree.sources, breakers=Breakers(client))
        error = error_of(lambda: sources.fetch(f"{tree.sources.s3.endpoint_url}/odd.dcm"))
        assert (type(error), error.open_circuit) == (SourceDenied, None)
        sources.fetch(f"{tree.sources.s3.endpoint_url}/a.dcm").close()


@pytest.mark.parametrize("which", ALL)
def test_a_proxy_that_is_down_is_told_apart_from_a_source_that_is(image_server: ImageServer, which: str) -> None:
    closed = f"http://proxyuser:hush@{HOST}:{parts.free_port()}"
    error = error_of(questions(settings(filled(image_server), proxy=closed), image_server)[which])
    assert type(error) is SourceUnreachable
    assert "the proxy (sources.proxy) does not answer" in error.message


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_the_proxy_is_told_the_user_and_the_password_and_nothing_else_is(
    request: pytest.FixtureRequest,
    proxy: ConnectProxy,
    image_server: ImageServer,
    authority: tuple[trustme.CA, Path],
    caplog: pytest.LogCaptureFixture,
    which: str,
    tls: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.authorization = "Basic " + base64.b64encode(f"proxyuser:{PASSWORD}".encode()).decode()
    images = filled(request.getfixturevalue("secure") if tls else image_server)
    account = f"http://proxyuser:hush%20hush%2Fpass@{HOST}:{proxy.port}"
    tree = settings(images, proxy=account, ca_file=str(authority[1]))
    questions(tree, images)[which]()
    assert set(proxy.credentials) == {proxy.authorization}
    assert "hush" not in "".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("courier", "worker"))
    )
    assert "hush%20" not in repr(tree) + str(tree)


@pytest.mark.parametrize("host", [HOST, "10.1.2.3", "[::1]", "8.8.8.8"])
def test_through_a_proxy_no_address_is_fetched_from(proxy: ConnectProxy, host: str) -> None:
    hosts = {"allow_hosts": ["*:*"], "allow_private_networks": True}
    sources = Sources(SourceSettings.model_validate({**hosts, "proxy": proxy.url}))
    error = error_of(lambda: sources.fetch(f"http://{host}/a.dcm"))
    assert type(error) is SourceNotAllowed
    assert "use the host's name" in error.message
    assert proxy.requests == []


@pytest.mark.parametrize("address", ["http://169.254.169.254/latest/", "http://[fd00::1]/", "http://2130706433/"])
def test_a_redirect_to_an_address_is_not_followed_through_a_proxy(
    proxy: ConnectProxy, image_server: ImageServer, address: str
) -> None:
    image_server.put("a.dcm", status=302, headers={"Location": address})
    tree = settings(image_server, proxy=proxy.url)
    error = error_of(questions(tree, image_server)["http"])
    assert type(error) is SourceNotAllowed
    assert len(proxy.requests) == 1


def test_a_name_that_is_not_allowed_does_not_reach_the_proxy(proxy: ConnectProxy, image_server: ImageServer) -> None:
    sources = Sources(settings(image_server, proxy=proxy.url).sources)
    assert type(error_of(lambda: sources.fetch("https://elsewhere.example/a.dcm"))) is SourceNotAllowed
    assert proxy.requests == []


def test_a_signature_in_a_url_reaches_the_source_as_given(proxy: ConnectProxy, image_server: ImageServer) -> None:
    image_server.put("a b.dcm", BODY)
    sources = Sources(settings(image_server, proxy=proxy.url).sources)
    sources.fetch(f"http://{NAME}:{port_of(image_server)}/a%20b.dcm?sig=%2F%2f+x").close()
    assert image_server.requests == ["/a%20b.dcm?sig=%2F%2f+x"]


@pytest.mark.parametrize(
    "proxy",
    ["proxy.example:3128", "https://proxy.example", "http://", "http://u:hush@p@x", "http://x/path", "socks5://x:1"],
)
def test_a_proxy_that_cannot_be_read_stops_the_start_and_is_not_quoted(proxy: str) -> None:
    with pytest.raises(SettingsError, match=r"sources\.proxy") as caught:
        Settings.load({"PACS__SOURCES__PROXY": proxy})
    assert "hush" not in str(caught.value)


def test_azures_own_emulator_is_read_listed_and_written_to_through_a_proxy(
    proxy: ConnectProxy, azurite: AzuritePart
) -> None:
    container = f"proxied-{uuid4().hex[:8]}"
    BlobServiceClient(
        azurite.url, credential={"account_name": parts.AZURITE_ACCOUNT, "account_key": AZURITE_KEY}
    ).create_container(container)
    azure = {"containers": ["*"], "account_url": azurite.url, "account_key_env": "AZURE_KEY"}
    tree = Settings.model_validate({"sources": {"proxy": proxy.url, "azure": azure}, "downloads": {"azure": azure}})
    archive = Destinations(tree.downloads, network=Network.of(tree.sources)).archive(f"az://{container}/a.zip")
    assert archive.write(iter([BODY]), MARK) == len(BODY)
    assert (archive.read_fingerprint(), b"".join(archive.read())) == (MARK, BODY)
    sources = Sources(tree.sources)
    (page,) = sources.pages(f"az://{container}/")
    assert len(page) == 1
    sources.fetch(f"az://{container}/a.zip").close()
    assert len(proxy.requests) >= 6


def test_an_s3_is_read_listed_and_written_to_through_a_proxy(proxy: ConnectProxy, moto: str) -> None:
    s3 = {"buckets": ["*"], "endpoint_url": moto, "region": "us-east-1"}
    tree = Settings.model_validate({"sources": {"proxy": proxy.url, "s3": s3}, "downloads": {"s3": s3}})
    destinations = Destinations(tree.downloads, network=Network.of(tree.sources))
    archive = destinations.archive("s3://proxied/a.zip")
    bucket = archive._bucket  # type: ignore[union-attr]  # an S3Archive
    bucket._client.create_bucket(Bucket="proxied")
    assert archive.write(iter([BODY]), MARK) == len(BODY)
    assert (archive.read_fingerprint(), b"".join(archive.read())) == (MARK, BODY)
    sources = Sources(tree.sources)
    (page,) = sources.pages("s3://proxied/")
    assert [one.url for one in page] == ["s3://proxied/a.zip"]
    sources.fetch("s3://proxied/a.zip").close()
    assert len(proxy.requests) >= 6


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ALL)
def test_one_setting_names_an_authority_for_all_and_without_it_tls_is_what_is_told(
    secure: ImageServer, authority: tuple[trustme.CA, Path], which: str
) -> None:
    images = filled(secure)
    questions(settings(images, HOST, ca_file=str(authority[1])), images)[which]()
    asked = len(images.requests)
    error = error_of(questions(settings(images, HOST), images)[which])
    assert type(error) is SourceUnreachable
    assert "TLS certificate" in error.message
    assert "sources.ca_file" in error.message
    assert len(images.requests) == asked


@pytest.mark.parametrize("which", ALL)
def test_a_certificate_for_another_name_is_told_as_that(
    secure: ImageServer, authority: tuple[trustme.CA, Path], which: str
) -> None:
    tree = settings(filled(secure), "localhost", ca_file=str(authority[1]))
    assert "TLS certificate" in error_of(questions(tree, secure)[which]).message


@pytest.mark.parametrize("which", ALL)
def test_a_host_that_does_not_speak_tls_is_told_as_that(
    image_server: ImageServer, authority: tuple[trustme.CA, Path], which: str
) -> None:
    image_server.base = image_server.base.replace("http://", "https://")
    tree = settings(image_server, HOST, ca_file=str(authority[1]))
    assert "TLS with the host failed" in error_of(questions(tree, image_server)[which]).message


# --- stores of other makers ------------------------------------------------------------------------------------------


class SentHeaders:
    """What a store was sent, by method and path."""

    def __init__(self, images: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, str, dict[str, str]]] = []
        handler = images._server.RequestHandlerClass
        answer = handler.do_GET  # type: ignore[attr-defined]

        def noted(one: Any) -> None:
            length = int(one.headers.get("Content-Length", 0))
            one.rfile.read(length)
            self.sent.append((one.command, one.path, {name.lower(): value for name, value in one.headers.items()}))
            answer(one)

        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            monkeypatch.setattr(handler, f"do_{method}", noted, raising=False)


def test_to_a_store_of_another_maker_no_checksum_is_sent_that_it_does_not_need(
    image_server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = SentHeaders(filled(image_server), monkeypatch)
    tree = settings(image_server, HOST)
    for which in ("s3", "list s3", "download s3", "files s3"):
        questions(tree, image_server)[which]()
    image_server.put("images/b.zip", status=404)
    files = Destinations(tree.downloads).files("s3://images/new")
    error_of(lambda: files.write("1/2.dcm", iter([BODY])))
    assert {command for command, _, _ in headers.sent} >= {"GET", "PUT"}
    for _, _, sent in headers.sent:
        assert [name for name in sent if "checksum" in name or name == "x-amz-trailer"] == []
        assert "STREAMING" not in sent.get("x-amz-content-sha256", "")


@pytest.mark.parametrize(("style", "path"), [("path", "/images/a.dcm"), ("virtual", "/a.dcm")])
def test_a_bucket_is_named_in_the_path_or_in_the_host_as_is_set(
    proxy: ConnectProxy, image_server: ImageServer, style: str, path: str
) -> None:
    tree = settings(filled(image_server), proxy=proxy.url)
    s3 = tree.sources.s3.model_copy(update={"addressing_style": style})
    sources = Sources(tree.sources.model_copy(update={"s3": s3}))
    sources.fetch("s3://images/a.dcm").close()
    assert image_server.requests == [path]
    host = NAME if style == "path" else f"images.{NAME}"
    assert proxy.requests[0][1].startswith(f"http://{host}:")


def test_uploads_that_are_under_way_are_never_listed(
    image_server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the right to (``ListMultipartUploads``) may be missing, and a store may answer it with 501."""
    headers = SentHeaders(filled(image_server), monkeypatch)
    tree = settings(image_server, HOST)
    error_of(lambda: Destinations(tree.downloads).archive("s3://images/b.zip").write(iter([BODY]), MARK))
    assert headers.sent
    assert [path for method, path, _ in headers.sent if method == "GET" and "uploads" in path] == []


def test_a_signed_url_that_a_proxys_source_refuses_is_still_the_senders(
    proxy: ConnectProxy, image_server: ImageServer
) -> None:
    image_server.put("a.dcm", status=403)
    error = error_of(questions(settings(image_server, proxy=proxy.url), image_server)["http"])
    assert type(error) is SourceDenied
