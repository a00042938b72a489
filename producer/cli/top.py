"""``pacs top``: servers, queues, batches and what jobs wait for, live."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from courier.batches.store import Batch
from courier.ledger.jobs import SILENT_S
from courier.overview import OpenJobs, ServerLoad
from courier.waits import utc
from producer.cli.batch_tables import batches_table
from producer.cli.door import DONE, plain_failures
from producer.cli.jobs import as_json_lines_option, summary
from producer.client import Courier, reachable
from producer.errors import BrokerUnavailable
from producer.terminal import Column, ListingTable, Terminal, console, is_asked_on_a_terminal, plain, print_json

#: What has been due for so long no worker looks at.
_OVERDUE_S: Final = 60.0
#: So many reasons and batches are shown.
_SHOWN: Final = 10
_STYLES: Final = {"closed": "green", "half-open": "yellow", "open": "bold red"}


@dataclass(frozen=True)
class LivePicture:
    """Everything that `pacs top` shows at one moment."""

    at_s: float
    jobs: OpenJobs
    overdue: int
    dead: int
    queues: Mapping[str, int]
    workers: Mapping[str, Mapping[str, Any]]
    servers: Sequence[ServerLoad]
    batches: Sequence[Batch]

    def as_json(self) -> dict[str, Any]:
        return {
            "at": utc(self.at_s * 1000),
            "jobs": {**self.jobs.as_json(), "overdue": self.overdue, "dead": self.dead},
            "queues": dict(self.queues),
            "workers": [
                {"worker": name, "ok": said["ok"], "silent": self.is_silent(said), "complaint": said["complaint"]}
                for name, said in self.workers.items()
            ],
            "servers": [one.as_json() for one in self.servers],
            "batches": [batch.as_json() for batch in self.batches],
        }

    def is_silent(self, said: Mapping[str, Any]) -> bool:
        """Whether a worker's watchdog has said nothing for so long that the worker does not run, or hangs."""
        return bool(self.at_s - said["at"] > SILENT_S)


@click.command()
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.2),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Look again after so many seconds.",
)
@click.option("--once", is_flag=True, help="Show one picture and end; so it is without a terminal too.")
@as_json_lines_option
@plain_failures
def top(every_s: float, once: bool, as_json: bool) -> int:
    """Show servers, queues, batches and what jobs wait for, again and again.

    q or Ctrl-C ends it. --json writes a line for each look. No server is asked anything: what is shown is what the
    workers know.
    """
    with Courier() as courier:
        if as_json:
            _write_lines(courier, every_s, once=once)
        elif once or console.columns is None:
            console.print(drawn(take_picture(courier)))
        else:
            _watch(courier, every_s)
    return DONE


def take_picture(courier: Courier) -> LivePicture:
    limits = {server.name: server.max_concurrency for server in courier.settings.servers}
    queues = courier.queue_depths()
    overview = courier.overview
    ledger = courier.ledger
    if ledger is None:
        raise BrokerUnavailable("What goes on, the ledger says; give ledger_url.")
    with reachable():
        load = ledger.load(overdue_s=_OVERDUE_S)
        return LivePicture(
            at_s=ledger.clock_s(),
            jobs=overview.open_jobs(),
            overdue=load.overdue,
            dead=load.dead,
            queues=queues,
            workers=ledger.workers(now_s=time.time()),
            servers=overview.servers(limits),
            batches=overview.batches(limit=_SHOWN),
        )


def _write_lines(courier: Courier, every_s: float, *, once: bool) -> None:
    with suppress(KeyboardInterrupt):
        while True:
            print_json(take_picture(courier).as_json())
            sys.stdout.flush()
            if once:
                return
            time.sleep(every_s)


def _watch(courier: Courier, every_s: float) -> None:
    with (
        _keys() as pressed,
        suppress(KeyboardInterrupt),
        Live(console=Terminal(), screen=True, auto_refresh=False) as live,
    ):
        live.update(_seen(courier), refresh=True)
        while b"q" not in pressed(every_s).lower():
            live.update(_seen(courier), refresh=True)


def _seen(courier: Courier) -> RenderableType:
    """The picture, or why there is none now: the next look may find Redis there again."""
    try:
        return Group(drawn(take_picture(courier)), Text("q ends this", "dim"))
    except BrokerUnavailable as error:
        return plain(f"{_clock(time.time())}  {error}", "red")


@contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """What waits for keys for so many seconds; b"" where none was pressed, or there is no keyboard."""
    if not is_asked_on_a_terminal():
        yield _without_keys
        return
    import termios  # noqa: PLC0415  # on a terminal alone: Windows has none
    import tty  # noqa: PLC0415

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard, termios.TCSADRAIN)  # keys that were pressed before are kept
    try:
        yield lambda wait_s: os.read(keyboard, 64) if select.select([keyboard], [], [], wait_s)[0] else b""
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _without_keys(wait_s: float) -> bytes:
    time.sleep(wait_s)
    return b""


# --- how it looks -----------------------------------------------------------------------------------------------


def drawn(picture: LivePicture) -> Group:
    """The picture as lines and tables."""
    parts: list[RenderableType] = [plain(_clock(picture.at_s), "bold"), _workers(picture), *_jobs(picture)]
    parts += [Text(), servers_table(picture.servers)]
    if reasons := picture.jobs.waiting[:_SHOWN]:
        table = ListingTable("jobs wait for", "server", Column("jobs", right=True))
        for one in reasons:
            table.add_row(one.code, one.server_name or "–", f"{one.jobs:,}", style="yellow")
        parts += [Text(), table]
    if picture.batches:
        parts += [Text(), batches_table(picture.batches)]
    return Group(*parts)


def _workers(picture: LivePicture) -> Text:
    silent = [name for name, said in picture.workers.items() if picture.is_silent(said)]
    sick = [name for name, said in picture.workers.items() if not said["ok"] and name not in silent]
    count = len(picture.workers) - len(silent)
    parts = [f"workers: {count}"]
    parts += [f"silent: {', '.join(silent)}"] if silent else []
    parts += [f"{name}: {picture.workers[name]['complaint']}" for name in sick]
    queues = ", ".join(f"{name} {depth:,}" for name, depth in picture.queues.items())
    return plain(f"{'; '.join(parts)}  messages in queues: {queues}", "" if count and not sick else "red")


def _jobs(picture: LivePicture) -> Iterator[Text]:
    yield plain(f"jobs: {summary(picture.jobs)}")
    if not picture.jobs.complete:
        yield plain(
            f"  counted among the {picture.jobs.looked_at:,} of {picture.jobs.open:,} that are due first", "dim"
        )
    if picture.overdue:
        yield plain(f"  {picture.overdue:,} are overdue: no worker looks at them; pacs doctor says why", "red")
    if picture.dead:
        yield plain(f"  {picture.dead:,} dead letters: pacs dead list", "red")


def servers_table(servers: Sequence[ServerLoad]) -> ListingTable:
    """A line per server. ``ms``: how fast it answered questions lately; ``parked``: jobs that wait until it can be
    asked.
    """
    numbers = (Column(name, right=True) for name in ("ms", "slots", "parked"))
    table = ListingTable("server", "circuit", *numbers, Column("note", "text"))
    for one in servers:
        limit = "" if one.slots_limit is None else f"/{one.slots_limit}"
        state = one.circuit.name if one.suspension is None else one.suspension.state
        circuit = plain(state, _STYLES.get(state, "yellow"))
        ms = "" if one.latency_ms is None else f"{one.latency_ms:,.0f}"
        parked = f"{one.waiting:,}" if one.waiting else ""
        table.add_row(one.name, circuit, ms, f"{one.slots_used}{limit}", parked, _note(one))
    return table


def _note(server: ServerLoad) -> str:
    circuit = server.circuit
    if server.suspension is not None:
        return str(server.suspension)
    if circuit.closed:
        return "failed lately" if circuit.lately else ""
    pause = f"tested again in {circuit.pause_left_s:.0f} s" if circuit.pause_left_s else "is tested now"
    which = circuit.breaker.removeprefix(server.name).lstrip(":")
    return "; ".join(part for part in (which and f"of its {which}", circuit.reason, pause) if part)


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).astimezone().isoformat(timespec="seconds")
