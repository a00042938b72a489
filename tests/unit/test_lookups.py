"""Whom to believe when servers say different things, or nothing: `find_on_servers`, `settle`, what is shown of it."""

from __future__ import annotations

import pytest

from courier.errors import InvalidRequest, NotFound, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import ServerSettings, Settings
from worker.jobs import lookup
from worker.jobs.attempt import Attempt
from worker.jobs.lookup import exists, find_on_servers, metadata, settle
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Found

HERE = Found("study", "1.2")
DATASET = {"00080018": {"vr": "UI", "Value": ["1.2.3"]}, "00100020": {"vr": "LO", "Value": ["7"]}}


class Answering:
    """A server that answers as it is told to."""

    def __init__(self, name, found, described=(DATASET,)):
        self.server = ServerSettings(name=name, type="dicomweb", url="http://host/dicom", viewer="http://v/{study}")
        self._found = found
        self._described = described

    def find(self, level, uid):
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def metadata(self, found):
        if isinstance(self._described, Exception):
            raise self._described
        return list(self._described)


def silence(name):
    return PacsUnavailable("silence", server_name=name)


def ask(work, *servers, mode="either", **results):
    services = Services(Settings.model_validate({"results": results}), ledger=None, sources=None, fleet=Fleet(servers))
    return work({"level": "study", "uid": "1.2", "mode": mode}, Attempt("j", 1, 1, last=False, ledger=None), services)


# What a says, what b says, the mode; who has it, or how it ends. S: silent, Y: has it, N: has it not.
@pytest.mark.parametrize(
    ("first", "second", "mode", "end"),
    [
        ("Y", "Y", "either", "a"),
        ("N", "Y", "either", "b"),
        ("S", "Y", "either", "b"),
        ("Y", "S", "either", "a"),
        ("N", "N", "either", NotFound),
        ("N", "S", "either", PacsUnavailable),
        ("S", "N", "either", PacsUnavailable),
        ("Y", "S", "both", "a"),
        ("N", "S", "both", PacsUnavailable),
        ("N", "N", "both", NotFound),
        ("N", "Y", "a", NotFound),
        ("S", "Y", "a", PacsUnavailable),
        ("N", "Y", "b", "b"),
        ("Y", "Y", "c", InvalidRequest),
    ],
)
def test_silence_is_never_read_as_not_there(first, second, mode, end):
    said = {"Y": lambda _: [HERE], "N": lambda _: [], "S": silence}
    fleet = Fleet([Answering("a", said[first]("a")), Answering("b", said[second]("b"))])

    def asked():
        return settle("study", "1.2", find_on_servers("study", "1.2", mode=mode, fleet=fleet)).pacs.server.name

    if isinstance(end, str):
        assert asked() == end
    else:
        with pytest.raises(end):
            asked()


def test_the_first_silent_server_is_the_one_that_is_named():
    with pytest.raises(PacsUnauthorized):
        ask(exists, Answering("a", PacsUnauthorized("no")), Answering("b", silence("b")))


def test_both_shows_every_entry_and_that_the_study_is_split():
    payload = ask(exists, Answering("a", [HERE]), Answering("b", [HERE]), Answering("c", silence("c")), mode="both")
    assert [entry["status"] for entry in payload["servers"]] == ["found", "found", "unavailable"]
    assert payload["servers"][2]["error"] == {"code": "pacs_unavailable", "message": "silence"}
    assert payload["warnings"] == ["study_split"]


def test_one_uid_for_two_objects_is_shown_as_such():
    payload = ask(exists, Answering("a", [HERE, Found("study", "1.3")]))
    assert [place["study_uid"] for place in payload["servers"][0]["also_in"]] == ["1.3"]
    assert payload["warnings"] == ["uid_not_unique"]


@pytest.mark.parametrize(("allowed", "shown"), [("full", {"00080018", "00100020"}), ("uids", {"00080018"})])
def test_metadata_are_as_full_as_the_site_allows(allowed, shown):
    (dataset,) = ask(metadata, Answering("a", [HERE]), metadata=allowed)["servers"][0]["metadata"]
    assert set(dataset) == shown


def test_a_site_that_wants_no_metadata_in_results_asks_for_none():
    payload = ask(metadata, Answering("a", [HERE], described=AssertionError("was asked")), metadata="none")
    assert payload["servers"][0]["metadata"] == []


def test_metadata_too_long_for_a_result_are_cut_down_to_uids(monkeypatch):
    monkeypatch.setattr(lookup, "MAX_METADATA_BYTES", 50)
    payload = ask(metadata, Answering("a", [HERE]))
    assert payload["servers"][0]["metadata"] == [{"00080018": DATASET["00080018"]}]
    assert payload["warnings"] == ["metadata_reduced_to_uids"]


def test_who_cannot_describe_it_is_told_beside_who_can_and_retried_if_nobody_can():
    mute = Answering("a", [HERE], described=silence("a"))
    payload = ask(metadata, mute, Answering("b", [HERE]), mode="both")
    assert [(entry["status"], entry["metadata"] is None) for entry in payload["servers"]] == [
        ("found", True),
        ("found", False),
    ]
    assert payload["servers"][0]["error"]["code"] == "pacs_unavailable"
    with pytest.raises(PacsUnavailable):
        ask(metadata, mute)
    with pytest.raises(PacsMisanswered):
        ask(metadata, Answering("a", [HERE], described=()))
