"""``pacs trace``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from producer.cli.door import DONE, UNAVAILABLE, as_json_option, ended, plain_failures, timeout_option
from producer.cli.session import Session
from producer.terminal import Column, ListingTable, console


@click.command()
@click.argument("uid")
@timeout_option
@as_json_option
@plain_failures
def trace(uid: str, timeout_s: float | None, as_json: bool) -> int:
    """Say why the image, series or study that bears UID is where it is. Exit status 3: a server did not answer."""
    with Session() as courier:
        payload = ended(courier, courier.trace(uid), timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        show_trace(payload)
    return UNAVAILABLE if any(entry["status"] in ("unavailable", "not_asked") for entry in payload["servers"]) else DONE


_ANSWERS = {"found": "yes", "not_there": "no"}
_STATES = {"there": "there now", "unknown": "not known"}
_STYLES = {"stored": "green", "waiting": "yellow", "claimed": "cyan", "routed": "cyan"}


def show_trace(payload: Mapping[str, Any]) -> None:
    console.print(f"{payload['level'] or 'UID'} {payload['uid']}", style="bold")
    console.print(payload["why"])
    if payload["viewer_url"]:
        console.print(payload["viewer_url"], style="dim")
    console.print("\nnow, as the servers say", style="bold")
    console.print(_now(payload))
    console.print("\nhistory, as the ledger remembers it", style="bold")
    history = _history(payload)
    if history.row_count:
        console.print(history)
    if payload["timeline"]:
        console.print()
        console.print(_timeline(payload))
    else:
        console.print("The ledger holds no decision about it.", style="dim")


def _now(payload: Mapping[str, Any]) -> ListingTable:
    table = ListingTable("server", Column("has it?", "text"))
    for entry in payload["servers"]:
        said = entry["error"]["message"] if entry["error"] else _ANSWERS[entry["status"]]
        table.add_row(entry["server_name"], said)
    return table


def _history(payload: Mapping[str, Any]) -> ListingTable:
    table = ListingTable(Column("what", "text"), "where", "when (UTC)", Column("job", "id"), Column("since", "text"))
    claim, receipt = payload["claim"], payload["receipt"]
    if receipt:
        table.add_row("stored", receipt["server_name"], receipt["stored_at"] or "", receipt["job_id"], _since(receipt))
    for push in payload["pushes"]:
        what = "images of its study uploaded" if push["kind"] == "upload" else f"{_count(push)} copied"
        table.add_row(what, push["server_name"], push["at"] or "", push["job_id"], _since(push))
    if claim:
        told = (claim[name] or "" for name in ("server_name", "claimed_at", "claimed_by"))
        table.add_row("study claimed for", *told, "")
    if payload["held_by"]:
        table.add_row("held now", "", "", payload["held_by"], "")
    for job in payload["jobs"]:
        outcome = f"job {job['state']}, attempts: {job['attempts']}" + (
            f", {job['code']}" if job["code"] not in (None, "done") else ""
        )
        why = "".join(
            f", {said}: {job[name]}"
            for name, said in (("requested_by", "requested by"), ("reason", "reason"))
            if job.get(name)
        )
        table.add_row(outcome + why, "", job["created_at"] or "", job["job_id"], "")
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


def _timeline(payload: Mapping[str, Any]) -> ListingTable:
    table = ListingTable("when (UTC)", "decision", Column("what", "text"), Column("job", "id"))
    for event in payload["timeline"]:
        style = _STYLES.get(event["event"], "" if event["details"].get("code") == "done" else "red")
        table.add_row(event["at"], event["event"], event["text"], event["job_id"], style=style)
    return table
