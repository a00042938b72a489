"""What a person sees: the real commands on terminals of 80 and 40 columns and in pipes, with texts that are after them.

Nothing that identifies anything is cut, a double click selects it, and no text from outside controls the terminal.
"""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from producer import Courier
from producer.errors import SourceUnreachable
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import Processes, RedisPart, SandboxPart
from sandbox.synthetic import image
from tests.odd_pacs import odd_pacs
from tests.stow import stow
from tests.terminals import Ended, in_pipe, in_terminal
from worker.settings import Settings

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
class Site:
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
) -> Iterator[Site]:
    redis_server.flush()
    sandbox_server.calm()
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
        yield Site(env, split, single, split_image, dead.id, dead_url, folder, sandbox_server)
        worker.stop(grace_s=15)
        assert "Traceback (most recent call last)" not in worker.log, worker.log_tail(60)


def assert_is_harmless(ended: Ended) -> None:
    for text in (ended.shown, ended.errors):
        assert not [sign for sign in text if sign not in "\n" and (ord(sign) < 32 or 0x7F <= ord(sign) < 0xA0)]
        assert "\u202e" not in text
        assert "Traceback" not in text


@SCREENS
def test_studies_and_audits_lose_no_digit_and_no_server(site: Site, columns: int | None) -> None:
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
def test_lookups_and_traces_lose_no_digit_and_no_job(site: Site, columns: int | None) -> None:
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
def test_jobs_and_dead_letters_lose_neither_id_nor_url(site: Site, columns: int | None) -> None:
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


def test_a_row_is_one_line_in_a_pipe(site: Site) -> None:
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
def test_dicom_text_reaches_no_output_raw(site: Site, words: tuple[str, ...], columns: int | None) -> None:
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
def test_a_terminal_of_another_encoding_takes_all_forms(site: Site, encoding: str) -> None:
    for form in ([], ["--csv"], ["--json"]):
        env = {**site.env, "PYTHONIOENCODING": encoding}
        ended = in_pipe(["studies", "--server", "odd", *form], env=env)
        assert (ended.status, "Traceback" in ended.errors) == (0, False), ended.errors
        assert json.loads(ended.raw) if "--json" in form else ODD_STUDY in ended.raw


@pytest.mark.parametrize("name", ["[/b].dcm", "[link=x]a[/link].dcm", "%1B[31m[bold.dcm", "a\x1b]0;owned\x07.dcm"])
def test_a_url_with_markup_ends_like_any_other(site: Site, name: str) -> None:
    ended = site.run("upload", f"http://127.0.0.1:1/{name}", columns=80)
    assert ended.status in (1, 2), ended
    assert_is_harmless(ended)


@pytest.mark.parametrize(
    "words", [("result", "a\x1b[31m[/b]"), ("batch", "show", "[/b]\x9b31m"), ("cancel", "\x07[/b]")]
)
def test_an_id_with_control_characters_is_named_with_escapes(site: Site, words: tuple[str, ...]) -> None:
    ended = site.run(*words, columns=80)
    assert ended.status != 0
    assert_is_harmless(ended)
