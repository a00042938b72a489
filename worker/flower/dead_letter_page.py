"""The page Dead letters: jobs that a person has to look at; to replay or purge them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Final

from tornado.web import HTTPError, authenticated

from courier.ledger.jobs import DeadLetter, Ledger
from courier.messages import MAY_DELETE
from courier.redaction import printable
from worker.app import OVERDUE_S, replay
from worker.flower.figures import amount, moment
from worker.flower.ledger_page import LedgerPage
from worker.flower.ledger_reader import LedgerAway

#: So many letters are shown, the latest first; reasons are counted among so many.
SHOWN: Final = 50
_LOOKED_THROUGH: Final = 500


@dataclass(frozen=True)
class LetterRow:
    """A dead letter as the page shows it. ``may_delete``: replayed, it may delete something."""

    job_id: str
    task: str
    about: str
    server: str
    code: str
    message: str
    attempts: int
    crashes: int
    replays: int
    died: str
    may_delete: bool


class DeadLetterPage(LedgerPage):
    tab, template, heading = "dead_letters", "courier_dead_letters.html", "Dead letters"
    description = "Jobs that only a person can help: change what the reason says, then replay the job, or purge it."
    notices: ClassVar[Mapping[str, str]] = {
        "replayed": "Job {id} is queued again under its id.",
        "purged": "The dead letter {id} is purged; its history stays.",
        "gone": "Job {id} is no dead letter any more.",
    }
    actions: ClassVar[Mapping[str, tuple[Callable[[Ledger, str], bool], str]]] = {
        "replay": (replay, "replayed"),
        "purge": (Ledger.purge, "purged"),
    }

    def question(self) -> Callable[[Ledger], Mapping[str, Any]]:
        code = self.get_query_argument("code", "")
        return lambda ledger: look_at_dead_letters(ledger, code)

    @authenticated
    async def post(self) -> None:
        """Replay or purge the letter that the form names."""
        job_id, action = self.form("job_id"), self.form("action")
        if action not in self.actions:
            raise HTTPError(400, "A dead letter can be replayed or purged.")
        act, word = self.actions[action]
        try:
            worked = await self.ask(lambda ledger: act(ledger, job_id))
        except LedgerAway as away:
            self.say_away(away)
        else:
            self.done(action, job_id, word if worked else "gone")


def look_at_dead_letters(ledger: Ledger, code: str) -> dict[str, Any]:
    """The values of the page, as the ledger has them now; of one reason, unless ``code`` is ""."""
    latest = list(islice(ledger.dead_letters(), _LOOKED_THROUGH))
    reasons = Counter(letter.code for letter in latest)
    letters = list(islice(ledger.dead_letters(code=code), SHOWN + 1)) if code else latest
    return {
        "letters": [letter_row(letter) for letter in letters[:SHOWN]],
        "shown": SHOWN if len(letters) > SHOWN else 0,
        "total": amount(ledger.load(overdue_s=OVERDUE_S).dead),
        "reasons": [(name, amount(count)) for name, count in reasons.most_common()],
        "code": code,
    }


def letter_row(letter: DeadLetter) -> LetterRow:
    return LetterRow(
        job_id=letter.job_id,
        task=letter.task,
        about=letter.about,
        server=str(letter.error.get("server_name") or ""),
        code=letter.code,
        message=printable(letter.message),
        attempts=letter.attempts,
        crashes=letter.crash_count,
        replays=letter.replays,
        died=moment(letter.died_ms),
        may_delete=letter.task in MAY_DELETE,
    )
