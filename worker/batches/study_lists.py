"""The studies that a batch's order asks for, over several servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from courier.batches.planner import Planned
from worker.batches.coordinator import PassContext, in_turns
from worker.jobs.study_lists import study_pages
from worker.pacs.protocol import Pacs


def planned_studies(
    context: PassContext, servers: Sequence[Pacs], *, rest_is_reached: bool
) -> Iterator[Sequence[Planned]]:
    """What the batch's order asks for (its ``filters``, or all) on each of ``servers``, in turns; see `study_pages`."""
    filters = context.batch.order.get("filters")
    lists = [study_pages(pacs, context.warnings, filters, rest_is_reached=rest_is_reached) for pacs in servers]
    return in_turns([_planned(pacs, found) for pacs, found in zip(servers, lists, strict=True)])


def _planned(pacs: Pacs, found: Iterator[list[str]]) -> Iterator[Sequence[Planned]]:
    for page in found:
        yield [Planned(study_uid, pacs.server.name) for study_uid in page]
