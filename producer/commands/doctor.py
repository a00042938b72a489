"""``pacs doctor``."""

from __future__ import annotations

import json

import click
from rich.markup import escape
from rich.table import Table

from producer.commands.door import DONE, FAILED, UNAVAILABLE, as_json_option, plain_failures
from producer.doctor import Finding, examine
from producer.show import console, errors_console

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "unavailable": "bold red"}


@click.command()
@as_json_option
@plain_failures
def doctor(as_json: bool) -> int:
    """Look whether everything that a job needs is there and works, and say what to do about what is not.

    Exit status 1: something is wrong; 3: the broker, the ledger or a server cannot be reached.
    """
    with errors_console.status("looking"):
        findings = list(examine())
    if as_json:
        document = {"operation": "doctor", "findings": [finding.as_json() for finding in findings]}
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        console.print(_table(findings))
    states = {finding.state for finding in findings}
    return FAILED if "failed" in states else UNAVAILABLE if "unavailable" in states else DONE


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("check", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        style = _STYLES[finding.state]
        row = (finding.check, f"[{style}]{finding.state}[/{style}]", escape(finding.found), escape(finding.advice))
        table.add_row(*row)
    return table
