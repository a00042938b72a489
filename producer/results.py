"""What `Handle.result` returns; ``python -m courier.schema`` makes it from courier/messages.py."""

from typing import Any, Literal

from typing_extensions import TypedDict

__all__ = [
    "AuditResult",
    "AuditedServerDict",
    "BatchFailureDict",
    "BatchPassStateDict",
    "BatchResult",
    "BatchServerDict",
    "BatchStateResult",
    "BatchTroubleDict",
    "DatabaseEntryDict",
    "DatabaseResult",
    "DeleteAllResult",
    "DeleteResult",
    "DeletedEntryDict",
    "DownloadResult",
    "ElsewhereEntryDict",
    "FaultDict",
    "FoundEntryDict",
    "FoundResult",
    "ListedServerDict",
    "OnlyOnDict",
    "PlaceDict",
    "PlaceEntryDict",
    "RateLimitDict",
    "RouteDict",
    "SplitOnDict",
    "SplitStudyDict",
    "StatusEntryDict",
    "StatusResult",
    "StorageEntryDict",
    "StorageResult",
    "StudiesResult",
    "StudyEntryDict",
    "StudyOnDict",
    "SuspensionEntryDict",
    "TraceClaimDict",
    "TraceEntryDict",
    "TraceEventDict",
    "TracePushDict",
    "TraceReceiptDict",
    "TraceResult",
    "TracedJobDict",
    "UploadResult",
    "WaitingDict",
]


class AuditedServerDict(TypedDict):
    """``studies``: how many this server has; ``dropped``, ``lacking``, ``may_be_cut`` as in `ListedServer`."""

    server_name: str
    server_type: str
    studies: int
    dropped: int
    lacking: list[str]
    may_be_cut: bool


class SplitOnDict(TypedDict):
    """One server's copy of a split study; ``images`` as its list of them was counted."""

    server_name: str
    server_type: str
    images: int
    viewer_url: str


class OnlyOnDict(TypedDict):
    """Images that exactly these servers have, of those that have the study. ``image_uids`` may be fewer than
    ``images``: the rest comes by pages, with the study's UID in the job.
    """

    servers: list[str]
    images: int
    image_uids: list[str]


class SplitStudyDict(TypedDict):
    """A study on more than one server. ``images`` counts each once; ``keep`` is the server that has most of them."""

    study_uid: str
    overlap: Literal["equal", "partial", "none"]
    images: int
    keep: str
    servers: list[SplitOnDict]
    only_on: list[OnlyOnDict]


class AuditResult(TypedDict):
    """The result of `pacs.audit`. ``studies`` and ``split`` are totals; ``cursor`` of None: no entries follow.

    With ``not_asked`` servers, which are in maintenance, the audit is incomplete: what they have is not compared.
    ``left_out``: so many studies that were stored elsewhere during the ``maintenance`` of a server were too many to be
    kept, and are not compared either.
    """

    operation: Literal["audit"]
    job_id: str
    servers: list[AuditedServerDict]
    studies: int
    split: int
    entries: list[SplitStudyDict]
    cursor: str | None
    not_asked: list[str]
    maintenance: str | None
    left_out: int
    timings_ms: dict[str, float]
    attempts: int


class BatchPassStateDict(TypedDict):
    """How far one pass of a batch is. ``totals`` are the items by what became of them in it.

    ``requested_by`` and ``reason`` are those of the job that began it.
    """

    chunks_finished: int
    settled: int
    bytes: int
    begun_ms: int | None
    ended_ms: int | None
    totals: dict[str, int]
    requested_by: str | None
    reason: str | None


class BatchServerDict(TypedDict):
    """What became of the items on one server, in all passes but the survey.

    An item that several servers were asked for counts for each of them, so the rows can add up to more than the items.
    ``planned``: the items for which the plan names the server. ``remaining``: how many studies it lists afterwards.
    """

    server_name: str
    server_type: str | None
    planned: int
    skipped: int
    stored: int
    already_there: int
    copied: int
    downloaded: int
    deleted: int
    hidden: int
    not_there: int
    refused: int
    failed: int
    verified: int
    differs: int
    missing: int
    unverified: int
    undone: int
    kept: int
    remaining: int | None


BatchTroubleDict = TypedDict(
    "BatchTroubleDict",
    {
        "number": int,
        "item": str,
        "pass": Literal["survey", "apply", "verify", "undo"],
        "server_name": str | None,
        "server_type": str | None,
        "status": str,
        "code": str,
        "message": str,
    },
)
"""An item that is not as it should be, and the pass that says so."""


BatchResult = TypedDict(
    "BatchResult",
    {
        "operation": Literal["batch"],
        "job_id": str,
        "batch_id": str,
        "name": str,
        "kind": str,
        "state": Literal[
            "planning", "planned", "running", "verifying", "paused", "cancelled", "done", "undoing", "undone"
        ],
        "pass": Literal["survey", "apply", "verify", "undo"] | None,
        "items": int,
        "bytes": int,
        "settled": int,
        "created_ms": int,
        "requested_by": str | None,
        "reason": str | None,
        "totals": dict[str, int],
        "passes": dict[Literal["survey", "apply", "verify", "undo"], BatchPassStateDict],
        "servers": list[BatchServerDict],
        "warnings": list[str],
        "failures": list[BatchTroubleDict],
        "failures_total": int,
    },
)
"""The result of `pacs.batch.apply`, `.retry`, `.verify`, `.undo` and of every order of a batch.

``failures`` are the first; the report has them all.
"""


BatchStateResult = TypedDict(
    "BatchStateResult",
    {
        "operation": Literal["batch"],
        "job_id": str,
        "batch_id": str,
        "name": str,
        "kind": str,
        "state": Literal[
            "planning", "planned", "running", "verifying", "paused", "cancelled", "done", "undoing", "undone"
        ],
        "pass": Literal["survey", "apply", "verify", "undo"] | None,
        "items": int,
        "bytes": int,
        "settled": int,
        "created_ms": int,
        "requested_by": str | None,
        "reason": str | None,
        "totals": dict[str, int],
        "passes": dict[Literal["survey", "apply", "verify", "undo"], BatchPassStateDict],
        "servers": list[BatchServerDict],
        "warnings": list[str],
    },
)
"""The result of `pacs.batch.show`, `.pause`, `.resume` and `.cancel`: the batch as it stands.

``totals`` are all items by what became of them; those of ``servers`` are what is known to be at one.
``requested_by`` and ``reason`` are those of the batch's order.
"""


class FaultDict(TypedDict):
    """Why a server gave no answer."""

    code: str
    message: str


class DatabaseEntryDict(TypedDict):
    server_name: str
    server_type: str
    status: Literal["up", "degraded", "not responding"]
    latency_ms: float
    note: str
    error: FaultDict | None
    database: Literal["ok", "failed", "unknown"]


class DatabaseResult(TypedDict):
    """The result of `pacs.database`. ``ok`` only after a call that has touched the database."""

    operation: Literal["database"]
    job_id: str
    servers: list[DatabaseEntryDict]


class BatchFailureDict(TypedDict):
    server_name: str
    server_type: str
    study_uid: str
    status: Literal["refused", "failed"]
    code: str
    message: str


class DeleteAllResult(TypedDict):
    """The result of `pacs.delete_all`: counts per server. ``failures`` are the first; the report has them all."""

    operation: Literal["delete_all"]
    job_id: str
    batch_id: str
    status: Literal["planned", "done"]
    items: int
    servers: list[BatchServerDict]
    failures: list[BatchFailureDict]
    failures_total: int
    warnings: list[str]


class DeletedEntryDict(TypedDict):
    """What became of it on one server. ``note`` says what frees it and when, or why the server refused.

    ``images`` is how many there are, and counted in a dry run only. ``not_asked``: the server is in maintenance; the
    job ``follow_up_job_id`` deletes there when that has ended.
    """

    server_name: str
    server_type: str
    status: Literal[
        "deleted", "hidden", "not_there", "unavailable", "refused", "would_delete", "would_hide", "not_asked"
    ]
    note: str
    study_uid: str | None
    series_uid: str | None
    image_uid: str | None
    images: int | None
    follow_up_job_id: str | None
    error: FaultDict | None


class DeleteResult(TypedDict):
    """The result of `pacs.delete`: an entry per server that was meant, in order of preference."""

    operation: Literal["delete"]
    job_id: str
    level: Literal["image", "series", "study"]
    uid: str
    permanent: bool
    dry_run: bool
    servers: list[DeletedEntryDict]
    warnings: list[str]
    not_asked: list[str]
    timings_ms: dict[str, float]
    attempts: int


class DownloadResult(TypedDict):
    """The result of `pacs.download`.

    ``size_bytes`` is what the images hold, ``archive_bytes`` and ``sha256`` are those of the ZIP file. All three are
    None for what was ``already_there``. ``resumed`` images were there from an earlier attempt.
    """

    operation: Literal["download"]
    job_id: str
    status: Literal["downloaded", "already_there"]
    server_name: str
    server_type: str
    study_uid: str
    destination: str
    format: Literal["zip", "files"]
    instances: int
    size_bytes: int | None
    archive_bytes: int | None
    sha256: str | None
    resumed: int
    warnings: list[str]
    not_asked: list[str]
    timings_ms: dict[str, float]
    attempts: int


class PlaceDict(TypedDict):
    """Where one object is: its UID and those above it, ``None`` for what is below it."""

    study_uid: str
    series_uid: str | None
    image_uid: str | None
    viewer_url: str


class FoundEntryDict(TypedDict):
    """What one server said. ``also_in`` are further objects with the same UID, which no server should have.

    ``not_asked``: it is in maintenance; ``error`` says who set that.
    """

    server_name: str
    server_type: str
    status: Literal["found", "not_there", "unavailable", "not_asked"]
    study_uid: str | None
    series_uid: str | None
    image_uid: str | None
    viewer_url: str | None
    also_in: list[PlaceDict]
    metadata: list[dict[str, Any]] | None
    error: FaultDict | None


class FoundResult(TypedDict):
    """The result of `pacs.exists` and `pacs.metadata`. ``server_name`` is the first server, in order, that has it."""

    operation: Literal["exists", "metadata"]
    job_id: str
    level: Literal["image", "series", "study"]
    uid: str
    mode: str
    exists: Literal[True]
    server_name: str
    server_type: str
    servers: list[FoundEntryDict]
    warnings: list[str]
    not_asked: list[str]


class SuspensionEntryDict(TypedDict):
    """How an operator has taken a server out of service: who, since when and until when (RFC 3339, UTC)."""

    state: Literal["paused", "maintenance"]
    set_by: str
    reason: str | None
    since: str
    until: str | None


class ElsewhereEntryDict(TypedDict):
    """The studies that were stored elsewhere during a maintenance, and the audit of them, the job ``job_id``.

    ``split``: how many are on more than one server; null while the audit is still to come. ``left_out``: how many more
    there were than are kept.
    """

    studies: int
    left_out: int
    job_id: str
    split: int | None
    at: str | None


class RateLimitDict(TypedDict):
    """How fast workers ask a server that has asked for fewer requests, with ``status``.

    They send ``per_s`` requests per second at most, and none before ``held_until`` (RFC 3339), if that is given.
    """

    status: int
    per_s: float
    held_until: str | None


class StatusEntryDict(TypedDict):
    """``suspension``: the server was asked although jobs leave it alone, so that an operator sees how it is.

    ``elsewhere``: an audit after a maintenance is to come, or has found studies on more than one server.
    """

    server_name: str
    server_type: str
    status: Literal["up", "degraded", "not responding"]
    latency_ms: float
    note: str
    error: FaultDict | None
    suspension: SuspensionEntryDict | None
    elsewhere: ElsewhereEntryDict | None
    rate_limit: RateLimitDict | None
    ready: bool | Literal["unknown"]
    product: str
    version: str
    warnings: list[str]


class PlaceEntryDict(TypedDict):
    """Whether the worker on ``host`` can use one of the places of its settings; ``message`` says why not.

    A place of sources was listed and its first image read; one of downloads was written to. ``overwrites`` is whether
    the store of the latter prevents that an object is overwritten.
    """

    place: str
    use: Literal["source", "download"]
    state: Literal["usable", "empty", "unknown", "refused", "silent"]
    overwrites: Literal["prevented", "not_prevented", "unknown"]
    message: str
    host: str


class StatusResult(TypedDict):
    """The result of `pacs.status`: one entry per server. A server that keeps silent is an answer here."""

    operation: Literal["status"]
    job_id: str
    servers: list[StatusEntryDict]
    places: list[PlaceEntryDict]


class StorageEntryDict(TypedDict):
    server_name: str
    server_type: str
    status: Literal["up", "degraded", "not responding"]
    latency_ms: float
    note: str
    error: FaultDict | None
    total_bytes: int | Literal["unknown"]
    free_bytes: int | Literal["unknown"]
    used_bytes: int | Literal["unknown"]


class StorageResult(TypedDict):
    """The result of `pacs.storage`. What a server offers no call for is ``unknown``."""

    operation: Literal["storage"]
    job_id: str
    servers: list[StorageEntryDict]


class StudyOnDict(TypedDict):
    """One server's copy of a study. ``images`` is None where the server does not tell."""

    server_name: str
    server_type: str
    images: int | None
    viewer_url: str


class StudyEntryDict(TypedDict):
    """One study of the list. Its attributes are those of the first server that has them."""

    study_uid: str
    servers: list[StudyOnDict]
    study_date: str | None
    study_time: str | None
    accession_number: str | None
    study_description: str | None
    patient_id: str | None
    patient_name: str | None
    modalities: list[str]


class ListedServerDict(TypedDict):
    """What became of one server's part of a page. ``count`` is its number of studies on this page.

    ``dropped`` rows that it sent do not match the filters and are left out; ``lacking`` are filtered attributes that no
    row of this page has. ``may_be_cut``: the server ignores offset, so it may have more studies than it lists.
    ``newest_first``: the server was asked to sort its list so, and can. ``not_asked``: it is in maintenance, and its
    studies are missing from the list.
    """

    server_name: str
    server_type: str
    status: Literal["more", "complete", "unavailable", "not_asked"]
    count: int
    dropped: int
    lacking: list[str]
    may_be_cut: bool
    newest_first: bool
    error: FaultDict | None


class StudiesResult(TypedDict):
    """The result of `pacs.list_studies`. Only a ``cursor`` of None says that the list is at its end.

    With ``not_asked`` servers, which are in maintenance, the list is incomplete also at its end.
    """

    operation: Literal["list_studies"]
    job_id: str
    mode: str
    studies: list[StudyEntryDict]
    servers: list[ListedServerDict]
    cursor: str | None
    not_asked: list[str]


class TraceEntryDict(TypedDict):
    """What one server said of the UID; ``level`` is what it is there. ``not_asked``: it is in maintenance."""

    server_name: str
    server_type: str
    status: Literal["found", "not_there", "unavailable", "not_asked"]
    level: Literal["image", "series", "study"] | None
    study_uid: str | None
    series_uid: str | None
    image_uid: str | None
    viewer_url: str | None
    error: FaultDict | None


class TraceClaimDict(TypedDict):
    """Which server the study belongs to, which job chose it, and which stored its first image."""

    server_name: str
    claimed_by: str | None
    claimed_at: str | None
    opened_by: str | None


class TraceReceiptDict(TypedDict):
    """History: what a job of ours stored last as this image, and what has become of it (``state``).

    ``voided_at`` and ``voided_by`` belong to ``deleted`` and ``replaced``. Of the bytes that are there now it says
    nothing.
    """

    server_name: str
    job_id: str
    stored_at: str | None
    sha256: str
    size_bytes: int
    state: Literal["there", "deleted", "replaced", "gone", "unknown"]
    voided_at: str | None
    voided_by: str | None


class TracePushDict(TypedDict):
    """History: which job put images of the study on this server last, by upload or as copies (and then how many)."""

    kind: Literal["upload", "copy"]
    server_name: str
    job_id: str
    at: str | None
    images: int | None
    state: Literal["there", "deleted", "replaced", "gone", "unknown"]
    voided_at: str | None
    voided_by: str | None


class TracedJobDict(TypedDict):
    """The ledger's record of a job; ``code`` and ``message`` are why it waits or how it ended."""

    job_id: str
    task: str
    state: str
    attempts: int
    code: str | None
    message: str | None
    created_at: str | None
    ended_at: str | None
    requested_by: str | None
    reason: str | None


class TraceEventDict(TypedDict):
    """One decision: when (UTC), about which UID, by which job; ``text`` is it as a sentence."""

    at: str
    uid: str
    event: str
    job_id: str
    text: str
    details: dict[str, Any]


class TraceResult(TypedDict):
    """The result of `pacs.trace`.

    Present state: ``servers`` as they answered now, and ``present``, those that have it. ``server_name`` is the first
    of these; if there is none, one that did not answer and that the ledger had it on last. All else is history.
    """

    operation: Literal["trace"]
    job_id: str
    uid: str
    level: Literal["image", "series", "study"] | None
    server_name: str | None
    server_type: str | None
    viewer_url: str
    why: str
    present: list[str]
    servers: list[TraceEntryDict]
    claim: TraceClaimDict | None
    receipt: TraceReceiptDict | None
    pushes: list[TracePushDict]
    held_by: str | None
    storing: list[str]
    jobs: list[TracedJobDict]
    timeline: list[TraceEventDict]


class RouteDict(TypedDict):
    reason: Literal["study_exists", "claimed", "new_study", "requested"]
    study_on: list[str]
    candidates: list[str]


class UploadResult(TypedDict):
    """The result of `pacs.upload`. ``timings_ms`` has one entry per step that ran in the attempt that finished.

    ``not_asked``: servers in maintenance, which may have the study, or the image, as well.
    """

    operation: Literal["upload"]
    job_id: str
    status: Literal["stored"]
    study_action: Literal["created", "updated"]
    server_name: str
    server_type: str
    route: RouteDict
    study_uid: str
    series_uid: str
    image_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    size_bytes: int
    sha256: str
    warnings: list[str]
    metadata: dict[str, Any]
    viewer_url: str
    source: str
    not_asked: list[str]
    timings_ms: dict[str, float]
    attempts: int


class WaitingDict(TypedDict):
    """Why a job waits. ``since`` and ``next_try`` are RFC 3339, UTC; ``next_try`` is null where no time is known.

    ``server_name`` is the server that the job waits for, if it waits for one.
    """

    code: str
    message: str
    server_name: str | None
    since: str
    next_try: str | None
