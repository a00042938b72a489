"""Studies that are on more than one server, split on purpose over both PACS: by library, by command, as a plan."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

import pytest
import requests
from click.testing import CliRunner

from producer.audits import pages, whole
from producer.cli import main
from producer.errors import Cancelled, InvalidRequest, PacsUnavailable
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 30
ON = ("msdicom", "dcm4chee")


@dataclass(frozen=True)
class Splits:
    """Studies by how their copies overlap, and the images of each on each server."""

    equal: str
    partial: str
    disjoint: str
    images: dict[str, dict[str, list[str]]]


def listed_on(url, study):
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return sorted(ds["00080018"]["Value"][0] for ds in answer.json()) if answer.status_code == 200 else []


@pytest.fixture
def splits(steady, sandbox):
    """Three split studies and one whole study on each server, so that there is something to tell them from."""
    names = [new_uid() for _ in range(12)]
    studies = {kind: new_uid() for kind in ("equal", "partial", "disjoint", "ms", "dcm")}
    images = {
        studies["equal"]: {"msdicom": names[0:2], "dcm4chee": names[0:2]},
        studies["partial"]: {"msdicom": names[2:4], "dcm4chee": names[3:7]},
        studies["disjoint"]: {"msdicom": names[7:8], "dcm4chee": names[8:9]},
        studies["ms"]: {"msdicom": names[9:10]},
        studies["dcm"]: {"dcm4chee": names[10:12]},
    }
    for server in ON:
        bodies = [image(study, sop=sop) for study, on in images.items() for sop in on.get(server, [])]
        stow(getattr(sandbox, server), *bodies)
    return Splits(studies["equal"], studies["partial"], studies["disjoint"], images)


def differing(entry):
    return {tuple(group["servers"]): sorted(group["image_uids"]) for group in entry["only_on"]}


def test_split_studies_are_listed_with_the_images_that_differ(courier, pacs, splits):
    payload = courier.audit().result(timeout_s=WAIT_S)
    assert (payload["operation"], payload["studies"], payload["split"], payload["cursor"]) == ("audit", 5, 3, None)
    assert [(one["server_name"], one["server_type"], one["studies"]) for one in payload["servers"]] == [
        ("msdicom", "msdicom", 4),
        ("dcm4chee", "dcm4chee", 4),
    ]
    entries = {entry["study_uid"]: entry for entry in payload["entries"]}
    assert set(entries) == {splits.equal, splits.partial, splits.disjoint}
    found = {uid: (entry["overlap"], entry["images"], entry["keep"]) for uid, entry in entries.items()}
    assert found == {
        splits.equal: ("equal", 2, "msdicom"),
        splits.partial: ("partial", 5, "dcm4chee"),
        splits.disjoint: ("none", 2, "msdicom"),
    }
    for uid, entry in entries.items():
        on = splits.images[uid]
        assert {place["server_name"]: place["images"] for place in entry["servers"]} == {
            server: len(uids) for server, uids in on.items()
        }
        assert all(place["viewer_url"].endswith(uid) for place in entry["servers"])
        alone = {(a,): sorted(set(on[a]) - set(on[b])) for a, b in (ON, ON[::-1])}
        assert differing(entry) == {servers: uids for servers, uids in alone.items() if uids}

    status, document, _ = pacs("audit")
    assert (status, document["split"], document["entries"]) == (0, 3, payload["entries"])
    assert [page["entries"] for page in pages(courier, limit=1, timeout_s=WAIT_S)] == [
        [entry] for entry in payload["entries"]
    ]


def test_the_audit_is_a_table_a_csv_and_can_be_narrowed(pacs, splits):
    written = CliRunner().invoke(main, ["audit", "--csv"])
    rows = {row["study_uid"]: row for row in csv.DictReader(io.StringIO(written.stdout))}
    assert set(rows) == {splits.equal, splits.partial, splits.disjoint}
    partial = rows[splits.partial]
    assert (partial["servers"], partial["images_on"], partial["only_on"]) == (
        "msdicom dcm4chee",
        "2 4",
        "msdicom=1 dcm4chee=3",
    )
    shown = CliRunner().invoke(main, ["audit"], env={"COLUMNS": "200"})
    assert (shown.exit_code, splits.equal in shown.stdout) == (0, True)
    assert "3 of 5 studies" in shown.stderr
    narrowed = pacs("audit", "--filter", f"StudyInstanceUID={splits.equal}")[1]
    assert [entry["study_uid"] for entry in narrowed["entries"]] == [splits.equal]
    assert pacs("audit", "--server", "msdicom", "--server", "dcm4chee")[1]["split"] == 3
    assert pacs("audit", "--server", "msdicom")[0] == 2
    assert pacs("audit", "--server", "msdicom", "--server", "elsewhere")[0] == 2


def test_a_silent_server_is_never_a_clean_bill_of_health(courier, pacs, sandbox, splits, tmp_path):
    plan = tmp_path / "plan.jsonl"
    for operation in ("*", "query"):
        sandbox.set_fault("dcm4chee", operation, status=503)
        with pytest.raises(PacsUnavailable) as caught:
            courier.audit().result(timeout_s=WAIT_S)
        assert caught.value.server_name == "dcm4chee"
    status, document, said = pacs("audit", "--plan", str(plan))
    assert (status, document["error"]["code"], "entries" in document) == (3, "pacs_unavailable", False)
    assert "pacs_unavailable" in said
    assert list(tmp_path.iterdir()) == []
    sandbox.reset_faults()
    sandbox.set_fault("dcm4chee", "query", status=503, times=1)
    assert courier.audit().result(timeout_s=WAIT_S)["attempts"] == 2


def test_a_plan_says_what_would_make_every_study_whole_and_changes_nothing(pacs, sandbox, splits, tmp_path):
    before = {(server, uid): listed_on(getattr(sandbox, server), uid) for uid in splits.images for server in ON}
    plan = tmp_path / "plan.jsonl"
    status, _, said = pacs("audit", "--plan", str(plan))
    assert (status, "Nothing has been changed" in said) == (0, True)
    after = {(server, uid): listed_on(getattr(sandbox, server), uid) for uid in splits.images for server in ON}
    assert after == before

    header, *lines, end = [json.loads(line) for line in plan.read_text(encoding="utf-8").splitlines()]
    assert (header["manifest"], header["version"], header["servers"]) == ("pacs-courier/repair", 1, list(ON))
    assert "Nothing was changed by writing this file" in header["note"]
    assert end == {"end": True, "studies": 3, "copies": 2, "deletions": 5}
    by_study = {line["study_uid"]: line for line in lines}
    (equal, partial) = by_study[splits.equal], by_study[splits.partial]
    assert equal["steps"] == [
        {"do": "verify", "on": "msdicom", "images": 2},
        {"do": "delete", "level": "study", "on": "dcm4chee", "images": 2},
    ]
    assert partial["keep"] == "dcm4chee"
    (lonely,) = set(splits.images[splits.partial]["msdicom"]) - set(splits.images[splits.partial]["dcm4chee"])
    assert partial["steps"] == [
        {"do": "copy", "from": "msdicom", "to": "dcm4chee", "images": 1, "image_uids": [lonely]},
        {"do": "verify", "on": "dcm4chee", "images": 5},
        {"do": "delete", "level": "study", "on": "msdicom", "images": 2},
    ]

    written = plan.read_bytes()
    assert pacs("audit", "--plan", str(plan))[0] == 2
    assert pacs("audit", "--plan", str(tmp_path / "nowhere" / "plan.jsonl"))[0] == 2
    assert (plan.read_bytes(), list(tmp_path.iterdir())) == (written, [plan])


def test_differences_that_are_too_many_for_a_list_are_all_in_the_plan(courier, pacs, sandbox, steady, tmp_path):
    study, shared = new_uid(), new_uid()
    fewer, more = [new_uid() for _ in range(120)], [new_uid() for _ in range(121)]
    stow(sandbox.msdicom, *[image(study, sop=sop, side=8) for sop in (shared, *fewer)])
    stow(sandbox.dcm4chee, *[image(study, sop=sop, side=8) for sop in (shared, *more)])
    (entry,) = courier.audit().result(timeout_s=WAIT_S)["entries"]
    assert [group["images"] for group in entry["only_on"]] == [120, 121]
    assert sum(len(group["image_uids"]) for group in entry["only_on"]) == 100
    named = whole(courier, entry, timeout_s=WAIT_S)
    assert differing(named) == {("msdicom",): sorted(fewer), ("dcm4chee",): sorted(more)}
    plan = tmp_path / "plan.jsonl"
    assert pacs("audit", "--plan", str(plan))[0] == 0
    line = json.loads(plan.read_text(encoding="utf-8").splitlines()[1])
    assert line["keep"] == "dcm4chee"
    assert sorted(line["steps"][0]["image_uids"]) == sorted(fewer)


def test_an_audit_can_be_cancelled_between_two_pages(courier, sandbox, splits):
    sandbox.set_fault("msdicom", "query", latency_ms=700)
    handle = courier.audit()
    for _, report in courier.watch([handle], timeout_s=WAIT_S):
        if report.stage == "list":
            break
    assert handle.cancel()
    with pytest.raises(Cancelled):
        handle.result(timeout_s=WAIT_S)


def test_what_an_audit_cannot_be_asked_is_refused(courier, steady):
    with pytest.raises(InvalidRequest, match="limit"):
        courier.audit(limit=0)
    with pytest.raises(InvalidRequest, match="two"):
        courier.audit(["msdicom"]).result(timeout_s=WAIT_S)
