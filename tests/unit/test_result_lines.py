"""Each way in which a job of each task can end is one line that a person reads, and that names no patient."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from courier import results
from courier.errors import CourierError, from_payload
from courier.result_lines import Facts, facts_in, facts_of, shortened, shown_failure, shown_result, web_link
from worker.runtime.request import line_of

MSDICOM = {"server_name": "msdicom", "server_type": "msdicom"}
DCM4CHEE = {"server_name": "dcm4chee", "server_type": "dcm4chee"}
LINK = "https://viewer.example.org/?StudyInstanceUIDs=1.2.3&token=x"
PLACE = {"study_uid": "1.2.3", "viewer_url": LINK}


@pytest.mark.parametrize(
    ("result", "line"),
    [
        ({"operation": "upload", "job_id": "j", "status": "stored", **MSDICOM, **PLACE}, "stored on msdicom"),
        (
            {"operation": "upload", "status": "stored", **MSDICOM, **PLACE, "not_asked": ["dcm4chee"]},
            "stored on msdicom · not asked: dcm4chee",
        ),
        (
            {
                "operation": "exists",
                **MSDICOM,
                "servers": [
                    {**DCM4CHEE, "status": "unavailable", "study_uid": None, "viewer_url": None},
                    {**MSDICOM, "status": "found", **PLACE, "metadata": [{"x": "P^N"}]},
                ],
            },
            "no answer from dcm4chee, found on msdicom",
        ),
        (
            {"operation": "metadata", "level": "study", "servers": [{**MSDICOM, "status": "found", **PLACE}]},
            "metadata of the study found on msdicom",
        ),
        (
            {
                "operation": "delete",
                "servers": [
                    {**MSDICOM, "status": "deleted", "note": "P^N", **PLACE},
                    {**DCM4CHEE, "status": "refused", "note": "P^N"},
                ],
            },
            "deleted on msdicom, refused by dcm4chee",
        ),
        (
            {"operation": "delete", "servers": [{**MSDICOM, "status": "would_hide", **PLACE}]},
            "would hide on msdicom",
        ),
        (
            {"operation": "delete", "servers": [{**DCM4CHEE, "status": "not_asked", **PLACE}]},
            "not asked: dcm4chee",
        ),
        (
            {"operation": "download", "status": "downloaded", **MSDICOM, **PLACE, "instances": 1200},
            "downloaded from msdicom · 1,200 images",
        ),
        (
            {"operation": "download", "status": "already_there", **MSDICOM, **PLACE, "instances": 1},
            "already there from msdicom · 1 image",
        ),
        ({"operation": "trace", "present": ["msdicom"], **PLACE}, "traced · on msdicom"),
        ({"operation": "trace", "present": [], **PLACE}, "traced · on no server"),
    ],
)
def test_a_result_of_one_study_says_its_end_its_servers_the_study_and_the_link(
    result: dict[str, Any], line: str
) -> None:
    shown = shown_result(result)
    assert shown == f"{line} · study 1.2.3 · {LINK}"
    assert "P^N" not in shown


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (
            {
                "operation": "batch",
                "kind": "upload",
                "state": "done",
                "name": "P^N",
                "items": 3,
                "totals": {"stored": 2, "open": 0, "failed": 1},
                "servers": [{**MSDICOM, "stored": 2}, {**DCM4CHEE, "stored": 0}],
            },
            "upload batch done · 2 of 3 stored, 1 failed · msdicom, dcm4chee",
        ),
        (
            {
                "operation": "batch",
                "kind": "delete",
                "state": "running",
                "items": 5,
                "totals": {},
                "servers": [MSDICOM],
            },
            "delete batch running · 0 of 5 deleted · msdicom",
        ),
        (
            {"operation": "batch", "kind": "other", "state": "cancelled", "items": 5, "totals": {"kept": 1}},
            "other batch cancelled · 5 items, 1 kept",
        ),
        (
            {
                "operation": "delete_all",
                "status": "done",
                "items": 5,
                "servers": [{**MSDICOM, "deleted": 2, "refused": 1}, {**DCM4CHEE, "hidden": 1, "failed": 1}],
            },
            "deleted 3 of 5 studies, 1 hidden, 1 refused, 1 failed · msdicom, dcm4chee",
        ),
        (
            {"operation": "delete_all", "status": "planned", "items": 1, "servers": [MSDICOM]},
            "would delete 1 study · msdicom",
        ),
        ({"operation": "batch_chunk", "batch_id": "B", "pass": "apply", "chunk": 4}, "piece 4 of batch B (apply)"),
        (
            {"operation": "status", "servers": [{**MSDICOM, "status": "up", "note": "P^N"}] * 12},
            "msdicom up, " * 10 + "and 2 more",
        ),
        (
            {
                "operation": "storage",
                "servers": [{**MSDICOM, "status": "up"}, {**DCM4CHEE, "status": "not responding"}],
            },
            "msdicom up, dcm4chee not responding",
        ),
        ({"operation": "database", "servers": [{**MSDICOM, "status": "degraded"}]}, "msdicom degraded"),
        (
            {
                "operation": "list_studies",
                "studies": [{"patient_name": "P^N"}],
                "servers": [{**MSDICOM, "status": "more"}],
            },
            "listed 1 study · msdicom more",
        ),
        ({"operation": "list_studies", "studies": [], "servers": []}, "listed 0 studies"),
        (
            {"operation": "audit", "studies": 120, "split": 3, "servers": [{**MSDICOM, "studies": 120}]},
            "3 of 120 studies split · audited msdicom",
        ),
        ({"operation": "of the future", **MSDICOM}, "msdicom"),
        ({}, ""),
    ],
)
def test_a_result_of_many_things_says_how_many_became_what(result: dict[str, Any], line: str) -> None:
    assert shown_result(result) == line


def test_every_operation_that_has_a_result_has_a_line_of_its_own() -> None:
    kinds = [one for one in vars(results).values() if isinstance(one, type) and issubclass(one, results.Payload)]
    operations = {
        name
        for kind in kinds
        for name in get_args(kind.model_fields["operation"].annotation)
        if kind is not results.Payload
    }
    servers = [{**MSDICOM, "status": "up"}]
    silent = [name for name in operations if shown_result({"operation": name, "servers": servers}) == "msdicom"]
    assert (len(operations) > 10, silent) == (True, [])


@pytest.mark.parametrize("value", [None, 5, "x", [None, 5], {"a": 1}])
@pytest.mark.parametrize("operation", ["upload", "exists", "delete", "delete_all", "batch", "list_studies", "trace"])
def test_a_result_of_another_shape_breaks_no_line(operation: str, value: object) -> None:
    fields = ("servers", "totals", "studies", "present", "not_asked", "instances", "viewer_url")
    shown_result({"operation": operation, **dict.fromkeys(fields, value)})


@pytest.mark.parametrize(
    ("payload", "line"),
    [
        ({"code": "not_found", "message": "The study is nowhere."}, "refused (not_found): The study is nowhere."),
        (
            {"code": "pacs_rejected", "message": "No room.", "server_name": "msdicom"},
            "refused (pacs_rejected) on msdicom: No room.",
        ),
        ({"code": "cancelled", "message": "Before it began."}, "cancelled: Before it began."),
        ({"code": "pacs_unavailable", "message": "Silence."}, "dead letter (pacs_unavailable): Silence."),
        ({"code": "poisoned", "message": "Twice\nover."}, "dead letter (poisoned): Twice\\nover."),
    ],
)
def test_a_failure_says_whether_it_was_refused_its_code_the_server_and_why(payload: dict[str, Any], line: str) -> None:
    assert line_of(from_payload(payload)) == line


def test_every_error_of_ours_has_a_line_with_its_code() -> None:
    for kind in CourierError.subclasses():
        assert kind.code in line_of(kind("It went wrong."))
    assert line_of(ValueError("a patient's name")) == ""
    assert shown_failure({}, refused=True) == "refused (error): no reason was given"


@pytest.mark.parametrize(
    ("url", "link"),
    [
        (LINK, LINK),
        ("http://h:8080/a", "http://h:8080/a"),
        ("https://me:secret@viewer/a", "https://viewer/a"),
        ("javascript:alert(1)", ""),
        ("data:text/html,x", ""),
        ("//viewer/a", ""),
        ("https://", ""),
        ("https://viewer/\u202e1", ""),
        ("https://viewer/a\nb", ""),
        ("https://viewer/a b", ""),
        ("https://[viewer/a", ""),
        ("", ""),
    ],
)
def test_a_page_links_to_http_and_https_alone(url: str, link: str) -> None:
    assert web_link(url) == link
    shown = shown_result({"operation": "upload", **MSDICOM, "viewer_url": url})
    assert "secret" not in shown
    assert facts_in(shown).links == ((("", link),) if link else ())


def test_each_server_that_has_a_study_has_its_own_link() -> None:
    servers = [{**MSDICOM, **PLACE}, {**DCM4CHEE, **PLACE, "viewer_url": "https://other/1"}, {"server_name": "third"}]
    facts = facts_of({**MSDICOM, "servers": servers})
    assert facts == Facts(
        ("msdicom", "dcm4chee", "third"), "1.2.3", (("msdicom", LINK), ("dcm4chee", "https://other/1"))
    )


def test_a_line_is_shortened_for_a_column_and_read_again() -> None:
    uid = "1.2.826.0.1.3680043.8.498.12345678901234567890"
    line = shown_result({"operation": "upload", **MSDICOM, "study_uid": uid, "viewer_url": LINK})
    assert shortened(line) == "stored on msdicom · study 1.2.826.…34567890"
    assert facts_in(line) == Facts(study_uid=uid, links=(("", LINK),))
    assert shortened("refused (not_found): study 1.2.3 is nowhere") == "refused (not_found): study 1.2.3 is nowhere"
    assert facts_in("waiting for msdicom: see https://evil.example.org (other_job)") == Facts()
