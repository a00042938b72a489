"""One object whose study is known, on one server: also where images and series are found only below their studies.

For all who know more of an object than its UID. The dialects say what a server answers.
"""

from __future__ import annotations

from collections.abc import Iterable

from courier.errors import PacsMisanswered
from courier.messages import Level
from worker.pacs.protocol import NEEDS_STUDY, Found, Pacs


def find_known(pacs: Pacs, known: Found) -> list[Found]:
    """Every object with the UID of ``known``; where the server finds it only below its study, in that study alone."""
    try:
        return pacs.find(known.level, uid_of(known))
    except PacsMisanswered as error:
        if not error.details.get(NEEDS_STUDY):
            raise
    if known.sop_instance_uid is not None and known.series_instance_uid is not None:
        there = pacs.present(known.study_instance_uid, {known.sop_instance_uid})
        return [known] if known.sop_instance_uid in there else []
    return _below(pacs, known.level, uid_of(known), known.study_instance_uid)


def find_in_study(pacs: Pacs, level: Level, uid: str, study_instance_uid: str) -> list[Found]:
    """The object of ``level`` with ``uid`` in one study, whatever other studies hold."""
    try:
        found = pacs.find(level, uid)
    except PacsMisanswered as error:
        if not error.details.get(NEEDS_STUDY):
            raise
        found = _below(pacs, level, uid, study_instance_uid)
    return [one for one in found if one.study_instance_uid == study_instance_uid]


def find_in_studies(pacs: Pacs, level: Level, uid: str, study_instance_uids: Iterable[str]) -> list[Found]:
    """The same in each of several studies, asked below them."""
    return [one for study_uid in study_instance_uids for one in _below(pacs, level, uid, study_uid)]


def _below(pacs: Pacs, level: Level, uid: str, study_instance_uid: str) -> list[Found]:
    if level == "image" and not pacs.present(study_instance_uid, {uid}):
        return []
    for image in pacs.instances(Found("study", study_instance_uid)):
        if level == "image" and image.sop_instance_uid == uid:
            return [image]
        if level == "series" and image.series_instance_uid == uid:
            return [Found("series", study_instance_uid, uid)]
    return []


def uid_of(found: Found) -> str:
    """The UID of the object itself, at its own level."""
    uids = {
        "study": found.study_instance_uid,
        "series": found.series_instance_uid,
        "image": found.sop_instance_uid,
    }
    return str(uids[found.level])
