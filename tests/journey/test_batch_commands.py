"""The commands of batches with a real worker: what they take, what they show, what they refuse, and leaving them."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from courier.batches.store import Batches
from producer import Courier
from producer.cli import main
from producer.errors import InvalidRequest
from sandbox.synthetic import image, new_uid

WAIT_S = 60
QUICK = {"max_attempts": 2, "backoff_base_s": 0.1, "sweep_s": 0.1, "grace_s": 2}


@dataclass
class CommandBench:
    """A worker that answers, a folder that it may read, and the command."""

    folder: Path
    config: Path
    environ: dict[str, str]
    images: Any
    urls: list[str] = field(default_factory=list)

    def __call__(self, *words: str, status: int = 0, stdin: str | None = None) -> Result:
        ended = CliRunner().invoke(main, words, input=stdin)
        assert ended.exit_code == status, ended.output
        return ended

    def json(self, *words: str, status: int = 0, stdin: str | None = None) -> Any:
        return json.loads(self(*words, "--json", status=status, stdin=stdin).stdout)

    def serve(self, count: int, study: str | None = None) -> list[str]:
        study = study or new_uid()
        return [self.images.put(f"{new_uid()}.dcm", image(study, side=8)) for _ in range(count)]

    def file(self, name: str, content: str) -> str:
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    def totals(self, answer: Any) -> dict[str, int]:
        return {name: count for name, count in answer["totals"].items() if count}


@pytest.fixture
def pacs(worker, image_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandBench:
    folder = tmp_path / "images"
    folder.mkdir()
    sources = {"allow_hosts": ["127.0.0.1:*"], "allow_private_networks": True, "folders": [str(folder)]}
    out = tmp_path / "out"
    out.mkdir()
    running = worker(jobs=QUICK, sources=sources, downloads={"folders": [str(out)]})
    monkeypatch.setenv("PACS_CONFIG", str(running.config))
    return CommandBench(folder, running.config, {**os.environ, "PACS_CONFIG": str(running.config)}, image_server)


def test_items_come_from_files_columns_standard_input_and_the_command_itself(pacs: CommandBench) -> None:
    urls = pacs.serve(6)
    listed = pacs.file("urls.txt", f"# of Monday\n{urls[0]}\n\n{urls[1]}\n{urls[0]}\n")
    ended = pacs("batch", "upload", listed, urls[2], "--name", "of Monday", "--json")
    answer = json.loads(ended.stdout)
    assert (answer["kind"], answer["name"], answer["state"]) == ("upload", "of Monday", "done")
    assert pacs.totals(answer) == {"stored": 3}
    assert "1 of them are there more than once" in ended.stderr

    table = pacs.file("urls.csv", f"no;url\n1;{urls[3]}\n2;{urls[0]}\n")
    assert pacs.totals(pacs.json("batch", "upload", table, "--column", "url")) == {"stored": 1, "already_there": 1}
    lines = "".join(json.dumps({"url": url}) + "\n" for url in urls[4:])
    assert pacs.totals(pacs.json("batch", "upload", "-", "--column", "url", stdin=lines)) == {"stored": 2}

    with Courier() as courier:  # and from a program, which gives them one by one
        handle = courier.batch.upload((url for url in urls), name="again", verify=False)
        assert handle.result(timeout_s=WAIT_S)["batch_id"] == handle.batch_id
        assert courier.batch.get(handle.batch_id).of("apply").totals == {"already_there": 6}
        with pytest.raises(InvalidRequest, match="item 2: no URL"):
            courier.batch.upload([urls[0], "DOE^JANE"])


def test_a_worker_lists_a_folder_and_an_archive_and_says_what_it_leaves_out(pacs: CommandBench) -> None:
    study = new_uid()
    (pacs.folder / "a b").mkdir()
    for number in range(3):
        (pacs.folder / "a b" / f"{number}.dcm").write_bytes(image(study, side=8))
    (pacs.folder / "DICOMDIR").write_bytes(b"no image")
    answer = pacs.json("batch", "upload", f"{pacs.folder.as_uri()}/")
    assert pacs.totals(answer) == {"skipped": 1, "stored": 3}

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(4):
            archive.writestr(f"ct/{number}.dcm", image(study, side=8))
        archive.writestr("viewer/README.TXT", b"no image")
    url = pacs.images.put("all.zip", packed.getvalue())
    answer = pacs.json("batch", "upload", url)
    assert pacs.totals(answer) == {"skipped": 1, "stored": 4}
    skipped = pacs("batch", "report", answer["batch_id"], "--csv", "--status", "skipped").stdout
    assert "no image by its name" in skipped
    undone = pacs.json("batch", "undo", answer["batch_id"], "--yes")
    assert undone["passes"]["undo"]["totals"]["undone"] == 4
    pacs("batch", "upload", url, f"{pacs.folder.as_uri()}/", status=2)
    refused = pacs("batch", "upload", pacs.images.url("none.zip"), status=1)
    assert "source_not_found" in refused.stderr


def test_what_cannot_be_read_of_an_archive_counts_and_is_shown_with_the_reason(pacs: CommandBench) -> None:
    study, packed = new_uid(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("1.dcm", image(study, side=8))
        archive.writestr("README", b"no image")
        archive.writestr("2.dcm", image(study, side=8), zipfile.ZIP_LZMA)
        archive.writestr("../up.dcm", image(study, side=8))
    url = pacs.images.put("half.zip", packed.getvalue())
    planned = pacs("batch", "upload", url, "--dry-run")
    assert "1 of 4 items to do" in planned.stdout
    assert planned.stdout.count("source_not_allowed") == 2
    shown = pacs("batch", "upload", url, status=1)
    for words in ("packed in a way", "leads out of", "source_not_allowed"):
        assert words in " ".join(shown.stdout.split())
    assert "batch retry" not in shown.stdout, "a retry cannot help"
    answer = json.loads(pacs("batch", "upload", url, "--json", status=1).stdout)
    assert pacs.totals(answer) == {"skipped": 1, "refused": 2, "already_there": 1}
    plan = pacs.folder.parent / "half.jsonl"
    pacs("batch", "upload", url, "--plan", str(plan))
    applied = pacs("batch", "apply", str(plan), "--json", status=1)
    assert pacs.totals(json.loads(applied.stdout)) == pacs.totals(answer), applied.output


@pytest.mark.parametrize(
    ("entries", "sentence", "status"),
    [
        ({}, "all.zip is empty", 1),
        ({"README": b"no image", "DICOMDIR": b"no image"}, "none of the 2 files found is an image", 2),
    ],
)
def test_an_archive_without_an_image_is_never_called_done(
    pacs: CommandBench, entries: dict[str, bytes], sentence: str, status: int
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, body in entries.items():
            archive.writestr(name, body)
    refused = pacs("batch", "upload", pacs.images.put("all.zip", packed.getvalue()), status=status)
    assert sentence in " ".join(refused.output.split())


def test_wrong_input_is_told_with_its_rows_and_begins_nothing(pacs: CommandBench) -> None:
    (url,) = pacs.serve(1)
    mixed = pacs.file("mixed.txt", f"{url}\nDOE^JANE\nftp://host/a\n" + "x\n" * 30)
    refused = pacs("batch", "upload", mixed, status=2)
    assert "32 rows are bad" in refused.stderr
    assert "line 2: no URL" in refused.stderr
    assert "and 12 more" in refused.stderr
    assert "DOE" not in refused.output
    answer = json.loads(pacs("batch", "upload", mixed, "--skip-bad", "--json").stdout)
    assert pacs.totals(answer) == {"stored": 1}
    assert "left out" in pacs("batch", "upload", mixed, "--skip-bad", "--dry-run").stderr

    for words in (
        ("upload", pacs.file("empty.txt", "# nothing\n")),
        ("upload", str(pacs.folder / "missing.txt")),
        ("upload", pacs.file("a.csv", "url\n")),
        ("upload", url, "--rate", "fast"),
        ("upload", url, "--bandwidth", "20"),
        ("upload", url, "--window", "20-06"),
        ("upload", url, "--window", "20:00-06:00 Mars/Olympus"),
        ("upload", url, "--width", "0"),
        ("delete",),
        ("delete", "1.2.3", "--all", "--yes"),
        ("delete", "--query", "StudyDate", "--yes"),
        ("download", "1.2.3"),
        ("migrate", "1.2.3", "--from", "msdicom", "--to", "msdicom"),
    ):
        pacs("batch", *words, status=2)
    for words in (
        ("delete", "1.2.3"),
        ("delete", "--all", "--yes"),
        ("migrate", "1.2.3", "--from", "msdicom", "--to", "dcm4chee", "--delete-source"),
        ("show", "elsewhere"),
        ("apply", "elsewhere"),
    ):
        pacs("batch", *words, status=1)
    assert len(pacs.json("batch", "list")) == 2


def test_a_plan_is_shown_written_refused_when_edited_and_applied_as_it_stands(pacs: CommandBench) -> None:
    urls = [*pacs.serve(4), pacs.images.url("absent.dcm")]
    plan = pacs.folder / "plan.jsonl"
    listed = pacs.file("urls.txt", "\n".join(urls))
    shown = pacs("batch", "upload", listed, "--plan", str(plan), "--name", "planned").stdout
    assert "5 of 5 items to do" in shown
    pacs("batch", "upload", listed, "--plan", str(plan), status=2)  # nothing is overwritten
    (planned,) = pacs.json("batch", "list")  # nor is anything planned for it
    assert (planned["state"], planned["settled"]) == ("planned", 0)
    assert pacs.json("batch", "plan", planned["batch_id"])["plan"]["to_do"] == 5

    whole = plan.read_text(encoding="utf-8")
    plan.write_text(whole.replace(urls[1], urls[0]), encoding="utf-8")
    assert "a line was changed" in pacs("batch", "apply", str(plan), status=2).stderr
    plan.write_text("".join(whole.splitlines(keepends=True)[:3]), encoding="utf-8")
    assert "after line 3 without its totals" in pacs("batch", "apply", str(plan), status=2).stderr
    plan.write_text(whole, encoding="utf-8")
    answer = pacs.json("batch", "apply", str(plan), status=1)
    assert (answer["name"], pacs.totals(answer)) == ("planned", {"stored": 4, "refused": 1})
    assert [one["code"] for one in answer["failures"]] == ["source_not_found"]

    answer = pacs.json("batch", "apply", planned["batch_id"], status=1)
    assert pacs.totals(answer) == {"already_there": 4, "refused": 1}
    pacs("batch", "retry", planned["batch_id"], status=2)  # what was refused would be refused again
    batch = answer["batch_id"]
    rows = list(csv.DictReader(io.StringIO(pacs("batch", "report", batch, "--csv").stdout)))
    assert [row["status"] for row in rows] == ["already_there"] * 4 + ["refused"]
    assert [row["item"] for row in rows] == urls
    lines = pacs("batch", "report", batch, "--jsonl", "--status", "refused").stdout.splitlines()
    assert [json.loads(line)["code"] for line in lines] == ["source_not_found"]
    assert len(pacs.json("batch", "report", batch)) == 5
    assert pacs.json("batch", "verify", batch)["state"] == "done"  # what was refused is not there to be looked at


def test_a_watch_is_left_and_come_back_to_while_the_batch_goes_on(pacs: CommandBench, sandbox) -> None:
    sandbox.set_fault("msdicom", "store", latency_ms=3000)
    listed = pacs.file("urls.txt", "\n".join(url for _ in range(4) for url in pacs.serve(25)))
    code = "from producer.cli import main; main()"
    command = [sys.executable, "-c", code, "batch", "upload", listed, "--width", "1", "--no-verify"]
    watching = subprocess.Popen(
        command,
        env=pacs.environ,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with Courier() as courier:
        assert any("running" in line for line in watching.stderr)  # as far as that line
        (batch,) = courier.batch.list()
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=WAIT_S)
        assert watching.returncode == 130
        assert f"pacs batch watch {batch.id}" in err
        assert "Traceback" not in out + err
        assert pacs.json("batch", "watch", batch.id, "--timeout", "0.1", status=3)["status"] in (
            "running",
            "waiting",
            "queued",
        )
        assert pacs.json("batch", "pause", batch.id)["state"] == "paused"
        sandbox.reset_faults()
        assert pacs.json("batch", "resume", batch.id)["state"] == "running"
        back = pacs("batch", "watch", batch.id)
        assert "stored" in back.stdout
        assert "done 100/100 100 %" in back.stderr
        assert [one.state for one in courier.batch.watch(batch.id)] == ["done"]
    assert batch.id in pacs("batch", "list").stdout


def test_studies_are_migrated_by_a_query_after_a_look_at_the_plan_and_taken_back(
    pacs: CommandBench, put, sandbox
) -> None:
    studies = [new_uid() for _ in range(4)]
    for study in studies:
        put(sandbox.msdicom, image(study, side=8))
    put(sandbox.dcm4chee, image(studies[0], side=8))
    migrate = ("batch", "migrate", "--from", "msdicom", "--to", "dcm4chee")
    shown = pacs.json(*migrate, *studies, "2.25.7", "--dry-run")
    assert shown["state"] == "planned"
    assert sum(group["items"] for group in shown["plan"]["groups"]) == 5
    assert shown["plan"]["to_do"] < 5  # what is nowhere is left out
    assert pacs.json(*migrate, "--query", f"StudyInstanceUID={studies[1]}")["totals"] == {"copied": 1}
    answer = pacs.json(*migrate, "--all", "--name", "all")
    assert (answer["items"], answer["failures"]) == (4, [])
    undone = pacs.json("batch", "undo", answer["batch_id"], "--yes")
    assert undone["state"] == "undone"
    pacs("batch", "undo", answer["batch_id"], status=1)  # nobody can be asked
    report = pacs("batch", "report", answer["batch_id"], "--csv").stdout
    assert report.count("\n") == 5


def test_studies_are_deleted_after_a_confirmation_kept_copies_bring_them_back_and_downloads_are_files(
    pacs: CommandBench, put, sandbox, tmp_path: Path
) -> None:
    studies = [new_uid() for _ in range(3)]
    for study in studies:
        put(sandbox.msdicom, image(study, side=8))
    listed = pacs.file("uids.txt", "\n".join(studies))
    out = pacs.folder.parent / "out"
    fetched = pacs.json("batch", "download", listed, "--to-folder", str(out / "all"))
    assert pacs.totals(fetched) == {"downloaded": 3}
    assert {path.name for path in (out / "all").iterdir()} == {f"{study}.zip" for study in studies}

    pacs("batch", "delete", listed, status=1)
    plan = pacs.folder / "plan.jsonl"
    pacs("batch", "delete", listed, "2.25.7", "--keep", str(out / "kept"), "--plan", str(plan))
    pacs("batch", "apply", str(plan), status=1)
    answer = pacs.json("batch", "apply", str(plan), "--yes")
    assert pacs.totals(answer)["deleted"] == 3
    assert "2.25.7" in pacs("batch", "report", answer["batch_id"], "--status", "skipped").stdout
    assert pacs.json("batch", "undo", answer["batch_id"], "--yes")["passes"]["undo"]["totals"]["undone"] == 3
    pacs("batch", "delete", "--all", "--yes", status=1)
    answer = pacs.json("batch", "delete", "--all", "--confirm", "delete all studies", "--server", "msdicom")
    assert pacs.totals(answer) == {"deleted": 3}


@pytest.mark.parametrize("from_file", [True, False], ids=["the plan's file", "the batch's id"])
def test_a_planned_deletion_reaches_every_server_that_it_shows_by_file_and_by_id(
    pacs: CommandBench, put, sandbox, from_file: bool
) -> None:
    both, one = new_uid(), new_uid()
    for url, study in ((sandbox.msdicom, both), (sandbox.dcm4chee, both), (sandbox.dcm4chee, one)):
        put(url, image(study, side=8))
    plan = pacs.folder / "plan.jsonl"
    shown = pacs.json("batch", "delete", both, one, "2.25.7", "--plan", str(plan))
    groups = {(group["do"], group["server_name"]): group["items"] for group in shown["plan"]["groups"]}
    assert groups == {("apply", "msdicom"): 1, ("apply", "dcm4chee"): 2, ("skip", None): 1}
    answer = pacs.json("batch", "apply", str(plan) if from_file else shown["batch_id"], "--yes")
    assert answer["failures"] == []
    assert all(pacs.json("exists", "study", study, status=1)["status"] for study in (both, one))
    trouble = pacs.json("batch", "undo", answer["batch_id"], "--yes", status=1)
    assert "No copy was kept" in trouble["failures"][0]["message"]


def test_the_entries_of_an_archive_are_stored_once_each_although_another_worker_has_to_go_on(
    worker, image_server, sandbox
) -> None:
    study = new_uid()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(150):
            archive.writestr(f"ct/{number}.dcm", image(study, side=8))
    url = image_server.put("all.zip", packed.getvalue())
    jobs = {**QUICK, "max_attempts": 5, "lease_s": 1.5, "max_deaths": 5}
    doomed = worker(jobs=jobs)
    sandbox.set_fault("msdicom", "store", latency_ms=700)
    with Courier(doomed.settings) as courier:
        handle = courier.batch.upload(url, width=2)
        while not any(batch.settled for batch in courier.batch.list()):
            time.sleep(0.05)
        doomed.kill()
        sandbox.reset_faults()
        worker(jobs=jobs)
        answer = handle.result(timeout_s=WAIT_S)
        assert (answer["items"], answer["failures"]) == (150, [])
        assert answer["totals"] == {"stored": 150}
        assert len({row["result"]["image_uid"] for row in courier.batch.report(handle.batch_id)}) == 150


def test_a_declined_deletion_is_not_done_by_a_retry_and_what_deletes_asks_whatever_it_is_called(
    pacs: CommandBench, put, sandbox
) -> None:
    study = new_uid()
    put(sandbox.msdicom, image(study, side=8))
    planned = pacs.json("batch", "delete", study, "--dry-run")["batch_id"]
    assert pacs.json("batch", "apply", planned, "--dry-run")["plan"]["to_do"] == 1
    pacs("batch", "cancel", planned)
    assert "--yes" in pacs("batch", "retry", planned, status=1).stderr
    assert "not begun" in pacs("batch", "retry", planned, "--yes", status=2).stderr
    pacs("exists", "study", study)

    sandbox.set_fault("msdicom", "delete", status=503)
    failed = pacs.json("batch", "delete", study, "--server", "msdicom", "--yes", status=1)
    assert pacs.totals(failed) == {"failed": 1}
    sandbox.reset_faults()
    batch = failed["batch_id"]
    groups = [{"server_name": "msdicom", "status": "failed", "items": 1}]
    assert pacs.json("batch", "retry", batch, "--dry-run")["groups"] == groups
    assert pacs.json("batch", "undo", batch, "--dry-run")["items"] == 0
    pacs("batch", "retry", batch, status=1)
    assert pacs.totals(pacs.json("batch", "retry", batch, "--yes")) == {"deleted": 1}
    assert "retry would be about 0 of 1 items" in pacs("batch", "retry", batch, "--dry-run").stdout
    assert "deleted" in pacs("batch", "undo", batch, "--dry-run").stdout
    pacs("batch", "apply", batch, "--dry-run", status=2)
    assert pacs.json("batch", "verify", batch)["state"] == "done"  # a look at a deletion takes nothing away

    put(sandbox.msdicom, image(study, side=8))
    move = ("batch", "migrate", study, "--from", "msdicom", "--to", "dcm4chee", "--delete-source")
    moved = pacs.json(*move, "--yes")["batch_id"]
    put(sandbox.msdicom, image(study, side=8))
    assert "--yes" in pacs("batch", "verify", moved, status=1).stderr


def test_a_watch_tells_what_became_of_the_batch_and_not_of_a_job_that_wanted_something_else(pacs: CommandBench) -> None:
    done = pacs.json("batch", "upload", *pacs.serve(2))["batch_id"]
    pacs("batch", "retry", done, status=2)  # there is nothing to try again
    watched = pacs.json("batch", "watch", done)
    assert (watched["state"], watched["totals"], watched["failures_total"]) == ("done", {"stored": 2}, 0)
    assert "stored" in pacs("batch", "watch", done).stdout

    for name in ("pause", "resume", "cancel"):
        assert f"The batch is done; there is nothing to {name}." in pacs("batch", name, done, status=1).stderr
        assert pacs.json("batch", name, done, status=1)["state"] == "done"

    planned = pacs.json("batch", "upload", *pacs.serve(1), "--dry-run")["batch_id"]
    assert pacs.json("batch", "watch", planned)["state"] == "planned"
    pacs("batch", "pause", planned, status=1)
    pacs("batch", "cancel", planned)
    assert pacs.json("batch", "watch", planned, status=1)["state"] == "cancelled"
    assert pacs.json("batch", "cancel", planned)["state"] == "cancelled"  # as it shall be

    with Courier() as courier:  # whoever planned it was interrupted before its job was sent
        batches = Batches(courier.batch.ledger)
        batches.open("left", kind="upload", order={}, concurrency=1)
        batches.cancel("left")
    assert pacs.json("batch", "watch", "left", "--timeout", "20", status=1)["state"] == "cancelled"
    assert "cancelled" in pacs("batch", "watch", "left", "--timeout", "20", status=1).stdout
    with Courier() as courier:  # or killed while it planned
        Batches(courier.batch.ledger).open("broken", kind="upload", order={}, concurrency=1)
        courier.batch.ledger.client.hset("courier:batch:broken", "planned_ms", 1)
    assert "interrupted" in pacs("batch", "watch", "broken", "--timeout", "20", status=1).stdout
    refused = pacs("batch", "upload", *pacs.serve(1), "--server", "nobody", "--no-wait").stdout.strip()
    assert pacs.json("batch", "watch", refused, status=2)["error"]["code"] == "invalid_request"


def test_the_status_of_an_undo_speaks_of_the_undo_and_that_of_a_verification_of_what_it_saw(
    pacs: CommandBench, sandbox
) -> None:
    urls = [*pacs.serve(2), pacs.images.url("absent.dcm")]
    batch = pacs.json("batch", "upload", *urls, status=1)["batch_id"]
    assert pacs.json("batch", "verify", batch)["failures_total"] == 1  # what was refused is not there to be looked at
    pacs("batch", "watch", batch, status=1)
    sandbox.set_fault("msdicom", "delete", status=503)
    pacs.json("batch", "undo", batch, "--yes", status=1)
    sandbox.reset_faults()
    assert len(pacs.json("batch", "report", batch, "--status", "verified")) == 2
    assert len(pacs.json("batch", "report", batch, "--status", "failed")) == 2  # in the undo
    assert "verfied" in pacs("batch", "report", batch, "--status", "verfied", status=2).stderr
    undone = pacs("batch", "undo", batch, "--yes")
    assert "source_not_found" not in undone.stdout
    assert pacs.json("batch", "watch", batch)["state"] == "undone"


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_what_a_verification_misses_is_told_with_what_to_do_and_done_again(
    pacs: CommandBench, sandbox, kind: str
) -> None:
    study = new_uid()
    batch = pacs.json("batch", "upload", *pacs.serve(2, study))["batch_id"]
    with Courier() as courier:
        gone = next(iter(courier.batch.report(batch)))["result"]["image_uid"]
        if kind == "download":
            out = pacs.folder.parent / "out"
            batch = pacs.json("batch", "download", study, "--to-folder", str(out))["batch_id"]
            next(out.glob("*.zip")).unlink()
        else:
            courier.delete("image", gone).result(timeout_s=WAIT_S)
    shown = pacs("batch", "verify", batch, status=1).stdout
    assert f"What is missing can be tried again: pacs batch retry {batch}" in shown
    assert pacs.json("batch", "retry", batch, "--dry-run")["groups"] == [
        {"server_name": "msdicom", "status": "missing", "items": 1}
    ]
    done = {"upload": {"stored": 2}, "download": {"downloaded": 1}}[kind]
    assert pacs.totals(pacs.json("batch", "retry", batch)) == done
    assert "missing" not in pacs("batch", "verify", batch).stdout
