"""``python -m sandbox.screenshots``: the pictures of Flower's pages in the documents, taken of a site that is invented.

It starts Redis, both sandbox PACS, a worker and Flower, lets something of everything happen, and takes each page at
1280 pixels and as a phone shows it. Needs the extra ``dev`` and Chromium.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import click

from courier.settings import Settings
from producer import Courier
from producer.handle import Handle
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import Processes, poll
from sandbox.synthetic import image, new_uid

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FOLDER: Final = Path("docs") / "images"
LOGIN: Final = "operator:invented"
#: Names of pictures, and the widths at which pages are taken.
WIDTHS: Final = {"": (1280, 800), "-phone": (375, 760)}
_WAIT_S: Final = 60.0


@dataclass(frozen=True)
class ShownSite:
    """What runs, and the jobs whose pages are of interest."""

    flower: parts.FlowerPart
    stored: Handle
    waiting: Handle


@contextmanager
def site(folder: Path) -> Iterator[ShownSite]:
    """A site on which one server is sick, one batch runs, one is paused, and jobs wait, failed and are done."""
    with Processes(folder) as processes, ImageServer() as images:
        redis, sandbox = parts.redis(processes), parts.sandbox(processes)
        tree = {
            "servers": sandbox.servers(),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True, "connect_timeout_s": 1},
            "queue": parts.queue_settings(redis),
            "jobs": {"max_attempts": 2, "backoff_base_s": 0.1, "sweep_s": 0.2},
            "breaker": {"failures": 3, "pause_s": 90, "pause_cap_s": 90},
        }
        config = parts.write_settings(folder / "pacs.toml", tree)
        worker = parts.worker(processes, config)
        flower = parts.flower(processes, config, environ={"FLOWER_BASIC_AUTH": LOGIN})
        worker.wait_ready()
        flower.child.wait_ready()
        with Courier(Settings.load({"PACS_CONFIG": str(config)})) as courier:
            yield _fill(courier, images, sandbox, flower)


def _fill(courier: Courier, images: ImageServer, sandbox: parts.SandboxPart, flower: parts.FlowerPart) -> ShownSite:
    study = new_uid()
    urls = [images.put(f"ct/{n:03}.dcm", image(study, seed=n)) for n in range(120)]
    stored = courier.upload(urls[0])
    stored.result(timeout_s=_WAIT_S)
    page = images.put("sign-in.html", b"<!doctype html><title>Sign in</title>")
    ended = [
        courier.upload(page),
        courier.upload(images.url("gone.dcm")),
        courier.upload(f"http://{parts.HOST}:1/closed.dcm"),
        courier.upload(f"http://{parts.HOST}:1/closed-too.dcm"),
        courier.exists("study", study),
        courier.exists("study", "1.2.3.4"),
        courier.delete("study", "1.2.3.4", dry_run=True),
        courier.studies(),
        courier.batch.upload(urls[:60], name="ct-archive-monday", verify=True),
    ]
    _until(lambda: all(handle.report().over for handle in ended))
    _batches(courier, images, sandbox)
    for operation in ("query", "store"):
        sandbox.set_fault("dcm4chee", operation, status=503)
    waiting = [courier.upload(url) for url in urls[100:112]]
    _until(lambda: all(handle.status() == "waiting" for handle in waiting))
    return ShownSite(flower, stored, waiting[0])


def _batches(courier: Courier, images: ImageServer, sandbox: parts.SandboxPart) -> None:
    """One that runs, slowly, and one that is paused."""
    sandbox.set_fault("msdicom", "store", latency_ms=150)
    many = [images.put(f"mr/{n:04}.dcm", image(new_uid(), side=16, seed=n)) for n in range(400)]
    paused = courier.batch.upload(many[:150], name="mr-research-export", width=1)
    _until(lambda: courier.batch.get(paused.batch_id).settled > 40)
    courier.batch.pause(paused.batch_id)
    running = courier.batch.upload(many[150:], name="mr-ward-7", width=2)
    _until(lambda: courier.batch.get(running.batch_id).settled > 60)


def _until(holds: Callable[[], bool]) -> None:
    if not poll(holds, timeout_s=_WAIT_S):
        raise TimeoutError("the site is not as the pictures are to show it")


def take(site: ShownSite, folder: Path, chromium: str) -> list[Path]:
    """Take all pictures; gives their files."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 (of the extra `dev`, which `sandbox` does without)

    pages = {
        "pacs": "/pacs",
        "batches": "/batches",
        "dead-letters": "/dead-letters",
        "tasks": "/tasks",
        "job": f"/task/{site.stored.id}",
        "job-waiting": f"/task/{site.waiting.id}",
    }
    taken = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for suffix, (width, height) in WIDTHS.items():
            page = _tab(browser, site.flower.url, width, height)
            for name, address in pages.items():
                taken.append(_picture(page, site.flower.url + address, folder / f"flower-{name}{suffix}.png"))
        browser.close()
    return taken


def _tab(browser: Browser, url: str, width: int, height: int) -> Page:
    user, _, password = LOGIN.partition(":")
    login: Any = {"username": user, "password": password, "origin": url}
    context = browser.new_context(
        viewport={"width": width, "height": height}, http_credentials=login, color_scheme="light"
    )
    page = context.new_page()
    page.goto(f"{url}/pacs")
    page.get_by_text("A worker asked the servers").wait_for(timeout=_WAIT_S * 1000)  # the page is shown anew until then
    return page


def _picture(page: Page, address: str, file: Path) -> Path:
    page.goto(address)
    page.wait_for_load_state("networkidle")
    time.sleep(0.5)  # tables are drawn by a script
    page.screenshot(path=file, full_page=False)
    return file


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option("--chromium", default=None, help="Chromium's binary, if it is not on the PATH.")
def main(folder: Path, chromium: str | None) -> None:
    binary = chromium or shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        sys.exit("Chromium is not on the PATH; name it with --chromium.")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, site(Path(scratch)) as shown:
        _say(take(shown, folder, binary))


def _say(taken: Sequence[Path]) -> None:
    for file in taken:
        click.echo(f"{file}: {file.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
