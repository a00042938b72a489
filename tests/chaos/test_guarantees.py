"""docs/guarantees.md is what was measured, within its frame."""

from __future__ import annotations

from tests.chaos.measured import Book, document


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
