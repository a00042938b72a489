"""What programs of version 0.1 import and ask of `Courier`'s answers is found under the name that it had there."""

from __future__ import annotations

import importlib

import producer
from courier.batches.store import Batch
from courier.ledger.jobs import DeadLetter
from producer.dead_letters import DeadLetterClient


def test_the_client_its_handle_and_its_report_are_in_the_module_of_version_0_1():
    named = importlib.import_module("producer.courier")
    assert (named.Courier, named.Handle, named.Report) == (producer.Courier, producer.Handle, producer.Report)


def test_a_batch_says_its_concurrency_as_width_too():
    assert Batch("b", "done", "upload", concurrency=7).width == 7


def test_a_dead_letter_says_its_crash_count_as_deaths_too():
    letter = DeadLetter(
        "j", "pacs.upload", "", {}, attempts=5, crash_count=3, replays=0, created_ms=0, died_ms=0, begun=True, uids=[]
    )
    assert letter.deaths == 3


def test_the_history_of_a_dead_letter_is_its_trail_too():
    assert DeadLetterClient.trail is DeadLetterClient.history
