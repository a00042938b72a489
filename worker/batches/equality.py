"""Whether two servers have the same images: by their bytes, and where bytes are not kept, element by element.

What an element says is in ``fingerprints``; which elements a product rewrites, its dialect says. What follows from a
difference is the affair of the caller; nothing is written or deleted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO, TypeVar

from courier.errors import NotDicom
from worker.batches.study_copy import SPOOL_TIMEOUT_S, digests_on, received
from worker.dicom.fingerprints import Fingerprint, Rewrites, Table, differing, equal, fingerprint, is_of, table
from worker.jobs.streamed_instance import Incoming
from worker.pacs.protocol import Pacs
from worker.storage.spool import Limits, spool

#: Of so many images that differ, the elements are named; each of them is read once more for that.
NAMED = 3
#: PatientID says whose an image is: where two copies differ in it, the one that has it may not go.
_WHOSE = frozenset((0x00100020,))

T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """One server's copy of a study: its images, each with its series.

    ``goes``: it is deleted next, so an image that the server sends without listing it is an error. ``is_made``: it was
    made of the other copy. If that is not known, a PatientID that the other one lacks is its own. ``left_out``: what
    the server sends and is not compared.
    """

    pacs: Pacs
    series_of: Mapping[str, str]
    goes: bool = False
    is_made: bool = True
    left_out: Collection[str] = ()

    @property
    def rewrites(self) -> Rewrites:
        rewrites = self.pacs.rewrites
        return rewrites if self.is_made else replace(rewrites, added=rewrites.added - _WHOSE)

    def digests(self, study_uid: str, wanted: Collection[str]) -> dict[str, str]:
        return digests_on(self.pacs, study_uid, self.series_of, wanted, only_listed=self.goes, left_out=self.left_out)

    def received(self, study_uid: str, wanted: Collection[str]) -> Iterator[Incoming]:
        return received(self.pacs, study_uid, self.series_of, wanted, only_listed=self.goes, left_out=self.left_out)


@dataclass
class Compared:
    """What came of a comparison.

    Of the first of the images that differ, ``tags`` names the elements that do, without values; ``why`` says it in
    words.
    """

    by_bytes: set[str] = field(default_factory=set)
    by_elements: set[str] = field(default_factory=set)
    different: list[str] = field(default_factory=list)
    tags: dict[str, list[str]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    @property
    def same(self) -> set[str]:
        return self.by_bytes | self.by_elements


@dataclass(frozen=True)
class _Pair:
    """Two copies of one study. An image of which one server sends nothing is not the same on both."""

    study_uid: str
    one: Side
    other: Side
    max_spool_bytes: int

    @property
    def both_keep_bytes(self) -> bool:
        return self.one.pacs.keeps_bytes and self.other.pacs.keeps_bytes

    @property
    def apart(self) -> frozenset[int]:
        return self.one.pacs.rewrites.tags | self.other.pacs.rewrites.tags

    @property
    def known(self) -> frozenset[int]:
        return self.one.pacs.rewrites.known | self.other.pacs.rewrites.known

    @property
    def rewrites(self) -> tuple[Rewrites, Rewrites]:
        return self.one.rewrites, self.other.rewrites

    def read(
        self, side: Side, wanted: Collection[str], reader: Callable[[BinaryIO, str], T]
    ) -> Iterator[tuple[str, str, T | None]]:
        """UID, digest and what ``reader`` makes of each image; None, if its elements cannot be read."""
        for image in side.received(self.study_uid, wanted):
            uid = image.instance.sop_instance_uid
            if uid not in wanted:
                continue
            limits = Limits(self.max_spool_bytes, time.monotonic() + SPOOL_TIMEOUT_S, SPOOL_TIMEOUT_S)
            name = f"An image of {side.pacs.server.name}"
            with spool(image.chunks(), source=name, limits=limits) as fetched, fetched.open() as stream:
                try:
                    yield uid, image.sha256, reader(stream, image.instance.transfer_syntax_uid)
                except NotDicom:
                    yield uid, image.sha256, None


def compare(
    study_uid: str,
    one: Side,
    other: Side,
    wanted: Collection[str],
    *,
    max_spool_bytes: int,
    digests: Mapping[str, str] | None = None,
) -> Compared:
    """Compare the ``wanted`` images of a study. ``digests``: of the ``other`` side's, if they were just read."""
    pair = _Pair(study_uid, one, other, max_spool_bytes)
    found, rest, twice = Compared(), set(wanted), set[str]()
    if rest and other.pacs.keeps_bytes:
        given = digests if digests is not None else other.digests(study_uid, rest)
        expected = one.digests(study_uid, rest)
        twice = {uid for uid in rest if "" in (expected.get(uid), given.get(uid))}
        found.by_bytes = {uid for uid in rest - twice if uid in expected and expected[uid] == given.get(uid)}
        rest -= found.by_bytes
    if rest - twice and not pair.both_keep_bytes:
        _by_elements(pair, rest - twice, found)
        rest -= found.same
    found.different = sorted(rest)
    for uid in found.different[:NAMED]:
        found.tags[uid], found.why[uid] = _tags(pair, uid)
    return found


def _by_elements(pair: _Pair, wanted: Collection[str], found: Compared) -> None:
    def reader(stream: BinaryIO, transfer_syntax_uid: str) -> Fingerprint:
        return fingerprint(stream, transfer_syntax_uid, apart=pair.apart)

    expected: dict[str, tuple[str, Fingerprint | None]] = {}
    unlike: set[str] = set()  # of which one server has two under their UID, or the other something else
    for uid, sha256, ours in pair.read(pair.one, wanted, reader):
        if expected.setdefault(uid, (sha256, ours))[0] != sha256:
            unlike.add(uid)
    for uid, sha256, theirs in pair.read(pair.other, wanted, reader):
        digest, ours = expected.get(uid, ("", None))
        if sha256 == digest:
            found.by_bytes.add(uid)
        elif ours is not None and theirs is not None and equal(ours, theirs, rewrites=pair.rewrites):
            found.by_elements.add(uid)
        else:
            unlike.add(uid)
    found.by_bytes -= unlike
    found.by_elements -= unlike


def _tags(pair: _Pair, uid: str) -> tuple[list[str], str]:
    """Which elements of the image differ, and that in words."""

    def reader(stream: BinaryIO, transfer_syntax_uid: str) -> Table:
        return table(stream, transfer_syntax_uid, apart=pair.known)

    tables: list[Table] = []
    for side in (pair.one, pair.other):
        sent = [read for *_, read in pair.read(side, {uid}, reader)]
        if len(sent) != 1:
            return [], f"which {side.pacs.server.name} sends {len(sent)} times"
        if sent[0] is None:
            return [], f"which cannot be read to its end as {side.pacs.server.name} sends it"
        tables.append(sent[0])
    tags = differing(tables[0], tables[1], rewrites=pair.rewrites)
    return tags, f"in {', '.join(tags)}{_cause(pair, *tables)}" if tags else "in how its elements are encoded"


def _cause(pair: _Pair, ones: Table, others: Table) -> str:
    """Half a sentence, if all that differs is what one of the servers adds to images or changes in them."""
    for pacs, given, returned in ((pair.one.pacs, others, ones), (pair.other.pacs, ones, others)):
        if is_of(pacs.rewrites, given, returned, rewrites=pair.rewrites):
            return f", as {pacs.server.name} may have added or changed by itself"
    return ""
