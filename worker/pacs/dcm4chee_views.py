"""From which application entity of a DCM4CHEE images are read; which there are, the configured one alone says.

Oddity: "Corrections are laid over what was stored".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from courier.errors import (
    InvalidUid,
    MissingUid,
    NotDicom,
    NotFound,
    PacsMisanswered,
    PacsUnauthorized,
    waits_for_server,
)
from courier.results import Dataset
from worker.dicom.fingerprints import Rewrites
from worker.dicom.instances import Reading
from worker.pacs.dcm4chee_hidden import AS_RECEIVED
from worker.pacs.dicomjson import SOP_INSTANCE_UID, text
from worker.pacs.dicomweb import DicomWeb
from worker.pacs.protocol import Found, Retrieved, View
from worker.pacs.transport import Transport

_PAGE = 1000
_ORDER = (("orderby", "SOPInstanceUID"),)
#: Within so many bytes an image has to say which one it is.
_MAX_HEAD_BYTES = 8 * 1_048_576
_PATIENT_ID = 0x00100020


class Dcm4cheeViews:
    """Reads images. ``archive_path`` is the path above the application entities; ``rewrites`` is what it adds."""

    def __init__(self, transport: Transport, archive_path: str, rewrites: Rewrites) -> None:
        self._transport = transport
        self._web = DicomWeb(transport)
        self._archive = archive_path
        self._rewrites = rewrites
        self._own_title = transport.base_path.partition("/aets/")[2].partition("/")[0]

    @contextmanager
    def retrieve(self, found: Found, view: View) -> Iterator[Iterator[Retrieved]]:
        """What the configured application entity lists below ``found``, from the one that ``view`` stands for."""
        title = self._title(view)
        listed = self._listed(found) if title else []
        if title is None or (view == "to_return" and not self._is_the_same_there(title, listed)):
            with self._web.retrieve(found) as parts:
                yield parts
            return
        with ExitStack() as stack:
            yield _only(self._opened(found, title, stack), {str(one.sop_instance_uid) for one in listed})

    def _title(self, view: View) -> str | None:
        """The other application entity that may be read from; None if there is none."""
        wanted = None if view == "as_shown" else self._transport.server.retrieve_aet
        if view == "to_return":
            wanted = wanted or AS_RECEIVED
        return None if not self._own_title or wanted == self._own_title else wanted

    def _listed(self, found: Found) -> list[Found]:
        uid = found.sop_instance_uid
        if uid is None:
            listed = list(self._web.instances(found, page=_PAGE, order=_ORDER))
        else:
            listed = [one for one in self._web.find("image", uid) if _is_below(one, found)]
        if not listed:
            sentence = f"{self._transport.server.name} no longer has what was to be retrieved."
            raise self._transport.error(NotFound, sentence)
        return listed

    def _opened(self, found: Found, title: str, stack: ExitStack) -> Iterator[Retrieved]:
        try:
            return stack.enter_context(self._at(title).retrieve(found))
        except NotFound as error:
            sentence = (
                f"{self._transport.server.name} lists images that its application entity {title} does not give: they "
                "went meanwhile, or the setting retrieve_aet is wrong."
            )
            raise self._transport.error(PacsMisanswered, sentence) from error

    def _at(self, title: str) -> DicomWeb:
        return DicomWeb(self._transport, base_path=f"{self._archive}/aets/{title}/rs")

    def _is_the_same_there(self, title: str, listed: Sequence[Found]) -> bool:
        """Whether the other entity gives each image as the configured one does, but for what the archive adds itself.

        Where it does not, what was corrected since it was stored would be lost with a copy of it. So it is too where
        there is no such entity, or none for this account.
        """
        uids_of: dict[str, set[str]] = {}
        for one in listed:
            uids_of.setdefault(str(one.series_instance_uid), set()).add(str(one.sop_instance_uid))
        there, study_uid = self._at(title), listed[0].study_instance_uid
        try:
            return all(
                self._is_same_series(there, Found("series", study_uid, series), uids)
                for series, uids in uids_of.items()
            )
        except (PacsUnauthorized, PacsMisanswered) as error:
            if waits_for_server(error):
                raise
            return False

    def _is_same_series(self, there: DicomWeb, series: Found, uids: Collection[str]) -> bool:
        shown = {text(one, SOP_INSTANCE_UID): one for one in self._web.metadata(series)}
        received = {text(one, SOP_INSTANCE_UID): one for one in there.metadata(series)}
        return all(
            uid in shown and uid in received and _is_same(shown[uid], received[uid], self._rewrites) for uid in uids
        )


def _is_below(image: Found, asked: Found) -> bool:
    return image.study_instance_uid == asked.study_instance_uid and asked.series_instance_uid in (
        None,
        image.series_instance_uid,
    )


def _only(parts: Iterator[Retrieved], uids: Collection[str]) -> Iterator[Retrieved]:
    """The images ``uids``; what does not say which image it is, is none of them."""
    for part in parts:
        uid, head = _identified(part.chunks)
        if uid in uids:
            yield replace(part, chunks=chain(head, part.chunks))


def _identified(chunks: Iterator[bytes]) -> tuple[str | None, list[bytes]]:
    """The UID of an image, and the bytes that it took to know it."""
    reading, head, size_bytes = Reading(), list[bytes](), 0
    try:
        for chunk in chunks:
            head.append(chunk)
            size_bytes += len(chunk)
            reading.feed(chunk)
            if reading.instance is not None:
                return reading.instance.sop_instance_uid, head
            if size_bytes > _MAX_HEAD_BYTES:
                return None, head
        reading.end()
    except (NotDicom, MissingUid, InvalidUid):
        return None, head
    return (None if reading.instance is None else reading.instance.sop_instance_uid), head


def _is_same(shown: Dataset, received: Dataset, rewrites: Rewrites) -> bool:
    return all(
        _is_same_element(int(tag, 16), _comparable(shown.get(tag)), _comparable(received.get(tag)), rewrites)
        for tag in shown.keys() | received.keys()
    )


def _is_same_element(tag: int, shown: Any, received: Any, rewrites: Rewrites) -> bool:
    """A PatientID that the archive made up is not the same as none: it would make up another."""
    if shown == received:
        return True
    if shown is None:
        return tag in rewrites.dropped
    if tag not in rewrites.added or tag == _PATIENT_ID:
        return False
    if received is None or received.keys() == {"vr"}:
        return True
    given = received.get("Value")
    return bool(given) and shown.get("Value", [])[: len(given)] == given


def _comparable(element: Any) -> Any:
    """An element of DICOM JSON, without the addresses of its bulk data, which name the application entity."""
    if isinstance(element, list):
        return [_comparable(one) for one in element]
    if isinstance(element, dict):
        return {key: key == "BulkDataURI" or _comparable(one) for key, one in element.items()}
    return element
