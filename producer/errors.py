"""Every error a result can raise, one class per code, and what can go wrong before there is a result."""

from courier.errors import (
    Cancelled,
    ConfirmationRequired,
    CourierError,
    ImageAlreadyExists,
    InvalidRequest,
    InvalidUid,
    MissingUid,
    NeedsPerson,
    NotDicom,
    NotFound,
    PacsMisanswered,
    PacsRejected,
    PacsUnauthorized,
    PacsUnavailable,
    Poisoned,
    Refused,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTooLarge,
    SourceTruncated,
    SourceUnauthorized,
    SourceUnreachable,
    StudyConflict,
    TryAgain,
    from_payload,
)


class BrokerUnavailable(ConnectionError):
    """Redis (broker, result back-end or ledger) cannot be reached, or a newer release wrote the ledger: nothing was
    enqueued, or nothing can be read.
    """


class StillRunning(TimeoutError):
    """The result was not there in time. The job goes on; ask again with its id."""


__all__ = [
    "BrokerUnavailable",
    "Cancelled",
    "ConfirmationRequired",
    "CourierError",
    "ImageAlreadyExists",
    "InvalidRequest",
    "InvalidUid",
    "MissingUid",
    "NeedsPerson",
    "NotDicom",
    "NotFound",
    "PacsMisanswered",
    "PacsRejected",
    "PacsUnauthorized",
    "PacsUnavailable",
    "Poisoned",
    "Refused",
    "SourceDenied",
    "SourceNotAllowed",
    "SourceNotFound",
    "SourceTooLarge",
    "SourceTruncated",
    "SourceUnauthorized",
    "SourceUnreachable",
    "StillRunning",
    "StudyConflict",
    "TryAgain",
    "from_payload",
]
