"""An image while it passes through a worker: known by its first bytes, hashed and counted as it goes, never kept.

What passes is followed to its end: an image that ends too early raises before its last bytes are given out, so that
no server and no archive takes it for whole. Where it comes from and where it goes is the affair of the caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from courier.errors import CourierError, InvalidUid, MissingUid, NotDicom
from worker.dicom.instances import Instance, Reading

#: Within so many bytes a file has to say whose it is.
MAX_HEAD_BYTES = 8 * 1_048_576
#: The preamble of a file, and the word after it that one without a preamble lacks too.
PREAMBLE_BYTES = 132

#: What to raise instead of what is wrong with an image.
Blame = Callable[[CourierError], CourierError]


class Incoming:
    """One image, whose bytes are there once.

    ``with_preamble``: whether the digest is that of the file, or of what follows the preamble, which means nothing
    and which not every server keeps.

    Raises
    ------
    CourierError
        It cannot be read, or ends too early: what ``blame`` makes of `NotDicom`, `MissingUid` or `InvalidUid`. As long
        as its bytes pass too; the last of them do not pass then.
    """

    def __init__(self, content: Iterator[bytes], *, blame: Blame, with_preamble: bool = True) -> None:
        self._content = content
        self._blame = blame
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        #: Whether all of it has passed, and its structure proves that it is whole.
        self.is_proven = False
        self._reading = Reading()
        try:
            self._head, self.instance = self._identified()
        except (NotDicom, MissingUid, InvalidUid) as error:
            raise blame(error) from error
        self._unhashed = PREAMBLE_BYTES if self.instance.has_preamble and not with_preamble else 0

    def ahead(self, most_bytes: int) -> bytes | None:
        """All of the image, which still passes afterwards; None if it is larger than that. Once, before `chunks`."""
        chunks, size_bytes = list[bytes](), len(self._head)
        for chunk in self._content:
            chunks.append(chunk)
            size_bytes += len(chunk)
            if size_bytes > most_bytes:
                break
        self._content = chain(chunks, self._content)
        return None if size_bytes > most_bytes else b"".join([self._head, *chunks])

    def chunks(self) -> Iterator[bytes]:
        """All of it; afterwards `size_bytes` and `sha256` are those of the image."""
        held, self._head = self._head, b""
        try:
            for chunk in self._content:
                self._reading.feed(chunk)
                if chunk:
                    yield self._passed(held)
                    held = chunk
            is_proven = self._reading.end()
        except (NotDicom, MissingUid, InvalidUid) as error:
            raise self._blame(error) from error
        yield self._passed(held)
        self.is_proven = is_proven

    def _passed(self, chunk: bytes) -> bytes:
        self._digest.update(memoryview(chunk)[self._unhashed :] if self._unhashed else chunk)
        self._unhashed = 0  # the first chunk is longer than that, or nobody could have read whose image it is
        self.size_bytes += len(chunk)
        return chunk

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _identified(self) -> tuple[bytes, Instance]:
        """As many bytes as it takes to know whose they are."""
        head = bytearray()
        for chunk in self._content:
            head += chunk
            self._reading.feed(chunk)
            if self._reading.instance is not None:
                return bytes(head), self._reading.instance
            if len(head) > MAX_HEAD_BYTES:
                raise NotDicom("The file does not say in its first bytes which image it is.")
        self._reading.end()
        if self._reading.instance is None:
            raise NotDicom("The file does not say in its first bytes which image it is.")
        return bytes(head), self._reading.instance


def whole(content: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of an image whose name is not asked for; `NotDicom` before the last of them if it ends too early."""
    reading, held = Reading(), b""
    for chunk in content:
        reading.feed(chunk)
        yield held
        held = chunk
    reading.end(is_named=False)
    yield held


def digest_of(content: Iterator[bytes]) -> str:
    """The SHA-256 of an image whose name is not asked for, without its preamble if it has one; errors as `whole`."""
    content = whole(content)
    head, digest = b"", hashlib.sha256()
    for chunk in content:
        head += chunk
        if len(head) >= PREAMBLE_BYTES:
            break
    has_preamble = head[PREAMBLE_BYTES - 4 : PREAMBLE_BYTES] == b"DICM"
    digest.update(memoryview(head)[PREAMBLE_BYTES:] if has_preamble else head)
    for chunk in content:
        digest.update(chunk)
    return digest.hexdigest()
