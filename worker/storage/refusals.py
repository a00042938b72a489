"""What the codes mean with which S3 and Azure refuse a request: whose fault it is, and what to do about it.

The codes are the stores' own (Amazon S3 "Error responses", Azure "Common REST API error codes" and "Blob service error
codes"). A code is quoted; the text beside it is not, because it may hold keys and signatures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Final

from courier.errors import CourierError, SourceUnauthorized
from worker.storage.credentials import Doubt
from worker.storage.network import of_proxy

_IS_CODE = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}").fullmatch

_RENEW: Final = "renew the worker's credentials"
#: The credential is refused, whatever is asked for.
_REFUSED: Final = {
    # S3, and the service that gives out its session tokens
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"), f"the session token has expired: {_RENEW}"
    ),
    **dict.fromkeys(("InvalidToken", "InvalidIdentityToken"), f"the session token is not valid: {_RENEW}"),
    **dict.fromkeys(
        ("RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"),
        "the worker's clock and the store's are too far apart: let the worker's machine keep time by NTP",
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException"),
        "the store does not know the access key, which may have been rotated: give the worker the new one",
    ),
    **dict.fromkeys(
        ("AccountProblem", "NotSignedUp", "AccountIsDisabled", "InvalidPayer"),
        "the account is closed or disabled: ask who runs it",
    ),
    # Azure
    **dict.fromkeys(
        ("InvalidAuthenticationInfo", "NoAuthenticationInformation"), f"the credential cannot be read: {_RENEW}"
    ),
    "KeyBasedAuthenticationNotPermitted": "the account allows no account keys: allow them, or use a SAS token",
}
#: The signature is wrong: for all alike, unless it is good for some places only, or for all but odd names.
_SIGNATURE: Final = {
    "SignatureDoesNotMatch": "the secret key is not that of the access key: give the worker a pair",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set region beside its buckets",
    "InvalidSecurity": _RENEW,
    **dict.fromkeys(
        ("AuthenticationFailed", "AuthorizationFailure"),
        "the account key or SAS token is wrong, has expired or does not allow it, or the worker's clock is wrong, or"
        " the account's firewall keeps the worker out",
    ),
    "AuthorizationSourceIPMismatch": "the SAS token is for other addresses: give the worker one for its own",
    "AuthorizationProtocolMismatch": "the SAS token is for https alone: correct account_url",
    "AuthorizationServiceMismatch": "the SAS token is for another service: give the worker one for blobs",
}
#: Operations of the services that give out credentials; all others are the store's.
_GIVES_CREDENTIALS: Final = frozenset(
    ("AssumeRole", "AssumeRoleWithWebIdentity", "AssumeRoleWithSAML", "GetSessionToken", "GetRoleCredentials")
)
_RIGHTS: Final = "check what the worker's credential may do there"
#: With these an object that is there cannot be read as it is.
ARCHIVED: Final = frozenset(("InvalidObjectState", "BlobArchived", "BlobBeingRehydrated"))
IN_ARCHIVE: Final = "is archived ({}): restore it in the store, then send the job again"


def is_code(text: str) -> bool:
    """Whether ``text`` is a store's code: an answer without one is not the store's."""
    return _IS_CODE(text) is not None


def check_refusal(
    code: str, status: int, shown: str, *, of: str, verb: str, denied: Callable[[str], CourierError]
) -> None:
    """Return if the answer is no refusal of the credential ``of`` which section of the settings.

    Raises
    ------
    SourceUnauthorized
        The credential is refused.
    Doubt
        The credential, or what it is used for.
    """
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        raise of_proxy(status, shown)
    quoted = code if is_code(code) else f"status {status}"

    def unauthorized(remedy: str) -> SourceUnauthorized:
        sentence = f"{shown} cannot be {verb}: the store refuses the worker's credentials of {of} ({quoted}); {remedy}."
        return SourceUnauthorized(sentence, details={"reason": quoted}, scope="credential")

    def doubt(remedy: str, *, whole: bool) -> Doubt:
        sentence = f"{shown} may not be {verb} ({quoted}): {remedy} (credentials of {of})."
        return Doubt(denied(sentence), unauthorized(remedy), whole=whole)

    if remedy := _REFUSED.get(code):
        raise unauthorized(remedy)
    if remedy := _SIGNATURE.get(code):
        raise doubt(remedy, whole=True)
    if status in (401, 403) and code not in ARCHIVED:
        raise doubt(_RIGHTS, whole=status == 401)


@contextmanager
def credential_trouble(shown: str, of: str, *, verb: str) -> Iterator[None]:
    """boto has no credential that it could use, or was refused one by the service that gives them out.

    Raises
    ------
    SourceUnauthorized
        Instead; any other error passes.
    """
    from botocore import exceptions as boto  # noqa: PLC0415 (a worker that never sees S3 does not pay for it)

    none = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.SSOError)
    odd = (boto.ConfigNotFound, boto.ConfigParseError, boto.InvalidConfigError, boto.UnknownCredentialError)
    try:
        yield
    except boto.ClientError as error:
        if error.operation_name not in _GIVES_CREDENTIALS:
            raise
        code = str(error.response.get("Error", {}).get("Code", "")) or type(error).__name__
        why = f"{error.operation_name} was answered {code}: {_REFUSED.get(code, 'correct its role')}"
        raise unauthorized(shown, of, code, why, verb=verb) from error
    except (*none, *odd, boto.TokenRetrievalError, boto.ProfileNotFound) as error:
        name = type(error).__name__
        raise unauthorized(shown, of, name, f"{name}; check the worker's credentials", verb=verb) from error


def unauthorized(shown: str, of: str, reason: str, why: str, *, verb: str) -> SourceUnauthorized:
    """That the worker has no credential that it could use."""
    sentence = f"{shown} cannot be {verb}: the worker has no credentials for {of} ({why})."
    return SourceUnauthorized(sentence, details={"reason": reason}, scope="credential")
