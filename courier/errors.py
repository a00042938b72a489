"""Every way a job can go wrong, by what happens next.

Only exceptions live here: no retry loops, no HTTP, no Celery. The branches say who acts; a test keeps this
drawing complete:

    CourierError
    ├── TryAgain                time may cure it: the job is parked and tried again, then the dead letter
    │   ├── SourceUnreachable   source_unreachable
    │   ├── SourceTruncated     source_truncated
    │   ├── PacsUnavailable     pacs_unavailable
    │   └── PacsMisanswered     pacs_misanswered
    ├── Refused                 never again: bad input, policy, or the server said no
    │   ├── ImageAlreadyExists  image_already_exists
    │   ├── NotFound            not_found
    │   ├── InvalidRequest      invalid_request
    │   ├── ConfirmationRequired confirmation_required
    │   ├── SourceNotAllowed    source_not_allowed
    │   ├── SourceNotFound      source_not_found
    │   ├── SourceDenied        source_denied
    │   ├── SourceTooLarge      source_too_large
    │   ├── NotDicom            not_dicom
    │   ├── MissingUid          missing_uid
    │   ├── InvalidUid          invalid_uid
    │   ├── StudyConflict       study_conflict
    │   ├── PacsRejected        pacs_rejected
    │   └── Cancelled           cancelled
    └── NeedsPerson             the dead letter: a person has to change something first
        ├── Unauthorized        the worker's own credential: the job waits while it is refused, then the dead letter
        │   ├── SourceUnauthorized source_unauthorized
        │   └── PacsUnauthorized pacs_unauthorized
        └── Poisoned            poisoned
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeGuard


class CourierError(Exception):
    """One failure as programs see it: ``code`` for machines, one sentence for people.

    The single positional argument is either the sentence or the whole wire object
    ``{"code", "message", "server_name", "server_type", "details"}``, so that the exception survives Celery's
    JSON result backend (which rebuilds it from ``args``) unchanged.
    """

    code: ClassVar[str] = ""
    #: Whether the job that ends with this error has its answer, so that there is nothing for a person to do.
    is_answer: bool = False
    #: The circuit breaker (courier/ledger/breakers.py) that is open, if that is why, or that this error has
    #: opened. Then the job waits until the breaker closes, and not for a time.
    open_circuit: str | None = None

    def __init__(
        self,
        message: str | Mapping[str, Any],
        *,
        server_name: str | None = None,
        server_type: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(message, str):
            message = {
                "code": self.code,
                "message": message,
                "server_name": server_name,
                "server_type": server_type,
                "details": dict(details or {}),
            }
        self.payload: dict[str, Any] = dict(message)
        super().__init__(self.payload)

    def __str__(self) -> str:
        return f"{self.payload['code']}: {self.payload['message']}"

    @property
    def message(self) -> str:
        return str(self.payload["message"])

    @property
    def server_name(self) -> str | None:
        return self.payload.get("server_name")

    @property
    def server_type(self) -> str | None:
        return self.payload.get("server_type")

    @property
    def details(self) -> dict[str, Any]:
        return dict(self.payload.get("details") or {})

    @classmethod
    def subclasses(cls) -> Iterator[type[Self]]:
        """Every class below this one that has a code of its own."""
        for child in cls.__subclasses__():
            if child.code:
                yield child
            yield from child.subclasses()


class TryAgain(CourierError):
    """Time may cure it. ``retry_after_s`` is what the other side asked for, if it did.

    ``is_lasting``: this one error is certain to come again, so the job ends at once, as a dead letter.
    """

    is_lasting: bool = False

    def __init__(self, message: str | Mapping[str, Any], *, retry_after_s: float | None = None, **context: Any) -> None:
        super().__init__(message, **context)
        self.retry_after_s = retry_after_s


class Refused(CourierError):
    """Trying again would end the same way."""

    is_answer = True


class NeedsPerson(CourierError):
    """Nothing the worker can do will cure it."""


class SourceUnreachable(TryAgain):
    code = "source_unreachable"


class SourceTruncated(TryAgain):
    code = "source_truncated"


class PacsUnavailable(TryAgain):
    """``slow_down``: the server has asked for fewer requests, and ``retry_after_s`` is when the job's next one may be
    sent (worker/pacs/server_rates.py). ``is_attempt`` is False where the server was not asked, or only to learn
    whether its circuit may close. Neither costs the job any of its attempts.
    """

    code = "pacs_unavailable"
    slow_down: bool = False
    #: Whether the request had gone out, all of it, and no answer came within the read time-out.
    hung: bool = False
    is_attempt: bool = True


class PacsMisanswered(TryAgain):
    code = "pacs_misanswered"


class ImageAlreadyExists(Refused):
    code = "image_already_exists"


class NotFound(Refused):
    code = "not_found"


class InvalidRequest(Refused):
    code = "invalid_request"


class ConfirmationRequired(Refused):
    code = "confirmation_required"


class SourceNotAllowed(Refused):
    code = "source_not_allowed"


class SourceNotFound(Refused):
    code = "source_not_found"


class SourceDenied(Refused):
    code = "source_denied"


class SourceTooLarge(Refused):
    code = "source_too_large"


class NotDicom(Refused):
    code = "not_dicom"


class MissingUid(Refused):
    code = "missing_uid"


class InvalidUid(Refused):
    code = "invalid_uid"


class StudyConflict(Refused):
    code = "study_conflict"


class PacsRejected(Refused):
    code = "pacs_rejected"


class Cancelled(Refused):
    code = "cancelled"


class Unauthorized(NeedsPerson):
    """A credential of the worker itself is refused, or may not do what is needed.

    Where its circuit is open (`open_circuit`), the job waits, and uses up none of its attempts. ``scope`` is what is
    refused: all that is asked for with the credential, or one request for want of a right.
    """

    def __init__(
        self,
        message: str | Mapping[str, Any],
        *,
        scope: Literal["credential", "request"] = "request",
        **context: Any,
    ) -> None:
        super().__init__(message, **context)
        self.scope = scope


class SourceUnauthorized(Unauthorized):
    """A store's (of images, or for downloads and backups), or the proxy's."""

    code = "source_unauthorized"


class PacsUnauthorized(Unauthorized):
    code = "pacs_unauthorized"


class Poisoned(NeedsPerson):
    code = "poisoned"


def waits_for_server(error: CourierError) -> bool:
    """Whether the job that met ``error`` waits for a circuit breaker to close, or for its turn at a server that has
    asked for fewer requests, rather than tries again or ends.
    """
    return error.open_circuit is not None or (isinstance(error, PacsUnavailable) and error.slow_down)


def is_final(error: object) -> TypeGuard[CourierError]:
    """Whether ``error`` ends the job, or the item of a batch, that met it."""
    if isinstance(error, TryAgain):
        return error.is_lasting
    return isinstance(error, Refused | NeedsPerson) and not waits_for_server(error)


def first_to_wait_for(errors: Sequence[CourierError]) -> CourierError:
    """Of several errors the one that decides what happens next.

    One whose circuit breaker is open first, for it costs no attempt to wait for it; then one that time may cure.
    """

    def rank(error: CourierError) -> int:
        if waits_for_server(error):
            return 0
        return 2 if is_final(error) else 1

    return min(errors, key=rank)


def from_payload(payload: Mapping[str, Any]) -> CourierError:
    """The exception that matches a wire object; an unknown code becomes a plain `CourierError`."""
    by_code = {kind.code: kind for kind in CourierError.subclasses()}
    return by_code.get(str(payload.get("code")), CourierError)(payload)
