"""The workflow scheduler, heard from outside: it makes runs, and moves them as the server moves."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from support import eventually
from support.fake_server_manager import (
    FAST_PLAN,
    SECOND_MODEL,
    FakeServerManager,
    make_scheduler,
    schedule_every,
    start_run,
    wait_for_scheduler,
)
from support.federation import TASK, FederationHarness, RunningAgent
from support.recorded_telemetry import record_spans

from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.contracts.run import StartRun, StopRun
from fedbus.contracts.server import ServerEvent, StoreProblem


@pytest.fixture
async def server(fed: FederationHarness) -> AsyncIterator[FakeServerManager]:
    async with FakeServerManager.open(fed) as server, server.serve():
        yield server


@pytest.fixture
async def scheduler(fed: FederationHarness, server: FakeServerManager) -> AsyncIterator[RunningAgent]:
    """A scheduler that starts runs when asked to, of a task that has a model."""
    await server.publish_first_model()
    async with fed.run_agent(make_scheduler(fed)) as agent:
        await wait_for_scheduler(fed)
        yield agent


# --- by hand -------------------------------------------------------------------------------------


async def test_a_run_follows_the_server_from_the_request_to_the_version(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    assert await start_run(fed) == f"{TASK}-1"
    await server.begin_training()
    await server.finish_round(0, loss=2.0)
    await server.finish_round(1, loss=1.5)
    await server.finish_round(2, loss=1.0)
    await server.publish_version()
    await fed.wait_for_state("run", "finished")

    assert fed.events_of("run") == [
        "requested",
        "recruiting_started",
        "quorum_reached",
        *["round_finished"] * 3,
        "run_finished",
    ]
    run = fed.run_facts()
    assert [one.loss for one in run.rounds] == [2.0, 1.5, 1.0]
    assert (run.cohort, run.model, run.trigger) == (("c1", "c2"), SECOND_MODEL, "manual")


async def test_what_is_asked_for_goes_over_the_tasks_own_plan(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await start_run(fed, rounds=7, config={"strategy": "krum"})
    (opened,) = server.open_requests
    assert opened.plan == FAST_PLAN.model_copy(
        update={"rounds": 7, "config": {"lr": 0.1, "strategy": "krum"}}
    )


async def test_a_run_tells_the_plan_that_the_server_has_made_of_it(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    server.plan = FAST_PLAN.model_copy(update={"rounds": 9})
    await start_run(fed)
    await fed.wait_for_state("run", "recruiting")
    assert fed.run_facts().plan == server.plan


async def test_a_task_has_one_run_at_a_time_and_the_refusal_says_what_to_do(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await start_run(fed)
    with pytest.raises(
        RequestRefused, match=f"{TASK}-1 is .*: wait for it, or stop it with `fedbus run stop"
    ):
        await start_run(fed)
    await server.transition(ServerEvent.RECRUITING_EXPIRED, reason="0 of 2")
    await fed.wait_for_state("run", "failed")
    assert fed.last_transition("run").reason == "0 of 2"
    assert await start_run(fed) == f"{TASK}-2"


async def test_there_is_no_run_before_there_is_a_model(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed)):
        await wait_for_scheduler(fed)
        with pytest.raises(RequestRefused, match="has no model yet"):
            await start_run(fed)
        await server.publish_first_model()

        async def starts() -> bool:
            try:
                return bool(await start_run(fed))
            except RequestRefused:
                return False

        await eventually(starts)


async def test_while_the_model_repository_is_in_trouble_no_run_is_made_and_whoever_asks_hears_why(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    await server.publish_first_model()
    await server.transition(
        ServerEvent.STORE_UNAVAILABLE, {"trouble": StoreProblem.UNAVAILABLE}, reason="the volume is away"
    )
    async with (
        server.serve(),
        fed.run_agent(make_scheduler(fed, schedule_every(0.05, at_most=1))) as scheduler,
    ):
        await wait_for_scheduler(fed)
        for _ in range(2):
            with pytest.raises(RequestRefused, match=r"cannot start a run now: the volume is away"):
                await start_run(fed)
            await scheduler.restart()
            await wait_for_scheduler(fed)
        assert fed.transitions_of("run") == []
        await server.transition(ServerEvent.STORE_RECOVERED, {"trouble": None})
        await fed.wait_for_event("run", "recruiting_started")  # what was due begins by itself


async def test_a_run_that_the_server_will_not_open_has_failed_and_the_next_may_be_asked_for(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    server.refusal = "no such app"
    with pytest.raises(RequestRefused, match="no such app"):
        await start_run(fed)
    await fed.wait_for_event("run", "run_refused")
    server.refusal = ""
    assert await start_run(fed) == f"{TASK}-2"


# --- other ends -----------------------------------------------------------------------------------


async def test_a_run_is_stopped_by_hand(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    run = await start_run(fed)
    await fed.wait_for_state("run", "recruiting")
    await fed.bus.request(StopRun(task=TASK, run=run, reason="enough"))
    told = await fed.wait_for_state("run", "cancelled")
    assert (told.source, told.reason) == ("recruiting", "enough")
    with pytest.raises(RequestRefused, match="is not under way: see `fedbus run ls`"):
        await fed.bus.request(StopRun(task=TASK, run=run))


async def test_the_end_of_a_run_that_is_stopped_is_in_its_trace_to_which_the_stopping_is_linked(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    with record_spans() as spans:
        run = await start_run(fed)
        await fed.wait_for_state("run", "recruiting")
        await fed.bus.request(StopRun(task=TASK, run=run))
        await fed.wait_for_state("run", "cancelled")
    of_the_run = int(fed.run_facts().trace_id, 16)
    told = {one.name: one for one in spans.get_finished_spans()}
    ended, asked = told["run recruiting → cancelled"], told["answer stop_run"]
    assert ended.context
    assert ended.context.trace_id == of_the_run
    assert [link.context.trace_id for link in asked.links] == [of_the_run]


async def test_a_run_may_be_stopped_while_it_trains_and_while_it_recovers(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    for number, before in enumerate(("running", "recovering"), start=1):
        run = await start_run(fed)
        await server.begin_training(1)
        if before == "recovering":
            await server.transition(ServerEvent.SERVER_LOST, reason="it was killed")
        await fed.wait_for_state("run", before, run)
        await fed.bus.request(StopRun(task=TASK, run=run))
        told = await fed.wait_for_state("run", "cancelled", f"{TASK}-{number}")
        assert told.source == before


async def test_a_stop_that_comes_too_late_is_refused_with_the_reason(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    run = await start_run(fed)
    await server.begin_training()
    await server.transition(ServerEvent.RUN_FINISHED)
    with pytest.raises(RequestRefused, match="the server is publishing"):
        await fed.bus.request(StopRun(task=TASK, run=run))


async def test_a_run_recovers_with_its_server_and_repeats_no_round(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await start_run(fed)
    await server.begin_training(1, 2)
    await server.transition(ServerEvent.SERVER_LOST, reason="it was killed")
    await server.transition(ServerEvent.SERVER_RECOVERED)
    await server.finish_round(2, loss=0.5)  # done again: the checkpoint was not kept
    await fed.wait_for_event("run", "round_finished", times=3)
    assert fed.events_of("run")[-3:] == ["server_lost", "server_recovered", "round_finished"]
    assert [(one.round, one.loss) for one in fed.run_facts().rounds] == [(1, None), (2, 0.5)]


async def test_a_run_that_cannot_recover_has_failed(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await start_run(fed)
    await server.begin_training()
    await server.transition(ServerEvent.SERVER_LOST)
    await server.transition(ServerEvent.RUN_FAILED, reason="given up")
    assert (await fed.wait_for_state("run", "failed")).source == "recovering"


async def test_a_run_fails_with_its_server_while_recruiting_and_while_training(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    for before in ("recruiting", "running"):
        run = await start_run(fed)
        if before == "running":
            await server.begin_training()
        await server.transition(ServerEvent.RUN_FAILED, reason="the ServerApp raised")
        told = await fed.wait_for_state("run", "failed", run)
        assert (told.source, told.reason) == (before, "the ServerApp raised")


# --- the schedule -----------------------------------------------------------------------------------


async def test_the_schedule_starts_runs_by_itself_and_as_many_as_it_may(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    await server.publish_first_model()
    async with fed.run_agent(make_scheduler(fed, schedule_every(0.1, at_most=2))):
        for number in (1, 2):
            await fed.wait_for_state("run", "recruiting", f"{TASK}-{number}")
            await server.transition(ServerEvent.RECRUITING_EXPIRED)
            await fed.wait_for_state("run", "failed", f"{TASK}-{number}")
        assert await start_run(fed) == f"{TASK}-3"
    assert [fed.run_facts(number).trigger for number in (1, 2, 3)] == ["schedule", "schedule", "manual"]


async def test_a_scheduler_that_was_restarted_counts_on_and_waits_as_long_as_it_would_have(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    await server.publish_first_model()
    async with fed.run_agent(make_scheduler(fed, schedule_every(0.7, at_most=2))) as scheduler:
        await fed.wait_for_state("run", "recruiting")
        await server.transition(ServerEvent.RECRUITING_EXPIRED)
        await fed.wait_for_state("run", "failed")
        ended = datetime.now(UTC)
        await scheduler.restart()
        await fed.wait_for_state("run", "recruiting", f"{TASK}-2")
        assert fed.run_facts(2).requested_at - ended > timedelta(seconds=0.5)


# --- a scheduler that is killed ---------------------------------------------------------------------


async def test_restarted_in_the_middle_of_a_run_it_follows_what_it_missed(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await start_run(fed)
    await fed.wait_for_state("run", "recruiting")
    await scheduler.kill()
    await server.begin_training(1, 2)
    scheduler.start()
    await fed.wait_for_event("run", "round_finished", times=2)
    await server.publish_version()
    await fed.wait_for_state("run", "finished")
    assert [one.round for one in fed.run_facts().rounds] == [1, 2]


async def test_restarted_before_its_run_was_opened_it_opens_it(
    fed: FederationHarness,
) -> None:
    async with FakeServerManager.open(fed) as server, fed.run_agent(make_scheduler(fed)) as scheduler:
        await server.publish_first_model()
        await wait_for_scheduler(fed)
        with pytest.raises(NoResponse):
            await fed.bus.request(StartRun(task=TASK), timeout_s=0.5)
        await fed.wait_for_state("run", "requested")
        await scheduler.kill()
        async with server.serve():
            scheduler.start()
            await fed.wait_for_state("run", "recruiting")
            await scheduler.stop()
            scheduler.start()
    assert [one.run for one in server.open_requests] == [f"{TASK}-1"]


async def test_a_run_waits_for_a_server_manager_that_is_busy_and_may_be_stopped_until_then(
    fed: FederationHarness,
) -> None:
    async with FakeServerManager.open(fed) as server, fed.run_agent(make_scheduler(fed)):
        await server.publish_first_model()
        await wait_for_scheduler(fed)
        with pytest.raises(NoResponse):  # nobody opens it
            await fed.bus.request(StartRun(task=TASK), timeout_s=0.5)
        await fed.wait_for_state("run", "requested")
        await fed.bus.request(StopRun(task=TASK, run=f"{TASK}-1", reason="never mind"))
        told = await fed.wait_for_state("run", "cancelled")
        assert (told.source, told.reason) == ("requested", "never mind")
        async with server.serve():
            assert await start_run(fed) == f"{TASK}-2"
    assert [one.run for one in server.open_requests] == [f"{TASK}-2"]


async def test_a_run_that_was_opened_although_it_was_stopped_is_cancelled_there(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await server.transition(ServerEvent.RUN_REQUESTED, {"run": f"{TASK}-7", "plan": FAST_PLAN})
    await fed.wait_for_event("server", "run_cancelled")
    assert fed.last_transition("server").reason == "the run was stopped before it was opened"
