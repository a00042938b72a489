"""What the pages of servers, batches and dead letters share: how they ask the ledger, and who may act on them."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import urlencode

from tornado.web import HTTPError, authenticated

from courier.errors import InvalidRequest
from courier.ledger.jobs import Ledger
from courier.redaction import shown_id
from worker.flower.ledger_reader import LedgerAway, LedgerReader
from worker.runtime.flower_internals import Page

log = logging.getLogger(__name__)

#: The longest id that a form may send.
_ID_LENGTH: Final = 255
_IS_READ_ONLY: Final = "This Flower is read-only (--read-only): batches, jobs and dead letters cannot be changed here."
_WITHOUT_LOGIN: Final = (
    "Without a login nothing can be changed here: start Flower with FLOWER_BASIC_AUTH=user:password, or with a provider"
    " of logins."
)

Answer = TypeVar("Answer")


class LedgerPage(Page):
    """A page that shows what the ledger says. Without the ledger it says that, with status 503."""

    reader: ClassVar[LedgerReader] = LedgerReader()
    #: The name of the page's address and tab, its template, its heading and one sentence below that.
    tab: ClassVar[str] = ""
    template: ClassVar[str] = ""
    heading: ClassVar[str] = ""
    description: ClassVar[str] = ""
    #: What the page says after a change, by a word in its address; {id} is what was changed.
    notices: ClassVar[Mapping[str, str]] = {}

    def question(self) -> Callable[[Ledger], Mapping[str, Any]]:
        """What is asked of the ledger, on a thread; it gives the values of the template."""
        raise NotImplementedError

    async def ask(self, question: Callable[[Ledger], Answer]) -> Answer:
        """The ledger's answer, `InvalidRequest` as a status 400; `LedgerAway` if there is none."""
        try:
            return await self.reader.ask(question)
        except InvalidRequest as error:
            raise HTTPError(400, error.message) from None

    @authenticated
    async def get(self) -> None:
        """The page as it stands now."""
        try:
            values = await self.ask(self.question())
        except LedgerAway as away:
            self.say_away(away)
        else:
            self.render(self.template, **self.frame, **values)

    def say_away(self, away: LedgerAway) -> None:
        """The page without the ledger."""
        self.set_status(503)
        self.render("courier_away.html", **self.frame, reason=str(away))

    @property
    def frame(self) -> dict[str, Any]:
        """The values that each of these pages has."""
        notice = self.notices.get(self.get_query_argument("said", ""), "")
        return {
            "tab": self.tab,
            "heading": self.heading,
            "description": self.description,
            "now": datetime.now(UTC).strftime("%H:%M:%S"),
            "notice": notice.format(id=self.get_query_argument("id", "")[:_ID_LENGTH]),
            "may_act": not self.refusal,
            "refusal": self.refusal,
        }

    # --- changes ----------------------------------------------------------------------------------------------------

    @property
    def refusal(self) -> str:
        """Why nothing can be changed here, in a sentence; "" if it can."""
        if self.is_read_only:
            return _IS_READ_ONLY
        return "" if self.has_login else _WITHOUT_LOGIN

    def form(self, name: str) -> str:
        """A field of the form that was sent, once it is clear that its sender may change anything.

        Raises
        ------
        HTTPError
            Nothing can be changed here (403), or the field is missing (400).
        """
        if self.refusal:
            raise HTTPError(403, self.refusal)
        value = str(self.get_body_argument(name, "", strip=False))
        if not value or len(value) > _ID_LENGTH:
            raise HTTPError(400, f"The form has no field {name}.")
        return value

    def done(self, action: str, changed: str, said: str) -> None:
        """Write a line about the change into the log, and show the page with the notice ``said``."""
        log.info("%s through Flower: %s %s, which is %s", self.who, action, shown_id(changed), said)
        self.redirect(f"{self.reverse_url(self.tab)}?{urlencode({'said': said, 'id': changed})}", status=303)

    @property
    def who(self) -> str:
        """The name by which the user has logged in."""
        if isinstance(self.current_user, str):
            return shown_id(self.current_user)
        kind, _, login = self.request.headers.get("Authorization", "").partition(" ")
        try:
            name = base64.b64decode(login).decode().partition(":")[0] if kind == "Basic" else ""
        except (binascii.Error, UnicodeDecodeError):
            name = ""
        return shown_id(name) if name else "A user"
