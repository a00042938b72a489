"""What every destination can do, and the mark by which a download is known again. No place's habit lives here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from worker.errors import InvalidRequest

MANIFEST = "manifest.json"
CHUNK_BYTES = 1_048_576


@dataclass(frozen=True)
class Mark:
    """What a finished download holds: which study, and exactly which of its images (a digest of their UIDs)."""

    study_uid: str
    images: int
    images_sha256: str

    @classmethod
    def of(cls, study_uid: str, image_uids: Iterable[str]) -> Mark:
        uids = sorted(image_uids)
        return cls(study_uid, len(uids), hashlib.sha256("\n".join(uids).encode()).hexdigest())

    @classmethod
    def of_manifest(cls, manifest: bytes) -> Mark | None:
        """The mark of a download's manifest; None if it is something else."""
        try:
            document: Any = json.loads(manifest)
            return cls.of(str(document["study_uid"]), [str(one["image_uid"]) for one in document["instances"]])
        except (ValueError, KeyError, TypeError):
            return None


class Archive(Protocol):
    """One file. ``shown`` is its URL as it may be told.

    It SHALL raise `InvalidRequest` where somebody has to change something (``details["reason"]``: ``not_allowed``,
    ``exists``, ``missing``, ``denied``, ``full``) and `SourceUnreachable` where time may cure it, and SHALL leave
    nothing behind then.
    """

    shown: str

    def look(self) -> Mark | None:
        """What is there: None if nothing, `InvalidRequest` (``exists``) if it is no download of ours."""
        ...

    def write(self, chunks: Iterator[bytes], mark: Mark) -> int:
        """Put ``chunks`` there, to be seen when all have come; the size in bytes. Their errors pass through."""
        ...

    def read(self) -> Iterator[bytes]:
        """What is there, from its first byte."""
        ...


class Files(Protocol):
    """A folder of files, named by relative paths with ``/``; errors as in `Archive`."""

    shown: str

    def look(self) -> Mark | None: ...

    def names(self) -> set[str]:
        """What an unfinished download has left there: files that came whole."""
        ...

    def read(self, name: str) -> Iterator[bytes]: ...

    def write(self, name: str, chunks: Iterator[bytes]) -> int: ...

    def finish(self, manifest: bytes) -> None:
        """Add the manifest, which makes the download whole."""
        ...


def refusal(sentence: str, reason: str, more: Mapping[str, Any] | None = None) -> InvalidRequest:
    return InvalidRequest(sentence, details={"field": "destination", "reason": reason, **(more or {})})


def something_else(shown: str) -> InvalidRequest:
    return refusal(f"{shown} holds something else; nothing is laid over it: name another place.", "exists")
