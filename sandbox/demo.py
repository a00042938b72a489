"""`make run`: every part of the product on this machine, sample images through it, and what became of them.

A tool for development. Starting and ending of parts lives in `sandbox.processes`, the samples in
`sandbox.samples`, their judgement and table in `sandbox.summary`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click
from rich.live import Live

from courier.settings import Settings
from producer import Courier
from producer.terminal import Terminal, plain
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.ohif import is_site
from sandbox.processes import PartFailed, Processes
from sandbox.samples import ALREADY_ON_DCM4CHEE, sample_bytes, samples
from sandbox.summary import Upload, as_table, progress, summary, surprises, viewer_links
from sandbox.synthetic import image, new_uid

PATIENCE_S = 60
#: Where `make viewer` puts OHIF; without it viewer links open on a page of the sandbox.
OHIF = Path(".run") / "ohif"


@dataclass(frozen=True)
class Stack:
    """Everything that runs, ready to be used."""

    processes: Processes
    sandbox: parts.SandboxPart
    flower: parts.FlowerPart
    images: ImageServer
    config: Path
    redis: parts.RedisPart


@contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """Start every part; end them all when the block is left."""
    with Processes(folder) as processes, ImageServer() as images:
        redis = parts.redis(processes)
        sandbox = parts.sandbox(processes, ohif=OHIF if is_site(OHIF) else None)
        config = parts.write_settings(
            folder / "pacs.toml",
            {
                "servers": sandbox.servers(),
                "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
                "queue": parts.queue_settings(redis),
                "downloads": {"folders": [str(_downloads(folder))]},
            },
        )
        worker = parts.worker(processes, config)
        # On loopback, and all data here are invented: its API may be tried without a password.
        flower = parts.flower(processes, config, environ={"FLOWER_UNAUTHENTICATED_API": "true"})
        worker.wait_ready()
        flower.child.wait_ready()
        yield Stack(processes, sandbox, flower, images, config, redis)


def _downloads(folder: Path) -> Path:
    """Where studies may be downloaded to, and backups written."""
    downloads = (folder / "downloads").resolve()
    downloads.mkdir(parents=True, exist_ok=True)
    return downloads


def put_on_dcm4chee(stack: Stack, dicom: bytes) -> None:
    """Store one image past the courier (PS3.18 10.5), as another sender would."""
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    request = urllib.request.Request(
        f"{stack.sandbox.dcm4chee}/studies", data=head + dicom + f"\r\n--{boundary}--\r\n".encode(), method="POST"
    )
    request.add_header("Content-Type", f'multipart/related; type="application/dicom"; boundary={boundary}')
    request.add_header("Accept", "application/dicom+json")
    with urllib.request.urlopen(request, timeout=10):
        return


def upload_all(stack: Stack, uploads: Sequence[Upload], console: Terminal) -> None:
    """Enqueue every sample and follow it to its end, showing where each one is. Patience ends after a minute."""
    deadline = time.monotonic() + PATIENCE_S
    with (
        Courier(Settings.load({"PACS_CONFIG": str(stack.config)})) as courier,
        Live(console=console, transient=True, refresh_per_second=12) as live,
    ):
        while not all(upload.over for upload in uploads) and time.monotonic() < deadline:
            _enqueue_what_is_due(courier, stack, uploads)
            _update_uploads(courier, [upload for upload in uploads if upload.job_id and not upload.over])
            live.update(progress(uploads))
            _complain_of_crashes(stack.processes)
            time.sleep(0.03)


def _enqueue_what_is_due(courier: Courier, stack: Stack, uploads: Sequence[Upload]) -> None:
    over = {upload.sample.file for upload in uploads if upload.over}
    for upload in uploads:
        if not upload.job_id and upload.sample.after in (None, *over):
            upload.job_id = courier.upload(_address(stack, upload)).id


def _address(stack: Stack, upload: Upload) -> str:
    if upload.sample.content is None:
        return stack.images.url(upload.sample.file)
    return stack.images.put(upload.sample.file, upload.sample.content)


def _update_uploads(courier: Courier, uploads: Sequence[Upload]) -> None:
    reports = courier.reports(upload.job_id for upload in uploads)
    for upload in uploads:
        report = reports[upload.job_id]
        upload.stage = report.stage
        if report.result is not None:
            upload.stored(report.result)
        elif report.error is not None:
            upload.refused(report.error)


def _complain_of_crashes(processes: Processes) -> None:
    crashed = processes.crashed()
    if crashed is not None:
        raise crashed.failure()


def show(stack: Stack, uploads: Sequence[Upload], console: Terminal) -> None:
    """The table, the viewer links it refers to, and the addresses."""
    console.print(as_table(uploads))
    console.print(f"\n{summary(uploads)}\n", style="bold red" if surprises(uploads) else "")
    for link, number in viewer_links(uploads).items():
        console.print(plain(f"[{number}] ", "cyan") + plain(link))
    console.print()
    addresses = {
        "Flower (jobs, workers)": stack.flower.url,
        "MSDICOM sandbox": stack.sandbox.msdicom,
        "DCM4CHEE sandbox": stack.sandbox.dcm4chee,
        "faults on demand": f"{stack.sandbox.control}/faults",
        "sample images": stack.images.base,
    }
    for what, address in addresses.items():
        console.print(plain(f"{what:<24}", "dim") + plain(address))


def stay(stack: Stack, uploads: Sequence[Upload], console: Terminal) -> None:
    """Until Ctrl-C, or until a part crashes."""
    console.print("\nAll of it stays up until Ctrl-C. From another terminal, in this folder:")
    for command in examples(stack, uploads):
        console.print(f"  {command}")
    while True:
        _complain_of_crashes(stack.processes)
        time.sleep(0.2)


def examples(stack: Stack, uploads: Sequence[Upload]) -> list[str]:
    """Commands to try, as they are typed; they find this demo by themselves."""
    payload = next(upload.payload for upload in uploads if upload.payload)
    pacs, downloads = _beside_python("pacs"), os.path.relpath(_downloads(stack.config.parent))
    url, study = (
        stack.images.url(next(upload.sample.file for upload in uploads if upload.payload)),
        payload["study_uid"],
    )
    flower = os.path.relpath(Path(__file__).parents[1] / "docs" / "examples" / "upload_with_flower.sh")
    return [
        f"{pacs} upload {url}",
        f"{pacs} jobs",
        f"{pacs} top",
        f"{pacs} download {study} $PWD/{downloads}/study.zip",
        f"{pacs} delete study {study} --backup $PWD/{downloads}/backup  # pacs batch undo ID brings it back",
        f"FLOWER_URL={stack.flower.url} {flower} {stack.images.put('new.dcm', image(new_uid()))}",
    ]


def _beside_python(command: str) -> str:
    return os.path.relpath(Path(sys.executable).with_name(command))


def run(console: Terminal, folder: Path, *, once: bool) -> int:
    """Start, upload, show, and stay unless ``once``. Returns the exit status; leaves nothing running."""
    uploads = [Upload(sample) for sample in samples()]
    with console.status("Starting Redis, two PACS, a worker and Flower …"), ExitStack() as stack_lives:
        stack = stack_lives.enter_context(running_stack(folder))
        put_on_dcm4chee(stack, sample_bytes(ALREADY_ON_DCM4CHEE))
        outlives = stack_lives.pop_all()
    with outlives:
        console.print("us-stored.dcm was put on dcm4chee directly, as if it had always been there.\n")
        upload_all(stack, uploads, console)
        show(stack, uploads, console)
        if not once:
            with suppress(KeyboardInterrupt):
                stay(stack, uploads, console)
    return 1 if surprises(uploads) else 0


def _stop_on_signals() -> None:
    """SIGTERM and a closed terminal end the run as Ctrl-C does: by leaving every block."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT is ignored in a shell's background
        signal.signal(number, signal.default_int_handler)


@click.command(help=__doc__)
@click.option("--once", is_flag=True, help="End after the table; exit status 0 only if all ended as expected.")
def main(once: bool) -> None:
    console = Terminal()
    folder = Path(".run") / f"demo-{os.getpid()}"
    _stop_on_signals()
    try:
        status = run(console, folder, once=once)
    except PartFailed as failure:
        said = plain(f"{failure.part} {failure.reason}.", "bold red")
        console.print(said + plain(f" The end of {folder / failure.part}.log:"))
        console.print(failure.log_tail)
        sys.exit(1)
    except KeyboardInterrupt:
        status = 130
    console.print("Stopped; nothing is left running.")
    if status == 1:
        console.print(f"The logs are in {folder}.")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
