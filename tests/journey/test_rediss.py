"""A Redis that is reached over TLS: broker, results and ledger, its certificate verified. TLS ends in a proxy here."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from urllib.parse import urlsplit

import pytest
import trustme

from courier.settings import Settings
from producer import Courier
from producer.errors import BrokerUnavailable
from sandbox.processes import HOST
from sandbox.synthetic import image, new_uid

WAIT_S = 30


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Proxy(socketserver.ThreadingTCPServer):
    """TLS in front of the port ``to``."""

    daemon_threads = True

    def __init__(self, to: int, context: ssl.SSLContext) -> None:
        super().__init__((HOST, 0), TlsRelayHandler)
        self.to, self.context = to, context


class TlsRelayHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with (
            contextlib.suppress(OSError),
            self.server.context.wrap_socket(self.request, server_side=True) as theirs,
            socket.create_connection((HOST, self.server.to)) as ours,
        ):
            back = threading.Thread(target=pump, args=(ours, theirs), daemon=True)
            back.start()
            pump(theirs, ours)
            back.join(timeout=10)


@pytest.fixture
def behind_tls(redis, tmp_path):
    """``behind_tls(ca)`` gives the three URLs; the certificate is that of ``ca.pem``."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(context)

    def urls(ca="ca.pem"):
        verified = f"ssl_cert_reqs=required&ssl_ca_certs={tmp_path / ca}"
        base = f"rediss://{HOST}:{proxy.server_address[1]}"
        numbers = {"broker_url": 0, "result_backend": 1, "ledger_url": 2}
        return {name: f"{base}/{number}?{verified}" for name, number in numbers.items()}

    with Proxy(urlsplit(redis.broker_url).port, context) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        yield urls
        proxy.shutdown()


def test_an_upload_goes_through_a_redis_behind_tls(behind_tls, worker, image_server):
    running = worker(queue=behind_tls())
    with Courier(running.settings) as courier:
        handle = courier.upload(image_server.put("a.dcm", image(new_uid())))
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
        assert list(courier.workers()) != []
    running.stop()


def test_a_redis_whose_certificate_is_not_trusted_is_not_spoken_to(behind_tls, image_server):
    settings = Settings.model_validate({"queue": behind_tls("other.pem")})
    with Courier(settings) as courier, pytest.raises(BrokerUnavailable):
        courier.upload(image_server.url("a.dcm"))
