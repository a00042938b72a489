"""What an order says is done or refused, and never dropped: misspelt fields, old names, who asked for it and why."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest

from courier import schema
from courier.batches.planner import Planned, Planner
from courier.batches.store import CHUNK_TASK, Batches, chunk_job, chunk_pass
from courier.errors import CourierError
from courier.ledger.jobs import PREFIX, Event, Ledger, StudyPush, UidRecord, Voided, content_digest
from courier.messages import (
    BatchContinueJob,
    BatchDeleteJob,
    BatchDownloadJob,
    BatchJob,
    BatchMigrateJob,
    BatchUploadJob,
    DeleteAllJob,
    DeleteJob,
    Job,
    StudiesJob,
    TraceJob,
    UploadJob,
    old_spellings,
    read_job,
)
from courier.redaction import REASON_LENGTH, REQUESTED_BY_LENGTH, redact_job, stated
from courier.settings import Settings
from producer import Courier
from producer.batches import BatchClient
from producer.dead_letters import DeadLetterClient
from producer.errors import InvalidRequest
from producer.orders import Order, of_plan_file
from producer.plans import PlanHeader, PlanLine, write
from worker.batches.coordinator import Coordinator, coordinated, order
from worker.batches.delete_all import delete_all
from worker.batches.deletions import StudyDeletions, delete_many
from worker.batches.downloads import download_all
from worker.batches.migrations import migrate
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.delete import delete
from worker.jobs.services import Services
from worker.jobs.trace import MAX_JOBS, _jobs
from worker.pacs.fleet import Fleet

ITEMS = {"items": ["1.2.3"]}
#: The orders that refuse what they do not know, with the least that each needs.
STRICT: Mapping[type[Job], Mapping[str, Any]] = {
    DeleteJob: {"level": "study", "uid": "1.2.3"},
    DeleteAllJob: {"confirm": "delete all studies"},
    BatchDeleteJob: ITEMS,
    BatchDownloadJob: {**ITEMS, "destination": "file:///out"},
    BatchMigrateJob: {**ITEMS, "from_server": "a", "to_server": "b"},
    BatchContinueJob: {"batch_id": "B"},
}
#: Misspelt, and what comes nearest among the fields of those orders that have it.
MISSPELT = {
    "dryRun": "dry_run",
    "dryrun": "dry_run",
    "dry-run": "dry_run",
    "DRY_RUN": "dry_run",
    "permanant": "permanent",
    "isPermanent": "permanent",
    "server": "servers",
    "deleteSource": "delete_source",
    "fromServer": "from_server",
    "back_up": "backup",
    "requestedBy": "requested_by",
    "resaon": "reason",
    "batchId": "batch_id",
}


def refusal(kind: type[Job], message: Mapping[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        read_job(kind, message)
    return refused.value


@pytest.mark.parametrize("field", sorted(MISSPELT))
@pytest.mark.parametrize("kind", STRICT, ids=lambda kind: kind.__name__)
def test_a_misspelt_field_of_an_order_that_deletes_is_refused_with_the_field_that_was_meant(
    kind: type[Job], field: str
) -> None:
    read_job(kind, STRICT[kind])
    error = refusal(kind, {**STRICT[kind], field: True})
    assert f"Field {field} " in error.message
    assert error.details == {"field": field}
    meant = MISSPELT[field]
    if meant in kind.model_fields:
        assert f"did you mean {meant}?" in error.message


@pytest.mark.parametrize("field", ["sizeBytes", "dry_run", "Server", "uid"])
@pytest.mark.parametrize("kind", [BatchDeleteJob, BatchDownloadJob, BatchMigrateJob], ids=lambda kind: kind.__name__)
def test_a_field_of_an_item_that_is_not_known_is_refused_with_its_place(kind: type[Job], field: str) -> None:
    item = {"item": "1.2.3", "server": "a"}
    read_job(kind, {**STRICT[kind], "items": ["1.2.4", item]})
    error = refusal(kind, {**STRICT[kind], "items": ["1.2.4", {**item, field: 1}]})
    assert error.details == {"field": f"items.1.{field}"}


@pytest.mark.parametrize(
    "kind", [UploadJob, StudiesJob, TraceJob, BatchUploadJob, BatchJob], ids=lambda one: one.__name__
)
def test_tasks_that_delete_nothing_go_on_ignoring_what_they_do_not_know(kind: type[Job]) -> None:
    least: Mapping[type[Job], Mapping[str, Any]] = {
        UploadJob: {"image_url": "https://host/a.dcm"},
        TraceJob: {"uid": "1.2"},
        BatchUploadJob: {"items": [{"item": "https://host/a.dcm", "colour": "red"}]},
        BatchJob: {"batch_id": "B"},
    }
    message = least.get(kind, {})
    assert read_job(kind, {**message, "dryRun": True, "colour": "red"}) == read_job(kind, message)


@pytest.mark.parametrize(
    "name", ["DOE^JANE", "https://user:secret@host/?sig=secret", "a\nb", "\ud800", "", "x" * 200_000, "délete"]
)
def test_a_refused_field_that_may_be_a_value_is_not_quoted(name: str) -> None:
    error = refusal(DeleteJob, {**STRICT[DeleteJob], name: 1})
    assert error.message.isprintable()
    assert len(error.message) < 300
    assert error.details in ({"field": "…"}, {"field": None})


def test_the_first_thing_told_is_the_field_that_is_not_known() -> None:
    assert refusal(DeleteJob, {"level": "study", "UID": "1.2"}).details == {"field": "UID"}
    assert "did you mean backup?" in refusal(BatchDeleteJob, {**ITEMS, "keeps": "s3://kept/x"}).message
    error = refusal(BatchMigrateJob, {**ITEMS, "from_server": "a", "to_server": "b", "servers": ["c"]})
    assert error.details == {"field": "servers"}, "a migration would not look at it"


# --- the worker is the gate ---------------------------------------------------------------------------------------


class Untouched:
    """A server that fails the test when anything is asked of it."""

    def __init__(self, name: str) -> None:
        self.server = Settings.model_validate(
            {"servers": [{"name": name, "type": "dicomweb", "url": "http://host"}]}
        ).servers[0]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{self.server.name} was asked: {name}")


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Ledger(client)


def worker(ledger: Ledger) -> Services:
    servers = [Untouched("a"), Untouched("b")]
    return Services(Settings(), ledger, cast(Any, None), Fleet(cast(Any, servers)), destinations=cast(Any, None))


def attempt(ledger: Ledger, job_id: str, task: str, job: Mapping[str, Any]) -> Attempt:
    taken = ledger.take(job_id, task=task, job=job)
    return Attempt(job_id, taken.fence, taken.attempt, last=False, ledger=ledger, checkpoint=taken.checkpoint)


@pytest.mark.parametrize(
    "more", [{"dryRun": True}, {"server": "a"}, {"callback_url": "https://host/"}, {"reason": "a\nb"}]
)
@pytest.mark.parametrize("task", ["delete", "delete_all", "batch.delete", "batch.download", "batch.migrate"])
def test_a_worker_refuses_the_order_and_asks_no_server(ledger: Ledger, task: str, more: dict[str, Any]) -> None:
    works: dict[str, tuple[Any, type[Job]]] = {
        "delete": (delete, DeleteJob),
        "delete_all": (delete_all, DeleteAllJob),
        "batch.delete": (delete_many, BatchDeleteJob),
        "batch.download": (download_all, BatchDownloadJob),
        "batch.migrate": (migrate, BatchMigrateJob),
    }
    work, kind = works[task]
    message = {**STRICT[kind], **more}
    with pytest.raises(InvalidRequest):
        work(message, attempt(ledger, "J", f"pacs.{task}", message), worker(ledger))
    assert Batches(ledger).get("J") is None


@pytest.mark.parametrize("wish", [Coordinator.apply, Coordinator.retry, Coordinator.verify, Coordinator.undo])
def test_a_batch_is_not_gone_on_with_by_an_order_with_a_field_that_is_not_known(ledger: Ledger, wish: Any) -> None:
    Batches(ledger).open("B", kind="delete", order={}, concurrency=1)
    message = {"batch_id": "B", "dryRun": True}
    run = attempt(ledger, "J", "pacs.batch.apply", message)
    with pytest.raises(InvalidRequest, match="dryRun"):
        coordinated(message, run, worker(ledger), kinds={"delete": StudyDeletions()}, command=wish)
    batch = Batches(ledger).get("B")
    assert batch is not None
    assert (batch.state, batch.coordinator) == ("planning", "")


def test_the_plan_of_an_order_that_is_refused_is_given_up(ledger: Ledger) -> None:
    batches = Batches(ledger)
    batches.open("B", kind="delete", order={}, concurrency=1)
    with Planner(batches, "B") as planner:
        planner.add(Planned("1.2.3"))
        planner.freeze()
    message = {"planned": True, "dryRun": True}
    with pytest.raises(InvalidRequest, match="dry_run"):
        delete_many(message, attempt(ledger, "B", "pacs.batch.delete", message), worker(ledger))
    batch = batches.get("B")
    assert batch is not None
    assert batch.state == "cancelled"


# --- the library --------------------------------------------------------------------------------------------------


def methods(kind: type) -> Iterator[tuple[str, inspect.Signature]]:
    for name, member in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            yield name, inspect.signature(member)


@pytest.mark.parametrize("kind", [Courier, BatchClient, DeadLetterClient])
def test_every_method_of_the_library_names_and_types_its_options(kind: type) -> None:
    for name, signature in methods(kind):
        for parameter in list(signature.parameters.values())[1:]:
            assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), (name, parameter)
            assert parameter.annotation not in (parameter.empty, Any, "Any"), (name, parameter)


def test_whatever_enqueues_a_job_takes_who_requested_it_and_why() -> None:
    jobs = {"upload", "exists", "metadata", "status", "storage", "database", "delete", "studies", "download", "audit"}
    ordered = {"upload", "delete", "download", "migrate", "apply", "apply_file", "retry", "verify", "undo"}
    for kind, names in ((Courier, {*jobs, "trace", "delete_all"}), (BatchClient, ordered)):
        signatures = dict(methods(kind))
        assert {name for name in names if not {"requested_by", "reason"} <= set(signatures[name].parameters)} == set()


class RecordingLibrary:
    """A library whose messages are kept."""

    def __init__(self, ledger: Ledger) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.ledger, self.client = ledger, BatchClient(ledger, cast(Any, self.enqueue))

    def enqueue(self, task: str, kind: Any, job: Any, **_: Any) -> Any:
        given = {name: value for name, value in job.items() if value is not None}
        read_job(kind, given)
        self.jobs.append(given)


@pytest.fixture
def sent(ledger: Ledger) -> RecordingLibrary:
    return RecordingLibrary(ledger)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("delete", {"dryrun": True}),
        ("delete", {"dryRun": True}),
        ("delete", {"server": "x"}),
        ("delete", {"keeps": "s3://kept/x"}),
        ("delete", {"permanant": False}),
        ("upload", {"servers": ["x"]}),
        ("download", {"destination": "file:///out", "formt": "files"}),
        ("migrate", {"from_server": "a", "to_server": "b", "deleteSource": True}),
        ("migrate", {"from_server": "a", "to_server": "b", "servers": ["a"]}),
        ("retry", {"dry_run": True}),
        ("undo", {"servers": ["a"]}),
    ],
)
def test_a_misspelt_option_of_the_library_is_a_type_error_and_nothing_is_planned(
    sent: RecordingLibrary, method: str, options: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        getattr(sent.client, method)(["1.2.3"], **options)
    assert (sent.jobs, Batches(sent.ledger).list()) == ([], [])


def test_a_single_deletion_has_no_option_server_and_takes_no_name_for_a_list_of_names() -> None:
    courier = cast(Any, object.__new__(Courier))
    courier.enqueue = Courier.enqueue.__get__(courier)
    with pytest.raises(TypeError, match="server"):
        courier.delete("study", "1.2.3", server="x")
    with pytest.raises(TypeError, match="dryrun"):
        courier.delete_all("delete all studies", dryrun=True)
    for servers in ("ab", "a"):
        with pytest.raises(InvalidRequest, match="servers"):
            courier.delete("study", "1.2.3", servers=servers)


def test_a_name_given_for_a_list_of_names_is_refused_and_not_taken_letter_by_letter(sent: RecordingLibrary) -> None:
    for method, more in (("delete", {}), ("download", {"destination": "file:///out"})):
        with pytest.raises(InvalidRequest, match="servers"):
            getattr(sent.client, method)(["1.2.3"], servers="ab", **more)
    assert (sent.jobs, Batches(sent.ledger).list()) == ([], [])


def test_options_that_are_as_without_them_are_not_sent_and_all_others_are(sent: RecordingLibrary) -> None:
    sent.client.delete(filters={"StudyDate": "20250101"}, dry_run=True, verify=False, window="20:00-06:00")
    assert sent.jobs[-1] == {
        "filters": {"StudyDate": "20250101"},
        "permanent": True,
        "dry_run": True,
        "verify": False,
        "window": "20:00-06:00",
    }
    with pytest.raises(InvalidRequest, match="dry_run"):
        sent.client.delete(everything=True, dry_run=cast(Any, "yes"))
    with pytest.raises(InvalidRequest, match="everything"):
        sent.client.delete(everything=cast(Any, "x"))
    with pytest.raises(InvalidRequest, match="verify"):
        sent.client.delete(everything=True, verify=cast(Any, "no"))


# --- old names and further ones -----------------------------------------------------------------------------------


def test_a_message_that_says_keep_has_a_backup_and_is_warned_of() -> None:
    job = read_job(BatchDeleteJob, {**ITEMS, "keep": "s3://kept/x"})
    assert job == read_job(BatchDeleteJob, {**ITEMS, "backup": "s3://kept/x"})
    (sentence,) = old_spellings(BatchDeleteJob, {**ITEMS, "keep": "s3://kept/x"})
    assert "keep is called backup" in sentence
    assert old_spellings(BatchDeleteJob, {**ITEMS, "backup": "s3://kept/x", "keep": None}) == []


@pytest.mark.parametrize("value", ["s3://kept/x", "s3://kept/y"])
def test_keep_and_backup_together_are_refused_whatever_they_say(value: str) -> None:
    error = refusal(BatchDeleteJob, {**ITEMS, "keep": value, "backup": "s3://kept/x"})
    assert (error.payload["code"], error.details) == ("invalid_request", {"field": "keep"})


def test_keep_is_a_field_of_no_other_order() -> None:
    for kind in STRICT.keys() - {BatchDeleteJob}:
        assert refusal(kind, {**STRICT[kind], "keep": "s3://kept/x"}).details == {"field": "keep"}


def test_source_and_target_are_other_names_and_two_names_with_two_values_are_refused(sent: RecordingLibrary) -> None:
    assert read_job(BatchMigrateJob, {**ITEMS, "source": "a", "target": "b"}) == read_job(
        BatchMigrateJob, STRICT[BatchMigrateJob]
    )
    read_job(BatchMigrateJob, {**STRICT[BatchMigrateJob], "source": "a"})
    error = refusal(BatchMigrateJob, {**STRICT[BatchMigrateJob], "source": "c"})
    assert (error.details, "from_server" in error.message) == ({"field": "source"}, True)
    for names in ({"source": "a", "target": "b"}, {"from_server": "a", "to_server": "b", "target": "b"}):
        sent.client.migrate(filters={"StudyDate": "20250101"}, **names)
        assert (sent.jobs[-1]["from_server"], sent.jobs[-1]["to_server"]) == ("a", "b")
    with pytest.raises(InvalidRequest, match="to_server"):
        sent.client.migrate(["1.2"], from_server="a", to_server="b", target="c")
    with pytest.raises(InvalidRequest, match="from_server"):
        sent.client.migrate(["1.2"], to_server="b")


def test_the_library_warns_of_keep_where_it_is_called_and_refuses_both(sent: RecordingLibrary) -> None:
    with pytest.warns(DeprecationWarning, match="keep is called backup") as told:
        sent.client.delete(filters={"StudyDate": "20250101"}, keep="s3://kept/x")
    assert told[0].filename == __file__
    assert (sent.jobs[-1]["backup"], "keep" in sent.jobs[-1]) == ("s3://kept/x", False)
    with pytest.raises(InvalidRequest, match="backup"):
        sent.client.delete(["1.2"], keep="s3://kept/x", backup="s3://kept/x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent.client.delete(["1.2"], backup="s3://kept/x")


def plan_file(path: Path, *, kind: str = "delete", item: str = "1.2.3", **more: Any) -> Path:
    with path.open("w", encoding="utf-8") as out:
        write(PlanHeader.model_validate({"kind": kind, **more}), [PlanLine(item=item)], out)
    return path


def test_a_plan_file_that_says_keep_is_applied_with_a_warning(sent: RecordingLibrary, tmp_path: Path) -> None:
    path = plan_file(tmp_path / "old.jsonl", order={"permanent": True, "keep": "s3://kept/x", "verify": True})
    with pytest.warns(DeprecationWarning, match="keep is called backup") as told:
        sent.client.apply(path)
    assert told[0].filename == __file__
    assert (sent.jobs[-1]["backup"], sent.jobs[-1]["planned"]) == ("s3://kept/x", True)
    (batch,) = Batches(sent.ledger).list()
    assert batch.order["backup"] == "s3://kept/x"
    header, _ = sent.client.plan(batch.id)
    assert (header.order["backup"], "keep" in header.order) == ("s3://kept/x", False)
    assert header.version == 2, "version 0.1 refuses it, for it would delete without the backup"
    both = {"keep": "s3://kept/x", "backup": "s3://kept/x"}
    with pytest.raises(InvalidRequest, match="backup"):
        sent.client.apply(plan_file(tmp_path / "both.jsonl", order=both))


def test_a_plan_file_with_fields_that_are_not_known_is_refused_where_it_deletes(
    sent: RecordingLibrary, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="dry_run"):
        sent.client.apply(plan_file(tmp_path / "a.jsonl", order={"dryRun": True}))
    with pytest.raises(InvalidRequest, match="only_hide"):
        sent.client.apply(plan_file(tmp_path / "b.jsonl", only_hide=True))
    with pytest.raises(InvalidRequest, match="from_server"):
        sent.client.apply(plan_file(tmp_path / "c.jsonl", kind="migrate", order={"fromServer": "a", "to_server": "b"}))
    assert Batches(sent.ledger).list() == []
    url = "https://host/a.dcm"
    of_plan_file(plan_file(tmp_path / "d.jsonl", kind="upload", item=url, colour="red", order={"colour": "red"}))


def test_the_batch_of_a_message_that_says_keep_has_the_warning_once_whoever_planned_it(ledger: Ledger) -> None:
    message = {**ITEMS, "keep": "file:///kept/x", "verify": False}
    for _ in range(2):
        taken = ledger.take("J", task="pacs.batch.delete", job=message)
        attempt = Attempt("J", taken.fence, 1, last=False, ledger=ledger)
        with pytest.raises(Postpone):  # it goes on
            order(message, attempt, worker(ledger), kind=StudyDeletions(), name="delete", form=BatchDeleteJob)
        ledger.park("J", taken.fence, delay_s=0, code="", message="")
    batch = Batches(ledger).get("J")
    assert batch is not None
    assert (batch.frozen, len(batch.warnings), batch.order["backup"]) == (True, 1, "file:///kept/x")


def test_the_ledger_says_backup_in_both_words_so_that_no_worker_overlooks_it(ledger: Ledger) -> None:
    batches = Batches(ledger)
    batches.open("new", kind="delete", order={"backup": "s3://kept/x", "permanent": True}, concurrency=1)
    row = json.loads(cast(str, ledger.client.hget(f"{PREFIX}batch:new", "order")))
    assert (row["keep"], row["backup"]) == ("s3://kept/x", "s3://kept/x")
    ledger.client.hset(f"{PREFIX}batch:old", mapping={**ledger.client.hgetall(f"{PREFIX}batch:new")})
    ledger.client.hset(f"{PREFIX}batch:old", "order", json.dumps({"permanent": True, "keep": "s3://kept/x"}))
    for name in ("new", "old"):
        batch = batches.get(name)
        assert batch is not None
        assert batch.order == {"permanent": True, "backup": "s3://kept/x"}


# --- what every job may carry -------------------------------------------------------------------------------------

KINDS = sorted((kind for kind in schema._below(Job) if kind.__module__ == Job.__module__), key=lambda one: one.__name__)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_job_says_who_requested_it_and_why_and_none_has_a_call_back(kind: type[Job]) -> None:
    assert {"requested_by", "reason"} <= kind.model_fields.keys()
    for value in ("https://host/done?token=secret", None, ""):
        error = refusal(kind, {"callback_url": value})
        assert "call-backs do not exist yet" in error.message
        assert "secret" not in error.message


@pytest.mark.parametrize(
    "text", ["a\nb", "a\rb", "\x1b[2Jgone", "a\x00b", "\u202eevil", "\u2028", "\x85", "\ud800", "a\tb"]
)
def test_a_text_that_could_forge_a_line_is_refused_and_not_kept(ledger: Ledger, text: str) -> None:
    for name in ("requested_by", "reason"):
        assert refusal(TraceJob, {"uid": "1.2", name: text}).details == {"field": name}
        assert stated({name: text})[name] == ""


@pytest.mark.parametrize(
    "text", ["Dr. Müller", "山田　太郎", "می‌خواهم", "👩‍⚕️ on call", "why? because #7 & jane@host", ""]
)
def test_names_and_reasons_of_all_scripts_are_text(text: str) -> None:
    assert read_job(TraceJob, {"uid": "1.2", "reason": text}).reason == text


def test_who_and_why_are_bounded() -> None:
    for name, length in (("requested_by", REQUESTED_BY_LENGTH), ("reason", REASON_LENGTH)):
        read_job(TraceJob, {"uid": "1.2", name: "é" * length})
        assert refusal(TraceJob, {"uid": "1.2", name: "x" * (length + 1)}).details == {"field": name}
        assert refusal(TraceJob, {"uid": "1.2", name: 7}).details == {"field": name}
        assert stated({name: "x" * (length + 1)})[name] == ""
        assert stated({name: 7})[name] == ""


WHY = {"requested_by": "Dr. Who", "reason": "Doe^Jane asked for it"}


def test_who_and_why_are_kept_with_the_job_whoever_writes_it_down_first(ledger: Ledger) -> None:
    ledger.submit("j1", task="t", job={"uid": "1.2", **WHY})
    ledger.take("j2", task="t", job={"uid": "1.2", **WHY})
    ledger.submit("j3", task="t", job={"uid": "1.2"})
    for job_id in ("j1", "j2"):
        record = ledger.read_record(job_id)
        assert (record["requested_by"], record["reason"]) == (WHY["requested_by"], WHY["reason"])
    assert not WHY.keys() & ledger.read_record("j3").keys()
    taken = ledger.take("j1", task="t", job={"uid": "1.2", **WHY})
    ledger.end_as_dead_letter("j1", taken.fence, outcome={"error": {}}, code="poisoned", task="t", job={"uid": "1.2"})
    letter = ledger.dead_letter("j1")
    assert letter is not None
    assert (letter.requested_by, letter.reason) == (WHY["requested_by"], WHY["reason"])
    assert "Doe" not in letter.about


def test_another_reason_makes_no_other_job_and_counts_no_crash_apart(ledger: Ledger) -> None:
    job = {"image_url": "https://host/a.dcm", "idempotency_key": "order-7"}
    assert ledger.submit("j1", task="t", job={**job, **WHY})
    assert not ledger.submit("j1", task="t", job={**job, "reason": "another"})
    assert not ledger.submit("j1", task="t", job=job)
    assert ledger.read_record("j1")["reason"] == WHY["reason"]
    assert content_digest("t", {**job, **WHY}) == content_digest("t", job)
    with pytest.raises(CourierError):
        ledger.submit("j1", task="t", job={**job, "server": "a"})


def test_who_and_why_are_shown_by_the_batch_and_by_each_pass_and_stand_in_no_error_event_or_plan_file(
    sent: RecordingLibrary,
) -> None:
    sent.client.delete(["1.2.3"], backup="s3://kept/x", requested_by=WHY["requested_by"], reason=WHY["reason"])
    (batch,) = Batches(sent.ledger).list()
    sent.ledger.submit("undo", task="pacs.batch.undo", job={"batch_id": batch.id, "reason": "it was wrong"})
    sent.ledger.client.hset(f"{PREFIX}batch:{batch.id}", "undo:begun_by", "undo")
    told = sent.client.published(sent.client.get(batch.id))
    assert {name: told[name] for name in WHY} == WHY
    assert (told["passes"]["undo"]["reason"], told["passes"]["undo"]["requested_by"]) == ("it was wrong", None)
    header, _ = sent.client.plan(batch.id)
    for public in (json.dumps(batch.as_json()), header.model_dump_json(), redact_job(sent.jobs[-1])):
        assert "Doe" not in public
        assert "Dr. Who" not in public


def test_the_pass_of_a_chunk_is_known_by_its_id(ledger: Ledger) -> None:
    batches = Batches(ledger)
    batches.open("a.apply.b", kind="delete", order={}, concurrency=1)
    batch = batches.get("a.apply.b")
    assert batch is not None
    assert chunk_pass(chunk_job(batch, "undo", 12).job_id) == ("a.apply.b", "undo")
    assert chunk_pass("a.apply.b.verify.3.7") == ("a.apply.b", "verify")
    assert chunk_pass("a.apply.b") is None


def test_a_trace_says_of_a_piece_of_a_batch_who_asked_for_the_pass_that_it_belongs_to(ledger: Ledger) -> None:
    batches = Batches(ledger)
    batches.open("B", kind="delete", order={"reason": "of the order"}, concurrency=1)
    ledger.submit("undo", task="pacs.batch.undo", job={"batch_id": "B", **WHY})
    ledger.client.hset(f"{PREFIX}batch:B", "undo:begun_by", "undo")
    for job_id in ("B.undo.0", "B.undo.0.1", "B.verify.0"):
        ledger.submit(job_id, task=CHUNK_TASK, job={"batch_id": "B"})
    ledger.submit("B.undo.7", task="pacs.delete", job={"reason": "an id that only looks like it"})
    history = [Event(0, "ended", job_id, {}) for job_id in ("B.undo.0", "B.undo.0.1", "B.verify.0", "B.undo.7", "gone")]
    jobs = _jobs({"1.2": UidRecord(history, None, [], {}, {})}, ledger)
    assert {job.job_id: (job.requested_by, job.reason) for job in jobs} == {
        "B.undo.0": tuple(WHY.values()),
        "B.undo.0.1": tuple(WHY.values()),
        "B.verify.0": (None, None),
        "B.undo.7": (None, "an id that only looks like it"),
    }


def test_a_trace_says_who_asked_for_the_batch_that_deleted_an_image_or_its_study(ledger: Ledger) -> None:
    Batches(ledger).open("B", kind="delete", order={}, concurrency=1)
    ledger.submit("B", task="pacs.batch.delete", job=WHY)
    ledger.client.hset(f"{PREFIX}batch:B", "apply:begun_by", "B")
    ledger.submit("B.apply.0", task=CHUNK_TASK, job={"batch_id": "B"})
    deleted = Voided("deleted", 2, "B.apply.0")
    pushes = [StudyPush("upload", "ward", "u1", 1, None, deleted)]
    history = [Event(0, "waiting", f"j{number}", {}) for number in range(MAX_JOBS)]
    for uid_records in (
        UidRecord(history, None, [], {}, {"server": "ward", "job_id": "u1"}, voided=deleted),
        UidRecord(history, None, [], {}, {}, pushes=pushes),
    ):
        (job,) = _jobs({"1.2": uid_records}, ledger)
        assert (job.job_id, job.requested_by, job.reason) == ("B.apply.0", *WHY.values())


def test_an_order_in_words_of_the_message_is_as_strict_as_the_message() -> None:
    for wrong in ({"dryrun": True}, {"server": ["a"]}, {"permanant": False}):
        with pytest.raises(InvalidRequest):
            Order("delete", {**ITEMS, **wrong}).planned()
