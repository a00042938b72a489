"""The ``pacs`` command: which sub-commands there are. Loads none of them until it is asked for."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from courier import __version__

#: By command: the module that it is loaded from, and the sentence that ``pacs --help`` has of it, which is the first of
#: its own help. ``orders`` adds commands to the group ``batch`` of ``batches``.
COMMANDS: Final = {
    "upload": ("uploads", "Fetch the image at each URL and put it where its study belongs."),
    "result": ("uploads", "Show what became of a job."),
    "jobs": ("jobs", "Say which jobs run, wait or are queued, and which ended lately, and why."),
    "cancel": ("cancel", "Cancel jobs that have not begun to store or to delete."),
    "top": ("top", "Show servers, queues, batches and what jobs wait for, again and again."),
    "exists": ("lookups", "Say who has the image, series or study that bears UID."),
    "metadata": ("lookups", "Show the metadata of every image of what bears UID."),
    "studies": ("studies", "List the studies of all servers, each once."),
    "delete": ("delete", "Delete the image, series or study that bears UID on every server that has it."),
    "delete-all": ("orders", "Delete EVERY study on every server, or on those named, as a batch."),
    "batch": ("orders", "Do something to many images or studies at once, and look after it."),
    "download": (
        "download",
        "Bring a study to DESTINATION: a path of the worker's machine, file:///…, s3://bucket/key or"
        " az://container/blob.",
    ),
    "status": ("servers", "Say who answers, and how fast."),
    "storage": ("servers", "Say how much room each server has, as far as it tells."),
    "database": ("servers", "Say whether each server's database works."),
    "server": ("server", "Take a server out of service, and back."),
    "trace": ("trace", "Say why the image, series or study that bears UID is where it is."),
    "doctor": (
        "doctor",
        "Look whether everything that a job needs is there and works, and say what to do about what is not.",
    ),
    "audit": (
        "audit",
        "List the studies that are on more than one server, and in how many images their copies differ.",
    ),
    "dead": ("dead", "Dead letters: jobs that were tried as often as they may be, or that a person has to look at."),
}


class ListedCommand(click.Command):
    """What help and shell completion say of a command whose ``module`` is not loaded."""

    def __init__(self, name: str, module: str, sentence: str) -> None:
        super().__init__(name, help=sentence)
        self.module = module

    def load(self) -> click.Command:
        """The command itself."""
        module = importlib.import_module(f"{__name__}.{self.module}")
        command: click.Command = getattr(module, str(self.name).replace("-", "_"))
        return command


@contextmanager
def _printable_usage() -> Iterator[None]:
    """What click quotes of a command line, which may hold anything, as it may reach a terminal."""
    try:
        yield
    except click.UsageError as error:
        from courier.redaction import printable  # noqa: PLC0415  # few commands are mistyped

        said = "\n".join(map(printable, error.format_message().split("\n")))
        raise click.UsageError(said, ctx=error.ctx) from None


class _PacsGroup(click.Group):
    def load(self, name: str) -> click.Command:
        """The command of that name, with its options."""
        command = self.commands[name]
        if isinstance(command, ListedCommand):
            command = self.commands[name] = command.load()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        try:
            return name, command if name is None else self.load(name), rest
        except KeyboardInterrupt:  # of which click would say "Aborted!", with the exit status of a failure
            from producer.terminal import errors_console, plain  # noqa: PLC0415 (loads rich)

            errors_console.print(plain("pacs: Interrupted."))
            ctx.exit(130)

    def invoke(self, ctx: click.Context) -> Any:
        with _printable_usage():
            return super().invoke(ctx)

    def main(self, *args: Any, **how: Any) -> Any:
        """As click's, which writes help itself, outside of any command, and knows no full disk.

        A shell that asks for completion waits for it, so no command is loaded for that.
        """
        if "_PACS_COMPLETE" in os.environ:
            from producer.cli.completion import light_commands  # noqa: PLC0415  # only shells ask for it

            self.commands = light_commands()
        try:
            return super().main(*args, **how)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            from producer.cli.door import output_lost  # noqa: PLC0415  # loads Celery and Rich
            from producer.terminal import OutputLost  # noqa: PLC0415

            sys.exit(output_lost(OutputLost(error.errno, error.strerror)))


@click.group(cls=_PacsGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Put images into the right PACS, and ask, move and delete what is there.

    Settings come from the file that PACS_CONFIG names and from the environment (docs/settings.md).
    Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 a server or the broker is unavailable, 130 interrupted
    (the job goes on unless the output says cancelled).
    """


for _name, (_module, _sentence) in COMMANDS.items():
    main.add_command(ListedCommand(_name, _module, _sentence))
