"""The workflow scheduler, heard from outside: it makes runs, and moves them as the server moves."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support import eventually
from support.federation import TASK, WALKED, AgentAtWork, Federation, arrows_of, with_refusals
from support.whole_module import only_after_the_whole_module

from fedbus.agents.workflow_scheduler import WorkflowScheduler
from fedbus.bus.errors import NoAnswer, RequestRefused
from fedbus.bus.lives import Life, Lives
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RoundResult, RunPlan, StartRun, StopRun
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
    ServerFacts,
    ServerInfo,
    ServerState,
)

NO_SCHEDULE = ScheduleTable()
FIRST = ModelRef(sha256="0" * 64, size_bytes=64, architecture="a" * 64, version=1)
SECOND = FIRST.model_copy(update={"version": 2})
FAST = RunPlan(rounds=2, quorum=2, recruit_s=30, config={"lr": 0.1})


@dataclass
class ServerManagerPlayed:
    """The server manager as the scheduler knows it: opens runs when asked, and its life is there to be read."""

    fed: Federation
    life: Life[ServerState, ServerFacts]
    refuses: str = ""
    opened: list[OpenRun] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def living(cls, fed: Federation) -> AsyncIterator["ServerManagerPlayed"]:
        async with Lives.open(await fed.speaker("server-manager")) as lives:
            yield cls(fed, await lives.of(SERVER, ServerFacts(task=TASK)))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        answers: dict[Any, Any] = {
            OpenRun: self._open,
            CancelRun: self._cancel,
            HealthCheck: self._health,
            GetServerInfo: self._info,
            Enroll: self._enroll,
        }
        async with (await self.fed.speaker("server-manager")).serve(
            with_refusals("server-manager", answers), task=TASK, version="1.0.0"
        ):
            yield

    async def has_a_model(self) -> None:
        await self.life.bear("started")
        await self.life.move("model_ready", model=FIRST)

    async def train(self, *rounds: int) -> None:
        await self.life.move("quorum_reached", cohort=("c1", "c2"))
        for number in rounds:
            await self.round(number)

    async def round(self, number: int, **metrics: float) -> None:
        last = RoundResult(round=number, metrics=metrics)
        await self.life.move("round_finished", round=number, last=last)

    async def publish(self) -> None:
        await self.life.move("run_finished")
        await self.life.move("version_published", model=SECOND)

    async def _open(self, request: OpenRun) -> Body:
        self.opened.append(request)
        if self.refuses:
            return Refused(reason=self.refuses)
        await self.life.move("run_requested", run=request.run, plan=request.plan)
        return RunOpened(recruit_until=datetime.now(UTC))

    async def _cancel(self, request: CancelRun) -> Body:
        if not self.life.allows("run_cancelled"):
            return Refused(reason=f"the server is {self.life.state}")
        await self.life.move("run_cancelled", reason=request.reason)
        return RunCancelled()

    async def _health(self, _: HealthCheck) -> Body:
        return HealthStatus(state=self.life.state)

    async def _info(self, _: GetServerInfo) -> Body:
        return ServerInfo(code_version="")

    async def _enroll(self, _: Enroll) -> Body:
        return Enrolled(consumers=())


@pytest.fixture
async def server(fed: Federation) -> AsyncIterator[ServerManagerPlayed]:
    async with ServerManagerPlayed.living(fed) as server, server.serving():
        yield server


def scheduler_with(fed: Federation, schedule: ScheduleTable = NO_SCHEDULE) -> Any:
    async def run(stop: Any) -> None:
        async with fed.site.bus("workflow-scheduler") as bus:
            await WorkflowScheduler(bus, fed.site.task, plan=FAST, schedule=schedule).run(stop)

    return run


def every(seconds: float, at_most: int | None = None) -> ScheduleTable:
    return ScheduleTable.model_validate({"every-s": seconds, "at-most": at_most})


@pytest.fixture
async def scheduler(fed: Federation, server: ServerManagerPlayed) -> AsyncIterator[AgentAtWork]:
    """A scheduler that starts runs when asked to, of a task that has a model."""
    await server.has_a_model()
    async with fed.agent(scheduler_with(fed)) as agent:
        await answers(fed)
        yield agent


async def answers(fed: Federation) -> None:
    async def it_does() -> bool:
        try:
            await fed.bus.request(StopRun(task=TASK, run="nothing"))
        except NoAnswer:
            return False
        except RequestRefused:
            return True
        return False

    await eventually(it_does)


async def start(fed: Federation, **wishes: Any) -> str:
    started = await fed.bus.request(StartRun(task=TASK, **wishes))
    run: str = started.run
    return run


# --- by hand -------------------------------------------------------------------------------------


async def test_a_run_follows_the_server_from_the_request_to_the_version(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    assert await start(fed) == f"{TASK}-1"
    await server.train()
    await server.round(0, loss=2.0)
    await server.round(1, loss=1.5)
    await server.round(2, loss=1.0)
    await server.publish()
    await fed.reaches("run", "finished")

    assert fed.events("run") == [
        "requested",
        "recruiting_started",
        "quorum_reached",
        *["round_finished"] * 3,
        "run_finished",
    ]
    run = fed.run()
    assert [one.loss for one in run.rounds] == [2.0, 1.5, 1.0]
    assert (run.cohort, run.model, run.trigger) == (("c1", "c2"), SECOND, "manual")


async def test_what_is_asked_for_goes_over_the_tasks_own_plan(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    await start(fed, rounds=7, config={"strategy": "krum"})
    (opened,) = server.opened
    assert opened.plan == FAST.model_copy(update={"rounds": 7, "config": {"lr": 0.1, "strategy": "krum"}})


async def test_a_task_has_one_run_at_a_time_and_the_refusal_says_what_to_do(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    await start(fed)
    with pytest.raises(
        RequestRefused, match=f"{TASK}-1 is .*: wait for it, or stop it with `fedbus run stop"
    ):
        await start(fed)
    await server.life.move("recruiting_expired", reason="0 of 2")
    await fed.reaches("run", "failed")
    assert fed.last("run").reason == "0 of 2"
    assert await start(fed) == f"{TASK}-2"


async def test_there_is_no_run_before_there_is_a_model(fed: Federation, server: ServerManagerPlayed) -> None:
    async with fed.agent(scheduler_with(fed)):
        await answers(fed)
        with pytest.raises(RequestRefused, match="has no model yet"):
            await start(fed)
        await server.has_a_model()

        async def starts() -> bool:
            try:
                return bool(await start(fed))
            except RequestRefused:
                return False

        await eventually(starts)


async def test_a_run_that_the_server_will_not_open_has_failed_and_the_next_may_be_asked_for(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    server.refuses = "no such app"
    with pytest.raises(RequestRefused, match="no such app"):
        await start(fed)
    await fed.happens("run", "run_refused")
    server.refuses = ""
    assert await start(fed) == f"{TASK}-2"


# --- other ends -----------------------------------------------------------------------------------


async def test_a_run_is_stopped_by_hand(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    run = await start(fed)
    await fed.bus.request(StopRun(task=TASK, run=run, reason="enough"))
    told = await fed.reaches("run", "cancelled")
    assert (told.source, told.reason) == ("recruiting", "enough")
    with pytest.raises(RequestRefused, match="is not under way: see `fedbus run ls`"):
        await fed.bus.request(StopRun(task=TASK, run=run))


async def test_a_run_may_be_stopped_while_it_trains_and_while_it_recovers(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    for number, before in enumerate(("running", "recovering"), start=1):
        run = await start(fed)
        await server.train(1)
        if before == "recovering":
            await server.life.move("server_lost", reason="it was killed")
        await fed.reaches("run", before, run)
        await fed.bus.request(StopRun(task=TASK, run=run))
        told = await fed.reaches("run", "cancelled", f"{TASK}-{number}")
        assert told.source == before


async def test_a_stop_that_comes_too_late_is_refused_with_the_reason(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    run = await start(fed)
    await server.train()
    await server.life.move("run_finished")
    with pytest.raises(RequestRefused, match="the server is publishing"):
        await fed.bus.request(StopRun(task=TASK, run=run))


async def test_a_run_recovers_with_its_server_and_repeats_no_round(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    await start(fed)
    await server.train(1, 2)
    await server.life.move("server_lost", reason="it was killed")
    await server.life.move("server_recovered")
    await server.round(2, loss=0.5)  # done again: the checkpoint was not kept
    await fed.happens("run", "round_finished", times=3)
    assert fed.events("run")[-3:] == ["server_lost", "server_recovered", "round_finished"]
    assert [(one.round, one.loss) for one in fed.run().rounds] == [(1, None), (2, 0.5)]


async def test_a_run_that_cannot_recover_has_failed(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    await start(fed)
    await server.train()
    await server.life.move("server_lost")
    await server.life.move("run_failed", reason="given up")
    assert (await fed.reaches("run", "failed")).source == "recovering"


async def test_a_run_fails_with_its_server_while_recruiting_and_while_training(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    for before in ("recruiting", "running"):
        run = await start(fed)
        if before == "running":
            await server.train()
        await server.life.move("run_failed", reason="the ServerApp raised")
        told = await fed.reaches("run", "failed", run)
        assert (told.source, told.reason) == (before, "the ServerApp raised")


# --- the schedule -----------------------------------------------------------------------------------


async def test_the_schedule_starts_runs_by_itself_and_as_many_as_it_may(
    fed: Federation, server: ServerManagerPlayed
) -> None:
    await server.has_a_model()
    async with fed.agent(scheduler_with(fed, every(0.1, at_most=2))):
        for number in (1, 2):
            await fed.reaches("run", "recruiting", f"{TASK}-{number}")
            await server.life.move("recruiting_expired")
            await fed.reaches("run", "failed", f"{TASK}-{number}")
        assert await start(fed) == f"{TASK}-3"
    assert [fed.run(number).trigger for number in (1, 2, 3)] == ["schedule", "schedule", "manual"]


async def test_a_scheduler_that_was_restarted_counts_on_and_waits_as_long_as_it_would_have(
    fed: Federation, server: ServerManagerPlayed
) -> None:
    await server.has_a_model()
    async with fed.agent(scheduler_with(fed, every(0.7, at_most=2))) as scheduler:
        await fed.reaches("run", "recruiting")
        await server.life.move("recruiting_expired")
        await fed.reaches("run", "failed")
        ended = datetime.now(UTC)
        await scheduler.restart()
        await fed.reaches("run", "recruiting", f"{TASK}-2")
        assert fed.run(2).requested_at - ended > timedelta(seconds=0.5)


# --- a scheduler that is killed ---------------------------------------------------------------------


async def test_restarted_in_the_middle_of_a_run_it_follows_what_it_missed(
    fed: Federation, scheduler: AgentAtWork, server: ServerManagerPlayed
) -> None:
    await start(fed)
    await fed.reaches("run", "recruiting")
    await scheduler.kill()
    await server.train(1, 2)
    scheduler.start()
    await fed.happens("run", "round_finished", times=2)
    await server.publish()
    await fed.reaches("run", "finished")
    assert [one.round for one in fed.run().rounds] == [1, 2]


async def test_restarted_before_its_run_was_opened_it_opens_it(
    fed: Federation,
) -> None:
    async with ServerManagerPlayed.living(fed) as server, fed.agent(scheduler_with(fed)) as scheduler:
        await server.has_a_model()
        await answers(fed)
        with pytest.raises(NoAnswer):
            await fed.bus.request(StartRun(task=TASK), timeout_s=0.5)
        await fed.reaches("run", "requested")
        await scheduler.kill()
        async with server.serving():
            scheduler.start()
            await fed.reaches("run", "recruiting")
            await scheduler.stop()
            scheduler.start()
    assert [one.run for one in server.opened] == [f"{TASK}-1"]


def test_every_arrow_of_a_run_was_walked(request: pytest.FixtureRequest) -> None:
    only_after_the_whole_module(request)
    assert arrows_of("run") - WALKED["run"] == set()
