"""What every destination can do, and the mark by which a download is known again. No place's habit lives here."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

from courier.errors import InvalidRequest, SourceUnreachable

MANIFEST = "manifest.json"
CHUNK_BYTES = 1_048_576
#: The name of what a probe writes and removes, but for its end.
PROBE = ".pacs-courier-probe-"
#: What reading an archive, its manifest and its entries raises where they are damaged.
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    RuntimeError,
    struct.error,
)


@dataclass(frozen=True)
class StudyFingerprint:
    """What a finished download holds: which study, and exactly which of its images (a digest of their UIDs)."""

    study_uid: str
    images: int
    images_sha256: str

    @classmethod
    def of(cls, study_uid: str, image_uids: Iterable[str]) -> StudyFingerprint:
        uids = sorted(image_uids)
        return cls(study_uid, len(uids), hashlib.sha256("\n".join(uids).encode()).hexdigest())

    @classmethod
    def of_manifest(cls, manifest: bytes) -> StudyFingerprint | None:
        """The mark of a download's manifest; None if it is something else."""
        try:
            document: Any = json.loads(manifest)
            return cls.of(str(document["study_uid"]), [str(one["image_uid"]) for one in document["instances"]])
        except (ValueError, KeyError, TypeError):
            return None


class Records(Protocol):
    """What all workers have to know of stores. The ledger keeps it; `OwnRecords` is one process's."""

    def upload_begun(self, url: str, upload_id: str) -> None:
        """A multipart upload to ``url`` is ours until `upload_ended`."""
        ...

    def upload_ended(self, url: str, upload_id: str) -> None: ...

    def uploads_begun(self, url: str) -> set[str]: ...

    def overwrites_prevented(self, place: str) -> bool | None:
        """What the last probe of a place found; None if no worker has probed it lately."""
        ...

    def note_overwrites(self, place: str, *, prevented: bool) -> None: ...


class OwnRecords:
    """`Records` in the memory of this process."""

    def __init__(self) -> None:
        self._uploads: dict[str, set[str]] = {}
        self._prevented: dict[str, bool] = {}

    def upload_begun(self, url: str, upload_id: str) -> None:
        self._uploads.setdefault(url, set()).add(upload_id)

    def upload_ended(self, url: str, upload_id: str) -> None:
        self._uploads.get(url, set()).discard(upload_id)

    def uploads_begun(self, url: str) -> set[str]:
        return set(self._uploads.get(url, ()))

    def overwrites_prevented(self, place: str) -> bool | None:
        return self._prevented.get(place)

    def note_overwrites(self, place: str, *, prevented: bool) -> None:
        self._prevented[place] = prevented


class Archive(Protocol):
    """One file. ``shown`` is its URL as it may be told. ``overwrites_prevented`` is False after a write for which the
    store could not promise that it replaced nothing.

    A question (`read_fingerprint`, `read`) SHALL change nothing.

    It SHALL raise `InvalidRequest` where somebody has to change something (``details["reason"]``: ``not_allowed``,
    ``exists``, ``missing``, ``denied``, ``full``) and `SourceUnreachable` where time may cure it, and SHALL leave
    nothing behind then.
    """

    shown: str
    overwrites_prevented: bool

    def read_fingerprint(self) -> StudyFingerprint | None:
        """What is there: None if nothing, `InvalidRequest` (``exists``) if it is no download of ours."""
        ...

    def write(self, chunks: Iterator[bytes], fingerprint: StudyFingerprint) -> int:
        """Put ``chunks`` there, to be seen when all have come; the size in bytes. Their errors pass through."""
        ...

    def read(self) -> Iterator[bytes]:
        """What is there, from its first byte."""
        ...


class Files(Protocol):
    """A folder of files, named by relative paths with ``/``; the rest as in `Archive`."""

    shown: str
    overwrites_prevented: bool

    def read_fingerprint(self) -> StudyFingerprint | None: ...

    def names(self) -> set[str]:
        """What an unfinished download has left there: files that came whole."""
        ...

    def read(self, name: str) -> Iterator[bytes]: ...

    def write(self, name: str, chunks: Iterator[bytes]) -> int:
        """Write a file. One that `names` has shown is replaced if it is unchanged since; any other is left alone."""
        ...

    def finish(self, manifest: bytes) -> None:
        """Add the manifest, which makes the download whole."""
        ...


def unpacked(file: IO[bytes]) -> zipfile.ZipFile:
    """The archive in ``file``; what it raises is `UNREADABLE`.

    Our archives store their entries, or deflate them. A directory that says otherwise, or names a position before the
    beginning, is damaged; reading such an entry would raise errors of other kinds.
    """
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.header_offset < 0:
            archive.close()
            raise zipfile.BadZipFile("its directory is damaged")
    return archive


def refusal(sentence: str, reason: str, more: Mapping[str, Any] | None = None) -> InvalidRequest:
    return InvalidRequest(sentence, details={"field": "destination", "reason": reason, **(more or {})})


def occupied(shown: str) -> InvalidRequest:
    return refusal(f"{shown} holds something else; nothing is laid over it: name another place.", "exists")


@contextmanager
def retried_if_taken(shown: str) -> Iterator[None]:
    """For a file of an unfinished download: it may have been written by another attempt at it, which the next one sees.

    Raises
    ------
    SourceUnreachable
        Instead of `occupied`.
    """
    try:
        yield
    except InvalidRequest as error:
        if error.details.get("reason") != "exists":
            raise
        sentence = (
            f"{shown} was written, or is being uploaded, by another program or attempt meanwhile; it is tried again."
        )
        raise SourceUnreachable(sentence) from error


def blocks_of(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of ``size``, the last one shorter."""
    block = bytearray()
    for chunk in chunks:
        block += chunk
        while len(block) >= size:
            yield bytes(memoryview(block)[:size])
            del block[:size]
    if block:
        yield bytes(block)
