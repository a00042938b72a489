"""Servers that an operator has taken out of service: the order, who obeys it, and the jobs that wait (on fakeredis)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import click
import fakeredis
import pytest
import redis
from click.testing import CliRunner

from courier.errors import CourierError, InvalidRequest, PacsUnavailable
from courier.ledger.breakers import BREAKER, Breakers, by_server, server_of
from courier.ledger.elsewhere import ElsewhereStudies
from courier.ledger.jobs import Ledger
from courier.ledger.slots import Slots
from courier.ledger.suspensions import FRESH_S, Suspension, Suspensions
from courier.settings import PREFIX, BreakerSettings, ServerSettings, Settings
from courier.waits import utc
from producer.cli.audit import check_is_back
from producer.cli.delete import deletion_table
from producer.cli.server import Until, change_json, server
from producer.server_orders import ServerClient
from producer.terminal import console
from worker.jobs.attempt import Attempt, Heartbeat
from worker.jobs.placement import open_circuits
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.services import Services
from worker.observability.metrics import LedgerCollector, Outlook
from worker.pacs import in_service
from worker.pacs.fleet import Fleet
from worker.pacs.guard import Guard
from worker.pacs.in_service import suspended_error, viewed_by_attempt

A = ServerSettings(name="a", type="dicomweb", url="http://a")
B = ServerSettings(name="b", type="dicomweb", url="http://b")
NAMES = ["a", "b"]
JOB = {"image_url": "http://host/a.dcm"}


@dataclass
class SuspensionBench:
    """A worker as far as orders go: what it reads, what stands before its calls, and its jobs."""

    client: fakeredis.FakeRedis
    now_s: float = 0.0
    shown: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.client)
        self.suspensions = Suspensions(self.client, NAMES, clock=lambda: self.now_s)
        self.breakers = Breakers(self.client, BreakerSettings())
        self.guard = Guard(self.breakers, Slots(self.client), [A, B], suspensions=self.suspensions)
        self.settings = Settings.model_validate({"jobs": {"max_attempts": 2, "max_wait_s": 1000}})

    @property
    def orders(self) -> ServerClient:
        return ServerClient(self.ledger, NAMES)

    def services(self) -> Services:
        nothing = cast(Any, None)
        fleet = Fleet([cast(Any, PacsNamed(A)), cast(Any, PacsNamed(B))], threads=1)
        return Services(
            settings=self.settings,
            ledger=self.ledger,
            sources=nothing,
            fleet=fleet,
            breakers=self.breakers,
            suspensions=self.suspensions,
        )

    def call(self, server: ServerSettings = A) -> CourierError | None:
        """One request to a server; why it was not sent."""
        try:
            with self.guard.call(server, changes=False):
                return None
        except CourierError as error:
            return error

    def execute(self, work: Any = None, *, task: str = "pacs.upload", job_id: str = "j1") -> JobResult:
        def call_a(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
            if (error := self.call()) is not None:
                raise error
            return {"attempt": attempt.number, "last": attempt.last}

        heartbeat = Heartbeat(self.ledger, lambda _, meta: self.shown.append(meta))
        return execute(
            work or call_a, task=task, job_id=job_id, message=JOB, services=self.services(), heartbeat=heartbeat
        )

    def later(self) -> None:
        """As long as a worker may rely on what it has read."""
        self.now_s += FRESH_S

    def woken(self) -> list[str]:
        self.ledger.wake_parked()
        due = self.client.zrangebyscore(f"{PREFIX}due", 1, self.now_ms() + 10_000)
        for job_id in cast(list[str], due):
            self.client.zadd(f"{PREFIX}due", {job_id: 0})
        return sorted(job.job_id for job in self.ledger.sweep())

    def now_ms(self) -> int:
        return int(self.client.time()[0]) * 1000


@dataclass
class PacsNamed:
    server: ServerSettings


@pytest.fixture
def site() -> Iterator[SuspensionBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield SuspensionBench(client)


# --- the order --------------------------------------------------------------------------------------------------


def test_a_pause_says_who_set_it_since_when_and_why(site: SuspensionBench) -> None:
    change = site.orders.pause("a", requested_by="ana", reason="disk swap")
    assert change.changed
    said = change.suspension
    assert said is not None
    assert (said.server, said.state, said.set_by, said.reason, said.until_ms) == (
        "a",
        "paused",
        "ana",
        "disk swap",
        None,
    )
    assert abs(said.since_ms / 1000 - site.ledger.clock_s()) < 60
    assert str(said).startswith("a is paused, set by ana at 20")
    assert str(said).endswith("(disk swap)")
    assert site.orders.suspended() == {"a": said}


def test_without_a_name_it_is_the_user_and_the_host(site: SuspensionBench) -> None:
    said = site.orders.pause("a").suspension
    assert said is not None
    user, at, host = said.set_by.partition("@")
    assert user
    assert at
    assert host


def test_a_second_pause_changes_neither_name_nor_time(site: SuspensionBench) -> None:
    first = site.orders.pause("a", requested_by="ana").suspension
    second = site.orders.pause("a", requested_by="bo")
    assert (second.changed, second.suspension) == (False, first)


def test_of_two_operators_who_resume_one_has_resumed(site: SuspensionBench) -> None:
    site.orders.pause("a", requested_by="ana")
    first, second = site.orders.resume("a"), site.orders.resume("a")
    assert (first.changed, second.changed) == (True, False)
    assert first.before is not None
    assert first.before.set_by == "ana"
    assert site.orders.suspended() == {}


@pytest.mark.parametrize("order", ["pause", "resume"])
def test_a_server_that_nothing_knows_is_refused_with_the_nearest_name(site: SuspensionBench, order: str) -> None:
    client = ServerClient(site.ledger, ["msdicom", "dcm4chee"])
    with pytest.raises(InvalidRequest, match="did you mean msdicom"):
        getattr(client, order)("msdicm")
    with pytest.raises(InvalidRequest, match="there are: msdicom, dcm4chee"):
        getattr(client, order)("zzz")


def test_a_server_that_only_a_worker_knows_is_known(site: SuspensionBench) -> None:
    site.ledger.report_health("w", json.dumps({"ok": True}), servers=["far"])
    assert ServerClient(site.ledger, []).pause("far").changed


def test_where_no_server_is_known_the_sentence_says_so(site: SuspensionBench) -> None:
    with pytest.raises(InvalidRequest, match="No server is known"):
        ServerClient(site.ledger, []).pause("a")


@pytest.mark.parametrize("words", ["two\nlines", "\x1b[2J", "x" * 201])
def test_a_name_that_could_forge_a_line_of_a_log_is_refused(site: SuspensionBench, words: str) -> None:
    with pytest.raises(InvalidRequest, match="requested_by"):
        site.orders.pause("a", requested_by=words)
    assert site.orders.suspended() == {}


def test_a_pause_of_a_server_in_maintenance_is_refused_and_changes_nothing(site: SuspensionBench) -> None:
    site.suspensions.maintain("a", set_by="ana")
    with pytest.raises(InvalidRequest, match="maintenance a --end"):
        site.orders.pause("a", requested_by="bo")
    with pytest.raises(InvalidRequest, match="maintenance a --end"):
        site.orders.resume("a")
    assert site.orders.suspended()["a"].set_by == "ana"


def test_json_of_an_order_has_the_record_and_what_was_ended(site: SuspensionBench) -> None:
    paused = change_json(site.orders.pause("a", requested_by="ana"))
    assert paused["suspension"]["state"] == "paused"
    assert paused["ended"] is None
    resumed = change_json(site.orders.resume("a"))
    assert resumed["suspension"] is None
    assert resumed["ended"]["set_by"] == "ana"


# --- who obeys --------------------------------------------------------------------------------------------------


def test_a_call_to_a_paused_server_is_not_sent_and_costs_no_attempt(site: SuspensionBench) -> None:
    site.orders.pause("a", requested_by="ana")
    error = site.call()
    assert isinstance(error, PacsUnavailable)
    assert (error.open_circuit, error.is_attempt, error.server_name) == ("a:suspended", False, "a")
    assert "set by ana" in error.message
    assert site.call(B) is None


def test_a_worker_reads_an_order_at_most_twice_a_second_and_obeys_within_that(site: SuspensionBench) -> None:
    assert site.call() is None
    site.orders.pause("a")
    site.later()
    assert site.call() is not None
    site.orders.resume("a")
    site.later()
    assert site.call() is None


def test_a_worker_says_once_that_a_server_is_paused_and_once_that_it_is_back(
    site: SuspensionBench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    site.orders.pause("a", requested_by="ana")
    for _ in range(3):
        site.suspensions.refresh()
    site.orders.resume("a")
    for _ in range(3):
        site.suspensions.refresh()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "a is paused, set by ana" in lines[0]
    assert lines[1] == "a is in service again"


def test_where_redis_is_away_a_worker_keeps_to_what_it_read_last(
    site: SuspensionBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.orders.pause("a")
    assert set(site.suspensions.current()) == {"a"}
    monkeypatch.setattr(site.suspensions, "read", _away)
    site.later()
    assert set(site.suspensions.current()) == {"a"}


def _away(_: object) -> dict[str, Suspension]:
    raise redis.ConnectionError


def test_an_attempt_that_has_begun_goes_on_and_the_next_one_obeys(site: SuspensionBench) -> None:
    with viewed_by_attempt(site.suspensions, live=False):
        site.orders.pause("a")
        site.later()
        assert site.call() is None
    with viewed_by_attempt(site.suspensions, live=False):
        assert site.call() is not None
        site.orders.resume("a")
        site.later()
        assert site.call() is not None


def test_an_attempt_that_is_about_to_ask_goes_by_what_is_ordered_then(site: SuspensionBench) -> None:
    with viewed_by_attempt(site.suspensions, live=False):
        site.orders.pause("a")
        site.later()
        in_service.renew()
        assert site.call() is not None


def test_a_chunk_of_a_batch_obeys_in_the_middle(site: SuspensionBench) -> None:
    with viewed_by_attempt(site.suspensions, live=True):
        assert site.call() is None
        site.orders.pause("a")
        site.later()
        assert site.call() is not None


def test_the_expected_servers_of_an_upload_are_looked_at_before_its_file_is_fetched(site: SuspensionBench) -> None:
    site.orders.pause("b")
    assert open_circuits(site.services(), ["a"]) == []
    (error,) = open_circuits(site.services(), NAMES)
    assert error.open_circuit == "b:suspended"
    (error,) = open_circuits(site.services(), [], changed="b")
    assert error.open_circuit == "b:suspended"


# --- the jobs that wait -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["pacs.upload", "pacs.exists", "pacs.list_studies", "pacs.delete"])
def test_a_job_waits_for_a_paused_server_however_long_and_uses_up_nothing(site: SuspensionBench, task: str) -> None:
    site.orders.pause("a", requested_by="ana")
    for _ in range(5):
        site.later()
        assert isinstance(site.execute(task=task), Deferred)
        site.client.hincrby(f"{PREFIX}job:j1", "suspended_ms", -10_000_000)  # ten times as long as it may wait
        site.client.hset(f"{PREFIX}job:j1", "woken", 1)
    site.orders.resume("a")
    site.later()
    assert site.woken() == ["j1"]
    assert site.execute(task=task) == Done({"attempt": 1, "last": False})


def test_a_job_says_who_paused_its_server_and_no_next_try(site: SuspensionBench) -> None:
    site.orders.pause("a", requested_by="ana", reason="disk swap")
    site.execute()
    waiting = site.ledger.standing(["j1"])["j1"].waiting or {}
    assert (waiting["code"], waiting["server_name"], waiting["next_try"]) == ("server_paused", "a", None)
    assert "set by ana" in waiting["message"]
    assert "disk swap" in waiting["message"]
    assert [(meta["stage"], meta["code"], meta["next_try"]) for meta in site.shown] == [
        ("waiting", "server_paused", None)
    ]


def test_the_time_under_a_pause_takes_nothing_of_the_time_that_a_job_may_wait(site: SuspensionBench) -> None:
    key = f"{PREFIX}job:j1"
    site.client.hset(f"{PREFIX}{BREAKER}a", "until_ms", site.now_ms() + 10**7)
    site.suspensions.refresh()
    site.guard.refresh()
    assert isinstance(site.execute(), Deferred)
    site.client.hincrby(key, "parked_ms", -900_000)  # of 1000 s
    site.orders.pause("a")
    site.later()
    site.client.hset(key, "woken", 1)
    assert isinstance(site.execute(), Deferred)
    site.client.hincrby(key, "suspended_ms", -10_000_000)
    site.client.hincrby(key, "parked_ms", -10_000_000)
    site.client.delete(f"{PREFIX}{BREAKER}a")
    site.orders.resume("a")
    site.later()
    site.guard.refresh()
    assert site.woken() == ["j1"]
    assert site.execute() == Done({"attempt": 1, "last": False})


def test_none_is_woken_while_the_pause_lasts_and_all_when_it_ends(site: SuspensionBench) -> None:
    site.orders.pause("a")
    site.ledger.report_health("w", json.dumps({"ok": True}), servers=NAMES)
    for number in range(3):
        site.execute(job_id=f"j{number}")
    assert site.woken() == []
    assert site.ledger.parked() == {"a": 3}
    site.orders.resume("a")
    assert site.woken() == ["j0", "j1", "j2"]


def test_a_job_that_is_put_aside_while_the_pause_ends_is_not_forgotten(site: SuspensionBench) -> None:
    site.orders.pause("a")
    site.suspensions.refresh()
    site.orders.resume("a")
    assert isinstance(site.execute(), Deferred)
    assert site.woken() == ["j1"]


def test_jobs_of_a_server_that_left_the_settings_of_all_workers_are_woken(site: SuspensionBench) -> None:
    site.orders.pause("a")
    site.execute()
    site.ledger.report_health("w", json.dumps({"ok": True}), servers=["b"])
    assert site.woken() == ["j1"]


def test_a_cancelled_job_does_not_wait_for_the_end_of_the_pause(site: SuspensionBench) -> None:
    site.orders.pause("a")
    site.execute()
    site.ledger.cancel("j1")
    result = site.execute()
    assert isinstance(result, Failed)
    assert result.error.code == "cancelled"


def test_a_job_that_was_replayed_after_a_pause_has_all_its_time(site: SuspensionBench) -> None:
    site.orders.pause("a")
    site.execute()
    assert "suspended_ms" in site.ledger.read_record("j1")
    site.orders.resume("a")
    site.later()
    site.woken()
    site.execute()
    assert "suspended_ms" not in site.ledger.read_record("j1")


def test_a_maintenance_that_begins_in_the_middle_of_an_attempt_gives_the_job_another_look_at_once(
    site: SuspensionBench,
) -> None:
    def begins(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
        site.suspensions.maintain("a", set_by="ana")
        site.later()
        raise suspended_error(A, site.suspensions.current()["a"])

    assert isinstance(site.execute(begins), Deferred)
    assert site.ledger.parked() == {}
    assert site.woken() == ["j1"]
    assert isinstance(site.execute(), Deferred)  # it needs the server all the same
    assert site.ledger.parked() == {"a": 1}


def test_what_waits_is_counted_for_its_server() -> None:
    assert [server_of(name) for name in ("a", "a:changes", "a:credential", "a:suspended")] == ["a"] * 4
    assert by_server({"a:suspended": 2, "a": 1}) == {"a": 3}


def test_a_gauge_by_server_says_which_is_out_of_service() -> None:
    outlook = Outlook({}, 0, 0, 0, {}, {}, {}, 0, {"a": "paused", "b": ""})
    families = {family.name: family for family in LedgerCollector(lambda: outlook).collect()}
    rows = {tuple(row.labels.values()): row.value for row in families["pacs_server_suspended"].samples}
    assert rows == {("a", "paused"): 1, ("a", "maintenance"): 0, ("b", "paused"): 0, ("b", "maintenance"): 0}


# --- maintenance ------------------------------------------------------------------------------------------------


def test_a_maintenance_ends_by_itself_and_what_waited_for_it_goes_on(site: SuspensionBench) -> None:
    until = datetime.now(UTC) + timedelta(hours=1)
    said = site.orders.maintenance("a", until=until, requested_by="ana").suspension
    assert said is not None
    assert said.until_ms == int(until.timestamp() * 1000)
    assert f"until {utc(said.until_ms)}" in str(said)
    site.later()
    site.execute()
    waiting = site.ledger.standing(["j1"])["j1"].waiting or {}
    assert (waiting["code"], waiting["next_try"]) == ("server_maintenance", utc(said.until_ms))
    assert site.woken() == []
    site.client.pexpire(f"{PREFIX}{BREAKER}a:suspended", 0)  # the hour is over
    site.later()
    assert site.orders.suspended() == {}
    assert site.call() is None
    assert site.woken() == ["j1"]


@pytest.mark.parametrize("away", [timedelta(seconds=-1), timedelta(0), timedelta(days=-400)])
def test_an_end_that_is_over_is_refused_and_changes_nothing(site: SuspensionBench, away: timedelta) -> None:
    with pytest.raises(InvalidRequest, match="in the future"):
        site.orders.maintenance("a", until=datetime.now(UTC) + away)
    assert site.orders.suspended() == {}
    site.orders.maintenance("a", requested_by="ana")
    with pytest.raises(InvalidRequest, match="in the future"):
        site.orders.maintenance("a", until=datetime.now(UTC) + away)
    assert site.orders.suspended()["a"].set_by == "ana"


def test_an_end_without_a_time_zone_is_refused(site: SuspensionBench) -> None:
    with pytest.raises(InvalidRequest, match="time zone"):
        site.orders.maintenance("a", until=datetime(2100, 1, 1))


def test_a_new_end_replaces_the_old_one_and_keeps_since_when(site: SuspensionBench) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=1)
    first = site.orders.maintenance("a", until=soon, requested_by="ana").suspension
    second = site.orders.maintenance("a", requested_by="bo").suspension
    assert first is not None
    assert second is not None
    assert (second.id, second.since_ms, second.set_by, second.until_ms) == (first.id, first.since_ms, "bo", None)
    assert site.client.pttl(f"{PREFIX}{BREAKER}a:suspended") == -1


def test_a_paused_server_goes_into_maintenance_and_the_end_leads_back_into_service(site: SuspensionBench) -> None:
    site.orders.pause("a", requested_by="ana")
    with pytest.raises(InvalidRequest, match="pacs server resume a"):
        site.orders.end_maintenance("a")
    assert site.orders.maintenance("a", requested_by="bo").changed
    assert site.orders.end_maintenance("a").changed
    assert not site.orders.end_maintenance("a").changed
    assert site.orders.suspended() == {}


@pytest.mark.parametrize("text", ["2020-01-01", "0s", "soon", "12", "-1h", "2020-01-01T00:00+02:00", "999999d999"])
def test_the_command_takes_no_end_that_is_over_or_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Until().convert(text, None, None)


def test_the_command_takes_a_time_and_how_long_from_now() -> None:
    assert Until().convert("2100-01-01T00:00+01:00", None, None) == datetime(2099, 12, 31, 23, tzinfo=UTC)
    assert Until().convert("2100-01-01T00:00", None, None) == datetime(2100, 1, 1, tzinfo=UTC)
    left = Until().convert("90m", None, None) - datetime.now(UTC)
    assert timedelta(minutes=89) < left <= timedelta(minutes=90)


def test_an_end_now_takes_no_other_option() -> None:
    ended = CliRunner().invoke(server, ["maintenance", "a", "--end", "--until", "2h"])
    assert ended.exit_code == 2
    assert "leave out the other options" in ended.stderr


def test_deletions_that_left_out_a_server_end_with_status_1_and_name_the_job_that_makes_up_for_it() -> None:
    entry = {"server_name": "a", "server_type": "x", "status": "not_asked", "images": None, "note": "a is away."}
    with console.capture() as shown:
        console.print(deletion_table([{**entry, "follow_up_job_id": "j2"}]))
    words = " ".join(shown.get().split())
    assert "not_asked" in words
    assert "j2" in words


# --- what was stored elsewhere ----------------------------------------------------------------------------------


def test_one_job_is_to_audit_all_that_was_stored_elsewhere_until_it_has_ended(site: SuspensionBench) -> None:
    elsewhere = ElsewhereStudies(site.client)
    first = elsewhere.note("a", ["1.2", "1.3"])
    assert elsewhere.note("a", ["1.3", "1.4"]) == first
    assert elsewhere.note("b", ["1.2"]) != first
    assert elsewhere.studies("a") == ["1.2", "1.3", "1.4"]
    assert not elsewhere.audited("a", added=2, job_id=first, studies=2, split=0)
    assert elsewhere.audited("a", added=elsewhere.added("a"), job_id=first, studies=3, split=1)
    assert elsewhere.studies("a") == ["1.2", "1.3", "1.4"]
    found = elsewhere.read("a")
    assert found is not None
    assert (found.studies, found.split, found.job_id) == (3, 1, first)
    second = elsewhere.note("a", ["1.5"])
    assert second != first
    assert elsewhere.studies("a") == ["1.5"]


def test_beyond_the_bound_studies_are_counted_and_not_kept(site: SuspensionBench) -> None:
    elsewhere = ElsewhereStudies(site.client, most=2)
    for uid in ("1.1", "1.2", "1.3", "1.4", "1.1"):
        elsewhere.note("a", [uid])
    audit = elsewhere.read("a")
    assert audit is not None
    assert (audit.studies, audit.left_out) == (2, 2)
    assert "2 more that are not kept" in str(audit)
    assert 0 < site.client.ttl(f"{PREFIX}elsewhere:a") <= 90 * 86_400


def test_the_end_of_a_maintenance_says_what_is_audited(site: SuspensionBench) -> None:
    site.orders.maintenance("a")
    job_id = ElsewhereStudies(site.client).note("a", ["1.2"])
    change = site.orders.end_maintenance("a")
    assert change.audit is not None
    assert change.audit.job_id == job_id
    told = change_json(change)["audit"]
    assert (told["studies"], told["split"], told["job_id"]) == (1, None, job_id)
    assert f"1 study was stored elsewhere during its maintenance; job {job_id} looks what is split" in str(change.audit)
    assert change_json(site.orders.pause("a"))["audit"] is None


def test_an_audit_of_a_server_that_is_still_away_is_refused_before_it_waits(site: SuspensionBench) -> None:
    site.orders.maintenance("a", requested_by="ana")
    away = cast(Any, SimpleNamespace(servers=site.orders))
    with pytest.raises(InvalidRequest, match="set by ana"):
        check_is_back(away, "a")
    check_is_back(away, "b")
