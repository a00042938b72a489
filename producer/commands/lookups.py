"""``pacs exists`` and ``pacs metadata``."""

from __future__ import annotations

import click

from producer.commands.door import (
    DONE,
    as_json_option,
    ended,
    mode_option,
    plain_failures,
    timeout_option,
)
from producer.commands.session import Session
from producer.show_lookups import found_table, metadata_table
from worker.payloads import Level

level_argument = click.argument("level", type=click.Choice(["image", "series", "study"]))


@click.command()
@level_argument
@click.argument("uid")
@click.option("--metadata", "described", is_flag=True, help="Bring the metadata of its images, too.")
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def exists(
    level: Level,
    uid: str,
    described: bool,
    mode: str,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Say who has the image, series or study that bears UID. Exit status 1: nobody has it."""
    with Session() as courier:
        handle = courier.exists(level, uid, mode=mode, metadata=described)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        found_table(payload)
        metadata_table(payload)
    return DONE


@click.command()
@level_argument
@click.argument("uid")
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def metadata(level: Level, uid: str, mode: str, timeout_s: float | None, as_json: bool) -> int:
    """Show the metadata of every image of what bears UID."""
    with Session() as courier:
        handle = courier.metadata(level, uid, mode=mode)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        found_table(payload)
        metadata_table(payload)
    return DONE
