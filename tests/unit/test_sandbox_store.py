from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.store import Condition, Duplicate, InstanceRow, NewInstance, Store, Tally, first_wins, latest_wins


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    held = Store(tmp_path)
    yield held
    held.close()


def new(study: str = "1", series: str = "1.1", sop: str = "1.1.1", **texts: str) -> NewInstance:
    def text(vr: str, value: str) -> dict[str, object]:
        return {"vr": vr, "Value": [value]} if value else {"vr": vr}

    return NewInstance(
        study_instance_uid=study,
        series_instance_uid=series,
        sop_instance_uid=sop,
        sop_class_uid="1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        study={"0020000D": text("UI", study), "00100020": text("LO", texts.get("patient_id", "P"))},
        series={"0020000E": text("UI", series), "00080060": text("CS", texts.get("modality", "CT"))},
        instance={"00080018": text("UI", sop)},
        received_at_s=100.0,
    )


def add(store: Store, instance: NewInstance, content: bytes = b"bytes") -> InstanceRow:
    spool = store.spool()
    spool.write(content)
    return store.add(instance, spool)


@pytest.mark.parametrize("size_bytes", [0, 10, 300_000])
def test_what_was_spooled_is_the_file_with_its_size_and_digest(store: Store, size_bytes: int) -> None:
    row = add(store, new(), b"x" * size_bytes)
    assert row.path.read_bytes() == b"x" * size_bytes
    assert row == store.by_sop("1.1.1")[0]
    assert row.size_bytes == size_bytes
    assert len(row.sha256) == 64


@pytest.mark.parametrize("size_bytes", [10, 300_000])
def test_a_discarded_spool_leaves_nothing(store: Store, size_bytes: int) -> None:
    spool = store.spool()
    spool.write(b"x" * size_bytes)
    assert (spool.source if isinstance(spool.source, bytes) else spool.source.read_bytes()) == b"x" * size_bytes
    spool.discard()
    assert [path for path in store.folder.rglob("*") if path.is_file() and "index" not in path.name] == []


def test_spools_left_behind_by_a_killed_process_are_cleared(store: Store) -> None:
    spool = store.spool()
    spool.write(b"x")
    left_behind = spool.path
    spool.close()
    again = Store(store.folder)
    again.close()
    assert not left_behind.exists()


def test_the_same_triple_is_a_duplicate_and_the_spool_stays_the_callers(store: Store) -> None:
    first = add(store, new())
    spool = store.spool()
    spool.write(b"other")
    with pytest.raises(Duplicate) as refusal:
        store.add(new(), spool)
    assert refusal.value.row == first
    assert spool.source == b"other"
    spool.discard()
    assert add(store, new(study="2")).key > first.key


def test_a_study_shows_its_newest_or_its_first_values_as_the_dialect_wants(tmp_path: Path) -> None:
    for merge, expected in ((latest_wins, "B"), (first_wins, "A")):
        store = Store(tmp_path / merge.__name__, merge=merge)
        for sop, patient_id in (("1", ""), ("2", "A"), ("3", "B"), ("4", "")):
            add(store, new(sop=sop, patient_id=patient_id))
        (found,) = store.search("study", [Condition("patient_id", "=", expected)])
        assert found.study["00100020"]["Value"] == [expected]
        store.close()


def test_a_study_is_seen_when_one_of_its_instances_is(store: Store) -> None:
    row = add(store, new())
    view = "rejection IS NULL"
    assert store.count("study", view=view) == 1
    store.reject([row.key], "113039^DCM")
    assert [store.count(level, view=view) for level in ("study", "series", "instance")] == [0, 0, 0]
    assert store.count("study") == 1
    store.reject([row.key], None)
    assert store.count("series", view=view) == 1


def test_searches_come_newest_first_in_pages(store: Store) -> None:
    for number in range(5):
        add(store, new(study=str(number), sop=f"{number}.1"))
    found = store.search("study", limit=2, offset=1)
    assert [hit.study_instance_uid for hit in found] == ["3", "2"]
    found = store.search("study", [Condition("study_instance_uid", "IN", ("1", "4"))], ascending=True)
    assert [hit.study_instance_uid for hit in found] == ["1", "4"]


def test_a_tally_counts_below_and_of_all(store: Store) -> None:
    add(store, new())
    add(store, new(sop="2"))
    add(store, new(series="1.2", sop="3", modality="MR"))
    add(store, new(study="2", sop="4"))
    assert store.tally("1") == Tally(1, 2, 3, 15, ("CT", "MR"))
    assert store.tally("1", "1.2") == Tally(1, 1, 1, 5, ("MR",))
    assert store.tally() == Tally(2, 3, 4, 20, ())


def test_deleting_forgets_at_once_and_frees_in_time(store: Store) -> None:
    gone, kept = add(store, new()), add(store, new(series="1.2", sop="2"))
    store.delete([gone], free_at_s=500)
    assert store.count("series") == 1
    assert gone.path.exists()
    assert store.waiting_bytes() == 5
    assert store.purge(499) == 0
    assert store.purge(500) == 5
    assert not gone.path.exists()
    store.delete([kept], free_at_s=500)
    assert [store.count(level) for level in ("study", "series", "instance")] == [0, 0, 0]
    assert add(store, new()).key > kept.key


def test_several_changes_are_one_or_none(store: Store) -> None:
    def fail_half_way() -> None:
        with store.transaction():
            add(store, new())
            store.note({"action": "Create"}, at_s=1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert store.count("study") == 0
    assert list(store.journal()) == []


def test_the_journal_is_kept_in_order(store: Store) -> None:
    numbers = [store.note({"n": n}, at_s=n) for n in range(3)]
    assert [entry for _, _, entry in store.journal()] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert store.last_note() == (numbers[-1], 2.0, {"n": 2})


def test_words_of_a_name_are_found_in_order_and_by_their_beginnings(store: Store) -> None:
    instance = new()
    instance.study["00100010"] = {"vr": "PN", "Value": [{"Alphabetic": "Stone^Jonathan^Hall"}]}
    add(store, instance)
    hits = {
        words: store.count("study", [Condition("patient_name", "WORDS", words)])
        for words in ("Jon", "Stone Jon", "Jonathan^Ha", "Hall Stone", "tone")
    }
    assert hits == {"Jon": 1, "Stone Jon": 1, "Jonathan^Ha": 1, "Hall Stone": 0, "tone": 0}


def test_a_reset_leaves_no_file_and_counts_from_one_again(store: Store) -> None:
    add(store, new())
    store.delete([add(store, new(sop="2"))], free_at_s=9e9)
    store.note({}, at_s=1)
    store.reset()
    assert [path for path in (store.folder / "files").rglob("*") if path.is_file()] == []
    assert (store.tally().instances, store.waiting_bytes(), store.last_note()) == (0, 0, None)
    assert add(store, new()).key == 1
