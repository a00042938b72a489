"""The first image of a study alone: what waits, what does not, and for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.pacs.study_turns import StudyTurns

TIMEOUT_S = 10


class Requests:
    """Requests that stay in their studies for a moment; the most that were in one at once before it was begun."""

    def __init__(self) -> None:
        self.turns = StudyTurns(wait_s=TIMEOUT_S)
        self.most = 0
        self._inside: list[Collection[str]] = []
        self._begun: set[str] = set()
        self._lock = threading.Lock()

    def send(self, studies: Collection[str], *, is_stored: bool = True) -> None:
        with self.turns.turn(studies):
            with self._lock:
                self._inside.append(studies)
                for study in set(studies) - self._begun:
                    self.most = max(self.most, sum(study in one for one in self._inside))
            time.sleep(0.01)
            with self._lock:
                self._inside.remove(studies)
                self._begun |= set(studies) if is_stored else set()
            if is_stored:
                self.turns.begun(studies)


def both_at_once(turns: StudyTurns, first: Collection[str], second: Collection[str]) -> None:
    """Two requests that end only when both are inside; fails if one waits for the other."""
    both = threading.Barrier(2, timeout=TIMEOUT_S)

    def send(studies: Collection[str]) -> None:
        with turns.turn(studies):
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send, [first, second]))


def test_while_a_study_has_no_image_requests_into_it_never_meet() -> None:
    requests = Requests()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: requests.send(["1.1"], is_stored=number == 11), range(12)))
    assert requests.most == 1


def test_requests_into_several_new_studies_wait_for_each_of_them_and_never_for_ever() -> None:
    requests = Requests()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(requests.send, [("1.1", "1.2"), ("1.2", "1.3"), ("1.3", "1.1"), ("1.2", "1.1")] * 4))
    assert requests.most == 1


def test_requests_into_a_study_that_has_an_image_meet() -> None:
    turns = StudyTurns()
    turns.begun(["1.1"])
    both_at_once(turns, ["1.1"], ["1.1"])


def test_requests_into_different_new_studies_meet() -> None:
    both_at_once(StudyTurns(), ["1.1"], ["1.2"])


def test_who_waits_goes_on_as_soon_as_the_first_image_is_stored() -> None:
    turns, began_s = StudyTurns(wait_s=TIMEOUT_S), time.monotonic()
    with turns.turn(["1.1"]):
        turns.begun(["1.1"])
        with turns.turn(["1.1"]):
            assert time.monotonic() - began_s < 1


def test_a_first_request_that_fails_makes_room_for_the_next() -> None:
    turns = StudyTurns(wait_s=TIMEOUT_S)
    with pytest.raises(RuntimeError), turns.turn(["1.1"]):
        raise RuntimeError("the server is gone")
    began_s = time.monotonic()
    with turns.turn(["1.1"]):
        assert time.monotonic() - began_s < 1


def test_a_request_that_has_waited_long_goes_all_the_same_and_takes_nothing_from_the_one_inside() -> None:
    turns = StudyTurns(wait_s=0.05)
    with turns.turn(["1.1"]):
        with turns.turn(["1.1", "1.2"]):
            pass
        began_s = time.monotonic()
        with turns.turn(["1.1"]):
            assert time.monotonic() - began_s >= 0.05, "the first request is still inside"


def test_of_many_studies_the_latest_are_remembered() -> None:
    turns = StudyTurns(wait_s=0.05, remembered=2)
    for studies in (["1.1"], ["1.2"], ["1.1"], ["1.3"]):
        turns.begun(studies)
    both_at_once(turns, ["1.1"], ["1.3", "1.1"])
    with turns.turn(["1.2"]):
        began_s = time.monotonic()
        with turns.turn(["1.2"]):
            assert time.monotonic() - began_s >= 0.05, "it is begun anew"
