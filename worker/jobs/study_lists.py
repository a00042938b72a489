"""The studies of a server, as batches plan them: page by page, as far as it lets one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from worker.errors import InvalidRequest
from worker.jobs.batches import Desk, in_turns
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.protocol import Pacs
from worker.planning import Planned

PAGE_STUDIES = 1000


def study_pages(
    pacs: Pacs, warnings: list[str], filters: Mapping[str, str] | None = None, *, rest_is_reached: bool = True
) -> Iterator[list[str]]:
    """The UIDs of a server's studies, as far as it lists any.

    ``rest_is_reached``: what is done with them takes them off the list, so that the same order again comes to the rest;
    that there is a rest is said in ``warnings``.

    Raises
    ------
    InvalidRequest
        The server has more than it lists, and the same order again would never come to the rest.
    """
    offset: int | None = 0
    while offset is not None:
        try:
            page = pacs.studies(filters=filters or {}, limit=PAGE_STUDIES, offset=offset)
        except InvalidRequest as error:
            if offset == 0:
                raise
            name = pacs.server.name
            limit = f"{name} lists no more than {offset} studies at a time"
            if not rest_is_reached:
                raise InvalidRequest(
                    f"{limit}, and has more: narrow the filters, e.g. by StudyDate, and order what matches in pieces.",
                    server_name=name,
                    server_type=pacs.server.type,
                ) from error
            warnings.append(f"{limit}; narrow the filters, or run this again.")
            return
        yield [text(ds, STUDY_INSTANCE_UID) for ds in page.studies]
        offset = page.next_offset


def planned_studies(desk: Desk, servers: Sequence[Pacs], *, rest_is_reached: bool) -> Iterator[Sequence[Planned]]:
    """What the batch's order asks for (its ``filters``, or all) on each of ``servers``, in turns; see `study_pages`."""
    filters = desk.batch.order.get("filters")
    lists = [study_pages(pacs, desk.warnings, filters, rest_is_reached=rest_is_reached) for pacs in servers]
    return in_turns([_planned(pacs, pages) for pacs, pages in zip(servers, lists, strict=True)])


def _planned(pacs: Pacs, pages: Iterator[list[str]]) -> Iterator[Sequence[Planned]]:
    for page in pages:
        yield [Planned(study_uid, pacs.server.name) for study_uid in page]
