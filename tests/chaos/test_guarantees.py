"""docs/guarantees.md is what was measured, within its frame."""

from __future__ import annotations

import pytest

from tests.chaos.measured import DOCUMENT, FRAME, Book, document
from tests.chaos.points import POINTS
from tests.chaos.test_kills import FAULTS


def test_rows_become_a_grid_where_every_fault_met_every_point_and_a_list_elsewhere():
    book = Book()
    for fault in ("killed", "stopped"):
        for number, point in enumerate(("early", "middle", "late")):
            book.row(area="workers", fault=fault, point=point, outcome="stored", recovery_s=number)
    book.row(area="workers", fault="killed", point="late", outcome="stored", recovery_s=4.04)
    book.row(area="servers", fault="slow", outcome="refused")
    frame = "# Title\n<!-- facts -->\n<!-- table: workers -->\n<!-- table: all others -->\n"
    assert document(book.rows, {"seed": "7"}, frame) == (
        "# Title\n| | |\n|---|---|\n| seed | 7 |\n"
        "|  | killed | stopped |\n|---|---|---|\n"
        "| early | stored 0 | stored 0 |\n| middle | stored 1 | stored 1 |\n| late | stored 2 to 4 | stored 2 |\n"
        "## servers\n\n| what happens | when | what comes of it | seconds |\n|---|---|---|---|\n"
        "| slow |  | refused |  |\n"
    )


@pytest.fixture
def page(full):
    if full:
        pytest.skip("this run writes the page anew")
    return DOCUMENT.read_text(encoding="utf-8")


def test_the_page_names_every_point_and_every_way_in_which_a_worker_ends(page):
    assert [name for name in (*POINTS, *(fault.name for fault in FAULTS)) if name not in page] == []


def test_the_page_stands_in_its_frame(page):
    sentences = [line for line in FRAME.read_text(encoding="utf-8").splitlines() if line and "<!--" not in line]
    assert [line for line in sentences if line not in page] == [], "run `make chaos`, or undo what was changed by hand"
