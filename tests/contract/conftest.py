"""What several contract tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sandbox import processes as parts
from sandbox import synthetic
from sandbox.processes import HOST, Processes, RedisPart, SandboxPart
from sandbox.synthetic import new_uid
from tests import real_archive
from tests.batch_site import BatchSite

#: The one account of the S3 that checks signatures.
S3_KEY_ID, S3_SECRET = "COURIERTESTKEY", "couriertestsecret"


@pytest.fixture
def sandbox(sandbox_server: SandboxPart, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxPart]:
    """The sandbox, calm and empty; its servers are the archives that `real_archive.VARIABLES` name, if any is set."""
    sandbox_server.reset_faults()
    sandbox_server.empty()
    if not (archives := real_archive.archives()):
        yield sandbox_server
        return
    # The archive gives each image of a patient what it knows of the patient from other images, and keeps patients.
    monkeypatch.setattr(synthetic, "PATIENT_ID", f"S{new_uid()[-20:]}")
    with ExitStack() as watching:
        recorders = {name: watching.enter_context(real_archive.recorded(one)) for name, one in archives.items()}
        yield real_archive.ArchivePart.over(sandbox_server, recorders)
        kept = [study for one in recorders.values() for study in one.clean(synthetic.PATIENT_ID)]
    assert not kept, f"the archive did not remove {len(kept)} studies of this test"


@pytest.fixture
def batch_site(redis: RedisPart) -> Iterator[Callable[..., BatchSite]]:
    """Opens places for batches that are driven by hand: ``batch_site(servers, downloads=…)``."""
    opened: list[BatchSite] = []

    def build(servers: list[dict[str, Any]], **sections: Any) -> BatchSite:
        opened.append(BatchSite(redis.ledger_url, servers, **sections))
        return opened[-1]

    yield build
    for site in opened:
        site.close()


@pytest.fixture(scope="session")
def rclone(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 that checks signatures, and ignores the conditions of a write."""
    port, folder = parts.free_port(), tmp_path_factory.mktemp("rclone")
    command = [Path(sys.executable).parent / "rclone", "serve", "s3", "--config", "", "--addr", f"{HOST}:{port}"]
    keys = ["--auth-key", f"{S3_KEY_ID},{S3_SECRET}"]
    child = processes.start("rclone", [*command, *keys, folder], ready=parts.listens(port))
    child.wait_ready()
    yield f"http://{HOST}:{port}"
    processes.stop_one(child)
