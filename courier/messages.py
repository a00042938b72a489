"""The JSON that goes in and comes out: one class per message and per result (design contract, section 5).

Shapes only, no behaviour. New fields are optional. Unknown fields of a message are ignored, except in orders that
delete, move, hide or overwrite (`STRICT`): a misspelt ``dry_run`` must not delete. A ``version`` above the one spoken
here is refused, because its fields may mean something else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from courier.errors import InvalidRequest, InvalidUid
from courier.filters import check_filters, check_selecting, check_unambiguous
from courier.redaction import REASON_LENGTH, REQUESTED_BY_LENGTH, is_one_line, printable, redact_url
from courier.windows import check_window

VERSION = 1
#: What a message may weigh: it says where the bytes are and never holds them. A worker throws larger ones away.
MESSAGE_BYTES = 262_144
#: The tasks that may delete something when they are replayed.
MAY_DELETE: Final = frozenset(
    (
        "pacs.delete",
        "pacs.delete_all",
        *(f"pacs.batch.{name}" for name in ("delete", "migrate", "apply", "retry", "verify", "undo", "chunk")),
    )
)

Level = Literal["image", "series", "study"]

_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)


def check_uid(uid: str) -> str:
    """``uid`` as it is; what no server should be asked for (``*`` would match everything) is `InvalidUid`."""
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise InvalidUid("A UID is at most 64 digits and dots.")
    return uid


Uid = Annotated[str, AfterValidator(check_uid)]


#: A batch's id is part of names of keys, whose parts stand between colons.
_BATCH_ID = re.compile(r"[^\s:\x00-\x1f\x7f]{1,200}")


def check_batch_id(batch_id: str) -> str:
    """``batch_id`` as it is; InvalidRequest where no batch can be called so."""
    if not _BATCH_ID.fullmatch(batch_id) or not batch_id.isprintable():
        raise InvalidRequest(
            "The id of a batch is 1 to 200 characters without blanks, colons and control characters; name the id that"
            " the order was given, or give an order another id."
        )
    return batch_id


BatchId = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(check_batch_id)]
#: ``both``, ``either`` or a server's name, which only a worker knows.
Mode = Annotated[str, Field(min_length=1, max_length=64)]


def check_one_line(text: str) -> str:
    """``text`` as it is; what could forge a line of a log or of a terminal is a ValueError."""
    if not is_one_line(text):
        raise ValueError("it has to be one line of text, without control characters")
    return text


#: For orders that delete, move, hide or overwrite: they refuse fields that are not known.
STRICT: Final = ConfigDict(extra="forbid")


class Job(BaseModel):
    """What every message may say. ``requested_by`` and ``reason`` are for history and audit alone."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    #: Old names of fields, refused beside the new ones; and further names, refused beside another value.
    old_names: ClassVar[Mapping[str, str]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}

    version: int = VERSION
    requested_by: Annotated[str, Field(max_length=REQUESTED_BY_LENGTH), AfterValidator(check_one_line)] | None = None
    reason: Annotated[str, Field(max_length=REASON_LENGTH), AfterValidator(check_one_line)] | None = None

    @model_validator(mode="after")
    def _spoken(self) -> Job:
        if self.version != VERSION:
            raise ValueError(f"version {self.version} is not spoken by this worker, which speaks {VERSION}")
        return self


class UploadJob(Job):
    """`pacs.upload`: put the image at ``image_url`` into the PACS it belongs to."""

    image_url: Annotated[str, Field(min_length=1, max_length=8192)]
    server: str | None = None
    idempotency_key: Annotated[str, Field(max_length=200)] | None = None
    metadata: bool | None = None


class LookupJob(Job):
    """`pacs.exists` and `pacs.metadata`: is it anywhere, and what does it say of itself.

    ``study_uid``: only the object in that study is meant; some servers find images and series only below their study.
    """

    level: Level
    uid: Uid
    mode: Mode = "either"
    study_uid: Uid | None = None


class ExistsJob(LookupJob):
    metadata: bool = False


class ServersJob(Job):
    """`pacs.status`, `pacs.storage` and `pacs.database`: of these servers, or of all."""

    servers: Annotated[list[str], Field(min_length=1, max_length=100)] | None = None


class StatusJob(ServersJob):
    """`pacs.status`. ``places`` has the worker try the places of sources and downloads that its settings name, too."""

    places: bool = False


#: What studies are like: values by DICOM keywords (PS3.6), the longest of which has 63 letters.
Keyword = Annotated[str, Field(max_length=64)]
Values = Annotated[dict[Keyword, str], Field(max_length=50)]
Filters = Annotated[Values, AfterValidator(check_filters)]
#: Servers by name; without them, all.
Servers = Annotated[list[str], Field(min_length=1, max_length=64)]
#: How many studies an order is expected to delete images of. Needed above ``deletions.max_studies_per_order``.
ConfirmStudies = Annotated[int, Field(ge=0)]


class DeleteJob(Job):
    """`pacs.delete`. ``dry_run`` only says what would happen; not ``permanent``: hidden, by servers that can hide.

    ``study_uid`` as in `LookupJob`. ``follow_up_of``: the deletion that left out servers in maintenance, for which this
    one makes up; it waits for them. Sent by that deletion itself.
    """

    model_config = STRICT

    level: Level
    uid: Uid
    study_uid: Uid | None = None
    servers: Servers | None = None
    permanent: bool = True
    dry_run: bool = False
    follow_up_of: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class StudiesJob(Job):
    """`pacs.list_studies`: one page of at most ``limit`` studies, from where ``cursor`` says.

    ``newest_first`` asks the servers that can sort to do so; the result says of each whether its studies come so.
    """

    mode: Mode = "both"
    filters: Filters = {}
    limit: Annotated[int, Field(ge=1, le=5000)] = 500
    cursor: Annotated[str, Field(max_length=16_384)] | None = None
    newest_first: bool = False


class DeleteAllJob(Job):
    """`pacs.delete_all`. ``confirm`` has to be the sentence "delete all studies", but for a ``dry_run``.

    ``backup``: where a copy of each study is written before it is deleted.
    """

    model_config = STRICT

    servers: Servers | None = None
    confirm: str = ""
    permanent: bool = True
    backup: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    confirm_studies: ConfirmStudies | None = None
    dry_run: bool = False


class BatchItem(BaseModel):
    """An item of a batch inside a message: what, and where and how large if that is known."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    item: Annotated[str, Field(min_length=1, max_length=8192)]
    server: str | None = None
    size_bytes: Annotated[int, Field(ge=0)] | None = None


class StudyItem(BatchItem):
    """An item of an order about studies, which refuses fields that are not known."""

    model_config = STRICT


class BatchOrderJob(Job):
    """What every order of a batch may say; its kind adds what it needs.

    ``items`` are for small batches; with ``planned`` the plan of the batch that bears the job's id is in the ledger
    already, and with it all that was asked for. At most ``requests_per_s`` and ``bytes_per_s`` over all workers, and
    only in the ``window`` ("20:00-06:00 Europe/Berlin"; UTC without a time zone).
    """

    items: Annotated[Sequence[str | BatchItem], Field(min_length=1, max_length=5000)] | None = None
    planned: bool = False
    name: Annotated[str, Field(max_length=80)] = ""
    dry_run: bool = False
    verify: bool = True
    width: Annotated[int, Field(ge=1, le=64)] | None = None
    requests_per_s: Annotated[float, Field(gt=0)] | None = None
    bytes_per_s: Annotated[float, Field(ge=1)] | None = None
    window: Annotated[str, Field(max_length=100), AfterValidator(check_window)] | None = None


class BatchUploadJob(BatchOrderJob):
    """`pacs.batch.upload`: images by their URLs, or all that ``source`` holds, to where they belong or to ``server``.

    ``source``: `s3://bucket/prefix/`, `az://container/prefix/`, `file:///folder/`, or a ZIP file at any URL.
    """

    source: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    server: str | None = None

    @model_validator(mode="after")
    def _about_one_thing(self) -> BatchUploadJob:
        _exactly_one(self, "items", "source")
        return self


class BatchStudiesJob(BatchOrderJob):
    """What orders about studies have in common: their UIDs, those that match ``filters``, or ``everything``.

    One of the filters has to say something of a study: ``*`` means every study.
    """

    model_config = STRICT

    items: Annotated[Sequence[str | StudyItem], Field(min_length=1, max_length=5000)] | None = None
    filters: Values | None = None
    everything: bool = False

    @model_validator(mode="after")
    def _about_one_thing(self) -> BatchStudiesJob:
        if self.filters is not None:
            check_selecting(self.filters)
            check_filters(self.filters)
            check_unambiguous(self.filters)
        _exactly_one(self, "items", "filters", "everything")
        return self


class BatchDeleteJob(BatchStudiesJob):
    """`pacs.batch.delete`, on all servers or on ``servers``.

    With ``backup``, where a copy of each study is written first, it can be undone. ``everything`` needs the sentence
    "delete all studies" in ``confirm``.
    """

    old_names: ClassVar[Mapping[str, str]] = {"keep": "backup"}

    servers: Servers | None = None
    permanent: bool = True
    backup: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    confirm: str = ""
    confirm_studies: ConfirmStudies | None = None


class BatchDownloadJob(BatchStudiesJob):
    """`pacs.batch.download`: each study as a ZIP file or a folder below ``destination``.

    ``servers``: only from these.
    """

    servers: Servers | None = None
    destination: Annotated[str, Field(min_length=1, max_length=8192)]
    format: Literal["zip", "files"] = "zip"


class BatchMigrateJob(BatchStudiesJob):
    """`pacs.batch.migrate`: studies from one server to another; moved, not copied, with ``delete_source``.

    ``digests``: whether all images, one image of each series, or none are compared at the end: by their bytes, and
    element by element where a server does not keep bytes. A move compares all.
    """

    aliases: ClassVar[Mapping[str, str]] = {"source": "from_server", "target": "to_server"}

    from_server: Annotated[str, Field(min_length=1, max_length=64)]
    to_server: Annotated[str, Field(min_length=1, max_length=64)]
    delete_source: bool = False
    confirm_studies: ConfirmStudies | None = None
    digests: Literal["all", "sample", "none"] = "all"

    @model_validator(mode="after")
    def _two_servers(self) -> BatchMigrateJob:
        if self.from_server == self.to_server:
            raise ValueError("from_server and to_server are the same")
        if self.delete_source and not self.verify:
            raise ValueError("delete_source needs verify: nothing is deleted that was not verified")
        if self.delete_source and self.digests != "all":
            raise ValueError('delete_source needs digests "all": no image is deleted that was not proven equal')
        return self


def _exactly_one(job: BatchOrderJob, *names: str) -> None:
    """What a batch is about is said in one way; a plan that is in the ledger already says it all."""
    if not job.planned and sum(bool(getattr(job, name)) for name in names) != 1:
        raise ValueError(f"exactly one of {', '.join(names)} says what it is about")


class BatchJob(Job):
    """`pacs.batch.show`, `.pause`, `.resume` and `.cancel`."""

    batch_id: BatchId


class BatchContinueJob(BatchJob):
    """`pacs.batch.apply`, `.retry`, `.verify` and `.undo`."""

    model_config = STRICT

    confirm_studies: ConfirmStudies | None = None


BatchPass = Literal["survey", "apply", "verify", "undo"]


class BatchChunkJob(BatchJob):
    """`pacs.batch.chunk`: one piece of a batch's plan in one pass over it. Sent by the batch itself."""

    model_config = ConfigDict(populate_by_name=True)

    which: Annotated[BatchPass, Field(alias="pass")] = "apply"
    chunk: Annotated[int, Field(ge=0)]
    round: Annotated[int, Field(ge=0)] = 0
    name: str = ""


class DownloadJob(Job):
    """`pacs.download`: one study, as a ZIP file or as a folder of files."""

    study_uid: Uid
    destination: Annotated[str, Field(min_length=1, max_length=8192)]
    format: Literal["zip", "files"] = "zip"
    mode: Mode = "either"


class AuditJob(Job):
    """`pacs.audit`: the next ``limit`` split studies after the study ``cursor``.

    With ``study_uid`` that study alone, and its next ``limit`` differing images after the image ``cursor``. With
    ``maintenance`` the studies alone into which images were stored elsewhere while that server was in maintenance.
    """

    servers: Servers | None = None
    filters: Filters = {}
    study_uid: Uid | None = None
    limit: Annotated[int, Field(ge=1, le=5000)] = 500
    cursor: Uid | None = None
    maintenance: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @model_validator(mode="after")
    def _chosen_in_one_way(self) -> AuditJob:
        if self.maintenance is not None and (self.servers or self.filters or self.study_uid):
            raise ValueError("maintenance chooses the studies, on all servers; give no servers, filters or study_uid")
        return self


class TraceJob(Job):
    """`pacs.trace`: why the image, series or study that bears ``uid`` is where it is."""

    uid: Uid


JobType = TypeVar("JobType", bound=Job)
#: What may stand in a sentence of a field that is not known: anything else could be a value that was mixed up.
_IS_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", re.ASCII).fullmatch
_CALL_BACK = "call-backs do not exist yet; leave it out, and ask for the result by the job's id"


def read_job(kind: type[JobType], message: object) -> JobType:
    """The message as a job of ``kind``.

    Raises
    ------
    InvalidRequest
        A field is missing, of the wrong type, not known to an order that is strict, or given by two names; the
        sentence names the field.
    """
    if not isinstance(message, Mapping):
        raise InvalidRequest('The message has to be {"job": {…}}: one keyword argument, job, an object.')
    if "callback_url" in message:
        raise _wrong_field("callback_url", _CALL_BACK)
    try:
        return kind.model_validate(_by_new_names(kind, message))
    except ValidationError as error:
        raise _refusal(kind, error) from None


def old_spellings(kind: type[Job], message: Mapping[str, Any]) -> list[str]:
    """A sentence for each field of ``message`` that bears an old name, which is accepted in 0.2 and not after."""
    return [
        f"The field {old} is called {new} now; {old} is accepted in 0.2 and refused after."
        for old, new in kind.old_names.items()
        if message.get(old) is not None
    ]


def _by_new_names(kind: type[Job], message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with each field under its present name."""
    fields = dict(message)
    for old, new in (*kind.old_names.items(), *kind.aliases.items()):
        if old not in fields:
            continue
        value = fields.pop(old)
        if value is None:
            continue
        if fields.get(new) is not None and (old in kind.old_names or fields[new] != value):
            raise _wrong_field(old, f"it is another name of {new}, which is given too; give {new} alone")
        fields[new] = value
    return fields


def _refusal(kind: type[Job], refused: ValidationError) -> InvalidRequest:
    """What is wrong, without quoting what is there. A field that is not known comes first: it explains the others."""
    errors = refused.errors(include_url=False, include_context=False, include_input=False)
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), None)
    if unknown is not None:
        return _unknown_field(kind, unknown["loc"])
    first = errors[0]
    return _wrong_field(".".join(redact_url(str(part)) for part in first["loc"]), first["msg"])


def _wrong_field(field: str, reason: str) -> InvalidRequest:
    field, reason = printable(field, limit=100), printable(reason.removeprefix("Value error, "), limit=300)
    sentence = f"Field {field} of the job: {reason}." if field else f"The job: {reason}."
    return InvalidRequest(sentence, details={"field": field or None})


def _unknown_field(kind: type[Job], loc: Sequence[str | int]) -> InvalidRequest:
    """Names the field by its place, and the known one that comes nearest."""
    known = (StudyItem if StudyItem.__name__ in loc else kind).model_fields
    name = str(loc[-1])
    place = [str(part) for part in loc[:-1] if part != StudyItem.__name__]
    field = ".".join([*place, name if _IS_FIELD(name) else "…"])
    nearest = nearest_field(name, [*known, *kind.old_names])
    nearest = kind.old_names.get(nearest or "", nearest)
    hint = f"did you mean {nearest}?" if nearest else f"the fields are {', '.join(known)}."
    sentence = f"Field {field} of the job is not known, so the order is refused; {hint}"
    return InvalidRequest(sentence, details={"field": field})


def nearest_field(name: str, known: Iterable[str]) -> str | None:
    """The known field that ``name`` is most like, however it is spelt (``dryRun``, ``dry-run``); None if none is."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:64]).replace("-", "_").lower()
    return next(iter(difflib.get_close_matches(snake, list(known), n=1)), None)
