"""The studies of a server, as batches plan them: page by page, as far as it lets one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from worker.errors import InvalidRequest
from worker.jobs.batches import Desk, in_turns
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.protocol import Pacs
from worker.planning import Planned

PAGE_STUDIES = 1000


def study_pages(pacs: Pacs, warnings: list[str], filters: Mapping[str, str] | None = None) -> Iterator[list[str]]:
    """The UIDs of a server's studies; that it has more than it lists is said in ``warnings``."""
    offset: int | None = 0
    while offset is not None:
        try:
            page = pacs.studies(filters=filters or {}, limit=PAGE_STUDIES, offset=offset)
        except InvalidRequest:
            if offset == 0:
                raise
            name = pacs.server.name
            warnings.append(
                f"{name} lists no more than {offset} studies at a time; narrow the filters, or run this again."
            )
            return
        yield [text(ds, STUDY_INSTANCE_UID) for ds in page.studies]
        offset = page.next_offset


def planned_studies(desk: Desk, servers: Sequence[Pacs]) -> Iterator[Sequence[Planned]]:
    """What the batch's order asks for (its ``filters``, or all) on each of ``servers``, in turns."""
    filters = desk.batch.order.get("filters")
    return in_turns([_planned(pacs, desk.warnings, filters) for pacs in servers])


def _planned(pacs: Pacs, warnings: list[str], filters: Mapping[str, str] | None) -> Iterator[Sequence[Planned]]:
    for page in study_pages(pacs, warnings, filters):
        yield [Planned(study_uid, pacs.server.name) for study_uid in page]
