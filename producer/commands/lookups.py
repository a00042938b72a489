"""``pacs exists`` and ``pacs metadata``."""

from __future__ import annotations

from typing import Any

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
study_option = click.option(
    "--study", "study_uid", metavar="UID", help="Only in this study; some servers find images and series only so."
)


@click.command()
@level_argument
@click.argument("uid")
@click.option("--metadata", "described", is_flag=True, help="Bring the metadata of its images, too.")
@study_option
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def exists(level: Level, uid: str, described: bool, timeout_s: float | None, as_json: bool, **where: Any) -> int:
    """Say who has the image, series or study that bears UID. Exit status 1: nobody has it."""
    with Session() as courier:
        handle = courier.exists(level, uid, metadata=described, **where)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        found_table(payload)
        metadata_table(payload)
    return DONE


@click.command()
@level_argument
@click.argument("uid")
@study_option
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def metadata(level: Level, uid: str, timeout_s: float | None, as_json: bool, **where: Any) -> int:
    """Show the metadata of every image of what bears UID."""
    with Session() as courier:
        handle = courier.metadata(level, uid, **where)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        found_table(payload)
        metadata_table(payload)
    return DONE
