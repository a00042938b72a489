"""The studies of a server, page by page: how lists and batches go through them, and when there is no further page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from courier.errors import InvalidRequest, PacsMisanswered
from courier.results import Dataset
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.dicomweb import fits_path
from worker.pacs.matching import fingerprint
from worker.pacs.protocol import ListsNewestFirst, Pacs, StudyPage

PAGE_STUDIES = 1000
#: In the details of an error: what was listed before is not all.
LIST_IS_CUT = "list_is_cut"


@dataclass
class Left:
    """What a server sent although it does not match the filters, over all pages.

    Rows are counted, not studies: of a filter with several values a study may come with the query for each.
    """

    dropped: int = 0
    #: Filtered attributes that no row had at all; None before the first row.
    lacking: set[str] | None = None
    #: Whether its list may be one page of a longer one that it never sends.
    may_be_cut: bool = False

    def add(self, page: StudyPage) -> None:
        self.dropped += page.dropped
        if page.studies or page.dropped:
            self.lacking = set(page.lacking) if self.lacking is None else self.lacking & set(page.lacking)

    def sentence(self, name: str) -> str:
        """What a person has to know of it; "" if there is nothing."""
        cut = f"{name} ignores offset, so it may have more studies than it lists." if self.may_be_cut else ""
        if not self.dropped:
            return cut
        rows = "1 row that does" if self.dropped == 1 else f"{self.dropped:,} rows that do"
        lacking = " and ".join(sorted(self.lacking or ()))
        why = f" No study there came with {lacking}." if lacking else ""
        return f"{name} sent {rows} not match the filters; left out.{why} {cut}".rstrip()


@dataclass(frozen=True)
class Mark:
    """Where a server's list goes on.

    ``prints`` are fingerprints of pages before it. ``skip`` studies of the answer at ``offset`` were given already: the
    server sends more than it is asked for or, if it is ``unpaged``, minds the limit alone and is asked for all at once.
    """

    offset: int = 0
    prints: tuple[str, ...] = ()
    skip: int = 0
    unpaged: bool = False


@dataclass
class ListWalk:
    """The way through one server's list, page after page. ``prints`` are fingerprints of the pages before.

    A server that ignores the offset sends a page again. If that page is not full, it is all that the server has; if it
    is, the server is asked for all in one page.
    """

    pacs: Pacs
    filters: Mapping[str, str]
    prints: set[str] = field(default_factory=set)
    #: The fingerprint of the first page.
    first: str = ""
    left: Left = field(default_factory=Left)
    newest_first: bool = False
    #: Whether the newest do come first; not every server can sort.
    is_sorted: bool = False

    def _page(self, limit: int, offset: int) -> StudyPage:
        if self.newest_first and isinstance(self.pacs, ListsNewestFirst):
            page = self.pacs.newest_studies(filters=self.filters, limit=limit, offset=offset)
            self.is_sorted = page.is_sorted
            return page
        return self.pacs.studies(filters=self.filters, limit=limit, offset=offset)

    def step(self, mark: Mark, *, limit: int, at_most: int | None = None) -> tuple[list[Dataset], Mark | None]:
        """The studies at ``mark``, and where the list goes on; None after its end.

        ``limit`` is what the server is asked for. ``at_most`` so many studies are given, whatever it sends.

        Raises
        ------
        PacsMisanswered
            A full page again, and it is the largest: there may be further studies, and this server never sends them.
        """
        if mark.unpaged:
            return self._all_at_once(mark, at_most)
        page = self._page(limit, mark.offset)
        seen = _fingerprint(page)
        self.first = self.first or seen
        if not mark.skip and seen and seen in self.prints:
            return self._again(page, limit, at_most)
        self.prints.add(seen)
        if not mark.skip:
            self.left.add(page)
        studies, rest = _given(page, mark, at_most if page.is_over else None)
        return studies, rest or _mark(page.next_offset)

    def _again(self, page: StudyPage, limit: int, at_most: int | None) -> tuple[list[Dataset], Mark | None]:
        if page.is_full or len(page.studies) == limit:
            return self._all_at_once(Mark(page.start, skip=len(page.studies), unpaged=True), at_most)
        if not page.is_over:
            one = self._page(1, page.start)
            self.left.may_be_cut |= one.is_full  # it minds the limit, and so may have one of its own
        return [], _mark(page.after)

    def _all_at_once(self, mark: Mark, at_most: int | None) -> tuple[list[Dataset], Mark | None]:
        page = self._page(PAGE_STUDIES, mark.offset)
        if page.is_full or len(page.studies) == PAGE_STUDIES:
            server = self.pacs.server
            sentence = (
                f"{server.name} ignores offset and sends the same page of {PAGE_STUDIES} studies again; narrow the list"
                " with filters, e.g. by StudyDate."
            )
            details = {LIST_IS_CUT: True}
            error = PacsMisanswered(sentence, server_name=server.name, server_type=server.type, details=details)
            error.is_lasting = True
            raise error
        studies, rest = _given(page, mark, at_most)
        return studies, rest or _mark(page.after)


def _mark(offset: int | None) -> Mark | None:
    return None if offset is None else Mark(offset)


def _given(page: StudyPage, mark: Mark, at_most: int | None) -> tuple[list[Dataset], Mark | None]:
    """The next studies of a page; and, if ``at_most`` leaves some of them over, where these are."""
    studies = page.studies[mark.skip :]
    if at_most is None or len(studies) <= at_most:
        return studies, None
    return studies[:at_most], replace(mark, skip=mark.skip + at_most)


def _fingerprint(page: StudyPage) -> str:
    return fingerprint(page.studies) if page.fingerprint is None else page.fingerprint


def walk(pacs: Pacs, filters: Mapping[str, str], left: Left, *, limit: int = PAGE_STUDIES) -> Iterator[list[str]]:
    """The UIDs of a server's studies that match ``filters``, page by page; see `ListWalk`. ``left`` gets the others."""
    way = ListWalk(pacs, filters, left=left)
    mark: Mark | None = Mark()
    while mark is not None:
        studies, mark = way.step(mark, limit=limit)
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
    except (InvalidRequest, PacsMisanswered) as error:
        is_cut = isinstance(error, InvalidRequest) or error.details.get(LIST_IS_CUT)
        if not is_cut or (not listed and not left.dropped):
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
