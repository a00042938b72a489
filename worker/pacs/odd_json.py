"""DICOM JSON (PS3.18 F) in other spellings, brought into the standard's where its meaning is certain.

Functions over bytes and parsed JSON. What is not certain stays as it is, for the caller to refuse.
"""

from __future__ import annotations

import re
from typing import Any

from pydicom.datadict import tag_for_keyword

_TAG = re.compile(r"[0-9A-Fa-f]{8}", re.ASCII).fullmatch
#: The names inside an element and inside a person's name (PS3.18 F.2.2).
_NAMES = {
    name.lower(): name
    for name in ("vr", "Value", "BulkDataURI", "InlineBinary", "Alphabetic", "Ideographic", "Phonetic")
}
#: A tag in lower case, a name in another case, a keyword instead of a tag, a value outside a list.
_IS_ODD = re.compile(
    rb'"(?=[0-9A-F]{0,7}[a-f])[0-9A-Fa-f]{8}"\s*:'
    rb'|"(?!vr"|Value"|BulkDataURI"|InlineBinary"|Alphabetic"|Ideographic"|Phonetic")[A-Za-z]+"\s*:'
    rb'|"Value"\s*:\s*[^\[\s]'
).search


def is_odd(body: bytes) -> bool:
    """Whether JSON may hold another spelling than the standard's; false alarms cost time and change nothing."""
    return _IS_ODD(body) is not None


def in_standard_spelling(document: Any) -> Any:
    """``document`` with tags in upper case, names as PS3.18 writes them, and each Value a list; it is used up.

    Raises
    ------
    ValueError
        One element stands there twice, in two spellings and with two meanings.
    """
    if isinstance(document, list):
        for place, one in enumerate(document):  # in place, so that a long answer is not held twice
            document[place] = in_standard_spelling(one)
        return document
    if not isinstance(document, dict):
        return document
    found: dict[str, Any] = {}
    for key, value in document.items():
        name, read = _name(key, value), in_standard_spelling(value)
        if name == "Value" and not isinstance(read, list):
            read = [] if read is None else [read]
        if found.setdefault(name, read) != read:
            raise ValueError(f"{name} stands twice")
    return found


def is_dataset(document: Any) -> bool:
    """Whether a JSON object is a dataset: it has elements, and nothing else."""
    return isinstance(document, dict) and bool(document) and all(map(_TAG, document))


def _name(key: str, value: Any) -> str:
    if _TAG(key):
        return key.upper()
    tag = tag_for_keyword(key) if isinstance(value, dict) else None
    return f"{tag:08X}" if tag is not None else _NAMES.get(key.lower(), key)
