"""``pacs doctor``."""

from __future__ import annotations

import click

from producer.cli.door import DONE, FAILED, UNAVAILABLE, as_json_option, plain_failures
from producer.doctor import Finding, examine
from producer.terminal import Column, ListingTable, console, errors_console, plain, print_json

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "unavailable": "bold red"}


@click.command()
@as_json_option
@plain_failures
def doctor(as_json: bool) -> int:
    """Look whether everything that a job needs is there and works, and say what to do about what is not.

    Exit status 1: something is wrong; 3: the broker, the ledger or a server cannot be reached.
    """
    with errors_console.busy("looking"):
        findings = list(examine())
    if as_json:
        document = {"operation": "doctor", "findings": [finding.as_json() for finding in findings]}
        print_json(document)
    else:
        console.print(_table(findings))
    states = {finding.state for finding in findings}
    return FAILED if "failed" in states else UNAVAILABLE if "unavailable" in states else DONE


def _table(findings: list[Finding]) -> ListingTable:
    table = ListingTable("check", "state", Column("found", "text"), Column("what to do", "text"))
    for finding in findings:
        table.add_row(finding.check, plain(finding.state, _STYLES[finding.state]), finding.found, finding.advice)
    return table
