"""Files put on a server without the worker: one STOW-RS request (PS3.18 10.5), all of them stored."""

from __future__ import annotations

import requests


def stow(url: str, *files: bytes, timeout_s: float = 30) -> None:
    """Store ``files`` at the DICOMweb root ``url``; an answer that is not 200 fails the test."""
    parts = b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n" + file + b"\r\n" for file in files)
    answer = requests.post(
        f"{url}/studies",
        data=parts + b"--b--\r\n",
        headers={
            "Accept": "application/dicom+json",
            "Content-Type": 'multipart/related; type="application/dicom"; boundary=b',
        },
        timeout=timeout_s,
    )
    assert answer.status_code == 200, answer.text
