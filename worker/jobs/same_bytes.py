"""Whether an image that a server has is the file that came: the server is asked for it now, and both are compared.

What a job of ours stored under its UID once, and a receipt tells, proves nothing: the image may have been deleted and
stored again since, by others. Preambles (PS3.10, 7.1) are not compared: they mean nothing, and servers may zero them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Literal

from courier.errors import CourierError, NotFound
from worker.dicom.fingerprints import Rewrites, Table, differing, is_of, table
from worker.dicom.instances import Instance, identify
from worker.jobs.streamed_instance import PREAMBLE_BYTES, whole
from worker.pacs.finding import find_known
from worker.pacs.protocol import Found, Pacs
from worker.pacs.stow import PREAMBLE
from worker.storage.spool import Limits, spool

#: Larger images are not retrieved to be compared.
COMPARED_BYTES = 64 * 1_048_576

Reason = Literal[
    "server_rewrites_files",
    "too_large",
    "server_did_not_answer",
    "gone_meanwhile",
    "file_not_at_hand",
    "left_to_verification",
]


@dataclass(frozen=True)
class Arrival:
    """A file as it came: what it says of itself, its size and digest, and where it was fetched.

    ``zero_preamble``: its preamble is there and all zeros. ``bare_sha256`` gives the digest of what follows the
    preamble, and ``open`` the file; None where the bytes are not at hand any more. ``elsewhere``: the servers that have
    the image in another study alone, each with that study.
    """

    instance: Instance
    size_bytes: int
    sha256: str
    source: str
    zero_preamble: bool = False
    bare_sha256: Callable[[], str] | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    open: Callable[[], BinaryIO] | None = None

    @property
    def image(self) -> Found:
        one = self.instance
        return Found("image", one.study_instance_uid, one.series_instance_uid, one.sop_instance_uid)


@dataclass(frozen=True)
class Comparison:
    """``same`` is None where it is not known, and ``reason`` says why; ``stored_sha256`` is of what is there now.

    ``tags`` names the elements that differ, without values, as far as both files can be read; ``made_by`` the servers
    that are known to add or change just these in what they give back.
    """

    same: bool | None
    stored_sha256: str | None = None
    reason: Reason | None = None
    tags: tuple[str, ...] = ()
    made_by: tuple[str, ...] = ()


#: How long the copy may take that is read to name what differs.
SPOOL_TIMEOUT_S = 600.0
_STRICTLY = (Rewrites(), Rewrites())
LEFT_TO_VERIFICATION = Comparison(None, reason="left_to_verification")


def compare(pacs: Pacs, arrival: Arrival, fleet: Iterable[Pacs] = ()) -> Comparison:
    """Retrieve the image from the server, unless it is large or the server rewrites files, and compare.

    What is there may be a copy that came from one of the ``fleet``.
    """
    if not pacs.keeps_bytes:
        return Comparison(None, reason="server_rewrites_files")
    if arrival.size_bytes > COMPARED_BYTES:
        return Comparison(None, reason="too_large")
    try:
        files = list(_retrieved(pacs, arrival.image))
    except NotFound:
        files = []
    except CourierError:
        return Comparison(None, reason="server_did_not_answer")
    if not files:
        return Comparison(None, reason="gone_meanwhile")
    verdicts = [file.is_of(arrival) for file in files]
    if True in verdicts:
        return Comparison(True, files[verdicts.index(True)].sha256)
    reason: Reason | None = "file_not_at_hand" if verdicts[0] is None else None
    return named(Comparison(verdicts[0], files[0].sha256, reason), pacs, arrival, fleet)


def named(found: Comparison, pacs: Pacs, arrival: Arrival, fleet: Iterable[Pacs]) -> Comparison:
    """``found``, and of a file that is another one, in which elements; what is there is read once more for that."""
    if found.same is not False or arrival.open is None:
        return found
    products = [one for one in fleet if one.rewrites.known]
    apart = frozenset().union(*(one.rewrites.known for one in products))
    try:
        with arrival.open() as file:
            given = table(file, arrival.instance.transfer_syntax_uid, apart=apart)
        there = next(_tables(pacs, arrival.image, apart), None)
    except CourierError:
        return found
    if there is None:
        return found
    tags = tuple(differing(given, there, rewrites=_STRICTLY))
    made_by = tuple(one.server.name for one in products if is_of(one.rewrites, given, there, rewrites=_STRICTLY))
    return replace(found, tags=tags, made_by=made_by)


def in_words(found: Comparison) -> str:
    """Half a sentence about the elements that differ; "" where none is named."""
    if not found.tags:
        return ""
    said = f"the two differ in {', '.join(found.tags)}"
    if not found.made_by:
        return said
    return f"{said}, as {' and '.join(found.made_by)} may have added or changed in what it gave back"


def _tables(pacs: Pacs, known: Found, apart: frozenset[int]) -> Iterator[Table]:
    for found in find_known(pacs, known):
        with pacs.retrieve(found) as parts:
            for part in parts:
                limits = Limits(COMPARED_BYTES + PREAMBLE_BYTES, time.monotonic() + SPOOL_TIMEOUT_S, SPOOL_TIMEOUT_S)
                source = f"An image of {pacs.server.name}"
                with spool(part.chunks, source=source, limits=limits) as fetched, fetched.open() as file:
                    yield table(file, identify(file).transfer_syntax_uid, apart=apart)


@dataclass(frozen=True)
class _FileDigests:
    """The digests of a file: whole, without its preamble, and with one of zeros; None if it is too large to be ours."""

    sha256: str | None
    bare_sha256: str | None = None
    zeroed_sha256: str | None = None

    def is_of(self, arrival: Arrival) -> bool | None:
        if self.sha256 is None:
            return False
        if self.sha256 == arrival.sha256 or not arrival.instance.has_preamble:
            return arrival.sha256 in (self.sha256, self.bare_sha256)
        if arrival.zero_preamble:
            return self.zeroed_sha256 == arrival.sha256
        return None if arrival.bare_sha256 is None else arrival.bare_sha256() == self.bare_sha256


def _retrieved(pacs: Pacs, known: Found) -> Iterator[_FileDigests]:
    """What the server has under the UID, in whichever study."""
    for found in find_known(pacs, known):
        with pacs.retrieve(found) as parts:
            for part in parts:
                yield _digests(part.chunks)


def _digests(chunks: Iterable[bytes]) -> _FileDigests:
    full, bare, zeroed = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(PREAMBLE)
    head, size_bytes = b"", 0
    for chunk in whole(chunks):
        full.update(chunk)
        size_bytes += len(chunk)
        if size_bytes > COMPARED_BYTES + PREAMBLE_BYTES:
            return _FileDigests(None)
        rest = chunk
        if len(head) < PREAMBLE_BYTES:
            head += chunk
            rest = head[PREAMBLE_BYTES:] if len(head) >= PREAMBLE_BYTES else b""
        bare.update(rest)
        zeroed.update(rest)
    if not head.endswith(b"DICM", 0, PREAMBLE_BYTES):  # without a preamble, all of it is the image
        return _FileDigests(full.hexdigest(), full.hexdigest())
    return _FileDigests(full.hexdigest(), bare.hexdigest(), zeroed.hexdigest())
