"""What it costs to prove that two servers have the same images: one study of small CTs, verified in each way.

``python -m benchmarks.equality`` copies the study, then verifies it several times: by UIDs alone (``digests`` none, as
a target that keeps no bytes was verified by 0.1.0), with all images, and as a move does it before it deletes. Seconds
of a server that gives images back weigh most, so the processor time of comparing alone is told as well.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.images import image
from courier.settings import ServerSettings
from sandbox import processes as parts
from sandbox.processes import Processes
from worker.batches.study_copy import Transfer
from worker.batches.study_migration import Digests, MigrationReceipt, copy_study, verify_study
from worker.dicom.fingerprints import fingerprint
from worker.dicom.instances import identify
from worker.pacs.protocol import Pacs, Part
from worker.pacs.registry import connect

WAYS = (("msdicom", "dcm4chee"), ("dcm4chee", "msdicom"), ("orthanc", "dcm4chee"), ("orthanc", "msdicom"))
VERIFIED: tuple[tuple[str, Digests, bool], ...] = (
    ("UIDs", "none", False),
    ("copy", "all", False),
    ("move", "all", True),
)


def _connected(processes: Processes) -> dict[str, Pacs]:
    sandbox, orthanc = parts.sandbox(processes), parts.orthanc(processes)
    urls: dict[Any, str] = {"msdicom": sandbox.msdicom, "dcm4chee": sandbox.dcm4chee, "orthanc": orthanc.url}
    return {name: connect(ServerSettings(name=name, type=name, url=url)) for name, url in urls.items()}


def _filled(source: Pacs, contents: list[bytes]) -> str:
    parts_ = [Part(identify(io.BytesIO(one)), partial(io.BytesIO, one), len(one)) for one in contents]
    for first in range(0, len(parts_), 50):
        source.store(parts_[first : first + 50])
    return parts_[0].instance.study_instance_uid


def _verified_s(
    source: Pacs, target: Pacs, study_uid: str, receipt: MigrationReceipt, how: tuple[Digests, bool]
) -> float:
    digests, moves = how
    begun = time.perf_counter()
    verify_study(Transfer(source, target, study_uid), receipt, digests=digests, moves=moves)
    return time.perf_counter() - begun


def _fingerprint_ms(contents: list[bytes]) -> float:
    streams = [(io.BytesIO(one), identify(io.BytesIO(one)).transfer_syntax_uid) for one in contents]
    begun = time.process_time()
    for stream, transfer_syntax_uid in streams:
        fingerprint(stream, transfer_syntax_uid, apart=frozenset())
    return (time.process_time() - begun) * 1000 / len(contents)


@click.command()
@click.option("--images", default=200, show_default=True)
@click.option("--passes", default=3, show_default=True)
def main(images: int, passes: int) -> None:
    table = Table("way", *(f"{name}, s" for name, *_ in VERIFIED), "move / UIDs")
    contents: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        servers = _connected(processes)
        for number, (source, target) in enumerate(WAYS, start=1):
            contents = [image(number, one) for one in range(images)]
            receipt, study_uid = MigrationReceipt(), _filled(servers[source], contents)
            copy_study(Transfer(servers[source], servers[target], study_uid), receipt)
            verified = partial(_verified_s, servers[source], servers[target], study_uid, receipt)
            taken = {
                name: statistics.median(verified((digests, moves)) for _ in range(passes))
                for name, digests, moves in VERIFIED
            }
            row = [f"{seconds:.2f}" for seconds in taken.values()]
            table.add_row(f"{source} to {target}", *row, f"{taken['move'] / taken['UIDs']:.1f}")
    Console().print(table, f"One fingerprint of a 40 KB CT: {_fingerprint_ms(contents):.2f} ms of processor time.")


if __name__ == "__main__":
    main()
