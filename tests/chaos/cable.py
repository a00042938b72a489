"""A wire between two programs on this machine that can be cut: a TCP proxy that forgets to pass anything on.

Nothing here knows what is said over it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

from sandbox.processes import HOST

_BLOCK_BYTES = 65_536


class Cable:
    """Listens on ``port`` and passes everything on to ``target``, until it is cut.

    ``cut`` is a pulled plug: nothing arrives, nothing is answered, and no end hears of it. ``snap`` closes every
    connection and refuses new ones. ``mend`` ends both; what was on its way through a pulled plug is lost.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._whole = threading.Event()
        self._whole.set()
        self._refusing = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._server = socket.create_server((HOST, 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self._close_all()

    def cut(self) -> None:
        self._whole.clear()

    def snap(self) -> None:
        self._refusing = True
        self._close_all()

    def mend(self) -> None:
        """Connections that were silent stay dead, as they would after a router has forgotten them."""
        if not self._whole.is_set():
            self._close_all()
        self._refusing = False
        self._whole.set()

    def _close_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._whole.wait()
        if self._refusing:
            near.close()
            return
        try:
            far = socket.create_connection((HOST, self._target))
        except OSError:
            near.close()
            return
        with self._lock:
            self._pairs.append((near, far))
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK_BYTES):
                self._whole.wait()
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
