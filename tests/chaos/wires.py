"""A TCP proxy whose wires can be cut without anybody hearing of it, as a firewall that forgets connections does."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

HOST = "127.0.0.1"


class Wires:
    """Forwards to ``port``. After `forget` the connections so far stay open and carry nothing; new ones work."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._age = 0
        self._open = True
        self.forgotten = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def forget(self) -> None:
        self._age += 1

    def close(self) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while self._open:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._target))
                threading.Thread(target=self._carry, args=(client, server, self._age), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket, age: int) -> None:
        counted = False
        with client, server, contextlib.suppress(OSError):
            while self._open:
                ready, _, _ = select.select([client, server], [], [], 0.1)
                if age != self._age:
                    if not counted:
                        counted, self.forgotten = True, self.forgotten + 1
                    threading.Event().wait(0.1)
                    continue
                for end in ready:
                    block = end.recv(65_536)
                    if not block:
                        return
                    (server if end is client else client).sendall(block)
