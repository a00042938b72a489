"""That the sandbox is made of real parts: flat memory, a store that survives a kill, many clients, a large index."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from sandbox import msdicom
from sandbox.processes import Processes, SandboxPart
from sandbox.processes import sandbox as start_sandbox
from sandbox.synthetic import image, new_uid

DICOM_JSON = "application/dicom+json"
MULTI = 'multipart/related; type="application/dicom"'
DIALECTS = ("msdicom", "dcm4chee")
MIB = 1 << 20
#: The largest body MSDICOM takes, less some room for the header and the multipart frame.
TWO_GIB = (1 << 31) - 65_536
_UNLESS_ASKED = pytest.mark.skipif("PACS_TEST_2GIB" not in os.environ, reason="a minute; PACS_TEST_2GIB=1 runs it")


@pytest.fixture
def own_processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "parts") as running:
        yield running


def base_of(part: SandboxPart, dialect: str) -> str:
    return str(getattr(part, dialect))


def store(base: str, content: object, http: requests.Session | None = None) -> requests.Response:
    headers = {"Content-Type": f"{MULTI}; boundary=frontier", "Accept": DICOM_JSON}
    if isinstance(content, bytes):
        head, tail = FRAME
        content = head + content + tail
    return (http or requests).post(f"{base}/studies", data=content, headers=headers, timeout=120)  # type: ignore[arg-type]


FRAME = (b"--frontier\r\nContent-Type: application/dicom\r\n\r\n", b"\r\n--frontier--\r\n")


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(pid: int) -> int:
    """The largest resident set since the last `forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


class BigBody:
    """A multipart body with one image of about ``size_bytes``: a real header, then zeros for pixels."""

    def __init__(self, study: str, size_bytes: int) -> None:
        small = image(study)
        start = small.index(b"\xe0\x7f\x10\x00OW\0\0")
        self.pixel_bytes = (size_bytes - start) // MIB * MIB
        self.head = small[: start + 8] + self.pixel_bytes.to_bytes(4, "little")

    @property
    def size_bytes(self) -> int:
        return len(self.head) + self.pixel_bytes

    def __iter__(self) -> Iterator[bytes]:
        yield FRAME[0] + self.head
        zeros = bytes(MIB)
        for _ in range(self.pixel_bytes // MIB):
            yield zeros
        yield FRAME[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size_bytes", [256 * MIB, pytest.param(TWO_GIB, marks=_UNLESS_ASKED)], ids=["256MiB", "2GiB"])
def test_a_large_image_passes_both_ways_without_growing_the_server(
    own_processes: Processes, dialect: str, size_bytes: int
) -> None:
    part = start_sandbox(own_processes)
    base, pid, study = base_of(part, dialect), part.child.pid, new_uid()
    assert store(base, image(new_uid())).status_code == 200  # whatever is loaded on first use is loaded now
    forget_peak(pid)
    before_bytes = peak_bytes(pid)
    content = BigBody(study, size_bytes)
    assert store(base, iter(content)).status_code == 200
    headers = {"Accept": f"{MULTI}; transfer-syntax=*"}
    with requests.get(f"{base}/studies/{study}", headers=headers, stream=True, timeout=120) as answer:
        assert answer.status_code == 200
        received = sum(len(chunk) for chunk in answer.iter_content(MIB))
    assert received > content.pixel_bytes
    growth_mib = (peak_bytes(pid) - before_bytes) / MIB
    print(f"{dialect}: grew by {growth_mib:.1f} MiB over {size_bytes / MIB:.0f} MiB each way")
    assert growth_mib < 64


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("dialect", DIALECTS)
def test_many_small_images_in_one_request_do_not_pile_up_in_memory(own_processes: Processes, dialect: str) -> None:
    part = start_sandbox(own_processes)
    base, pid, study = base_of(part, dialect), part.child.pid, new_uid()
    assert store(base, image(new_uid())).status_code == 200
    forget_peak(pid)
    before_bytes = peak_bytes(pid)
    template, sop = image(study, sop="2.25." + "1" * 30, side=320), b"2.25." + b"1" * 30

    def body() -> Iterator[bytes]:
        for number in range(400):
            yield b"--frontier\r\nContent-Type: application/dicom\r\n\r\n"
            yield template.replace(sop, b"2.25.9%029d" % number) + b"\r\n"
        yield b"--frontier--\r\n"

    answer = store(base, body())
    assert answer.status_code == 200
    assert len(answer.json()["00081199"]["Value"]) == 400
    assert 400 * len(template) > 75 * MIB
    assert peak_bytes(pid) - before_bytes < 64 * MIB


# -- durability and concurrency ---------------------------------------------------------------------------------------


def stored_sops(base: str, study: str) -> set[str]:
    answer = requests.get(f"{base}/studies/{study}/metadata", headers={"Accept": DICOM_JSON}, timeout=30)
    assert answer.status_code in (200, 404)
    return {entry["00080018"]["Value"][0] for entry in answer.json()} if answer.status_code == 200 else set()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_answered_survives_a_sigkill_in_mid_work(own_processes: Processes, dialect: str) -> None:
    part = start_sandbox(own_processes)
    base = base_of(part, dialect)
    study, answered, enough = new_uid(), [], threading.Event()

    def keep_storing() -> None:
        with requests.Session() as http:
            while True:
                sop = new_uid()
                try:
                    status = store(base, image(study, sop=sop, side=32), http).status_code
                except requests.ConnectionError:
                    return
                assert status == 200
                answered.append(sop)
                if len(answered) >= 60:
                    enough.set()

    clients = [threading.Thread(target=keep_storing) for _ in range(4)]
    for client in clients:
        client.start()
    assert enough.wait(timeout=60)
    part.child.kill()
    for client in clients:
        client.join()
    base = base_of(start_sandbox(own_processes), dialect)
    assert set(answered) <= stored_sops(base, study)
    assert store(base, image(study)).status_code == 200


def test_sixteen_clients_store_search_retrieve_and_delete_at_once(sandbox: SandboxPart) -> None:
    base, wrong = sandbox.msdicom, []

    def live(number: int) -> None:
        with requests.Session() as http:
            for seed in range(6):
                content = image(f"2.25.77{number:03}{seed}", side=96, seed=seed)
                digest = hashlib.sha256(content).digest()
                study = f"{base}/studies/2.25.77{number:03}{seed}"
                accept = {"Accept": f"{MULTI}; transfer-syntax=*"}
                seen = [
                    store(base, content, http).status_code,
                    http.get(study + "/metadata", headers={"Accept": DICOM_JSON}, timeout=30).status_code,
                ]
                body = http.get(study, headers=accept, timeout=30).content
                same = hashlib.sha256(body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]).digest() == digest
                seen += [http.delete(study, timeout=30).status_code, http.delete(study, timeout=30).status_code]
                if seen != [200, 200, 204, 404] or not same:
                    wrong.append((number, seed, seen, same))

    clients = [threading.Thread(target=live, args=(number,)) for number in range(16)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert not wrong
    answer = requests.get(f"{base}/studies", headers={"Accept": DICOM_JSON}, timeout=30)
    assert answer.status_code == 204


def test_of_sixteen_equal_stores_at_once_one_wins(sandbox: SandboxPart) -> None:
    content, statuses = image(new_uid()), []
    senders = [
        threading.Thread(target=lambda: statuses.append(store(sandbox.msdicom, content).status_code)) for _ in range(16)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sorted(statuses) == [200] + [409] * 15


# -- a large index ----------------------------------------------------------------------------------------------------

STUDIES = 100_000


def fill(folder: Path) -> None:
    """An index of 100,000 studies of one instance each, written past HTTP; files are not needed to search."""
    held = msdicom.open_store(folder)
    study = {
        "0020000D": {"vr": "UI", "Value": ["2.25.{n}"]},
        "00100020": {"vr": "LO", "Value": ["P{n}"]},
        "00080020": {"vr": "DA", "Value": ["20260101"]},
    }
    series = {"0020000E": {"vr": "UI", "Value": ["2.25.{n}.1"]}, "00080060": {"vr": "CS", "Value": ["CT"]}}
    instance = {"00080018": {"vr": "UI", "Value": ["2.25.{n}.1.1"]}}
    texts = [json.dumps(one) for one in (study, series, instance)]
    numbers = range(STUDIES)
    with held.transaction():
        held.database.executemany(
            "INSERT INTO studies (study_instance_uid, patient_id, study_date, attributes, changed_at_s) "
            "VALUES (?, ?, '20260101', ?, 0)",
            ((f"2.25.{n}", f"p{n}", texts[0].replace("{n}", str(n))) for n in numbers),
        )
        held.database.executemany(
            "INSERT INTO series (study_instance_uid, series_instance_uid, modality, attributes, changed_at_s) "
            "VALUES (?, ?, 'ct', ?, 0)",
            ((f"2.25.{n}", f"2.25.{n}.1", texts[1].replace("{n}", str(n))) for n in numbers),
        )
        held.database.executemany(
            "INSERT INTO instances (study_instance_uid, series_instance_uid, sop_instance_uid, attributes, "
            "transfer_syntax_uid, path, size_bytes, sha256, received_at_s, notes) "
            "VALUES (?, ?, ?, ?, '1.2.840.10008.1.2.1', ?, 1, '', 0, '{}')",
            (
                (f"2.25.{n}", f"2.25.{n}.1", f"2.25.{n}.1.1", texts[2].replace("{n}", str(n)), f"00/{n}")
                for n in numbers
            ),
        )
    held.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxPart]:
    with Processes(tmp_path_factory.mktemp("large")) as running:
        for dialect in DIALECTS:
            fill(running.folder / "sandbox-data" / dialect)
        yield start_sandbox(running)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "query",
    [
        "/studies?StudyInstanceUID=2.25.{n}",
        "/series?SeriesInstanceUID=2.25.{n}.1",
        "/instances?SOPInstanceUID=2.25.{n}.1.1",
        "/studies/2.25.{n}/series",
    ],
)
def test_a_uid_is_looked_up_among_100_000_studies_in_milliseconds(large: SandboxPart, dialect: str, query: str) -> None:
    took_ms = []
    with requests.Session() as http:
        for number in range(1, STUDIES, STUDIES // 50):
            url = base_of(large, dialect) + query.replace("{n}", str(number))
            started_s = time.perf_counter()
            answer = http.get(url, headers={"Accept": DICOM_JSON}, timeout=30)
            took_ms.append((time.perf_counter() - started_s) * 1000)
            assert answer.status_code == 200
            assert len(answer.json()) == 1
    # Reading all rows once takes more than 10 ms; the fastest of many says what the look-up itself costs.
    assert min(took_ms) < 10


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_newest_page_of_100_000_studies_does_not_read_them_all(large: SandboxPart, dialect: str) -> None:
    took_s: dict[int, list[float]] = {0: [], STUDIES - 5: []}
    with requests.Session() as http:
        for _ in range(5):
            for offset, times_s in took_s.items():
                started_s = time.perf_counter()
                url = f"{base_of(large, dialect)}/studies?limit=5&offset={offset}"
                answer = http.get(url, headers={"Accept": DICOM_JSON}, timeout=30)
                times_s.append(time.perf_counter() - started_s)
                assert len(answer.json()) == 5
    newest_s, oldest_s = map(min, took_s.values())
    # The last page is behind all others; DCM4CHEE counts them for the first one, too.
    assert newest_s < {"msdicom": 0.25, "dcm4chee": 0.75}[dialect] * oldest_s
