"""The list of studies: pages over servers that page in their own ways, and what is made of the pages."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import tracemalloc
from dataclasses import replace

import pytest

from courier.errors import InvalidRequest, PacsUnavailable
from courier.redaction import redact_job
from courier.settings import ServerSettings, Settings
from producer.cli.studies import COLUMNS, json_document, write_csv
from producer.studies import StudyList
from worker.jobs.attempt import Attempt
from worker.jobs.services import Services
from worker.jobs.studies import list_studies
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import StudyPage


class Shelf:
    """A server that lists studies ``largest_page`` at a time; ``overlap`` of each page stand on the next, too."""

    def __init__(self, name, uids, *, largest_page=200, overlap=0):
        self.server = ServerSettings(name=name, type="dicomweb", url="http://host/dicom", viewer="http://v/{study}")
        self.uids = uids
        self.largest_page = largest_page
        self.overlap = overlap
        self.silent = False

    def studies(self, *, filters, limit, offset):
        if "Nonsense" in filters:
            raise InvalidRequest("'Nonsense' is no DICOM keyword.")
        if self.silent:
            raise PacsUnavailable("silence", server_name=self.server.name)
        limit = min(limit, self.largest_page)
        page = self.uids[max(0, offset - self.overlap) : offset + limit] if offset < len(self.uids) else []
        return StudyPage([dataset(uid, self.server.name) for uid in page], offset + limit if page else None)


def dataset(uid, patient):
    return {
        "0020000D": {"vr": "UI", "Value": [uid]},
        "00100020": {"vr": "LO", "Value": [f"of {patient}"]},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "Doe^Jane"}]},
        "00080020": {"vr": "DA"},
        "00080061": {"vr": "CS", "Value": ["CT"]},
        "00201208": {"vr": "IS", "Value": ["3"]},
    }


def uids(*numbers):
    return [f"1.2.{number}" for number in numbers]


def services(*shelves, **results):
    fleet = Fleet(shelves)
    return Services(Settings.model_validate({"results": results}), ledger=None, sources=None, fleet=fleet)


def ask(services, **job):
    return list_studies(job, Attempt("j", 1, 1, last=False, ledger=None), services)


def pages_of(services, **job):
    cursor = None
    while True:
        page = ask(services, cursor=cursor, **job)
        json.dumps(page)
        yield page
        cursor = page["cursor"]
        if cursor is None:
            return


@pytest.mark.parametrize("limit", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize(("largest_page", "overlap"), [(200, 0), (3, 0), (10, 2)])
def test_every_study_is_listed_once_with_all_its_servers_whatever_the_pages(limit, largest_page, overlap):
    first = Shelf("a", uids(*range(0, 40)), largest_page=largest_page, overlap=overlap)
    second = Shelf("b", uids(*range(30, 95)), largest_page=200)
    random.Random(1).shuffle(second.uids)
    with StudyList() as listed:
        for page in pages_of(services(first, second), limit=limit):
            assert len(page["studies"]) <= limit + overlap
            listed.add(page)
        found = {entry["study_uid"]: [place["server_name"] for place in entry["servers"]] for entry in listed}
        assert found == {
            uid: [name for name, shelf in (("a", first), ("b", second)) if uid in shelf.uids]
            for uid in {*first.uids, *second.uids}
        }
        assert {server["server_name"]: server["count"] for server in listed.servers()} == {"a": 40, "b": 65}


def test_an_entry_says_what_the_first_server_tells_and_how_many_images_each_has():
    (entry,) = ask(services(Shelf("a", uids(1)), Shelf("b", uids(1))))["studies"]
    assert (entry["patient_id"], entry["patient_name"], entry["modalities"]) == ("of a", "Doe^Jane", ["CT"])
    assert entry["study_date"] is None
    assert entry["servers"] == [
        {"server_name": name, "server_type": "dicomweb", "images": 3, "viewer_url": "http://v/1.2.1"} for name in "ab"
    ]


@pytest.mark.parametrize("allowed", ["uids", "none"])
def test_a_site_that_keeps_metadata_out_of_results_gets_no_patient_in_lists(allowed):
    page = ask(services(Shelf("a", uids(1)), metadata=allowed))
    assert "Doe" not in json.dumps(page)
    assert "of a" not in json.dumps(page)


def test_a_silent_server_keeps_the_list_open_and_is_listed_when_it_is_back():
    first, second = Shelf("a", uids(1, 2)), Shelf("b", uids(3))
    second.silent = True
    page = ask(services(first, second))
    assert [server["status"] for server in page["servers"]] == ["complete", "unavailable"]
    assert page["cursor"] is not None
    with pytest.raises(PacsUnavailable):
        ask(services(first, second), cursor=page["cursor"])
    second.silent = False
    rest = ask(services(first, second), cursor=page["cursor"])
    assert [entry["study_uid"] for entry in rest["studies"]] == uids(3)
    assert rest["cursor"] is None


def test_merging_stops_when_only_silent_servers_are_left_and_says_which():
    first, second = Shelf("a", uids(*range(10))), Shelf("b", uids(11))
    second.silent = True
    with StudyList() as listed:
        assert list(listed.extend(pages_of(services(first, second), limit=8))) == [4, 8, 10]
        assert [server["status"] for server in listed.servers()] == ["complete", "unavailable"]


def test_either_lists_the_first_server_that_answers_and_stays_with_it():
    first, second = Shelf("a", uids(1)), Shelf("b", uids(2, 3))
    first.silent = True
    page = ask(services(first, second), mode="either", limit=1)
    assert [entry["study_uid"] for entry in page["studies"]] == uids(2)
    first.silent = False
    rest = list(pages_of(services(first, second), mode="either", limit=1))
    assert [entry["study_uid"] for one in rest for entry in one["studies"]] == uids(1)
    page = ask(services(first, second), mode="either", limit=1, cursor=page["cursor"])
    assert [entry["study_uid"] for entry in page["studies"]] == uids(3)


def test_a_refused_filter_refuses_the_list_instead_of_leaving_a_server_out():
    with pytest.raises(InvalidRequest, match="Nonsense"):
        ask(services(Shelf("a", uids(1))), filters={"Nonsense": "1"})


@pytest.mark.parametrize("cursor", ["", "x", "eyJ9", "e30=", "WzFd", "ä", "A" * 400])
def test_a_cursor_that_is_none_is_refused(cursor):
    with pytest.raises(InvalidRequest):
        ask(services(Shelf("a", uids(1))), cursor=cursor)


def test_a_cursor_of_another_list_or_another_fleet_is_refused():
    both = services(Shelf("a", uids(1, 2)), Shelf("b", uids(3, 4)))
    cursor = ask(both, limit=2)["cursor"]
    with pytest.raises(InvalidRequest, match="another mode"):
        ask(both, filters={"PatientID": "7"}, cursor=cursor)
    with pytest.raises(InvalidRequest, match="No server"):
        ask(services(Shelf("a", uids(1, 2))), cursor=cursor)


def test_memory_stays_flat_while_a_long_list_is_merged():
    def peak_bytes(studies):
        bench = services(Shelf("a", uids(*range(studies))))
        tracemalloc.start()
        try:
            with StudyList() as listed:
                assert max(listed.extend(pages_of(bench, limit=200))) == studies
                assert sum(1 for _ in listed) == studies
                return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(6_000) < 1.5 * peak_bytes(1_000)


def test_the_list_is_one_json_document_and_one_csv_table():
    with StudyList() as listed:
        listed.add(ask(services(Shelf("a", uids(2, 1)), Shelf("b", uids(1)))))
        document = json.loads("".join(json_document({"operation": "list_studies"}, listed)))
        assert [entry["study_uid"] for entry in document["studies"]] == uids(1, 2)
        out = io.StringIO()
        write_csv(listed, out)
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["servers"], rows[0]["images"], rows[1]["servers"]) == ("a b", "3 3", "a")
    assert json.loads("".join(json_document({"operation": "list_studies"}, []))) == {
        "operation": "list_studies",
        "studies": [],
    }


def test_operators_see_what_a_list_is_filtered_by_but_not_for_whom():
    shown = redact_job({"mode": "both", "filters": {"PatientName": "Doe^Jane"}, "cursor": "abc"})
    assert json.loads(shown) == {"mode": "both", "filters": ["PatientName"]}


class SortedShelf(Shelf):
    """A server that sorts its list: its UIDs are in that order."""

    def newest_studies(self, *, filters, limit, offset):
        return replace(self.studies(filters=filters, limit=limit, offset=offset), is_sorted=True)


def dated(page):
    """The page with the number of each study as its date: 1.2.7 is of 2007."""
    for entry in page["studies"]:
        entry["study_date"] = f"20{int(entry['study_uid'].rpartition('.')[2]):02}0101"
    return page


def first(shelves, limit, page):
    """What is listed first, and whether in the order of servers."""
    with StudyList() as listed:
        pages = map(dated, pages_of(services(*shelves), limit=page, newest_first=True))
        for _ in listed.extend(pages, at_most=limit):
            pass
        return [entry["study_uid"] for entry in itertools.islice(listed, limit)], listed.in_server_order


@pytest.mark.parametrize("page", [2, 3, 8, 100])
def test_of_servers_that_sort_the_newest_of_all_are_listed(page) -> None:
    odd, even = uids(*range(29, 0, -2)), uids(*range(98, 0, -2))
    assert first([SortedShelf("a", odd), SortedShelf("b", even)], 4, page) == (uids(98, 96, 94, 92), False)
    assert first([SortedShelf("a", odd), SortedShelf("b", uids(2, 1))], 3, page) == (uids(29, 27, 25), False)


def test_a_server_that_does_not_sort_and_has_more_makes_the_order_that_of_servers() -> None:
    sorts, does_not = SortedShelf("a", uids(9, 8, 7)), Shelf("b", uids(*range(20, 80)))
    assert first([sorts, does_not], 4, 10) == (uids(9, 20, 8, 21), True)
    assert first([sorts, Shelf("b", uids(20, 80, 30))], 4, 10) == (uids(80, 30, 20, 9), False)


def test_a_cursor_goes_on_in_the_order_that_it_was_given_for() -> None:
    both = services(SortedShelf("a", uids(3, 2, 1)))
    cursor = ask(both, limit=1, newest_first=True)["cursor"]
    assert ask(both, limit=1, cursor=cursor, newest_first=True)["servers"][0]["newest_first"] is True
    with pytest.raises(InvalidRequest, match="another"):
        ask(both, limit=1, cursor=cursor)
    cursor = ask(both, limit=1)["cursor"]
    assert ask(both, limit=1, cursor=cursor)["servers"][0]["newest_first"] is False
