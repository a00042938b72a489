"""The part of redis-py that its manual does not name does what `courier.redis_internals` takes it to do."""

from __future__ import annotations

import fakeredis

from courier.redis_internals import ask_raw

RAW = b"\x9c\xff\x00 no text"


def test_ask_raw_depends_on_the_option_that_keeps_an_answer_from_being_decoded() -> None:
    client = fakeredis.FakeRedis(decode_responses=True)
    client.set("a", RAW)
    client.hset("b", "c", RAW)
    assert ask_raw(client, "GET", "a") == RAW
    assert ask_raw(client, "HGETALL", "b") in ([b"c", RAW], {b"c": RAW})
    client.set("text", "one")
    assert client.get("text") == "one", "the option holds for other commands, too"


def test_ask_raw_depends_on_a_pipeline_knowing_the_option() -> None:
    client = fakeredis.FakeRedis(decode_responses=True)
    client.set("a", RAW)
    client.set("text", "one")
    with client.pipeline(transaction=False) as pipe:
        ask_raw(pipe, "GET", "a")
        pipe.get("text")
        assert pipe.execute() == [RAW, "one"]
