"""The JSON that goes in and comes out: one class per message and per result (design contract, section 5).

Shapes only, no behaviour. New fields are optional. Unknown fields of a message are ignored, except in orders that
delete, move, hide or overwrite (`STRICT`): a misspelt ``dry_run`` must not delete. A ``version`` above the one spoken
here is refused, because its fields may mean something else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from courier.messages import BatchPass, Level

RouteReason = Literal["study_exists", "claimed", "new_study", "requested"]
StudyAction = Literal["created", "updated"]
#: DICOM JSON (PS3.18 F): one dataset, keyed by eight hexadecimal digits.
Dataset = dict[str, Any]


class Payload(BaseModel):
    """What every result says."""

    model_config = ConfigDict(frozen=True)

    operation: str
    job_id: str

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


class Waiting(BaseModel):
    """Why a job waits. ``since`` and ``next_try`` are RFC 3339, UTC; ``next_try`` is null where no time is known.

    ``server_name`` is the server that the job waits for, if it waits for one.
    """

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    server_name: str | None
    since: str
    next_try: str | None


class Route(BaseModel):
    model_config = ConfigDict(frozen=True)

    reason: RouteReason
    study_on: list[str]
    candidates: list[str]


class UploadPayload(Payload):
    """The result of `pacs.upload`. ``timings_ms`` has one entry per step that ran in the attempt that finished.

    ``not_asked``: servers in maintenance, which may have the study, or the image, as well.
    """

    operation: Literal["upload"] = "upload"
    status: Literal["stored"] = "stored"
    study_action: StudyAction
    server_name: str
    server_type: str
    route: Route
    study_uid: str
    series_uid: str
    image_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    size_bytes: int
    sha256: str
    warnings: list[str]
    metadata: Dataset
    viewer_url: str
    source: str
    not_asked: list[str] = []
    timings_ms: dict[str, float]
    attempts: int

    def as_json(self) -> dict[str, Any]:
        """The metadata is JSON already, as its server sent it, a NaN included: pydantic would copy each value."""
        fields = self.model_dump(mode="json", exclude={"metadata"})
        return {name: self.metadata if name == "metadata" else fields[name] for name in type(self).model_fields}


class Fault(BaseModel):
    """Why a server gave no answer."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str


class Place(BaseModel):
    """Where one object is: its UID and those above it, ``None`` for what is below it."""

    model_config = ConfigDict(frozen=True)

    study_uid: str
    series_uid: str | None
    image_uid: str | None
    viewer_url: str


class FoundEntry(BaseModel):
    """What one server said. ``also_in`` are further objects with the same UID, which no server should have.

    ``not_asked``: it is in maintenance; ``error`` says who set that.
    """

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    status: Literal["found", "not_there", "unavailable", "not_asked"]
    study_uid: str | None = None
    series_uid: str | None = None
    image_uid: str | None = None
    viewer_url: str | None = None
    also_in: list[Place] = []
    metadata: list[Dataset] | None = None
    error: Fault | None = None


class FoundPayload(Payload):
    """The result of `pacs.exists` and `pacs.metadata`. ``server_name`` is the first server, in order, that has it."""

    operation: Literal["exists", "metadata"]
    level: Level
    uid: str
    mode: str
    exists: Literal[True] = True
    server_name: str
    server_type: str
    servers: list[FoundEntry]
    warnings: list[str]
    not_asked: list[str] = []


Unknown = Literal["unknown"]


class ServerEntry(BaseModel):
    """How one server is. ``degraded``: it answers, but cannot be used as it is; ``note`` and ``error`` say why."""

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    status: Literal["up", "degraded", "not responding"]
    latency_ms: float
    note: str = ""
    error: Fault | None = None


class RateLimit(BaseModel):
    """How fast workers ask a server that has asked for fewer requests, with ``status``.

    They send ``per_s`` requests per second at most, and none before ``held_until`` (RFC 3339), if that is given.
    """

    model_config = ConfigDict(frozen=True)

    status: int
    per_s: float
    held_until: str | None = None


class SuspensionEntry(BaseModel):
    """How an operator has taken a server out of service: who, since when and until when (RFC 3339, UTC)."""

    model_config = ConfigDict(frozen=True)

    state: Literal["paused", "maintenance"]
    set_by: str
    reason: str | None = None
    since: str
    until: str | None = None


class ElsewhereEntry(BaseModel):
    """The studies that were stored elsewhere during a maintenance, and the audit of them, the job ``job_id``.

    ``split``: how many are on more than one server; null while the audit is still to come. ``left_out``: how many more
    there were than are kept.
    """

    model_config = ConfigDict(frozen=True)

    studies: int
    left_out: int
    job_id: str
    split: int | None = None
    at: str | None = None


class StatusEntry(ServerEntry):
    """``suspension``: the server was asked although jobs leave it alone, so that an operator sees how it is.

    ``elsewhere``: an audit after a maintenance is to come, or has found studies on more than one server.
    """

    suspension: SuspensionEntry | None = None
    elsewhere: ElsewhereEntry | None = None
    rate_limit: RateLimit | None = None
    ready: bool | Unknown = "unknown"
    product: str = "unknown"
    version: str = "unknown"
    warnings: list[str] = []


class StorageEntry(ServerEntry):
    total_bytes: int | Unknown = "unknown"
    free_bytes: int | Unknown = "unknown"
    used_bytes: int | Unknown = "unknown"


class DatabaseEntry(ServerEntry):
    database: Literal["ok", "failed", "unknown"] = "unknown"


class PlaceEntry(BaseModel):
    """Whether the worker on ``host`` can use one of the places of its settings; ``message`` says why not.

    A place of sources was listed and its first image read; one of downloads was written to. ``overwrites`` is whether
    the store of the latter prevents that an object is overwritten.
    """

    model_config = ConfigDict(frozen=True)

    place: str
    use: Literal["source", "download"] = "download"
    state: Literal["usable", "empty", "unknown", "refused", "silent"]
    overwrites: Literal["prevented", "not_prevented", "unknown"] = "unknown"
    message: str = ""
    host: str = ""


class StatusPayload(Payload):
    """The result of `pacs.status`: one entry per server. A server that keeps silent is an answer here."""

    operation: Literal["status"] = "status"
    servers: list[StatusEntry]
    #: Of the worker's settings, if the job asks for them.
    places: list[PlaceEntry] = []


class StoragePayload(Payload):
    """The result of `pacs.storage`. What a server offers no call for is ``unknown``."""

    operation: Literal["storage"] = "storage"
    servers: list[StorageEntry]


class DatabasePayload(Payload):
    """The result of `pacs.database`. ``ok`` only after a call that has touched the database."""

    operation: Literal["database"] = "database"
    servers: list[DatabaseEntry]


class DeletedEntry(BaseModel):
    """What became of it on one server. ``note`` says what frees it and when, or why the server refused.

    ``images`` is how many there are, and counted in a dry run only. ``not_asked``: the server is in maintenance; the
    job ``follow_up_job_id`` deletes there when that has ended.
    """

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    status: Literal[
        "deleted", "hidden", "not_there", "unavailable", "refused", "would_delete", "would_hide", "not_asked"
    ]
    note: str = ""
    study_uid: str | None = None
    series_uid: str | None = None
    image_uid: str | None = None
    images: int | None = None
    follow_up_job_id: str | None = None
    error: Fault | None = None


class DeletePayload(Payload):
    """The result of `pacs.delete`: an entry per server that was meant, in order of preference."""

    operation: Literal["delete"] = "delete"
    level: Level
    uid: str
    permanent: bool
    dry_run: bool
    servers: list[DeletedEntry]
    warnings: list[str] = []
    not_asked: list[str] = []
    timings_ms: dict[str, float]
    attempts: int


class StudyOn(BaseModel):
    """One server's copy of a study. ``images`` is None where the server does not tell."""

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    images: int | None
    viewer_url: str


class StudyEntry(BaseModel):
    """One study of the list. Its attributes are those of the first server that has them."""

    model_config = ConfigDict(frozen=True)

    study_uid: str
    servers: list[StudyOn]
    study_date: str | None = None
    study_time: str | None = None
    accession_number: str | None = None
    study_description: str | None = None
    patient_id: str | None = None
    patient_name: str | None = None
    modalities: list[str] = []


class ListedServer(BaseModel):
    """What became of one server's part of a page. ``count`` is its number of studies on this page.

    ``dropped`` rows that it sent do not match the filters and are left out; ``lacking`` are filtered attributes that no
    row of this page has. ``may_be_cut``: the server ignores offset, so it may have more studies than it lists.
    ``newest_first``: the server was asked to sort its list so, and can. ``not_asked``: it is in maintenance, and its
    studies are missing from the list.
    """

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    status: Literal["more", "complete", "unavailable", "not_asked"]
    count: int = 0
    dropped: int = 0
    lacking: list[str] = []
    may_be_cut: bool = False
    newest_first: bool = False
    error: Fault | None = None


class StudiesPayload(Payload):
    """The result of `pacs.list_studies`. Only a ``cursor`` of None says that the list is at its end.

    With ``not_asked`` servers, which are in maintenance, the list is incomplete also at its end.
    """

    operation: Literal["list_studies"] = "list_studies"
    mode: str
    studies: list[StudyEntry]
    servers: list[ListedServer]
    cursor: str | None
    not_asked: list[str] = []


class BatchServer(BaseModel):
    """What became of the items on one server, in all passes but the survey.

    An item that several servers were asked for counts for each of them, so the rows can add up to more than the items.
    ``planned``: the items for which the plan names the server. ``remaining``: how many studies it lists afterwards.
    """

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str | None
    planned: int = 0
    skipped: int = 0
    stored: int = 0
    already_there: int = 0
    copied: int = 0
    downloaded: int = 0
    deleted: int = 0
    hidden: int = 0
    not_there: int = 0
    refused: int = 0
    failed: int = 0
    verified: int = 0
    differs: int = 0
    missing: int = 0
    unverified: int = 0
    undone: int = 0
    kept: int = 0
    remaining: int | None = None


class BatchPassState(BaseModel):
    """How far one pass of a batch is. ``totals`` are the items by what became of them in it.

    ``requested_by`` and ``reason`` are those of the job that began it.
    """

    model_config = ConfigDict(frozen=True)

    chunks_finished: int
    settled: int
    bytes: int
    begun_ms: int | None
    ended_ms: int | None
    totals: dict[str, int]
    requested_by: str | None = None
    reason: str | None = None


BatchState = Literal["planning", "planned", "running", "verifying", "paused", "cancelled", "done", "undoing", "undone"]


class BatchStatePayload(Payload):
    """The result of `pacs.batch.show`, `.pause`, `.resume` and `.cancel`: the batch as it stands.

    ``totals`` are all items by what became of them; those of ``servers`` are what is known to be at one.
    ``requested_by`` and ``reason`` are those of the batch's order.
    """

    operation: Literal["batch"] = "batch"
    batch_id: str
    name: str = ""
    kind: str
    state: BatchState
    pass_: Annotated[BatchPass | None, Field(alias="pass")] = None
    items: int
    bytes: int = 0
    settled: int
    created_ms: int
    requested_by: str | None = None
    reason: str | None = None
    totals: dict[str, int] = {}
    passes: dict[BatchPass, BatchPassState] = {}
    servers: list[BatchServer]
    warnings: list[str]


class BatchTrouble(BaseModel):
    """An item that is not as it should be, and the pass that says so."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    number: int
    item: str
    pass_: Annotated[BatchPass, Field(alias="pass")]
    server_name: str | None
    server_type: str | None
    status: str
    code: str
    message: str


class BatchEndPayload(BatchStatePayload):
    """The result of `pacs.batch.apply`, `.retry`, `.verify`, `.undo` and of every order of a batch.

    ``failures`` are the first; the report has them all.
    """

    failures: list[BatchTrouble]
    failures_total: int


class BatchChunkPayload(Payload):
    """The result of `pacs.batch.chunk`."""

    model_config = ConfigDict(populate_by_name=True)

    operation: Literal["batch_chunk"] = "batch_chunk"
    batch_id: str
    which: Annotated[BatchPass, Field(alias="pass")]
    chunk: int


class BatchFailure(BaseModel):
    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    study_uid: str
    status: Literal["refused", "failed"]
    code: str
    message: str


class BatchPayload(Payload):
    """The result of `pacs.delete_all`: counts per server. ``failures`` are the first; the report has them all."""

    operation: Literal["delete_all"] = "delete_all"
    batch_id: str
    status: Literal["planned", "done"]
    items: int
    servers: list[BatchServer]
    failures: list[BatchFailure]
    failures_total: int
    warnings: list[str]


class DownloadPayload(Payload):
    """The result of `pacs.download`.

    ``size_bytes`` is what the images hold, ``archive_bytes`` and ``sha256`` are those of the ZIP file. All three are
    None for what was ``already_there``. ``resumed`` images were there from an earlier attempt.
    """

    operation: Literal["download"] = "download"
    status: Literal["downloaded", "already_there"]
    server_name: str
    server_type: str
    study_uid: str
    destination: str
    format: Literal["zip", "files"]
    instances: int
    size_bytes: int | None = None
    archive_bytes: int | None = None
    sha256: str | None = None
    resumed: int = 0
    warnings: list[str]
    not_asked: list[str] = []
    timings_ms: dict[str, float]
    attempts: int


#: Whether the copies of a study hold the same images, some of the same, or none.
Overlap = Literal["equal", "partial", "none"]


class SplitOn(BaseModel):
    """One server's copy of a split study; ``images`` as its list of them was counted."""

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    images: int
    viewer_url: str


class OnlyOn(BaseModel):
    """Images that exactly these servers have, of those that have the study. ``image_uids`` may be fewer than
    ``images``: the rest comes by pages, with the study's UID in the job.
    """

    model_config = ConfigDict(frozen=True)

    servers: list[str]
    images: int
    image_uids: list[str]


class SplitStudy(BaseModel):
    """A study on more than one server. ``images`` counts each once; ``keep`` is the server that has most of them."""

    model_config = ConfigDict(frozen=True)

    study_uid: str
    overlap: Overlap
    images: int
    keep: str
    servers: list[SplitOn]
    only_on: list[OnlyOn]


class AuditedServer(BaseModel):
    """``studies``: how many this server has; ``dropped``, ``lacking``, ``may_be_cut`` as in `ListedServer`."""

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    studies: int
    dropped: int = 0
    lacking: list[str] = []
    may_be_cut: bool = False


class AuditPayload(Payload):
    """The result of `pacs.audit`. ``studies`` and ``split`` are totals; ``cursor`` of None: no entries follow.

    With ``not_asked`` servers, which are in maintenance, the audit is incomplete: what they have is not compared.
    ``left_out``: so many studies that were stored elsewhere during the ``maintenance`` of a server were too many to be
    kept, and are not compared either.
    """

    operation: Literal["audit"] = "audit"
    servers: list[AuditedServer]
    studies: int
    split: int
    entries: list[SplitStudy]
    cursor: str | None
    not_asked: list[str] = []
    maintenance: str | None = None
    left_out: int = 0
    timings_ms: dict[str, float]
    attempts: int


class TraceEntry(BaseModel):
    """What one server said of the UID; ``level`` is what it is there. ``not_asked``: it is in maintenance."""

    model_config = ConfigDict(frozen=True)

    server_name: str
    server_type: str
    status: Literal["found", "not_there", "unavailable", "not_asked"]
    level: Level | None = None
    study_uid: str | None = None
    series_uid: str | None = None
    image_uid: str | None = None
    viewer_url: str | None = None
    error: Fault | None = None


class TraceClaim(BaseModel):
    """Which server the study belongs to, which job chose it, and which stored its first image."""

    model_config = ConfigDict(frozen=True)

    server_name: str
    claimed_by: str | None
    claimed_at: str | None
    opened_by: str | None


#: What has become of what was pushed: it is there, as far as its server says now; a job of ours has been told to delete
#: it; a batch may have copied another file to its place; its server says that it does not have it, although no job of
#: ours deleted it; or its server did not answer.
TraceState = Literal["there", "deleted", "replaced", "gone", "unknown"]


class TraceReceipt(BaseModel):
    """History: what a job of ours stored last as this image, and what has become of it (``state``).

    ``voided_at`` and ``voided_by`` belong to ``deleted`` and ``replaced``. Of the bytes that are there now it says
    nothing.
    """

    model_config = ConfigDict(frozen=True)

    server_name: str
    job_id: str
    stored_at: str | None
    sha256: str
    size_bytes: int
    state: TraceState
    voided_at: str | None = None
    voided_by: str | None = None


class TracePush(BaseModel):
    """History: which job put images of the study on this server last, by upload or as copies (and then how many)."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["upload", "copy"]
    server_name: str
    job_id: str
    at: str | None
    images: int | None
    state: TraceState
    voided_at: str | None = None
    voided_by: str | None = None


class TracedJob(BaseModel):
    """The ledger's record of a job; ``code`` and ``message`` are why it waits or how it ended."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    task: str
    state: str
    attempts: int
    code: str | None
    message: str | None
    created_at: str | None
    ended_at: str | None
    requested_by: str | None = None
    reason: str | None = None


class TraceEvent(BaseModel):
    """One decision: when (UTC), about which UID, by which job; ``text`` is it as a sentence."""

    model_config = ConfigDict(frozen=True)

    at: str
    uid: str
    event: str
    job_id: str
    text: str
    details: dict[str, Any]


class TracePayload(Payload):
    """The result of `pacs.trace`.

    Present state: ``servers`` as they answered now, and ``present``, those that have it. ``server_name`` is the first
    of these; if there is none, one that did not answer and that the ledger had it on last. All else is history.
    """

    operation: Literal["trace"] = "trace"
    uid: str
    level: Level | None
    server_name: str | None
    server_type: str | None
    viewer_url: str
    why: str
    present: list[str]
    servers: list[TraceEntry]
    claim: TraceClaim | None
    receipt: TraceReceipt | None
    pushes: list[TracePush]
    held_by: str | None
    storing: list[str]
    jobs: list[TracedJob]
    timeline: list[TraceEvent]
