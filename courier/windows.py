"""When a batch may work: a stretch of each day in a time zone. Decisions only; the clock is handed in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from courier.errors import InvalidRequest

_FORM = re.compile(r"(?P<opens>\d\d:\d\d)-(?P<closes>\d\d:\d\d)(?: (?P<zone>[A-Za-z0-9_+/-]{1,64}))?", re.ASCII)


@dataclass(frozen=True)
class Window:
    """From ``opens`` to before ``closes`` by the clocks of ``zone``; over midnight if it closes earlier."""

    opens: time
    closes: time
    zone: ZoneInfo

    @classmethod
    def read(cls, text: str) -> Window:
        """``20:00-06:00 Europe/Berlin``; without a time zone UTC.

        Raises
        ------
        InvalidRequest
            It is not of that form, or there is no such time or zone.
        """
        form = _FORM.fullmatch(text)
        try:
            if form is None or form["opens"] == form["closes"]:
                raise ValueError
            opens, closes = (time.fromisoformat(form[name]) for name in ("opens", "closes"))
            return cls(opens, closes, ZoneInfo(form["zone"] or "UTC"))
        except (ValueError, OSError, LookupError):
            raise InvalidRequest(
                "A window is two times of day and a time zone, as in 20:00-06:00 Europe/Berlin; UTC without a zone."
            ) from None

    def opens_in_s(self, now_s: float) -> float:
        """Seconds until it opens, from ``now_s`` since the epoch; 0 while it is open."""
        now = datetime.fromtimestamp(now_s, self.zone)
        at = now.time()
        over_midnight = self.closes < self.opens
        is_open = at >= self.opens or at < self.closes if over_midnight else self.opens <= at < self.closes
        if is_open:
            return 0.0
        day = now.date() if at < self.opens else now.date() + timedelta(days=1)
        opening = datetime.combine(day, self.opens, self.zone)  # clocks may be set forward or back before
        return max(0.0, (opening.astimezone(UTC) - now.astimezone(UTC)).total_seconds())


def check_window(text: str) -> str:
    """``text`` as it is, if it is a window."""
    Window.read(text)
    return text
