"""What became of each sample, whether that was expected, and the table that says so.

Nothing here starts, uploads or waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from courier.errors import CourierError
from producer.terminal import Column, ListingTable, linked, plain
from sandbox.samples import STORED, Sample


@dataclass
class Upload:
    """One sample on its way. ``stage`` is where it is; ``ending`` is empty until it is over."""

    sample: Sample
    job_id: str = ""
    stage: str = "waiting"
    ending: str = ""
    server_name: str | None = None
    message: str = ""
    payload: Mapping[str, Any] | None = None

    @property
    def over(self) -> bool:
        return bool(self.ending)

    def stored(self, payload: Mapping[str, Any]) -> None:
        self.payload = payload
        self.ending = str(payload["status"])
        self.server_name = payload["server_name"]

    def refused(self, error: CourierError) -> None:
        self.ending = error.payload["code"]
        self.server_name = error.server_name
        self.message = error.message

    @property
    def viewer_url(self) -> str:
        return str(self.payload["viewer_url"]) if self.payload else ""

    @property
    def surprise(self) -> str:
        """What differs from the sample's expectation; empty when it ended as it should."""
        expected = self.sample
        if self.ending != expected.ending:
            return f"expected {expected.ending}"
        if self.server_name != expected.server:
            return f"expected server {expected.server}"
        if self.payload and self.payload["route"]["reason"] not in expected.reasons:
            return f"expected {' or '.join(expected.reasons)}"
        if self.payload and not self.viewer_url:
            return "expected a viewer link"
        return ""


def viewer_links(uploads: Sequence[Upload]) -> dict[str, int]:
    """Each viewer link once, numbered as in the table."""
    links: dict[str, int] = {}
    for upload in uploads:
        if upload.viewer_url:
            links.setdefault(upload.viewer_url, len(links) + 1)
    return links


def surprises(uploads: Sequence[Upload]) -> int:
    """How many samples did not end as expected."""
    return sum(bool(upload.surprise) for upload in uploads)


def summary(uploads: Sequence[Upload]) -> str:
    """The table in one sentence."""
    expected = [upload for upload in uploads if not upload.surprise]
    stored = sum(upload.ending == STORED for upload in expected)
    said = f"{stored} images stored, {len(expected) - stored} refused as they should be"
    return said + (f", {surprises(uploads)} ended otherwise." if surprises(uploads) else ".")


def progress(uploads: Sequence[Upload]) -> Table:
    """How far each sample is, drawn again and again: a line each, on 80 columns too."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    for heading in ("file", "server", "ms", "ending"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "ms" else "left")
    for upload in uploads:
        ending = _ending(upload) if upload.over else Spinner("dots", plain(upload.stage, "cyan"))
        table.add_row(upload.sample.file, upload.server_name or "", _ms(upload), ending)
    return table


def as_table(uploads: Sequence[Upload]) -> ListingTable:
    """What became of each sample, its study's whole UID and the number of its viewer link."""
    links = viewer_links(uploads)
    words = (Column(heading) for heading in ("server", "route", "viewer"))
    table = ListingTable("file", Column("study", "id"), *words, Column("ms", right=True), Column("ending", "text"))
    for upload in uploads:
        payload = upload.payload
        study = payload["study_uid"] if payload else ""
        route = payload["route"]["reason"] if payload else "–"
        link = linked(f"[{links[upload.viewer_url]}]", upload.viewer_url) if upload.viewer_url else plain("–")
        cells = (upload.sample.file, study, upload.server_name or "–", route, link, _ms(upload))
        table.add_row(*cells, _ending(upload))
    return table


def _ms(upload: Upload) -> str:
    return f"{sum(upload.payload['timings_ms'].values()):.0f}" if upload.payload else ""


def _ending(upload: Upload) -> Text:
    if upload.surprise:
        said = f"{upload.ending}: {upload.message}" if upload.message else upload.ending
        return plain(f"✗ {said} ({upload.surprise})", "bold red")
    if upload.ending != STORED:
        return plain(f"✓ {upload.ending}", "yellow")
    warnings = len(upload.payload["warnings"]) if upload.payload else 0
    noted = f", {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
    return plain(f"✓ stored{noted}", "green")
