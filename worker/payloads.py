"""The JSON that goes in and comes out: one class per message and per result (design contract, section 5).

Shapes only, no behaviour. Unknown fields of a message are ignored, new fields are optional; a ``version`` above
the one spoken here is refused, because its fields may mean something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from worker.errors import InvalidRequest

VERSION = 1

Level = Literal["image", "series", "study"]
RouteReason = Literal["study_exists", "claimed", "new_study", "requested"]
StudyAction = Literal["created", "updated"]
#: DICOM JSON (PS3.18 F): one dataset, keyed by eight hexadecimal digits.
Dataset = dict[str, Any]


class Job(BaseModel):
    """What every message may say."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    version: int = VERSION

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


class Payload(BaseModel):
    """What every result says."""

    model_config = ConfigDict(frozen=True)

    operation: str
    job_id: str

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Route(BaseModel):
    model_config = ConfigDict(frozen=True)

    reason: RouteReason
    study_on: list[str]
    candidates: list[str]


class UploadPayload(Payload):
    """The result of `pacs.upload`. ``timings_ms`` has one entry per step that ran in the attempt that finished."""

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
    timings_ms: dict[str, float]
    attempts: int


JobType = TypeVar("JobType", bound=Job)


def read_job(kind: type[JobType], message: object) -> JobType:
    """The message as a job of ``kind``.

    Raises
    ------
    InvalidRequest
        A field is missing or of the wrong type; the sentence names the field.
    """
    if not isinstance(message, Mapping):
        raise InvalidRequest('The message has to be {"job": {…}}: one keyword argument, job, an object.')
    try:
        return kind.model_validate(dict(message))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        sentence = f"Field {field} of the job: {reason}." if field else f"The job: {reason}."
        raise InvalidRequest(sentence, details={"field": field or None}) from None
