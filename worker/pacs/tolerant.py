"""DICOMweb (PS3.18) on a server of which only the standard is known: searches, and what their answers mean.

Such a server may lack resources, ignore parameters, leave UIDs out, and say in its own way that it found nothing. An
answer is read where its meaning is certain, if need be by a second question. Where it is not, the error is lasting and
says what a person can do. No dialect of a known product asks through here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal
from urllib.parse import quote, urlencode

from courier.errors import PacsMisanswered, PacsRejected
from courier.messages import Level, check_uid
from courier.results import Dataset
from worker.pacs.dicomjson import SERIES_INSTANCE_UID, SOP_INSTANCE_UID, STUDY_INSTANCE_UID, number, text, values
from worker.pacs.dicomweb import DICOM_JSON, DICOM_JSON_GZIP, FEW, QUERIES, RAW, DicomWeb, fits_path, path_of, window
from worker.pacs.matching import Parameter
from worker.pacs.odd_json import in_standard_spelling, is_dataset, is_odd
from worker.pacs.protocol import NEEDS_STUDY, NOTHING_OR_WRONG_URL, Found
from worker.pacs.transport import Answer, Request

#: What a search of a resource that every server has may be answered with, and one of a resource that a server may lack.
_SEARCH = (200, 204, 404)
_OPTIONAL = (*_SEARCH, 400, 403, 405, 410, 501)
#: So long a resource that was found missing is not asked for again.
MISSING_S = 10.0
#: A server that was well so short a time ago may be about to restart.
TROUBLE_S = 10.0
NUMBER_OF_STUDY_RELATED_INSTANCES = "00201208"
_KEYWORDS = {query.tag: query.keyword for query in QUERIES.values()}
_UID_TAGS: dict[Level, tuple[str, ...]] = {
    "study": (STUDY_INSTANCE_UID,),
    "series": (STUDY_INSTANCE_UID, SERIES_INSTANCE_UID),
    "image": (STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, SOP_INSTANCE_UID),
}
PAGE = 1000
_ONE: list[Parameter] = [("limit", "1")]
#: A query that names an attribute, for archives that answer no other.
_BY_DATE: list[Parameter] = [("StudyDate", "19000101-")]
#: What names no attribute by which studies are chosen.
_NO_KEYS = {"limit", "offset", "includefield"}


@dataclass(frozen=True)
class SearchReply:
    """What a search was answered with.

    ``nothing``: the server found nothing, as the standard says it. ``unclear``: nothing was found, or the resource does
    not exist. ``not_offered``: it does not exist for us. ``is_one``: one object came instead of a list.
    """

    says: Literal["rows", "nothing", "unclear", "not_offered"]
    status: int
    rows: list[Dataset]
    is_one: bool = False

    def lacks(self, tags: Iterable[str]) -> bool:
        return any(not text(ds, tag) for ds in self.rows for tag in tags)


class TolerantDicomWeb(DicomWeb):
    """As `DicomWeb`. What it learns of the server's habits holds for this process."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        #: When a search was last answered as the standard says: what comes soon after it need not be a wrong setting.
        self._answered_at = -TROUBLE_S
        #: How the server is asked for UIDs that it leaves out: not at all, by tag, by keyword.
        self._form = 0
        self._missing_since: dict[Level, tuple[float, str]] = {}
        #: Resources, and the statuses by which the server says of them that it found nothing.
        self._ways: set[tuple[str, int]] = set()
        #: Levels at which the root has found an object that is there, and whether lists below a study have shown one:
        #: only then does it mean something that they find nothing.
        self._finds: set[Level] = set()
        self._lists_images_of_studies = False

    # --- one object by its UID --------------------------------------------------------------------------------

    def find(self, level: Level, uid: str, *, fields: Sequence[str] = ()) -> list[Found]:  # noqa: ARG002 - no dialect asks
        """Every object of ``level`` that bears ``uid``.

        Raises
        ------
        PacsMisanswered
            Lasting, with ``needs_study`` in its details: the server finds it only below its study.
        """
        check_uid(uid)
        return self._find_study(uid) if level == "study" else self._find_at_root(level, uid)

    def _find_study(self, uid: str) -> list[Found]:
        reply = self._ask_for("/studies", [("StudyInstanceUID", uid)], _UID_TAGS["study"])
        hits = [ds for ds in reply.rows if text(ds, STUDY_INSTANCE_UID) == uid]
        if hits:
            return [self._found("study", hits[0])]
        if reply.rows:
            return self._find_by_path(uid, reply)
        if reply.says == "unclear":
            self._check_nothing(reply)
        return []

    def _find_by_path(self, uid: str, reply: SearchReply) -> list[Found]:
        """Where the server ignores the UID in a query. That its path answers is shown by a study that is there."""
        other = text(reply.rows[0], STUDY_INSTANCE_UID)
        if not fits_path(other):
            raise self.lasting("It sent studies that were not asked for, without their UIDs")
        here = self._ask(f"/studies/{uid}/series", _ONE, optional=True)
        if here.rows and all(text(ds, STUDY_INSTANCE_UID) in ("", uid) for ds in here.rows):
            return [Found("study", uid)]
        if not here.rows and self._ask(f"/studies/{other}/series", _ONE, optional=True).rows:
            return []
        raise self.lasting(
            "It ignores StudyInstanceUID in a search and offers no /studies/…/series; it cannot be asked for one study"
        )

    def _find_at_root(self, level: Level, uid: str) -> list[Found]:
        query, tags = QUERIES[level], _UID_TAGS[level]
        since, why = self._missing_since.get(level, (0.0, ""))
        if why and time.monotonic() - since < MISSING_S:
            raise self._needs_study(level, why)
        reply = self._ask_for(query.resource, [(query.keyword, uid)], tags, optional=True)
        hits = [ds for ds in reply.rows if text(ds, query.tag) == uid]
        if hits and not SearchReply("rows", 200, hits).lacks(tags):
            self._finds.add(level)
            return list({path_of(found): found for found in (self._found(level, ds) for ds in hits)}.values())
        why = f"does not say to which study it belongs ({query.resource})" if hits else ""
        if not reply.rows:
            if not (why := self._why_it_proves_nothing(level, reply)):
                return []
            self._missing_since[level] = (time.monotonic(), why)
        raise self._needs_study(level, why or f"ignores {query.keyword} in a search of {query.resource}")

    def _why_it_proves_nothing(self, level: Level, reply: SearchReply) -> str:
        """Why the object may still be there, though the root found none; "" if it is not there."""
        query = QUERIES[level]
        if reply.says == "nothing":
            if self._finds_what_is_there(level) is not False:
                return ""
            return f"finds nothing in a search of {query.resource} that does not name the study"
        if there := self._ask_for(query.resource, _ONE, (query.tag,), optional=True).rows:
            self._check_way(reply, query.resource, query.keyword)
            if self._finds_uid(level, text(there[0], query.tag)):
                return ""
        elif self._has_no_studies():
            return ""
        return f"offers no {query.resource} at its root (status {reply.status})"

    def _finds_what_is_there(self, level: Level) -> bool | None:
        """Whether the root finds one object that is there; None if the server has no studies.

        An archive behind a gateway may search images and series only below what the query names above them (PS3.4
        C.4.1.3.1.1), and find nothing otherwise.
        """
        if level in self._finds:
            return True
        studies = [text(ds, STUDY_INSTANCE_UID) for ds in self._some_studies()]
        for study_uid in filter(fits_path, studies):
            one = next(self.instances(Found("study", study_uid), page=1), None)
            if one is not None:
                return self._finds_uid(
                    level, str(one.series_instance_uid if level == "series" else one.sop_instance_uid)
                )
        return False if studies else None

    def _finds_uid(self, level: Level, uid: str) -> bool:
        query = QUERIES[level]
        if level in self._finds or not fits_path(uid):
            return level in self._finds
        rows = self._ask_for(query.resource, [(query.keyword, uid)], (query.tag,), optional=True).rows
        if any(text(ds, query.tag) == uid for ds in rows):
            self._finds.add(level)
        return level in self._finds

    def _some_studies(self) -> list[Dataset]:
        """A few; an archive may send none to a question that names no attribute, so it is asked by date as well."""
        few = [("limit", str(FEW))]
        rows = self._ask_for("/studies", few, _UID_TAGS["study"]).rows
        return rows or self._ask_for("/studies", [*_BY_DATE, *few], _UID_TAGS["study"]).rows

    def _needs_study(self, level: Level, why: str) -> PacsMisanswered:
        sentence = (
            f"{self._name} cannot find {'an' if level == 'image' else 'a'} {level} by its UID alone: it {why}."
            " Name its study as well (--study, study_uid)."
        )
        error = self.transport.error(PacsMisanswered, sentence, details={NEEDS_STUDY: True})
        error.is_lasting = True
        return error

    def missing_at_root(self) -> str:
        """What the server cannot be asked for without a study; "" if nothing."""
        levels: tuple[Level, ...] = ("series", "image")
        missing = [level for level in levels if not self._finds_at_root(level)]
        if not missing:
            return ""
        resources = " and ".join(QUERIES[level].resource for level in missing)
        names = " and ".join("images" if level == "image" else level for level in missing)
        return (
            f"It finds {names} only below their study, because its root has no {resources} that can be searched."
            " Uploads, batches and migrations know the study; exists, metadata and delete need it (--study, study_uid)."
        )

    def _finds_at_root(self, level: Level) -> bool:
        query = QUERIES[level]
        reply = self._ask(query.resource, [(query.keyword, f"2.25.{uuid.uuid4().int}")], optional=True)
        if reply.rows:  # of others: it ignores the filter
            return False
        if reply.says == "nothing":
            return self._finds_what_is_there(level) is not False
        if self._ask(query.resource, _ONE, optional=True).rows:
            return True
        return reply.says == "unclear" and self._ask("/studies", _ONE).says == "unclear"  # it has nothing at all

    # --- nothing found ----------------------------------------------------------------------------------------

    def _has_no_studies(self) -> bool:
        reply = self._ask("/studies", _ONE)
        if reply.says == "unclear":
            self._check_nothing(reply)
        return not reply.rows and not self._some_studies()

    def _check_nothing(self, reply: SearchReply) -> None:
        """An unclear answer to a search of ``/studies`` says that nothing was found, if other searches have rows.

        Raises
        ------
        PacsMisanswered
            With ``nothing_or_wrong_url`` in its details, if no search has rows.
        """
        if self._ask("/studies", _ONE).rows:
            self._check_way(reply, "/studies", "StudyInstanceUID")
        elif reply.status != 200 or not self._knows_its_paths():
            raise self._nothing_or_wrong_url(reply.status)

    def _check_way(self, reply: SearchReply, resource: str, keyword: str) -> None:
        """It is the server's way to say so if it says the same of a UID that no object has; else it is in trouble."""
        way = (resource, reply.status)
        if way in self._ways:
            return
        unheard = self._ask(resource, [(keyword, f"2.25.{uuid.uuid4().int}")], optional=True)
        if unheard.rows or unheard.says == "nothing" or unheard.status != reply.status:
            raise self.misanswered(f"status {reply.status} to a search, which is not how it says that it found nothing")
        self._ways.add(way)

    def _knows_its_paths(self) -> bool:
        """Whether a path that no server has is refused: then an empty 200 to another path is that resource's own."""
        target = f"{self._base}/no-such-resource-{uuid.uuid4().hex[:8]}"
        answer = self.transport.exchange(Request("GET", target, DICOM_JSON_GZIP, expected=range(200, 600)))
        return 400 <= answer.status < 500

    def _nothing_or_wrong_url(self, status: int) -> PacsMisanswered:
        sentence = (
            f"{self._name} answers {status} to every search: it has no studies, or its url is wrong. If the url is"
            f" right, upload a first image there by name (--server {self._name}); otherwise correct the url."
        )
        details = {"status": status, NOTHING_OR_WRONG_URL: True}
        error = self.transport.error(PacsMisanswered, sentence, details=details)
        error.is_lasting = self._is_set_up_wrong
        return error

    @property
    def _is_set_up_wrong(self) -> bool:
        """Whether an odd answer is taken for the server's setting: it is not if it answered well just before."""
        return time.monotonic() - self._answered_at > TROUBLE_S

    def root_fault(self, *, hint: str = "", content_type: str = "") -> str:
        fault = super().root_fault(hint=hint, content_type=content_type)
        try:
            if fault:
                self._has_no_studies()
        except (PacsMisanswered, PacsRejected):
            return fault
        return ""

    # --- lists ------------------------------------------------------------------------------------------------

    def studies(self, parameters: Iterable[Parameter]) -> list[Dataset]:
        asked = list(parameters)
        reply = self._ask_for("/studies", asked, _UID_TAGS["study"])
        if reply.says == "unclear":
            self._check_nothing(reply)
        if not reply.rows and ("offset", "0") in asked and {name for name, _ in asked} <= _NO_KEYS:
            self._check_open_list()
        if reply.lacks(_UID_TAGS["study"]):
            raise self.lasting("It lists studies without their UIDs, also where it is asked to include them")
        if any(len(values(ds, STUDY_INSTANCE_UID)) > 1 for ds in reply.rows):
            raise self.misanswered("a study with several UIDs")
        return reply.rows

    def _check_open_list(self) -> None:
        """An empty list of all studies means that there are none, unless the server answers no query without a key."""
        if self._ask("/studies", [*_BY_DATE, *_ONE]).rows and not self._ask("/studies", _ONE).rows:
            raise self.lasting(
                "It has studies, and lists none where a query names no attribute; narrow the list, as by StudyDate"
            )

    def instances(self, found: Found, *, page: int, order: Sequence[Parameter] = ()) -> Iterator[Found]:  # noqa: ARG002
        """The images below ``found``, each once. Where the server does not page, what it lists is proven to be all."""
        if found.level == "image":
            yield found
            return
        seen: set[str] = set()
        cuts: list[str] = []
        for image in self._listed(found, page, cuts):
            uid = str(image.sop_instance_uid)
            if uid not in seen:
                seen.add(uid)
                yield image
        if cuts:
            yield from self._rest(found, seen)

    def _listed(self, found: Found, page: int, cuts: list[str]) -> Iterator[Found]:
        """``cuts`` gets the lists that may have ended before their end."""
        tags = (SOP_INSTANCE_UID,) if found.level == "series" else (SERIES_INSTANCE_UID, SOP_INSTANCE_UID)
        path = f"{path_of(found)}/instances"
        first = self._ask_for(path, window(page, 0), tags, optional=True)
        if first.rows and not first.lacks(tags):
            self._lists_images_of_studies |= found.level == "study"
            for ds in self._pages(path, first, tags, page, cuts):
                yield self._image(found, ds)
        elif not first.rows and not self._is_there(found):
            return
        elif found.level == "study":
            yield from self._listed_by_series(found, page, cuts)
        else:
            yield from self._described(found)

    def _listed_by_series(self, study: Found, page: int, cuts: list[str]) -> Iterator[Found]:
        path, tags = f"{path_of(study)}/series", (SERIES_INSTANCE_UID,)
        first = self._ask_for(path, window(page, 0), tags, optional=True)
        if not first.rows or first.lacks(tags):
            yield from self._described(study)
            return
        for ds in self._pages(path, first, tags, page, cuts):
            series = Found("series", study.study_instance_uid, text(ds, SERIES_INSTANCE_UID))
            yield from self._listed(self.nameable(series), page, cuts)

    def _pages(
        self, path: str, first: SearchReply, tags: Sequence[str], page: int, cuts: list[str]
    ) -> Iterator[Dataset]:
        """The rows of a list, page by page, to an empty page or one that brings nothing new."""
        seen: set[str] = set()
        offset, reply = 0, first
        while reply.rows:
            new = {text(ds, tags[-1]): ds for ds in reply.rows if text(ds, tags[-1]) not in seen}
            if not new or reply.lacks(tags):
                cuts.append(path)
                return
            seen |= new.keys()
            yield from new.values()
            offset += len(reply.rows)  # and not by the page: a server may hold its pages smaller than it was asked
            reply = self._ask_for(path, window(page, offset), tags, optional=True)
        if reply.says != "nothing":
            cuts.append(path)

    def _rest(self, found: Found, seen: set[str]) -> Iterator[Found]:
        """What a cut list has left out. A server that caps its pages and ignores the offset never lists all."""
        if found.level == "study" and self._announced_images(found) == len(seen):
            return
        described = {text(ds, SOP_INSTANCE_UID): ds for ds in self._metadata(found).rows}
        if not seen <= described.keys():
            raise self.lasting(
                f"It sends the same {len(seen)} images as every page, and nothing shows whether these are all: it tells"
                " no number of images and no metadata of all of them"
            )
        yield from (self._image(found, ds) for uid, ds in described.items() if uid not in seen)

    def _announced_images(self, study: Found) -> int | None:
        """How many images the server says that the study has."""
        uid, tag = study.study_instance_uid, NUMBER_OF_STUDY_RELATED_INSTANCES
        reply = self._ask("/studies", [("StudyInstanceUID", uid), ("includefield", tag)])
        return next((number(ds, tag) for ds in reply.rows if text(ds, STUDY_INSTANCE_UID) == uid), None)

    def _is_there(self, found: Found) -> bool:
        if found.level == "study":
            return bool(self._find_study(found.study_instance_uid))
        path, tags = f"/studies/{found.study_instance_uid}/series", (SERIES_INSTANCE_UID,)
        reply = self._ask_for(path, window(PAGE, 0), tags, optional=True)
        if reply.rows or reply.says == "nothing":
            return reply.lacks(tags) or found.series_instance_uid in {text(ds, tags[0]) for ds in reply.rows}
        return bool(self._find_study(found.study_instance_uid))

    def _described(self, found: Found) -> Iterator[Found]:
        """The images by their metadata, where no list tells their UIDs."""
        rows = self._metadata(found).rows
        if not rows:
            raise self.lasting(f"It has the {found.level}, and offers neither a list nor the metadata of its images")
        yield from (self._image(found, ds) for ds in rows)

    def _image(self, found: Found, ds: Dataset) -> Found:
        image = text(ds, SOP_INSTANCE_UID)
        series = text(ds, SERIES_INSTANCE_UID) or found.series_instance_uid
        if not image or not series or text(ds, STUDY_INSTANCE_UID) not in ("", found.study_instance_uid):
            raise self.misanswered("an image without the UIDs above it")
        return self.nameable(Found("image", found.study_instance_uid, series, image, attributes=ds))

    def present(self, study_instance_uid: str, sop_instance_uids: Collection[str], *, page: int) -> set[str]:
        """Asked below the study: for few images each by its UID, otherwise the study is listed."""
        wanted = set(sop_instance_uids)
        if len(wanted) <= FEW and (there := self._present_each(study_instance_uid, wanted)) is not None:
            return there
        study = Found("study", study_instance_uid)
        listed = {str(one.sop_instance_uid) for one in islice(self.instances(study, page=page), page * len(wanted))}
        if wanted <= listed or len(listed) < page * len(wanted):
            return wanted & listed
        there = self._present_each(study_instance_uid, wanted - listed)
        if there is None:
            there = {str(one.sop_instance_uid) for one in self.instances(study, page=page)}
        return wanted & (listed | there)

    def _present_each(self, study_instance_uid: str, sop_instance_uids: Iterable[str]) -> set[str] | None:
        """Those that are there; None where the server does not answer so that it is certain."""
        path, there = f"/studies/{study_instance_uid}/instances", set()
        for uid in sop_instance_uids:
            reply = self._ask(path, [("SOPInstanceUID", check_uid(uid))], optional=True)
            if any(text(ds, SOP_INSTANCE_UID) == uid for ds in reply.rows):
                there.add(uid)
                self._lists_images_of_studies = True
            elif reply.says != "nothing" or not self._lists_images_of_studies:
                return None
        return there

    # --- metadata ---------------------------------------------------------------------------------------------

    def metadata(self, found: Found) -> list[Dataset]:
        """By the series or the images, where a server offers none of the whole."""
        rows = self._metadata(found).rows
        if rows or found.level == "image":
            return rows
        by_series: dict[str, list[Found]] = {}
        for one in self.instances(found, page=PAGE):
            by_series.setdefault(str(one.series_instance_uid), []).append(one)
        return [ds for uid, images in by_series.items() for ds in self._metadata_below(found, uid, images)]

    def _metadata_below(self, found: Found, series_instance_uid: str, images: Sequence[Found]) -> list[Dataset]:
        series = Found("series", found.study_instance_uid, series_instance_uid)
        rows = self._metadata(series).rows if found.level == "study" else []
        return rows or [ds for one in images for ds in self._metadata(one).rows]

    def _metadata(self, found: Found) -> SearchReply:
        """Of several images, one object is no answer: which of them it describes is not said."""
        reply = self._exchange(f"{path_of(found)}/metadata", _OPTIONAL, is_long=found.level != "image")
        return SearchReply("unclear", reply.status, []) if reply.is_one and found.level != "image" else reply

    def _post(self, body: Iterable[bytes], headers: Mapping[str, str], expected: Collection[int]) -> Answer:
        """A server that takes no images will not take them later."""
        try:
            return super()._post(body, headers, expected)
        except PacsMisanswered as error:
            status = error.details.get("status")
            error.is_lasting = status in (405, 501) or (status == 404 and self._is_set_up_wrong)
            raise

    # --- one question -----------------------------------------------------------------------------------------

    def _ask_for(
        self, path: str, parameters: Sequence[Parameter], tags: Sequence[str], *, optional: bool = False
    ) -> SearchReply:
        """As `_ask`. A server that leaves UIDs out is asked to include them (PS3.18 8.3.4.3)."""
        reply = self._ask(path, [*parameters, *_included(tags, self._form)], optional=optional)
        for form in range(self._form + 1, 3):
            if not reply.lacks(tags):
                break
            try:
                again = self._ask(path, [*parameters, *_included(tags, form)], optional=optional)
            except PacsRejected:  # it takes no such parameter
                continue
            if again.rows and not again.lacks(tags):
                self._form, reply = form, again
        return reply

    def _ask(self, path: str, parameters: Iterable[Parameter], *, optional: bool = False) -> SearchReply:
        asked = list(parameters)
        query = urlencode(asked, safe=RAW, quote_via=quote)
        is_long = any(name == "offset" for name, _ in asked)
        return self._exchange(f"{path}?{query}", _OPTIONAL if optional else _SEARCH, is_long=is_long)

    def _exchange(self, target: str, expected: Collection[int], *, is_long: bool) -> SearchReply:
        """``is_long``: the answer is worth compressing."""
        headers = DICOM_JSON_GZIP if is_long else DICOM_JSON
        request = Request("GET", self._base + target, headers, expected=expected)
        try:
            answer = self.transport.exchange(request)
        except PacsMisanswered as error:
            error.is_lasting = "status" in error.details and self._is_set_up_wrong
            raise
        reply = self._read(answer)
        if reply.says in ("rows", "nothing"):
            self._answered_at = time.monotonic()
        return reply

    def _read(self, answer: Answer) -> SearchReply:
        status = answer.status
        if status == 204:
            return SearchReply("nothing", status, [])
        if status not in _SEARCH:
            return SearchReply("not_offered", status, [])
        document = self._document(answer)
        if document == []:
            return SearchReply("nothing", status, [])
        if status == 404 or document in (None, {}):
            return SearchReply("unclear", status, [])
        if is_dataset(document):
            return SearchReply("rows", status, [document], is_one=True)
        if not isinstance(document, list) or not all(isinstance(ds, dict) for ds in document):
            raise self.lasting("It sent JSON that is no list of datasets; check the server's url")
        return SearchReply("rows", status, document)

    def _document(self, answer: Answer) -> Any:
        """None where there is none; a 404 may bear any text."""
        if not answer.body.strip():
            return None
        try:
            return self.parse(answer)
        except PacsMisanswered:
            if answer.status == 404:
                return None
            raise

    def parse(self, answer: Answer) -> Any:
        """JSON, in the spelling of the standard. A web page or XML comes again whenever it is asked for."""
        try:
            document = super().parse(answer)
        except PacsMisanswered as error:
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if "xml" in kind or (kind == "text/html" and self._is_set_up_wrong):
                raise self.lasting(f"It sent {kind} and not DICOM JSON; check the server's url") from error
            raise
        if not is_odd(answer.body):
            return document
        try:
            return in_standard_spelling(document)
        except (ValueError, RecursionError) as error:
            raise self.lasting("It sent an element twice, in two spellings and with two meanings") from error


def _included(tags: Sequence[str], form: int) -> list[Parameter]:
    if form == 0:
        return []
    return [("includefield", tag if form == 1 else _KEYWORDS[tag]) for tag in tags]
