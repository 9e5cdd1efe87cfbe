"""The workflow scheduler: makes runs, one at a time per task, by hand and by the task's schedule.

Several may be there; the one that holds the lease leads, the others stand by. A leader that was
frozen and wakes up is refused at its first word, because whoever took over has moved the schedule
since, and stands by in its turn.

What runs are and when they start stands in the task, at the code that everybody is on: where that
changes, both change with it. A run that tries a candidate is the candidate's, which the server manager sees to.

    scheduler_runs        makes runs, and moves them as the server moves
    scheduler_schedule    when the next one is due, and what holds it back
    scheduler_news        what devices, the code and other tasks have said
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog
from pydantic import ValidationError

from fedbus import __version__
from fedbus.agents.common.asyncio_tools import Timers, backoff_s, handle_each, run_until
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.workflow_scheduler.runs import ScheduledRuns
from fedbus.agents.workflow_scheduler.schedule import RunSchedule
from fedbus.agents.workflow_scheduler.trigger_inputs import TriggerInputTracker
from fedbus.bus.bus import Bus, Delivery
from fedbus.bus.errors import LeaseLost, StaleOwner
from fedbus.bus.lease import Lease
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.scheduling import ScheduleOverrides, ScheduleTable
from fedbus.contracts.task.task import Task
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    DirectoryCodeRepository,
    short_version,
)

AGENT = AgentName.WORKFLOW_SCHEDULER
INPUTS_CONSUMER = AgentName.WORKFLOW_SCHEDULER_NEWS

log = structlog.get_logger("fedbus.workflow_scheduler")


@dataclass(frozen=True)
class SchedulerConfig:
    """What the scheduler of one task is given to schedule by."""

    task: Task
    """As it was read at the start."""
    code: CodeRepository
    overrides: RunOverrides
    schedule: ScheduleOverrides

    def table_of(self, task: Task) -> ScheduleTable:
        """When runs of *task* start: as it says and the overrides; its own word alone, where they do not go with it."""
        try:
            return self.schedule.over(task.table.schedule)
        except ValidationError as error:
            log.warning(
                "the scheduler's options do not go with the task's schedule, which is followed as it is",
                code=task.code_version,
                reason=error.errors()[0]["msg"],
            )
            return task.table.schedule


@log_method_calls
class WorkflowScheduler:
    """The scheduler of one task; *overrides* and *schedule* stand in the place of what that says of both.

    *task* is what the scheduler starts with; from *code* it takes what everybody is on later.
    """

    def __init__(
        self,
        bus: Bus,
        task: Task,
        *,
        overrides: RunOverrides | None = None,
        schedule: ScheduleOverrides | None = None,
        code: CodeRepository | None = None,
    ) -> None:
        self._bus = bus
        self._given = SchedulerConfig(
            task,
            code or DirectoryCodeRepository(Path(task.path)),
            overrides or RunOverrides(),
            schedule or ScheduleOverrides(),
        )
        self.ready = asyncio.Event()
        """Whether this is the one that schedules."""

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until *stop* is set; a run under way goes on without us, and we follow it when we are back."""
        await self._bus.create_streams()
        attempt = 0
        while not stop.is_set():
            try:
                await run_until(stop, self._lead())
            except* (LeaseLost, StaleOwner) as lost:
                log.warning("another scheduler leads now: standing by", reason=str(lost.exceptions[0]))
                self.ready.clear()
            await asyncio.sleep(0 if stop.is_set() else backoff_s(attempt))
            attempt += 1

    async def _lead(self) -> None:
        """Wait for the lease, and schedule for as long as it is ours."""
        async with (
            Lease.held(self._bus, task=self._given.task.id, agent=AGENT) as lease,
            LifecycleStore.open(self._bus) as lives,
            Timers.running() as timers,
            self._bus.listen(AGENT, task=self._given.task.id) as server,
            self._bus.listen(INPUTS_CONSUMER, task=self._given.task.id) as news,
        ):
            known = TriggerInputTracker(self._bus, self._given.task)
            await known.read()
            task = await _deployed_task(known, self._given)
            leading = _Leadership(self._bus, replace(self._given, task=task), known, lives, timers)
            await leading.run(lease, server, news, self.ready)


async def _deployed_task(news: TriggerInputTracker, given: SchedulerConfig) -> Task:
    """The task at the code that everybody is on, where that can be had at once; else as we were started with it."""
    try:
        return given.task if news.code is None else await given.code.task_at(news.code[0])
    except (CodeRejected, CodeUnavailable) as error:
        log.warning("runs are scheduled by the code of the start", reason=str(error))
        return given.task


class _Leadership:
    """One spell of scheduling."""

    def __init__(
        self,
        bus: Bus,
        given: SchedulerConfig,
        news: TriggerInputTracker,
        lives: LifecycleStore,
        timers: Timers,
    ) -> None:
        self._bus = bus
        self._given = given
        self._lives = lives
        self._news = news
        self._runs = ScheduledRuns(
            bus, given.task, given.overrides, lives=lives, timers=timers, on_change=self._consider
        )
        table = given.table_of(given.task)
        self._schedule = RunSchedule(given.task.id, table, runs=self._runs, news=news, timers=timers)
        self._heard = asyncio.Event()
        self._group: asyncio.TaskGroup
        self._sees_others = False
        self._not_to_be_had = ""

    async def run(
        self,
        lease: Lease,
        server: AsyncIterator[Delivery],
        news: AsyncIterator[Delivery],
        ready: asyncio.Event,
    ) -> None:
        await self._runs.remember()
        await self._schedule.wake(self._lives, lease.holder)
        async with self._bus.serve(self._runs.answers, task=self._given.task.id, version=__version__):
            ready.set()
            await self._runs.in_turn(self._consider)()
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(handle_each(server, self._runs.follow), name="follow the server")
                self._group.create_task(self._hear(news), name="hear the devices")
                self._group.create_task(self._follow_the_code(), name="follow the code")
                self._see_others_if_need_be()

    async def _consider(self) -> None:
        await self._schedule.consider()

    async def _hear(self, news: AsyncIterator[Delivery]) -> None:
        async for delivery in news:
            self._news.hear(delivery.message, delivery.envelope.time)
            self._heard.set()
            with cause_scope(delivery.envelope.id):
                await self._runs.in_turn(self._consider)()
            await delivery.ack()

    # --- the code that everybody is on -------------------------------------------------------

    async def _follow_the_code(self) -> None:
        """Make runs as the code says that everybody is on, whenever that is another; what is away is asked again."""
        attempt = 0
        while True:
            try:
                await self._take_up_the_code()
            except CodeUnavailable as error:
                if attempt == 0:
                    log.warning("the code repository is away: runs are as before", reason=str(error))
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1
            else:
                attempt = 0
                await self._heard.wait()
                self._heard.clear()

    async def _take_up_the_code(self) -> None:
        """Raises CodeUnavailable."""
        version = self._news.code[0] if self._news.code else ""
        if version in ("", self._runs.task.code_version, self._not_to_be_had):
            return
        try:
            task = await self._given.code.task_at(version)
        except CodeRejected as error:
            log.warning("runs are as before", reason=str(error))
            self._not_to_be_had = version
        else:
            await self._runs.in_turn(partial(self._go_by, task))()

    async def _go_by(self, task: Task) -> None:
        self._runs.task = self._news.task = task
        await self._schedule.change_to(self._given.table_of(task), f"code {short_version(task.code_version)}")
        self._see_others_if_need_be()
        await self._consider()

    # --- other tasks -----------------------------------------------------------------------------

    def _see_others_if_need_be(self) -> None:
        if self._schedule.reads_other_tasks and not self._sees_others:
            self._sees_others = True
            self._group.create_task(self._see_others(), name="see other tasks' runs")

    async def _see_others(self) -> None:
        async for seen in self._news.others():
            if self._news.see(seen):
                with cause_scope(seen.envelope.id):
                    await self._runs.in_turn(self._consider)()
