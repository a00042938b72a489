"""What a person sees: the real commands on terminals of 80 and 40 columns and in pipes, with texts that are after them.

Nothing that identifies anything is cut, a double click selects it, and no text from outside controls the terminal.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import signal
import subprocess
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from courier.settings import Settings
from producer import Courier
from producer.errors import SourceUnreachable
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import Processes, RedisPart, SandboxPart
from sandbox.synthetic import image
from tests.odd_pacs import odd_pacs
from tests.stow import stow
from tests.terminals import PACS, Ended, environment, in_pipe, in_terminal

WAIT_S = 30
#: Half a surrogate pair, a title of the window, colours of both kinds of control characters, right-to-left, markup.
ODD = "\ud83d[/b][red]\x1b]0;owned\x07\x1b[31m\x9b31m\u202e:smile:\r\n\tend"
SCREENS = pytest.mark.parametrize("columns", [80, 40, None], ids=["80", "40", "pipe"])


def long_uid() -> str:
    """As long as a UID may be."""
    return f"1.2.826.0.1.3680043.8.498.1{uuid.uuid4().int:039d}"[:64]


ODD_STUDY, ODD_IMAGE = long_uid(), long_uid()
ODD_DATASET = {
    "0020000D": {"vr": "UI", "Value": [ODD_STUDY]},
    "0020000E": {"vr": "UI", "Value": [long_uid()]},
    "00080018": {"vr": "UI", "Value": [ODD_IMAGE]},
    "00080016": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.2"]},
    "00080020": {"vr": "DA", "Value": ["20260102"]},
    "00080060": {"vr": "CS", "Value": [ODD]},
    "00080061": {"vr": "CS", "Value": [ODD]},
    "00080050": {"vr": "SH", "Value": [ODD]},
    "00081030": {"vr": "LO", "Value": [ODD]},
    "0008103E": {"vr": "LO", "Value": [ODD]},
    "00100010": {"vr": "PN", "Value": [{"Alphabetic": ODD}]},
    "00100020": {"vr": "LO", "Value": [ODD]},
    "00201208": {"vr": "IS", "Value": [1]},
}


@dataclass(frozen=True)
class TerminalSite:
    """A worker on the sandbox's two servers and an odd one, with a study on both, one on each, and a dead letter."""

    env: dict[str, str]
    split: str
    single: str
    split_image: str
    dead_job: str
    dead_url: str
    folder: Path
    sandbox: SandboxPart

    def run(self, *words: str, columns: int | None) -> Ended:
        if columns is None:
            return in_pipe(words, env=self.env)
        return in_terminal(words, columns=columns, env=self.env)


@pytest.fixture(scope="module")
def site(
    redis_server: RedisPart, sandbox_server: SandboxPart, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TerminalSite]:
    redis_server.flush()
    sandbox_server.reset_faults()
    sandbox_server.empty()
    folder = tmp_path_factory.mktemp("terminals")
    with Processes(folder) as running, odd_pacs([ODD_DATASET]) as odd, ImageServer() as images:
        servers = [*sandbox_server.servers(), {"name": "odd", "type": "dicomweb", "url": odd}]
        tree = {
            "servers": servers,
            "queue": parts.queue_settings(redis_server),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": {"max_attempts": 1, "sweep_s": 0.1},
            "breaker": {"failures": 1000},
        }
        config = parts.write_settings(folder / "pacs.toml", tree)
        worker = parts.worker(running, config)
        split, single, split_image = long_uid(), long_uid(), long_uid()
        stow(sandbox_server.msdicom, image(split, series=long_uid(), sop=split_image))
        stow(sandbox_server.dcm4chee, image(split, series=long_uid(), sop=split_image))
        stow(sandbox_server.dcm4chee, image(split, series=long_uid(), sop=long_uid()))
        worker.wait_ready()
        with Courier(Settings.load({"PACS_CONFIG": str(config)})) as courier:
            url = images.put("single.dcm", image(single, series=long_uid(), sop=long_uid()))
            courier.upload(url, server="msdicom").result(timeout_s=WAIT_S)
            dead_url = images.put(f"{'long-' * 15}[/b].dcm", status=503)
            dead = courier.upload(dead_url)
            with pytest.raises(SourceUnreachable):
                dead.result(timeout_s=WAIT_S)
        env = {"PACS_CONFIG": str(config)}
        yield TerminalSite(env, split, single, split_image, dead.id, dead_url, folder, sandbox_server)
        worker.stop(grace_s=15)
        assert "Traceback (most recent call last)" not in worker.log, worker.log_tail(60)


def assert_is_harmless(ended: Ended) -> None:
    for text in (ended.shown, ended.errors):
        assert not [sign for sign in text if sign not in "\n" and (ord(sign) < 32 or 0x7F <= ord(sign) < 0xA0)]
        assert "\u202e" not in text
        assert "Traceback" not in text


@SCREENS
def test_studies_and_audits_lose_no_digit_and_no_server(site: TerminalSite, columns: int | None) -> None:
    studies = site.run("studies", columns=columns)
    assert studies.status == 0, studies
    assert all(studies.selects(study) for study in (site.split, site.single, ODD_STUDY)), studies.shown
    assert all(word in studies.shown for word in ("msdicom: 1", "dcm4chee: 2", "odd: 1"))
    audit = site.run("audit", "--server", "msdicom", "--server", "dcm4chee", columns=columns)
    assert audit.status == 0, audit
    assert audit.selects(site.split)
    assert "msdicom: 1, dcm4chee: 2" in audit.shown
    for ended in (studies, audit):
        assert_is_harmless(ended)


@SCREENS
def test_lookups_and_traces_lose_no_digit_and_no_job(site: TerminalSite, columns: int | None) -> None:
    exists = site.run("exists", "image", site.split_image, "--mode", "both", columns=columns)
    assert (exists.status, exists.selects(site.split_image), exists.selects(site.split)) == (0, True, True), exists
    metadata = site.run("metadata", "image", site.split_image, "--mode", "msdicom", columns=columns)
    assert (metadata.status, metadata.selects(site.split_image)) == (0, True), metadata
    traced = site.run("trace", site.single, columns=columns)
    assert (traced.status, traced.selects(site.single), traced.selects("msdicom")) == (0, True, True), traced
    job_id = json.loads(in_pipe(["trace", site.single, "--json"], env=site.env).raw)["jobs"][0]["job_id"]
    assert traced.selects(job_id)
    for ended in (exists, metadata, traced):
        assert_is_harmless(ended)


@SCREENS
def test_jobs_and_dead_letters_lose_neither_id_nor_url(site: TerminalSite, columns: int | None) -> None:
    listed = site.run("dead", "list", columns=columns)
    assert (listed.status, listed.selects(site.dead_job)) == (0, True), listed
    assert site.dead_url in listed.shown
    shown = site.run("dead", "show", site.dead_job, columns=columns)
    assert (shown.status, shown.selects(site.dead_job), site.dead_url in shown.shown) == (0, True, True), shown
    assert "{" not in shown.shown
    again = site.run("upload", site.dead_url, columns=columns)
    assert again.status == 1
    assert site.dead_url in again.shown
    servers = site.run("status", columns=columns)
    assert all(name in servers.shown for name in ("msdicom", "dcm4chee", "odd"))
    for ended in (listed, shown, again, servers):
        assert_is_harmless(ended)


def test_a_row_is_one_line_in_a_pipe(site: TerminalSite) -> None:
    lines = in_pipe(["studies"], env=site.env).raw.splitlines()
    assert [sum(study in line for line in lines) for study in (site.split, site.single, ODD_STUDY)] == [1, 1, 1]
    assert len(lines) == 4
    assert not [line for line in lines if line.endswith(" ")]
    coloured = in_pipe(["studies"], env={**site.env, "FORCE_COLOR": "1"})
    assert len(coloured.shown.splitlines()) == 4


@SCREENS
@pytest.mark.parametrize(
    "words",
    [
        ("studies", "--server", "odd"),
        ("studies", "--server", "odd", "--csv"),
        ("studies", "--server", "odd", "--json"),
        ("metadata", "image", ODD_IMAGE, "--server", "odd"),
        ("metadata", "image", ODD_IMAGE, "--server", "odd", "--json"),
        ("exists", "study", ODD_STUDY, "--server", "odd", "--metadata"),
    ],
    ids=lambda words: " ".join((words[0], *words[4:])),
)
def test_dicom_text_reaches_no_output_raw(site: TerminalSite, words: tuple[str, ...], columns: int | None) -> None:
    ended = site.run(*words, columns=columns)
    assert ended.status == 0, ended
    assert_is_harmless(ended)
    assert "owned" in ended.shown
    assert "\\ud83d" in ended.shown
    assert ":smile:" in ended.shown
    if columns is not None:
        return
    if "--json" in words:
        assert json.dumps(ODD)[1:-1] in json.dumps(json.loads(ended.shown))
    if "--csv" in words:
        (row,) = csv.DictReader(io.StringIO(ended.shown))
        assert row["patient_id"] == ODD.encode("unicode_escape").decode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_another_encoding_takes_all_forms(site: TerminalSite, encoding: str) -> None:
    for form in ([], ["--csv"], ["--json"]):
        env = {**site.env, "PYTHONIOENCODING": encoding}
        ended = in_pipe(["studies", "--server", "odd", *form], env=env)
        assert (ended.status, "Traceback" in ended.errors) == (0, False), ended.errors
        assert json.loads(ended.raw) if "--json" in form else ODD_STUDY in ended.raw


@pytest.mark.parametrize("name", ["[/b].dcm", "[link=x]a[/link].dcm", "%1B[31m[bold.dcm", "a\x1b]0;owned\x07.dcm"])
def test_a_url_with_markup_ends_like_any_other(site: TerminalSite, name: str) -> None:
    ended = site.run("upload", f"http://127.0.0.1:1/{name}", columns=80)
    assert ended.status in (1, 2), ended
    assert_is_harmless(ended)


@pytest.mark.parametrize(
    "words", [("result", "a\x1b[31m[/b]"), ("batch", "show", "[/b]\x9b31m"), ("cancel", "\x07[/b]")]
)
def test_an_id_with_control_characters_is_named_with_escapes(site: TerminalSite, words: tuple[str, ...]) -> None:
    ended = site.run(*words, columns=80)
    assert ended.status != 0
    assert_is_harmless(ended)


def newest(ended: Ended, *studies: str) -> list[str]:
    """Which of ``studies`` are shown, in the order of the output."""
    return sorted((study for study in studies if study in ended.shown), key=ended.shown.index)


@SCREENS
def test_a_short_list_shows_the_newest_studies_of_a_server_that_sorts(site: TerminalSite, columns: int | None) -> None:
    old, new, late = ("1.2.1" + long_uid()[5:], "1.2.9" + long_uid()[5:], "1.2.5" + long_uid()[5:])
    for study, date, time in ((old, "19990101", "1"), (new, "20320101", "080000"), (late, "20320101", "090000")):
        stow(site.sandbox.dcm4chee, image(study, series=long_uid(), StudyDate=date, StudyTime=time.zfill(6), side=8))
    ended = site.run("studies", "--server", "dcm4chee", "--limit", "2", columns=columns)
    assert (ended.status, newest(ended, old, new, late)) == (0, [late, new]), ended
    assert "server order" not in ended.shown + ended.errors
    assert "dcm4chee: 2 studies, and more" in ended.shown + ended.errors
    for study in (old, new, late):
        assert in_pipe(["delete", "study", study, "--yes"], env=site.env).status == 0


@pytest.mark.parametrize("limit", ["1", "3"])
def test_a_silent_server_is_named_however_short_the_list_is(site: TerminalSite, limit: str) -> None:
    site.sandbox.set_fault("dcm4chee", "*", refuse=True)
    try:
        ended = site.run("studies", "--limit", limit, columns=80)
    finally:
        site.sandbox.reset_faults()
    assert ended.status == 3
    assert "dcm4chee: 0 studies, dcm4chee" in ended.shown


@SCREENS
def test_a_list_that_is_cut_before_a_server_has_sorted_it_says_so(site: TerminalSite, columns: int | None) -> None:
    mine = [long_uid() for _ in range(40)]
    for study in mine:
        stow(site.sandbox.msdicom, image(study, series=long_uid(), side=8, StudyDate="20310101"))
    ended = site.run("studies", "--limit", "4", columns=columns)
    assert (ended.status, len(newest(ended, *mine, site.split, site.single, ODD_STUDY))) == (0, 4), ended
    heading = "in server order; newer studies may be missing, because msdicom cannot sort"
    assert f"\n{heading}\n" in f"\n{ended.shown}"
    if columns is None:
        for form in ("--json", "--csv"):
            cut = in_pipe(["studies", "--limit", "4", form], env=site.env)
            assert "in server order" in cut.errors
            if form == "--json":
                assert json.loads(cut.raw)["order"] == "server"
    whole = site.run("studies", columns=columns)
    assert "server order" not in whole.shown + whole.errors
    assert len(newest(whole, *mine)) == 40


def test_the_answers_of_a_watched_status_come_into_a_pipe_as_they_are_given(site: TerminalSite) -> None:
    with subprocess.Popen(
        [PACS, "status", "--watch", "0.2"], stdout=subprocess.PIPE, text=True, env=environment(site.env)
    ) as watched:
        assert watched.stdout is not None
        seen = [line for line in itertools.islice(watched.stdout, 10) if line.startswith("dcm4chee")]
        assert len(seen) >= 2
        assert watched.poll() is None
        watched.send_signal(signal.SIGINT)
        assert watched.wait(timeout=30) == 0


def batch_of(ended: Ended) -> str:
    return re.findall(r"^batch (\S+)$", ended.shown, re.MULTILINE)[-1]


@pytest.mark.parametrize("columns", [80, 40])
def test_a_batch_ends_with_its_id_and_its_undo_asks_what_will_be_deleted_and_where(
    site: TerminalSite, columns: int
) -> None:
    study, series = long_uid(), long_uid()
    with ImageServer() as images:
        urls = [images.put(f"{n}[b].dcm", image(study, series=series, side=8)) for n in range(3)]
        uploaded = site.run("batch", "upload", *urls, "--server", "msdicom", columns=columns)
    assert (uploaded.status, "upload done: 3 of 3 items" in uploaded.shown) == (0, True), uploaded
    batch_id = batch_of(uploaded)
    assert uploaded.selects(batch_id)
    question = "Undo the upload? 3 images will be deleted for good: 3 on msdicom. [y/N]:"
    asked = in_terminal(["batch", "undo", batch_id], columns=columns, env=site.env, typed="n\n")
    assert (asked.status, question in asked.shown, "Nothing was done." in asked.shown) == (1, True, True), asked
    undone = in_terminal(["batch", "undo", batch_id], columns=columns, env=site.env, typed="y\n")
    assert (undone.status, question in undone.shown) == (0, True), undone
    assert "undo of upload: 3 of 3 items" in undone.shown
    for ended in (uploaded, asked, undone):
        assert_is_harmless(ended)


@pytest.mark.parametrize("columns", [80, None])
def test_an_undo_that_is_refused_does_not_count_as_one(site: TerminalSite, columns: int | None) -> None:
    study = long_uid()
    stow(site.sandbox.dcm4chee, image(study, series=long_uid(), side=8))
    deleted = site.run("batch", "delete", study, "--server", "dcm4chee", "--yes", columns=columns)
    assert (deleted.status, "delete done: 1 of 1 items" in deleted.shown) == (0, True), deleted
    undone = site.run("batch", "undo", batch_of(deleted), "--yes", columns=columns)
    assert (undone.status, "undo of delete: 0 of 1 items, 1 refused" in undone.shown) == (1, True), undone
    assert undone.selects(study)


@pytest.mark.parametrize("packed", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_of_which_nothing_can_be_read_is_no_success_and_says_why(site: TerminalSite, packed: int) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", packed) as file:
        file.writestr("1.dcm", image(long_uid(), series=long_uid(), side=8))
    with ImageServer() as images:
        ended = site.run("batch", "upload", images.put("all.zip", archive.getvalue()), columns=80)
    assert (ended.status, "upload done: 0 of 1 items, 1 refused" in ended.shown) == (1, True), ended
    assert "it is packed in a way that is not read here" in " ".join(ended.shown.split())


def test_an_empty_list_of_dead_letters_says_that_there_are_none(site: TerminalSite) -> None:
    assert "No dead letter matches." in site.run("dead", "list", "--code", "poisoned", columns=80).shown
    assert site.run("dead", "purge", "--all", "--yes", columns=80).status == 0
    assert "There are no dead letters." in site.run("dead", "list", columns=80).shown
