"""What commands that delete have in common: they ask first, and without a terminal they need ``--yes``."""

from __future__ import annotations

from pathlib import Path

import click

from courier.redaction import REASON_LENGTH, REQUESTED_BY_LENGTH, printable
from producer.cli.door import Command
from producer.errors import ConfirmationRequired, InvalidRequest
from producer.terminal import console, errors_console, is_asked_on_a_terminal

yes_option = click.option("--yes", is_flag=True, help="Do not ask. Needed without a terminal, and with --json.")
hide_option = click.option("--hide", is_flag=True, help="Only hide, where a server can do that.")
backup_option = click.option(
    "--backup", metavar="PLACE", help="Write a copy there first (folder, s3://… or az://…), so that it can be undone."
)


confirm_studies_option = click.option(
    "--confirm-studies",
    type=click.IntRange(0),
    metavar="N",
    help="The exact number of studies of which images are deleted; needed above deletions.max_studies_per_order.",
)


def history(command: Command) -> Command:
    """The options that say of a job who requested it and why."""
    for option in (
        click.option("--reason", metavar="WORDS", help=f"Why: kept for history, {REASON_LENGTH:,} characters at most."),
        click.option("--requested-by", metavar="WORDS", help=f"Who wants it: kept too, {REQUESTED_BY_LENGTH} at most."),
    ):
        command = option(command)
    return command


def may_ask(*, as_json: bool) -> bool:
    """Whether there is a terminal to ask on. With ``--json`` nothing is asked: standard output is one document."""
    return is_asked_on_a_terminal() and not as_json


def require_confirmation(*, yes: bool, as_json: bool) -> None:
    """Refuse to start what has to be confirmed and was not, where nothing can be asked."""
    if yes or may_ask(as_json=as_json):
        return
    why = "--json asks nothing" if is_asked_on_a_terminal() else "there is no terminal to ask for confirmation"
    raise ConfirmationRequired(f"Not started: {why}. Pass --yes.")


def ask(question: str) -> bool:
    return click.confirm(printable(question), err=_is_output_redirected())


def ask_to_type(request: str) -> str:
    """What is typed in answer."""
    return str(click.prompt(printable(request), default="", show_default=False, err=_is_output_redirected()))


def _is_output_redirected() -> bool:
    """Whether a question is seen on standard error alone."""
    return errors_console.file.isatty() and not console.file.isatty()


def agreed(question: str | None, *, yes: bool, as_json: bool) -> bool:
    """Whether to go on: nothing has to be asked, ``--yes`` was given, or the answer is yes."""
    if question is None or yes:
        return True
    require_confirmation(yes=yes, as_json=as_json)
    if ask(question):
        return True
    console.print("Nothing was done.")
    return False


def hides(*, hide: bool, keep: bool) -> bool:
    """Whether to hide only: ``--hide``, which was called ``--keep``."""
    if keep:
        _renamed("--keep", "--hide", both=hide)
    return hide or keep


def backup_place(backup: str | None, keep: str | None) -> str | None:
    """Where backups go, as jobs have it: ``--backup``, which was called ``--keep``."""
    if keep is not None:
        _renamed("--keep", "--backup", both=backup is not None)
    return place(keep if backup is None else backup)


def place(text: str | None) -> str | None:
    """A destination as jobs have it: a path is one of the worker's machine."""
    return text if text is None or ":/" in text else Path(text).absolute().as_uri()


def _renamed(old: str, new: str, *, both: bool) -> None:
    if both:
        raise InvalidRequest(f"{old} is the old name of {new}, and both are given; give {new} alone.")
    warn(f"{old} is called {new} now; {old} is accepted in 0.2 and refused after.")


def warn(sentence: str) -> None:
    """Say on standard error what has to be known beside what a command prints."""
    errors_console.print(f"warning: {sentence}", style="yellow")
