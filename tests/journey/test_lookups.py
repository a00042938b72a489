"""Who has it, and what does it say of itself: by library and by command, with servers that fall silent."""

from __future__ import annotations

import pytest

from producer.errors import InvalidRequest, InvalidUid, NotFound, PacsUnavailable
from sandbox.synthetic import image, new_uid

WAIT_S = 30


def statuses(payload):
    return {entry["server_name"]: entry["status"] for entry in payload["servers"]}


def test_an_object_of_any_level_is_found_by_its_uid_alone(courier, pacs, sandbox, put):
    study, series, sop = new_uid(), new_uid(), new_uid()
    put(sandbox.dcm4chee, image(study, series=series, sop=sop))
    for level, uid, parents in (
        ("image", sop, (study, series, sop)),
        ("series", series, (study, series, None)),
        ("study", study, (study, None, None)),
    ):
        payload = courier.exists(level, uid).result(timeout_s=WAIT_S)
        entry = payload["servers"][-1]
        assert (payload["operation"], payload["exists"], payload["level"]) == ("exists", True, level)
        assert (payload["server_name"], payload["server_type"]) == ("dcm4chee", "dcm4chee")
        assert statuses(payload) == {"msdicom": "not_there", "dcm4chee": "found"}
        assert (entry["study_uid"], entry["series_uid"], entry["image_uid"]) == parents
        assert entry["viewer_url"].endswith(study)
        assert entry["metadata"] is None
    status, document, _ = pacs("exists", "image", sop, "--mode", "both")
    assert (status, statuses(document)) == (0, {"msdicom": "not_there", "dcm4chee": "found"})


def test_metadata_are_those_of_every_image_below(courier, pacs, sandbox, put):
    study = new_uid()
    sops = {new_uid(), new_uid()}
    for sop in sops:
        put(sandbox.msdicom, image(study, sop=sop))
    payload = courier.metadata("study", study).result(timeout_s=WAIT_S)
    (entry,) = payload["servers"]
    assert {ds["00080018"]["Value"][0] for ds in entry["metadata"]} == sops
    status, document, _ = pacs("metadata", "image", min(sops), "--server", "msdicom")
    assert (status, document["operation"], len(document["servers"][0]["metadata"])) == (0, "metadata", 1)
    asked = courier.exists("study", study, metadata=True).result(timeout_s=WAIT_S)
    assert len(asked["servers"][0]["metadata"]) == 2


def test_either_takes_the_first_in_order_and_both_shows_a_split(courier, sandbox, put):
    study = new_uid()
    put(sandbox.msdicom, image(study))
    put(sandbox.dcm4chee, image(study))
    assert statuses(courier.exists("study", study).result(timeout_s=WAIT_S)) == {"msdicom": "found"}
    both = courier.exists("study", study, mode="both").result(timeout_s=WAIT_S)
    assert statuses(both) == {"msdicom": "found", "dcm4chee": "found"}
    assert both["warnings"] == ["study_split"]


def test_what_is_nowhere_is_not_found_only_if_everybody_answered(courier, pacs, sandbox):
    nowhere = new_uid()
    with pytest.raises(NotFound) as caught:
        courier.exists("study", nowhere).result(timeout_s=WAIT_S)
    assert caught.value.details["asked"] == ["msdicom", "dcm4chee"]
    sandbox.set_fault("dcm4chee", "*", refuse=True)
    for mode in ("either", "both", "dcm4chee"):
        with pytest.raises(PacsUnavailable) as silent:
            courier.exists("image", nowhere, mode=mode).result(timeout_s=WAIT_S)
        assert silent.value.server_name == "dcm4chee"
    status, document, _ = pacs("exists", "image", nowhere)
    assert (status, document["error"]["code"]) == (3, "pacs_unavailable")
    status, document, _ = pacs("exists", "image", nowhere, "--server", "msdicom")
    assert (status, document["error"]["code"], document["error"]["server_name"]) == (1, "not_found", "msdicom")


def test_a_silent_server_does_not_hide_what_another_has(courier, sandbox, put):
    study = new_uid()
    put(sandbox.dcm4chee, image(study))
    sandbox.set_fault("msdicom", "*", refuse=True)
    for mode in ("either", "both"):
        payload = courier.metadata("study", study, mode=mode).result(timeout_s=WAIT_S)
        assert statuses(payload) == {"msdicom": "unavailable", "dcm4chee": "found"}
        assert payload["servers"][0]["error"]["code"] == "pacs_unavailable"
        assert payload["server_name"] == "dcm4chee"


def test_a_server_that_recovers_answers_the_open_question(courier, sandbox, put):
    study = new_uid()
    put(sandbox.msdicom, image(study))
    sandbox.set_fault("msdicom", "query", status=500, times=1)
    assert courier.exists("study", study).result(timeout_s=WAIT_S)["server_name"] == "msdicom"


def test_wrong_orders_are_refused_with_what_would_be_right(courier, pacs):
    with pytest.raises(InvalidUid):
        courier.exists("study", "1.2.*")
    with pytest.raises(InvalidRequest, match="level"):
        courier.exists("patient", "1.2")
    with pytest.raises(InvalidRequest, match="both, either, msdicom, dcm4chee"):
        courier.exists("study", "1.2", mode="all").result(timeout_s=WAIT_S)
    assert pacs("exists", "study", "1.2.*")[0] == 2
    assert pacs("exists", "patient", "1.2")[0] == 2
    assert pacs("exists", "study", "1.2", "--server", "elsewhere")[0] == 2
    plain = courier._app.send_task("pacs.exists", kwargs={"job": {"level": "study", "uid": "*", "mode": "both"}})
    with pytest.raises(InvalidUid):
        courier.handle(plain.id).result(timeout_s=WAIT_S)
