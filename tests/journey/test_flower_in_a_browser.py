"""Our pages of Flower in headless Chromium, at 1280 pixels and as on a phone, with one real worker and one Flower."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from producer import Courier
from producer.handle import Handle
from sandbox import processes as parts
from sandbox.processes import FlowerPart, Processes, SandboxPart, poll
from sandbox.synthetic import image, new_uid
from tests.journey.conftest import Steady

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CHROMIUM = Path("/usr/bin/chromium")
LOGIN = ("ops", "planted")
WAIT_S = 120
WIDTHS = {"desk": (1280, 800), "phone": (375, 760)}


@pytest.fixture(scope="module")
def flower_part(steady_worker: Steady, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerPart]:
    with Processes(tmp_path_factory.mktemp("flower")) as children:
        part = parts.flower(children, steady_worker.config, environ={"FLOWER_BASIC_AUTH": ":".join(LOGIN)})
        part.child.wait_ready()
        yield part
        assert "Traceback" not in part.child.log, part.child.log_tail(40)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, flower_part: FlowerPart) -> Iterator[Callable[..., Page]]:
    contexts, faults = [], []

    def open_at(path: str, width: str = "desk") -> Page:
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        login: Any = {"username": LOGIN[0], "password": LOGIN[1], "origin": flower_part.url}
        contexts.append(chromium.new_context(viewport=size, http_credentials=login, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT_S * 1000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(flower_part.url + path)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def slow_batch(courier: Courier, sandbox: SandboxPart, image_server: Any) -> Handle:
    """A batch of two chunks that has begun and does not end by itself within a test."""
    urls = [image_server.put(f"{n}.dcm", image(new_uid(), side=8)) for n in range(101)]
    sandbox.set_fault("msdicom", "store", latency_ms=5000)
    handle = courier.batch.upload(urls, name="monday", width=1)
    assert poll(lambda: courier.batch.get(handle.batch_id).state == "running", timeout_s=WAIT_S)
    return handle


def wide(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window_with_the_longest_of_names_and_ids(
    courier: Courier, image_server: Any, open_page: Callable[..., Page], flower_part: FlowerPart, width: str
) -> None:
    stored = courier.upload(image_server.put("a.dcm", image(new_uid())))
    stored.result(timeout_s=WAIT_S)
    courier.batch.upload([image_server.put("b.dcm", image(new_uid()))], name="n" * 80).result(timeout_s=WAIT_S)
    dead = courier.upload(f"http://{parts.HOST}:1/{'long-' * 40}.dcm")
    assert poll(lambda: dead.report().over, timeout_s=WAIT_S)
    page = open_page("/pacs", width)
    for path in ("/pacs", "/batches", "/dead-letters", f"/task/{stored.id}", "/tasks", "/workers", "/broker"):
        page.goto(flower_part.url + path)
        if path in ("/tasks", "/workers"):
            page.locator(".dataTables_scroll").first.wait_for()  # a script draws these tables
        assert wide(page) <= 0, path
    if width == "phone":
        page.get_by_role("button", name="Toggle navigation").click()
        page.get_by_role("link", name="Dead letters").click()
        page.get_by_role("heading", name="Dead letters").wait_for()


def test_the_link_to_the_viewer_is_clicked_on_the_page_of_a_job(
    courier: Courier, image_server: Any, open_page: Callable[..., Page], flower_part: FlowerPart
) -> None:
    study = new_uid()
    handle = courier.upload(image_server.put("a.dcm", image(study)))
    link = handle.result(timeout_s=WAIT_S)["viewer_url"]
    page = open_page("/tasks")
    page.get_by_role("searchbox").fill(f"result:{study}")
    words = f"stored on msdicom · study {study[:8]}…{study[-8:]}"
    page.locator("#tasks-table tbody td", has_text=words).wait_for()
    page.goto(f"{flower_part.url}/task/{handle.id}")
    assert page.locator(".courier-servers").inner_text() == "msdicom"
    assert page.locator(".courier-study").inner_text() == study
    with page.expect_popup() as opened:
        page.locator(".courier-viewer a").click()
    assert opened.value.url == link
    opened.value.get_by_text(study).first.wait_for()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_batch_is_paused_resumed_and_after_a_question_cancelled(
    slow_batch: Handle, courier: Courier, open_page: Callable[..., Page], width: str
) -> None:
    def state() -> str:
        return courier.batch.get(slow_batch.batch_id).state

    page = open_page("/batches", width)
    card = page.locator(f'[data-batch="{slow_batch.batch_id}"]')
    card.get_by_role("button", name="Pause").click()
    page.get_by_text("is paused: nothing new begins").wait_for()
    assert state() == "paused"
    card.get_by_role("button", name="Resume").click()
    page.get_by_text("goes on.").wait_for()
    assert state() == "running"
    card.get_by_text("Cancel…").click()
    assert state() == "running", "it is asked first"
    if width == "desk":
        page.wait_for_timeout(6000)  # the page is shown anew every five seconds, but not under a question
    card.get_by_role("button", name="Cancel the upload batch").click()
    page.get_by_text("is cancelled; what was done stays done").wait_for()
    assert state() == "cancelled"
    with page.expect_download() as report:
        card.get_by_role("link", name="Report").click()
    with report.value.path().open(encoding="utf-8") as rows:
        assert len(list(csv.reader(rows))) == 102


def test_a_dead_letter_is_replayed_and_another_purged_after_a_question(
    courier: Courier, image_server: Any, open_page: Callable[..., Page]
) -> None:
    study = new_uid()
    url = image_server.put("late.dcm", image(study), status=503)
    replayed, purged = courier.upload(url), courier.upload(f"http://{parts.HOST}:1/a.dcm")
    assert poll(lambda: replayed.report().over and purged.report().over, timeout_s=WAIT_S)
    image_server.put("late.dcm", image(study))
    page = open_page("/dead-letters")
    page.locator(f'[data-job="{replayed.id}"]').get_by_role("button", name="Replay").click()
    page.get_by_text("is queued again under its id").wait_for()
    assert replayed.result(timeout_s=WAIT_S)["status"] == "stored"
    card = page.locator(f'[data-job="{purged.id}"]')
    card.get_by_text("Purge…").click()
    assert courier.dead.get(purged.id)
    card.get_by_role("button", name="Purge the dead letter").click()
    page.get_by_text("is purged; its history stays").wait_for()
    assert [letter.job_id for letter in courier.dead.list()].count(purged.id) == 0


def test_a_job_that_waits_is_found_as_waiting_and_cancelled_by_its_button(
    courier: Courier, sandbox: SandboxPart, image_server: Any, open_page: Callable[..., Page], flower_part: FlowerPart
) -> None:
    url = image_server.put("a.dcm", image(new_uid()))
    sandbox.set_fault("msdicom", "store", latency_ms=20_000)
    first = courier.upload(url)
    assert poll(lambda: first.stage() == "push", timeout_s=WAIT_S, every_s=0.02)
    second = courier.upload(url)
    assert poll(lambda: (second.waiting() or {}).get("code") == "other_job", timeout_s=WAIT_S, every_s=0.02)
    page = open_page("/tasks?state=WAITING")
    page.locator("#tasks-table tbody td", has_text="(other_job)").first.wait_for()
    page.goto(f"{flower_part.url}/task/{second.id}")
    assert f"job {first.id}" in page.locator(".courier-waits").inner_text()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text(f"Job {second.id}: cancelled").wait_for()
    assert poll(lambda: second.report().over, timeout_s=WAIT_S)
    assert "Cancelled" in type(second.report().error).__name__
    sandbox.reset_faults()
    first.result(timeout_s=WAIT_S)


def test_the_page_of_servers_asks_a_worker_and_shows_latency(open_page: Callable[..., Page]) -> None:
    page = open_page("/pacs")
    page.get_by_text("A worker asked the servers").wait_for()
    cards = page.locator("[data-server]")
    assert cards.evaluate_all("all => all.map(one => one.dataset.server)") == ["msdicom", "dcm4chee"]
    assert "ms" in cards.first.inner_text()
    assert "of 8" in cards.first.inner_text()
