"""How the servers are, by library and by command, while they are well and while they are not."""

from __future__ import annotations

import pytest

from producer.errors import InvalidRequest

WAIT_S = 30


def by_name(payload):
    return {entry["server_name"]: entry for entry in payload["servers"]}


def test_servers_that_answer_are_up_with_what_they_say_of_themselves(courier, pacs):
    payload = courier.status().result(timeout_s=WAIT_S)
    assert (payload["operation"], list(by_name(payload))) == ("status", ["msdicom", "dcm4chee"])
    for entry in payload["servers"]:
        assert (entry["server_type"], entry["status"], entry["ready"]) == (entry["server_name"], "up", True)
        assert entry["latency_ms"] > 0
    status, document, _ = pacs("status", "--server", "dcm4chee")
    assert (status, list(by_name(document))) == (0, ["dcm4chee"])


def test_a_silent_server_is_an_answer_and_an_exit_status(courier, pacs, sandbox):
    sandbox.set_fault("msdicom", "*", refuse=True)
    entries = by_name(courier.status().result(timeout_s=WAIT_S))
    assert (entries["msdicom"]["status"], entries["dcm4chee"]["status"]) == ("not responding", "up")
    assert entries["msdicom"]["error"]["code"] == "pacs_unavailable"
    assert entries["msdicom"]["ready"] == "unknown"
    for command in ("status", "storage", "database"):
        status, document, _ = pacs(command)
        assert (status, by_name(document)["msdicom"]["status"]) == (3, "not responding")


def test_a_server_that_answers_with_an_error_is_degraded_and_not_silent(courier, sandbox):
    sandbox.set_fault("dcm4chee", "*", status=503)
    entry = by_name(courier.status().result(timeout_s=WAIT_S))["dcm4chee"]
    assert (entry["status"], entry["error"]["code"]) == ("degraded", "pacs_unavailable")


def test_storage_is_told_where_there_is_a_call_for_it_and_unknown_elsewhere(courier, pacs):
    entries = by_name(courier.storage().result(timeout_s=WAIT_S))
    assert (entries["msdicom"]["total_bytes"], entries["msdicom"]["free_bytes"]) == ("unknown", "unknown")
    assert 0 < entries["dcm4chee"]["free_bytes"] <= entries["dcm4chee"]["total_bytes"]
    assert pacs("storage")[0] == 0


def test_a_started_archive_with_a_broken_database_is_found_out(courier, pacs, sandbox):
    assert {entry["database"] for entry in courier.database().result(timeout_s=WAIT_S)["servers"]} == {"ok"}
    sandbox.set_fault("dcm4chee", "*", database_down=True)
    status, document, _ = pacs("database")
    assert (status, by_name(document)["dcm4chee"]["database"]) == (3, "failed")


def test_an_unknown_server_is_refused_with_the_known_ones(courier, pacs):
    with pytest.raises(InvalidRequest, match="msdicom, dcm4chee"):
        courier.status(["elsewhere"]).result(timeout_s=WAIT_S)
    assert pacs("status", "--server", "elsewhere")[0] == 2
    assert pacs("status", "--watch", "-1")[0] == 2
