"""Batches from a program: ordering them, how far they are, steering them, their plan and their report.

What an order is made of is in ``orders.py``; how it looks on a terminal in ``cli/batch_tables.py``.
"""

from __future__ import annotations

import contextlib
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar, cast

import redis

from courier.batches.planner import Planned
from courier.batches.result import end_payload
from courier.batches.store import DONE_AGAIN, Batch, Batches, Row, State, is_missing, is_to_undo
from courier.ledger.jobs import Ledger
from courier.messages import BatchContinueJob, Job
from producer.errors import BrokerUnavailable, InvalidRequest, NotFound
from producer.orders import KINDS, InputSource, Notify, Order, lines_of, of_plan_file, plan
from producer.plans import PlanFile, PlanHeader, PlanLine, version_of
from producer.results import BatchResult

if TYPE_CHECKING:
    from producer.handle import Handle

Items = str | Path | Iterable[str]
Thing = TypeVar("Thing")
_POLL_S = 0.5
#: What a batch that is there may be asked for after a look at what that would be about, and in which states.
ContinueCommand = Literal["apply", "retry", "undo"]
STATES_OF: Final[Mapping[ContinueCommand, Sequence[State]]] = {
    "apply": ("planned",),
    "retry": ("done", "cancelled"),
    "undo": ("done", "cancelled", "undone"),
}
#: What of an order a plan file does not say: its lines do, or it is about the job that made the plan.
_SAID_BY_ITEMS = frozenset(
    ("dry_run", "confirm", "confirm_studies", "source", "filters", "everything", "requested_by", "reason")
)


class Enqueue(Protocol):
    """`Courier.enqueue`."""

    def __call__(
        self, task: str, kind: type[Job], job: Mapping[str, Any], *, job_id: str | None = None, batch_id: str = ""
    ) -> Handle: ...


@dataclass(frozen=True)
class BatchClient:
    """All batches of a ledger. A batch's id is that of the job that began it.

    ``upload``, ``delete``, ``download`` and ``migrate`` order one. ``items`` are a list (or anything that can be gone
    through once) of image URLs or study UIDs; the name of a file with one per line, or with ``column`` a CSV or JSON
    Lines file (``skip_bad`` leaves bad rows out); or, for an upload, a prefix, a folder or a ZIP file that a worker
    lists. ``width`` chunks at a time, at most ``requests_per_s`` and ``bytes_per_s``, only in the ``window``
    ("20:00-06:00 Europe/Berlin"); ``dry_run`` stops at the plan; ``requested_by`` and ``reason`` are kept with it.
    """

    ledger: Ledger
    enqueue: Enqueue

    # --- orders ---------------------------------------------------------------------------------------------

    def upload(  # noqa: PLR0913 - each option by its name
        self,
        items: Items,
        *,
        server: str | None = None,
        name: str | None = None,
        width: int | None = None,
        requests_per_s: float | None = None,
        bytes_per_s: float | None = None,
        window: str | None = None,
        verify: bool = True,
        dry_run: bool = False,
        column: str | None = None,
        skip_bad: bool = False,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Put many images where they belong, or on the one ``server``."""
        order = {
            "server": server,
            "name": name,
            "width": width,
            "requests_per_s": requests_per_s,
            "bytes_per_s": bytes_per_s,
            "window": window,
            "verify": _but(verify, True),
            "dry_run": _but(dry_run, False),
            "requested_by": requested_by,
            "reason": reason,
        }
        return self.order(Order("upload", order), _input_source(items, column=column, skip_bad=skip_bad))

    def delete(  # noqa: PLR0913 - each option by its name
        self,
        items: Items | None = None,
        *,
        filters: Mapping[str, str] | None = None,
        everything: bool = False,
        confirm: str | None = None,
        confirm_studies: int | None = None,
        servers: Iterable[str] | None = None,
        permanent: bool = True,
        backup: str | None = None,
        keep: str | None = None,
        name: str | None = None,
        width: int | None = None,
        requests_per_s: float | None = None,
        bytes_per_s: float | None = None,
        window: str | None = None,
        verify: bool = True,
        dry_run: bool = False,
        column: str | None = None,
        skip_bad: bool = False,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Delete studies on every server that has them, or on ``servers``.

        ``backup``: a folder, ``s3://…`` or ``az://…`` where a copy of each is written first, from which the deletion
        can be undone; ``keep`` is its old name, with a `DeprecationWarning`. Instead of ``items``, ``filters`` (DICOM
        keywords) or ``everything=True`` with ``confirm="delete all studies"``.
        """
        order = {
            "filters": filters,
            "everything": _but(everything, False),
            "confirm": confirm,
            "confirm_studies": confirm_studies,
            "servers": _names(servers),
            "permanent": permanent,
            "backup": _renamed(backup, keep),
            "name": name,
            "width": width,
            "requests_per_s": requests_per_s,
            "bytes_per_s": bytes_per_s,
            "window": window,
            "verify": _but(verify, True),
            "dry_run": _but(dry_run, False),
            "requested_by": requested_by,
            "reason": reason,
        }
        return self.order(Order("delete", order), _input_source(items, column=column, skip_bad=skip_bad))

    def download(  # noqa: PLR0913 - each option by its name
        self,
        items: Items | None = None,
        *,
        destination: str,
        format: Literal["zip", "files"] = "zip",
        filters: Mapping[str, str] | None = None,
        everything: bool = False,
        servers: Iterable[str] | None = None,
        name: str | None = None,
        width: int | None = None,
        requests_per_s: float | None = None,
        bytes_per_s: float | None = None,
        window: str | None = None,
        verify: bool = True,
        dry_run: bool = False,
        column: str | None = None,
        skip_bad: bool = False,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Bring studies below ``destination``, a folder of the worker's machine, ``s3://…`` or ``az://…``."""
        order = {
            "filters": filters,
            "everything": _but(everything, False),
            "servers": _names(servers),
            "destination": destination,
            "format": _but(format, "zip"),
            "name": name,
            "width": width,
            "requests_per_s": requests_per_s,
            "bytes_per_s": bytes_per_s,
            "window": window,
            "verify": _but(verify, True),
            "dry_run": _but(dry_run, False),
            "requested_by": requested_by,
            "reason": reason,
        }
        return self.order(Order("download", order), _input_source(items, column=column, skip_bad=skip_bad))

    def migrate(  # noqa: PLR0913 - each option by its name
        self,
        items: Items | None = None,
        *,
        from_server: str | None = None,
        to_server: str | None = None,
        source: str | None = None,
        target: str | None = None,
        delete_source: bool = False,
        confirm_studies: int | None = None,
        digests: Literal["all", "sample", "none"] = "all",
        filters: Mapping[str, str] | None = None,
        everything: bool = False,
        name: str | None = None,
        width: int | None = None,
        requests_per_s: float | None = None,
        bytes_per_s: float | None = None,
        window: str | None = None,
        verify: bool = True,
        dry_run: bool = False,
        column: str | None = None,
        skip_bad: bool = False,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Copy studies from the server ``from_server`` to ``to_server``; move them with ``delete_source``.

        ``source`` and ``target`` are other names of the two. ``digests``: compare "all" images, a "sample" (one per
        series), or "none": by their bytes, and element by element where a server does not keep bytes.
        ``delete_source`` takes "all" alone.
        """
        order = {
            "filters": filters,
            "everything": _but(everything, False),
            "from_server": _alias("from_server", from_server, "source", source),
            "to_server": _alias("to_server", to_server, "target", target),
            "delete_source": delete_source,
            "confirm_studies": confirm_studies,
            "digests": digests,
            "name": name,
            "width": width,
            "requests_per_s": requests_per_s,
            "bytes_per_s": bytes_per_s,
            "window": window,
            "verify": _but(verify, True),
            "dry_run": _but(dry_run, False),
            "requested_by": requested_by,
            "reason": reason,
        }
        return self.order(Order("migrate", order), _input_source(items, column=column, skip_bad=skip_bad))

    def order(self, order: Order, input_source: InputSource | None = None) -> Handle[BatchResult]:
        """Order a batch of a kind with the fields of its message.

        Raises
        ------
        InvalidRequest
            A field, or rows of what was given, are wrong; nothing was begun.
        """
        kind = KINDS[order.kind]
        source = input_source.source if input_source and order.kind == "upload" else None
        if input_source is None or source is not None:
            job_id = str(uuid.uuid4())
            return self.enqueue(kind.task, kind.form, order.message(source=source), job_id=job_id, batch_id=job_id)
        order.planned()  # what is wrong with it is said before the items are read
        with input_source.read(kind.parse_item) as items:
            return self._planned(order, input_source.planned(items), notify=input_source.notify)

    def apply(
        self,
        what: str | Path,
        *,
        confirm_studies: int | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Do what a plan says: that of a batch, by its id, or a plan file, which becomes a batch of its own."""
        if isinstance(what, str) and not Path(what).exists():
            return self._go_on("apply", what, confirm_studies, requested_by, reason)
        order, plan_file = of_plan_file(Path(what), notify=_deprecated)
        return self.apply_file(
            order, plan_file, confirm_studies=confirm_studies, requested_by=requested_by, reason=reason
        )

    def apply_file(
        self,
        order: Order,
        plan_file: PlanFile,
        *,
        confirm_studies: int | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Do what a plan file says that has been read by `producer.orders.of_plan_file`."""
        given = {"confirm_studies": confirm_studies, "requested_by": requested_by, "reason": reason}
        order = Order(order.kind, {**order.fields, **given})
        return self._planned(order, lines_of(plan_file), notify=lambda _: None)

    def retry(
        self,
        batch_id: str,
        *,
        confirm_studies: int | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Try again what failed, what verify found missing, and what a cancelled batch had left open."""
        return self._go_on("retry", batch_id, confirm_studies, requested_by, reason)

    def verify(
        self,
        batch_id: str,
        *,
        confirm_studies: int | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Look once more whether what was done is so."""
        return self._go_on("verify", batch_id, confirm_studies, requested_by, reason)

    def undo(
        self,
        batch_id: str,
        *,
        confirm_studies: int | None = None,
        requested_by: str | None = None,
        reason: str | None = None,
    ) -> Handle[BatchResult]:
        """Take back what was done."""
        return self._go_on("undo", batch_id, confirm_studies, requested_by, reason)

    def _planned(self, order: Order, lines: Iterable[Planned], *, notify: Notify) -> Handle[BatchResult]:
        """Plan it here, then have it seen through."""
        kind = KINDS[order.kind]
        with _reachable():
            batch_id = plan(Batches(self.ledger), order, lines, notify=notify)
        return self.enqueue(kind.task, kind.form, order.message(planned=True), job_id=batch_id, batch_id=batch_id)

    def _go_on(
        self, command: str, batch_id: str, confirm_studies: int | None, requested_by: str | None, reason: str | None
    ) -> Handle[BatchResult]:
        self.get(batch_id)
        job = {"batch_id": batch_id, "confirm_studies": confirm_studies, "requested_by": requested_by, "reason": reason}
        return self.enqueue(f"pacs.batch.{command}", BatchContinueJob, job, batch_id=batch_id)

    # --- what there is --------------------------------------------------------------------------------------

    def list(self) -> list[Batch]:
        """The latest first."""
        with _reachable():
            return Batches(self.ledger).list()

    def get(self, batch_id: str) -> Batch:
        """The batch as it stands; `NotFound` if there is none of that id."""
        with _reachable():
            batch = Batches(self.ledger).get(batch_id)
        if batch is None:
            raise NotFound(f"No batch is called {batch_id}; batches are kept as long as results.")
        return batch

    def published(self, batch: Batch) -> dict[str, Any]:
        """The batch as JSON, with who requested its order and its passes, and why."""
        with _reachable():
            return Batches(self.ledger).published(batch)

    def watch(self, batch_id: str, *, every_s: float = _POLL_S) -> Iterator[Batch]:
        """The batch, again and again until it is over."""
        while True:
            batch = self.get(batch_id)
            over = self.is_over(batch)
            yield batch
            if over:
                return
            time.sleep(every_s)

    def is_over(self, batch: Batch) -> bool:
        """Whether it has come to an end, and no job is there that takes it further.

        Between its survey and its first item a batch is ``planned``, and not over for that.
        """
        with _reachable():
            job = self.ledger.read_record(batch.coordinator) if batch.coordinator else {}
        return batch.over and job.get("state") not in ("queued", "running", "waiting")

    def ending(self, batch: Batch) -> BatchResult:
        """What it came to, as the jobs that see batches through have it, whoever ended it and however."""
        with _reachable():
            return cast(BatchResult, end_payload(batch, Batches(self.ledger), job_id=batch.coordinator or batch.id))

    def report(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """What became of each item, one after the other, however many there are."""
        batch = self.get(batch_id)
        for row in self.rows(batch):
            yield row.as_json(batch.types)

    def rows(self, batch: Batch) -> Iterator[Row]:
        with _reachable():
            yield from Batches(self.ledger).rows(batch)

    def plan(self, batch_id: str) -> tuple[PlanHeader, Iterator[PlanLine]]:
        """The plan of a batch, as a plan file has it; `NotFound` if it is still being made."""
        batch = self.get(batch_id)
        if not batch.frozen:
            raise NotFound(f"The plan of {batch_id} is not complete yet; ask again when it is planned.")
        order = {name: value for name, value in batch.order.items() if name not in _SAID_BY_ITEMS}
        header = PlanHeader(kind=batch.kind, name=batch.name, batch_id=batch.id, order=order, version=version_of(order))
        return header, (line for row in self.rows(batch) for line in plan_lines(row))

    def reach(self, batch: Batch, command: ContinueCommand) -> Mapping[tuple[str, str], int]:
        """How many items ``retry`` or ``undo`` would be about, by server and by what became of them.

        Raises
        ------
        InvalidRequest
            In the state that the batch is in, it would be refused.
        """
        check_state(batch, command)
        rows = self.rows(batch)
        if command == "undo":
            return Counter((row.outcome.server_name, row.outcome.status) for row in rows if is_to_undo(row))
        again = ((row.outcome.server_name, _to_retry(row, batch.kind)) for row in rows)
        return Counter((name, status) for name, status in again if status is not None)

    # --- steering -------------------------------------------------------------------------------------------

    def pause(self, batch_id: str) -> Batch:
        """Begin nothing new until it is resumed; what is under way comes to its end."""
        return self._steered(batch_id, Batches.pause)

    def resume(self, batch_id: str) -> Batch:
        """Go on with it."""
        return self._steered(batch_id, Batches.resume)

    def cancel(self, batch_id: str) -> Batch:
        """End it; what was done stays done."""
        return self._steered(batch_id, Batches.cancel)

    def _steered(self, batch_id: str, steer: Callable[[Batches, str], object]) -> Batch:
        with _reachable():
            steer(Batches(self.ledger), batch_id)
        return self.get(batch_id)


def _input_source(items: Items | None, *, column: str | None, skip_bad: bool) -> InputSource | None:
    if items is None:
        return None
    words, others = ((items,), None) if isinstance(items, str | Path) else ((), items)
    return InputSource(words, others, column=column, skip_bad=skip_bad)


def _but(value: Thing, default: Thing) -> Thing | None:
    """``value``, unless it is the default, which a message need not say."""
    return None if value == default and type(value) is type(default) else value


def _names(servers: Iterable[str] | None) -> Sequence[str] | None:
    """The names as a list; one name alone is passed on as it is, to be refused: it is a list of letters."""
    return servers if servers is None or isinstance(servers, str) else list(servers)


def _renamed(backup: str | None, keep: str | None) -> str | None:
    if keep is None:
        return backup
    if backup is not None:
        raise InvalidRequest("keep is the old name of backup, and both are given; give backup alone.")
    _deprecated("keep is called backup now; keep is accepted in 0.2 and refused after.")
    return keep


def _alias(name: str, value: str | None, other: str, alias: str | None) -> str | None:
    if value is not None and alias is not None and alias != value:
        raise InvalidRequest(f"{other} is another name of {name}, and both are given; give {name} alone.")
    return alias if value is None else value


def _deprecated(sentence: str) -> None:
    """Warn where a method of `BatchClient` was called, which called a function that calls this one."""
    warnings.warn(sentence, DeprecationWarning, stacklevel=4)


def check_state(batch: Batch, command: ContinueCommand) -> None:
    """Refuse what a worker would refuse for the state of the batch."""
    states = STATES_OF[command]
    if batch.state not in states:
        raise InvalidRequest(f"The batch is {batch.state}; that can be done when it is {' or '.join(states)}.")


def _to_retry(row: Row, kind: str) -> str | None:
    """As what a retry is about the item; None: it is not."""
    if row.outcome.status in ("failed", "open"):
        return row.outcome.status
    return "missing" if kind in DONE_AGAIN and is_missing(row) else None


def plan_lines(row: Row) -> Iterator[PlanLine]:
    """What the plan says of an item. What is to be done on several servers has a line for each.

    A line that named one of them would do it on that one alone, when the plan is applied from its file.
    """
    line, preflight = _plan_line(row), row.passes.get("survey")
    names = preflight.result.get("on", ()) if preflight is not None and not row.item.server else ()
    if line.do == "skip" or len(names) < 2:
        yield line
        return
    for name in names:
        yield line.model_copy(update={"server": name})


def _plan_line(row: Row) -> PlanLine:
    """At which server, and whether and why it is left out."""
    preflight, applied = row.passes.get("survey"), row.outcome
    settled = preflight if preflight is not None and preflight.status != "open" else None
    if settled is None and (applied.status == "skipped" or applied.is_planned_so):
        settled = applied
    server = row.item.server or (settled.server_name if settled else "")
    size = row.item.size_bytes
    if size is None and settled is not None:
        size = settled.result.get("size_bytes")
    line = PlanLine(item=row.item.text, server=server or None, size_bytes=size)
    if settled is None or settled.status == "planned":
        return line
    code = settled.code or ("" if settled.status == "skipped" else settled.status)
    why = ": ".join(part for part in (code, settled.message) if part)
    return line.model_copy(update={"do": "skip", "why": why})


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise BrokerUnavailable(f"The ledger cannot be reached ({type(error).__name__}); check LEDGER_URL.") from error
