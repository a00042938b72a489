"""What PACS servers do wrong, and what comes of an upload, a deletion and a download that meet it: the whole matrix.

Each fault befalls both of the sandbox's servers at once while a real worker has six jobs for them, one of each
operation per server. A fault that lasts, lasts until all six have met it; then the servers are well again, and nobody
does anything more. Each cell below is one operation under one fault: how its jobs ended, that the servers agree with
what was said, and how long it took.
"""

from __future__ import annotations

import itertools
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from courier.ledger.jobs import Ledger
from courier.settings import Settings
from producer import Courier
from producer.errors import CourierError
from producer.handle import Handle
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import Processes, RedisPart, SandboxPart, poll
from sandbox.synthetic import image, new_uid
from sandbox.tokens import ENTRA_SCOPE
from tests.stow import stow
from worker.pacs import dcm4chee, msdicom
from worker.pacs.protocol import Fate

DIALECTS = ("msdicom", "dcm4chee")
OPERATIONS = ("upload", "delete", "download")
#: What an operation asks for in the end, after its questions, in the sandbox's words.
LAST_CALL = {
    ("upload", "msdicom"): "store",
    ("upload", "dcm4chee"): "store",
    ("delete", "msdicom"): "delete",
    ("delete", "dcm4chee"): "reject",
    ("download", "msdicom"): "retrieve",
    ("download", "dcm4chee"): "retrieve",
}
WAIT_S = 60
JOBS = {
    "max_attempts": 100,
    "backoff_base_s": 0.1,
    "backoff_cap_s": 0.4,
    "sweep_s": 0.1,
    "pending_wait_s": 0.2,
    "lease_s": 10,
}
BREAKER = {"pause_s": 0.3, "pause_cap_s": 0.6}
TOKENS = {
    "msdicom": "entra/5f3c0a52-0000-4000-8000-000000000000/oauth2/v2.0/token",
    "dcm4chee": "keycloak/realms/dcm4che/protocol/openid-connect/token",
}

OperationFaults = dict[str, dict[str, Any]]


def everywhere(**fault: Any) -> Callable[[str], OperationFaults]:
    """From the moment the jobs come, for whatever they ask."""
    return lambda dialect: {"*": fault}


def at_the_last_call(**fault: Any) -> Callable[[str], OperationFaults]:
    """Questions are answered; the store, the deletion and the retrieval are not."""
    return lambda dialect: {LAST_CALL[operation, dialect]: fault for operation in OPERATIONS}


def in_mid_body(*, store: Mapping[str, Any], answer: Mapping[str, Any]) -> Callable[[str], OperationFaults]:
    """A store, the answer that a deletion needs before, the answer that brings a study."""
    return lambda dialect: {"store": dict(store), "query": dict(answer), "retrieve": dict(answer)}


def full(dialect: str) -> OperationFaults:
    reason = {"msdicom": "272", "dcm4chee": "A700"}[dialect]
    last = {LAST_CALL[operation, dialect]: {"status": 507} for operation in OPERATIONS}
    return {**last, "store": {"disk_full": reason}}


def partly(dialect: str) -> OperationFaults:
    return {
        "store": {"lose_last_part": True},
        LAST_CALL["delete", dialect]: {"status": 202},
        "retrieve": {"status": 206},
    }


def hanging(dialect: str) -> OperationFaults:
    """All last calls but a rejection, which may take DCM4CHEE a quarter of an hour and is waited for so long.

    A store hangs once: after two times a file is not sent again.
    """
    last = {LAST_CALL[operation, dialect] for operation in OPERATIONS}
    faults: OperationFaults = {operation: {"hang": True} for operation in last - {"reject"}}
    return {**faults, "store": {"hang": True, "times": 1}}


def dropped(dialect: str) -> OperationFaults:
    """A store reset in its body, an answer to a retrieval in its own, a deletion before any answer."""
    last = {LAST_CALL["delete", dialect]: {"refuse": True}}
    return {**last, "store": {"reset_after_bytes": 3000}, "retrieve": {"reset_answer": True}}


#: Without an entry in `ENDS` all jobs end as they would without the fault.
FAULTS: Mapping[str, Callable[[str], OperationFaults]] = {
    "port closed": everywhere(refuse=True),
    "hangs": everywhere(hang=True),
    "answers drip": everywhere(drip_bytes_per_s=100),
    "503": everywhere(status=503),
    "500": everywhere(status=500),
    "429, Retry-After": everywhere(status=429, retry_after_s=1),
    "503 at the last call": at_the_last_call(status=503),
    "429 at the last call": at_the_last_call(status=429, retry_after_s=1),
    "hangs at the last call": hanging,
    "dropped at the last call": dropped,
    "drips at the last call": at_the_last_call(drip_bytes_per_s=20),
    "reset in mid-body": in_mid_body(store={"reset_after_bytes": 3000}, answer={"reset_answer": True}),
    "answer cut off": in_mid_body(store={"truncate": True}, answer={"truncate": True}),
    "answer cut off, HTTP intact": in_mid_body(store={"truncate": "cleanly"}, answer={"truncate": "cleanly"}),
    "done, then dropped": at_the_last_call(commit_then_drop=True, times=1),
    "204 without a word": lambda dialect: {"store": {"status": 204}, "retrieve": {"status": 204}},
    "202, 206: only a part": partly,
    "token expired in the middle": at_the_last_call(unauthorized=True),
    "disk full": full,
    "storage down": everywhere(storage_down=True),
    "database down": everywhere(database_down=True),
    "409 to all but stores": lambda dialect: {
        LAST_CALL["delete", dialect]: {"status": 409},
        "retrieve": {"status": 409},
    },
    "metadata refused": lambda dialect: {"metadata": {"status": {"msdicom": 406, "dcm4chee": 403}[dialect]}},
}
#: Faults that go on for so many seconds when all have met them: a minute's, as this worker's waits are short.
LASTING = {"port closed": 2.0, "503": 2.0}
#: There the fault is how the servers say that all is well, or is none of that operation's.
NO_FAULT = {
    ("204 without a word", "delete"),
    ("409 to all but stores", "upload"),
    ("drips at the last call", "delete"),
    ("metadata refused", "delete"),
    ("metadata refused", "download"),
}
#: Faults that are over before anybody has to wait for it.
PASSING = {"done, then dropped", "token expired in the middle", "409 to all but stores", "metadata refused"}
#: A conflict is the server's last word on a deletion and a retrieval.
ENDS = {
    ("409 to all but stores", "delete"): "pacs_rejected",
    ("409 to all but stores", "download"): "pacs_rejected",
}
GOOD = {"upload": "stored", "delete": "deleted", "download": "downloaded"}


@dataclass
class Cell:
    """One job under one fault. ``recovery_s`` is counted from when its server was well again."""

    job_id: str
    end: str = ""
    attempts: int = 0
    recovery_s: float = 0
    agreed: bool = False
    payload: dict[str, Any] = field(default_factory=dict)


@dataclass
class FaultWard:
    """The worker, its servers and what has come of the faults so far."""

    courier: Courier
    ledger: Ledger
    sandbox: SandboxPart
    images: ImageServer
    out: Path
    cells: dict[str, dict[tuple[str, str], Cell]] = field(default_factory=dict)

    def under(self, fault: str) -> dict[tuple[str, str], Cell]:
        """What came of the six jobs; the fault is let out on them the first time it is asked for."""
        if fault not in self.cells:
            self.cells[fault] = self._let_out(fault)
        return self.cells[fault]

    def _let_out(self, fault: str) -> dict[tuple[str, str], Cell]:
        studies = {cell: new_uid() for cell in LAST_CALL}
        for (operation, dialect), study in studies.items():
            if operation != "upload":
                stow(self.url(dialect), image(study), image(study))
        for dialect in DIALECTS:
            for operation, injected in FAULTS[fault](dialect).items():
                self.sandbox.set_fault(dialect, operation, **injected)
        handles = {cell: self._order(*cell, study) for cell, study in studies.items()}
        if fault not in PASSING:
            met = poll(lambda: all(self._has_met_it(handle) for handle in handles.values()), timeout_s=WAIT_S)
            time.sleep(LASTING.get(fault, 0))
            assert met, [self.ledger.read_record(handle.id) for handle in handles.values()]
            self.sandbox.reset_faults()
        well_at = time.monotonic()
        cells = {cell: self._ended(handle, well_at) for cell, handle in handles.items()}
        self.sandbox.reset_faults()
        for (operation, dialect), cell in cells.items():
            cell.agreed = self._agrees(operation, dialect, studies[operation, dialect], cell)
        return cells

    def url(self, dialect: str) -> str:
        return str(getattr(self.sandbox, dialect))

    def _order(self, operation: str, dialect: str, study: str) -> Handle:
        if operation == "upload":
            return self.courier.upload(self.images.put(f"{study}.dcm", image(study)), server=dialect)
        if operation == "delete":
            return self.courier.delete("study", study, servers=[dialect])
        return self.courier.download(study, (self.out / f"{study}.zip").as_uri(), mode=dialect)

    def _has_met_it(self, handle: Handle) -> bool:
        record = self.ledger.read_record(handle.id)
        return "outcome" in record or record.get("code", "").startswith("pacs_")

    def _ended(self, handle: Handle, well_at: float) -> Cell:
        try:
            payload = handle.result(timeout_s=WAIT_S)
            end = payload.get("status") or payload["servers"][0]["status"]
        except CourierError as error:
            payload, end = {}, error.payload["code"]
        recovery_s = max(0.0, time.monotonic() - well_at)
        record = self.ledger.read_record(handle.id)
        return Cell(handle.id, end, int(record["attempts"]), recovery_s, payload=payload)

    def _agrees(self, operation: str, dialect: str, study: str, cell: Cell) -> bool:
        """Whether the servers, and the destination, hold what was said, and nobody else anything of it."""
        there = {name: images_on(self.url(name), study) for name in DIALECTS}
        other = next(name for name in DIALECTS if name != dialect)
        good = cell.end == GOOD[operation]
        if operation == "upload":
            expected = 1 if good else 0
        elif operation == "delete":
            expected = 0 if good else 2
        else:
            expected = 2
            files = [path for path in self.out.iterdir() if study in path.name]
            whole = [path.name for path in files] == [f"{study}.zip"] and images_in(files[0]) == 2
            if whole != good or (files and not good):
                return False
        return there == {dialect: expected, other: 0}


def images_on(url: str, study: str) -> int:
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def images_in(archive: Path) -> int:
    with zipfile.ZipFile(archive) as opened:
        return sum(name.endswith(".dcm") for name in opened.namelist())


def with_accounts(sandbox: SandboxPart) -> list[dict[str, Any]]:
    """Both servers, quickly given up, with an account whose token can expire."""
    servers = sandbox.servers()
    for server in servers:
        server |= {"connect_timeout_s": 1, "read_timeout_s": 1.5}
        server["auth"] = {
            "type": "oauth2",
            "token_url": f"{sandbox.control}/{TOKENS[server['name']]}",
            "client_id": "courier",
            "client_secret_env": "WARD_SECRET",
            **({"scope": ENTRA_SCOPE} if server["name"] == "msdicom" else {}),
        }
    return servers


@pytest.fixture(scope="module")
def ward(
    redis_server: RedisPart, sandbox_server: SandboxPart, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultWard]:
    redis_server.flush()
    sandbox_server.reset_faults()
    sandbox_server.empty()
    out = tmp_path_factory.mktemp("out")
    with Processes(tmp_path_factory.mktemp("ward")) as running, ImageServer() as images:
        tree = {
            "servers": with_accounts(sandbox_server),
            "queue": parts.queue_settings(redis_server),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "downloads": {"folders": [str(out)]},
            "jobs": JOBS,
            "breaker": BREAKER,
        }
        config = parts.write_settings(running.folder / "pacs.toml", tree)
        child = parts.worker(running, config, name="ward", environ={"WARD_SECRET": "courier-secret"})
        child.wait_ready()
        settings = Settings.load({"PACS_CONFIG": str(config)})
        with Courier(settings) as courier:
            yield FaultWard(courier, Ledger.connect(settings.queue.ledger_url), sandbox_server, images, out)
        child.stop(grace_s=15)
        assert "Traceback (most recent call last)" not in child.log, child.log_tail(60)


@pytest.mark.parametrize(
    ("fault", "operation"), [cell for cell in itertools.product(FAULTS, OPERATIONS) if cell not in NO_FAULT]
)
def test_whatever_a_pacs_does_the_job_ends_and_everybody_agrees(
    ward: FaultWard, guarantee: Any, fault: str, operation: str
) -> None:
    cells = {dialect: ward.under(fault)[operation, dialect] for dialect in DIALECTS}
    expected = ENDS.get((fault, operation), GOOD[operation])
    assert {dialect: cell.end for dialect, cell in cells.items()} == dict.fromkeys(DIALECTS, expected)
    assert all(cell.agreed for cell in cells.values())
    for cell in cells.values():
        guarantee.row(
            area="A PACS misbehaves", fault=fault, point=operation, outcome=cell.end, recovery_s=cell.recovery_s
        )


def test_an_expired_token_costs_no_attempt(ward: FaultWard) -> None:
    assert {cell.attempts for cell in ward.under("token expired in the middle").values()} == {1}


def test_an_image_whose_metadata_is_refused_is_stored_and_says_that_they_are_missing(ward: FaultWard) -> None:
    cells = ward.under("metadata refused")
    for dialect in DIALECTS:
        payload = cells["upload", dialect].payload
        assert (payload["warnings"], payload["metadata"]) == (["metadata_unavailable"], {})


@pytest.mark.parametrize("fault", list(LASTING))
def test_a_server_whose_circuit_is_open_costs_its_jobs_hardly_an_attempt(ward: FaultWard, fault: str) -> None:
    """Without the breaker two seconds of this worker's waits are about ten."""
    assert max(cell.attempts for cell in ward.under(fault).values()) <= 5


def test_nobody_had_to_do_anything_and_nobody_waits_any_more(ward: FaultWard) -> None:
    for fault in FAULTS:
        ward.under(fault)
    assert list(ward.ledger.dead_letters()) == []
    assert ward.ledger.parked() == {}


#: What a store that fails with a reason comes to, while the server goes on giving it three times.
ENDS_OF_FATES = {
    Fate.TRY_AGAIN: "stored",
    Fate.PENDING: "stored",
    Fate.ALREADY_THERE: "image_already_exists",
    Fate.CONFLICT: "study_conflict",
    Fate.REJECTED: "pacs_rejected",
}


def test_each_reason_of_a_409_ends_as_its_code_demands(ward: FaultWard, guarantee: Any) -> None:
    reasons = [(name, code, fate) for name, codes in _codes().items() for code, (fate, _) in codes.items()]
    ends = {}
    for name, code, fate in reasons:
        study = new_uid()
        ward.sandbox.set_fault(name, "store", failure_reason=code, times=2)
        handle = ward.courier.upload(ward.images.put(f"{study}.dcm", image(study)), server=name)
        cell = ward._ended(handle, time.monotonic())
        ward.sandbox.reset_faults()
        ends[name, code] = cell.end
        stored = images_on(ward.url(name), study)
        assert stored == (1 if cell.end == "stored" else 0), (name, code)
        guarantee.row(area="A PACS refuses to store (409)", fault=f"{name} {code}", outcome=cell.end)
        assert cell.end == ENDS_OF_FATES[fate], (name, code)
    assert len(ends) > 20


def _codes() -> Mapping[str, Mapping[int, tuple[Fate, str]]]:
    return {"msdicom": msdicom.CODES, "dcm4chee": dcm4chee.CODES}
