"""``pacs download``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from rich.filesize import decimal

from producer.cli.door import DONE, as_json_option, ended, mode_option, plain_failures, timeout_option
from producer.cli.session import Session
from producer.terminal import console


@click.command()
@click.argument("study_uid")
@click.argument("destination")
@click.option(
    "--format",
    "form",
    type=click.Choice(["zip", "files"]),
    default="zip",
    show_default=True,
    help="One ZIP file, or a folder of DICOM files.",
)
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def download(
    study_uid: str,
    destination: str,
    form: Literal["zip", "files"],
    mode: str,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Bring a study to DESTINATION: a path of the worker's machine, file:///…, s3://bucket/key or az://container/blob.

    It appears there when it is whole, with a manifest.json in it; nothing there is overwritten.
    """
    url = destination if ":/" in destination else Path(destination).absolute().as_uri()
    with Session() as courier:
        handle = courier.download(study_uid, url, format=form, mode=mode)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        size = "" if payload["size_bytes"] is None else f", {decimal(payload['size_bytes'])}"
        kept = f", {payload['resumed']} of them there already" if payload["resumed"] else ""
        sentence = f"{payload['status']}: {payload['instances']} images{kept}{size} from {payload['server_name']}"
        console.print(f"{sentence} at {payload['destination']}")
    return DONE
