"""How a trace is read on a terminal: where it is now and why, what the ledger remembers, and what happened when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from producer.show import console

_ANSWERS = {"found": "yes", "not_there": "no"}
_STATES = {"there": "there now", "unknown": "not known"}
_STYLES = {"stored": "green", "waiting": "yellow", "claimed": "cyan", "routed": "cyan"}


def show_trace(payload: Mapping[str, Any]) -> None:
    console.print(f"{payload['level'] or 'UID'} {payload['uid']}", style="bold", highlight=False, markup=False)
    console.print(payload["why"], highlight=False, markup=False)
    if payload["viewer_url"]:
        console.print(payload["viewer_url"], style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print("\nnow, as the servers say", style="bold")
    console.print(_now(payload))
    console.print("\nhistory, as the ledger remembers it", style="bold")
    history = _history(payload)
    if history.row_count:
        console.print(history)
    if payload["timeline"]:
        console.print(_timeline(payload))
    else:
        console.print("The ledger holds no decision about it.", style="dim")


def _now(payload: Mapping[str, Any]) -> Table:
    table = _table("server", "has it?")
    for entry in payload["servers"]:
        said = entry["error"]["message"] if entry["error"] else _ANSWERS[entry["status"]]
        _row(table, entry["server_name"], said)
    return table


def _history(payload: Mapping[str, Any]) -> Table:
    table = _table("what", "where", "when (UTC)", "job", "since")
    claim, receipt = payload["claim"], payload["receipt"]
    if receipt:
        _row(table, "stored", receipt["server_name"], receipt["stored_at"] or "", receipt["job_id"], _since(receipt))
    for push in payload["pushes"]:
        what = "images of its study uploaded" if push["kind"] == "upload" else f"{_count(push)} copied"
        _row(table, what, push["server_name"], push["at"] or "", push["job_id"], _since(push))
    if claim:
        _row(table, "study claimed for", claim["server_name"], claim["claimed_at"] or "", claim["claimed_by"] or "", "")
    if payload["held_by"]:
        _row(table, "held now", "", "", payload["held_by"], "")
    for job in payload["jobs"]:
        outcome = f"job {job['state']}, attempts: {job['attempts']}" + (
            f", {job['code']}" if job["code"] not in (None, "done") else ""
        )
        why = "".join(
            f", {said}: {job[name]}"
            for name, said in (("requested_by", "requested by"), ("reason", "reason"))
            if job.get(name)
        )
        _row(table, outcome + why, "", job["created_at"] or "", job["job_id"], "")
    return table


def _count(push: Mapping[str, Any]) -> str:
    return "images of its study" if push["images"] is None else f"{push['images']} images of its study"


def _since(pushed: Mapping[str, Any]) -> str:
    """What has become of what was pushed."""
    match pushed["state"]:
        case "deleted":
            return f"deletion ordered {pushed['voided_at']} by job {pushed['voided_by']}"
        case "replaced":
            return f"perhaps replaced {pushed['voided_at']} by job {pushed['voided_by']}"
        case "gone":
            return "gone, by no job of ours"
        case state:
            return _STATES.get(state, "")


def _timeline(payload: Mapping[str, Any]) -> Table:
    table = _table("when (UTC)", "decision", "what", "job")
    for event in payload["timeline"]:
        style = _STYLES.get(event["event"], "" if event["details"].get("code") == "done" else "red")
        _row(table, event["at"], event["event"], event["text"], event["job_id"], style=style)
    return table


def _row(table: Table, *cells: str, style: str = "") -> None:
    """A row whose cells are shown as they are written: ids of jobs and reasons may hold what looks like markup."""
    table.add_row(*map(Text, cells), style=style)


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
