"""The list of all studies over both PACS, by library and by command."""

from __future__ import annotations

import csv
import io

import pytest
from click.testing import CliRunner

from producer.cli import main
from producer.errors import InvalidRequest, PacsUnavailable
from producer.studies import StudyList, walk
from sandbox.synthetic import image, new_uid

WAIT_S = 30


@pytest.fixture
def stored(put, sandbox):
    """Three studies on MSDICOM, three on DCM4CHEE, one of them the same; the images on each."""
    only_ms, only_dcm, split = [new_uid(), new_uid()], [new_uid(), new_uid()], new_uid()
    for study in (*only_ms, split):
        put(sandbox.msdicom, image(study))
    for study in (*only_dcm, split, split):
        put(sandbox.dcm4chee, image(study))
    on = {study: {"msdicom": 1} for study in only_ms} | {study: {"dcm4chee": 1} for study in only_dcm}
    return on | {split: {"msdicom": 1, "dcm4chee": 2}}


def where(entries):
    return {
        entry["study_uid"]: {place["server_name"]: place["images"] for place in entry["servers"]} for entry in entries
    }


def test_all_studies_are_listed_once_with_their_servers(courier, pacs, stored):
    payload = courier.studies().result(timeout_s=WAIT_S)
    assert (payload["operation"], payload["mode"]) == ("list_studies", "both")
    assert where(payload["studies"]) == stored
    for entry in payload["studies"]:
        assert (entry["patient_id"], entry["study_date"], entry["modalities"]) == ("SYNTHETIC", "20260101", ["CT"])
        assert all(place["viewer_url"].endswith(entry["study_uid"]) for place in entry["servers"])
    assert {server["server_name"]: server["count"] for server in payload["servers"]} == {"msdicom": 3, "dcm4chee": 3}
    with StudyList() as listed:
        for page in walk(courier, limit=2, timeout_s=WAIT_S):
            assert len(page["studies"]) <= 2
            listed.add(page)
        assert where(listed) == stored
    status, document, _ = pacs("studies")
    assert (status, document["complete"], where(document["studies"])) == (0, True, stored)
    assert [(one["server_name"], one["status"], one["count"]) for one in document["servers"]] == [
        ("msdicom", "complete", 3),
        ("dcm4chee", "complete", 3),
    ]


def test_the_list_can_be_of_one_server_short_and_filtered(courier, pacs, stored):
    some = next(iter(stored))
    assert where(pacs("studies", "--filter", f"StudyInstanceUID={some}")[1]["studies"]) == {some: stored[some]}
    assert pacs("studies", "--filter", "StudyDate=20270101-")[1]["studies"] == []
    status, document, _ = pacs("studies", "--limit", "2")
    assert (status, len(document["studies"]), document["complete"]) == (0, 2, False)
    assert len(pacs("studies", "--server", "dcm4chee")[1]["studies"]) == 3
    written = CliRunner().invoke(main, ["studies", "--csv"])
    assert {row["study_uid"] for row in csv.DictReader(io.StringIO(written.stdout))} == set(stored)
    shown = CliRunner().invoke(main, ["studies"], env={"COLUMNS": "250"})
    assert all(study in shown.stdout for study in stored)


def test_a_filter_that_a_server_would_misread_is_refused(courier, pacs, stored):
    with pytest.raises(InvalidRequest, match="StudyID"):
        courier.studies(filters={"StudyID": "1"}).result(timeout_s=WAIT_S)
    assert pacs("studies", "--filter", "StudyID=1")[0] == 2
    assert pacs("studies", "--filter", "StudyID")[0] == 2
    assert pacs("studies", "--filter", "StudyID=1", "--server", "dcm4chee")[0] == 0


def test_a_list_never_ends_quietly_without_a_silent_server(courier, pacs, sandbox, stored):
    sandbox.set_fault("dcm4chee", "*", refuse=True)
    status, document, _ = pacs("studies")
    assert (status, document["complete"], len(document["studies"])) == (3, False, 3)
    assert document["servers"][1]["status"] == "unavailable"
    with pytest.raises(PacsUnavailable):
        list(walk(courier, timeout_s=WAIT_S))
