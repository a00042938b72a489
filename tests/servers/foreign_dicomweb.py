"""A DICOMweb server of no known product: a real HTTP server on loopback, whose habits a test chooses and combines.

It stores what it is sent, and answers searches, metadata, retrievals and deletions. `Habits` says what it lacks,
ignores or says in its own way; the presets stand for servers that exist.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import pydicom
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from tests.servers.loopback import LoopbackHandler, serving

BASE = "/dicomweb"
STUDY, SERIES, IMAGE = "0020000D", "0020000E", "00080018"
UID_TAGS = (STUDY, SERIES, IMAGE)
LEVELS = ("studies", "series", "instances")
SHOWN = ("00080020", "00100010", "00100020")
Uids = tuple[str, str, str]


@dataclass(frozen=True)
class Habits:
    """``lacks``: resources that it does not offer, as ``/series``, ``/studies/*/instances``, ``/studies/*/metadata``.

    ``nothing`` is its answer to a search without matches, ``missing`` its status for what it does not offer.
    ``parents``: searches of series and images find nothing unless all, or at least the study, above is named.
    ``needs_key``: a search of studies that names no attribute finds nothing.
    ``only_named``: a row holds what the query names, by filter or by includefield. ``includes``: how includefield may
    name an attribute. ``cap``: the most rows of one answer, whatever is asked for.
    ``loses``: it says that it has stored what it has not.
    """

    lacks: frozenset[str] = frozenset()
    missing: int = 404
    nothing: str = "204"
    parents: Literal["none", "study", "all"] = "none"
    needs_key: bool = False
    only_named: bool = False
    includes: frozenset[str] = frozenset(("tag", "keyword"))
    refuses_includefield: bool = False
    ignores_filters: bool = False
    ignores_offset: bool = False
    ignores_limit: bool = False
    cap: int | None = None
    counts: bool = True
    one_as_object: bool = False
    twice: bool = False
    spelling: str = "standard"
    deletes: int = 204
    loses: bool = False
    web_page: bool = False


ROOTS = frozenset(("/series", "/instances"))
#: dicomweb-pacs: nothing at the root but /studies, and images only below a series.
DICOMWEB_PACS = Habits(lacks=ROOTS | {"/studies/*/instances"})
#: DICOM-RST, a gateway to DIMSE: only what a query names comes back.
DICOM_RST = Habits(only_named=True, counts=False)
#: static-wado, a folder of files behind a web server: queries mean nothing, what is missing is a 404.
STATIC_WADO = Habits(
    lacks=ROOTS | {"/studies/*/instances", "/studies/*/metadata"},
    nothing="404",
    ignores_filters=True,
    ignores_offset=True,
    ignores_limit=True,
    includes=frozenset(),
    deletes=404,
)
#: Google's Healthcare API has all resources, and pages of its own size.
GOOGLE = Habits(cap=2, counts=False)
#: An HTTP API that answers for unknown resources as for wrong credentials, as AWS's gateways do.
HIERARCHICAL = Habits(lacks=ROOTS, missing=403, only_named=True, includes=frozenset(("keyword",)), spelling="lower")
#: A gateway to an archive that searches by the hierarchical rules of C-FIND alone (PS3.4 C.4.1.3.1.1) and finds nothing
#: otherwise: images only where their study and their series are named.
BY_LEVELS = Habits(parents="all", counts=False)


@dataclass
class Foreign:
    """The server: what it has, by study, series and image UID, and what it was asked."""

    habits: Habits = field(default_factory=Habits)
    stored: dict[Uids, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    #: Answers of the next questions, instead of those that are right: (status, body, content type).
    instead: list[tuple[int, bytes, str]] = field(default_factory=list)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, **habits: Any) -> None:
        self.habits = replace(self.habits, **habits)

    def put(self, content: bytes) -> Uids:
        ds = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        uids = (str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID))
        self.stored[uids] = content
        return uids

    @property
    def images(self) -> set[str]:
        return {image for _, _, image in self.stored}

    def answer(self, method: str, target: str, body: bytes, content_type: str) -> tuple[int, bytes, str]:
        with self.lock:
            self.asked.append(f"{method} {target.removeprefix(BASE)}")
            if self.instead and method == "GET":
                return self.instead.pop(0)
            split = urlsplit(target)
            if not split.path.startswith(f"{BASE}/"):
                return 404, b"no such page", "text/plain"
            parts = split.path.removeprefix(BASE).strip("/").split("/")
            if method == "POST":
                return self._store(body, content_type)
            if method == "DELETE":
                return self._delete(parts)
            return self._get(parts, parse_qsl(split.query))

    # --- storing and deleting ---------------------------------------------------------------------------------

    def _store(self, body: bytes, content_type: str) -> tuple[int, bytes, str]:
        found = re.search(r'boundary="?([^";]+)"?', content_type)
        assert found is not None
        referenced = []
        for part in body.split(b"--" + found[1].encode())[1:-1]:
            content = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            uids = self.put(content)
            if self.habits.loses:
                del self.stored[uids]
            ds = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            referenced.append({"00081150": _element("UI", str(ds.SOPClassUID)), "00081155": _element("UI", uids[2])})
        return self._json(200, {"00081199": {"vr": "SQ", "Value": referenced}})

    def _delete(self, parts: list[str]) -> tuple[int, bytes, str]:
        if self.habits.deletes != 204:
            return self.habits.deletes, b"", "text/plain"
        wanted = self._below(parts)
        for uids in wanted:
            del self.stored[uids]
        return (204 if wanted else 404), b"", "text/plain"

    def _below(self, parts: list[str]) -> list[Uids]:
        named = dict(zip(parts[0::2], parts[1::2], strict=False))
        return [
            uids
            for uids in self.stored
            if all(named.get(level, uid) == uid for level, uid in zip(LEVELS, uids, strict=True))
        ]

    # --- questions --------------------------------------------------------------------------------------------

    def _get(self, parts: list[str], query: list[tuple[str, str]]) -> tuple[int, bytes, str]:
        pattern = "/" + "/".join(part if place % 2 == 0 else "*" for place, part in enumerate(parts))
        if pattern in self.habits.lacks or parts[0] not in LEVELS:
            return self.habits.missing, b"", "text/plain"
        if self.habits.web_page:
            return 200, b"<html>Welcome</html>", "text/html; charset=utf-8"
        below = self._below(parts)
        if parts[-1] == "metadata":
            return (
                self._json(200, [_dataset(self.stored[uids]) for uids in below]) if below else (404, b"", "text/plain")
            )
        if parts[-1] in LEVELS:
            return self._search(parts, below, query)
        return self._retrieve(below)

    def _search(self, parts: list[str], below: list[Uids], query: list[tuple[str, str]]) -> tuple[int, bytes, str]:
        habits, asked, level = self.habits, dict(query), LEVELS.index(parts[-1])
        filters = {_tag(key): value for key, value in query if _tag(key) in (*UID_TAGS, *SHOWN)}
        if self._lacks_keys(level, parts, filters):
            return self._nothing()
        if not habits.ignores_filters:
            below = [uids for uids in below if self._matches(uids, filters)]
        named = {*filters, *self._included(query)}
        if habits.refuses_includefield and "includefield" in asked:
            return 400, b"unknown parameter", "text/plain"
        rows = [self._row(level, uids, named) for uids in {uids[: level + 1]: uids for uids in below}.values()]
        offset = 0 if habits.ignores_offset else int(asked.get("offset", 0))
        limit = len(rows) if habits.ignores_limit else int(asked.get("limit", 100))
        page = rows[offset:][: min(limit, habits.cap or limit)]
        if not page:
            return self._nothing()
        page = [row for row in page for _ in range(1 + habits.twice)]
        return self._json(200, page[0] if habits.one_as_object and len(page) == 1 else page)

    def _lacks_keys(self, level: int, parts: list[str], filters: dict[str, str]) -> bool:
        if level == 0:
            return self.habits.needs_key and not filters
        above = {"none": 0, "study": 1, "all": level}[self.habits.parents]
        return not all(LEVELS[i] in parts[:-1] or UID_TAGS[i] in filters for i in range(above))

    def _matches(self, uids: Uids, filters: dict[str, str]) -> bool:
        ds = pydicom.dcmread(io.BytesIO(self.stored[uids]), stop_before_pixels=True)
        told = {tag: str(ds.get(keyword_for_tag(tag), "")) for tag in filters}
        return all(value.strip("*") in ("", told[tag]) or value == "19000101-" for tag, value in filters.items())

    def _included(self, query: list[tuple[str, str]]) -> set[str]:
        names = [name for key, value in query if key == "includefield" for name in value.split(",")]
        known = {name: "tag" if re.fullmatch("[0-9A-Fa-f]{8}", name) else "keyword" for name in names}
        return {_tag(name) for name, form in known.items() if form in self.habits.includes}

    def _row(self, level: int, uids: Uids, named: set[str]) -> dict[str, Any]:
        ds = pydicom.dcmread(io.BytesIO(self.stored[uids]), stop_before_pixels=True)
        own = dict(zip(UID_TAGS[: level + 1], uids, strict=False))
        row = {tag: _element("UI", uid) for tag, uid in own.items()}
        for tag in SHOWN:
            value = str(ds.get(keyword_for_tag(tag), ""))
            vr = dictionary_VR(tag)
            row[tag] = _element(vr, {"Alphabetic": value} if vr == "PN" else value)
        if self.habits.counts and level == 0:
            row["00201208"] = _element("IS", sum(one[0] == uids[0] for one in self.stored))
        return {tag: element for tag, element in row.items() if tag in named} if self.habits.only_named else row

    def _nothing(self) -> tuple[int, bytes, str]:
        return {
            "204": (204, b"", ""),
            "[]": (200, b"[]", "application/dicom+json"),
            "404": (404, b"not found", "text/plain"),
            "404 []": (404, b"[]", "application/dicom+json"),
            "empty": (200, b"", "application/dicom+json"),
            "null": (200, b"null", "application/dicom+json"),
            "{}": (200, b"{}", "application/dicom+json"),
        }[self.habits.nothing]

    def _retrieve(self, below: list[Uids]) -> tuple[int, bytes, str]:
        if not below:
            return 404, b"", "text/plain"
        parts = [b"--b\r\nContent-Type: application/dicom\r\n\r\n" + self.stored[uids] + b"\r\n" for uids in below]
        return 200, b"".join(parts) + b"--b--\r\n", 'multipart/related; type="application/dicom"; boundary=b'

    def _json(self, status: int, document: Any) -> tuple[int, bytes, str]:
        spelled = {"standard": lambda it: it, "lower": _lower, "keywords": _keywords}[self.habits.spelling](document)
        return status, json.dumps(spelled).encode(), "application/dicom+json"


def _element(vr: str, value: Any) -> dict[str, Any]:
    return {"vr": vr, "Value": [value]}


def _tag(name: str) -> str:
    tag = tag_for_keyword(name)
    return name.upper() if tag is None else f"{tag:08X}"


def _dataset(content: bytes) -> dict[str, Any]:
    ds = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
    found: dict[str, Any] = ds.to_json_dict()
    return found


def _lower(document: Any) -> Any:
    """Tags and the names within elements in lower case, and a single value outside a list."""
    if isinstance(document, list):
        return [_lower(one) for one in document]
    if not isinstance(document, dict):
        return document
    lowered = {key.lower(): _lower(value) for key, value in document.items()}
    value = lowered.get("value")
    return lowered | ({"value": value[0]} if isinstance(value, list) and len(value) == 1 else {})


def _keywords(document: Any) -> Any:
    if isinstance(document, list):
        return [_keywords(one) for one in document]
    if not isinstance(document, dict):
        return document
    is_tag = re.compile("[0-9A-F]{8}").fullmatch
    named = {key: keyword_for_tag(key) if is_tag(key) else key for key in document}
    return {named[key] or key: _keywords(value) for key, value in document.items()}


@contextmanager
def foreign(habits: Habits | None = None) -> Iterator[Foreign]:
    """One that listens on loopback."""
    site = Foreign(habits or Habits())

    class ForeignHandler(LoopbackHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            status, content, kind = site.answer(self.command, self.path, body, self.headers.get("Content-Type", ""))
            self.answer(status, content, kind)

        do_GET = do_POST = do_DELETE = _answer

    with serving(ForeignHandler) as url:
        site.url = f"{url}{BASE}"
        yield site
