"""What an audit concludes from the UIDs that servers list; how it goes through long or odd lists."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from courier.errors import InvalidRequest, NotFound, PacsMisanswered, PacsUnavailable
from worker.jobs.attempt import Attempt
from worker.jobs.audit import PAGE, audit, overlap
from worker.jobs.services import Services
from worker.jobs.uid_index import UidIndex
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Found, StudyPage

STUDY = "0020000D"


class ListedPacs:
    """A server that has studies and their images, as UIDs. ``pages`` says how many studies it gives at a time."""

    def __init__(self, name: str, studies: Mapping[str, list[str]], *, pages: int = 2, paging: bool = True) -> None:
        self.server = SimpleNamespace(name=name, type="dicomweb", viewer="http://view/{study}", deletions="allow")
        self.has, self.pages, self.paging, self.silent = dict(studies), pages, paging, False

    def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        if self.silent:
            raise PacsUnavailable("silent", server_name=self.server.name)
        begin = offset if self.paging else 0
        uids = list(self.has)[begin : begin + min(limit, self.pages)]
        datasets = [{STUDY: {"vr": "UI", "Value": [uid]}} for uid in uids]
        return StudyPage(datasets, next_offset=offset + len(uids) if uids else None)

    def find(self, level: str, uid: str) -> list[Found]:
        return [Found("study", uid)] if uid in self.has else []

    def instances(self, found: Found) -> Iterator[Found]:
        for uid in self.has[found.study_instance_uid]:
            yield Found("image", found.study_instance_uid, "1.2", uid)


class StubLedger:
    """Lets the run go on."""

    def write_intent(self, *_: Any, **__: Any) -> bool:
        return True


def audited(*servers: ListedPacs, **job: Any) -> dict[str, Any]:
    attempt = Attempt(job_id="job", fence=1, number=1, last=True, ledger=StubLedger())  # type: ignore[arg-type]
    fleet = Fleet(servers)  # type: ignore[arg-type]
    try:
        return audit(job, attempt, Services(None, None, None, fleet))  # type: ignore[arg-type]
    finally:
        fleet.close()


def two(first: Mapping[str, list[str]], second: Mapping[str, list[str]]) -> tuple[ListedPacs, ListedPacs]:
    return ListedPacs("a", first), ListedPacs("b", second)


def test_only_studies_on_more_than_one_server_are_entries_and_all_are_counted() -> None:
    result = audited(*two({"1.1": ["1"], "1.2": ["2"], "1.3": ["3"]}, {"1.3": ["3"], "1.4": ["4"]}))
    assert (result["studies"], result["split"], result["cursor"]) == (4, 1, None)
    assert [(server["server_name"], server["studies"]) for server in result["servers"]] == [("a", 3), ("b", 2)]
    (entry,) = result["entries"]
    assert (entry["study_uid"], entry["overlap"], entry["images"], entry["only_on"]) == ("1.3", "equal", 1, [])
    assert entry["servers"][1]["viewer_url"] == "http://view/1.3"


@pytest.mark.parametrize(
    ("first", "second", "expected", "keep", "only_on"),
    [
        (["1", "2"], ["1", "2"], "equal", "a", {}),
        (["1", "2"], ["2", "1", "2"], "equal", "a", {}),
        (["1", "2"], ["2", "3", "4"], "partial", "b", {"a": ["1"], "b": ["3", "4"]}),
        (["1"], ["1", "2"], "partial", "b", {"b": ["2"]}),
        (["1", "3"], ["2", "4"], "none", "a", {"a": ["1", "3"], "b": ["2", "4"]}),
    ],
)
def test_copies_are_told_by_their_images(
    first: list[str], second: list[str], expected: str, keep: str, only_on: dict[str, list[str]]
) -> None:
    (entry,) = audited(*two({"1.1": first}, {"1.1": second}))["entries"]
    assert (entry["overlap"], entry["keep"]) == (expected, keep)
    assert {group["servers"][0]: group["image_uids"] for group in entry["only_on"]} == only_on


def test_of_three_servers_each_set_that_has_some_images_alone_is_a_group() -> None:
    servers = [
        ListedPacs(name, {"1.1": uids})
        for name, uids in {"a": ["1", "2"], "b": ["1", "2", "3"], "c": ["1", "4"]}.items()
    ]
    (entry,) = audited(*servers)["entries"]
    groups = {tuple(group["servers"]): group["image_uids"] for group in entry["only_on"]}
    assert groups == {("a", "b"): ["2"], ("b",): ["3"], ("c",): ["4"]}
    assert (entry["overlap"], entry["keep"], entry["images"]) == ("partial", "b", 4)
    assert overlap(["a", "b"], [(["a", "b"], 3)]) == "equal"


def test_split_studies_come_in_pages_that_end_and_miss_none() -> None:
    both = {f"1.{number}": ["1"] for number in range(23)}
    seen, cursor = [], None
    for _ in range(10):
        page = audited(*two(both, both), limit=5, cursor=cursor)
        seen += [entry["study_uid"] for entry in page["entries"]]
        assert (page["split"], len(page["entries"]) <= 5) == (23, True)
        cursor = page["cursor"]
        if cursor is None:
            break
    assert sorted(seen) == sorted(both)
    assert len(set(seen)) == len(seen)


def test_long_differences_are_cut_with_their_total_and_come_by_pages_of_one_study() -> None:
    servers = two({"1.1": [f"5.{n}" for n in range(250)]}, {"1.1": ["6.1", "6.2"]})
    (entry,) = audited(*servers)["entries"]
    assert [(group["images"]) for group in entry["only_on"]] == [250, 2]
    assert sum(len(group["image_uids"]) for group in entry["only_on"]) == 100
    seen: list[str] = []
    cursor = None
    for _ in range(10):
        page = audited(*servers, study_uid="1.1", limit=60, cursor=cursor)
        seen += [uid for group in page["entries"][0]["only_on"] for uid in group["image_uids"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert sorted(seen) == sorted([f"5.{n}" for n in range(250)] + ["6.1", "6.2"])


def test_one_study_is_found_or_not_or_whole_on_one_server() -> None:
    servers = two({"1.1": ["1"]}, {"1.2": ["2"]})
    assert audited(*servers, study_uid="1.1")["entries"] == []
    with pytest.raises(NotFound):
        audited(*servers, study_uid="1.9")


def test_a_study_that_went_meanwhile_is_no_entry() -> None:
    assert audited(*two({"1.1": ["1"]}, {"1.1": []}))["entries"] == []


def test_a_silent_server_leaves_no_result() -> None:
    servers = two({"1.1": ["1"]}, {"1.1": ["1"]})
    servers[1].silent = True
    with pytest.raises(PacsUnavailable):
        audited(*servers)


def test_a_server_that_does_not_page_is_read_once_if_that_was_all_and_refused_if_not() -> None:
    short = ListedPacs("a", {f"1.{n}": ["1"] for n in range(5)}, pages=PAGE, paging=False)
    assert audited(short, ListedPacs("b", {"1.2": ["1"]}))["split"] == 1
    long = ListedPacs("a", {f"1.{n}": ["1"] for n in range(PAGE + 1)}, pages=PAGE, paging=False)
    with pytest.raises(PacsMisanswered, match="same page"):
        audited(long, ListedPacs("b", {}))


def test_an_audit_needs_two_servers() -> None:
    servers = two({}, {})
    for names in (["a"], ["a", "a"]):
        with pytest.raises(InvalidRequest, match="two"):
            audited(*servers, servers=names)
    with pytest.raises(InvalidRequest, match="configured are: a, b"):
        audited(*servers, servers=["a", "c"])
    assert audited(*servers)["split"] == 0


def test_what_was_seen_is_counted_once_however_often_it_is_noted() -> None:
    uids = [f"1.{n}" for n in range(50)]
    with UidIndex(["a", "b", "c"]) as seen:
        assert seen.note("a", uids) == 50
        assert seen.note("a", random.Random(1).sample(uids, 20)) == 0
        assert seen.note("c", ["1.7", "1.7", "1.8", "9"]) == 3
        assert seen.groups() == [(["a"], 48), (["c"], 1), (["a", "c"], 2)]
        assert seen.shared(after="1.7", limit=5) == [("1.8", ["a", "c"])]
        assert seen.missing_somewhere(["a", "c"], after="1.48", limit=2) == [("1.49", ["a"]), ("1.5", ["a"])]


def test_memory_stays_flat_however_many_studies_there_are() -> None:
    class Endless(ListedPacs):
        def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
            uids = (f"2.25.{10**37 + number}" for number in range(offset, min(offset + limit, 40_000)))
            datasets = [{STUDY: {"vr": "UI", "Value": [uid]}} for uid in uids]
            return StudyPage(datasets, next_offset=offset + limit if datasets else None)

    tracemalloc.start()
    try:
        result = audited(Endless("a", {}), ListedPacs("b", {}))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (result["studies"], result["split"]) == (40_000, 0)
    assert peak_bytes < 4_000_000, "40,000 UIDs in a set would take more than 5 MB"
