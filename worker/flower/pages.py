"""Our pages in Flower, and their addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tornado.web import StaticFileHandler

from worker.flower.batch_page import BatchPage, BatchReport
from worker.flower.dead_letter_page import DeadLetterPage
from worker.flower.job_page import CancelJob, JobPage
from worker.flower.server_page import ServerPage
from worker.runtime.flower_internals import extend, route, templates

_FOLDER: Final = Path(__file__).parent


def add() -> None:
    """Add the pages to this process's Flower, before it starts. A second call changes nothing."""
    extend(
        [
            route(r"/pacs", ServerPage, name="pacs"),
            route(r"/batches", BatchPage, name="batches"),
            route(r"/batches/report", BatchReport, name="batch_report"),
            route(r"/dead-letters", DeadLetterPage, name="dead_letters"),
            route(r"/courier/(.*)", StaticFileHandler, name="courier_static", path=str(_FOLDER / "static")),
        ],
        {r"/task/(.+)": JobPage, r"/api/task/revoke/(.+)": CancelJob},
        templates(_FOLDER / "templates"),
    )
