"""The workflow scheduler on a real bus: requests and replies, leases, restarts, traces and causes.

`test_machine.py` and `test_schedule.py` test what it decides.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

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
from support.federation import TASK, TINY_TASK, FederationHarness, RunningAgent
from support.git_repositories import Repository
from support.recorded_telemetry import record_spans

from fedbus.agents.workflow_scheduler.agent import WorkflowScheduler
from fedbus.agents.workflow_scheduler.effects import RequestOpening
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.code import CodePublished
from fedbus.contracts.run import RUN, RunData, RunEvent, RunOverrides, RunPlan, StartRun, StopRun
from fedbus.contracts.scheduling import SCHEDULE, ScheduleData, ScheduleEvent, ScheduleTable
from fedbus.contracts.server import ServerEvent, StoreProblem
from fedbus.contracts.serving import DataCounted, DriftDetected
from fedbus.contracts.transition import Transition
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import open_code


@pytest.fixture
async def server(fed: FederationHarness) -> AsyncIterator[FakeServerManager]:
    """A server manager that answers, of a task that has a model."""
    async with FakeServerManager.open(fed) as server, server.serve():
        await server.publish_first_model()
        yield server


@pytest.fixture
async def scheduler(fed: FederationHarness, server: FakeServerManager) -> AsyncIterator[RunningAgent]:
    """A scheduler without a schedule."""
    async with fed.run_agent(make_scheduler(fed)) as agent:
        await wait_for_scheduler(fed)
        yield agent


def make_schedule(**table: Any) -> ScheduleTable:
    return ScheduleTable.model_validate({name.replace("_", "-"): value for name, value in table.items()})


async def publish_row_count(fed: FederationHarness, client: str, labelled: int) -> None:
    message = DataCounted(task=TASK, client=client, labelled=labelled, unlabelled=0)
    await fed.publish(message, sender="inference")


async def publish_drift(fed: FederationHarness, client: str) -> None:
    message = DriftDetected(task=TASK, client=client, of="inputs", feature="mean", score=0.5)
    await fed.publish(message, sender="inference")


async def fail_run(fed: FederationHarness, server: FakeServerManager, number: int) -> None:
    """Wait until the run recruits, and let it fail."""
    await fed.wait_for_state("run", "recruiting", f"{TASK}-{number}")
    await server.transition(ServerEvent.RECRUITING_EXPIRED)
    await fed.wait_for_state("run", "failed", f"{TASK}-{number}")


def creations_of_runs(fed: FederationHarness) -> list[Transition]:
    return [one for one in fed.transitions_of("run") if one.event == "requested" and one.task == TASK]


def is_opening() -> bool:
    """True while a scheduler of this process has the server manager open a run."""
    return any(task.get_name() == RequestOpening.__name__ for task in asyncio.all_tasks())


# --- requests ---------------------------------------------------------------------------------------


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


async def test_a_refusal_of_the_server_reaches_the_requester(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    server.refusal = "no such app"
    with pytest.raises(RequestRefused, match="no such app"):
        await start_run(fed)
    await fed.wait_for_event("run", "run_refused")
    server.refusal = ""
    assert await start_run(fed) == f"{TASK}-2"


async def test_a_run_waits_for_a_busy_server_and_can_be_stopped(fed: FederationHarness) -> None:
    async with FakeServerManager.open(fed) as server, fed.run_agent(make_scheduler(fed)):
        await server.publish_first_model()
        await wait_for_scheduler(fed)
        with pytest.raises(NoResponse):
            await fed.bus.request(StartRun(task=TASK), timeout_s=0.5)
        await fed.wait_for_state("run", "requested")
        await eventually(is_opening)
        await fed.bus.request(StopRun(task=TASK, run=f"{TASK}-1", reason="never mind"))
        cancelled = await fed.wait_for_state("run", "cancelled")
        assert (cancelled.source, cancelled.reason) == ("requested", "never mind")
        await eventually(lambda: not is_opening())
        async with server.serve():
            assert await start_run(fed) == f"{TASK}-2"
    assert [one.run for one in server.open_requests] == [f"{TASK}-2"]


async def test_a_user_stops_a_run(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    run = await start_run(fed)
    await fed.wait_for_state("run", "recruiting")
    await fed.bus.request(StopRun(task=TASK, run=run, reason="enough"))
    cancelled = await fed.wait_for_state("run", "cancelled")
    assert (cancelled.source, cancelled.reason) == ("recruiting", "enough")
    with pytest.raises(RequestRefused, match="is not in progress: see `fedbus run ls`"):
        await fed.bus.request(StopRun(task=TASK, run=run))


async def test_a_stop_that_comes_too_late_is_refused_with_the_reason(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    run = await start_run(fed)
    await server.begin_training()
    await server.transition(ServerEvent.RUN_FINISHED)
    with pytest.raises(RequestRefused, match="the server is publishing"):
        await fed.bus.request(StopRun(task=TASK, run=run))


async def test_a_run_that_was_stopped_before_it_was_opened_is_cancelled(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    await server.transition(ServerEvent.RUN_REQUESTED, {"run": f"{TASK}-7", "plan": FAST_PLAN})
    await fed.wait_for_event("server", "run_cancelled")
    assert fed.last_transition("server").reason == "the run was stopped before it was opened"


# --- traces and causes ------------------------------------------------------------------------------


async def test_the_end_of_a_stopped_run_is_in_its_trace(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    with record_spans() as spans:
        run = await start_run(fed)
        await fed.wait_for_state("run", "recruiting")
        await fed.bus.request(StopRun(task=TASK, run=run))
        await fed.wait_for_state("run", "cancelled")
    trace_id = int(fed.run_facts().trace_id, 16)
    by_name = {span.name: span for span in spans.get_finished_spans()}
    end, request = by_name["run recruiting → cancelled"], by_name["answer stop_run"]
    assert end.context
    assert end.context.trace_id == trace_id
    assert [link.context.trace_id for link in request.links] == [trace_id]


async def test_a_scheduled_run_is_one_trace_from_its_trigger(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    with record_spans() as spans:
        async with fed.run_agent(make_scheduler(fed, make_schedule(when="drift"))):
            await wait_for_scheduler(fed)
            await publish_drift(fed, "c1")
            await fail_run(fed, server, 1)
    transitions = {
        span.name: span.context.trace_id
        for span in spans.get_finished_spans()
        if "→" in span.name and span.context
    }
    trace_id = int(fed.run_facts().trace_id, 16)
    begin = ["schedule watching → due", "schedule due → watching", "run • → requested"]
    assert [transitions[name] for name in begin] == [trace_id] * 3
    assert transitions["schedule watching → watching"] != trace_id, "a plan belongs to no run"


async def read_causes(fed: FederationHarness) -> dict[str, str]:
    """Return the cause of each step, the last of its kind: ``run requested`` is due to ``schedule fired``."""
    steps: dict[str, str] = {}
    causes: dict[str, str] = {}
    for stream, wanted in (
        (events_stream(fed.bus.fed), stream_subjects(fed.bus.fed)),
        (lifecycle_stream(fed.bus.fed), [subjects.wildcard_for(fed.bus.fed, Transition)]),
    ):
        _, last = await fed.bus.sequence_range(stream)
        if not last:
            continue
        async with fed.bus.read_stream(stream, wanted, whole=True) as messages:
            async for one in messages:
                message = one.message
                step = f"{message.kind} {message.event}" if isinstance(message, Transition) else message.name
                steps[one.envelope.id] = step
                causes[step] = one.envelope.cause
                if one.sequence >= last:
                    break
    return {step: steps.get(cause, "") for step, cause in causes.items()}


async def test_the_cause_of_a_run_is_what_made_it_due(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    """What postponed it is in the chain of causes, and so is not lost."""
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="labelled >= 5"))):
        await wait_for_scheduler(fed)
        await start_run(fed)
        await publish_row_count(fed, "c1", 5)
        await fed.wait_for_event("schedule", "postponed")
        await fail_run(fed, server, 1)
        await fail_run(fed, server, 2)
        causes = await read_causes(fed)
    assert causes["run requested"] == "schedule fired"
    assert causes["schedule fired"] == "schedule postponed"
    assert causes["schedule postponed"] == "schedule triggered"
    assert causes["schedule triggered"] == "data_counted"


async def test_a_run_that_time_starts_has_no_message_as_cause(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(every_s=0.3, at_most=1))):
        await wait_for_scheduler(fed)
        await fed.wait_for_state("run", "recruiting", f"{TASK}-1")
        causes = await read_causes(fed)
    assert (causes["run requested"], causes["schedule fired"]) == ("schedule fired", "schedule triggered")
    assert causes["schedule triggered"] == ""


# --- restarts ---------------------------------------------------------------------------------------


async def test_a_restarted_scheduler_follows_what_it_missed(
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


async def test_a_restarted_scheduler_has_its_run_opened(fed: FederationHarness) -> None:
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


async def test_a_restarted_scheduler_knows_why_no_run_can_start(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    trouble = {"trouble": StoreProblem.UNAVAILABLE}
    await server.transition(ServerEvent.STORE_UNAVAILABLE, trouble, reason="no route to host")  # type: ignore[arg-type]  # a plain dict of changes
    async with fed.run_agent(make_scheduler(fed, schedule_every(0.05, at_most=1))) as scheduler:
        await wait_for_scheduler(fed)
        for _ in range(2):
            with pytest.raises(RequestRefused, match=r"cannot start a run now: no route to host"):
                await start_run(fed)
            await scheduler.restart()
            await wait_for_scheduler(fed)
        assert fed.transitions_of("run") == []
        await server.transition(ServerEvent.STORE_RECOVERED, {"trouble": None})
        await fed.wait_for_event("run", "recruiting_started")


async def test_a_restarted_scheduler_continues_an_interval(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, schedule_every(0.7, at_most=2))) as scheduler:
        await fed.wait_for_state("run", "recruiting", f"{TASK}-1")
        before_its_end = datetime.now(UTC)
        await fail_run(fed, server, 1)
        await scheduler.restart()
        await fed.wait_for_state("run", "recruiting", f"{TASK}-2")
        assert fed.run_facts(2).requested_at - before_its_end > timedelta(seconds=0.69)


async def test_a_restarted_scheduler_reads_the_messages_of_the_devices(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="drift and labelled >= 5")
    async with fed.run_agent(make_scheduler(fed, table)) as scheduler:
        await wait_for_scheduler(fed)
        await publish_drift(fed, "c1")
        await scheduler.restart()
        await wait_for_scheduler(fed)
        assert fed.transitions_of("run") == []
        await publish_row_count(fed, "c2", 5)
        await fail_run(fed, server, 1)
    reason = "drift on 1 client (c1), and labelled >= 5 on 1 client (c2: 5)"
    assert creations_of_runs(fed)[0].reason == reason


async def test_the_next_scheduler_creates_a_run_that_was_fired(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="drift", at_most=1)
    async with fed.run_agent(make_scheduler(fed, table)):
        await fed.wait_for_event("schedule", "started")
    data = fed.last_transition("schedule").facts
    assert isinstance(data, ScheduleData)
    async with LifecycleStore.open(await fed.connect_as("workflow-scheduler")) as lifecycles:
        schedule = await lifecycles.load(SCHEDULE, data)
        await schedule.transition(ScheduleEvent.TRIGGERED, {"due_since": datetime.now(UTC)})
        await schedule.transition(ScheduleEvent.FIRED, {"run": f"{TASK}-1", "started": 1, "due_since": None})
    async with fed.run_agent(make_scheduler(fed, table)):
        await fail_run(fed, server, 1)
    assert len(creations_of_runs(fed)) == 1


# --- several schedulers -----------------------------------------------------------------------------


async def test_one_of_two_schedulers_leads_and_the_other_takes_over(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="drift")
    async with fed.run_agent(make_scheduler(fed, table)) as first:
        await wait_for_scheduler(fed)
        async with fed.run_agent(make_scheduler(fed, table)):
            await publish_drift(fed, "c1")
            await fail_run(fed, server, 1)
            await first.kill()
            await eventually(lambda: fed.events_of("schedule").count("taken_over") == 1)
            await wait_for_scheduler(fed)
            await publish_drift(fed, "c2")
            await fail_run(fed, server, 2)
        first.start()
    assert [one.key for one in creations_of_runs(fed)] == [f"{TASK}-1", f"{TASK}-2"]


async def test_a_leader_stands_by_when_another_has_created_its_run(
    fed: FederationHarness, scheduler: RunningAgent, server: FakeServerManager
) -> None:
    """It gets the lease again, reads the log, and continues with that run."""
    data = RunData(task=TASK, run=f"{TASK}-1", plan=RunPlan(), requested_at=datetime.now(UTC))
    async with LifecycleStore.open(await fed.connect_as("workflow-scheduler")) as lifecycles:
        await (await lifecycles.load(RUN, data)).create()
    with pytest.raises((RequestRefused, NoResponse)):
        await fed.bus.request(StartRun(task=TASK), timeout_s=1)
    await fed.wait_for_state("run", "recruiting", f"{TASK}-1")
    await wait_for_scheduler(fed)
    with pytest.raises(RequestRefused, match=f"{TASK}-1 is recruiting"):
        await start_run(fed)


# --- other tasks, and code --------------------------------------------------------------------------


async def test_a_run_of_another_task_starts_a_run(fed: FederationHarness, server: FakeServerManager) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="after other"))) as scheduler:
        await wait_for_scheduler(fed)
        await finish_run_of_other_task(fed, 1)
        await fail_run(fed, server, 1)
        await scheduler.kill()
        await finish_run_of_other_task(fed, 2)
        scheduler.start()
        await fail_run(fed, server, 2)
    assert [one.reason for one in creations_of_runs(fed)] == ["after other"] * 2


async def finish_run_of_other_task(fed: FederationHarness, number: int) -> None:
    data = RunData(task="other", run=f"other-{number}", plan=RunPlan(), requested_at=datetime.now(UTC))
    async with LifecycleStore.open(await fed.connect_as("workflow-scheduler")) as lifecycles:
        run = await lifecycles.load(RUN, data)
        await run.create()
        for event in (RunEvent.RECRUITING_STARTED, RunEvent.QUORUM_REACHED, RunEvent.RUN_FINISHED):
            await run.transition(event)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    path = tmp_path / "repository"
    shutil.copytree(TINY_TASK, path, ignore=shutil.ignore_patterns("__pycache__"))
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch=main")
    return repository


def commit_task(repository: Repository, rounds: int, when: str = "") -> str:
    """Commit the task with runs of *rounds* rounds, which *when* starts; return the version."""
    table = (TINY_TASK / "pyproject.toml").read_text().replace("\nrounds = 2", f"\nrounds = {rounds}")
    schedule = f"\n[tool.fedbus.schedule]\nwhen = {when!r}\n" if when else ""
    return repository.commit({"pyproject.toml": table + schedule})


def make_repository_scheduler(fed: FederationHarness, repository: Repository) -> Any:
    """A scheduler that starts with the newest commit."""
    code = open_code(f"{repository.url}@main", fed.config.home, open_library)

    async def run(stop: Any) -> None:
        newest = await code.load_task(await code.fetch_latest())
        async with fed.config.connect_bus("workflow-scheduler") as bus:
            await WorkflowScheduler(bus, newest, overrides=RunOverrides(), code=code).run(stop)

    return run


async def publish_code(fed: FederationHarness, version: str) -> None:
    await fed.publish(CodePublished(task=TASK, code_version=version), sender="server-manager")


async def test_a_scheduler_follows_the_deployed_code_and_not_a_newer_commit(
    fed: FederationHarness, server: FakeServerManager, repository: Repository
) -> None:
    await publish_code(fed, commit_task(repository, 3, "drift"))
    commit_task(repository, 9, "labelled >= 1")
    async with fed.run_agent(make_repository_scheduler(fed, repository)):
        await wait_for_scheduler(fed)
        await publish_row_count(fed, "c1", 70)
        await publish_drift(fed, "c1")
        await fail_run(fed, server, 1)
    assert creations_of_runs(fed)[0].reason == "drift on 1 client (c1)"
    assert server.open_requests[-1].plan.rounds == 3


async def test_unavailable_code_is_followed_when_the_repository_is_back(
    fed: FederationHarness, server: FakeServerManager, repository: Repository
) -> None:
    await publish_code(fed, commit_task(repository, 2))
    async with fed.run_agent(make_repository_scheduler(fed, repository)):
        await wait_for_scheduler(fed)
        new = commit_task(repository, 5, "drift")
        hidden = repository.path.rename(repository.path.with_name("hidden"))
        await publish_code(fed, new)
        await start_run(fed)
        assert server.open_requests[-1].plan.rounds == 2
        hidden.rename(repository.path)
        await fed.wait_for_event("schedule", "started")
        await fail_run(fed, server, 1)
        await start_run(fed)
        assert server.open_requests[-1].plan.rounds == 5
