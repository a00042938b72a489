"""That a batch keeps to its bytes per second in every pass that moves or reads images; real servers, our own clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sandbox.images import ImageServer
from sandbox.processes import HOST, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches.coordinator import Coordinator
from worker.pacs.protocol import Found, Pacs, Retrieved, View

SIDE = 128
IMAGE_BYTES = len(image("1.2", side=SIDE))
RATE = 2.0 * IMAGE_BYTES  # a second


@dataclass
class RecordingPacs:
    """A server of which it is noted when how many bytes were read; else it is the one behind it."""

    pacs: Pacs
    clock: FakeClock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pacs, name)

    @contextmanager
    def retrieve(self, found: Found, *, view: View = "as_set") -> Iterator[Iterator[Retrieved]]:
        with self.pacs.retrieve(found, view=view) as parts:
            yield map(self._noted, parts)

    def _noted(self, part: Retrieved) -> Retrieved:
        content = b"".join(part.chunks)
        self.clock.read.append((self.clock.now_s, len(content)))
        return Retrieved(part.transfer_syntax_uid, iter([content]))


@dataclass
class FakeClock:
    """Time goes on when somebody sleeps, or would be woken later; ``read`` is what came, and when."""

    now_s: float = 1_700_000_000.0
    read: list[tuple[float, int]] = field(default_factory=list)

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    @contextmanager
    def holding(self, *, images: int, at_once: int = 1) -> Iterator[None]:
        """So many images are read inside, and never more than the rate allows: a second's worth in advance, what one
        group may be ahead, and ``at_once``, the images of one item.
        """
        self.read.clear()
        begun_s = self.now_s
        yield
        assert images <= len(self.read) <= images + 2, "a study is read whole where it is hardly larger than asked"
        ahead = 2 * RATE + at_once * IMAGE_BYTES
        came = 0
        for at_s, size_bytes in self.read:
            came += size_bytes
            assert came <= RATE * (at_s - begun_s) + ahead
        assert self.now_s - begun_s >= came / RATE - 1.5, "and all of it is paid for when the pass ends"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr("limits.storage.redis.time.time", clock.now)
    return clock


@pytest.fixture
def site(
    batch_site: Callable[..., BatchSite], sandbox: SandboxPart, orthanc: str, tmp_path: Path, clock: FakeClock
) -> BatchSite:
    site = batch_site(
        [*sandbox.servers(), {"name": "orthanc", "type": "orthanc", "url": orthanc}],
        downloads={"folders": [str(tmp_path)]},
        sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True},
    )
    site.now, site.sleep, site.wait = clock.now, clock.sleep, clock.sleep
    site.fleet = site.fleet.through(lambda pacs: RecordingPacs(pacs, clock))  # type: ignore[arg-type,return-value]
    return site


def studies(site: BatchSite, server: str, number: int, images: int) -> list[str]:
    uids = [new_uid() for _ in range(number)]
    for study in uids:
        for seed in range(images):
            site.put_file(server, image(study, sop=f"{study}.1.{seed}", side=SIDE, seed=seed))
    return uids


def test_what_an_upload_has_stored_is_read_back_as_slowly_as_it_came(
    site: BatchSite, clock: FakeClock, image_server: ImageServer
) -> None:
    study = new_uid()
    urls = [image_server.put(f"{n}.dcm", image(study, sop=f"{study}.{n}", side=SIDE, seed=n)) for n in range(12)]
    payload(site.upload(*urls, server="msdicom", bytes_per_s=RATE, verify=False))
    with clock.holding(images=12):
        payload(site.go_on(Coordinator.verify, "verify"))
    assert set(site.ends("verify")) == {"verified"}
    with clock.holding(images=12):
        payload(site.go_on(Coordinator.undo, "undo"))


def test_copies_are_kept_and_compared_again_no_faster_than_that(
    site: BatchSite, clock: FakeClock, tmp_path: Path
) -> None:
    uids = studies(site, "msdicom", 4, images=4)
    with clock.holding(images=32, at_once=4):  # each to be kept, and to be compared with what was kept
        payload(site.delete(*uids, servers=["msdicom"], backup=tmp_path.as_uri(), bytes_per_s=RATE))
    assert site.ends() == ["deleted"] * 4
    with clock.holding(images=16, at_once=4):
        begun_s = clock.now_s
        payload(site.go_on(Coordinator.undo, "undo"))
        assert clock.now_s - begun_s >= 32 * IMAGE_BYTES / RATE - 1.5, "what is sent counts as what is read back"
    assert site.ends("undo") == ["undone"] * 4


def test_what_was_migrated_is_read_back_no_faster_than_it_was_brought(site: BatchSite, clock: FakeClock) -> None:
    uids = studies(site, "msdicom", 4, images=4)
    order = {"from_server": "msdicom", "to_server": "orthanc", "bytes_per_s": RATE, "verify": False}
    with clock.holding(images=16, at_once=4):
        payload(site.order(*uids, **order))
    with clock.holding(images=16, at_once=4):
        payload(site.go_on(Coordinator.verify, "verify"))
    assert site.ends("verify") == ["verified"] * 4
    with clock.holding(images=16, at_once=4):
        payload(site.go_on(Coordinator.verify, "verify"))
