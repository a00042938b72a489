"""Our pages in Flower: what they show, who may change anything, and what they say without the ledger.

Flower runs in this process on loopback, without its events; the ledger is `fakeredis`.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
import requests
from flower import urls
from flower.app import Flower
from flower.options import options
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets

from courier.batches.store import Batches
from courier.errors import SourceUnreachable
from courier.ledger.breakers import Breakers
from courier.ledger.jobs import Ledger
from courier.ledger.peers import say
from courier.ledger.suspensions import Suspensions
from courier.settings import ServerSettings
from worker.app import app
from worker.flower import dead_letter_page, pages, rows, server_page
from worker.flower.ledger_page import LedgerPage
from worker.flower.ledger_reader import LedgerReader
from worker.flower.server_answers import FRESH_S, Answers, ServerAnswers

LOGIN = ("ops", "planted")
SERVERS = [
    ServerSettings.model_validate({"name": name, "type": name, "url": "http://host", "max_concurrency": 8})
    for name in ("msdicom", "dcm4chee")
]
PAGES = ("/pacs", "/batches", "/dead-letters")
STUDY = "1.2.3"
LINK = "https://viewer.example.org/?StudyInstanceUIDs=1.2.3"


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(fakeredis.FakeRedis(decode_responses=True))


class Told:
    """What servers said, as far as a test says so."""

    answers = Answers()

    def last(self, *, ask_again: bool) -> Answers:
        return self.answers


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    answers = Told()
    monkeypatch.setattr(server_page.ServerPage, "answers", answers)
    return answers


@dataclass
class Browser:
    """A client that keeps cookies and sends the token of the last form it has seen."""

    url: str
    auth: tuple[str, str] | None = None
    session: requests.Session = field(default_factory=requests.Session)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, auth=self.auth, timeout=20, **options)

    def token(self, path: str) -> str:
        found = re.search(r'name="_xsrf" value="([^"]+)"', self.get(path).text)
        return found[1] if found else self.session.cookies["_xsrf"]

    def send(self, path: str, *, token: str | None = None, **fields: str) -> requests.Response:
        fields["_xsrf"] = self.token(path) if token is None else token
        return self.session.post(
            self.url + path, data=fields, auth=self.auth, timeout=20, headers={"Sec-Fetch-Site": "same-origin"}
        )


class RunningFlower:
    """Flower's application on a loop of its own thread."""

    def __init__(self, **chosen: Any) -> None:
        self.options = SimpleNamespace(**{**options.as_dict(), **chosen})
        self.port = 0
        self.application: Any = None
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> RunningFlower:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self.application = Flower(capp=app, options=self.options, io_loop=IOLoop.current(), **urls.settings)
        server = HTTPServer(self.application)
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        self.port = sockets[0].getsockname()[1]
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        server.stop()
        self._loop.run_until_complete(server.close_all_connections())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def hears(self, type: str, **fields: Any) -> None:
        """An event of a worker, as Flower takes it."""
        done = threading.Event()
        common = {"hostname": "w@h", "clock": 1, "timestamp": time.time(), "local_received": time.time()}

        def take() -> None:
            self.application.events.state.event({"type": type, **common, **fields})
            done.set()

        self._loop.call_soon_threadsafe(take)
        assert done.wait(10)


@pytest.fixture
def flower(ledger: Ledger, told: Told, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunningFlower]]:
    pages.add()
    monkeypatch.setattr(server_page, "settings", SimpleNamespace(servers=SERVERS))
    monkeypatch.setattr(LedgerPage, "reader", reader_of(ledger))
    running: list[RunningFlower] = []

    def start(**chosen: Any) -> RunningFlower:
        running.append(RunningFlower(**chosen).__enter__())
        return running[-1]

    yield start
    for one in running:
        one.__exit__()


def reader_of(ledger: Ledger, **options: Any) -> LedgerReader:
    reader = LedgerReader("redis://nowhere", **options)
    vars(reader)["ledger"] = ledger
    return reader


@pytest.fixture
def operator(flower: Callable[..., RunningFlower]) -> Iterator[Browser]:
    running = flower(basic_auth=[":".join(LOGIN)])
    with requests.Session() as session:
        yield Browser(f"http://127.0.0.1:{running.port}", LOGIN, session)


@pytest.fixture
def browse() -> Iterator[Callable[..., Browser]]:
    with requests.Session() as session:
        yield lambda running, auth=LOGIN, prefix="": Browser(f"http://127.0.0.1:{running.port}{prefix}", auth, session)


def begin_batch(ledger: Ledger, batch_id: str, name: str = "") -> Batches:
    batches = Batches(ledger)
    batches.open(batch_id, kind="upload", order={}, servers={"msdicom": "msdicom"}, concurrency=1, name=name)
    ledger.client.hset(ledger.key("batch", batch_id), mapping={"frozen": 1, "items": 10, "pass": "apply"})
    ledger.client.hset(ledger.key("batch", batch_id), mapping={"state": "running", "conductor": "j9"})
    ledger.client.hset(ledger.key("batch", batch_id), mapping={"n:apply:msdicom:stored": 3, "n:apply:-:failed": 1})
    ledger.submit("j9", task="pacs.batch.upload", job={})
    return batches


def dead_letter(ledger: Ledger, job_id: str, task: str = "pacs.upload", message: str = "Silence.") -> None:
    job = {"image_url": "https://images.example.org/1.dcm?sig=SECRET"}
    ledger.submit(job_id, task=task, job=job)
    taken = ledger.take(job_id, task=task, job=job)
    error = SourceUnreachable(message).payload
    ledger.end_as_dead_letter(job_id, taken.fence, outcome={"error": error}, code=error["code"], task=task, job=job)


# --- what the pages show ----------------------------------------------------------------------------------------------


def test_each_page_has_a_tab_in_flowers_own_bar_and_is_no_frame_for_others(operator: Browser) -> None:
    for path in PAGES:
        answer = operator.get(path)
        assert answer.status_code == 200
        assert answer.text.count('aria-current="page"') == 1
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Cache-Control"] == "no-store"
    bar = operator.get("/workers").text
    assert all(f'href="{path}"' in bar for path in PAGES)
    assert operator.get("/courier/courier.css").headers["Content-Type"] == "text/css"
    assert operator.get("/courier/courier.js").status_code == 200


def test_the_page_of_servers_says_which_is_sick_and_what_waits_for_it(
    operator: Browser, ledger: Ledger, told: Told
) -> None:
    Breakers(ledger.client).failed("dcm4chee", at_once=True, retry_after_s=60)
    told.answers = Answers(
        {"msdicom": {"status": "up", "latency_ms": 12.3}, "dcm4chee": {"status": "not responding", "note": "<b>no"}},
        {"msdicom": {"total_bytes": 2 * 10**12, "free_bytes": 5 * 10**11, "used_bytes": "unknown"}},
        7.0,
    )
    page = operator.get("/pacs").text
    msdicom, dcm4chee = (
        page.split(f'data-server="{name}"')[1].split("</article>")[0] for name in ("msdicom", "dcm4chee")
    )
    assert "closed" in msdicom
    assert "12 ms" in msdicom
    assert "500 GB free of 2.0 TB" in msdicom
    assert "0 of 8" in msdicom
    assert "The next request is let through in" in dcm4chee
    assert "&lt;b&gt;no" in dcm4chee
    assert "not responding" in dcm4chee
    assert "No worker runs" in page
    assert "7 s ago" in page


@pytest.mark.parametrize(("order", "state"), [("pause", "paused"), ("maintain", "in maintenance")])
def test_a_server_that_an_operator_took_out_of_service_says_which_way_and_who_did_it(
    operator: Browser, ledger: Ledger, order: str, state: str
) -> None:
    getattr(Suspensions(ledger.client), order)("msdicom", set_by="night shift <b>", reason="new disks")
    page = operator.get("/pacs").text
    assert f"msdicom is {state}, set by night shift &lt;b&gt; at" in page
    assert "1 <small>of 2</small>" in page


def test_two_lists_of_servers_are_said_on_the_page(operator: Browser, ledger: Ledger) -> None:
    report = {"ok": True, "complaint": "", "every_s": 10}
    say(ledger, "a@h", report, SERVERS)
    say(ledger, "b@h", report, SERVERS[:1])
    page = operator.get("/pacs").text
    assert "The [[servers]] of workers differ" in page
    assert "No worker runs" not in page


def test_the_page_of_batches_shows_how_far_each_is_and_what_became_of_its_items(
    operator: Browser, ledger: Ledger
) -> None:
    begin_batch(ledger, "b1", name="<i>monday</i>")
    page = operator.get("/batches").text
    assert "&lt;i&gt;monday&lt;/i&gt;" in page
    assert 'aria-valuenow="40"' in page
    assert "4 of 10 items" in page
    rows = re.findall(r'<th scope="row">([^<]+)</th>\s*<td[^>]*>(\d*)</td><td[^>]*>(\d*)</td>', page)
    assert rows == [("msdicom", "3", ""), ("no server", "", "1")]


def test_dead_letters_are_shown_by_reason_without_a_credential(operator: Browser, ledger: Ledger) -> None:
    dead_letter(ledger, "j1", message="<script>alert(1)</script>")
    dead_letter(ledger, "a/b?c d", task="pacs.delete")
    page = operator.get("/dead-letters").text
    assert "SECRET" not in page
    assert "<script>alert" not in page
    assert 'href="/task/a/b%3Fc%20d"' in page
    assert "may delete images" in page.split('data-job="a/b?c d"')[1].split("</article>")[0]
    assert "may delete images" not in page.split('data-job="j1"')[1].split("</article>")[0]
    assert operator.get("/dead-letters?code=source_unreachable").text.count("data-job") == 2
    assert "no dead letter of this reason" in operator.get("/dead-letters?code=%3Cb%3E").text


def test_behind_a_prefix_all_links_and_forms_lead_there(
    flower: Callable[..., RunningFlower], browse: Callable[..., Browser], ledger: Ledger
) -> None:
    begin_batch(ledger, "b1")
    dead_letter(ledger, "j1")
    browser = browse(flower(basic_auth=[":".join(LOGIN)], url_prefix="ops/flower"), prefix="/ops/flower")
    for path in PAGES:
        page = browser.get(path)
        assert page.status_code == 200
        links = re.findall(r'(?:href|action|src)="(/[^"]*)"', page.text)
        ours = [link for link in links if not link.startswith("/static/")]
        assert all(link.startswith("/ops/flower/") for link in ours), ours
    assert browser.send("/batches", batch_id="b1", action="pause").url.startswith(f"{browser.url}/batches?said=paused")


# --- who may change anything ------------------------------------------------------------------------------------------


def test_a_batch_is_paused_resumed_and_cancelled(operator: Browser, ledger: Ledger) -> None:
    batches = begin_batch(ledger, "b1")
    for action, state, words in (
        ("pause", "paused", "is paused"),
        ("pause", "paused", "was not changed"),
        ("resume", "running", "goes on"),
        ("resume", "running", "was not changed"),
        ("cancel", "cancelled", "is cancelled"),
        ("cancel", "cancelled", "was not changed"),
    ):
        page = operator.send("/batches", batch_id="b1", action=action)
        found = batches.get("b1")
        assert (page.status_code, found and found.state) == (200, state)
        assert f"Batch b1 {words}" in page.text, action
    assert "There is no batch b2" in operator.send("/batches", batch_id="b2", action="pause").text


def test_a_dead_letter_is_replayed_or_purged(
    operator: Browser, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        dead_letter_page.DeadLetterPage.actions, "replay", (lambda one, job_id: bool(one.replay(job_id)), "replayed")
    )
    dead_letter(ledger, "j1")
    dead_letter(ledger, "a/b?c d")
    assert "Job a/b?c d is queued again" in operator.send("/dead-letters", job_id="a/b?c d", action="replay").text
    assert ledger.read_record("a/b?c d")["state"] == "queued"
    assert "is purged" in operator.send("/dead-letters", job_id="j1", action="purge").text
    assert ledger.dead_letter("j1") is None
    assert "is no dead letter any more" in operator.send("/dead-letters", job_id="j1", action="purge").text


CHANGES = [
    ("/batches", {"batch_id": "b1", "action": "pause"}),
    ("/batches", {"batch_id": "b1", "action": "cancel"}),
    ("/dead-letters", {"job_id": "j1", "action": "replay"}),
    ("/dead-letters", {"job_id": "j1", "action": "purge"}),
]


@pytest.fixture
def untouched(ledger: Ledger) -> Iterator[None]:
    """A batch that runs and a dead letter, both still as they were in the end."""
    batches = begin_batch(ledger, "b1")
    dead_letter(ledger, "j1")
    yield
    found = batches.get("b1")
    assert found is not None
    assert found.state == "running"
    assert ledger.dead_letter("j1") is not None


@pytest.mark.usefixtures("untouched")
def test_a_change_needs_the_token_of_a_form_also_with_the_password(operator: Browser) -> None:
    for path, fields in CHANGES:
        operator.get(path)
        for token in ("", "2|00000000|00|0"):
            assert operator.send(path, token=token, **fields).status_code == 403
        with requests.Session() as other:  # a form of another site: the password is sent by itself, the cookie is not
            stranger = Browser(operator.url, LOGIN, other)
            assert stranger.send(path, token=operator.token(path), **fields).status_code == 403


@pytest.mark.usefixtures("untouched")
def test_a_change_from_another_site_is_refused_with_a_good_token(operator: Browser) -> None:
    for path, fields in CHANGES:
        data = {**fields, "_xsrf": operator.token(path)}
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://evil"}):
            answer = operator.session.post(operator.url + path, data=data, auth=LOGIN, headers=headers, timeout=20)
            assert answer.status_code == 403
    assert "SameSite=Lax" in requests.get(operator.url + "/pacs", auth=LOGIN, timeout=20).headers["Set-Cookie"]


@pytest.mark.usefixtures("untouched")
def test_nothing_is_changed_by_a_get(operator: Browser) -> None:
    for path, fields in CHANGES:
        assert operator.get(path, params=fields).status_code == 200


@pytest.mark.usefixtures("untouched")
def test_without_the_password_neither_pages_nor_changes_nor_reports_are_answered(operator: Browser) -> None:
    for login in (None, ("ops", "wrong")):
        stranger = Browser(operator.url, login, operator.session)
        for path in (*PAGES, "/batches/report?batch_id=b1", "/task/j1"):
            assert stranger.get(path).status_code == 401, path
        for path, fields in CHANGES:
            token = operator.token(path)
            assert stranger.send(path, token=token, **fields).status_code == 401


@pytest.mark.usefixtures("untouched")
def test_with_a_provider_of_logins_a_stranger_is_sent_to_it(
    flower: Callable[..., RunningFlower], browse: Callable[..., Browser]
) -> None:
    browser = browse(flower(auth="ops@example.org"), auth=None)
    for path in PAGES:
        assert "/login" in browser.get(path, allow_redirects=False).headers["Location"]
    for path, fields in CHANGES:
        assert browser.send(path, token="x", **fields).status_code == 403


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("chosen", "auth", "words"),
    [
        ({"read_only": True, "basic_auth": [":".join(LOGIN)]}, LOGIN, "read-only"),
        ({}, None, "Without a login nothing can be changed here"),
    ],
)
def test_read_only_or_without_a_login_the_pages_have_no_buttons_and_changes_are_refused(
    flower: Callable[..., RunningFlower],
    browse: Callable[..., Browser],
    chosen: dict[str, Any],
    auth: tuple[str, str] | None,
    words: str,
) -> None:
    browser = browse(flower(**chosen), auth=auth)
    for path in PAGES:
        page = browser.get(path).text
        assert words in page
        assert "<form" not in page
        assert "Report (CSV)" in page or path != "/batches"
    browser.get("/tasks")
    token = browser.session.cookies["_xsrf"]
    for path, fields in CHANGES:
        answer = browser.send(path, token=token, **fields)
        assert (answer.status_code, words in answer.text) == (403, True)


DANGEROUS = [
    *("worker/shutdown/w@h", "worker/pool/restart/w@h", "worker/pool/grow/w@h?n=1", "worker/pool/shrink/w@h"),
    *("worker/pool/autoscale/w@h?min=1&max=2", "worker/queue/add-consumer/w@h?queue=q"),
    *("worker/queue/cancel-consumer/w@h?queue=q", "task/revoke/j9", "task/abort/j9", "task/timeout/pacs.upload"),
    *("task/rate-limit/pacs.upload", "task/apply/pacs.upload", "task/async-apply/pacs.upload"),
    "task/send-task/pacs.upload",
]


@pytest.mark.usefixtures("untouched")
def test_read_only_refuses_all_that_flower_itself_can_do_to_workers_and_jobs(
    flower: Callable[..., RunningFlower], browse: Callable[..., Browser]
) -> None:
    running = flower(read_only=True, basic_auth=[":".join(LOGIN)])
    browser = browse(running)
    running.hears("task-received", uuid="j9", name="pacs.batch.upload")
    posts = {flower_path.split("(")[0] for flower_path in map(_pattern_of, urls.handlers) if "/api/" in flower_path}
    reading = {
        "/api/workers",
        "/api/tasks",
        "/api/task/types",
        "/api/queues/length",
        "/api/task/info/",
        "/api/task/result/",
    }
    assert {f"/api/{one.rpartition('/')[0]}/" for one in DANGEROUS} == posts - reading, (
        "Flower can do something else now"
    )
    for path in DANGEROUS:
        answer = browser.session.post(f"{browser.url}/api/{path}", auth=LOGIN, timeout=20)
        assert answer.status_code == 403, path
    assert "task-revoke" not in browser.get("/task/j9").text


def _pattern_of(handler: Any) -> str:
    return str(handler.regex.pattern if hasattr(handler, "regex") else handler[0]).removesuffix("$")


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/batches", {"batch_id": "b1", "action": "apply"}, 400),
        ("/batches", {"batch_id": "b1:outcomes:apply", "action": "pause"}, 400),
        ("/batches", {"action": "pause"}, 400),
        ("/batches", {"batch_id": "b" * 300, "action": "pause"}, 400),
        ("/dead-letters", {"job_id": "j1", "action": "delete"}, 400),
        ("/dead-letters", {"job_id": "j1"}, 400),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_form_that_is_none_of_ours_is_refused(
    operator: Browser, path: str, fields: dict[str, str], status: int
) -> None:
    assert operator.send(path, **fields).status_code == status


def test_what_is_said_after_a_change_is_one_of_our_sentences_and_shows_an_id_as_text(operator: Browser) -> None:
    page = operator.get("/batches?said=paused&id=%3Cb%3Ex").text
    assert "Batch &lt;b&gt;x is paused" in page
    assert "alert-success" not in operator.get("/batches?said=%3Cb%3E&id=x").text
    assert "{id}" not in operator.get("/batches?said=paused&id={id}").text.replace("Batch {id} is paused", "")


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_of_a_batch_is_a_table_of_all_its_items(operator: Browser, ledger: Ledger) -> None:
    batches = Batches(ledger)
    batches.open("b1", kind="upload", order={}, servers={"msdicom": "msdicom"}, concurrency=1)
    token = batches.begin_plan("b1")
    lines = {n: "\n".join(f"0\t7\thttps://h/{n}-{i}.dcm?sig=SECRET" for i in range(100)) for n in range(12)}
    batches.plan_chunks("b1", token, lines)
    ledger.client.hset(ledger.key("batch", "b1"), mapping={"items": 1200, "chunks": 12, "frozen": 1, "state": "done"})
    answer = operator.get("/batches/report?batch_id=b1")
    rows = answer.text.splitlines()
    assert answer.headers["Content-Disposition"] == 'attachment; filename="batch-b1.csv"'
    assert (len(rows), rows[0].split(",")[:3]) == (1201, ["number", "item", "server_name"])
    assert "https://h/11-99.dcm" in rows[-1]
    assert "SECRET" not in answer.text
    assert operator.get("/batches/report?batch_id=b2").status_code == 404
    assert operator.get("/batches/report?batch_id=b1:x").status_code == 400


# --- one job ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def running(flower: Callable[..., RunningFlower]) -> RunningFlower:
    return flower(basic_auth=[":".join(LOGIN)], format_task=rows.format_task)


def finish(ledger: Ledger, job_id: str, payload: dict[str, Any]) -> None:
    ledger.submit(job_id, task="pacs.upload", job={})
    taken = ledger.take(job_id, task="pacs.upload", job={})
    ledger.finish(job_id, taken.fence, outcome={"payload": payload}, code="done", task="pacs.upload", job={})


def test_the_page_of_a_job_shows_server_study_and_a_link_that_can_be_clicked(
    running: RunningFlower, browse: Callable[..., Browser], ledger: Ledger
) -> None:
    payload = {"operation": "upload", "status": "stored", "server_name": "msdicom", "study_uid": STUDY}
    finish(ledger, "j1", {**payload, "viewer_url": LINK, "metadata": {"00100010": "P^N"}})
    running.hears("task-succeeded", uuid="j1", name="pacs.upload", result=f"stored on msdicom · study {STUDY} · {LINK}")
    page = browse(running).get("/task/j1").text
    assert re.search(r"<dt>Outcome</dt><dd[^>]*>stored on msdicom<", page)
    assert re.search(rf"<dt>Study</dt><dd[^>]*><code[^>]*>{STUDY}<", page)
    assert f'<a href="{LINK}" target="_blank" rel="noopener noreferrer">' in page
    assert "P^N" not in page
    assert "task-revoke" not in page, "it has ended"


@pytest.mark.parametrize("link", ["javascript:alert(1)", 'https://v/"onmouseover="x', "https://me:secret@viewer/1"])
def test_a_link_that_is_none_is_never_one_on_the_page(
    running: RunningFlower, browse: Callable[..., Browser], ledger: Ledger, link: str
) -> None:
    finish(ledger, "j1", {"operation": "upload", "server_name": "msdicom", "viewer_url": link})
    running.hears("task-succeeded", uuid="j1", name="pacs.upload", result="stored on msdicom")
    page = browse(running).get("/task/j1").text
    assert 'href="javascript' not in page
    assert '"onmouseover' not in page
    assert "secret" not in page


def test_the_page_of_a_job_that_waits_says_why_and_its_button_cancels_it_in_the_ledger(
    running: RunningFlower, browse: Callable[..., Browser], ledger: Ledger
) -> None:
    ledger.submit("j1", task="pacs.upload", job={})
    running.hears("task-received", uuid="j1", name="pacs.upload")
    browser = browse(running)
    page = browser.get("/task/j1").text
    assert "waits for a free worker" in page
    assert 'id="task-revoke">Cancel<' in page
    assert "Terminate" not in page
    answer = browser.session.post(
        f"{browser.url}/api/task/revoke/j1", auth=LOGIN, data={"terminate": "false"}, timeout=20
    )
    assert answer.json() == {"message": "Job j1: cancelled before it began"}
    assert ledger.take("j1", task="pacs.upload", job={}).cancelled


def test_a_batch_ends_by_the_button_of_its_job(
    running: RunningFlower, browse: Callable[..., Browser], ledger: Ledger
) -> None:
    batches = begin_batch(ledger, "b1")
    running.hears("task-received", uuid="b1", name="pacs.batch.upload")
    browser = browse(running)
    browser.session.post(f"{browser.url}/api/task/revoke/b1", auth=LOGIN, timeout=20)
    found = batches.get("b1")
    assert found is not None
    assert found.state == "cancelled"


def test_tasks_of_other_applications_look_and_end_as_in_any_flower(
    running: RunningFlower, browse: Callable[..., Browser], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    revoked: list[str] = []
    monkeypatch.setattr(app.control, "revoke", lambda job_id, **_: revoked.append(job_id))
    running.hears("task-received", uuid="t1", name="theirs.add")
    browser = browse(running)
    page = browser.get("/task/t1").text
    assert 'id="task-revoke">Revoke<' in page
    assert "<dt>Outcome</dt>" not in page
    assert browser.session.post(f"{browser.url}/api/task/revoke/t1", auth=LOGIN, timeout=20).status_code == 200
    assert revoked == ["t1"]
    assert ledger.read_record("t1") == {}


def test_a_row_of_the_list_is_short_and_its_search_finds_code_server_and_uid(
    running: RunningFlower, browse: Callable[..., Browser]
) -> None:
    uid = "1.2.826.0.1.3680043.8.498.12345678901234567890"
    wait = "waiting for msdicom since 2026-01-01T12:03:00.120Z: it is down; next try at 2026-01-01T12:04:08.000Z"
    running.hears("task-received", uuid="j1", name="pacs.upload")
    running.hears("task-waiting", uuid="j1", result=f"{wait} (pacs_unavailable)", exchange="pacs_unavailable")
    running.hears("task-succeeded", uuid="j2", name="pacs.upload", result=f"stored on msdicom · study {uid} · {LINK}")
    running.hears("task-failed", uuid="j3", name="pacs.upload", exception="NotDicom({'code': 'not_dicom'})")
    running.hears("task-succeeded", uuid="t1", name="theirs.add", result=f"study {uid}")
    columns = {"draw": 1, "start": 0, "length": 50, "order[0][column]": 0, "columns[0][data]": "name"}
    browser = browse(running)

    def listed(search: str = "") -> dict[str, dict[str, Any]]:
        answer = browser.session.post(
            f"{browser.url}/tasks/datatable", auth=LOGIN, data={**columns, "search[value]": search}, timeout=20
        )
        return {row["uuid"]: row for row in answer.json()["data"]}

    found = listed()
    assert found["j1"]["state"] == "WAITING"
    assert found["j1"]["result"] == (
        "waiting for msdicom: it is down; next try at 2026-01-01 12:04 UTC (pacs_unavailable)"
    )
    assert found["j2"]["result"] == "stored on msdicom · study 1.2.826.…34567890"
    assert found["j3"]["result"] == "refused (not_dicom): see its details"
    assert found["t1"]["result"] == f"study {uid}"
    assert set(listed("state:WAITING")) == set(listed("result:pacs_unavailable")) == {"j1"}
    assert set(listed(f"result:{uid} name:pacs")) == {"j2"}


# --- without the ledger -----------------------------------------------------------------------------------------------


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    server = fakeredis.FakeServer()
    server.connected = False
    ledger = Ledger(fakeredis.FakeRedis(server=server, decode_responses=True))
    monkeypatch.setattr(LedgerPage, "reader", reader_of(ledger))


def test_a_page_without_the_ledger_says_so_and_changes_nothing(operator: Browser, ledger: Ledger, away: None) -> None:
    operator.get("/tasks")
    token = operator.session.cookies["_xsrf"]
    for path in PAGES:
        answer = operator.get(path)
        assert (answer.status_code, "The ledger does not answer" in answer.text) == (503, True)
        assert 'id="courier-content"' in answer.text, "the page goes on to look again"
    for path, fields in CHANGES:
        assert operator.send(path, token=token, **fields).status_code == 503
    assert operator.get("/batches/report?batch_id=b1").status_code == 503


def test_the_page_of_a_job_without_the_ledger_shows_what_flower_has_heard(
    running: RunningFlower, browse: Callable[..., Browser], away: None
) -> None:
    running.hears("task-succeeded", uuid="j1", name="pacs.upload", result=f"stored on msdicom · study {STUDY} · {LINK}")
    browser = browse(running)
    answer = browser.get("/task/j1")
    assert answer.status_code == 200
    assert f'<a href="{LINK}"' in answer.text
    assert "The ledger does not answer" in answer.text
    assert browser.session.post(f"{browser.url}/api/task/revoke/j1", auth=LOGIN, timeout=20).status_code == 503


def test_a_ledger_that_hangs_holds_up_no_page_and_not_flower(
    operator: Browser, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(LedgerPage, "reader", reader_of(ledger, answer_s=0.3))
    monkeypatch.setattr(server_page, "look_at_servers", lambda *_: release.wait(30) and {})
    try:
        answers = [operator.get("/pacs") for _ in range(6)]  # more than there are threads
        assert {answer.status_code for answer in answers} == {503}
        assert "has not answered within" in answers[0].text
        assert operator.get("/tasks").status_code == 200
    finally:
        release.set()


# --- what servers say of themselves -----------------------------------------------------------------------------------


def test_a_worker_is_asked_once_a_minute_while_the_page_is_looked_at() -> None:
    now, asked, released = [0.0], [], threading.Event()

    def ask(task: str, *, timeout_s: float) -> dict[str, Any] | None:
        asked.append(task)
        released.wait(10)
        return {"servers": [{"server_name": "msdicom", "status": "up"}]} if task == "pacs.status" else None

    answers = ServerAnswers(ask, lambda: now[0])
    assert answers.last(ask_again=False) == Answers()
    assert asked == []
    for _ in range(3):
        answers.last(ask_again=True)
    released.set()
    for _ in range(500):
        if not answers._asking:
            break
        time.sleep(0.01)
    assert asked == ["pacs.status", "pacs.storage"]
    known = answers.last(ask_again=True)
    assert (known.status["msdicom"]["status"], known.storage, known.age_s) == ("up", {}, 0.0)
    assert len(asked) == 2, "the answer is fresh"
    now[0] += FRESH_S
    answers.last(ask_again=True)
    for _ in range(500):
        if len(asked) == 4:
            break
        time.sleep(0.01)
    assert len(asked) == 4
