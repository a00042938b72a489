"""How many 40 KB images a second the sandbox takes: ``python -m benchmarks.sandbox``.

Eight keep-alive connections, one instance per request, every request a new image; the client is as lean as can be (one
process, blocking sockets, bodies made by replacing UIDs in one prepared image), because it shares the machine's cores.
A figure is only worth something on a machine that is otherwise idle, so the load average is printed with it.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pydicom
from pydicom.data import get_testdata_file

from sandbox import processes
from sandbox.synthetic import image

CONNECTIONS = 8
SECONDS = 10.0
_STUDY, _SOP = "2.25." + "1" * 30, "2.25." + "2" * 30


class StoringConnection(threading.Thread):
    """One keep-alive connection that stores as fast as it is answered."""

    def __init__(self, base: str, content: bytes, number: int, until_s: float) -> None:
        super().__init__()
        self.place = urlsplit(base)
        self.number, self.until_s = number, until_s
        self.stored = 0
        self.wrong: dict[bytes, int] = {}
        self.content = content

    def run(self) -> None:
        address = (str(self.place.hostname), int(self.place.port or 80))
        with socket.create_connection(address) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while time.monotonic() < self.until_s:
                wire.sendall(self._request())
                status = _answer(wire)
                if status == b"200":
                    self.stored += 1
                else:
                    self.wrong[status] = self.wrong.get(status, 0) + 1

    def _request(self) -> bytes:
        """A new image every time; a new study every tenth time."""
        count = self.stored + sum(self.wrong.values())
        study = f"2.25.{self.number + 1}{count // 10:029}"
        sop = f"2.25.{self.number + 1}{count:029}"
        content = self.content.replace(_STUDY.encode(), study.encode()).replace(_SOP.encode(), sop.encode())
        body = b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--frontier--\r\n"
        head = (
            f"POST {self.place.path}/studies HTTP/1.1\r\nHost: {self.place.netloc}\r\n"
            "Accept: application/dicom+json\r\n"
            'Content-Type: multipart/related; type="application/dicom"; boundary=frontier\r\n'
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _answer(wire: socket.socket) -> bytes:
    """The status of one answer that bears a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += wire.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
    while len(body) < length:
        body += wire.recv(65536)
    return head[9:12]


def short_header() -> bytes:
    """A synthetic image with some thirty attributes."""
    return image(_STUDY, sop=_SOP, side=138)


def long_header() -> bytes:
    """A CT of a real scanner (pydicom's sample), with some 260 attributes, private ones among them."""
    ds = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    ds.StudyInstanceUID, ds.SOPInstanceUID = _STUDY, _SOP
    ds.file_meta.MediaStorageSOPInstanceUID = _SOP
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue()


def measure(base: str, content: bytes) -> str:
    """One line about one dialect."""
    started_s = time.monotonic()
    connections = [StoringConnection(base, content, number, started_s + SECONDS) for number in range(CONNECTIONS)]
    for connection in connections:
        connection.start()
    for connection in connections:
        connection.join()
    took_s = time.monotonic() - started_s
    stored = sum(connection.stored for connection in connections)
    wrong = {status: count for connection in connections for status, count in connection.wrong.items()}
    assert not wrong, wrong
    size_kb = len(content) / 1000
    return (
        f"{stored / took_s:6.0f} STOW/s   {CONNECTIONS} connections, {size_kb:.0f} KB, {took_s:.0f} s, {stored} stored"
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, processes.Processes(Path(folder)) as running:
        part = processes.sandbox(running)
        for name in sys.argv[1:] or ("msdicom", "dcm4chee"):
            for kind, content in (("short header", short_header()), ("long header", long_header())):
                part.empty()
                print(f"{name:9} {kind:13} {measure(getattr(part, name), content)}", flush=True)
        print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
