"""The workflow scheduler: makes runs, one at a time per task, by hand and by the task's schedule.

Several may be there; the one that holds the lease leads, the others stand by. A leader that was
frozen and wakes up is refused at its first word, because whoever took over has moved the schedule
since, and stands by in its turn.

    scheduler_runs        makes runs, and moves them as the server moves
    scheduler_schedule    when the next one is due, and what holds it back
    scheduler_news        what devices, the code and other tasks have said
"""

import asyncio
from collections.abc import AsyncIterator

import structlog

from fedbus import __version__
from fedbus.agents.scheduler_news import News
from fedbus.agents.scheduler_runs import Runs
from fedbus.agents.scheduler_schedule import Schedule
from fedbus.agents.steps import told_step_by_step
from fedbus.agents.tasks import Timers, backoff, handle_each, until
from fedbus.bus.bus import Bus, Delivery
from fedbus.bus.errors import LeaseLost, MovedByAnother
from fedbus.bus.lease import Lease
from fedbus.bus.lives import Lives
from fedbus.contracts.run import RunPlan
from fedbus.contracts.scheduling import ScheduleTable
from fedbus.contracts.task import Task

AGENT = "workflow-scheduler"
NEWS = "workflow-scheduler-news"

log = structlog.get_logger("fedbus.workflow_scheduler")


@told_step_by_step
class WorkflowScheduler:
    """The scheduler of one task. *plan* and *schedule* take the place of the task's own, where given."""

    def __init__(
        self, bus: Bus, task: Task, *, plan: RunPlan | None = None, schedule: ScheduleTable | None = None
    ) -> None:
        self._bus = bus
        self._task = task
        self._plan = plan or task.table.plan
        self._table = schedule or task.table.schedule
        self.ready = asyncio.Event()
        """Whether this is the one that schedules."""

    async def run(self, stop: asyncio.Event) -> None:
        """Schedule until *stop* is set; a run under way goes on without us, and we follow it when we are back."""
        await self._bus.make_streams()
        attempt = 0
        while not stop.is_set():
            try:
                await until(stop, self._lead())
            except* (LeaseLost, MovedByAnother) as lost:
                log.warning("another scheduler leads now: standing by", reason=str(lost.exceptions[0]))
                self.ready.clear()
            await asyncio.sleep(0 if stop.is_set() else backoff(attempt))
            attempt += 1

    async def _lead(self) -> None:
        """Wait for the lease, and schedule for as long as it is ours."""
        async with (
            Lease.held(self._bus, task=self._task.id, agent=AGENT) as lease,
            Lives.open(self._bus) as lives,
            Timers.running() as timers,
            self._bus.listen(AGENT, task=self._task.id) as server,
            self._bus.listen(NEWS, task=self._task.id) as news,
        ):
            await _Leading(self._bus, self._task, self._plan, self._table, lives, timers).run(
                lease, server, news, self.ready
            )


class _Leading:
    """One spell of scheduling."""

    def __init__(
        self, bus: Bus, task: Task, plan: RunPlan, table: ScheduleTable, lives: Lives, timers: Timers
    ) -> None:
        self._bus = bus
        self._task = task
        self._lives = lives
        self._news = News(bus, task)
        self._runs = Runs(bus, task, plan, lives=lives, timers=timers, on_change=self._consider)
        self._schedule = Schedule(task, table, plan, runs=self._runs, news=self._news, timers=timers)

    async def run(
        self,
        lease: Lease,
        server: AsyncIterator[Delivery],
        news: AsyncIterator[Delivery],
        ready: asyncio.Event,
    ) -> None:
        await self._runs.remember()
        await self._news.read(other_tasks=self._schedule.reads_other_tasks)
        await self._schedule.wake(self._lives, lease.holder)
        async with self._bus.serve(self._runs.answers, task=self._task.id, version=__version__):
            ready.set()
            await self._runs.in_turn(self._consider)()
            async with asyncio.TaskGroup() as group:
                group.create_task(handle_each(server, self._runs.follow), name="follow the server")
                group.create_task(self._hear(news), name="hear the devices")
                if self._schedule.reads_other_tasks:
                    group.create_task(self._see_others(), name="see other tasks' runs")

    async def _consider(self) -> None:
        await self._schedule.consider()

    async def _hear(self, news: AsyncIterator[Delivery]) -> None:
        async for delivery in news:
            self._news.hear(delivery.message, delivery.envelope.time)
            await self._runs.in_turn(self._consider)()
            await delivery.ack()

    async def _see_others(self) -> None:
        async for seen in self._news.others():
            if self._news.see(seen):
                await self._runs.in_turn(self._consider)()
