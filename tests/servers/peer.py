"""A server on loopback that answers each request with the next of some bytes, and keeps what it was sent."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
#: In place of an answer: the connection is closed without a word.
HANG_UP = b""


@dataclass
class Peer:
    """``heads`` are the request lines and headers that came, ``connections`` how many were accepted."""

    port: int
    answers: list[bytes]
    heads: list[str] = field(default_factory=list)
    connections: int = 0

    def serve(self, sock: socket.socket) -> None:
        self.connections += 1
        with sock, suppress(OSError):
            while head := _head(sock):
                self.heads.append(head)
                answer = self.answers.pop(0) if self.answers else HANG_UP
                if answer == HANG_UP:
                    return
                sock.sendall(answer)


def _head(sock: socket.socket) -> str:
    read = b""
    while b"\r\n\r\n" not in read:
        block = sock.recv(65_536)
        if not block:
            return ""
        read += block
    return read.partition(b"\r\n\r\n")[0].decode("latin-1")


@contextmanager
def peer(*answers: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Peer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = Peer(listener.getsockname()[1], list(answers))

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                    sock = sock if tls is None else tls.wrap_socket(sock, server_side=True)
                except ssl.SSLError:
                    continue
                except OSError:
                    return
                sock.settimeout(10)
                threading.Thread(target=one.serve, args=[sock], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield one
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
