"""Real archives in place of the sandbox's: a DCM4CHEE, or an MSDICOM or Azure DICOM service.

``PACS_TEST_DCM4CHEE=http://…/dcm4chee-arc/aets/DCM4CHEE/rs``
    an unsecured archive for tests.
``PACS_TEST_MSDICOM=https://…/v2`` (or ``…/v2/partitions/NAME``)
    a server whose partition NAME is there for tests. Without a name, one of our own is used where partitions are on;
    where they are off, the whole server has to be there for tests. In any case nothing else may be in it.
    ``PACS_TEST_MSDICOM_AUTH`` holds, as JSON, an ``auth`` table of docs/settings.md, such as
    ``{"type": "azure_identity", "scope": "…/.default"}``; secrets are named in it, as there.

The contract tests then run against that archive. A test that needs what only the sandbox can do (an ordered fault, its
clock, its files) is skipped with a reason that names it. After each test the archive is rid of the studies that the
test brought in, and of no other: a study counts only if the archive did not have it when its first bytes were sent.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
import requests

from courier.settings import ServerSettings
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.stow import stow
from worker.pacs.credentials import credentials
from worker.pacs.transport import Credentials

#: What the archive adds for the name and the birth date of `sandbox.synthetic.image`, in its default configuration.
ISSUER = "DCM4CHEE.48199C56.09F24A43"
VARIABLES = {"dcm4chee": "PACS_TEST_DCM4CHEE", "msdicom": "PACS_TEST_MSDICOM"}
AUTH_VARIABLE = "PACS_TEST_MSDICOM_AUTH"
#: The partition of an MSDICOM that stays there, empty: the server has no call that removes one.
PARTITION = "pacs-courier-contract-tests"
#: StudyInstanceUID in a file, explicit or implicit, either byte order, or in JSON.
_STUDY = re.compile(
    rb"(?:\x20\x00\x0d\x00(?:UI..|.\x00\x00\x00)|\x00\x20\x00\x0dUI..|\"0020000D\"[^\[]{0,40}\[\")([0-9.]+)", re.DOTALL
)
_KEPT_BYTES = 160
_TIMEOUT_S = 120
_CLEANERS = 6


def address(dialect: str = "dcm4chee") -> str | None:
    """Where the real archive of ``dialect`` is that the environment names."""
    return (os.environ.get(VARIABLES[dialect]) or "").rstrip("/") or None


def only_the_sandbox(what: str, dialect: str = "dcm4chee") -> None:
    """Skip this test if it runs against a real archive of ``dialect``, which cannot do ``what``."""
    if address(dialect):
        pytest.skip(f"needs the sandbox: {what}")


class RealArchive(Protocol):
    """What a real archive is asked to be rid of what a test brought in."""

    url: str
    credentials: Credentials | None

    def has(self, study: str) -> bool: ...

    def studies_of(self, patient_id: str) -> set[str]: ...

    def removed(self, study: str) -> bool:
        """Remove it for good; whether it is gone."""
        ...

    def forget(self, patient_id: str) -> None:
        """What is left of a patient without studies."""
        ...


class Dcm4cheeArchive:
    credentials = None

    def __init__(self, url: str) -> None:
        self.url = url

    def has(self, study: str) -> bool:
        answer = requests.get(f"{self._rs('AS_RECEIVED')}/studies/{study}/instances/count", timeout=_TIMEOUT_S)
        return int(answer.json()["count"]) > 0

    def studies_of(self, patient_id: str) -> set[str]:
        found = requests.get(f"{self._rs('AS_RECEIVED')}/studies?PatientID={patient_id}", timeout=_TIMEOUT_S)
        return _study_uids(found)

    def removed(self, study: str) -> bool:
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

    def forget(self, patient_id: str) -> None:
        requests.delete(f"{self.url}/patients/{patient_id}%5E%5E%5E{ISSUER}", timeout=_TIMEOUT_S)

    def _rs(self, aet: str) -> str:
        root, _, _ = self.url.rpartition("/aets/")
        return f"{root}/aets/{aet}/rs"


class MsdicomArchive:
    """An MSDICOM in the partition that `begun` has chosen. Every request of this process to it is logged in."""

    def __init__(self, url: str, account: Credentials | None = None) -> None:
        self.url = url
        self.credentials = account

    def has(self, study: str) -> bool:
        return self._get(f"/studies/{study}/instances?limit=1").status_code == 200

    def studies_of(self, patient_id: str) -> set[str]:
        return _study_uids(self._get(f"/studies?PatientID={patient_id}"))

    def removed(self, study: str) -> bool:
        return requests.delete(f"{self.url}/studies/{study}", timeout=_TIMEOUT_S).status_code in (204, 404)

    def forget(self, patient_id: str) -> None:
        """It has studies only."""

    def _get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers={"Accept": "application/dicom+json"}, timeout=_TIMEOUT_S)


def _study_uids(found: requests.Response) -> set[str]:
    return {row["0020000D"]["Value"][0] for row in found.json()} if found.status_code == 200 else set()


def msdicom_of(url: str, environ: Mapping[str, str] = os.environ) -> MsdicomArchive:
    """The MSDICOM at ``url`` with the account that the environment names; nothing is sent yet."""
    auth = json.loads(environ.get(AUTH_VARIABLE) or '{"type": "none"}')
    server = ServerSettings.model_validate({"name": "real", "type": "msdicom", "url": url, "auth": auth})
    account = credentials(server)
    return MsdicomArchive(url, account if account.authorization() else None)


def scratch(archive: MsdicomArchive) -> MsdicomArchive:
    """``archive`` in a partition that exists and holds nothing.

    Raises
    ------
    RuntimeError
        There are studies, which may be patients': nothing is done.
    """
    chosen = archive
    if "/partitions/" not in archive.url and archive._get("/partitions").status_code == 200:
        chosen = MsdicomArchive(f"{archive.url}/partitions/{PARTITION}", archive.credentials)
    found = chosen._get("/studies?limit=1")
    if found.status_code == 200:
        raise RuntimeError(
            f"{chosen.url} holds studies already, and tests have to be alone there; name an empty partition in"
            f" {VARIABLES['msdicom']}, or remove what is there"
        )
    if found.status_code != 204:  # a partition comes into being with its first image
        study = new_uid()
        stow(chosen.url, image(study))
        assert chosen.removed(study)
    return chosen


@functools.cache
def archives() -> Mapping[str, RealArchive]:
    """The real archives that the environment names, by dialect."""
    found: dict[str, RealArchive] = {}
    if url := address("dcm4chee"):
        found["dcm4chee"] = Dcm4cheeArchive(url)
    if url := address("msdicom"):
        archive = msdicom_of(url)
        with logged_in(archive):
            found["msdicom"] = scratch(archive)
    return found


@dataclass(frozen=True)
class ArchivePart(SandboxPart):
    """The sandbox, except that one or both of its servers are real archives."""

    recorders: Mapping[str, Recorder] = field(default_factory=dict)

    @classmethod
    def over(cls, part: SandboxPart, recorders: Mapping[str, Recorder]) -> ArchivePart:
        urls = {dialect: recorder.archive.url for dialect, recorder in recorders.items()}
        msdicom, dcm4chee = urls.get("msdicom", part.msdicom), urls.get("dcm4chee", part.dcm4chee)
        return cls(part.child, msdicom, dcm4chee, part.control, recorders)

    def set_fault(self, dialect: str, operation: str, **fault: object) -> None:
        if dialect in self.recorders:
            only_the_sandbox(f"orders {', '.join(fault)} at {operation} from {dialect.upper()}", dialect)
        super().set_fault(dialect, operation, **fault)

    def empty(self) -> None:
        """Of a real archive, what this test has brought in so far."""
        super().empty()
        for recorder in self.recorders.values():
            recorder.clean()

    def load(self, *, anew: bool = False) -> dict[str, dict[str, int]]:
        for dialect in self.recorders:
            only_the_sandbox(f"counts the requests that {dialect.upper()} gets", dialect)
        return super().load(anew=anew)


class Recorder:
    """Which studies this process sends to an archive that the archive did not have."""

    def __init__(self, archive: RealArchive) -> None:
        self.archive = archive
        self._seen: set[str] = set()
        self._brought: set[str] = set()
        self._lock = threading.Lock()

    def sent(self, study: str) -> None:
        with self._lock:
            if study in self._seen:
                return
            self._seen.add(study)
            if not self.archive.has(study):
                self._brought.add(study)

    def clean(self, patient_id: str = "") -> list[str]:
        """Remove them, what else is that patient's, and the patient; returns the studies that the archive kept.

        ``patient_id`` is the test's own. What was sent deflated is known by it alone.
        """
        studies = sorted(self._brought | (self.archive.studies_of(patient_id) if patient_id else set()))
        with ThreadPoolExecutor(_CLEANERS) as pool:
            removed = list(pool.map(self.archive.removed, studies))
        self._seen, self._brought = set(), set()
        if patient_id:
            self.archive.forget(patient_id)
        return [study for study, is_gone in zip(studies, removed, strict=True) if not is_gone]


@contextmanager
def recorded(archive: RealArchive) -> Iterator[Recorder]:
    """Watch what this process sends to ``archive`` by http.client, which is below urllib3 and requests."""
    recorder, place = Recorder(archive), _place(archive.url)
    send = http.client.HTTPConnection.send
    tails: dict[int, bytes] = {}

    def watched(connection: http.client.HTTPConnection, data: Any) -> None:
        if (connection.host, connection.port) == place and isinstance(data, bytes | bytearray | memoryview):
            seen = tails.get(id(connection), b"") + bytes(data)
            for uid in _STUDY.findall(seen):
                recorder.sent(uid.decode())
            tails[id(connection)] = seen[-_KEPT_BYTES:]
        send(connection, data)

    http.client.HTTPConnection.send = watched  # type: ignore[method-assign]
    try:
        with logged_in(archive):
            yield recorder
    finally:
        http.client.HTTPConnection.send = send  # type: ignore[method-assign]


@contextmanager
def logged_in(archive: RealArchive) -> Iterator[None]:
    """Give every request of this process to ``archive`` that has no ``Authorization`` the archive's account."""
    account, place = archive.credentials, _place(archive.url)
    if account is None:
        yield
        return
    end = http.client.HTTPConnection.endheaders

    def with_account(connection: Any, *args: Any, **kwargs: Any) -> None:
        there = (connection.host, connection.port) == place
        if there and not any(line.lower().startswith(b"authorization:") for line in connection._buffer):
            connection.putheader("Authorization", str(account.authorization()))
        end(connection, *args, **kwargs)

    http.client.HTTPConnection.endheaders = with_account  # type: ignore[method-assign]
    try:
        yield
    finally:
        http.client.HTTPConnection.endheaders = end  # type: ignore[method-assign]


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
