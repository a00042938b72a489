"""What every PACS dialect owes the jobs: one Protocol, and the values that pass through it.

No HTTP here and no vendor's habit: those live in ``dicomweb.py`` (shared mechanics) and in one file per
dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

from courier.messages import Level
from courier.results import Dataset
from courier.settings import ServerSettings
from worker.dicom.fingerprints import Rewrites
from worker.dicom.instances import Instance

#: How images are read: as the settings say; as the server shows them, whatever the settings say; or for a backup, which
#: returns to the same server, and must bring back all that the server shows.
View = Literal["as_set", "as_shown", "to_return"]


#: In the details of an error: the server finds the object only below its study; and, of a status that a server gives to
#: every search: it has no studies, or its url is wrong.
NEEDS_STUDY, NOTHING_OR_WRONG_URL = "needs_study", "nothing_or_wrong_url"


@dataclass(frozen=True)
class Found:
    """One image, series or study that a server has, with the UIDs of everything above it."""

    level: Level
    study_instance_uid: str
    series_instance_uid: str | None = None
    sop_instance_uid: str | None = None
    attributes: Dataset = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One instance to push. ``open`` gives a fresh stream at byte 0 each time: a body can be rebuilt."""

    instance: Instance
    open: Callable[[], BinaryIO]
    size_bytes: int


@dataclass(frozen=True)
class StreamedInstance:
    """One instance to push while it arrives from elsewhere. ``chunks`` come once, and nobody knows how many."""

    instance: Instance
    chunks: Iterator[bytes]


class Fate(Enum):
    """What a server's answer means for one instance, and so what happens next."""

    STORED = "stored"
    ALREADY_THERE = "already_there"
    PENDING = "pending"  # another store of it is under way, or was left behind (MSDICOM 45071)
    TRY_AGAIN = "try_again"  # the server was in trouble (272, 42752 …)
    CONFLICT = "conflict"  # it contradicts what the server holds of the study
    REJECTED = "rejected"  # the server will never take it
    UNMENTIONED = "unmentioned"  # sent, but in neither sequence: not stored


@dataclass(frozen=True)
class Outcome:
    """A PACS's answer for one instance.

    ``failure_reason`` is FailureReason (0008,1197) as the server gave it; ``message`` is a sentence without
    patient data; ``warnings`` are what the server stored in spite of. ``is_doubtful``: the failure may lie in the
    server or in the image itself. ``is_moot``: it is a note that only hides images, and the server has none of them, so
    nothing is lost without it. ``details`` belong into the details of the error that comes of it.
    """

    sop_instance_uid: str
    fate: Fate
    failure_reason: int | None = None
    message: str = ""
    warnings: tuple[str, ...] = ()
    is_doubtful: bool = False
    is_moot: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyPage:
    """One page of a server's studies: those that match the filters. ``next_offset`` is None after the last page.

    ``dropped`` rows came with it and do not match; ``lacking`` are filtered attributes that no row has. A server may
    ignore ``offset``: then a page has the ``fingerprint`` of the one before (None: that of ``studies``; "": the server
    minds the offset). ``is_full``: it holds as many rows as were asked for; ``is_over``: more. ``start`` is where the
    present query's list begins, and ``after`` where the list goes on behind all that the server has for it.
    ``is_sorted``: the whole list comes the newest first.
    """

    studies: list[Dataset]
    next_offset: int | None
    dropped: int = 0
    lacking: tuple[str, ...] = ()
    is_full: bool = False
    fingerprint: str | None = None
    after: int | None = None
    is_over: bool = False
    is_sorted: bool = False
    start: int = 0


class DeletionFate(Enum):
    DELETED = "deleted"
    HIDDEN = "hidden"
    NOT_THERE = "not_there"
    REFUSED = "refused"


@dataclass(frozen=True)
class Deletion:
    """What a server made of a delete. ``note``: what frees a hidden object and when, or why it was
    refused. ``code``: that of a refusal: the server's own, or `invalid_request` where the settings forbid it.
    ``images``: how many it says that were hidden.
    """

    fate: DeletionFate
    note: str = ""
    code: str = "pacs_rejected"
    images: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Retrieved:
    """One instance of a WADO-RS answer. ``chunks`` are its bytes as they arrive, to be used up in turn."""

    transfer_syntax_uid: str | None
    chunks: Iterator[bytes]


@dataclass(frozen=True)
class ServerState:
    """What a server says of itself; None is "could not be asked", never a guess.

    ``warnings``: what it lacks although it is ready, and what follows from that.
    """

    product: str | None = None
    version: str | None = None
    ready: bool | None = None
    note: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StorageState:
    """``is_well`` is False where the server says that it can store nothing: its storage is full or cannot be opened."""

    total_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    note: str = ""
    is_well: bool | None = None


@dataclass(frozen=True)
class DatabaseState:
    """``ok`` is None where the server offers no call that touches its database."""

    ok: bool | None
    note: str = ""


class Pacs(Protocol):
    """One configured server.

    A dialect SHALL raise only `courier.errors`: `PacsUnavailable` when the server did not answer or said it
    is in trouble, `PacsUnauthorized` on 401 (after one fresh token) and 403, `PacsMisanswered` when an
    answer cannot be what was asked for, `PacsRejected` when the request as a whole was refused for good;
    each names the server. It SHALL NOT sleep, retry, follow a redirect to another host, or read the
    environment. It SHALL be safe to use from several threads at once.
    """

    server: ServerSettings

    @property
    def keeps_bytes(self) -> bool:
        """Whether a retrieved instance is byte for byte what was stored (transfer-syntax=*)."""
        ...

    @property
    def rewrites(self) -> Rewrites:
        """What is documented of how a retrieved instance differs from what was stored; nothing where bytes are kept.

        An element that is not named here SHALL count as the image's own: where it differs, the images differ. Each
        dialect's list stands in docs/pacs-oddities.md as well.
        """
        ...

    @property
    def hiding(self) -> Hiding | None:
        """What it does not show, where it can hide; None where all that it has is shown."""
        ...

    @property
    def request_bytes(self) -> int | None:
        """How many bytes the body of one `store` may have, as documented; None where nothing is."""
        ...

    def find(self, level: Level, uid: str) -> list[Found]:
        """Every object of ``level`` that bears ``uid``; [] only when the server said that there is none.

        Raises `PacsMisanswered` with `NEEDS_STUDY` in its details where the server finds it only below its study; see
        `worker.pacs.finding`.
        """
        ...

    def present(self, study_instance_uid: str, sop_instance_uids: Collection[str]) -> set[str]:
        """Those of the images that the server has in that study, in as few questions as it allows."""
        ...

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        """One outcome per part, in the order given, judged by the answer's items, never by its status."""
        ...

    @property
    def accepts_streams(self) -> bool:
        """Whether it is known to take a body whose length is not announced, as `store_stream` sends."""
        ...

    def store_stream(self, stream: Iterable[StreamedInstance]) -> list[Outcome]:
        """As `store`, in one request, for instances that arrive while they are sent: one outcome for each that came.

        Nothing can be sent a second time: where a fresh token would be needed, it raises `PacsUnavailable`. What
        ``stream`` raises breaks the request off before its closing boundary, and is raised again.
        """
        ...

    def metadata(self, found: Found) -> list[Dataset]:
        """DICOM JSON of every instance below ``found``; [] if it is gone."""
        ...

    def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        """One page of studies with at least the study's UID; ``filters`` are DICOM keywords.

        Every row SHALL match all filters (PS3.4 C.2.2.2), whatever the server sends. A study can stand on two pages;
        the caller drops the second. `worker.jobs.study_lists.study_pages` goes through them. Offsets are the dialect's
        own. Raises `InvalidRequest` for a filter that is none, or that the dialect cannot match.
        """
        ...

    def check_order_filters(self, filters: Mapping[str, str]) -> None:
        """Raise `InvalidRequest` if nothing may be deleted, moved, hidden or copied by ``filters``. Asks no server.

        So it is where a filter is none, where none of them narrows the server's list and one is not matched by the
        server, and where its list does not show what has to match.
        """
        ...

    def instances(self, found: Found) -> Iterator[Found]:
        """Every image below ``found``, asked page by page; one can come twice if the study changes meanwhile."""
        ...

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:
        """What deleting an object of ``level`` comes to here. Nothing is asked of the server."""
        ...

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        """Make ``found`` go away; `NOT_THERE` if it already was."""
        ...

    def retrieve(self, found: Found, *, view: View = "as_set") -> AbstractContextManager[Iterator[Retrieved]]:
        """The instances below ``found`` in their stored transfer syntax, streamed; never one that is not listed.

        A body that ends before its closing boundary raises `PacsMisanswered`; `NotFound` if it is gone.
        """
        ...

    def state(self) -> ServerState: ...

    def storage(self) -> StorageState: ...

    def database(self) -> DatabaseState: ...


@runtime_checkable
class ListsNewestFirst(Protocol):
    """A server that sorts its list."""

    def newest_studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        """As `Pacs.studies`, the studies of the latest date and time first."""
        ...


class Hiding(Protocol):
    """What a server has and does not show, although it called that stored: hidden, or kept in another study."""

    def find_study(self, study_instance_uid: str) -> list[Found]:
        """The study, although all of its images may be hidden; [] also where the account may not look."""
        ...

    def why_unseen(self, instance: Instance) -> Outcome | None:
        """What became of an image that was answered as stored, and is not shown in its study.

        None: it is shown by now, or the server does not say.
        """
        ...

    def images(self, study_instance_uid: str) -> list[Found] | None:
        """The images of the study that deletions which only hide have hidden; None where the account may not look."""
        ...

    def revoke(self, found: Found) -> int:
        """Show again what such deletions have hidden of ``found``; how many images that were."""
        ...

    def delete_hidden(self, study_instance_uid: str) -> Deletion:
        """Delete for good a study of which all images are hidden. Nothing is hidden for that.

        It SHALL be refused, or find nothing, where one of the images is shown. What the settings protect is not known
        here: the caller asks `Pacs.deletion` first.
        """
        ...
