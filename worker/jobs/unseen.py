"""Images that a server says it has stored and does not show: hidden, or kept in another study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from courier.errors import CourierError
from worker.dicom.instances import Instance
from worker.pacs.protocol import Fate, Hiding, Outcome, Pacs


def as_shown(pacs: Pacs, instances: Sequence[Instance], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """``outcomes`` of a store, each image that was answered as stored looked for in its study, where it may be missing.

    Oddity: "A duplicate is a success".
    """
    if pacs.hiding is None:
        return list(outcomes)
    stored: dict[str, set[str]] = {}
    for instance, outcome in zip(instances, outcomes, strict=True):
        if outcome.fate is Fate.STORED:
            stored.setdefault(instance.study_instance_uid, set()).add(instance.sop_instance_uid)
    shown = {study: _present(pacs, study, uids) for study, uids in stored.items()}
    return [
        _as_shown(pacs.hiding, instance, outcome, shown) if outcome.fate is Fate.STORED else outcome
        for instance, outcome in zip(instances, outcomes, strict=True)
    ]


def _present(pacs: Pacs, study: str, uids: set[str]) -> set[str] | CourierError:
    try:
        return pacs.present(study, uids)
    except CourierError as error:
        return error


def _as_shown(
    hiding: Hiding, instance: Instance, outcome: Outcome, shown: Mapping[str, set[str] | CourierError]
) -> Outcome:
    """What is not shown and is nowhere else counts as not answered: it is looked for again."""
    there = shown[instance.study_instance_uid]
    if isinstance(there, CourierError):
        return replace(outcome, fate=Fate.UNMENTIONED, message=there.message)
    if instance.sop_instance_uid in there:
        return outcome
    try:
        why = hiding.why_unseen(instance)
    except CourierError as error:
        return replace(outcome, fate=Fate.UNMENTIONED, message=error.message)
    return why or replace(
        outcome, fate=Fate.UNMENTIONED, message="The server says that it is stored and does not show it."
    )
