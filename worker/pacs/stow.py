"""STOW-RS (PS3.18 10.5): writing a body, and judging an answer instance by instance.

No HTTP here: the body is an iterable of blocks, the answer a parsed dataset. What a failure code means on a
given server is a table that its dialect hands in.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from courier.errors import CourierError, SourceTruncated
from courier.results import Dataset
from worker.dicom.instances import Instance
from worker.pacs.dicomjson import (
    FAILED_SOP_SEQUENCE,
    FAILURE_REASON,
    OTHER_FAILURES_SEQUENCE,
    REFERENCED_SOP_INSTANCE_UID,
    REFERENCED_SOP_SEQUENCE,
    items,
    number,
    text,
)
from worker.pacs.protocol import Fate, Outcome, Part, StreamedInstance

BLOCK_BYTES = 256 * 1024
PREAMBLE = b"\0" * 128 + b"DICM"

#: What a code in FailureReason (0008,1197) means for the job, and a sentence for people.
Codes = Mapping[int, tuple[Fate, str]]


class Sent(Protocol):
    """What an answer is matched to: a `Part`, or a `StreamedInstance` that has passed."""

    @property
    def instance(self) -> Instance: ...


class StowBody:
    """The multipart/related body for ``parts``; each iteration opens them afresh and reads them in blocks.

    Oddity: "The type of a part takes no parameter". A file without preamble gets one.
    Oddity: "Orthanc can do without a preamble".
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.content_type, self._opening, self._closing = _framing()

    @property
    def content_length(self) -> int:
        framing = len(self._opening) + len(b"\r\n")
        lengths = (framing + len(preamble_of(part)) + part.size_bytes for part in self._parts)
        return sum(lengths) + len(self._closing)

    def __iter__(self) -> Iterator[bytes]:
        return in_blocks(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        for part in self._parts:
            yield self._opening + preamble_of(part)
            yield from content_of(part)
            yield b"\r\n"
        yield self._closing


class Once:
    """Instances that pass by once; ``sent`` are those that have begun to.

    ``again`` makes the error for being asked for a second time.
    """

    def __init__(self, stream: Iterable[StreamedInstance], *, again: Callable[[], CourierError]) -> None:
        self.sent: list[StreamedInstance] = []
        self._stream: Iterable[StreamedInstance] | None = stream
        self._again = again

    def __iter__(self) -> Iterator[StreamedInstance]:
        if self._stream is None:
            raise self._again()
        stream, self._stream = self._stream, None
        for one in stream:
            self.sent.append(one)
            yield one


class StreamedBody:
    """As `StowBody`, for instances that pass by once and whose lengths nobody knows."""

    def __init__(self, stream: Once) -> None:
        self._stream = stream
        self.content_type, self._opening, self._closing = _framing()

    def __iter__(self) -> Iterator[bytes]:
        return in_blocks(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        for one in self._stream:
            yield self._opening + preamble_of(one)
            yield from one.chunks
            yield b"\r\n"
        yield self._closing


def _framing() -> tuple[str, bytes, bytes]:
    """The type of a multipart body with a boundary of its own, what stands before a part, and after the last."""
    boundary = secrets.token_hex(16)
    content_type = f'multipart/related; type="application/dicom"; boundary={boundary}'
    opening = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    return content_type, opening, f"--{boundary}--\r\n".encode()


def read_outcomes(
    parts: Sequence[Sent],
    answer: Dataset,
    *,
    codes: Codes,
    warnings_of: Callable[[Dataset], tuple[str, ...]],
    failure_of: Callable[[Sent, Dataset], Outcome] | None = None,
) -> list[Outcome]:
    """One outcome per part, in order, from the items of a STOW answer.

    ``failure_of`` reads an item of the failed ones, where there is more to it than its code.

    An image counts as failed that stands among the stored ones with a FailureReason, or among the failed ones as well.

    Items are matched by SOP Instance UID. Oddity: "A file that cannot be parsed comes back without a name".
    A failed item that bears no UID, or one that was never sent,
    belongs to a file the server could not read: those are matched to the parts left over, in order, if they
    are as many. So are the items of OtherFailuresSequence (PS3.18 Table I.1-1), which name no image; but
    their order is not that of the parts, so several of them have to give one reason. A part that no item speaks of is
    `UNMENTIONED`.
    """
    failure_of = failure_of or partial(failed_by_code, codes=codes)
    stored, failed = _items_by_uid(answer, Counter(part.instance.sop_instance_uid for part in parts))
    outcomes: list[Outcome | None] = []
    for part in parts:
        uid = part.instance.sop_instance_uid
        if stored.get(uid):
            outcomes.append(_stored(part, warnings_of(stored[uid].pop(0))))
        elif failed.get(uid):
            outcomes.append(failure_of(part, failed[uid].pop(0)))
        else:
            outcomes.append(None)
    others = items(answer, OTHER_FAILURES_SEQUENCE)
    nameless = [*(item for left in failed.values() for item in left), *others]
    if others and len({number(item, FAILURE_REASON) for item in nameless}) > 1:
        nameless = []
    return _eliminate(parts, outcomes, nameless, failure_of)


def _items_by_uid(
    answer: Dataset, sent: Mapping[str, int]
) -> tuple[dict[str, list[Dataset]], dict[str, list[Dataset]]]:
    """The items of the stored and of the failed images by UID. Where they contradict each other, none counts as stored.

    ``sent``: how often each UID was sent.
    """
    named = items(answer, REFERENCED_SOP_SEQUENCE)
    refused = [item for item in named if number(item, FAILURE_REASON)]
    stored = _by_uid(item for item in named if not number(item, FAILURE_REASON))
    failed = _by_uid([*items(answer, FAILED_SOP_SEQUENCE), *refused])
    for uid in stored.keys() & failed.keys():
        if len(stored[uid]) + len(failed[uid]) > sent.get(uid, 0):
            del stored[uid]
    return stored, failed


def fate_of(code: int | None, codes: Codes) -> tuple[Fate, str]:
    """What a failure code means: the dialect's own table first, then the ranges of PS3.4 and PS3.18 I.2.2."""
    if code is None:
        return Fate.TRY_AGAIN, "The server names no reason."
    if code in codes:
        return codes[code]
    if code in STANDARD_CODES:
        return STANDARD_CODES[code]
    for family, meaning in _FAMILIES.items():
        if code & family[1] == family[0]:
            return meaning
    return Fate.TRY_AGAIN, f"The server names a reason that is not documented ({code})."


STANDARD_CODES: Codes = {
    0x0106: (Fate.REJECTED, "An attribute has a value that the server does not accept."),
    0x0110: (Fate.TRY_AGAIN, "The server failed while it stored the image."),
    0x0111: (Fate.ALREADY_THERE, "The server has this image already."),
    0x0117: (Fate.REJECTED, "The SOP Instance UID is not acceptable to the server."),
    0x0119: (Fate.CONFLICT, "The SOP class is not the one the server knows for this image."),
    0x0120: (Fate.REJECTED, "An attribute that the server needs is missing."),
    0x0121: (Fate.REJECTED, "An attribute that the server needs is empty."),
    0x0122: (Fate.REJECTED, "The server does not take this SOP class."),
    0x0124: (Fate.REJECTED, "The server does not allow this account to store the image."),
    0xC122: (Fate.REJECTED, "The server does not take this transfer syntax."),
}
_FAMILIES: Mapping[tuple[int, int], tuple[Fate, str]] = {
    (0xA700, 0xFF00): (Fate.TRY_AGAIN, "The server is out of resources."),
    (0xA900, 0xFF00): (Fate.REJECTED, "The dataset does not match its SOP class."),
    (0xC000, 0xF000): (Fate.REJECTED, "The server cannot understand the image."),
}


def _stored(part: Sent, warnings: tuple[str, ...]) -> Outcome:
    return Outcome(part.instance.sop_instance_uid, Fate.STORED, warnings=warnings)


def failed_by_code(part: Sent, item: Dataset, *, codes: Codes) -> Outcome:
    """What a failed item says by its FailureReason alone."""
    code = number(item, FAILURE_REASON)
    fate, sentence = fate_of(code, codes)
    return Outcome(part.instance.sop_instance_uid, fate, failure_reason=code, message=sentence)


def _eliminate(
    parts: Sequence[Sent],
    outcomes: Sequence[Outcome | None],
    nameless: Sequence[Dataset],
    failure_of: Callable[[Sent, Dataset], Outcome],
) -> list[Outcome]:
    left = sum(outcome is None for outcome in outcomes)
    matched = iter(nameless if len(nameless) == left else ())
    judged = []
    for part, outcome in zip(parts, outcomes, strict=True):
        if outcome is not None:
            judged.append(outcome)
        elif (item := next(matched, None)) is not None:
            judged.append(failure_of(part, item))
        else:
            judged.append(_unmentioned(part, left=left))
    return judged


def _unmentioned(part: Sent, *, left: int) -> Outcome:
    others = f", nor {left - 1} others" if left > 1 else ""
    sentence = f"The server's answer does not mention the image{others}, so it counts as not stored."
    return Outcome(part.instance.sop_instance_uid, Fate.UNMENTIONED, message=sentence)


def unmentioned(parts: Sequence[Sent]) -> list[Outcome]:
    """What an answer without any item means."""
    return [_unmentioned(part, left=len(parts)) for part in parts]


def rejected_if_alone(outcomes: list[Outcome], sentence: str) -> list[Outcome]:
    """Where a server says "bad file" without saying which: the only part left unmentioned is the one.

    With several of them nobody knows which is bad, and they stay `UNMENTIONED` to be sent one by one.
    """
    silent = [i for i, outcome in enumerate(outcomes) if outcome.fate is Fate.UNMENTIONED]
    if len(silent) == 1:
        i = silent[0]
        outcomes[i] = replace(outcomes[i], fate=Fate.REJECTED, message=sentence)
    return outcomes


def _by_uid(found: Iterable[Dataset]) -> dict[str, list[Dataset]]:
    by_uid: dict[str, list[Dataset]] = {}
    for item in found:
        by_uid.setdefault(text(item, REFERENCED_SOP_INSTANCE_UID), []).append(item)
    return by_uid


def preamble_of(part: Sent) -> bytes:
    """What goes before a file that comes without a preamble (PS3.10 7.1)."""
    return b"" if part.instance.has_preamble else PREAMBLE


def content_of(part: Part) -> Iterator[bytes]:
    """The part's bytes, which have to be as many as announced: the server would wait for the rest."""
    left = part.size_bytes
    try:
        with part.open() as stream:
            while block := stream.read(min(BLOCK_BYTES, left)):
                left -= len(block)
                yield block
    except OSError as error:
        raise SourceTruncated(f"The spooled file cannot be read: {error.strerror}.") from error
    if left:
        raise SourceTruncated(f"The spooled file ends {left} bytes before the {part.size_bytes} announced.")


def in_blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Small pieces joined into blocks, because each becomes a system call and a packet."""
    pending: list[bytes] = []
    size = 0
    for piece in pieces:
        pending.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(pending)
            pending, size = [], 0
    if pending:
        yield b"".join(pending)
