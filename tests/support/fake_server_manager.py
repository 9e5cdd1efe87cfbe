"""A fake server manager, and schedulers that use it, for tests of the workflow scheduler."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fedbus.agents.workflow_scheduler.agent import WorkflowScheduler
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RoundResult, RunOverrides, RunPlan, StartRun, StopRun
from fedbus.contracts.scheduling import ScheduleTable
from fedbus.contracts.server import (
    SERVER,
    CancelRun,
    Enroll,
    Enrolled,
    GetServerInfo,
    HealthCheck,
    HealthStatus,
    OpenRun,
    RunCancelled,
    RunOpened,
    ServerChanges,
    ServerData,
    ServerEvent,
    ServerInfo,
    ServerState,
)
from support import eventually
from support.federation import TASK, FederationHarness, with_refusals, with_schedule

NO_SCHEDULE = ScheduleTable()
FIRST_MODEL = ModelRef(sha256="0" * 64, size_bytes=64, architecture="a" * 64, version=1)
SECOND_MODEL = FIRST_MODEL.model_copy(update={"version": 2})
FAST_PLAN = RunPlan(rounds=2, quorum=2, recruit_s=30, config={"lr": 0.1})


@dataclass
class FakeServerManager:
    """A server manager that opens runs, and whose transitions the test decides."""

    fed: FederationHarness
    lifecycle: LifecycleHandle[ServerState, ServerEvent, ServerData, ServerChanges]
    refusal: str = ""
    plan: RunPlan | None = None
    """The plan of each run that it opens; None: the requested one."""
    open_requests: list[OpenRun] = field(default_factory=list)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    @asynccontextmanager
    async def open(cls, fed: FederationHarness) -> AsyncIterator["FakeServerManager"]:
        async with LifecycleStore.open(await fed.connect_as("server-manager")) as lifecycles:
            yield cls(fed, await lifecycles.load(SERVER, ServerData(task=TASK)))

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        answers: dict[Any, Any] = {
            OpenRun: self._open,
            CancelRun: self._cancel,
            HealthCheck: self._health,
            GetServerInfo: self._info,
            Enroll: self._enroll,
        }
        async with (await self.fed.connect_as("server-manager")).serve(
            with_refusals("server-manager", answers), task=TASK, version="1.0.0"
        ):
            yield

    async def transition(
        self, event: ServerEvent, changes: ServerChanges | None = None, *, reason: str = ""
    ) -> None:
        """Publish a transition after the previous one is acknowledged: subscribers receive that earlier."""
        async with self._lock:
            await self.lifecycle.transition(event, changes or {}, reason=reason)

    async def publish_first_model(self) -> None:
        await self.lifecycle.create()
        await self.transition(ServerEvent.MODEL_READY, {"model": FIRST_MODEL})

    async def begin_training(self, *rounds: int) -> None:
        await self.transition(ServerEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")})
        for number in rounds:
            await self.finish_round(number)

    async def finish_round(self, number: int, **metrics: float) -> None:
        last = RoundResult(round=number, metrics=metrics)
        await self.transition(ServerEvent.ROUND_FINISHED, {"round": number, "last": last})

    async def publish_version(self) -> None:
        await self.transition(ServerEvent.RUN_FINISHED)
        await self.transition(ServerEvent.VERSION_PUBLISHED, {"model": SECOND_MODEL})

    async def _open(self, request: OpenRun) -> Body:
        self.open_requests.append(request)
        if self.refusal:
            return Refused(reason=self.refusal)
        expires = datetime.now(UTC)
        await self.transition(
            ServerEvent.RUN_REQUESTED,
            {"run": request.run, "plan": self.plan or request.plan, "recruit_until": expires},
        )
        return RunOpened(recruit_until=expires)

    async def _cancel(self, request: CancelRun) -> Body:
        async with self._lock:
            if not self.lifecycle.allows(ServerEvent.RUN_CANCELLED):
                return Refused(reason=f"the server is {self.lifecycle.state}")
            await self.lifecycle.transition(ServerEvent.RUN_CANCELLED, reason=request.reason)
        return RunCancelled()

    async def _health(self, _: HealthCheck) -> Body:
        return HealthStatus(state=self.lifecycle.state)

    async def _info(self, _: GetServerInfo) -> Body:
        return ServerInfo(code_version="")

    async def _enroll(self, _: Enroll) -> Body:
        return Enrolled(consumers=())


def make_scheduler(fed: FederationHarness, schedule: ScheduleTable = NO_SCHEDULE) -> Any:
    async def run(stop: Any) -> None:
        async with fed.config.connect_bus("workflow-scheduler") as bus:
            task = with_schedule(fed.config.task, schedule)
            await WorkflowScheduler(bus, task, overrides=RunOverrides(**FAST_PLAN.model_dump())).run(stop)

    return run


def schedule_every(seconds: float, at_most: int | None = None) -> ScheduleTable:
    return ScheduleTable.model_validate({"every-s": seconds, "at-most": at_most})


async def wait_for_scheduler(fed: FederationHarness) -> None:
    async def is_answering() -> bool:
        try:
            await fed.bus.request(StopRun(task=TASK, run="nothing"))
        except NoResponse:
            return False
        except RequestRefused:
            return True
        return False

    await eventually(is_answering)


async def start_run(fed: FederationHarness, **wishes: Any) -> str:
    started = await fed.bus.request(StartRun(task=TASK, **wishes))
    run: str = started.run
    return run
