"""Each fault of the sandbox, as it looks on the wire.

Raw sockets where the matter is the connection, requests where it is the answer. What a fault means to a worker is
tested elsewhere.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.real_archive import only_the_sandbox

DICOM_JSON = "application/dicom+json"
MULTI = 'multipart/related; type="application/dicom"'
DIALECTS = ("msdicom", "dcm4chee")


@dataclass
class SandboxDialect:
    """One dialect of the sandbox, by wire and by requests."""

    part: SandboxPart
    name: str

    @property
    def base(self) -> str:
        return str(getattr(self.part, self.name))

    def fault(self, operation: str, **fault: object) -> None:
        self.part.set_fault(self.name, operation, **fault)

    def connect(self) -> socket.socket:
        if self.name == "msdicom":  # it may want TLS and a token
            only_the_sandbox("writes to the socket", self.name)
        place = urlsplit(self.base)
        return socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=10)

    def head(self, method: str, path: str, accept: str = DICOM_JSON, **headers: object) -> bytes:
        place = urlsplit(self.base)
        lines = [f"{method} {place.path}{path} HTTP/1.1", f"Host: {place.netloc}", f"Accept: {accept}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def store_request(self, *files: bytes) -> bytes:
        body = multipart(*files)
        kind = f"{MULTI}; boundary=frontier"
        return self.head("POST", "/studies", Content_Type=kind, Content_Length=len(body)) + body

    def store(self, *files: bytes, **headers: str) -> requests.Response:
        kind = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON}
        return requests.post(f"{self.base}/studies", data=multipart(*files), headers=kind | headers, timeout=10)

    def query(self, path: str = "/studies", **headers: str) -> requests.Response:
        return requests.get(self.base + path, headers={"Accept": DICOM_JSON, **headers}, timeout=10)

    def has(self, study: str) -> bool:
        answer = self.query(f"/studies?StudyInstanceUID={study}")
        assert answer.status_code in (200, 204)
        return answer.status_code == 200


def multipart(*files: bytes) -> bytes:
    parts = [b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in files]
    return b"".join(parts) + b"--frontier--\r\n"


def received(wire: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    content = b""
    while chunk := wire.recv(65536):
        content += chunk
    return content


def exchange(wire: socket.socket, request: bytes) -> bytes:
    wire.sendall(request)
    return received(wire)


def outcome_codes(answer: requests.Response) -> list[int]:
    items = answer.json().get("00081198", {}).get("Value", [])
    return [item["00081197"]["Value"][0] for item in items]


@pytest.fixture(params=DIALECTS)
def pacs(request: pytest.FixtureRequest, sandbox: SandboxPart) -> Iterator[SandboxDialect]:
    yield SandboxDialect(sandbox, request.param)
    # Moods of the connection must not outlive their test: the next one's first request would meet them.
    sandbox.reset_faults()


@pytest.fixture
def msdicom(sandbox: SandboxPart) -> Iterator[SandboxDialect]:
    yield SandboxDialect(sandbox, "msdicom")
    sandbox.reset_faults()


# -- the connection ---------------------------------------------------------------------------------------------------


def test_latency_delays_each_answer_within_its_bounds(pacs: SandboxDialect) -> None:
    pacs.fault("query", latency_ms=[60, 120])
    took_ms = []
    for _ in range(5):
        started_s = time.monotonic()
        assert pacs.query().status_code == 204
        took_ms.append((time.monotonic() - started_s) * 1000)
    assert min(took_ms) >= 60
    assert len({round(one) for one in took_ms}) > 1


def test_a_refused_request_gets_not_one_byte(pacs: SandboxDialect) -> None:
    pacs.fault("query", refuse=True)
    with pacs.connect() as wire:
        wire.sendall(pacs.head("GET", "/studies"))
        assert received(wire) == b""
    assert pacs.store(image(new_uid())).status_code == 200


def test_refusing_everything_closes_the_port_until_the_fault_ends(pacs: SandboxDialect) -> None:
    with pacs.connect() as opened_before:
        pacs.fault("*", refuse=True)
        assert opened_before.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        pacs.connect()
    pacs.part.reset_faults()
    assert pacs.query().status_code == 204


def test_hanging_holds_the_request_but_no_other(pacs: SandboxDialect) -> None:
    pacs.fault("query", hang=True)
    with pacs.connect() as wire:
        wire.sendall(pacs.head("GET", "/studies"))
        wire.settimeout(0.3)
        with pytest.raises(TimeoutError):
            wire.recv(1)
        assert pacs.store(image(new_uid())).status_code == 200
    pacs.part.reset_faults()
    assert pacs.query().status_code == 200


def test_a_dripping_answer_comes_in_crumbs(pacs: SandboxDialect) -> None:
    pacs.store(image(new_uid()))
    length = len(pacs.query().content)
    pacs.fault("query", drip_bytes_per_s=length * 2)
    started_s = time.monotonic()
    pieces = 0
    with pacs.connect() as wire:
        wire.sendall(pacs.head("GET", "/studies", Connection="close"))
        content = b""
        while chunk := wire.recv(65536):
            content += chunk
            pieces += 1
    assert time.monotonic() - started_s > 0.4
    assert pieces > 5
    assert len(content.partition(b"\r\n\r\n")[2]) == length


def test_a_status_comes_at_once_with_its_retry_after_and_so_many_times(pacs: SandboxDialect) -> None:
    pacs.fault("*", status=503, retry_after_s=7, times=2)
    first, second, third = pacs.query(), pacs.store(image(new_uid())), pacs.query()
    assert [one.status_code for one in (first, second, third)] == [503, 503, 204]
    assert first.headers["Retry-After"] == "7"


@pytest.mark.parametrize("after_bytes", [0, 20_000])
def test_the_connection_is_reset_in_the_middle_of_the_body(pacs: SandboxDialect, after_bytes: int) -> None:
    study = new_uid()
    pacs.fault("store", reset_after_bytes=after_bytes, times=1)
    with pacs.connect() as wire, pytest.raises(ConnectionResetError):
        exchange(wire, pacs.store_request(image(study, side=200)))
    assert not pacs.has(study)
    assert pacs.store(image(study)).status_code == 200


def test_an_answer_is_cut_off_in_its_middle(pacs: SandboxDialect) -> None:
    pacs.store(image(new_uid()))
    length = len(pacs.query().content)
    pacs.fault("query", truncate=True)
    with pacs.connect() as wire:
        wire.sendall(pacs.head("GET", "/studies"))
        head, _, body = received(wire).partition(b"\r\n\r\n")
    assert f"content-length: {length}" in head.decode().lower()
    assert 0 < len(body) < length


def test_an_answer_is_reset_in_its_middle(pacs: SandboxDialect) -> None:
    pacs.store(image(new_uid()))
    pacs.fault("query", reset_answer=True)
    with pacs.connect() as wire:
        wire.sendall(pacs.head("GET", "/studies"))
        with pytest.raises(ConnectionResetError):
            received(wire)


def test_a_retrieved_study_is_cut_off_without_last_chunk_or_boundary(pacs: SandboxDialect) -> None:
    study = new_uid()
    pacs.store(image(study))
    pacs.fault("retrieve", truncate=5000)
    with pacs.connect() as wire:
        wire.sendall(pacs.head("GET", f"/studies/{study}", f"{MULTI}; transfer-syntax=*"))
        answer = received(wire)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"chunked" in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert 5000 < len(answer) < 6000


def test_a_cleanly_truncated_answer_is_good_http_and_bad_multipart(pacs: SandboxDialect) -> None:
    study = new_uid()
    pacs.store(image(study))
    pacs.fault("retrieve", truncate="cleanly")
    answer = requests.get(f"{pacs.base}/studies/{study}", headers={"Accept": f"{MULTI}; transfer-syntax=*"}, timeout=10)
    assert answer.status_code == 200
    assert b"DICM" in answer.content
    assert b"--\r\n" not in answer.content[-10:]


def test_what_was_committed_stays_although_the_answer_is_dropped(pacs: SandboxDialect) -> None:
    study = new_uid()
    pacs.fault("store", commit_then_drop=True, times=1)
    with pacs.connect() as wire:
        wire.sendall(pacs.store_request(image(study)))
        assert received(wire) == b""
    assert pacs.has(study)


def test_keep_alive_serves_many_requests_on_one_connection(pacs: SandboxDialect) -> None:
    with pacs.connect() as wire:
        for _ in range(3):
            wire.sendall(pacs.head("GET", f"/studies?StudyInstanceUID={new_uid()}"))
            assert wire.recv(65536).startswith(b"HTTP/1.1 204 ")


def test_chunked_bodies_are_read_as_they_come(pacs: SandboxDialect) -> None:
    study = new_uid()
    body = multipart(image(study))
    kind = f"{MULTI}; boundary=frontier"
    with pacs.connect() as wire:
        wire.sendall(pacs.head("POST", "/studies", Content_Type=kind, Transfer_Encoding="chunked"))
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            wire.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        wire.sendall(b"0\r\n\r\n")
        assert wire.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert pacs.has(study)


# -- the content ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "code"), [("A700", 42752), ("272", 272)])
def test_a_full_disk_fails_every_instance_with_its_code(pacs: SandboxDialect, style: str, code: int) -> None:
    study = new_uid()
    pacs.fault("store", disk_full=style)
    answer = pacs.store(image(study), image(study))
    assert (answer.status_code, outcome_codes(answer)) == (409, [code, code])
    assert not pacs.has(study)


@pytest.mark.parametrize("code", [43264, 45070, 0xA778])
def test_any_failure_reason_can_be_asked_for(pacs: SandboxDialect, code: int) -> None:
    study = new_uid()
    pacs.fault("store", failure_reason=code)
    answer = pacs.store(image(study))
    assert (answer.status_code, outcome_codes(answer)) == (409, [code])
    assert not pacs.has(study)


def test_a_transient_272_is_gone_at_the_next_attempt(pacs: SandboxDialect) -> None:
    one = image(new_uid())
    pacs.fault("store", transient_272=True, times=1)
    assert outcome_codes(pacs.store(one)) == [272]
    assert pacs.store(one).status_code == 200


def test_the_last_part_of_a_store_gets_lost_without_a_word(pacs: SandboxDialect) -> None:
    study = new_uid()
    pacs.fault("store", lose_last_part=True)
    answer = pacs.store(image(study), image(study), image(study))
    assert (answer.status_code, len(answer.json()["00081199"]["Value"])) == (200, 2)
    assert "00081198" not in answer.json()
    alone = pacs.store(image(study))
    assert alone.status_code == {"msdicom": 204, "dcm4chee": 409}[pacs.name]


def test_the_type_of_json_bears_a_charset_on_demand_and_else_none(pacs: SandboxDialect) -> None:
    one = image(new_uid())
    assert pacs.store(one).headers["Content-Type"] == DICOM_JSON
    assert pacs.query().headers["Content-Type"] == DICOM_JSON
    pacs.fault("*", charset=True)
    for answer in (pacs.store(image(new_uid())), pacs.query()):
        assert answer.headers["Content-Type"] == f"{DICOM_JSON}; charset=utf-8"
        assert answer.json()


def test_a_pending_instance_is_invisible_and_becomes_a_stored_one_in_time(msdicom: SandboxDialect) -> None:
    study = new_uid()
    one = image(study)
    msdicom.fault("store", pending_45071=30, times=1)
    answer = msdicom.store(one)
    assert (answer.status_code, outcome_codes(answer)) == (409, [45071])
    assert not msdicom.has(study)
    assert msdicom.query(f"/studies/{study}/metadata").status_code == 404
    assert outcome_codes(msdicom.store(one)) == [45071]
    advance(msdicom, 31)
    assert msdicom.has(study)
    assert outcome_codes(msdicom.store(one)) == [45070]


def test_a_pending_instance_that_never_clears_goes_by_delete_and_can_be_stored_at_once(msdicom: SandboxDialect) -> None:
    study = new_uid()
    one = image(study)
    msdicom.fault("store", pending_45071="never", times=1)
    assert outcome_codes(msdicom.store(one)) == [45071]
    advance(msdicom, 1_000_000)
    assert outcome_codes(msdicom.store(one)) == [45071]
    assert requests.delete(f"{msdicom.base}/studies/{study}", timeout=10).status_code == 204
    assert msdicom.store(one).status_code == 200


def test_without_its_storage_msdicom_still_answers_what_is_pure_sql(msdicom: SandboxDialect) -> None:
    study = new_uid()
    msdicom.store(image(study))
    msdicom.fault("*", storage_down=True)
    assert outcome_codes(msdicom.store(image(study))) == [272]
    assert msdicom.query(f"/studies?StudyInstanceUID={study}").status_code == 200
    assert msdicom.query(f"/instances?StudyInstanceUID={study}").status_code == 503
    assert msdicom.query(f"/studies/{study}/metadata").status_code == 503


def test_without_its_database_msdicom_fails_each_instance_and_every_question(msdicom: SandboxDialect) -> None:
    msdicom.fault("*", database_down=True)
    answer = msdicom.store(image(new_uid()))
    assert (answer.status_code, outcome_codes(answer)) == (409, [272])
    assert msdicom.query().status_code == 503
    assert requests.delete(f"{msdicom.base}/studies/{new_uid()}", timeout=10).status_code == 503


def health(pacs: SandboxDialect) -> tuple[int, str]:
    answer = requests.get(pacs.base.removesuffix("/v2") + "/health/check", timeout=10)
    return answer.status_code, answer.json()["overallStatus"]


def test_msdicoms_health_report_lags_behind_an_outage(msdicom: SandboxDialect) -> None:
    assert health(msdicom) == (200, "Healthy")
    msdicom.fault("*", database_down=True)
    assert health(msdicom) == (200, "Healthy")
    advance(msdicom, 31)
    assert health(msdicom) == (503, "Unhealthy")
    msdicom.part.reset_faults()
    assert health(msdicom) == (200, "Healthy")
    msdicom.fault("health", storage_down=True)
    assert health(msdicom) == (503, "Unhealthy")


# -- tokens and their clock -------------------------------------------------------------------------------------------


def advance(pacs: SandboxDialect, seconds: float) -> None:
    answer = requests.put(f"{pacs.part.control}/clock", json={"advance_s": seconds}, timeout=10)
    assert answer.status_code == 200


def ask_token(pacs: SandboxDialect) -> requests.Response:
    path = {
        "msdicom": "/entra/tenant/oauth2/v2.0/token",
        "dcm4chee": "/keycloak/realms/dcm4che/protocol/openid-connect/token",
    }[pacs.name]
    form = {
        "grant_type": "client_credentials",
        "client_id": "courier",
        "client_secret": "courier-secret",
        "scope": "https://dicom.healthcareapis.azure.com/.default",
    }
    return requests.post(pacs.part.control + path, data=form, timeout=10)


def token(pacs: SandboxDialect) -> dict[str, str]:
    return {"Authorization": f"Bearer {ask_token(pacs).json()['access_token']}"}


def test_a_token_is_wanted_and_expires_by_the_sandboxs_own_clock(pacs: SandboxDialect) -> None:
    pacs.fault("*", bearer=True)
    assert pacs.query().status_code == 401
    mine = token(pacs)
    assert pacs.query(**mine).status_code == 204
    advance(pacs, 100_000)
    expired = pacs.query(**mine)
    assert expired.status_code == 401
    assert expired.headers["WWW-Authenticate"].startswith("Bearer")
    assert pacs.query(**token(pacs)).status_code == 204


def test_the_lifetime_of_tokens_can_be_chosen(pacs: SandboxDialect) -> None:
    pacs.fault("*", bearer=True)
    pacs.fault("token", token_lifetime_s=5)
    assert ask_token(pacs).json()["expires_in"] == 5
    mine = token(pacs)
    advance(pacs, 4)
    assert pacs.query(**mine).status_code == 204
    advance(pacs, 2)
    assert pacs.query(**mine).status_code == 401


def test_unauthorized_lasts_until_a_new_token_comes(pacs: SandboxDialect) -> None:
    old = token(pacs)
    pacs.fault("query", unauthorized=True)
    assert [pacs.query(**headers).status_code for headers in ({}, old, old)] == [401, 401, 401]
    assert pacs.query(**token(pacs)).status_code == 204


def test_of_foreign_tokens_the_first_one_seen_is_the_old_one(pacs: SandboxDialect) -> None:
    pacs.fault("query", unauthorized=True)
    answers = [pacs.query(Authorization=f"Bearer {one}").status_code for one in ("a", "a", "b", "a")]
    assert answers == [401, 401, 204, 401]


def test_the_token_endpoint_has_faults_too(pacs: SandboxDialect) -> None:
    pacs.fault("token", status=500, times=1)
    assert [ask_token(pacs).status_code for _ in range(2)] == [500, 200]


# -- the control ------------------------------------------------------------------------------------------------------


def put(pacs: SandboxDialect, path: str, body: Any) -> requests.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return requests.put(f"{pacs.part.control}/faults/{path}", data=content, timeout=10)


def test_faults_combine_and_an_operations_own_wins_over_that_of_all(msdicom: SandboxDialect) -> None:
    msdicom.fault("*", latency_ms=80, status=500)
    msdicom.fault("query", status=429)
    started_s = time.monotonic()
    assert msdicom.query().status_code == 429
    assert time.monotonic() - started_s >= 0.08
    assert msdicom.store(image(new_uid())).status_code == 500


def test_faults_are_shown_and_end_together(msdicom: SandboxDialect) -> None:
    put(msdicom, "msdicom/store", {"latency_ms": [1, 2], "times": 3})
    shown = requests.get(f"{msdicom.part.control}/faults", timeout=10).json()
    assert shown == {"msdicom": {"store": {"latency_ms": [1, 2], "times": 3}}, "dcm4chee": {}}
    assert requests.get(f"{msdicom.part.control}/moods", timeout=10).json() == shown, "the path of version 0.1"
    cleared = requests.delete(f"{msdicom.part.control}/faults", timeout=10).json()
    assert cleared == {"msdicom": {}, "dcm4chee": {}}


def test_one_dialects_fault_leaves_the_other_alone(sandbox: SandboxPart) -> None:
    sandbox.set_fault("msdicom", "*", status=503)
    assert SandboxDialect(sandbox, "dcm4chee").query().status_code == 204
    sandbox.reset_faults()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("msdicom/store", {"latancy_ms": 1}),
        ("msdicom/store", {"latency_ms": [5, 1]}),
        ("msdicom/store", {"status": "503"}),
        ("msdicom/store", {"disk_full": "full"}),
        ("msdicom/store", {"times": 0, "hang": True}),
        ("msdicom/sotre", {"hang": True}),
        ("orthanc/store", {"hang": True}),
        ("msdicom/store", "no json"),
        ("msdicom/store", []),
    ],
)
def test_a_fault_that_cannot_be_is_refused_with_a_sentence(msdicom: SandboxDialect, path: str, body: Any) -> None:
    answer = put(msdicom, path, body)
    assert answer.status_code == 400
    assert len(answer.json()["error"]) > 10
    assert requests.get(f"{msdicom.part.control}/faults", timeout=10).json() == {"msdicom": {}, "dcm4chee": {}}


def test_a_reset_empties_both_stores_and_sets_the_clock_right(msdicom: SandboxDialect) -> None:
    study = new_uid()
    msdicom.store(image(study))
    advance(msdicom, 500)
    assert requests.post(f"{msdicom.part.control}/reset", timeout=10).status_code == 200
    assert not msdicom.has(study)
    assert requests.get(f"{msdicom.part.control}/clock", timeout=10).json()["ahead_s"] == 0


def test_a_client_that_is_reset_in_mid_body_leaves_the_server_well(pacs: SandboxDialect) -> None:
    study = new_uid()
    with pacs.connect() as wire:
        wire.sendall(pacs.store_request(image(study, side=300))[:-40_000])
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert pacs.store(image(new_uid())).status_code == 200
    assert not pacs.has(study)
