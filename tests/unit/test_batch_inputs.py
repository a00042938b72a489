"""What people have as items of a batch is read row by row, and what is wrong with it is said with the row's number."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.errors import InvalidRequest
from producer.inputs import BadRow, InputRow, Items, image_url, is_source, rows_of_file, rows_of_words, study_uid

UIDS = ["1.2.3", "1.2.4", "1.2.5"]


@pytest.fixture
def file(tmp_path: Path):
    def write(content: str | bytes, name: str = "items.txt") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


OPEN: list[Items] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_open():
    yield
    while OPEN:
        OPEN.pop().__exit__()


def read(name: str, column: str | None = None, judge=study_uid) -> Items:
    items = Items()
    OPEN.append(items)
    items.add(rows_of_file(name, column=column), judge)
    return items


def test_a_text_file_has_an_item_a_line_with_comments_and_empty_lines_between(file) -> None:
    items = read(file("\ufeff# of Monday\n1.2.3\r\n\n  1.2.4  \n#1.2.9\n1.2.5"))
    assert (list(items), items.count, items.bad_total) == (UIDS, 3, 0)
    assert list(items) == UIDS  # as often as it is wanted


@pytest.mark.parametrize(
    "content",
    [
        "name,study\nA,1.2.3\nB,1.2.4\nC,1.2.5\n",
        "\ufeffstudy;name\r\n1.2.3;A\r\n1.2.4;B\r\n\r\n1.2.5;C\r\n",
        'name\tstudy\n"A\nB"\t1.2.3\nB\t"1.2.4"\nC\t 1.2.5 \n',
        "\n\nstudy\n1.2.3\n1.2.4\n1.2.5",
        '{"study": "1.2.3", "name": {"a": 1}}\n\n{"study": " 1.2.4"}\n{"study": "1.2.5"}\n',
    ],
)
def test_a_column_of_csv_or_a_field_of_json_lines_is_read_whatever_separates_it(file, content: str) -> None:
    items = read(file(content, "items.csv"), "study")
    assert (list(items), items.bad_total) == (UIDS, 0)


def test_standard_input_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1.2.3\n1.2.4\n1.2.5\n")))
    assert list(read("-")) == UIDS


def test_bad_rows_are_told_by_their_lines_and_quote_nothing(file) -> None:
    name = "1.2.3\nDOE^JANE\n1.2.*\n" + "9" * 65 + "\n1.2.4\n"
    items = read(file(name.encode() + b"\xff\xfe\n" + b"7" * 70_000 + b"\n1.2.5\n"))
    assert list(items) == UIDS
    assert [one.place for one in items.bad] == ["line 2", "line 3", "line 4", "line 6", "line 7"]
    assert "not UTF-8" in items.bad[3].why
    assert "longer than" in items.bad[4].why
    with pytest.raises(InvalidRequest) as caught:
        items.check(skip_bad=False)
    assert "DOE" not in caught.value.message
    assert caught.value.details["bad_total"] == 5
    assert "line 6: not UTF-8" in caught.value.message
    assert "--skip-bad" in caught.value.message
    items.check(skip_bad=True)


def test_bad_rows_of_columns_are_told_by_their_lines(file) -> None:
    items = read(file('study,name\n1.2.3,A\n,B\nx,"C\nC"\n1.2.4,D\n', "items.csv"), "study")
    assert (list(items), [one.place for one in items.bad]) == (["1.2.3", "1.2.4"], ["line 3", "line 4"])
    rows = ['{"study": "1.2.3"}', "[1]", '{"study": 7}', "{", '{"other": "1.2.3"}', "[" * 5000]
    items = read(file("\n".join(rows), "items.jsonl"), "study")
    assert (list(items), [one.place for one in items.bad]) == (["1.2.3"], [f"line {n}" for n in range(2, 7)])


def test_of_many_bad_rows_the_first_twenty_are_told_and_the_others_counted(file) -> None:
    items = read(file("x\n" * 1234))
    with pytest.raises(InvalidRequest) as caught:
        items.check(skip_bad=False)
    assert caught.value.message.count("\n  line") == 20
    assert "and 1214 more" in caught.value.message
    assert "1,234 rows" in caught.value.message
    with pytest.raises(InvalidRequest, match="nothing to do"):
        items.check(skip_bad=True)


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n"])
def test_an_empty_input_is_an_error(file, content: str) -> None:
    with pytest.raises(InvalidRequest, match="nothing to do"):
        read(file(content)).check(skip_bad=False)


def test_what_cannot_be_read_or_has_no_such_column_is_refused_at_once(file, tmp_path: Path) -> None:
    for name, column, says in (
        (str(tmp_path / "missing"), None, "No such file"),
        (str(tmp_path), None, "directory"),
        (file("study,name\n", "a.csv"), None, "--column"),
        (file("study,name\n1.2.3,A\n", "b.csv"), "uid", "has 2 others"),
        (file("", "c.csv"), "uid", "no column"),
        (file(b"\0\xff" * 1000, "d.csv"), "uid", "no column"),
        (file(b"other\r1.2.3\r", "e.csv"), "uid", "has 1 other"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            read(name, column)


@pytest.mark.parametrize(
    ("content", "first", "swallowed"),
    [
        ('study\n1.2.3\n"' + "1.2.4\n" * 50_000, 3, 21_845),  # as far as a cell may be long
        ('study\n1.2.3\n"1.2.4\n1.2.5\n', 3, 1),
        ('study\n"1.2.3\n1.2.4"\n1.2.5\n', 2, 1),
        ('study,name\n1.2.3,A\n1.2.4,"B\n1.2.5,C\n1.2.6,D\n', 3, 2),
        ('study;name\n"1.2.3;A\n1.2.4;B";C\n', 2, 1),
        ('name|study\n"A|1.2.3\nB"|1.2.4\n', 2, 1),
        ('study,"name\n1.2.3,A\n1.2.4,B\n', 1, 2),
    ],
)
def test_an_unclosed_quote_is_told_with_the_lines_that_it_takes_in_and_none_is_left_out(
    file, content: str, first: int, swallowed: int
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(file(content, "a.csv"), "study")
    lines = f"{swallowed:,} further line{'s' if swallowed > 1 else ''}, up to line {first + swallowed}."
    assert f"a.csv, line {first}: a quote" in caught.value.message
    assert lines in caught.value.message


def test_what_another_column_says_in_several_lines_takes_no_row_in(file) -> None:
    items = read(file('study,note\n1.2.3,"seen\n\ntwice"\n"1.2.4",B\n1.2.5,"a, b\n"\n', "a.csv"), "study")
    assert (list(items), items.bad_total) == (UIDS, 0)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("https://host/a.dcm?sig=1", True),
        ("HTTP://host/wado/instances/1/", True),
        ("s3://bucket/key", True),
        ("az://container/blob", True),
        ("file:///data/a.dcm", True),
        ("zip+https://host/a.zip?sig=1!/b.dcm", True),
        ("zip+https://host/a.zip", False),
        ("https://host/a.ZIP?sig=1", False),
        ("s3://bucket/prefix/", False),
        ("file:///data/", False),
        ("/data/a.dcm", False),
        ("ftp://host/a", False),
        ("1.2.3", False),
        ("https://host/a\tb", False),
        ("https://host/" + "a" * 8192, False),
    ],
)
def test_a_row_of_an_upload_is_the_url_of_one_image(text: str, holds: bool) -> None:
    with Items() as items:
        items.add([InputRow("line 1", text)], image_url)
        assert (items.count, items.bad_total) == (int(holds), int(not holds))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("s3://bucket/", True),
        ("az://container/prefix/", True),
        ("file:///data/", True),
        ("https://host/all.zip", True),
        ("https://host/all.zip?sig=a.b", True),
        ("zip+https://host/all", True),
        ("https://host/folder/", False),
        ("https://host/a.dcm?file=b.zip", False),
        ("zip+https://host/all.zip!/a", False),
        ("folder/all.zip", False),
        ("1.2.3", False),
    ],
)
def test_what_a_worker_has_to_list_is_told_from_what_is_one_image(text: str, holds: bool) -> None:
    assert is_source(text) is holds


@settings(deadline=None)  # a busy machine is no finding
@given(st.binary(max_size=400), st.sampled_from([None, "study", "a"]))
def test_no_bytes_break_the_reader(tmp_path_factory, content: bytes, column: str | None) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(b"study,a\n" + content if column else content)
    rows, refused = [], "a quote is opened there"
    try:
        rows += rows_of_file(str(path), column=column)
    except InvalidRequest as error:
        refused = error.message
    assert "a quote is opened there" in refused
    assert all(isinstance(row, BadRow) or row.text for row in rows)


@settings(deadline=None)  # a busy machine is no finding
@given(st.lists(st.from_regex(r"[0-9]{1,5}(\.[0-9]{1,5}){0,6}", fullmatch=True), min_size=1, max_size=30))
def test_what_was_written_is_what_is_read_in_every_form(tmp_path_factory, uids: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.txt"
    for column, content in (
        (None, "\n".join(uids)),
        ("study", "no,study\n" + "".join(f"{n},{uid}\n" for n, uid in enumerate(uids))),
        ("study", "".join(json.dumps({"study": uid}) + "\n" for uid in uids)),
    ):
        path.write_text(content, encoding="utf-8")
        with read(str(path), column) as items:
            assert (list(items), items.bad_total) == (uids, 0)


def test_words_are_items_or_files_and_a_folder_of_this_machine_is_neither(file, tmp_path: Path) -> None:
    listed = file("1.2.4\nx\n", "uids.txt")
    rows = list(rows_of_words(["1.2.3", listed, tmp_path / "uids.txt"], study_uid))
    assert [(row.place, getattr(row, "text", "")) for row in rows] == [
        ("argument 1", "1.2.3"),
        ("uids.txt, line 1", "1.2.4"),
        ("uids.txt, line 2", "x"),
        ("uids.txt, line 1", "1.2.4"),
        ("uids.txt, line 2", "x"),
    ]
    for word, says in ((str(tmp_path), "file:///folder/"), ("DOE^JANE?token=1", "is no file, and no UID")):
        with pytest.raises(InvalidRequest, match=says) as caught:
            list(rows_of_words([word], study_uid))
        assert "token" not in caught.value.message


# --- lists of Windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_excel_and_powershell_are_read(file, encoding: str, end: str) -> None:
    plain = end.join(["# Müller", "1.2.3", "", "1.2.4", "1.2.5", ""])
    assert list(read(file(plain.encode(encoding)))) == UIDS
    table = end.join(["name\tstudy", "Müller\t1.2.3", "a\t1.2.4", "\U0001f600\t1.2.5", ""])
    items = read(file(table.encode(encoding), "a.txt"), "study")
    assert (list(items), items.bad_total) == (UIDS, 0)


def test_a_byte_order_mark_of_either_end_is_known(file) -> None:
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        assert list(read(file(mark + "1.2.3\r\n1.2.4\r\n1.2.5".encode(encoding)))) == UIDS


@pytest.mark.parametrize("first", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"])
def test_the_separator_that_excel_names_is_taken(file, first: str) -> None:
    items = read(file(f"{first}\r\nname, first;study\r\nA;1.2.3\r\nB;x\r\nC, D;1.2.5\r\n", "a.csv"), "study")
    assert (list(items), [one.place for one in items.bad]) == (["1.2.3", "1.2.5"], ["line 4"])
    assert list(read(file("sep=~\nname~study\nA~1.2.3\n", "b.csv"), "study")) == ["1.2.3"]


@pytest.mark.parametrize(
    "note",
    ['"a; b\nc"', '"a;\r\nb; ""c"";\r\n"', '";\n;\n2.5 mm; 3"'],
)
def test_a_closed_quote_may_hold_lines_and_separators(file, note: str) -> None:
    items = read(file(f"note;study\n{note};1.2.3\nx;1.2.4\n{note};1.2.5\n", "a.csv"), "study")
    assert (list(items), items.bad_total) == (UIDS, 0)


@pytest.mark.parametrize(
    "rows",
    [
        '"Doe;1.2.3\nRoe;1.2.4\n5";1.2.5\n',
        '"Doe;1.2.3\nRoe;1.2.4\nx;"y"\n',
        '"Doe;\nRoe;https://host/a.dcm\n";1.2.5\n',
        '"a;b\nc" d;1.2.3\n',
    ],
)
def test_a_quote_that_takes_in_rows_is_refused_even_if_a_later_one_closes_it(file, rows: str) -> None:
    with pytest.raises(InvalidRequest, match="a quote is opened there"):
        read(file(f"note;study\n{rows}", "a.csv"), "study")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe" + "1.2.3\n1.2.4".encode("utf-16-le") + b"\x00", "half a character"),
        (b"\xff\xfe" + "1.2.3\n".encode("utf-16-le") + b"\x00\xd8", "half a character"),
        (b"1.2.3\n1.2.\xe9", "not UTF-8"),
    ],
)
def test_a_cut_file_says_so(file, content: bytes, why: str) -> None:
    items = read(file(content))
    assert (list(items), [one.why for one in items.bad]) == (["1.2.3"], [why])


def test_half_a_character_in_json_is_a_bad_row(file) -> None:
    with read(file('{"u": "https://host/\\ud83d.dcm"}\n', "a.jsonl"), "u", image_url) as items:
        assert [one.why for one in items.bad] == ["half a character"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("length", [65_535, 65_536, 65_537, 131_072, 200_000])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_that_is_too_long_is_one_bad_row_wherever_it_is_cut(file, encoding: str, length: int, end: str) -> None:
    items = read(file(("1.2.3\n" + "7" * length + "\n1.2.4\n1.2.5" + end).encode(encoding)))
    assert (list(items), [one.place for one in items.bad]) == (UIDS, ["line 2"])
