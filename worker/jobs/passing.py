"""An image while it passes through a worker: known by its first bytes, hashed and counted as it goes, never kept.

Where it comes from and where it goes is the affair of whoever lets it pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

from worker.errors import NotDicom
from worker.instances import Instance, identify_prefix

#: Within so many bytes a file has to say whose it is.
MAX_HEAD_BYTES = 8 * 1_048_576
#: The preamble of a file, and the word after it that one without a preamble lacks too.
PREAMBLE_BYTES = 132


class Incoming:
    """One image, whose bytes are there once.

    ``with_preamble``: whether the digest is that of the file, or of what follows the preamble, which means nothing
    and which not every server keeps.

    Raises
    ------
    NotDicom, MissingUid, InvalidUid
        It cannot be read.
    """

    def __init__(self, content: Iterator[bytes], *, with_preamble: bool = True) -> None:
        self._content = content
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        self._head, self.instance = _identified(content)
        self._unhashed = PREAMBLE_BYTES if self.instance.has_preamble and not with_preamble else 0

    def chunks(self) -> Iterator[bytes]:
        """All of it; afterwards `size_bytes` and `sha256` are those of the image."""
        head, self._head = self._head, b""
        for chunk in chain((head,), self._content):
            self._digest.update(memoryview(chunk)[self._unhashed :] if self._unhashed else chunk)
            self._unhashed = 0  # the first chunk is longer than that, or nobody could have read whose image it is
            self.size_bytes += len(chunk)
            yield chunk

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def digest_of(content: Iterator[bytes]) -> str:
    """The SHA-256 of an image whose name is not asked for, without its preamble if it has one."""
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


def _identified(content: Iterator[bytes]) -> tuple[bytes, Instance]:
    """As many bytes as it takes to know whose they are, tried again each time they have doubled."""
    head, tried_bytes = bytearray(), 0
    for chunk in content:
        head += chunk
        if len(head) >= 2 * tried_bytes:
            tried_bytes = len(head)
            if (instance := identify_prefix(bytes(head))) is not None:
                return bytes(head), instance
        if len(head) > MAX_HEAD_BYTES:
            break
    instance = identify_prefix(bytes(head))
    if instance is None:
        raise NotDicom("The file does not say in its first bytes which image it is.")
    return bytes(head), instance
