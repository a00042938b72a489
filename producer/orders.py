"""Orders of batches: what was asked for becomes a plan in the ledger, and a job that sees it through.

What only this machine can read (files, standard input, a program's own list) is read, judged and planned here, row by
row, before anything begins. What only workers can reach (prefixes, archives, servers) they list themselves.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches
from courier.messages import (
    BatchDeleteJob,
    BatchDownloadJob,
    BatchMigrateJob,
    BatchOrderJob,
    BatchUploadJob,
    old_spellings,
    read_job,
)
from courier.redaction import printable
from producer.errors import InvalidRequest, SourceNotAllowed
from producer.inputs import BadRow, InputRow, Items, ParseItem, image_url, is_source, rows_of_words, study_uid
from producer.plans import PlanFile

#: So many chunks of a batch are open at a time unless its order says so.
CONCURRENCY: Final = 4

#: After so many rows it is said how many there were.
STEP: Final = 5_000

Notify = Callable[[str], None]
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class KindOfOrder:
    """What the producer has to know of a kind of batch."""

    task: str
    form: type[BatchOrderJob]
    parse_item: ParseItem


KINDS: Final[Mapping[str, KindOfOrder]] = {
    "upload": KindOfOrder("pacs.batch.upload", BatchUploadJob, image_url),
    "delete": KindOfOrder("pacs.batch.delete", BatchDeleteJob, study_uid),
    "download": KindOfOrder("pacs.batch.download", BatchDownloadJob, study_uid),
    "migrate": KindOfOrder("pacs.batch.migrate", BatchMigrateJob, study_uid),
}


@dataclass(frozen=True)
class InputSource:
    """What a batch is to be about, as it was given: ``words`` are items, files or ``-``; or an ``items`` of a program.

    ``notify`` is given a sentence where something was left out, ``step`` now and then how far reading
    and planning are.
    """

    words: tuple[str | Path, ...] = ()
    items: Iterable[str] | None = None
    column: str | None = None
    skip_bad: bool = False
    notify: Notify = lambda _: None
    step: Notify = lambda _: None

    @property
    def source(self) -> str | None:
        """The one prefix, folder or archive that a worker has to list.

        Raises
        ------
        InvalidRequest
            There is more beside it.
        """
        found = [word for word in self.words if isinstance(word, str) and is_source(word)]
        if found and len(self.words) > 1:
            raise InvalidRequest("A prefix, a folder or an archive stands alone; make a batch of each.")
        return found[0] if found else None

    @contextmanager
    def read(self, parse_item: ParseItem) -> Iterator[Items]:
        """All items, judged; they are gone afterwards."""
        rows: Iterator[InputRow | BadRow]
        if self.items is not None:
            rows = (InputRow(f"item {number}", text) for number, text in enumerate(self.items, start=1))
        else:
            rows = rows_of_words(self.words, parse_item, column=self.column)
        with Items() as items:
            items.add(self._stepping(rows, "rows read"), parse_item)
            items.check(skip_bad=self.skip_bad)
            if items.bad_total:
                self.notify(f"{items.describe_bad()}\nThey are left out.")
            yield items

    def planned(self, items: Items) -> Iterator[Planned]:
        """The items as a plan has them."""
        return (Planned(text) for text in self._stepping(items, f"of {items.count:,} items planned"))

    def _stepping(self, things: Iterable[Thing], what: str) -> Iterator[Thing]:
        for number, one in enumerate(things):
            if number % STEP == 0:
                self.step(f"{number:,} {what}")
            yield one


@dataclass(frozen=True)
class Order:
    """A batch of a kind, with the fields of its message."""

    kind: str
    fields: Mapping[str, Any]

    @property
    def form(self) -> type[BatchOrderJob]:
        return KINDS[self.kind].form

    @property
    def strict(self) -> bool:
        """Whether a field that is not known is refused."""
        return self.form.model_config.get("extra") == "forbid"

    def planned(self) -> BatchOrderJob:
        """As the job of a batch whose plan is in the ledger; `InvalidRequest` names the first field that is wrong."""
        return read_job(self.form, self.message(planned=True))

    def message(self, **more: Any) -> dict[str, Any]:
        return {name: value for name, value in {**self.fields, **more}.items() if value is not None}


def plan(batches: Batches, order: Order, lines: Iterable[Planned], *, notify: Notify) -> str:
    """Write the plan of a batch into the ledger, as its lines come; gives the batch's id.

    Nothing of it is done before the batch's own job is there. What is left without one is forgotten.
    """
    job, batch_id = order.planned(), str(uuid.uuid4())
    fields = job.model_dump(mode="json", exclude={"version", "items", "planned", "name"}, exclude_none=True)
    batches.open(batch_id, kind=order.kind, order=fields, concurrency=job.width or CONCURRENCY, name=job.name)
    try:
        with Planner(batches, batch_id) as planner:
            planner.add_all(lines)
            planner.freeze()
    except BaseException:
        batches.cancel(batch_id)
        raise
    if planner.repeated:
        notify(f"{planner.repeated:,} of them are there more than once, and are done once.")
    return batch_id


def of_plan_file(path: Path, *, notify: Notify = lambda _: None) -> tuple[Order, PlanFile]:
    """The order that a plan file holds, with the file, which was found whole.

    ``notify`` is given a sentence for each field that has an old name.

    Raises
    ------
    InvalidRequest
        It is none, or not as it was written; or it says more of an order that deletes, moves, hides or overwrites than
        is known here.
    """

    def parser_of(kind: str) -> ParseItem:
        if kind not in KINDS:
            raise InvalidRequest(f"{path} is a plan of a kind that is not known here; update pacs-courier.")
        return KINDS[kind].parse_item

    plan_file = PlanFile(path, parser_of)
    if not plan_file.totals.counts["apply"]:
        raise InvalidRequest(f"{path} leaves nothing to do: all its {plan_file.totals.items} items are to be skipped.")
    header = plan_file.header
    order = Order(header.kind, {**header.order, "name": header.name, "dry_run": False})
    if header.model_extra and order.strict:
        more = printable(next(iter(header.model_extra)), limit=100)
        raise InvalidRequest(f"{path} says more than is known here ({more}); update pacs-courier, or make a new plan.")
    form = order.planned()
    for sentence in old_spellings(order.form, order.fields):
        notify(f"{path}: {sentence}")
    return Order(
        order.kind, form.model_dump(mode="json", exclude={"version", "planned"}, exclude_unset=True)
    ), plan_file


def lines_of(plan_file: PlanFile) -> Iterator[Planned]:
    for line in plan_file:
        skip = (line.why or "left out by the plan") if line.do == "skip" else ""
        comes_to_none = skip and plan_file.header.kind == "upload"
        code, _, sentence = skip.partition(": ")
        refused = (sentence, code) if sentence and code == SourceNotAllowed.code else (skip, "")
        yield Planned(line.item, "" if comes_to_none else line.server or "", line.size_bytes, *refused)
