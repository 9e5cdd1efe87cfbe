"""When runs start by themselves, heard from outside: what devices say, what time brings, what holds it back."""

import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from support.fake_server_manager import FakeServerManager, make_scheduler, start_run, wait_for_scheduler
from support.federation import TASK, TINY_TASK, FederationHarness
from support.git_repositories import Repository

from fedbus.agents.workflow_scheduler.agent import WorkflowScheduler
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.code import CodePublished
from fedbus.contracts.run import RUN, RunData, RunEvent, RunOverrides, RunPlan
from fedbus.contracts.scheduling import SCHEDULE, ScheduleData, ScheduleEvent, ScheduleTable
from fedbus.contracts.server import ServerEvent
from fedbus.contracts.serving import DataChecked, DataCounted, DriftDetected, LiveAccuracy
from fedbus.contracts.transition import Transition
from fedbus.stores.code.open import open_code


@pytest.fixture
async def server(fed: FederationHarness) -> AsyncIterator[FakeServerManager]:
    async with FakeServerManager.open(fed) as server, server.serve():
        await server.publish_first_model()
        yield server


def make_schedule(**table: Any) -> ScheduleTable:
    return ScheduleTable.model_validate({name.replace("_", "-"): value for name, value in table.items()})


def make_data_counted(client: str, labelled: int) -> DataCounted:
    return DataCounted(task=TASK, client=client, labelled=labelled, unlabelled=0)


def make_total_counted(client: str, labelled_ever: int, *, database: str, held: int = 60) -> DataCounted:
    return make_data_counted(client, held).model_copy(
        update={"labelled_ever": labelled_ever, "database": database}
    )


def make_drift(client: str) -> DriftDetected:
    return DriftDetected(task=TASK, client=client, of="inputs", feature="mean", score=0.5)


def make_data_checked(client: str, *, drifting: bool) -> DataChecked:
    return DataChecked(task=TASK, client=client, rows=200, drifting=drifting)


async def fail_run(fed: FederationHarness, server: FakeServerManager, number: int) -> None:
    """The run comes and goes."""
    await fed.wait_for_state("run", "recruiting", f"{TASK}-{number}")
    await server.transition(ServerEvent.RECRUITING_EXPIRED)
    await fed.wait_for_state("run", "failed", f"{TASK}-{number}")


async def finish_run(
    fed: FederationHarness, server: FakeServerManager, number: int, **metrics: float
) -> None:
    await fed.wait_for_state("run", "recruiting", f"{TASK}-{number}")
    await server.begin_training()
    await server.finish_round(1, **metrics)
    await server.publish_version()
    await fed.wait_for_state("run", "finished", f"{TASK}-{number}")


def schedule_facts(fed: FederationHarness) -> ScheduleData:
    found = fed.last_transition("schedule").facts
    assert isinstance(found, ScheduleData)
    return found


async def test_labelled_rows_on_enough_clients_start_a_run_and_count_once(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    enough = make_schedule(when="labelled >= 64 on 2 clients")
    async with fed.run_agent(make_scheduler(fed, enough)):
        await wait_for_scheduler(fed)
        await fed.publish(make_data_counted("c1", 70), sender="inference")
        await fed.publish(make_data_counted("c2", 63), sender="inference")
        await fed.publish(make_data_counted("c2", 64), sender="inference")
        await fail_run(fed, server, 1)
        assert fed.transitions_of("run")[0].reason == "labelled >= 64 on 2 clients (c1: 70, c2: 64)"

        await fed.publish(make_data_counted("c1", 100), sender="inference")
        await fed.publish(make_data_counted("c2", 128), sender="inference")
        await fed.publish(make_data_counted("c1", 134), sender="inference")
        await fail_run(fed, server, 2)
    assert schedule_facts(fed).labelled == {"c1": 134, "c2": 128}
    assert schedule_facts(fed).started == 2


async def test_rows_are_counted_as_they_come_where_a_store_is_full_and_where_it_was_deleted(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="labelled >= 20"))) as scheduler:
        await wait_for_scheduler(fed)
        await fed.publish(
            make_data_counted("c1", 60), sender="inference"
        )  # an older device tells what it holds only
        await fail_run(fed, server, 1)
        await fed.publish(
            make_total_counted("c1", 59, database="a", held=59), sender="inference"
        )  # one became too old
        await fed.publish(make_total_counted("c1", 80, database="a"), sender="inference")
        await fail_run(fed, server, 2)
        await fed.publish(make_total_counted("c1", 99, database="a"), sender="inference")
        await scheduler.restart()
        await wait_for_scheduler(fed)
        await fed.publish(make_total_counted("c1", 101, database="a"), sender="inference")
        await fail_run(fed, server, 3)
        await fed.publish(make_total_counted("c1", 120, database="b"), sender="inference")
        await fail_run(fed, server, 4)
        await fed.publish(make_total_counted("c1", 19, database="c"), sender="inference")
        await fed.publish(make_total_counted("c1", 22, database="c"), sender="inference")
        await fail_run(fed, server, 5)
    causes = [one.reason for one in fed.transitions_of("run") if one.event == "requested"]
    found = [cause.removeprefix("labelled >= 20 on 1 client ") for cause in causes]
    assert found == ["(c1: 60)", "(c1: 20)", "(c1: 21)", "(c1: 120)", "(c1: 22)"]
    assert schedule_facts(fed).databases == {"c1": "c"}


async def test_a_schedule_tells_its_rule_what_it_waits_for_when_it_is_next_and_why_it_last_was(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(
        when="cron '0 3 1 1 *' or labelled >= 64 on 2 clients", overlap="skip", timezone="Asia/Tokyo"
    )
    async with fed.run_agent(make_scheduler(fed, table)):
        await wait_for_scheduler(fed)
        await fed.wait_for_event("schedule", "planned")
        rule = schedule_facts(fed).rule
        assert rule is not None
        assert (rule.when, rule.timezone, rule.overlap) == (table.when, "Asia/Tokyo", "skip")
        at = schedule_facts(fed).next_at
        assert at is not None
        assert (at.hour, at.minute) == (18, 0)  # three o'clock in Tokyo
        await fed.publish(make_data_counted("c1", 70), sender="inference")
        await eventually(
            lambda: (
                schedule_facts(fed).awaits == ("cron '0 3 1 1 *'", "labelled >= 64 on 2 clients (1 so far)")
            )
        )
        await fed.publish(make_data_counted("c2", 64), sender="inference")
        await fail_run(fed, server, 1)
        await eventually(lambda: schedule_facts(fed).awaits != ())
    assert schedule_facts(fed).fired_for == "labelled >= 64 on 2 clients (c1: 70, c2: 64)"
    assert schedule_facts(fed).fired_at is not None
    assert schedule_facts(fed).awaits == ("cron '0 3 1 1 *'", "labelled >= 64 on 2 clients (0 so far)")


async def read_causes(fed: FederationHarness) -> dict[str, str]:
    """What led to each step, the last of its kind: ``run requested`` to ``schedule fired``."""
    steps: dict[str, str] = {}
    causes: dict[str, str] = {}
    for stream, wanted in (
        (events_stream(fed.bus.fed), stream_subjects(fed.bus.fed)),
        (lifecycle_stream(fed.bus.fed), [subjects.wildcard_for(fed.bus.fed, Transition)]),
    ):
        _, last = await fed.bus.sequence_range(stream)
        if not last:
            continue
        async with fed.bus.watch(stream, wanted, whole=True) as said:
            async for one in said:
                move = one.message
                step = f"{move.kind} {move.event}" if isinstance(move, Transition) else move.word
                steps[one.envelope.id] = step
                causes[step] = one.envelope.cause
                if one.sequence >= last:
                    break
    return {step: steps.get(cause, "") for step, cause in causes.items()}


async def test_a_run_leads_back_to_what_made_it_due_and_not_to_what_held_it_back(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="labelled >= 5"))):
        await wait_for_scheduler(fed)
        await start_run(fed)
        await fed.publish(make_data_counted("c1", 5), sender="inference")
        await fed.wait_for_event("schedule", "postponed")
        await fail_run(fed, server, 1)
        await fail_run(fed, server, 2)
        found = await read_causes(fed)
    assert found["run requested"] == "schedule fired"
    assert found["schedule fired"] == "schedule postponed"
    assert found["schedule postponed"] == "schedule triggered"
    assert found["schedule triggered"] == "data_counted"


async def test_a_run_that_time_brings_leads_back_to_no_message(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(every_s=0.3))):
        await wait_for_scheduler(fed)
        await fail_run(fed, server, 1)
        await fed.wait_for_state("run", "recruiting", f"{TASK}-2")
        found = await read_causes(fed)
    assert (found["run requested"], found["schedule fired"]) == ("schedule fired", "schedule triggered")
    assert found["schedule triggered"] == ""


async def test_what_is_planned_is_told_again_only_where_it_has_changed(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="labelled >= 64 on 2 clients"))):
        await wait_for_scheduler(fed)
        for rows in range(10):
            await fed.publish(make_data_counted("c1", rows), sender="inference")
        await fed.publish(make_data_counted("c1", 64), sender="inference")
        await eventually(lambda: schedule_facts(fed).awaits == ("labelled >= 64 on 2 clients (1 so far)",))
    assert fed.events_of("schedule") == ["started", "planned", "planned"]


async def test_both_of_two_are_waited_for_over_a_restart(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    both = make_schedule(when="drift and labelled >= 5")
    async with fed.run_agent(make_scheduler(fed, both)) as scheduler:
        await wait_for_scheduler(fed)
        await fed.publish(make_drift("c1"), sender="inference")
        await scheduler.restart()
        await wait_for_scheduler(fed)
        assert fed.transitions_of("run") == []
        await fed.publish(make_data_counted("c2", 5), sender="inference")
        await fail_run(fed, server, 1)
    assert (
        fed.transitions_of("run")[0].reason == "drift on 1 client (c1), and labelled >= 5 on 1 client (c2: 5)"
    )


async def test_drift_is_of_now_and_the_same_clients_start_no_further_run_at_once(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    both = make_schedule(when="drift on 2 clients", again_s=3)
    async with fed.run_agent(make_scheduler(fed, both)) as scheduler:
        await wait_for_scheduler(fed)
        await fed.publish(make_drift("c1"), sender="inference")
        await fed.publish(make_data_checked("c1", drifting=False), sender="inference")
        await fed.publish(make_drift("c2"), sender="inference")
        await fed.publish(make_drift("c3"), sender="inference")
        await fail_run(fed, server, 1)
        fired = datetime.now(UTC)
        await fed.publish(make_data_checked("c2", drifting=True), sender="inference")
        await fed.publish(make_drift("c3"), sender="inference")
        await scheduler.restart()
        await wait_for_scheduler(fed)
        await fail_run(fed, server, 2)
        assert fed.run_facts(2).requested_at > fired + timedelta(seconds=2)
        await fed.publish(make_data_checked("c3", drifting=False), sender="inference")
        await fed.publish(make_drift("c1"), sender="inference")
        await fail_run(fed, server, 3)
        assert schedule_facts(fed).drifted == ("c1", "c2")
    causes = [one.reason for one in fed.transitions_of("run") if one.event == "requested"]
    assert causes == [f"drift on 2 clients ({names})" for names in ("c2, c3", "c2, c3", "c1, c2")]


def make_live_accuracy(
    client: str, version: int, right: int, *, labelled: int = 100, serving: int = 2
) -> DataChecked:
    told = (LiveAccuracy(version=version, labelled=labelled, right=right),)
    return DataChecked(task=TASK, client=client, rows=200, serving=serving, live=told)


async def test_a_poor_live_accuracy_of_what_serves_starts_a_run_and_not_at_once_another(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="live_accuracy < 0.8 or new_code")
    async with fed.run_agent(make_scheduler(fed, table)):
        await wait_for_scheduler(fed)
        await fed.publish(make_live_accuracy("c1", 1, 10), sender="inference")  # that version is away
        await fed.publish(
            make_live_accuracy("c2", 2, 10, labelled=49), sender="inference"
        )  # it takes 50 to say so
        await fed.publish(make_live_accuracy("c3", 2, 80), sender="inference")
        await fed.publish(make_live_accuracy("c3", 2, 79), sender="inference")
        await fail_run(fed, server, 1)
        await fed.publish(make_live_accuracy("c3", 2, 70), sender="inference")
        await fed.publish(CodePublished(task=TASK, code_version="b" * 40), sender="server-manager")
        await fail_run(fed, server, 2)
        await fed.publish(make_live_accuracy("c1", 2, 60), sender="inference")
        await fail_run(fed, server, 3)
    causes = [one.reason for one in fed.transitions_of("run") if one.event == "requested"]
    assert causes == [
        "live_accuracy < 0.8 on 1 client (c3: 0.79)",
        "new_code",
        "live_accuracy < 0.8 on 1 client (c1: 0.6, c3: 0.7)",
    ]


async def test_new_code_a_worse_figure_and_another_tasks_run_start_runs(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="new_code or accuracy drops 0.1 or after other")
    async with fed.run_agent(make_scheduler(fed, table)):
        await wait_for_scheduler(fed)
        await fed.publish(CodePublished(task=TASK, code_version="b" * 40), sender="server-manager")
        await finish_run(fed, server, 1, accuracy=0.9)
        await start_run(fed)
        await finish_run(fed, server, 2, accuracy=0.75)
        await fail_run(fed, server, 3)
        await finish_run_of_other_task(fed)
        await fail_run(fed, server, 4)
    causes = [
        one.reason for one in fed.transitions_of("run") if one.event == "requested" and one.task == TASK
    ]
    assert causes == ["new_code", "manual", "accuracy drops 0.1 (0.9 → 0.75)", "after other"]


async def finish_run_of_other_task(fed: FederationHarness) -> None:
    async with LifecycleStore.open(await fed.connect_as("workflow-scheduler")) as lives:
        now = datetime.now(UTC)
        run = await lives.of(RUN, RunData(task="other", run="other-1", plan=RunPlan(), requested_at=now))
        await run.create()
        for event in (RunEvent.RECRUITING_STARTED, RunEvent.QUORUM_REACHED, RunEvent.RUN_FINISHED):
            await run.transition(event)


async def test_a_run_that_is_due_while_another_is_under_way_waits_for_its_end(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="drift"))):
        await wait_for_scheduler(fed)
        await start_run(fed)
        await fed.publish(make_drift("c1"), sender="inference")
        told = await fed.wait_for_event("schedule", "postponed")
        assert told.reason == f"{TASK}-1 is under way"
        await fail_run(fed, server, 1)
        await fail_run(fed, server, 2)
    assert fed.run_facts(2).trigger == "schedule"


async def test_or_is_skipped_or_the_other_is_cancelled(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="drift", overlap="skip"))):
        await wait_for_scheduler(fed)
        await start_run(fed)
        await fed.publish(make_drift("c1"), sender="inference")
        await fed.wait_for_event("schedule", "skipped")
        await fail_run(fed, server, 1)
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="drift", overlap="cancel-running"))):
        await wait_for_scheduler(fed)
        assert await start_run(fed) == f"{TASK}-2", "what was skipped is not made up for"
        await fed.wait_for_state("run", "recruiting", f"{TASK}-2")
        await fed.publish(make_drift("c2"), sender="inference")
        told = await fed.wait_for_state("run", "cancelled", f"{TASK}-2")
        assert told.reason == "the next run is due: drift on 1 client (c1, c2)"
        await fail_run(fed, server, 3)


async def test_quiet_hours_hold_a_run_back_and_it_is_told_until_when(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    hour = datetime.now(UTC).hour
    quiet = make_schedule(when="drift", quiet=f"hour in {hour}..{(hour + 2) % 24 or 24}")
    async with fed.run_agent(make_scheduler(fed, quiet)):
        await wait_for_scheduler(fed)
        await fed.publish(make_drift("c1"), sender="inference")
        told = await fed.wait_for_event("schedule", "postponed")
        assert told.deadline is not None
        assert told.deadline > datetime.now(UTC)
        assert fed.transitions_of("run") == []
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="drift"))):
        await fail_run(fed, server, 1)


async def test_a_debounce_waits_until_the_devices_are_calm(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    async with fed.run_agent(make_scheduler(fed, make_schedule(when="labelled >= 5", debounce_s=0.5))):
        await wait_for_scheduler(fed)
        for rows in (5, 6, 7):
            await fed.publish(make_data_counted("c1", rows), sender="inference")
        last_said = datetime.now(UTC)
        await fail_run(fed, server, 1)
    assert fed.run_facts(1).requested_at > last_said + timedelta(seconds=0.3)
    assert schedule_facts(fed).labelled == {"c1": 7}


async def test_cron_starts_runs_and_makes_up_for_what_was_missed(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    nearly_always = make_schedule(when="cron '* * * * *'", missed="once")
    async with fed.run_agent(make_scheduler(fed, nearly_always)):
        await fed.wait_for_event("schedule", "started")
    before = schedule_facts(fed)
    missed = before.model_copy(update={"clock_since": before.clock_since - timedelta(minutes=10)})
    await take_over_schedule(fed, missed)
    async with fed.run_agent(make_scheduler(fed, nearly_always)):
        await fail_run(fed, server, 1)
        assert fed.transitions_of("run")[0].reason == "cron '* * * * *'"
        assert schedule_facts(fed).clock_since > before.clock_since


async def take_over_schedule(fed: FederationHarness, facts: ScheduleData) -> None:
    async with LifecycleStore.open(await fed.connect_as("workflow-scheduler")) as lives:
        life = await lives.of(SCHEDULE, facts)
        await life.transition(ScheduleEvent.TAKEN_OVER, {"clock_since": facts.clock_since})


async def test_of_two_schedulers_one_leads_and_the_other_takes_over(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="drift")
    async with fed.run_agent(make_scheduler(fed, table)) as first:
        await wait_for_scheduler(fed)
        async with fed.run_agent(make_scheduler(fed, table)):
            await fed.publish(make_drift("c1"), sender="inference")
            await fail_run(fed, server, 1)
            await first.kill()
            await eventually(lambda: fed.events_of("schedule").count("taken_over") == 1)
            await wait_for_scheduler(fed)
            await fed.publish(make_drift("c2"), sender="inference")
            await fail_run(fed, server, 2)
        first.start()
    assert [one.thing for one in fed.transitions_of("run") if one.event == "requested"] == [
        f"{TASK}-1",
        f"{TASK}-2",
    ]


async def test_a_run_that_was_fired_and_not_made_is_made_by_the_next_scheduler(
    fed: FederationHarness, server: FakeServerManager
) -> None:
    table = make_schedule(when="drift", at_most=1)
    async with fed.run_agent(make_scheduler(fed, table)):
        await fed.wait_for_event("schedule", "started")
    async with LifecycleStore.open(await fed.connect_as("workflow-scheduler")) as lives:
        life = await lives.of(SCHEDULE, schedule_facts(fed))
        await life.transition(ScheduleEvent.TRIGGERED, {"due_since": datetime.now(UTC)})
        await life.transition(ScheduleEvent.FIRED, {"run": f"{TASK}-1", "started": 1, "due_since": None})
    async with fed.run_agent(make_scheduler(fed, table)):
        await fail_run(fed, server, 1)
    assert len([one for one in fed.transitions_of("run") if one.event == "requested"]) == 1


# --- the code that everybody is on ---------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    path = tmp_path / "repository"
    shutil.copytree(TINY_TASK, path, ignore=shutil.ignore_patterns("__pycache__"))
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch=main")
    return repository


def task_with(repository: Repository, rounds: int, when: str = "") -> str:
    """A commit of the task with runs of so many rounds, which start by this schedule."""
    own = (TINY_TASK / "pyproject.toml").read_text().replace("\nrounds = 2", f"\nrounds = {rounds}")
    starts = f"\n[tool.fedbus.schedule]\nwhen = {when!r}\n" if when else ""
    return repository.commit({"pyproject.toml": own + starts})


def make_repository_scheduler(
    fed: FederationHarness, repository: Repository, overrides: RunOverrides | None = None
) -> Any:
    """A scheduler that begins with the newest commit."""
    code = open_code(f"{repository.url}@main", fed.config.home)

    async def run(stop: Any) -> None:
        first = await code.task_at(await code.newest())
        async with fed.config.bus("workflow-scheduler") as bus:
            await WorkflowScheduler(bus, first, overrides=overrides, code=code).run(stop)

    return run


async def publish_code(fed: FederationHarness, version: str) -> None:
    await fed.publish(CodePublished(task=TASK, code_version=version), sender="server-manager")


async def test_the_plan_and_the_schedule_are_those_of_the_code_that_everybody_comes_to_be_on(
    fed: FederationHarness, server: FakeServerManager, repository: Repository
) -> None:
    without = task_with(repository, 2)
    async with fed.run_agent(make_repository_scheduler(fed, repository)):
        await wait_for_scheduler(fed)
        await publish_code(fed, without)
        await publish_code(fed, task_with(repository, 5, "drift"))
        await fed.wait_for_event("schedule", "rescheduled")
        await fed.publish(make_drift("c1"), sender="inference")
        await fed.wait_for_state("run", "recruiting", f"{TASK}-1")
        assert server.open_requests[-1].plan.rounds == 5

        await fed.publish(
            make_drift("c2"), sender="inference"
        )  # due, and waits for the run that is under way
        await fed.wait_for_event("schedule", "postponed")
        await publish_code(fed, without)
        told = await fed.wait_for_event("schedule", "rescheduled", times=2)
        assert (told.source, told.target, told.reason) == ("due", "watching", f"code {without[:12]}")
        await fail_run(fed, server, 1)
        await start_run(fed)
        assert server.open_requests[-1].plan.rounds == 2
    assert [one.reason for one in fed.transitions_of("run") if one.event == "requested"] == [
        "drift on 1 client (c1)",
        "manual",
    ]


async def test_a_commit_that_is_newer_than_what_everybody_is_on_changes_no_schedule(
    fed: FederationHarness, server: FakeServerManager, repository: Repository
) -> None:
    await publish_code(fed, task_with(repository, 3, "drift"))
    task_with(repository, 9, "labelled >= 1")
    async with fed.run_agent(make_repository_scheduler(fed, repository)):
        await wait_for_scheduler(fed)
        await fed.publish(make_data_counted("c1", 70), sender="inference")
        await fed.publish(make_drift("c1"), sender="inference")
        await fail_run(fed, server, 1)
    assert fed.transitions_of("run")[0].reason == "drift on 1 client (c1)"
    assert server.open_requests[-1].plan.rounds == 3


async def test_what_the_command_line_says_of_runs_stands_over_any_code(
    fed: FederationHarness, server: FakeServerManager, repository: Repository
) -> None:
    task_with(repository, 2)
    async with fed.run_agent(
        make_repository_scheduler(fed, repository, RunOverrides(rounds=7, config={"lr": 0.1}))
    ):
        await wait_for_scheduler(fed)
        await publish_code(fed, task_with(repository, 5, "drift"))
        await fed.wait_for_event("schedule", "started")
        await start_run(fed, config={"strategy": "krum"})
    (opened,) = server.open_requests
    assert opened.overrides == RunOverrides(rounds=7, config={"lr": 0.1, "strategy": "krum"})
    assert opened.plan.rounds == 7


async def test_code_that_is_away_is_taken_up_when_it_can_be_had(
    fed: FederationHarness, server: FakeServerManager, repository: Repository
) -> None:
    await publish_code(fed, task_with(repository, 2))
    async with fed.run_agent(make_repository_scheduler(fed, repository)):
        await wait_for_scheduler(fed)
        new = task_with(repository, 5, "drift")
        away = repository.path.rename(repository.path.with_name("away"))
        await publish_code(fed, new)
        await start_run(fed)
        assert server.open_requests[-1].plan.rounds == 2
        away.rename(repository.path)
        await fed.wait_for_event("schedule", "started")
        await fail_run(fed, server, 1)
        await start_run(fed)
        assert server.open_requests[-1].plan.rounds == 5
