"""The ``pacs`` command: which sub-commands there are."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from courier.redaction import printable
from producer.cli import (
    audit,
    batches,
    cancel,
    dead,
    delete,
    doctor,
    download,
    lookups,
    orders,
    servers,
    studies,
    trace,
    uploads,
)
from producer.cli.door import output_lost
from producer.terminal import OutputLost


@contextmanager
def _printable_usage() -> Iterator[None]:
    """What click quotes of a command line, which may hold anything, as it may reach a terminal."""
    try:
        yield
    except click.UsageError as error:
        said = "\n".join(map(printable, error.format_message().split("\n")))
        raise click.UsageError(said, ctx=error.ctx) from None


class _PacsGroup(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        with _printable_usage():
            return super().invoke(ctx)

    def main(self, *args: Any, **how: Any) -> Any:
        """As click's, which writes help itself, outside of any command, and knows no full disk."""
        try:
            return super().main(*args, **how)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            sys.exit(output_lost(OutputLost(error.errno, error.strerror)))


@click.group(cls=_PacsGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pacs-courier")
def main() -> None:
    """Put images into the right PACS, and ask, move and delete what is there.

    Settings come from the file that PACS_CONFIG names and from the environment (docs/settings.md).
    Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 a server or the broker is unavailable, 130 interrupted
    (the job goes on unless the output says cancelled).
    """


for command in (
    uploads.upload,
    uploads.result,
    cancel.cancel,
    lookups.exists,
    lookups.metadata,
    studies.studies,
    delete.delete,
    orders.delete_all,
    batches.batch,
    download.download,
    servers.status,
    servers.storage,
    servers.database,
    trace.trace,
    doctor.doctor,
    audit.audit,
    dead.dead,
):
    main.add_command(command)
