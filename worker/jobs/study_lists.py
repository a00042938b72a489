"""The studies of a server, page by page: how lists and batches go through them, and when there is no further page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from worker.errors import InvalidRequest, PacsMisanswered
from worker.jobs.batches import Desk, in_turns
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.dicomweb import fits_path
from worker.pacs.matching import fingerprint
from worker.pacs.protocol import Pacs, StudyPage
from worker.payloads import Dataset
from worker.planning import Planned

PAGE_STUDIES = 1000


@dataclass
class Left:
    """What a server sent although it does not match the filters, over all pages.

    Rows are counted, not studies: of a filter with several values a study may come with the query for each.
    """

    dropped: int = 0
    #: Filtered attributes that no row had at all; None before the first row.
    lacking: set[str] | None = None

    def add(self, page: StudyPage) -> None:
        self.dropped += page.dropped
        if page.studies or page.dropped:
            self.lacking = set(page.lacking) if self.lacking is None else self.lacking & set(page.lacking)

    def sentence(self, name: str) -> str:
        """What a person has to know of it; "" if there is nothing."""
        if not self.dropped:
            return ""
        rows = "1 row that does" if self.dropped == 1 else f"{self.dropped:,} rows that do"
        lacking = " and ".join(sorted(self.lacking or ()))
        why = f" No study there came with {lacking}." if lacking else ""
        return f"{name} sent {rows} not match the filters; left out.{why}"


@dataclass
class Walk:
    """The way through one server's list, page after page. ``before`` is the fingerprint of the page before, if any.

    A server that ignores the offset sends the same page again. If that page is not full, it is all that the server has.
    """

    pacs: Pacs
    before: str = ""
    #: The fingerprint of the first page.
    first: str = ""
    left: Left = field(default_factory=Left)

    def take(self, page: StudyPage, *, limit: int) -> tuple[list[Dataset], int | None]:
        """The studies of the next page, and the offset of the one behind it; ``limit`` is what was asked for.

        Raises
        ------
        PacsMisanswered
            The same full page again: there may be further studies, and this server never sends them.
        """
        before, self.before = self.before, _fingerprint(page)
        self.first = self.first or self.before
        if not self.before or self.before != before:
            self.left.add(page)
            return page.studies, page.next_offset
        if page.is_full or len(page.studies) == limit:
            server = self.pacs.server
            sentence = f"{server.name} sends the same page of its studies again; narrow the list with filters."
            raise PacsMisanswered(sentence, server_name=server.name, server_type=server.type)
        return [], page.after


def _fingerprint(page: StudyPage) -> str:
    return fingerprint(page.studies) if page.fingerprint is None else page.fingerprint


def walk(pacs: Pacs, filters: Mapping[str, str], left: Left, *, limit: int = PAGE_STUDIES) -> Iterator[list[str]]:
    """The UIDs of a server's studies that match ``filters``, page by page; see `Walk`. ``left`` gets what does not."""
    way = Walk(pacs, left=left)
    offset: int | None = 0
    while offset is not None:
        page = pacs.studies(filters=filters, limit=limit, offset=offset)
        studies, offset = way.take(page, limit=limit)
        yield [text(ds, STUDY_INSTANCE_UID) for ds in studies]


def check_order_filters(servers: Iterable[Pacs], filters: Mapping[str, str] | None) -> None:
    """Refuse an order by filters as a whole, if one of its servers cannot answer for what matches.

    Raises
    ------
    InvalidRequest
        Names the server and the key; nothing was asked and nothing has begun.
    """
    for pacs in servers if filters else ():
        pacs.check_order_filters(filters or {})


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
    PacsMisanswered
        A study's UID would name something else in a URL.
    """
    listed, left = 0, Left()
    try:
        for page in walk(pacs, filters or {}, left):
            if not all(map(fits_path, page)):
                server = pacs.server
                sentence = f"{server.name} lists a study whose UID cannot stand in a URL; nothing is planned."
                raise PacsMisanswered(sentence, server_name=server.name, server_type=server.type)
            listed += len(page)
            yield page
    except InvalidRequest as error:
        if not listed and not left.dropped:
            raise
        name = pacs.server.name
        limit = f"{name} lists no more than {listed + left.dropped} studies at a time"
        if not rest_is_reached:
            raise InvalidRequest(
                f"{limit}, and has more: narrow the filters, e.g. by StudyDate, and order what matches in pieces.",
                server_name=name,
                server_type=pacs.server.type,
            ) from error
        warnings.append(f"{limit}; narrow the filters, or run this again.")
    if sentence := left.sentence(pacs.server.name):
        warnings.append(sentence)


def planned_studies(desk: Desk, servers: Sequence[Pacs], *, rest_is_reached: bool) -> Iterator[Sequence[Planned]]:
    """What the batch's order asks for (its ``filters``, or all) on each of ``servers``, in turns; see `study_pages`."""
    filters = desk.batch.order.get("filters")
    lists = [study_pages(pacs, desk.warnings, filters, rest_is_reached=rest_is_reached) for pacs in servers]
    return in_turns([_planned(pacs, found) for pacs, found in zip(servers, lists, strict=True)])


def _planned(pacs: Pacs, found: Iterator[list[str]]) -> Iterator[Sequence[Planned]]:
    for page in found:
        yield [Planned(study_uid, pacs.server.name) for study_uid in page]
