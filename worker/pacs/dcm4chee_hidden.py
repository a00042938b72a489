"""What a DCM4CHEE has and hides: asked on its application entities that show what has been rejected.

Their names are those of the default configuration. Oddity: "What is hidden is shown elsewhere".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, waits_for_server
from courier.results import Dataset
from worker.dicom.instances import Instance
from worker.pacs.dicomjson import items, text
from worker.pacs.dicomweb import DicomWeb, path_of
from worker.pacs.protocol import Deletion, Fate, Found, Outcome
from worker.pacs.transport import Request, Transport

#: Shows everything, hidden or not.
AS_RECEIVED = "AS_RECEIVED"
#: Shows only what was rejected with 113039, as deletions of ours do.
EXPIRED = "IOCM_EXPIRED"
#: Retention expired. Oddity: "Rejecting with 113039 is the only kind that hides all".
REJECTION = "113039%5EDCM"
#: Rejected with it, an image that is stored again in its study and series is shown again.
_RESTORED = "113039^DCM"
_REVOKE = "REVOKE_REJECTION%5E99DCM4CHEE"
_REJECTION_CODE_SEQUENCE, _CODE_VALUE, _CODING_SCHEME_DESIGNATOR = "77771042", "00080100", "00080102"
_PAGE = 1000

T = TypeVar("T")


class Dcm4cheeHidden:
    """See `worker.pacs.protocol.Hiding`. ``archive_path`` is the path above the application entities.

    ``delete_study`` sends the DELETE of a study.
    """

    def __init__(
        self,
        transport: Transport,
        web: DicomWeb,
        archive_path: str,
        *,
        reject_timeout_s: float,
        delete_study: Callable[[Found], Deletion],
    ) -> None:
        self._transport, self._shown = transport, web
        self._archive = archive_path
        self._reject_timeout_s = reject_timeout_s
        self._delete_study = delete_study
        self._all = DicomWeb(transport, base_path=self._root(AS_RECEIVED))
        self._expired = DicomWeb(transport, base_path=self._root(EXPIRED))

    def find_study(self, study_instance_uid: str) -> list[Found]:
        return self._if_it_may_look(lambda: self._all.find("study", study_instance_uid)) or []

    def why_unseen(self, instance: Instance) -> Outcome | None:
        uid = instance.sop_instance_uid
        if shown := self._shown.find("image", uid):
            return _elsewhere(instance, shown)
        fields = [_REJECTION_CODE_SEQUENCE]
        hidden = self._if_it_may_look(lambda: self._all.find("image", uid, fields=fields))
        if not hidden:
            return None
        code, place = _rejected_with(hidden[0].attributes), _other_place(instance, hidden)
        if place is None and code == _RESTORED:
            return None
        where = "" if place is None else f" in another {place.kind}, {place.uid}"
        again = "again" if place is None else f"under another {place.kind}"
        sentence = (
            f"An image with this UID is there and hidden{where}: it was rejected with {code}, and what is stored"
            f" {again} stays hidden. Revoke the rejection in the archive to see it again"
        )
        details = {"hidden_by": code, **({} if place is None else place.details)}
        return Outcome(uid, Fate.REJECTED, message=sentence, details=details)

    def images(self, study_instance_uid: str) -> list[Found] | None:
        study = Found("study", study_instance_uid)
        order = (("orderby", "SOPInstanceUID"),)
        return self._if_it_may_look(lambda: list(self._expired.instances(study, page=_PAGE, order=order)))

    def revoke(self, found: Found) -> int:
        told = self._shown.parse(self._transport.exchange(self._request(found, _REVOKE)))
        count = told.get("count") if isinstance(told, dict) else None
        if not isinstance(count, int):
            raise self._shown.misanswered("no number of what it shows again")
        return count

    def delete_hidden(self, study_instance_uid: str) -> Deletion:
        return self._delete_study(Found("study", study_instance_uid))

    def complete(self, study_instance_uid: str) -> bool:
        """Complete a rejection that stopped half-way; False where there is nothing of it.

        The same rejection is sent where only its images are shown: so it reaches no other image, and shows none
        meanwhile. Oddity: "A rejection can stop half-way".
        """
        request = self._request(Found("study", study_instance_uid), REJECTION)
        return bool(self._if_it_may_look(lambda: self._transport.exchange(request).status == 200))

    def _request(self, found: Found, code: str) -> Request:
        """A rejection, or a revoke, of those images below ``found`` that deletions of ours have hidden."""
        target = f"{self._root(EXPIRED)}{path_of(found)}/reject/{code}"
        headers = {"Accept": "application/json", "Content-Length": "0"}
        return Request("POST", target, headers, read_timeout_s=self._reject_timeout_s)

    def _root(self, title: str) -> str:
        return f"{self._archive}/aets/{title}/rs"

    def _if_it_may_look(self, question: Callable[[], T]) -> T | None:
        """None where an archive has no such application entity, or none for this account."""
        try:
            return question()
        except (PacsUnauthorized, PacsMisanswered) as error:
            if not _is_out_of_sight(error):
                raise
            return None


def _is_out_of_sight(error: CourierError) -> bool:
    if isinstance(error, PacsUnauthorized):
        return not waits_for_server(error)
    return error.details.get("status") == 404


@dataclass(frozen=True)
class _OtherPlace:
    """Another study or series than that of an image, which has it."""

    kind: str
    uid: str

    @property
    def details(self) -> dict[str, str]:
        return {f"in_{self.kind}_uid": self.uid}


def _other_place(instance: Instance, there: list[Found]) -> _OtherPlace | None:
    """Where ``there`` is the image; None if it is in the study and series that it names itself."""
    if instance.study_instance_uid not in [one.study_instance_uid for one in there]:
        return _OtherPlace("study", there[0].study_instance_uid)
    if instance.series_instance_uid not in [one.series_instance_uid for one in there]:
        return _OtherPlace("series", str(there[0].series_instance_uid))
    return None


def _elsewhere(instance: Instance, shown: list[Found]) -> Outcome | None:
    place = _other_place(instance, shown)
    if place is None:
        return None
    sentence = f"The image is there already, in another {place.kind}: {place.uid}"
    return Outcome(instance.sop_instance_uid, Fate.CONFLICT, message=sentence, details=place.details)


def _rejected_with(attributes: Dataset) -> str:
    """``113001^DCM``, or "unknown"."""
    codes = [
        (text(one, _CODE_VALUE), text(one, _CODING_SCHEME_DESIGNATOR))
        for one in items(attributes, _REJECTION_CODE_SEQUENCE)
    ]
    return "^".join(codes[0]) if codes and all(codes[0]) else "unknown"
