"""How a trace is read on a terminal: where it is and why, then what happened when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from producer.show import console

_STYLES = {"stored": "green", "waiting": "yellow", "claimed": "cyan", "routed": "cyan"}


def show_trace(payload: Mapping[str, Any]) -> None:
    console.print(f"{payload['level'] or 'UID'} {payload['uid']}", style="bold", highlight=False, markup=False)
    console.print(payload["why"], highlight=False, markup=False)
    if payload["viewer_url"]:
        console.print(payload["viewer_url"], style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(_facts(payload))
    if payload["timeline"]:
        console.print(_timeline(payload))
    else:
        console.print("The ledger holds no decision about it.", style="dim")


def _facts(payload: Mapping[str, Any]) -> Table:
    table = _table("what", "where", "since", "job")
    for entry in payload["servers"]:
        said = entry["error"]["message"] if entry["error"] else entry["status"].replace("_", " ")
        table.add_row(escape(said), entry["server_name"], "", "")
    claim, receipt = payload["claim"], payload["receipt"]
    if claim:
        table.add_row("study claimed for", claim["server_name"], claim["claimed_at"] or "", claim["claimed_by"] or "")
    if receipt:
        table.add_row("receipt", receipt["server_name"], receipt["stored_at"] or "", receipt["job_id"])
    if payload["held_by"]:
        table.add_row("held now", "", "", payload["held_by"])
    for job in payload["jobs"]:
        outcome = f"job {job['state']}, attempts: {job['attempts']}" + (
            f", {job['code']}" if job["code"] not in (None, "done") else ""
        )
        why = "".join(
            f", {said}: {job[name]}"
            for name, said in (("requested_by", "requested by"), ("reason", "reason"))
            if job.get(name)
        )
        table.add_row(escape(outcome + why), "", job["created_at"] or "", job["job_id"])
    return table


def _timeline(payload: Mapping[str, Any]) -> Table:
    table = _table("when (UTC)", "decision", "what", "job")
    for event in payload["timeline"]:
        style = _STYLES.get(event["event"], "" if event["details"].get("code") == "done" else "red")
        table.add_row(event["at"], event["event"], escape(event["text"]), event["job_id"], style=style)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
