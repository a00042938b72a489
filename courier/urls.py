"""What the parts of a URL mean here: what names the object, what is a credential.

In ``http:`` and ``https:`` URLs a query may be a signature, so it is neither shown nor part of what a job is about. In
``s3:``, ``az:`` and ``file:`` URLs ``?`` and ``#`` belong to the name: ``s3://bucket/order?1.dcm`` and
``s3://bucket/order?2.dcm`` are two objects. A ``zip+`` URL follows the URL inside it.

An ``s3:`` or ``az:`` URL has the name as it is, percent signs included. An ``s3+encoded:`` or ``az+encoded:`` URL has
it percent-encoded, so that every name can be written, and holds none of ``?``, ``#`` and ``\\`` itself.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

ZIP = "zip+"
ENCODED = "+encoded"
ENTRY = "!/"
_OBJECT = re.compile(r"(?:s3://|az://)[^/?#]*/|file:/", re.IGNORECASE).match
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/").match
_USER = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/?#]*@")
_QUERY = re.compile(r"[?#]")
#: Parameters of presigned S3 URLs and of Azure's shared access signatures.
_SIGNATURE = re.compile(r"[?#](?:[^?#]*&)?(?:sig|signature|awsaccesskeyid|x-amz-[a-z0-9-]+)=", re.IGNORECASE)
_VERSION = {
    "s3": re.compile(r"\?(?:[^?/]*&)?versionid=[^/]*\Z", re.IGNORECASE),
    "az": re.compile(r"\?(?:[^?/]*&)?(?:versionid|snapshot)=[^/]*\Z", re.IGNORECASE),
}
#: What no line of a list or a plan, and no URL in a message, may have in it.
NOT_IN_URL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
_ENCODED_NAME = re.compile(r"(?:[^%?#\\]|%[0-9A-Fa-f]{2})*").fullmatch


def is_url(text: str) -> bool:
    return bool(_URL(text))


def names_object(url: str) -> bool:
    """Whether ``url`` is an ``s3:``, ``az:`` or ``file:`` URL, in which ``?`` and ``#`` belong to the object's name."""
    return bool(_OBJECT(url))


def without_query_marks(url: str) -> str:
    """A ``file:`` URL with ``?`` and ``#`` percent-encoded: standard parsers take them for a query and a fragment."""
    return url.replace("?", "%3F").replace("#", "%23")


def bare(url: str) -> str:
    """``url`` up to its query or fragment, if it has one: an object's URL, and an archive's entry, has none."""
    if names_object(url):
        return url
    return _QUERY.split(url, maxsplit=1)[0]


def signature_at(url: str) -> int | None:
    """Where in an object's URL parameters begin that look like a signature; such URLs are refused, and shown cut."""
    match = _SIGNATURE.search(url) if names_object(url) else None
    return match.start() if match else None


def refusal_reason(url: str) -> str:
    """Why an ``s3:`` or ``az:`` URL is refused that looks like one of http, in a sentence or two; "" if it does not."""
    if signature_at(url) is not None:
        return (
            "An s3:// or az:// URL has no signature: the worker reads and writes with its own credential. "
            "Leave the signature out, or send the signed URL as https://."
        )
    version = _VERSION.get(url.partition(":")[0].lower())
    if version and version.search(url):
        return (
            "An s3:// or az:// URL names an object by its whole key, and never an older version or a snapshot of it. "
            "Leave that out, or send a signed https:// URL of the version."
        )
    return ""


def object_url(url: str) -> str:
    """The URL that fetches a listed object: an ``s3:`` or ``az:`` one in the encoded form, if the plain one cannot."""
    scheme, _, name = url.partition("://")
    if scheme not in ("s3", "az"):
        return url
    if not NOT_IN_URL.search(url) and not refusal_reason(url) and (scheme == "s3" or "\\" not in name):
        return url
    return f"{scheme}{ENCODED}://{quote(name, safe='/$', errors='surrogatepass')}"


def object_name(written: str, *, encoded: bool) -> str | None:
    """The name of an object that is ``written`` in a URL; None if it is to be percent-encoded, in UTF-8, and is not."""
    if not encoded:
        return written
    try:
        return unquote(written, errors="strict") if _ENCODED_NAME(written) else None
    except UnicodeDecodeError:
        return None


def entry_of(url: str) -> tuple[str, str]:
    """The URL of the archive in a ``zip+`` URL, and the entry's name as it is written there; "" if it names none."""
    archive, separator, entry = url[len(ZIP) :].rpartition(ENTRY)
    return (archive, entry) if separator else (entry, "")


def unsigned(url: str) -> str:
    """What stays the same where a URL is signed anew: all of it but the user, query and fragment of an http URL.

    For comparisons alone, not to be shown.
    """
    if url[: len(ZIP)].lower() != ZIP:
        return bare(_USER.sub(r"\1", url))
    archive, entry = entry_of(url)
    return ZIP + bare(_USER.sub(r"\1", archive)) + ENTRY + entry
