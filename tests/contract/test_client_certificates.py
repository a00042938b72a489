"""Servers that ask for a client's certificate: TLS on loopback, with authorities and certificates of trustme."""

from __future__ import annotations

import io
import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from courier.errors import CourierError, PacsUnauthorized, PacsUnavailable
from courier.settings import ServerSettings, SettingsError
from worker.dicom.instances import Instance
from worker.pacs.protocol import Pacs, Part
from worker.pacs.registry import connect

NGINX_PAGE = b"<html>\r\n<head><title>400 %b</title></head>\r\n<body>nginx</body>\r\n</html>\r\n"


class CertificateServer(ThreadingHTTPServer):
    """A DICOMweb root that is empty. ``shown`` has the common name of each request's certificate; ``opened`` counts."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), _CertificateHandler)
        self.context, self.shown, self.opened = context, [], 0
        self.page: bytes | None = None
        self.keeps_connections = True
        self._lock = threading.Lock()

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self.context.wrap_socket(request, server_side=True) as wrapped:
                with self._lock:
                    self.opened += 1
                super().finish_request(wrapped, client_address)  # type: ignore[arg-type]
        except OSError:
            return

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_port}/dicom"


class _CertificateHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: CertificateServer

    def do_GET(self) -> None:
        subject = dict(pair for part in (self.connection.getpeercert() or {}).get("subject", ()) for pair in part)
        self.server.shown.append(subject.get("commonName", ""))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.server.page or b"[]"
        self.send_response(400 if self.server.page else 200)
        self.send_header("Content-Type", "text/html" if self.server.page else "application/dicom+json")
        self.send_header("Content-Length", str(len(body)))
        if not self.server.keeps_connections:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


Serve = Callable[..., CertificateServer]


@pytest.fixture
def serve(authority: trustme.CA) -> Iterator[Serve]:
    running: list[CertificateServer] = []

    def start(
        *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, asks: ssl.VerifyMode = ssl.CERT_REQUIRED
    ) -> CertificateServer:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = context.maximum_version = version
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = asks
        running.append(CertificateServer(context))
        threading.Thread(target=running[-1].serve_forever, args=(0.02,), daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


class CertificateFiles:
    """The certificate files of one worker."""

    def __init__(self, folder: Path, authority: trustme.CA) -> None:
        self.folder, self.authority = folder, authority
        self.certificate, self.key, self.ca = folder / "client.pem", folder / "client.key", folder / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)

    def leaf(self, name: str, **more: Any) -> trustme.LeafCert:
        return self.authority.issue_cert("worker.example", common_name=name, **more)

    def put(self, leaf: trustme.LeafCert) -> None:
        leaf.private_key_pem.write_to_path(self.key)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))

    def settings(self, url: str, **changes: Any) -> ServerSettings:
        names = {"ca_file": self.ca, "client_cert_file": self.certificate, "client_key_file": self.key, **changes}
        return ServerSettings(**{"name": "ward", "type": "dicomweb", "url": url, **names})

    def ward(self, server: CertificateServer, **changes: Any) -> Pacs:
        return connect(self.settings(server.url, **changes))


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> CertificateFiles:
    made = CertificateFiles(tmp_path, authority)
    made.put(made.leaf("first"))
    return made


def ask(ward: Pacs) -> None:
    assert ward.find("study", "1.1") == []


def part(size: int = 7) -> Part:
    return Part(Instance("1.1", "1.2", "1.3", "1.4", "1.2.840.10008.1.2.1"), lambda: io.BytesIO(b"x" * size), size)


def refused(ward: Pacs, kind: type[CourierError] = PacsUnauthorized) -> str:
    with pytest.raises(kind) as error:
        ask(ward)
    assert error.value.server_name == "ward"
    assert getattr(error.value, "scope", "credential") == "credential"  # its breaker lets other jobs wait
    return error.value.message


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate_is_shown_once_and_its_connection_is_used_again(
    serve: Serve, files: CertificateFiles, version: ssl.TLSVersion
) -> None:
    server = serve(version=version)
    ward = files.ward(server)
    for _ in range(3):
        ask(ward)
    assert (server.shown, server.opened) == (["first"] * 3, 1)


def test_certificate_and_key_may_stand_in_one_file(serve: Serve, files: CertificateFiles) -> None:
    files.leaf("both").private_key_and_cert_chain_pem.write_to_path(files.certificate)
    server = serve()
    ask(files.ward(server, client_key_file=None))
    assert server.shown == ["both"]


def test_a_renewed_certificate_is_shown_by_the_next_connection_without_a_restart(
    serve: Serve, files: CertificateFiles
) -> None:
    server = serve()
    ward = files.ward(server)
    ask(ward)
    files.put(files.leaf("second"))
    server.keeps_connections = False
    for _ in range(3):
        ask(ward)
    assert (server.shown, server.opened) == (["first", "first", "second", "second"], 3)


def test_a_renewal_by_links_as_kubernetes_makes_it_is_seen(serve: Serve, tmp_path: Path, authority: trustme.CA) -> None:
    for number, name in enumerate(("old", "new")):
        (tmp_path / str(number)).mkdir()
        folder = CertificateFiles(tmp_path / str(number), authority)
        folder.put(folder.leaf(name))
    (tmp_path / "data").symlink_to(tmp_path / "0")
    server = serve()
    server.keeps_connections = False
    ward = CertificateFiles(tmp_path / "data", authority).ward(server)
    ask(ward)
    (tmp_path / "next").symlink_to(tmp_path / "1")
    os.replace(tmp_path / "next", tmp_path / "data")
    ask(ward)
    assert server.shown == ["old", "new"]


@pytest.mark.parametrize("damage", ["gone", "half", "another's"])
def test_a_pair_that_cannot_be_used_leaves_the_one_before_and_is_told_once(
    serve: Serve, files: CertificateFiles, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    server = serve()
    server.keeps_connections = False
    ward = files.ward(server)
    second = files.leaf("second")
    if damage == "gone":
        files.certificate.unlink()
    elif damage == "half":
        files.certificate.write_bytes(second.cert_chain_pems[0].bytes()[:200])
    else:  # the certificate has been renewed, its key not yet
        files.certificate.write_bytes(second.cert_chain_pems[0].bytes())
    with caplog.at_level(logging.INFO, logger="worker"):
        for _ in range(3):
            ask(ward)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        files.put(second)
        ask(ward)
    assert len(told) == 1
    assert "client_cert_file" in told[0] or "client_key_file" in told[0]
    assert server.shown == ["first", "first", "first", "second"]


def test_many_threads_go_on_while_certificates_are_renewed(serve: Serve, files: CertificateFiles) -> None:
    server = serve()
    server.keeps_connections = False
    ward = files.ward(server, max_concurrency=8)
    failed: list[CourierError] = []

    def work() -> None:
        try:
            for _ in range(15):
                ask(ward)
        except CourierError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in range(8):
        files.put(files.leaf(f"n{number}"))
    for thread in threads:
        thread.join(timeout=60)
    ask(ward)
    assert failed == []
    assert len(server.shown) == 6 * 15 + 1
    assert server.shown[-1] == "n7"


def _encrypted(leaf: trustme.LeafCert) -> bytes:
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda files: files.certificate.unlink(), "client_cert_file of server ward: .*No such file"),
        (lambda files: files.key.unlink(), "client_key_file of server ward: .*No such file"),
        (lambda files: files.certificate.write_bytes(b"no PEM"), "client_cert_file of server ward: .*as PEM"),
        (lambda files: files.key.write_bytes(b""), "client_cert_file of server ward: .*client_key_file"),
        (lambda files: files.key.write_bytes(files.leaf("b").private_key_pem.bytes()), "client_key_file .* another"),
        (lambda files: files.key.write_bytes(_encrypted(files.leaf("b"))), "client_key_file .* without a passphrase"),
        (lambda files: (files.key.unlink(), files.key.mkdir()), "client_key_file of server ward: .*directory"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_start_and_its_key_is_named(
    files: CertificateFiles, spoil: Callable[[CertificateFiles], object], sentence: str
) -> None:
    spoil(files)
    with pytest.raises(SettingsError, match=sentence) as error:
        connect(files.settings("https://127.0.0.1:1"))
    assert "\n" not in str(error.value)


def test_a_certificate_without_its_key_stops_the_start(files: CertificateFiles) -> None:
    with pytest.raises(SettingsError, match=r"client_cert_file of server ward: .*with its key"):
        connect(files.settings("https://127.0.0.1:1", client_key_file=None))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("which", ["expired", "of another authority"])
def test_a_certificate_that_the_server_refuses_needs_a_person_and_the_sentence_names_the_setting(
    serve: Serve, files: CertificateFiles, which: str, version: ssl.TLSVersion
) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    leaf = files.leaf("old", not_after=yesterday, not_before=yesterday - timedelta(days=9))
    files.put(leaf if which == "expired" else trustme.CA().issue_cert("worker.example"))
    server = serve(version=version)
    sentence = refused(files.ward(server))
    assert "refuses the certificate of this worker" in sentence
    assert "client_cert_file" in sentence
    assert server.shown == []


def test_without_a_certificate_the_sentence_says_that_one_is_asked_for(serve: Serve, files: CertificateFiles) -> None:
    none: dict[str, Any] = {"client_cert_file": None, "client_key_file": None}
    sentence = refused(files.ward(serve(), **none))
    assert "without a client certificate" in sentence
    assert "name one in client_cert_file" in sentence
    # TLS 1.2 has no alert for it, and a failed handshake may have other causes.
    sentence = refused(files.ward(serve(version=ssl.TLSVersion.TLSv1_2), **none), PacsUnavailable)
    assert "client_cert_file" in sentence


@pytest.mark.parametrize("size", [7, 8_000_000])
def test_an_image_that_was_sent_with_a_refused_certificate_was_not_stored_and_is_no_fault_of_the_image(
    serve: Serve, files: CertificateFiles, size: int
) -> None:
    files.put(trustme.CA().issue_cert("worker.example"))
    server = serve()
    with pytest.raises(PacsUnauthorized):
        files.ward(server).store([part(size)])
    assert server.shown == []


@pytest.mark.parametrize("dialect", ["msdicom", "dcm4chee", "orthanc", "dicomweb"])
@pytest.mark.parametrize("title", [b"No required SSL certificate was sent", b"The SSL certificate error"])
def test_a_proxys_page_about_the_certificate_is_no_answer_about_an_image(
    serve: Serve, files: CertificateFiles, dialect: str, title: bytes
) -> None:
    server = serve(asks=ssl.CERT_OPTIONAL)
    server.page = NGINX_PAGE % title
    path = {"dcm4chee": "/dcm4chee-arc/aets/A/rs", "orthanc": "/dicom-web", "msdicom": "/v2", "dicomweb": ""}[dialect]
    ward = connect(files.settings(server.url.removesuffix("/dicom") + path, type=dialect))
    assert "client_cert_file" in refused(ward)
    with pytest.raises(PacsUnauthorized):
        ward.store([part()])


def test_any_other_400_stays_what_the_dialect_makes_of_it(serve: Serve, files: CertificateFiles) -> None:
    server = serve()
    server.page = NGINX_PAGE % b"Bad Request"
    with pytest.raises(CourierError) as error:
        ask(files.ward(server))
    assert not isinstance(error.value, PacsUnauthorized)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"client_cert_file": None}, "client_key_file needs client_cert_file"),
        ({"url": "http://127.0.0.1:1"}, "client_cert_file needs a url with https"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    files: CertificateFiles, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        files.settings(**{"url": "https://127.0.0.1:1", **changes})
