"""A place for batches that are driven by hand over a real Redis: servers, a ledger, and whoever does what is due."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from courier.batches.store import Batches, Row
from courier.ledger.jobs import DueJob, Ledger
from courier.settings import Settings
from courier.waits import OTHER_JOB
from sandbox.synthetic import image, new_uid
from worker.batches import coordinator
from worker.batches.chunks import chunk
from worker.batches.coordinator import Coordinator
from worker.batches.deletions import StudyDeletions, delete_many
from worker.batches.downloads import StudyDownloads
from worker.batches.migrations import StudyMigrations, migrate
from worker.batches.study_copy import images_on
from worker.batches.uploads import ImageUploads, upload_all
from worker.dicom.instances import identify
from worker.jobs.attempt import Heartbeat
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Fate, Part
from worker.pacs.registry import connect
from worker.storage.destinations import Destinations
from worker.storage.sources import Sources

KINDS = {
    "migrate": StudyMigrations(),
    "delete": StudyDeletions(),
    "download": StudyDownloads(),
    "upload": ImageUploads(),
}
WAIT_S = 60


class BatchSite:
    """Servers, a ledger, and whoever does what is due."""

    def __init__(self, ledger_url: str, servers: list[dict[str, Any]], **sections: Any) -> None:
        jobs = {"max_attempts": 2, "backoff_base_s": 0.01, "backoff_cap_s": 0.05, "grace_s": 1}
        self.settings = Settings.model_validate({"servers": servers, "jobs": jobs, **sections})
        self.ledger = Ledger.connect(ledger_url, grace_s=1)
        self.fleet = Fleet([connect(server) for server in self.settings.servers])
        self.sources = Sources(self.settings.sources)
        self.destinations = Destinations(self.settings.downloads, self.ledger)
        self.heartbeat = Heartbeat(self.ledger, lambda *_: None)
        self.batch = "B"
        self.now, self.sleep = time.time, time.sleep
        #: What jobs have sent for other jobs, and no worker has taken yet.
        self.messages: list[DueJob] = []
        #: How a chunk that is parked is waited for, by a test with a clock of its own; else until it is due.
        self.wait: Callable[[float], None] | None = None

    def close(self) -> None:
        self.fleet.close()
        self.sources.close()
        self.ledger.client.close()

    @property
    def services(self) -> Services:
        return Services(
            self.settings,
            self.ledger,
            self.sources,
            self.fleet,
            destinations=self.destinations,
            rng=random.Random(1),
            now=self.now,
            sleep=self.sleep,
            wake=self.messages.extend,
        )

    def put(self, server: str, study: str, number: int = 2) -> set[str]:
        uids = {new_uid() for _ in range(number)}
        for uid in uids:
            self.put_file(server, image(study, sop=uid, side=16))
        return uids

    def put_file(self, server: str, content: bytes) -> None:
        (outcome,) = self.fleet[server].store(
            [Part(identify(io.BytesIO(content)), partial(io.BytesIO, content), len(content))]
        )
        assert outcome.fate is Fate.STORED

    def on(self, server: str, study: str) -> set[str]:
        return set(images_on(self.fleet[server], study))

    def order(self, *studies: str, until: Callable[[], bool] = lambda: False, **more: Any) -> JobResult:
        message = {"items": list(studies), "from_server": "msdicom", "to_server": "dcm4chee", **more}
        return self.see_to_its_end("pacs.batch.migrate", migrate, self.batch, message, until=until)

    def delete(self, *studies: str, **more: Any) -> JobResult:
        message = {**({"items": list(studies)} if studies else {}), **more}
        return self.see_to_its_end("pacs.batch.delete", delete_many, self.batch, message)

    def upload(self, *urls: str, **more: Any) -> JobResult:
        return self.see_to_its_end(
            "pacs.batch.upload", upload_all, self.batch, {**({"items": list(urls)} if urls else {}), **more}
        )

    def go_on(self, command: Callable[[Coordinator], Any], name: str, **more: Any) -> JobResult:
        work = partial(coordinator.coordinated, kinds=KINDS, command=command)
        return self.see_to_its_end(f"pacs.batch.{name}", work, new_uid(), {"batch_id": self.batch, **more})

    def see_to_its_end(
        self,
        task: str,
        work: Any,
        job_id: str,
        message: Mapping[str, Any],
        *,
        until: Callable[[], bool] = lambda: False,
    ) -> JobResult:
        """What workers and sweepers do, one after the other; as long as it is not ``until``."""
        deadline = time.monotonic() + WAIT_S
        while True:
            result = execute(
                work, task=task, job_id=job_id, message=message, services=self.services, heartbeat=self.heartbeat
            )
            if isinstance(result, Done | Failed) or until():
                return result
            sent = [*self.messages, *self.ledger.sweep(queues=lambda tasks: dict.fromkeys(tasks, ("", 0)))]
            self.messages.clear()
            ends = [self.do_chunk(due.job_id, due.job) for due in sent if due.task == "pacs.batch.chunk"]
            assert time.monotonic() < deadline
            if not any(isinstance(end, Done) for end in ends):
                time.sleep(0.02)
            self.ledger.wake_now(job_id)

    def do_chunk(self, job_id: str, message: Mapping[str, Any]) -> JobResult:
        work = partial(chunk, kinds=KINDS)
        result = execute(
            work,
            task="pacs.batch.chunk",
            job_id=job_id,
            message=message,
            services=self.services,
            heartbeat=self.heartbeat,
        )
        if isinstance(result, Deferred) and (self.wait is not None or self._waits_for_its_next_turn(job_id)):
            if self.wait is not None:
                self.wait(1.0)
            self.ledger.wake_now(job_id, by_sweeper=True)
        return result

    def _waits_for_its_next_turn(self, job_id: str) -> bool:
        """Not for the end of a back-off, a pause or a deletion, which take their time here too."""
        return self.ledger.read_record(job_id).get("code") == OTHER_JOB

    @property
    def rows(self) -> list[Row]:
        store = Batches(self.ledger)
        batch = store.get(self.batch)
        assert batch is not None
        return list(store.rows(batch))

    def ends(self, which: Any = "apply") -> list[str]:
        return [row.passes[which].code or row.passes[which].status for row in self.rows]


def payload(result: JobResult) -> dict[str, Any]:
    assert isinstance(result, Done), result
    return result.payload
