"""Rejection notes (IHE IOCM): which objects of a study are the notes of an archive, and no images of the user.

Stored in an archive that heeds them, such a note hides what it names. Oddity: "A rejection note is no image".
"""

from __future__ import annotations

from courier.results import Dataset
from worker.pacs.dicomjson import items, text

#: Key Object Selection Document Storage.
KEY_OBJECT = "1.2.840.10008.5.1.4.1.1.88.59"
#: The titles of PS3.16 CID 7011: for reasons of quality, of patient safety, wrong worklist entry, retention expired.
REJECTION_TITLES = frozenset(("113001^DCM", "113037^DCM", "113038^DCM", "113039^DCM"))
_SOP_CLASS_UID, _CONCEPT_NAME_CODE_SEQUENCE = "00080016", "0040A043"
_CODE_VALUE, _CODING_SCHEME_DESIGNATOR = "00080100", "00080102"


def is_rejection_note(attributes: Dataset) -> bool:
    """Whether a row of a server's list is certainly one."""
    titles = [
        f"{text(one, _CODE_VALUE)}^{text(one, _CODING_SCHEME_DESIGNATOR)}"
        for one in items(attributes, _CONCEPT_NAME_CODE_SEQUENCE)
    ]
    return text(attributes, _SOP_CLASS_UID) == KEY_OBJECT and titles[:1] != [] and titles[0] in REJECTION_TITLES
