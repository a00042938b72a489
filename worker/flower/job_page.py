"""Flower's page of one task, for jobs of ours: servers, study, viewer links, why it waits; and its cancellation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tornado.web import HTTPError, authenticated

from courier.batches.store import Batches
from courier.ledger.jobs import JobStanding, Ledger
from courier.redaction import printable
from courier.result_lines import Facts, ending, facts_in, facts_of, shown_failure, shown_result
from courier.waits import sentence
from worker.flower.ledger_page import LedgerPage
from worker.flower.ledger_reader import LedgerAway
from worker.flower.rows import is_ours, line_of, readable
from worker.runtime import revokes
from worker.runtime.flower_internals import TaskRevoke, TaskView, event_of

#: States in which a job can be cancelled.
_OPEN: Final = ("queued", "waiting", "running")


@dataclass(frozen=True)
class JobFacts:
    """What the page says of a job above Flower's own table. ``state`` is "" where the ledger did not say."""

    ended: str = ""
    waits: str = ""
    state: str = ""
    facts: Facts = field(default_factory=Facts)
    note: str = ""
    may_cancel: bool = False


class JobPage(TaskView):  # type: ignore[misc]  # flower is untyped
    """In the place of Flower's page of a task; other applications' tasks are shown as Flower does."""

    @authenticated
    async def get(self, task_id: str) -> None:
        task = event_of(self, task_id)
        if task is None:
            raise HTTPError(404, f"Unknown task '{task_id}'")
        options = self.application.options
        job = await self._facts(task) if is_ours(task) else None
        self.render("task.html", task=task if job else self.format_task(task), read_only=options.read_only, job=job)

    async def _facts(self, task: Any) -> JobFacts:
        try:
            standing = (await LedgerPage.reader.ask(lambda ledger: ledger.standing([task.uuid]))).get(task.uuid)
        except LedgerAway as away:
            return JobFacts(ended=readable(ending(line_of(task))), facts=facts_in(line_of(task)), note=str(away))
        return job_facts(task, standing, may_act=self._may_act)

    @property
    def _may_act(self) -> bool:
        """As Flower's API, which the button asks."""
        options = self.application.options
        return not options.read_only and bool(options.basic_auth or options.auth or self.unauthenticated_api)


def job_facts(task: Any, standing: JobStanding | None, *, may_act: bool) -> JobFacts:
    """What the ledger says of the job, or the events that Flower heard where the ledger has no record any more."""
    line = line_of(task)
    if standing is None:
        return JobFacts(
            ended=readable(ending(line)), facts=facts_in(line), note="The ledger keeps no record of this job."
        )
    outcome = standing.outcome or {}
    waits = printable(readable(sentence(standing.waiting))) if standing.waiting else ""
    return JobFacts(
        ended=_ended(outcome, standing.state),
        waits=waits,
        state=standing.state,
        facts=_facts_of(outcome),
        may_cancel=may_act and standing.state in _OPEN,
    )


def _ended(outcome: Mapping[str, Any], state: str) -> str:
    if "error" in outcome:
        return shown_failure(outcome["error"], refused=state != "dead")
    return ending(shown_result(outcome["payload"])) if "payload" in outcome else ""


def _facts_of(outcome: Mapping[str, Any]) -> Facts:
    if "payload" in outcome:
        return facts_of(outcome["payload"])
    server = outcome.get("error", {}).get("server_name")
    return Facts(servers=(str(server),) if server else ())


class CancelJob(TaskRevoke):  # type: ignore[misc]  # flower is untyped
    """In the place of Flower's revoke: a job of ours is cancelled in the ledger, also while no worker runs."""

    @authenticated
    async def post(self, taskid: str) -> None:
        task = event_of(self, taskid)
        if self.application.options.read_only or task is None or not is_ours(task):
            await super().post(taskid)
            return
        try:
            was = await LedgerPage.reader.ask(lambda ledger: cancel(ledger, taskid))
        except LedgerAway as away:
            raise HTTPError(503, f"{away} The job may be cancelled or not; look again.") from None
        self.write({"message": f"Job {taskid}: {revokes.told(was)}"})


def cancel(ledger: Ledger, job_id: str) -> str:
    """Cancel a job, or the batch that it is a piece of; the state that it was in."""
    return Batches(ledger).cancel_job(job_id, mark=True)
