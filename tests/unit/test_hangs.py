"""How often a server hung at a file, and when that is the file's fault, on fakeredis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import fakeredis
import pytest
import redis

from courier.errors import CourierError, PacsRejected, PacsUnavailable
from courier.ledger.jobs import PREFIX, Ledger
from courier.settings import ServerSettings
from sandbox.processes import poll
from worker.jobs import hangs as module
from worker.jobs.attempt import Attempt, Heartbeat
from worker.jobs.hangs import HANGS_IN_ANY_CASE, Hangs, PendingRequest
from worker.pacs.protocol import DatabaseState, Pacs, StorageState
from worker.pacs.transport import _noticed

KEY = f"{PREFIX}hangs:a"


class StubPacs:
    """A PACS as far as it is asked how it is."""

    server = ServerSettings(name="a", type="dicomweb", url="http://a", read_timeout_s=1)
    is_well = True

    def storage(self) -> StorageState:
        if not self.is_well:
            raise PacsUnavailable("No.")
        return StorageState()

    def database(self) -> DatabaseState:
        return DatabaseState(ok=None)


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def ledger(client: fakeredis.FakeRedis) -> Ledger:
    return Ledger(client)


@pytest.fixture
def attempt(ledger: Ledger) -> Attempt:
    return Attempt("j1", 1, 1, last=False, ledger=ledger)


PACS = cast(Pacs, StubPacs())


def note(ledger: Ledger, *files: str, times: int = 1) -> None:
    time.sleep(0.003)  # the times are milliseconds
    ledger.note_hang("a", files, times=times)


def given_up(attempt: Attempt, *files: str, seen: dict[str, int] | None = None, pacs: Pacs = PACS) -> dict[str, int]:
    return Hangs(attempt).given_up(pacs, files, seen)


def test_a_file_is_given_up_at_the_second_hang(attempt: Attempt, ledger: Ledger) -> None:
    assert given_up(attempt, "f", "g") == {}
    note(ledger, "f")
    assert given_up(attempt, "f", "g") == {}
    assert Hangs(attempt).counted(PACS, ["f", "g"]) == {"f": 1}
    note(ledger, "f")
    assert given_up(attempt, "f", "g") == {"f": 2}


def test_a_hang_that_was_none_is_taken_back(attempt: Attempt, ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    note(ledger, "f")
    note(ledger, "f")
    note(ledger, "f", times=-1)
    assert Hangs(attempt).counted(PACS, ["f"]) == {"f": 1}
    note(ledger, "f", times=-1)
    assert client.exists(KEY) == 0
    note(ledger, "f", times=-1)
    assert client.exists(KEY) == 0


def test_what_a_person_has_seen_does_not_count_again(attempt: Attempt, ledger: Ledger) -> None:
    for _ in range(3):
        note(ledger, "f")
    assert given_up(attempt, "f", seen={"f": 2}) == {}
    note(ledger, "f")
    assert given_up(attempt, "f", seen={"f": 2}) == {"f": 4}
    assert given_up(attempt, "f", seen={"f": 9}) == {}


def test_a_server_that_hangs_at_others_too_and_answers_nothing_is_to_blame_itself(
    attempt: Attempt, ledger: Ledger
) -> None:
    for _ in range(3):
        note(ledger, "f")
        note(ledger, "g")
    assert given_up(attempt, "f", "g") == {}
    ledger.note_answer("a")  # well again: what it hung at before is sent once more
    assert given_up(attempt, "f", "g") == {}


def test_a_server_that_answered_between_is_not_to_blame(attempt: Attempt, ledger: Ledger) -> None:
    note(ledger, "f")
    note(ledger, "g")
    time.sleep(0.003)
    ledger.note_answer("a")
    note(ledger, "f")
    note(ledger, "g")
    assert given_up(attempt, "f", "g") == {"f": 2, "g": 2}


def test_images_of_one_request_are_one_hang(attempt: Attempt, ledger: Ledger) -> None:
    note(ledger, "f", "g", "h")
    note(ledger, "f")
    assert given_up(attempt, "f", "g", "h") == {"f": 2}


def test_a_server_that_says_that_it_is_well_is_believed_in_the_end(attempt: Attempt, ledger: Ledger) -> None:
    for _ in range(HANGS_IN_ANY_CASE):
        note(ledger, "f")
        note(ledger, "g")
    sick = StubPacs()
    sick.is_well = False
    assert given_up(attempt, "f", pacs=cast(Pacs, sick)) == {}
    assert given_up(attempt, "f") == {"f": HANGS_IN_ANY_CASE}


def test_a_days_old_hang_counts_no_more(attempt: Attempt, ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    note(ledger, "f")
    count, first, last, proven = str(client.hget(KEY, "f")).split()
    day_ms = 86_400_001
    client.hset(KEY, "f", f"{count} {int(first) - day_ms} {int(last) - day_ms} {proven}")
    note(ledger, "g")
    assert Hangs(attempt).counted(PACS, ["f", "g"]) == {"g": 1}
    assert client.pttl(KEY) > 86_000_000


def test_where_no_server_hung_an_answer_is_not_noted(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    ledger.note_answer("a")
    assert client.exists(KEY) == 0


def push(attempt: Attempt, error: CourierError | None = None, *, meanwhile: Callable[[], None] = lambda: None) -> None:
    with Hangs(attempt).sending(PACS, lambda: ["f"]):
        assert list(_noticed([b"body"])) == [b"body"]
        meanwhile()
        if error is not None:
            raise error


def silence(**more: Any) -> PacsUnavailable:
    error = PacsUnavailable("No answer.", server_name="a", details={"phase": "answer"})
    error.hung = more.get("hung", True)
    return error


@pytest.mark.parametrize(
    ("error", "hangs"),
    [
        (silence(), 1),
        (silence(hung=False), 0),
        (PacsRejected("No.", server_name="a"), 0),
        (None, 0),
    ],
    ids=["silence", "a lost connection", "a refusal", "an answer"],
)
def test_only_silence_after_all_of_a_request_is_a_hang(
    attempt: Attempt, error: CourierError | None, hangs: int
) -> None:
    if error is None:
        push(attempt)
    else:
        with pytest.raises(type(error)):
            push(attempt, error)
    assert Hangs(attempt).counted(PACS, ["f"]) == ({"f": hangs} if hangs else {})
    assert attempt.sends == []


def test_a_worker_that_dies_while_it_waits_has_noted_the_hang(attempt: Attempt, ledger: Ledger) -> None:
    ledger.take("j1", task="t", job={})
    heartbeat = Heartbeat(ledger, lambda *_: None, beat_s=0.01)
    noted: list[bool] = []

    def wait() -> None:
        noted.append(poll(lambda: bool(ledger.hangs("a", ["f"])[1]), timeout_s=10))

    with heartbeat.keep_alive(attempt), pytest.raises(PacsUnavailable):
        push(attempt, silence(), meanwhile=wait)
    assert noted == [True], "it is there if the worker dies now"
    assert ledger.hangs("a", ["f"])[1]["f"].count == 1, "and the same hang is not counted twice"


def test_a_late_answer_takes_the_note_back(attempt: Attempt, ledger: Ledger) -> None:
    waiting = PendingRequest(ledger, "a", 0, lambda: ["f"])
    waiting.note_if_late()
    assert ledger.hangs("a", ["f"])[1] == {}, "not all of it has gone out"
    waiting.sent()
    waiting.note_if_late()
    waiting.note_if_late()
    assert ledger.hangs("a", ["f"])[1]["f"].count == 1
    waiting.end(hung=False, answered=True)
    assert ledger.hangs("a", ["f"])[1] == {}
    waiting.note_if_late()
    assert ledger.hangs("a", ["f"])[1] == {}


def test_what_is_sent_on_another_thread_is_not_this_requests(attempt: Attempt) -> None:
    called: list[int] = []
    with module.when_sent(lambda: called.append(1)):
        thread = threading.Thread(target=lambda: list(_noticed([b"x"])))
        thread.start()
        thread.join()
    assert called == []


def test_without_a_run_nothing_is_known_and_nothing_noted() -> None:
    with Hangs().sending(PACS, lambda: ["f"]):
        pass
    assert (Hangs().given_up(PACS, ["f"]), Hangs().counted(PACS, ["f"])) == ({}, {})
    Hangs().forget(PACS, {"f": 1})


def test_where_redis_is_away_the_answer_of_the_server_counts(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError

    monkeypatch.setattr(attempt.ledger, "_note_hang", lost)
    with pytest.raises(PacsUnavailable):
        push(attempt, silence())
    assert attempt.sends == []
