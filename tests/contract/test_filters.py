"""Orders and lists by filters: only what matches is reached, whatever a server makes of them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from courier.batches.store import Batches
from courier.errors import InvalidRequest, PacsMisanswered, PacsUnavailable
from courier.ledger.jobs import PREFIX
from sandbox import synthetic
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.heedless import Heedless, heedless, row
from worker.batches.coordinator import Coordinator
from worker.batches.downloads import download_all
from worker.jobs.attempt import Attempt
from worker.jobs.audit import audit
from worker.jobs.runner import Failed, JobResult
from worker.jobs.studies import list_studies
from worker.jobs.study_lists import PAGE_STUDIES
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text


@pytest.fixture
def foreign() -> Iterator[Heedless]:
    with heedless() as server:
        yield server


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], foreign: Heedless) -> BatchSite:
    return batch_site([{"name": "foreign", "type": "dicomweb", "url": foreign.url}])


@pytest.fixture
def all_of_them(
    batch_site: Callable[..., BatchSite], sandbox: SandboxPart, orthanc: str, foreign: Heedless, tmp_path: Path
) -> BatchSite:
    servers = [
        *sandbox.servers(),
        {"name": "orthanc", "type": "orthanc", "url": orthanc},
        {"name": "foreign", "type": "dicomweb", "url": foreign.url},
    ]
    return batch_site(servers, downloads={"folders": [str(tmp_path)]})


REAL = ["msdicom", "dcm4chee", "orthanc"]


def by_filters(**filters: str) -> dict[str, Any]:
    return {"items": None, "filters": filters}


def listed(site: BatchSite, server: str, **filters: str) -> list[str]:
    """What matches on one server, over all pages."""
    found: dict[str, None] = {}
    offset: int | None = 0
    while offset is not None:
        page = site.fleet[server].studies(filters=filters, limit=100, offset=offset)
        found |= dict.fromkeys(text(ds, STUDY_INSTANCE_UID) for ds in page.studies)
        offset = page.next_offset
    return list(found)


def refusal(result: JobResult) -> InvalidRequest:
    assert isinstance(result, Failed), result
    assert isinstance(result.error, InvalidRequest), result.error
    return result.error


def ask(site: BatchSite, work: Any, **job: Any) -> dict[str, Any]:
    fence = site.ledger.take(new_uid(), task="t", job={}).fence
    attempt = Attempt("j", fence, 1, last=False, ledger=site.ledger)
    attempt.write_intent = lambda _: None  # type: ignore[method-assign]  # nothing is written down of a question
    result: dict[str, Any] = work(job, attempt, site.services)
    return result


# --- a server that ignores filters ------------------------------------------------------------------------------


def test_a_deletion_reaches_only_what_matches_on_a_server_that_ignores_filters(
    site: BatchSite, foreign: Heedless
) -> None:
    foreign.studies = [row(f"1.{number}", t00100020=("LO", str(number % 2))) for number in range(64)]
    foreign.studies.append(row("1.99"))
    done = payload(site.delete(**by_filters(PatientID="1")))
    assert done["totals"] == {"deleted": 32}
    assert foreign.uids == [*(f"1.{number}" for number in range(0, 64, 2)), "1.99"]
    assert done["warnings"] == ["foreign sent 33 rows that do not match the filters; left out."]


@pytest.mark.parametrize("command", ["apply", "retry"])
def test_a_plan_by_filters_that_0_1_made_is_not_carried_out(site: BatchSite, foreign: Heedless, command: str) -> None:
    foreign.studies = [row("1.1", t00100020=("LO", "1")), row("1.2", t00100020=("LO", "1"))]
    payload(site.delete(**by_filters(PatientID="1"), dry_run=True))
    key = f"{PREFIX}batch:{site.batch}"
    order = json.loads(site.ledger.client.hget(key, "order"))
    site.ledger.client.hset(key, "order", json.dumps(order | {"dry_run": False}))
    if command == "retry":
        site.ledger.client.hset(key, "state", "cancelled")
    site.ledger.client.hdel(key, "filters_applied")  # as 0.1 leaves it
    assert "Order it again" in refusal(site.go_on(getattr(Coordinator, command), command)).message
    assert foreign.uids == ["1.1", "1.2"]
    site.ledger.client.hset(key, "filters_applied", 1)
    payload(site.go_on(getattr(Coordinator, command), command))
    assert foreign.uids == []


@pytest.mark.parametrize("value", ["-18991231", "20260101-", "20260101"])
def test_a_study_without_the_attribute_is_never_deleted(site: BatchSite, foreign: Heedless, value: str) -> None:
    foreign.studies = [row("1.1", t00080020=("DA", "")), row("1.2"), {**row("1.3"), "00080020": {"vr": "DA"}}]
    assert "holds no item" in refusal(site.delete(**by_filters(StudyDate=value))).message
    assert foreign.uids == ["1.1", "1.2", "1.3"]


def test_where_no_row_has_the_attribute_the_plan_says_so(site: BatchSite, foreign: Heedless) -> None:
    foreign.studies = [row("1.1", t00100020=("LO", "1")), row("1.2", t00100020=("LO", "2"))]
    error = refusal(site.delete(**by_filters(PatientID="1", Manufacturer="Acme")))
    assert foreign.uids == ["1.1", "1.2"]
    assert "No study there came with Manufacturer." in error.message


@pytest.mark.parametrize("uid", ["1.2?x", "1.2/../1.3", "1.2/series/1.3", "1.2#"])
def test_a_uid_that_would_name_something_else_in_a_url_is_not_planned(
    site: BatchSite, foreign: Heedless, uid: str
) -> None:
    foreign.studies = [row("1.2", t00100020=("LO", "2")), row(uid, t00100020=("LO", "1"))]
    result = site.delete(**by_filters(PatientID="1"))
    assert isinstance(result, Failed)
    assert result.error.payload["code"] == "pacs_misanswered"
    assert foreign.uids == ["1.2", uid]
    assert all(call.startswith("GET ") for call in foreign.asked)


def test_a_row_with_two_study_uids_is_no_answer(site: BatchSite, foreign: Heedless) -> None:
    """Which of the two is deleted would be a guess."""
    both = {**row("1.2", t00100020=("LO", "1")), "0020000D": {"vr": "UI", "Value": ["1.2", "1.3"]}}
    foreign.studies = [both]
    result = site.delete(**by_filters(PatientID="1"))
    assert isinstance(result, Failed)
    assert result.error.payload["code"] == "pacs_misanswered"
    assert foreign.studies == [both]


def test_a_key_that_it_need_not_match_is_refused_alone_and_taken_beside_another(
    site: BatchSite, foreign: Heedless
) -> None:
    foreign.studies = [
        row("1.1", t00100020=("LO", "1"), t00081030=("LO", "head")),
        row("1.2", t00100020=("LO", "1"), t00081030=("LO", "knee")),
        row("1.3", t00100020=("LO", "2"), t00081030=("LO", "head")),
    ]
    error = refusal(site.delete(**by_filters(StudyDescription="head")))
    assert "foreign does not match StudyDescription" in error.message
    assert foreign.asked == []
    assert Batches(site.ledger).get("B") is None
    site.batch = "C"
    payload(site.delete(**by_filters(PatientID="1", StudyDescription="head")))
    assert foreign.uids == ["1.2", "1.3"]


def test_a_list_drops_what_does_not_match_and_says_how_many(site: BatchSite, foreign: Heedless) -> None:
    foreign.studies = [row(f"1.{number}", t00100010=("PN", {"Alphabetic": f"Hall^{number}"})) for number in range(5)]
    page = ask(site, list_studies, filters={"PatientName": "hall^3"})
    assert [entry["study_uid"] for entry in page["studies"]] == ["1.3"]
    (told,) = page["servers"]
    assert (told["count"], told["dropped"], told["lacking"], page["cursor"]) == (1, 4, [], None)
    page = ask(site, list_studies, filters={"StudyDescription": "head"})
    (told,) = page["servers"]
    assert (page["studies"], told["dropped"], told["lacking"]) == ([], 5, ["StudyDescription"])


def test_a_list_of_little_that_matches_is_read_in_pieces(
    site: BatchSite, foreign: Heedless, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.studies.MAX_DROPPED", 10)
    foreign.studies = [row(f"1.{number}", t00100020=("LO", str(number))) for number in range(35)]
    found: list[str] = []
    cursor, pages = None, 0
    while cursor is not None or not pages:
        page = ask(site, list_studies, filters={"PatientID": "34"}, limit=10, cursor=cursor)
        found += [entry["study_uid"] for entry in page["studies"]]
        cursor, pages = page["cursor"], pages + 1
    assert (found, pages > 2) == (["1.34"], True)


# --- a server that ignores the offset ---------------------------------------------------------------------------


@pytest.mark.parametrize("heeds_limit", [True, False])
def test_a_server_without_paging_is_listed_once(site: BatchSite, foreign: Heedless, heeds_limit: bool) -> None:
    foreign.heeds_offset, foreign.heeds_limit = False, heeds_limit
    foreign.studies = [row(f"1.{number}", t00100020=("LO", "7")) for number in range(3)]
    page = ask(site, list_studies, limit=100)
    assert (len(page["studies"]), page["cursor"]) == (3, None)
    assert (page["servers"][0]["count"], page["servers"][0]["may_be_cut"]) == (3, heeds_limit)
    assert len(foreign.asked) == 3, "two pages, and whether it minds the limit"
    page = ask(site, list_studies, filters={"PatientID": "8"}, limit=100)
    assert (page["studies"], page["servers"][0]["dropped"], page["cursor"]) == ([], 3, None)
    page = ask(site, list_studies, filters={"PatientID": "8,7"}, limit=100)
    assert (len(page["studies"]), page["cursor"]) == (3, None)


def pages_of(site: BatchSite, *, limit: int, **job: Any) -> list[list[str]]:
    """The studies of each page of the list."""
    pages: list[list[str]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = ask(site, list_studies, limit=limit, cursor=cursor or None, **job)
        pages.append([entry["study_uid"] for entry in page["studies"]])
        cursor = page["cursor"]
        assert len(pages) < 30, "the list has no end"
    return pages


@pytest.mark.parametrize("heeds_limit", [True, False])
@pytest.mark.parametrize("heeds_offset", [True, False])
@pytest.mark.parametrize("fixed_page", [None, 7])
def test_a_list_over_several_jobs_holds_each_study_once_whatever_the_server_ignores(
    site: BatchSite, foreign: Heedless, heeds_limit: bool, heeds_offset: bool, fixed_page: int | None
) -> None:
    foreign.heeds_offset, foreign.heeds_limit, foreign.fixed_page = heeds_offset, heeds_limit, fixed_page
    foreign.studies = [row(f"1.{number}", t00100020=("LO", str(number % 2))) for number in range(18)]
    shown = 7 if fixed_page and not heeds_offset else 18
    for limit in (5, 4, 18, 100):
        pages = pages_of(site, limit=limit)
        listed = [uid for page in pages for uid in page]
        assert max(map(len, pages)) <= limit
        assert sorted(listed) == sorted(foreign.uids[:shown]), f"limit {limit}"
    few = [uid for page in pages_of(site, limit=3, filters={"PatientID": "1"}) for uid in page]
    assert set(few) == set(foreign.uids[1:shown:2])


def test_pages_that_come_in_turn_are_no_endless_list(site: BatchSite, foreign: Heedless) -> None:
    """As behind a balancer, whose servers have different lists."""
    foreign.studies = [row(f"1.{number}") for number in range(3)]
    foreign.in_turn = [[row(f"2.{number}") for number in range(3)], [row(f"3.{number}") for number in range(3)]]
    foreign.heeds_offset = False
    assert len({uid for page in pages_of(site, limit=3) for uid in page}) >= 6
    payload(site.delete(items=None, everything=True, confirm="delete all studies", dry_run=True))


def test_more_than_one_page_of_a_server_that_ignores_the_offset_is_ordered_in_pieces(
    site: BatchSite, foreign: Heedless
) -> None:
    foreign.heeds_offset = False
    foreign.studies = [row(f"1.{number}") for number in range(PAGE_STUDIES + 20)]
    with pytest.raises(PacsMisanswered, match="narrow the list") as caught:
        pages_of(site, limit=800)
    assert caught.value.is_lasting
    order = {"items": None, "everything": True, "confirm": "delete all studies"}
    done = payload(site.delete(**order))
    assert len(foreign.studies) == 20
    assert "run this again" in done["warnings"][0]
    site.batch = "C"
    payload(site.delete(**order))
    assert foreign.studies == []


def test_a_plan_says_where_the_list_may_be_one_page_of_a_longer_one(site: BatchSite, foreign: Heedless) -> None:
    foreign.heeds_offset, foreign.fixed_page = False, 7
    foreign.studies = [row(f"1.{number}") for number in range(18)]
    order = {"items": None, "everything": True, "confirm": "delete all studies", "dry_run": True}
    assert payload(site.delete(**order))["warnings"] == [
        "foreign ignores offset, so it may have more studies than it lists."
    ]
    foreign.fixed_page, foreign.heeds_limit, site.batch = None, False, "C"
    assert payload(site.delete(**order))["warnings"] == [], "it sends all that it has to every question"


def test_its_plan_comes_to_an_end(site: BatchSite, foreign: Heedless) -> None:
    foreign.heeds_offset = False
    foreign.studies = [row(f"1.{number}", t00100020=("LO", str(number))) for number in range(3)]
    payload(site.delete(**by_filters(PatientID="1")))
    assert foreign.uids == ["1.0", "1.2"]
    site.batch = "C"
    payload(site.delete(items=None, everything=True, confirm="delete all studies"))
    assert foreign.uids == []


# --- one server of several --------------------------------------------------------------------------------------


def test_an_order_is_refused_as_a_whole_if_one_of_its_servers_cannot_answer(
    all_of_them: BatchSite, foreign: Heedless, tmp_path: Path
) -> None:
    site, study = all_of_them, new_uid()
    site.put_file("dcm4chee", image(study, StudyID="X9"))
    orders: Mapping[str, Callable[[], JobResult]] = {
        "delete": lambda: site.delete(**by_filters(StudyID="X9")),
        "backup": lambda: site.delete(**by_filters(StudyID="X9"), backup=tmp_path.as_uri()),
        "hide": lambda: site.delete(**by_filters(StudyID="X9"), permanent=False),
        "move": lambda: site.order(**by_filters(StudyID="X9"), delete_source=True),
        "download": lambda: site.see_to_its_end(
            "pacs.batch.download",
            download_all,
            "B",
            {**by_filters(StudyID="X9"), "destination": tmp_path.as_uri()},
        ),
    }
    for number, (name, order) in enumerate(orders.items()):
        site.batch = f"B{number}"
        error = refusal(order())
        assert (error.server_name, error.details["keyword"]) == ("msdicom", "StudyID"), name
    assert site.on("dcm4chee", study)
    assert foreign.asked == []
    site.batch = "alone"
    payload(site.delete(**by_filters(StudyID="X9", PatientID=synthetic.PATIENT_ID), servers=["dcm4chee"]))
    assert not site.on("dcm4chee", study)


@pytest.mark.parametrize("fails_at_offset", [0, 2])
def test_nothing_is_planned_while_a_server_is_silent_also_in_the_middle_of_its_list(
    all_of_them: BatchSite, foreign: Heedless, fails_at_offset: int
) -> None:
    site, study, patient = all_of_them, new_uid(), new_uid()[-10:]
    site.put_file("dcm4chee", image(study, PatientID=patient))
    foreign.studies = [row("1.1", t00100020=("LO", patient)), row("1.2", t00100020=("LO", patient))]
    foreign.fails_at_offset = fails_at_offset
    order = {**by_filters(PatientID=patient), "servers": ["dcm4chee", "foreign"]}
    result = site.delete(**order)
    assert isinstance(result, Failed)
    assert isinstance(result.error, PacsUnavailable)
    assert (len(site.on("dcm4chee", study)), foreign.uids) == (1, ["1.1", "1.2"])
    foreign.fails_at_offset = None
    site.batch = "C"
    payload(site.delete(**order))
    assert (site.on("dcm4chee", study), foreign.uids) == (set(), [])


def test_an_audit_counts_what_matches_and_says_what_does_not(all_of_them: BatchSite, foreign: Heedless) -> None:
    site, study, patient = all_of_them, new_uid(), new_uid()[-10:]
    foreign.lists_images = True
    site.put_file("dcm4chee", image(study, PatientID=patient))
    foreign.studies = [row(study, t00100020=("LO", patient)), row("1.2", t00100020=("LO", "other"))]
    told = ask(site, audit, servers=["dcm4chee", "foreign"], filters={"PatientID": patient})
    assert [(one["studies"], one["dropped"]) for one in told["servers"]] == [(1, 0), (1, 1)]
    assert told["split"] == 1


# --- the products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", REAL)
def test_each_finds_patients_by_a_list_of_their_ids(all_of_them: BatchSite, server: str) -> None:
    n = new_uid()[-10:]
    studies = {patient: new_uid() for patient in (f"A{n}", f"B{n}", f"C{n}")}
    for patient, study in studies.items():
        all_of_them.put_file(server, image(study, PatientID=patient))
    wanted = [studies[f"A{n}"], studies[f"C{n}"]]
    for sign in (",", "\\"):
        assert set(listed(all_of_them, server, PatientID=f"A{n}{sign}C{n}")) == set(wanted)
    page = ask(all_of_them, list_studies, mode=server, filters={"PatientID": f"A{n},C{n}"})
    assert {entry["study_uid"] for entry in page["studies"]} == set(wanted)
    both = f"A{n},C{n}"
    all_of_them.put_file(server, image(literal := new_uid(), PatientID=both))
    assert set(listed(all_of_them, server, PatientID=both)) == {*wanted, literal}, "a comma may be part of an ID"
    refusal(all_of_them.delete(**by_filters(PatientID=both), servers=[server]))
    all_of_them.batch = new_uid()
    payload(all_of_them.delete(**by_filters(PatientID=f"C{n}\\B{n}"), servers=[server]))
    assert [bool(all_of_them.on(server, study)) for study in studies.values()] == [True, False, False]


@pytest.mark.parametrize("server", REAL)
def test_names_are_found_with_all_their_letters_and_no_others(all_of_them: BatchSite, server: str) -> None:
    n = new_uid()[-10:]
    names = {
        "umlaut": f"Müller^Jörg{n}",
        "decomposed": unicodedata.normalize("NFD", f"Möller^Jörg{n}"),
        "plain": f"Muller^Jorg{n}",
        "groups": f"Yamada^Tarou{n}=山田^太郎{n}=やまだ^たろう{n}",
        "mixed": f"Mu山ller^Jorg{n}",
    }
    studies = {key: new_uid() for key in names}
    for key, name in names.items():
        all_of_them.put_file(server, image(studies[key], PatientName=name, SpecificCharacterSet="ISO_IR 192"))

    def found(name: str) -> set[str]:
        date = {"StudyDate": "20260101"}  # MSDICOM matches whole values only, and is asked for the date alone
        uids = set(listed(all_of_them, server, PatientName=name, **date))
        return {key for key, uid in studies.items() if uid in uids}

    assert found(f"Müller^Jörg{n}") == {"umlaut"}
    assert found(f"müller^j*{n}") == {"umlaut"}
    assert found(f"Möller^Jörg{n}") == {"decomposed"}
    assert found(f"M?ller^J?rg{n}") == {"umlaut", "decomposed", "plain"}
    assert found(f"Muller^Jorg{n}") == {"plain"}
    assert found(f"*=山田^太郎{n}") == {"groups"}
    assert found(f"Yamada^Tarou{n}=山田^太郎{n}") == {"groups"}
    assert found(f"Yamada^Tarou{n}=鈴木*") == set()


@pytest.mark.parametrize("server", ["orthanc"])
def test_orthanc_finds_a_name_without_any_letter_of_ascii_and_deletes_it_alone(
    all_of_them: BatchSite, server: str
) -> None:
    n, study, other = new_uid()[-10:], new_uid(), new_uid()
    names = ("山田^太郎", "山田^花子")
    for uid, name in zip((study, other), names, strict=True):
        all_of_them.put_file(server, image(uid, PatientName=name, PatientID=n, SpecificCharacterSet="ISO_IR 192"))
    payload(all_of_them.delete(**by_filters(PatientName="山田^太郎", PatientID=n), servers=[server]))
    assert (all_of_them.on(server, study), len(all_of_them.on(server, other))) == (set(), 1)
    assert other in listed(all_of_them, server, PatientName="山田^花子")


@pytest.mark.parametrize("server", REAL)
def test_a_study_without_a_date_is_in_no_range(all_of_them: BatchSite, server: str) -> None:
    dated, undated, patient = new_uid(), new_uid(), new_uid()[-10:]
    all_of_them.put_file(server, image(dated, StudyDate="18981231", PatientID=patient))
    all_of_them.put_file(server, image(undated, StudyDate="", PatientID=patient))
    assert listed(all_of_them, server, StudyDate="-18991231", PatientID=patient) == [dated]
    payload(all_of_them.delete(**by_filters(StudyDate="-18991231"), servers=[server]))
    assert (all_of_them.on(server, dated), len(all_of_them.on(server, undated))) == (set(), 1)


@pytest.mark.parametrize("server", REAL)
def test_case_counts_in_texts_and_not_in_names(all_of_them: BatchSite, server: str) -> None:
    n, upper, lower = new_uid()[-10:], new_uid(), new_uid()
    for uid, sign in ((upper, "A"), (lower, "a")):
        all_of_them.put_file(server, image(uid, PatientID=f"{sign}{n}", PatientName=f"Hall^{sign}{n}"))
    assert listed(all_of_them, server, PatientID=f"A{n}") == [upper]
    assert set(listed(all_of_them, server, PatientName=f"hall^A{n}")) == {upper, lower}


@pytest.mark.parametrize(
    "filters", [{"Modality": "CT"}, {"Manufacturer": "Acme"}, {"NumberOfStudyRelatedInstances": "1"}]
)
def test_what_dcm4chee_ignores_lists_nothing_wrong_and_deletes_nothing(
    all_of_them: BatchSite, filters: dict[str, str]
) -> None:
    site, study = all_of_them, new_uid()
    site.put("dcm4chee", study)
    raw = site.fleet["dcm4chee"]._web.studies(filters.items())  # type: ignore[attr-defined]
    assert study in [text(ds, STUDY_INSTANCE_UID) for ds in raw], "the archive lists it all the same"
    error = refusal(site.delete(items=None, filters=filters, servers=["dcm4chee"]))
    assert error.server_name == "dcm4chee"
    assert site.on("dcm4chee", study)
    assert study not in listed(site, "dcm4chee", **filters), "it has two images, and none of Acme"


@pytest.mark.parametrize("value", ["2004", "2004-01-01", "abc"])
def test_a_date_that_dcm4chee_cannot_read_is_every_study_there_and_is_never_sent(
    all_of_them: BatchSite, value: str
) -> None:
    study = new_uid()
    all_of_them.put("dcm4chee", study)
    raw = all_of_them.fleet["dcm4chee"]._web.studies([("StudyDate", value)])  # type: ignore[attr-defined]
    assert study in [text(ds, STUDY_INSTANCE_UID) for ds in raw]
    refusal(all_of_them.delete(**by_filters(StudyDate=value), servers=["dcm4chee"]))
    assert all_of_them.on("dcm4chee", study)


@pytest.mark.parametrize("server", REAL)
def test_a_minute_is_all_its_seconds(all_of_them: BatchSite, server: str) -> None:
    patient, inside, outside = new_uid()[-10:], new_uid(), new_uid()
    all_of_them.put_file(server, image(inside, StudyTime="072730.5", PatientID=patient))
    all_of_them.put_file(server, image(outside, StudyTime="072800", PatientID=patient))
    for value in ("0727", "07-0727", "072700-072730.5"):
        assert listed(all_of_them, server, StudyTime=value, PatientID=patient) == [inside]
