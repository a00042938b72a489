"""What jobs do without the servers that are in maintenance: those are not asked, and no answer is made up for them.

Which servers that are, as one attempt sees it, is said in ``worker/pacs/in_service.py``. The contract is in
docs/jobs.md, "Servers out of service".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from courier.errors import InvalidRequest, PacsUnavailable
from courier.ledger.elsewhere import ElsewhereStudies
from courier.ledger.jobs import Ledger
from courier.ledger.suspensions import Suspension
from worker.dicom.instances import Instance
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import in_maintenance, suspended_error
from worker.pacs.protocol import Pacs

#: Among the warnings of a result: servers in maintenance were not asked; ``not_asked`` names them.
NOT_ASKED = "not_asked"


def names_not_asked(servers: Iterable[Pacs]) -> list[str]:
    """Those of ``servers`` that are in maintenance, in their order."""
    left = in_maintenance()
    return [pacs.server.name for pacs in servers if pacs.server.name in left]


def warned(warnings: Sequence[str], not_asked: Sequence[str]) -> list[str]:
    """``warnings`` of a result, and that servers were not asked."""
    return [*warnings, NOT_ASKED] if not_asked and NOT_ASKED not in warnings else list(warnings)


def unanswered_error(sentence: str, left: Sequence[tuple[Pacs, Suspension]], **details: object) -> PacsUnavailable:
    """What a look-up ends with that found nothing on the servers that it asked: the others may have it.

    It is an answer, and leaves no dead letter: the same question may be asked again when the maintenance has ended.
    """
    first = left[0][0].server
    who = " and ".join(str(suspension) for _, suspension in left)
    error = PacsUnavailable(
        f"{sentence} Not asked: {who}. Ask again when the maintenance has ended.",
        server_name=first.name,
        server_type=first.type,
        details={**details, "not_asked": [pacs.server.name for pacs, _ in left]},
    )
    error.is_lasting, error.is_attempt, error.is_answer = True, False, True
    return error


def refuse_in_maintenance(servers: Iterable[Pacs], what: str) -> None:
    """Refuse an order that needs each of ``servers``.

    Raises
    ------
    InvalidRequest
        One is in maintenance; the sentence says who set it and until when.
    """
    left = in_maintenance()
    for pacs in servers:
        if (suspension := left.get(pacs.server.name)) is not None:
            raise InvalidRequest(
                f"Refused: {suspension}, and {what} needs that server. Order it when the maintenance has ended.",
                server_name=pacs.server.name,
                server_type=pacs.server.type,
            )


def check_not_known_there(
    instance: Instance, left: Mapping[str, Suspension], fleet: Fleet, ledger: Ledger, *, study_is_elsewhere: bool
) -> None:
    """Keep an image from being stored elsewhere that, or whose study, is known to be on a server that is not asked.

    ``left`` are the servers that were not asked for it. A receipt proves a push and not what a server has now; but it
    is reason enough not to split the study. ``study_is_elsewhere``: a server that was asked has the study, so only the
    image itself counts.

    Raises
    ------
    PacsUnavailable
        The job waits until the maintenance ends.
    """
    if not left:
        return
    receipt = ledger.receipt(instance.sop_instance_uid)
    if receipt is not None and receipt.server in left:
        name, known = receipt.server, f"job {receipt.job_id} has stored the image there"
        raise suspended_error(fleet[name].server, left[name], f", and {known}")
    pushes = () if study_is_elsewhere else ledger.uid_record(instance.study_instance_uid).pushes
    for push in pushes:
        if push.server in left and push.voided is None:
            known = f"job {push.job_id} has put images of the study there"
            raise suspended_error(fleet[push.server].server, left[push.server], f", and {known}")


def note_stored_elsewhere(study_uids: Sequence[str], not_asked: Iterable[str], ledger: Ledger) -> None:
    """Before images are pushed: the servers that were not asked may have their studies too, so an audit is to look.

    The audit is a job that waits for its server. It is written down here each time, under the same id.
    """
    elsewhere = ElsewhereStudies(ledger.client, prefix=ledger.key(""))
    for name in not_asked:
        job_id = elsewhere.note(name, study_uids)
        ledger.submit(job_id, task="pacs.audit", job={"version": 1, "maintenance": name}, due_in_s=0)
