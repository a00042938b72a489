"""What the doctor says of the buckets that downloads may go to."""

from __future__ import annotations

from typing import Any, cast

import pytest

from courier.ledger.jobs import SCHEMA
from courier.settings import Settings
from producer.client import Courier
from producer.doctor import Finding, _places, _proxy, _server, _worker
from producer.errors import CourierError, PacsUnavailable, StillRunning


class StubCourier:
    """A `Courier` whose one job ends as it is told."""

    def __init__(self, end: dict[str, Any] | Exception) -> None:
        self.end = end
        self.job: dict[str, Any] = {}

    def enqueue(self, task: str, form: Any, job: dict[str, Any]) -> StubCourier:
        assert task == "pacs.status"
        self.job = form.model_validate(job).model_dump()
        return self

    def result(self, *, timeout_s: float) -> dict[str, Any]:
        assert timeout_s
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


def findings(end: dict[str, Any] | Exception) -> list[Finding]:
    asked = StubCourier(end)
    found = list(_places(cast(Courier, asked), "ward"))
    assert (asked.job["places"], asked.job["servers"]) == (True, ["ward"])
    return found


def test_a_bucket_is_well_if_its_store_prevents_overwriting_and_else_the_finding_says_what_to_do() -> None:
    entries = [
        {"place": "s3://a/", "overwrites": "prevented", "message": ""},
        {"place": "s3://b/", "overwrites": "not_prevented", "message": ""},
        {"place": "s3://c/", "overwrites": "unknown", "message": "s3://c/ cannot be written: no such bucket."},
    ]
    well, ignoring, unknown = findings({"servers": [], "places": entries})
    assert (well.check, well.state, well.advice) == ("place s3://a/", "ok", "")
    assert (ignoring.check, ignoring.state) == ("place s3://b/", "warning")
    assert "If-None-Match" in ignoring.advice
    assert (unknown.state, unknown.found) == ("warning", entries[2]["message"])
    assert "downloads.s3" in unknown.advice


@pytest.mark.parametrize("end", [StillRunning("j1"), PacsUnavailable("No.")])
def test_buckets_that_no_worker_could_probe_are_a_finding(end: CourierError) -> None:
    (finding,) = findings(end)
    assert (finding.check, finding.state) == ("places", "warning")
    assert finding.advice


def test_without_buckets_or_with_an_older_worker_there_is_no_finding() -> None:
    assert findings({"servers": [], "places": []}) == findings({"servers": []}) == []


def place(place: str, use: str, state: str, overwrites: str = "unknown", message: str = "") -> dict[str, Any]:
    return {
        "place": place,
        "use": use,
        "state": state,
        "overwrites": overwrites,
        "message": message,
        "host": "pod-1",
    }


@pytest.mark.parametrize(
    ("entry", "check", "state", "found", "advice"),
    [
        (place("file:///in/", "source", "usable"), "source file:///in/", "ok", "listed and read (tried on pod-1)", ""),
        (place("s3://in/", "source", "empty"), "source s3://in/", "ok", "nothing that could be read", ""),
        (place("az://o/", "download", "usable", "prevented"), "place az://o/", "ok", "can be written", ""),
        (place("s3://o/", "download", "usable", "not_prevented"), "place s3://o/", "warning", "not prevent", "If-None"),
        (
            place("s3://i/", "source", "unknown", message="No list."),
            "source s3://i/",
            "warning",
            "No list.",
            "sources.s3",
        ),
        (place("az://i/", "source", "refused", message="No."), "source az://i/", "failed", "No.", "sources.azure"),
        (
            place("file:///o/", "download", "refused", message="No."),
            "place file:///o/",
            "failed",
            "No.",
            "downloads.fold",
        ),
        (
            place("s3://o/", "download", "silent", message="No."),
            "place s3://o/",
            "unavailable",
            "No.",
            "address in downl",
        ),
    ],
)
def test_each_place_has_a_finding_of_its_own_that_says_who_tried_it_and_what_to_do(
    entry: dict[str, Any], check: str, state: str, found: str, advice: str
) -> None:
    (finding,) = findings({"servers": [], "places": [entry]})
    assert (finding.check, finding.state) == (check, state)
    assert found in finding.found
    assert "pod-1" in finding.found
    assert advice in finding.advice
    assert bool(finding.advice) is bool(advice)


NEW = {"version": "0.2.0", "schema": SCHEMA}


@pytest.mark.parametrize(
    ("said", "state", "words"),
    [
        ({}, "failed", "is of version 0.1: it cannot read what newer workers write, reads celery, batches, admin"),
        ({**NEW, "stopped_queues": []}, "ok", "gets on; version 0.2.0"),
        ({**NEW, "stopped_queues": ["celery", "admin"]}, "warning", "reads celery, admin no more"),
        ({**NEW, "stopped_queues": [], "complaint": "is late"}, "warning", "is late"),
        ({"ok": False, "complaint": "hangs"}, "failed", "is stuck: hangs"),
    ],
)
def test_a_worker_of_0_1_and_one_that_stopped_reading_an_old_queue_are_named(
    said: dict[str, Any], state: str, words: str
) -> None:
    finding = _worker("w@h", {"ok": True, "complaint": "", "every_s": 10.0, "at": 100.0, **said}, 110.0)
    assert (finding.state, words in finding.found, finding.state == "ok" or finding.advice != "") == (state, True, True)


def degraded(**more: Any) -> Finding:
    entry = {"server_name": "a", "status": "degraded", "latency_ms": 1.0, "error": None, "note": "", **more}
    return _server({"product": "unknown", "version": "unknown", **entry})


@pytest.mark.parametrize(
    "entry",
    [
        {"note": "GET /studies is no DICOMweb query there, it answered 404: check the server's url"},
        {"error": {"code": "pacs_misanswered", "message": "a answered 404 to GET /system: check the server's url."}},
    ],
    ids=["its own path", "a path beside it"],
)
def test_a_server_with_a_wrong_url_is_a_finding_that_says_what_to_correct(entry: dict[str, Any]) -> None:
    assert degraded(**entry).advice == "Correct its url."


def test_any_other_trouble_of_a_server_is_to_be_looked_for_there() -> None:
    assert degraded(note="its database is in trouble").advice == "Look at the server itself."


def test_with_a_proxy_the_check_of_addresses_rests_with_it_and_its_password_is_not_told() -> None:
    assert list(_proxy(Settings())) == []
    (finding,) = _proxy(Settings.model_validate({"sources": {"proxy": "http://u:hush-hush@proxy.example:3128"}}))
    assert (finding.check, finding.state) == ("sources.proxy", "warning")
    assert "addresses" in finding.found
    assert "hush-hush" not in str(finding.as_json())


def test_a_server_whose_root_lacks_resources_is_up_with_a_warning() -> None:
    told = {"server_name": "ward", "status": "up", "product": "unknown", "version": "unknown", "latency_ms": 3.0}
    entry = {**told, "note": "It answers queries.", "error": None, "rate_limit": None}
    assert _server(entry | {"warnings": []}).state == "ok"
    finding = _server(entry | {"warnings": ["Its root has no /instances."]})
    assert (finding.state, "no /instances" in finding.found, "study" in finding.advice) == ("warning", True, True)
    assert _server(entry).state == "ok", "of an older worker"
