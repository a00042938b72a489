"""Studies of which an archive says that it is just deleting them, and goes on saying so.

That passes, or it is what a crash has left of a deletion, which only an administrator can clear. Oddity: "A deletion
that was cut off never ends".
"""

from __future__ import annotations

from courier.errors import CourierError, PacsUnavailable
from courier.ledger.jobs import Ledger

#: After this it is taken for what a crash has left.
DELETING_S = 300.0
#: Until then the archive is asked again so often, after the first attempts, for most deletions take seconds.
ASK_AGAIN_S = 30.0
SOON_AGAIN = 3


def is_deleting(error: CourierError) -> bool:
    return isinstance(error, PacsUnavailable) and bool(error.details.get("study_deleting"))


def is_given_up(error: CourierError, *, job_id: str, ledger: Ledger, last: bool = False) -> bool:
    """Whether a job that met ``error`` waits no longer for the end of a deletion; the error then says who has to act.

    ``last``: it was the job's last attempt.
    """
    if not is_deleting(error):
        return False
    server, study_uid = str(error.server_name), str(error.details.get("study_uid", ""))
    lasts_s = ledger.deleting_for_s(job_id, server, study_uid)
    if lasts_s < DELETING_S and not last:
        return False
    ledger.forget_deleting(job_id)
    told = f" It has said so for {lasts_s / 60:.0f} minutes." if lasts_s >= DELETING_S else ""
    error.payload["message"] += (
        f"{told} If a crash of the archive has cut that deletion off, it never ends: an administrator of the archive"
        " has to clear the study there; then do this again."
    )
    return True
