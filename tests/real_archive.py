"""A real archive in place of the sandbox's DCM4CHEE: ``PACS_TEST_DCM4CHEE=http://…/dcm4chee-arc/aets/DCM4CHEE/rs``.

The contract tests then run against that archive. A test that needs what only the sandbox can do (an ordered fault, its
clock, its files) is skipped with a reason that names it. After each test the archive is rid of the studies that the
test brought in, and of no other: a study counts only if the archive did not have it when its first bytes were sent.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from sandbox.processes import SandboxPart

#: What the archive adds for the name and the birth date of `sandbox.synthetic.image`, in its default configuration.
ISSUER = "DCM4CHEE.48199C56.09F24A43"
VARIABLE = "PACS_TEST_DCM4CHEE"
#: StudyInstanceUID in a file, explicit or implicit, either byte order, or in JSON.
_STUDY = re.compile(
    rb"(?:\x20\x00\x0d\x00(?:UI..|.\x00\x00\x00)|\x00\x20\x00\x0dUI..|\"0020000D\"[^\[]{0,40}\[\")([0-9.]+)", re.DOTALL
)
_KEPT_BYTES = 160
_TIMEOUT_S = 120
_CLEANERS = 6


def address() -> str | None:
    return (os.environ.get(VARIABLE) or "").rstrip("/") or None


def only_the_sandbox(what: str) -> None:
    """Skip this test if it runs against a real archive, which cannot do ``what``."""
    if address():
        pytest.skip(f"needs the sandbox: {what}")


@dataclass(frozen=True)
class ArchivePart(SandboxPart):
    """The sandbox, except that its DCM4CHEE is a real archive."""

    def set_mood(self, dialect: str, operation: str, **mood: object) -> None:
        if dialect == "dcm4chee":
            only_the_sandbox(f"orders {', '.join(mood)} at {operation} from DCM4CHEE")
        super().set_mood(dialect, operation, **mood)

    def load(self, *, anew: bool = False) -> dict[str, dict[str, int]]:
        only_the_sandbox("counts the requests that DCM4CHEE gets")
        return super().load(anew=anew)


class Recorder:
    """Which studies this process sends to the archive that the archive did not have."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._seen: set[str] = set()
        self._brought: set[str] = set()
        self._lock = threading.Lock()

    def sent(self, study: str) -> None:
        with self._lock:
            if study in self._seen:
                return
            self._seen.add(study)
            if self._count(study, "AS_RECEIVED") == 0:
                self._brought.add(study)

    def clean(self, patient_id: str) -> list[str]:
        """Remove them, what else is that patient's, and the patient; returns the studies that the archive kept.

        ``patient_id`` is the test's own. What was sent deflated is known by it alone.
        """
        studies = sorted(self._brought | self._of_patient(patient_id))
        with ThreadPoolExecutor(_CLEANERS) as pool:
            removed = list(pool.map(self._removed, studies))
        self._seen, self._brought = set(), set()
        requests.delete(f"{self.url}/patients/{patient_id}%5E%5E%5E{ISSUER}", timeout=_TIMEOUT_S)
        return [study for study, is_gone in zip(studies, removed, strict=True) if not is_gone]

    def _of_patient(self, patient_id: str) -> set[str]:
        found = requests.get(f"{self._rs('AS_RECEIVED')}/studies?PatientID={patient_id}", timeout=_TIMEOUT_S)
        return {row["0020000D"]["Value"][0] for row in found.json()} if found.status_code == 200 else set()

    def _rs(self, aet: str) -> str:
        root, _, _ = self.url.rpartition("/aets/")
        return f"{root}/aets/{aet}/rs"

    def _count(self, study: str, aet: str) -> int:
        answer = requests.get(f"{self._rs(aet)}/studies/{study}/instances/count", timeout=_TIMEOUT_S)
        return int(answer.json()["count"])

    def _removed(self, study: str) -> bool:
        """Rejected until it can be deleted: a note that stays visible is rejected by the second try.

        Of a rejection that failed half-way the images stay hidden in a study that counts as not rejected: shown again,
        they can be rejected anew.
        """
        path = f"/studies/{study}"
        for _ in range(3):
            requests.post(f"{self.url}{path}/reject/113039%5EDCM", timeout=_TIMEOUT_S)
            if requests.delete(self.url + path, timeout=_TIMEOUT_S).status_code in (204, 404):
                return True
            requests.post(f"{self._rs('AS_RECEIVED')}{path}/reject/REVOKE_REJECTION%5E99DCM4CHEE", timeout=_TIMEOUT_S)
        return False


@contextmanager
def recorded(url: str) -> Iterator[Recorder]:
    """Watch what this process sends to ``url`` by http.client, which is below urllib3 and requests."""
    recorder, host = Recorder(url), url.split("/")[2]
    send = http.client.HTTPConnection.send
    tails: dict[int, bytes] = {}

    def watched(connection: http.client.HTTPConnection, data: Any) -> None:
        if f"{connection.host}:{connection.port}" == host and isinstance(data, bytes | bytearray | memoryview):
            seen = tails.get(id(connection), b"") + bytes(data)
            for uid in _STUDY.findall(seen):
                recorder.sent(uid.decode())
            tails[id(connection)] = seen[-_KEPT_BYTES:]
        send(connection, data)

    http.client.HTTPConnection.send = watched  # type: ignore[method-assign]
    try:
        yield recorder
    finally:
        http.client.HTTPConnection.send = send  # type: ignore[method-assign]
