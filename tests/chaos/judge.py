"""The one check of what chaos left behind: each job ended once, and no answer contradicts another.

Asked are the result back-end (what a program is told), the ledger (what the workers hold to be true) and the sandbox's
own index and files (what is true). How things were broken is no business of this module.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from courier.ledger.jobs import PREFIX
from producer import Courier
from producer.handle import Handle, Report
from sandbox.processes import SandboxPart, poll
from sandbox.synthetic import image, new_uid

DIALECTS = ("msdicom", "dcm4chee")


@dataclass(frozen=True)
class Picture:
    """An image that somebody wants to be uploaded."""

    study: str
    sop: str
    body: bytes

    @classmethod
    def new(cls, study: str | None = None, *, side: int = 64) -> Picture:
        study, sop = study or new_uid(), new_uid()
        return cls(study, sop, image(study, sop=sop, side=side))


@dataclass(frozen=True)
class StoredInstance:
    """One instance as a sandbox server has it."""

    server: str
    study: str
    sop: str
    sha256: str


def kept(sandbox: SandboxPart) -> list[StoredInstance]:
    """Everything on both servers, read from their own disks."""
    found = []
    for dialect in DIALECTS:
        folder = sandbox.child.log_path.parent / f"{sandbox.child.name}-data" / dialect
        with sqlite3.connect(f"file:{folder / 'index.sqlite'}?mode=ro", uri=True) as index:
            rows = index.execute("SELECT study_instance_uid, sop_instance_uid, path FROM instances").fetchall()
        index.close()
        found += [StoredInstance(dialect, study, sop, _sha256(folder / "files" / path)) for study, sop, path in rows]
    return found


def stores(sandbox: SandboxPart) -> Counter[str]:
    """How often MSDICOM has stored each SOP instance, by its change feed, which forgets nothing."""
    folder = sandbox.child.log_path.parent / f"{sandbox.child.name}-data" / "msdicom"
    with sqlite3.connect(f"file:{folder / 'index.sqlite'}?mode=ro", uri=True) as index:
        entries = [json.loads(entry) for (entry,) in index.execute("SELECT entry FROM journal")]
    index.close()
    return Counter(entry["sopInstanceUid"] for entry in entries if entry["action"] == "Create")


def check_invariant(
    orders: Mapping[Handle, Picture],
    courier: Courier,
    sandbox: SandboxPart,
    *,
    timeout_s: float,
    refusals: Collection[str] = (),
    dead: Collection[str] = (),
) -> dict[Handle, Report]:
    """What became of each job, once it is certain that the invariant holds.

    Parameters
    ----------
    timeout_s
        How long all of them may take to end.
    refusals, dead
        The codes with which jobs may be refused, or be dead letters; all others have to be stored.
    """
    reports = dict(courier.as_completed(orders, timeout_s=timeout_s))
    open_jobs = {handle.id: handle.report().stage for handle in orders if handle not in reports}
    assert open_jobs == {}, f"{len(open_jobs)} jobs have not ended within {timeout_s} s"
    ledger = courier.ledger
    assert ledger is not None
    _nothing_is_left(courier, timeout_s=timeout_s)
    again = courier.reports(handle.id for handle in orders)
    on_servers = kept(sandbox)
    by_sop = {one.sop: [] for one in on_servers}
    for one in on_servers:
        by_sop[one.sop].append(one)
    changed = {h.id: (reports[h], again[h.id]) for h in orders if _end_of(again[h.id]) != _end_of(reports[h])}
    assert changed == {}, "results have changed after their end"
    assert [sop for sop, copies in by_sop.items() if len(copies) > 1] == [], "stored twice"
    assert [sop for sop, count in stores(sandbox).items() if count > 1] == [], "MSDICOM was given an image twice"
    assert _split(on_servers) == {}, "studies are split"
    for handle, picture in orders.items():
        report = reports[handle]
        record = ledger.read_record(handle.id)
        outcome = json.loads(record["outcome"])
        if report.error is None:
            assert (record["state"], outcome["payload"]) == ("done", report.result)
            _is_there(report.result or {}, picture, by_sop.get(picture.sop, []))
        else:
            code = report.error.code
            assert outcome["error"]["code"] == code, "the ledger knows another end than the program was told"
            assert (record["state"], code in dead or code in refusals) == ("dead" if code in dead else "done", True)
            if code not in dead and code != "image_already_exists":
                assert picture.sop not in by_sop, f"refused as {code}, but it is there"
    return reports


def _end_of(report: Report) -> Any:
    return report.result if report.error is None else report.error.payload


def _is_there(payload: Mapping[str, Any], picture: Picture, copies: Sequence[StoredInstance]) -> None:
    """The one copy is where the payload says, byte for byte what was to be fetched."""
    digest = hashlib.sha256(picture.body).hexdigest()
    assert payload["sha256"] == digest
    assert [(one.server, one.sha256) for one in copies] == [(payload["server_name"], digest)]


def _split(on_servers: Iterable[StoredInstance]) -> dict[str, set[str]]:
    homes: dict[str, set[str]] = {}
    for one in on_servers:
        homes.setdefault(one.study, set()).add(one.server)
    return {study: servers for study, servers in homes.items() if len(servers) > 1}


def _nothing_is_left(courier: Courier, *, timeout_s: float) -> None:
    """No job is due any more, and none holds an image or a study."""
    with Redis.from_url(courier.settings.queue.ledger_url, decode_responses=True) as client:

        def left() -> list[str]:
            held = [key for kind in ("hold", "gate", "storing") for key in client.scan_iter(f"{PREFIX}{kind}:*")]
            return [*held, *client.zrange(PREFIX + "due", 0, -1)]

        assert poll(lambda: not left(), timeout_s=timeout_s, every_s=0.1), f"left behind: {left()}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
