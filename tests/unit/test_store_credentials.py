"""Whose trouble a store's refusal is: the credential's, a bucket's, an object's; two processes on one fakeredis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import fakeredis
import pytest
import redis

from courier.errors import (
    CourierError,
    PacsRejected,
    SourceDenied,
    SourceNotFound,
    SourceTruncated,
    SourceUnauthorized,
    SourceUnreachable,
)
from courier.ledger.breakers import BREAKER, Breakers, BreakerState
from courier.settings import PREFIX, BreakerSettings
from worker.storage.credentials import FRESH_S, StoreCredential
from worker.storage.refusals import check_refusal

SETTINGS = BreakerSettings(failures=3, pause_s=60, pause_cap_s=600)
WHOLE, IMAGES = "credential:sources.s3", "credential:sources.s3/images"


@dataclass
class StoreRules:
    """A bucket's or account's rules: what it answers for an object, by code; "" is yes."""

    answers: dict[str, str] = field(default_factory=dict)
    everything: str = ""

    def ask(self, name: str) -> None:
        code = self.everything or self.answers.get(name, "")
        if code == "NoSuchKey":
            raise SourceNotFound(f"{name} is not there.")
        if code == "SlowDown":
            raise SourceUnreachable(f"{name} cannot be had at present.")
        if code:
            status = 400 if code == "ExpiredToken" else 403
            check_refusal(code, status, name, of="sources.s3", verb="read", denied=SourceDenied)


@dataclass
class StoreProcess:
    client: fakeredis.FakeRedis
    store: StoreRules
    now_s: float = 0.0
    renewed: int = 0
    asked: list[str] = field(default_factory=list)
    credential: StoreCredential = field(init=False)

    def __post_init__(self) -> None:
        def renew() -> None:
            self.renewed += 1

        breakers = Breakers(self.client, SETTINGS)
        self.credential = StoreCredential("sources.s3", breakers, renew=renew, clock=lambda: self.now_s)

    def read(self, name: str, bucket: str = "images", during: Callable[[], object] | None = None) -> str:
        """Ask for an object; "" if it came, else the code of our error, with a question mark if the job waits."""
        self.now_s += FRESH_S * 2
        url = f"{bucket}/{name}"
        try:
            with self.credential.asking(f"s3://{url}", bucket) as asking:
                self.asked.append(url)
                if during:
                    during()
                self.store.ask(url)
                asking.accepted(lambda: self.store.ask(url))
        except CourierError as error:
            self.error = error
            return error.code + ("?" if error.open_circuit else "")
        return ""

    def state(self, name: str = WHOLE) -> str:
        return Breakers(self.client, SETTINGS).read([name])[name].name


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def one(client: fakeredis.FakeRedis) -> StoreProcess:
    return StoreProcess(client, StoreRules())


@pytest.fixture
def two(client: fakeredis.FakeRedis, one: StoreProcess) -> StoreProcess:
    return StoreProcess(client, one.store)


def half_open(client: fakeredis.FakeRedis, name: str = WHOLE) -> None:
    client.hset(f"{PREFIX}{BREAKER}{name}", "until_ms", 0)


@pytest.mark.parametrize(
    "code", ["ExpiredToken", "RequestTimeTooSkewed", "InvalidAccessKeyId", "SignatureDoesNotMatch"]
)
def test_a_refused_credential_is_used_by_no_process_until_it_is_tested_again(
    one: StoreProcess, two: StoreProcess, client: fakeredis.FakeRedis, code: str
) -> None:
    one.store.everything = code
    assert one.read("a") == "source_unauthorized?"
    assert code in one.error.message
    assert one.renewed == 1
    assert two.read("b", "other") == one.read("c") == "source_unauthorized?"
    assert two.error.message == (
        f"s3://other/b is not asked for: the credential of sources.s3 was refused (circuit breaker open) with {code};"
        " correct the credential, and jobs go on once the store accepts it."
    )
    assert (two.asked, one.asked) == ([], ["images/a"])
    one.store.everything = ""
    half_open(client)
    assert two.read("b") == one.read("a") == ""
    assert one.state() == "closed"


def test_one_object_that_is_denied_is_refused_while_others_of_its_bucket_are_read(one: StoreProcess) -> None:
    one.store.answers["images/secret"] = "AccessDenied"
    assert one.read("a") == ""
    assert [one.read("secret") for _ in range(10)] == ["source_denied"] * 10
    assert one.read("b") == ""
    assert (one.state(), one.state(IMAGES), one.renewed) == ("closed", "closed", 0)


def test_a_signature_that_is_wrong_for_one_odd_name_is_that_objects_trouble(one: StoreProcess) -> None:
    one.store.answers["images/odd+name"] = "SignatureDoesNotMatch"
    assert [one.read("a"), one.read("odd+name"), one.read("b")] == ["", "source_denied", ""]


def test_a_bucket_that_is_closed_to_the_credential_leaves_the_others_alone(
    one: StoreProcess, two: StoreProcess
) -> None:
    assert [one.read("a"), one.read("a", "other")] == ["", ""]
    one.store.answers |= {"images/a": "AccessDenied", "images/b": "AccessDenied"}
    assert one.read("b") == "source_unauthorized?"
    assert (one.state(), one.state(IMAGES)) == ("closed", "open")
    assert two.read("b") == "source_unauthorized?"
    assert [two.read("a", "other"), one.read("b", "other")] == ["", ""]


def test_a_token_for_one_container_alone_stops_no_other_container(one: StoreProcess) -> None:
    assert one.read("a") == ""
    one.store.answers["other/a"] = "AuthenticationFailed"
    assert one.read("a", "other") == "source_unauthorized?"
    assert one.state() == "closed"
    assert one.read("b") == ""


def test_a_few_denied_objects_are_refused_and_a_row_of_them_is_the_buckets_trouble(
    one: StoreProcess, client: fakeredis.FakeRedis
) -> None:
    one.store.everything = "AccessDenied"
    assert [one.read(name) for name in "abcd"] == ["source_denied"] * 2 + ["source_unauthorized?"] * 2
    one.store.everything = ""
    half_open(client, IMAGES)
    assert one.read("a") == ""


def test_a_list_that_is_denied_says_nothing_of_the_right_to_read(one: StoreProcess) -> None:
    one.store.answers["images/"] = "AccessDenied"
    for _ in range(SETTINGS.failures + 1):
        with pytest.raises(SourceDenied), one.credential.asking("s3://images/", "images", counts=False):
            one.store.ask("images/")
    assert one.read("a") == ""


def test_an_object_that_is_read_between_them_begins_the_row_anew(one: StoreProcess, two: StoreProcess) -> None:
    one.store.answers |= dict.fromkeys(("images/a", "images/b"), "AccessDenied")
    assert [one.read("a"), one.read("b"), two.read("good"), one.read("a"), one.read("b")] == [
        *["source_denied"] * 2,
        "",
        *["source_denied"] * 2,
    ]


def test_a_store_that_does_not_say_whether_it_still_allows_what_it_did_is_asked_again_later(one: StoreProcess) -> None:
    assert one.read("a") == ""
    one.store.answers |= {"images/a": "SlowDown", "images/b": "AccessDenied"}
    assert one.read("b") == "source_unreachable"


def test_an_object_that_has_gone_meanwhile_still_shows_that_the_credential_is_good(one: StoreProcess) -> None:
    assert one.read("a") == ""
    one.store.answers |= {"images/a": "NoSuchKey", "images/b": "AccessDenied"}
    assert one.read("b") == "source_denied"


def test_one_request_tests_a_refused_credential_and_what_it_finds_counts(
    one: StoreProcess, two: StoreProcess, client: fakeredis.FakeRedis
) -> None:
    one.store.everything = "ExpiredToken"
    one.read("a")
    half_open(client)
    others: list[str] = []
    assert one.read("a", during=lambda: others.append(two.read("b"))) == "source_unauthorized?"
    assert (others, two.asked, one.state()) == (["source_unauthorized?"], [], "open")
    half_open(client)
    one.store.everything = "NoSuchKey"
    assert two.read("gone") == "source_not_found"
    assert one.state() == "closed"


def test_an_answer_that_says_nothing_of_the_credential_leaves_the_test_to_another(
    one: StoreProcess, two: StoreProcess, client: fakeredis.FakeRedis
) -> None:
    one.store.everything = "ExpiredToken"
    one.read("a")
    half_open(client)
    one.store.everything = "SlowDown"
    assert one.read("a") == "source_unreachable"
    one.store.everything = ""
    assert two.read("a") == ""


def test_an_error_of_a_server_that_passes_through_says_nothing_of_the_stores_credential(
    one: StoreProcess, client: fakeredis.FakeRedis
) -> None:
    one.store.everything = "ExpiredToken"
    one.read("a")
    half_open(client)

    def fail() -> None:
        raise PacsRejected("No.", server_name="a")

    assert one.read("a", during=fail) == "pacs_rejected"
    assert one.state() == "half-open"


def test_a_question_inside_another_one_is_part_of_the_same_test(one: StoreProcess, client: fakeredis.FakeRedis) -> None:
    one.store.everything = "ExpiredToken"
    one.read("a")
    half_open(client)
    one.store.everything = ""
    inner: list[str] = []
    assert one.read("a", during=lambda: inner.append(one.read("b"))) == ""
    assert inner == [""]


def test_without_redis_a_refusal_ends_its_own_job_alone(one: StoreProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> BreakerState:
        raise redis.ConnectionError

    for name in ("read", "failed", "succeeded", "renew"):
        monkeypatch.setattr(Breakers, name, away)
    one.store.everything = "ExpiredToken"
    assert one.read("a") == "source_unauthorized"
    one.store.everything = ""
    assert one.read("a") == ""


@pytest.mark.parametrize("error", [SourceTruncated("Cut off."), SourceUnreachable("Away.")])
def test_without_breakers_nothing_is_shared_and_every_error_passes(error: CourierError) -> None:
    credential = StoreCredential("downloads.azure")
    with pytest.raises(type(error)), credential.asking("az://a/b", "a"):
        raise error
    with pytest.raises(SourceUnauthorized) as caught, credential.asking("az://a/b", "a"):
        check_refusal("AuthenticationFailed", 403, "az://a/b", of="downloads.azure", verb="had", denied=SourceDenied)
    assert caught.value.open_circuit is None
