"""Workers on one ledger whose servers differ: who may say that an image is nowhere, and what a claim is worth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import fakeredis
import pytest

from courier.errors import InvalidRequest, PacsUnavailable
from courier.ledger import peers
from courier.ledger.breakers import CHANGES, Breakers
from courier.ledger.jobs import PREFIX, SILENT_S
from courier.settings import BreakerSettings, ServerSettings
from courier.waits import SERVER_UNKNOWN
from producer import doctor
from sandbox.synthetic import image, new_uid
from tests.unit.test_upload import SingleUploadBench
from worker import app as worker_app
from worker.jobs.attempt import Heartbeat, ServerUnknown
from worker.jobs.delete import delete
from worker.jobs.knowledge import check_knows_servers
from worker.jobs.lookup import exists
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.trace import sentence_of
from worker.observability.metrics import LedgerCollector, Outlook
from worker.pacs.fleet import Fleet


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def both(client: fakeredis.FakeRedis) -> SingleUploadBench:
    """A worker that knows the servers ``a`` and ``b``."""
    return SingleUploadBench(client, "a", "b")


@pytest.fixture
def only_b(client: fakeredis.FakeRedis, both: SingleUploadBench) -> SingleUploadBench:
    """A worker on the same ledger that knows the same ``b`` alone."""
    bench = SingleUploadBench(client)
    bench.servers, bench.files = {"b": both.servers["b"]}, both.files
    fleet = Fleet(cast(Any, list(bench.servers.values())))
    bench.services = replace(bench.services, fleet=fleet, sources=cast(Any, both.files), sleep=lambda _: None)
    return bench


def server(name: str, url: str = "", kind: str = "dicomweb") -> ServerSettings:
    return ServerSettings(name=name, type=cast(Any, kind), url=url or f"http://{name}/dicom-web")


def beats(bench: SingleUploadBench, worker: str, *names: str, ago_s: float = 0) -> None:
    """A worker that knows ``names`` has said so ``ago_s`` ago."""
    said = {"ok": True, "complaint": "", "every_s": 10.0}
    peers.say(bench.ledger, worker, said, [server(name) for name in names])
    for name in names:
        bench.client.zincrby(f"{PREFIX}servers", -1000 * ago_s, name)
    row = json.loads(cast(str, bench.client.hget(f"{PREFIX}workers", worker)))
    bench.client.hset(f"{PREFIX}workers", worker, json.dumps({**row, "at": row["at"] - ago_s}))


def waits(bench: SingleUploadBench, job_id: str) -> tuple[str, str]:
    record = bench.ledger.read_record(job_id)
    return record["code"], record["message"]


def ask(bench: SingleUploadBench, work: Any, task: str, job_id: str, **job: Any) -> JobResult:
    heartbeat = Heartbeat(bench.ledger, lambda *_: None)
    return execute(work, task=task, job_id=job_id, message=job, services=bench.services, heartbeat=heartbeat)


def test_an_upload_is_left_to_a_worker_that_knows_all_servers(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    study = new_uid()
    both.files.there.update({name: image(study) for name in ("1", "2")})
    beats(both, "both", "a", "b")
    assert isinstance(both.execute("1"), Done)
    result = only_b.execute("2")
    assert isinstance(result, Deferred)
    assert waits(only_b, "2") == (SERVER_UNKNOWN, "waits for a worker that knows server a")
    assert only_b.ledger.read_record("2")["server"] == "a"
    assert only_b.ledger.read_record("2")["attempts"] == "0", "it is no attempt"
    assert both.servers["b"].images == {}, "the study is not split"
    assert isinstance(both.execute("2"), Done)
    assert len(both.servers["a"].images) == 2


def test_an_image_is_not_stored_twice(both: SingleUploadBench, only_b: SingleUploadBench) -> None:
    both.files.there["1"] = both.files.there["2"] = image(new_uid())
    beats(both, "both", "a", "b")
    assert isinstance(both.execute("1"), Done)
    assert isinstance(only_b.execute("2"), Deferred)
    result = both.execute("2")
    assert isinstance(result, Failed)
    assert result.error.code == "image_already_exists"


@pytest.mark.parametrize(("ago_s", "waiting"), [(0, True), (SILENT_S - 5, True), (SILENT_S + 1, False)])
def test_a_server_counts_for_the_age_of_a_heartbeat(
    both: SingleUploadBench, only_b: SingleUploadBench, ago_s: float, waiting: bool
) -> None:
    only_b.files.there["1"] = image(new_uid())
    beats(both, "both", "a", "b", ago_s=ago_s)
    beats(both, "b", "b")
    assert isinstance(only_b.execute("1"), Deferred) is waiting


def test_a_claim_on_a_server_that_no_running_worker_knows_is_void_and_the_trace_says_so(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    study = new_uid()
    both.ledger.claim_study(study, server="a", job_id="gone")
    beats(both, "both", "a", "b", ago_s=SILENT_S + 1)
    only_b.files.there["1"] = image(study)
    assert isinstance(only_b.execute("1"), Done)
    assert only_b.ledger.claimed_server(study) == "b"
    (note,) = [note for note in only_b.ledger.uid_record(study).history if note.job_id == "1"]
    assert (
        sentence_of(note) == "The study now belongs to b; its claim on a is void, because no worker that runs knows a."
    )
    assert only_b.ledger.placed() == {"a": 0, "b": 1}


def test_a_claim_on_a_server_that_another_running_worker_knows_is_respected(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    """Also where it has begun only since the job was taken: it was not among the servers then."""
    study = new_uid()
    both.ledger.claim_study(study, server="a", job_id="other")
    only_b.files.there["1"] = image(study)
    fetch = both.files.fetch

    def begins_meanwhile(url: str) -> Any:
        beats(both, "both", "a", "b")
        return fetch(url)

    both.files.fetch = begins_meanwhile  # type: ignore[method-assign]
    assert isinstance(only_b.execute("1"), Deferred)
    assert waits(only_b, "1") == (SERVER_UNKNOWN, "waits for a worker that knows server a")
    assert only_b.ledger.claimed_server(study) == "a"
    notes = [note for note in only_b.ledger.uid_record(study).history if note.event == "waiting"]
    assert ["waits for a worker that knows server a" in sentence_of(note) for note in notes] == [True]
    only_b.execute("1")
    assert len([note for note in only_b.ledger.uid_record(study).history if note.event == "waiting"]) == 1, "said once"


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_job_that_asks_for_its_server_takes_over_no_claim_on_a_server_unknown_here(
    both: SingleUploadBench, asked_for: bool
) -> None:
    both.ledger.claim_study("1.2", server="a", job_id="other")
    beats(both, "both", "a")
    claim = both.ledger.claim_study("1.2", server="b", job_id="j", among=["b"], asked_for=asked_for)
    assert (claim.server, claim.first) == ("a", False)


def test_an_explicit_server_that_only_another_worker_knows_is_handed_on_and_not_refused(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    beats(both, "both", "a", "b")
    only_b.files.there["1"] = image(new_uid())
    assert isinstance(only_b.execute("1", server="a"), Deferred)
    deletion = {"level": "study", "uid": "1.2", "servers": ["a"]}
    assert isinstance(ask(only_b, delete, "pacs.delete", "d", **deletion), Deferred)
    assert isinstance(ask(only_b, exists, "pacs.exists", "e", level="study", uid="1.2", mode="a"), Deferred)
    for job_id in ("1", "d", "e"):
        assert waits(only_b, job_id) == (SERVER_UNKNOWN, "waits for a worker that knows server a")
    refused = ask(only_b, exists, "pacs.exists", "m", level="study", uid="1.2", mode="c")
    assert isinstance(refused, Failed), "no worker knows c"
    assert isinstance(refused.error, InvalidRequest)


def test_a_job_that_was_cancelled_before_it_began_ends_on_any_worker(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    beats(both, "both", "a", "b")
    only_b.ledger.submit("1", task="pacs.upload", job={"image_url": "1"})
    only_b.ledger.cancel("1")
    result = only_b.execute("1")
    assert isinstance(result, Failed)
    assert result.error.code == "cancelled"


def only_b_is_left(bench: SingleUploadBench) -> None:
    bench.client.delete(f"{PREFIX}servers")
    beats(bench, "b", "b")


@pytest.mark.parametrize("asked_for", [{}, {"server": "a"}])
@pytest.mark.parametrize("what", ["no answer came", "it is stored"])
def test_an_upload_that_pushed_to_a_server_that_no_worker_knows_any_more_is_stored_on_no_other(
    both: SingleUploadBench, only_b: SingleUploadBench, what: str, asked_for: dict[str, str]
) -> None:
    """Its end is a dead letter, which is done when the server is back."""
    both.files.there["1"] = image(new_uid())
    beats(both, "both", "a", "b")
    both.servers["a"].loses_the_answer = what == "no answer came"
    both.servers["a"].fails = {"metadata": PacsUnavailable("Away.")}
    assert isinstance(both.execute("1", **asked_for), Deferred)
    only_b_is_left(both)
    result = only_b.execute("1", **asked_for)
    assert isinstance(result, Failed)
    assert (result.error.code, result.error.server_name) == ("pacs_unavailable", "a")
    assert "no running worker knows a any more" in result.error.message
    assert both.servers["b"].images == {}
    assert [letter.job_id for letter in both.ledger.dead_letters()] == ["1"]
    both.servers["a"].fails.clear()
    assert both.ledger.replay("1")
    beats(both, "both", "a", "b")
    result = both.execute("1", **asked_for)
    assert isinstance(result, Done), result
    assert (result.payload["status"], result.payload["server_name"]) == ("stored", "a")
    assert len(both.servers["a"].images) == 1


def test_a_push_to_a_server_that_no_worker_knows_any_more_is_told_of_when_its_job_is_cancelled(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    both.files.there["1"] = image(new_uid())
    beats(both, "both", "a", "b")
    both.servers["a"].loses_the_answer = True
    assert isinstance(both.execute("1"), Deferred)
    both.ledger.cancel("1")
    only_b_is_left(both)
    result = only_b.execute("1")
    assert isinstance(result, Failed)
    assert (result.error.code, result.error.details["may_be_on"]) == ("cancelled", "a")


def test_an_upload_that_pushed_nothing_goes_to_the_servers_that_are_left(
    both: SingleUploadBench, only_b: SingleUploadBench
) -> None:
    both.files.there["1"] = image(new_uid())
    beats(both, "both", "a", "b")
    both.servers["a"].fails = {"store": PacsUnavailable("Away.", details={"phase": "connect"})}
    assert isinstance(both.execute("1"), Deferred)
    only_b_is_left(both)
    assert isinstance(only_b.execute("1"), Done)
    assert len(both.servers["b"].images) == 1


@pytest.mark.parametrize("breaker", ["a", f"a{CHANGES}"])
@pytest.mark.parametrize(("known", "woken"), [(["a", "b"], 0), (["b"], 3), ([], 0)])
def test_jobs_do_not_wait_for_the_breaker_of_a_server_that_no_worker_knows(
    both: SingleUploadBench, breaker: str, known: list[str], woken: int
) -> None:
    breakers = Breakers(both.client, BreakerSettings(failures=1, pause_s=600))
    breakers.failed(breaker)
    for job_id in ("1", "2", "3"):
        taken = both.ledger.take(job_id, task="pacs.upload", job={})
        both.ledger.park_for(breaker, job_id, taken.fence, max_wait_s=86_400, code="", message="")
    if known:
        beats(both, "w", *known)
    assert both.ledger.wake_parked() == woken
    assert both.ledger.parked() == ({} if woken else {"a": 3})


ABOUT_ALL: list[tuple[str, dict[str, Any]]] = [
    ("pacs.upload", {"image_url": "https://a/b"}),
    ("pacs.upload", {"image_url": "https://a/b", "server": "b"}),
    ("pacs.upload", {"image_url": "https://a/b", "servers": ["b"], "mode": "b"}),  # fields that it does not have
    ("pacs.exists", {"mode": "either"}),
    ("pacs.exists", {"mode": "both"}),
    ("pacs.exists", {}),
    ("pacs.exists", {"mode": "a"}),
    ("pacs.exists", {"mode": 1}),
    ("pacs.list_studies", {"mode": "both"}),
    ("pacs.delete", {"servers": ["b"]}),
    ("pacs.delete", {"servers": None}),
    ("pacs.delete_all", {}),
    ("pacs.audit", {}),
    ("pacs.audit", {"servers": ["a", "b"]}),
    ("pacs.trace", {}),
    ("pacs.batch.upload", {}),
    ("pacs.batch.migrate", {"from_server": "b", "to_server": "c"}),
    ("pacs.batch.delete", {"servers": ["b"]}),
    ("pacs.batch.chunk", {"batch_id": "B", "pass": "apply", "chunk": 0}),
    ("pacs.batch.retry", {"batch_id": "B"}),
    ("pacs.batch.undo", {"batch_id": "B"}),
    ("pacs.status", {"servers": ["a"]}),
]
ABOUT_B = [
    ("pacs.exists", {"mode": "b"}),
    ("pacs.metadata", {"mode": "b"}),
    ("pacs.list_studies", {"mode": "b"}),
    ("pacs.download", {"mode": "b"}),
    ("pacs.audit", {"servers": ["b", "c"]}),
    ("pacs.batch.download", {"servers": ["b"]}),
    ("pacs.status", {}),
    ("pacs.storage", {"servers": ["b"]}),
    ("pacs.batch.cancel", {"batch_id": "B"}),
]


@pytest.mark.parametrize(("task", "job"), ABOUT_ALL)
def test_what_may_be_about_a_server_unknown_here_is_left_to_others(
    only_b: SingleUploadBench, task: str, job: dict[str, Any]
) -> None:
    with pytest.raises(ServerUnknown, match="server a"):
        check_knows_servers(task, job, ["b", "a"], only_b.services)
    check_knows_servers(task, job, ["b"], only_b.services)
    check_knows_servers(task, job, [], only_b.services)


@pytest.mark.parametrize(("task", "job"), ABOUT_B)
def test_what_is_about_known_servers_alone_is_done(only_b: SingleUploadBench, task: str, job: dict[str, Any]) -> None:
    check_knows_servers(task, job, ["a", "b"], only_b.services)


def test_every_task_that_a_worker_runs_is_judged() -> None:
    judged = {task for task, _ in (*ABOUT_ALL, *ABOUT_B)}
    rest = {"pacs.database", "pacs.batch.show", "pacs.batch.pause", "pacs.batch.resume", "pacs.batch.apply"}
    worker_app.app.loader.import_default_modules()
    tasks = {name for name in worker_app.app.tasks if name.startswith("pacs.")}
    assert tasks - judged - rest == {"pacs.batch.verify"}


SERVERS = [server("a"), server("b", kind="orthanc")]


@pytest.mark.parametrize(
    ("others", "same"),
    [
        (SERVERS, True),
        (SERVERS[::-1], True),
        ([server("a", "http://a/dicom-web?key=1"), SERVERS[1]], True),
        ([server("a", "http://a/dicom-web/"), SERVERS[1]], True),
        ([SERVERS[0].model_copy(update={"weight": 3.0, "read_timeout_s": 1.0}), SERVERS[1]], True),
        ([server("a", "https://a/dicom-web"), SERVERS[1]], False),
        ([server("a"), server("b")], False),
        ([server("c", "http://a/dicom-web"), SERVERS[1]], False),
        (SERVERS[:1], False),
    ],
)
def test_the_digest_is_of_names_types_and_urls(others: list[ServerSettings], same: bool) -> None:
    assert (peers.digest_of(SERVERS) == peers.digest_of(others)) is same


def test_no_query_and_no_url_stands_in_a_heartbeat() -> None:
    entry = peers.entry_of({}, at_s=0, servers=[server("a", "http://host/dicom-web?key=s3cret")])
    assert "s3cret" not in entry
    assert "http" not in entry


def test_workers_that_differ_are_named_at_start_by_doctor_and_by_a_metric(
    both: SingleUploadBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats(both, "w1@h", "a", "b")
    assert peers.Peers.of(both.ledger).difference == ""
    assert [one.check for one in doctor._progress(both.ledger, set())] == ["worker w1@h"]
    beats(both, "w2@h", "b")
    digests = [peers.digest_of(map(server, names)) for names in ("ab", "b")]
    sentence = (
        "The [[servers]] of workers differ in names, types or URLs:"
        f" w1@h knows a, b ({digests[0]}); w2@h knows b ({digests[1]})."
    )
    assert peers.Peers.of(both.ledger).difference == sentence
    (finding,) = [one for one in doctor._progress(both.ledger, set()) if one.check == "servers of the workers"]
    assert (finding.state, finding.found) == ("warning", sentence)
    monkeypatch.setattr(worker_app, "_remarks", set())
    for _ in range(2):
        worker_app._look_at_the_others(both.ledger)
    assert [sentence in record.getMessage() for record in caplog.records] == [True], "once"
    beats(both, "w2@h", "b", ago_s=SILENT_S + 1)
    assert peers.Peers.of(both.ledger).difference == "", "it has ended"


def test_one_name_with_two_urls_is_called_a_danger_for_which_no_job_waits(
    both: SingleUploadBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats(both, "w1@h", "a", "b")
    elsewhere = [server("a", "http://elsewhere"), server("b")]
    peers.say(both.ledger, "w2@h", {"ok": True, "complaint": "", "every_s": 10.0}, elsewhere)
    told = peers.Peers.of(both.ledger)
    assert "differ in names, types or URLs" in told.difference
    assert told.consequence.startswith("No job waits for that: if one name means two archives")
    monkeypatch.setattr(worker_app, "_remarks", set())
    worker_app._look_at_the_others(both.ledger)
    assert told.consequence in caplog.text
    (finding,) = [one for one in doctor._progress(both.ledger, set()) if one.check == "servers of the workers"]
    assert told.consequence in finding.advice
    beats(both, "w2@h", "b")
    assert peers.Peers.of(both.ledger).consequence.startswith("Jobs wait for a worker that knows all those servers")


def test_a_scrape_says_how_many_lists_of_servers_there_are() -> None:
    outlook = Outlook({}, 0, 0, 0, {}, {}, {}, servers_digests=2)
    families = {family.name: family for family in LedgerCollector(lambda: outlook).collect()}
    assert families["pacs_servers_digests"].samples[0].value == 2
