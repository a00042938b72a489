"""What a result may say of an object: its metadata, as far as the site allows, and its viewer link.

Nothing is asked of a server here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from courier.json_text import ASCII_GROWTH, encode
from courier.results import Dataset, Place
from courier.settings import ResultSettings, ServerSettings
from worker.dicom.viewer import viewer_url
from worker.pacs.protocol import Found

_UID_TAGS = ("00080016", "00080018", "0020000D", "0020000E")


def uids_only(ds: Dataset) -> Dataset:
    return {tag: ds[tag] for tag in _UID_TAGS if tag in ds}


def allowed(datasets: Sequence[Dataset], results: ResultSettings, *, max_bytes: int) -> tuple[list[Dataset], list[str]]:
    """As much of ``datasets`` as `results.metadata` lets into results, and the warnings about what is missing.

    Above ``max_bytes`` of JSON they are cut down to their UIDs: a result stays in Redis for a day.
    """
    if results.metadata == "none":
        return [{} for _ in datasets], []
    if results.metadata == "uids":
        return [uids_only(ds) for ds in datasets], []
    if len(encode(datasets)) * ASCII_GROWTH > max_bytes and len(json.dumps(datasets)) > max_bytes:
        return [uids_only(ds) for ds in datasets], ["metadata_reduced_to_uids"]
    return list(datasets), []


def place(found: Found, server: ServerSettings) -> Place:
    """Where ``found`` is, with the link that shows it."""
    return Place(
        study_uid=found.study_instance_uid,
        series_uid=found.series_instance_uid,
        image_uid=found.sop_instance_uid,
        viewer_url=viewer_url(
            server,
            study=found.study_instance_uid,
            series=found.series_instance_uid or "",
            image=found.sop_instance_uid or "",
        ),
    )
