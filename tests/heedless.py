"""A foreign DICOMweb server that heeds little: filters, offsets and fields may mean nothing to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.servers.loopback import LoopbackHandler, serving

STUDY_INSTANCE_UID = "0020000D"


def row(uid: str, **elements: tuple[str, Any]) -> dict[str, Any]:
    """A study as QIDO tells it: ``t00100020=("LO", "7")``."""
    told = {name[1:]: {"vr": vr, "Value": [value]} for name, (vr, value) in elements.items()}
    return {STUDY_INSTANCE_UID: {"vr": "UI", "Value": [uid]}, **told}


def uid_of(ds: dict[str, Any]) -> str:
    return str(ds[STUDY_INSTANCE_UID]["Value"][0])


@dataclass
class Heedless:
    """What the server has, what it heeds, and what it was asked."""

    studies: list[dict[str, Any]] = field(default_factory=list)
    heeds_offset: bool = True
    heeds_limit: bool = True
    #: Its largest page, for all that it is asked for.
    fixed_page: int | None = None
    #: Lists that it sends instead of its own, one question after the other.
    in_turn: list[list[dict[str, Any]]] = field(default_factory=list)
    #: Whether each study has an image that is listed.
    lists_images: bool = False
    #: From this page of studies on it is in trouble.
    fails_at_offset: int | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def uids(self) -> list[str]:
        return [uid_of(ds) for ds in self.studies]

    def answer(self, method: str, target: str) -> tuple[int, Any]:
        with self.lock:
            return self._answer(method, target)

    def _answer(self, method: str, target: str) -> tuple[int, Any]:
        self.asked.append(f"{method} {target}")
        split = urlsplit(target)
        uid, query = split.path.rpartition("/studies")[2].strip("/"), dict(parse_qsl(split.query))
        if method == "DELETE":
            before, self.studies = len(self.studies), [ds for ds in self.studies if uid_of(ds) != uid]
            return (204 if len(self.studies) < before else 404), None
        if uid:  # the images of a study
            if not self.lists_images or not uid.endswith("/instances") or int(query.get("offset", 0)):
                return 204, None
            study = uid.removesuffix("/instances")
            parents = {"0020000E": {"vr": "UI", "Value": [f"{study}.1"]}}
            return 200, [{**row(study), **parents, "00080018": {"vr": "UI", "Value": [f"{study}.1.1"]}}]
        offset = int(query.get("offset", 0))
        if self.fails_at_offset is not None and offset >= self.fails_at_offset:
            return 503, None
        studies = self.studies
        if self.in_turn:
            self.in_turn.append(self.in_turn.pop(0))
            studies = self.in_turn[-1]
        found = studies[offset:] if self.heeds_offset else studies
        found = [ds for ds in found if query.get("StudyInstanceUID", uid_of(ds)) == uid_of(ds)]
        page = found[: int(query.get("limit", 1000))] if self.heeds_limit else found
        page = page[: self.fixed_page]
        return (200, page) if page else (204, None)


@contextmanager
def heedless(**habits: Any) -> Iterator[Heedless]:
    """One that listens on loopback; it matches UIDs of studies, and nothing else."""
    site = Heedless(**habits)

    class HeedlessHandler(LoopbackHandler):
        def _answer(self) -> None:
            status, document = site.answer(self.command, self.path)
            body = b"" if document is None else json.dumps(document).encode()
            self.answer(status, body, "application/dicom+json")

        do_GET = do_DELETE = _answer

    with serving(HeedlessHandler) as url:
        site.url = f"{url}/dicomweb"
        yield site
