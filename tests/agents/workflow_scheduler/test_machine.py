"""The decisions of the workflow scheduler about runs, requests and code: events in, the whole list of effects out."""

import pytest
from support.scheduler_machine import (
    FIRST_RUN,
    SECOND_RUN,
    SchedulerDriver,
    code_published,
    drift,
    leading_scheduler,
    new_scheduler,
    replies_in,
    run_data,
    run_transition,
    scheduled_task,
)
from support.server_machine import NAME, NEW, NOW, OLD, model, task_at

from fedbus.agents.common.machine import CancelTimer, Log, Reply, RequestId, RetryLater, StartTimer
from fedbus.agents.workflow_scheduler.effects import (
    CancelOpening,
    CancelServerRun,
    Cause,
    CreateRun,
    JoinRunTrace,
    LoadCodeAtStartup,
    LoadDeployedCode,
    LoadRun,
    MoveRun,
    RequestCancellation,
    RequestOpening,
    Trace,
)
from fedbus.agents.workflow_scheduler.events import (
    CancellationAnswered,
    DeployedCodeLoaded,
    DeployedCodeRejected,
    DeployedCodeUnavailable,
    OpeningAnswered,
    SchedulerStarted,
    SchedulerTimer,
    ServiceStarted,
    TimedMessage,
)
from fedbus.agents.workflow_scheduler.runs import START_RUN_REPLY_S
from fedbus.contracts.message import Refused
from fedbus.contracts.run import RunData, RunEvent, RunOverrides, RunPlan, RunStarted, RunState, RunStopped
from fedbus.contracts.scheduling import ScheduleOverrides, ScheduleRule
from fedbus.contracts.server import CancelRun, OpenRun, ServerEvent, StoreProblem

NEWER = "c" * 40
STOPS_REPLY_TIMER = CancelTimer(SchedulerTimer.REPLY)
STARTS_REPLY_TIMER = StartTimer(SchedulerTimer.REPLY, START_RUN_REPLY_S)
STARTED = RunStarted(run=FIRST_RUN)
STOPPED = RunStopped(run=FIRST_RUN)


def request(number: int) -> RequestId:
    return RequestId(number)


def opens(data: RunData) -> OpenRun:
    return OpenRun(task=NAME, run=data.run, plan=data.plan, overrides=data.overrides)


def cancels(reason: str, run: str = FIRST_RUN) -> CancelRun:
    return CancelRun(task=NAME, run=run, reason=reason)


def refused(number: int, reason: str) -> list[Reply]:
    return [Reply(request(number), Refused(reason=reason))]


def scheduler_with_run(state: RunState) -> SchedulerDriver:
    """A scheduler with a run in *state* that a user started, and that has its reply."""
    scheduler = leading_scheduler()
    scheduler.request_run()
    if state is not RunState.REQUESTED:
        scheduler.open_run()
    if state in (RunState.RUNNING, RunState.RECOVERING):
        scheduler.move_server(ServerEvent.QUORUM_REACHED, cohort=("c1", "c2"))
    if state is RunState.RECOVERING:
        scheduler.move_server(ServerEvent.SERVER_LOST, reason="the process was killed")
    assert scheduler.run_state == state
    scheduler.effects.clear()
    return scheduler


# --- starting a run -------------------------------------------------------------------------------


def test_a_requested_run_is_created_opened_and_then_answered() -> None:
    scheduler = leading_scheduler()
    data = run_data(
        plan=scheduler.task.plan_run(), overrides=RunOverrides(), trigger="manual", requested_at=NOW
    )
    assert scheduler.request_run() == [
        CreateRun(data, "manual", trace=Trace.NEW_SPAN),
        RequestOpening(opens(data), trace=Trace.RUN, cause=Cause.RUN),
        STARTS_REPLY_TIMER,
    ]
    assert scheduler.handle(OpeningAnswered(FIRST_RUN)) == [STOPS_REPLY_TIMER, Reply(request(1), STARTED)]
    assert scheduler.fire(SchedulerTimer.REPLY) == []


def test_a_busy_server_does_not_delay_the_reply() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    assert replies_in(scheduler.fire(SchedulerTimer.REPLY)) == [STARTED]
    assert scheduler.handle(OpeningAnswered(FIRST_RUN)) == []


def test_a_reply_does_not_outlast_the_next_request() -> None:
    """The server moved the run to its end, and its reply was lost."""
    scheduler = leading_scheduler()
    scheduler.request_run()
    scheduler.move_server(ServerEvent.RUN_REQUESTED, run=FIRST_RUN, plan=RunPlan())
    scheduler.move_server(ServerEvent.RECRUITING_EXPIRED)
    assert replies_in(scheduler.request_run()) == [STARTED]
    assert replies_in(scheduler.handle(OpeningAnswered(SECOND_RUN))) == [RunStarted(run=SECOND_RUN)]


def test_an_answer_about_an_earlier_run_changes_nothing() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    scheduler.fail_run()
    scheduler.request_run()
    assert scheduler.handle(OpeningAnswered(FIRST_RUN)) == []
    log, *rest = scheduler.handle(OpeningAnswered(FIRST_RUN, "no such app"))
    assert isinstance(log, Log)
    assert rest == []
    assert scheduler.run_state == RunState.REQUESTED


def test_a_request_overrides_the_options_and_these_the_task() -> None:
    options = RunOverrides(rounds=7, config={"lr": 0.1})
    scheduler = leading_scheduler(overrides=options)
    scheduler.request_run(quorum=4, config={"strategy": "krum"})
    overrides = RunOverrides(rounds=7, quorum=4, config={"lr": 0.1, "strategy": "krum"})
    assert scheduler.run.overrides == overrides
    assert scheduler.run.plan == overrides.apply_to(scheduler.task.plan_run())
    assert (scheduler.run.plan.rounds, scheduler.run.plan.quorum) == (7, 4)


def test_a_task_has_one_run_at_a_time() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    reason = (
        f"{FIRST_RUN} is requested, and a task has one run at a time: "
        f"wait for it, or stop it with `fedbus run stop {FIRST_RUN}`"
    )
    assert scheduler.request_run() == refused(2, reason)
    scheduler.fail_run()
    assert scheduler.run_state == RunState.FAILED
    scheduler.request_run()
    assert scheduler.run.run == SECOND_RUN


def test_a_run_needs_a_model() -> None:
    scheduler = new_scheduler()
    scheduler.start()
    scheduler.handle(ServiceStarted())
    reason = f"task {NAME} cannot start a run now: it has no model yet, see `fedbus events tail`"
    assert scheduler.request_run() == refused(1, reason)
    scheduler.move_server(ServerEvent.MODEL_READY, model=model(1))
    scheduler.request_run()
    assert scheduler.run.run == FIRST_RUN


def test_a_run_needs_the_model_store() -> None:
    scheduler = leading_scheduler("every 10s")
    scheduler.fail_run()
    trouble = {"trouble": StoreProblem.UNAVAILABLE}
    scheduler.move_server(ServerEvent.STORE_UNAVAILABLE, reason="no route to host", **trouble)
    reason = f"task {NAME} cannot start a run now: no route to host"
    assert scheduler.request_run() == refused(1, reason)
    scheduler.wait(10)
    assert scheduler.fire(SchedulerTimer.EVALUATE) == []
    scheduler.restart()
    assert scheduler.request_run() == refused(2, reason)
    scheduler.move_server(ServerEvent.STORE_RECOVERED, trouble=None)
    assert len(scheduler.causes) == 1, "the run that is due starts at once"


def test_the_reason_of_a_store_problem_outlasts_a_round() -> None:
    scheduler = scheduler_with_run(RunState.RUNNING)
    trouble = {"trouble": StoreProblem.UNAVAILABLE}
    scheduler.move_server(ServerEvent.STORE_UNAVAILABLE, reason="no route to host", **trouble)
    scheduler.finish_round(1)
    scheduler.move_server(ServerEvent.RUN_FAILED)
    assert scheduler.request_run() == refused(2, f"task {NAME} cannot start a run now: no route to host")


def test_a_scheduler_that_missed_the_reason_names_the_store_problem() -> None:
    scheduler = new_scheduler()
    scheduler.server.move(ServerEvent.MODEL_READY, model=model(1))
    scheduler.server.move(ServerEvent.STORE_UNAVAILABLE, reason="no", trouble=StoreProblem.UNAVAILABLE)
    scheduler.server.move(ServerEvent.RUN_REQUESTED, run="tiny-7", plan=RunPlan())
    scheduler.start()
    scheduler.handle(ServiceStarted())
    reason = "its model repository is unavailable, see `fedbus events tail`"
    assert scheduler.request_run() == refused(1, f"task {NAME} cannot start a run now: {reason}")


def test_a_run_that_the_server_refuses_has_failed() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    assert scheduler.handle(OpeningAnswered(FIRST_RUN, "no such app")) == [
        Log("warning", "Run refused", {"run": FIRST_RUN, "reason": "no such app"}),
        MoveRun(RunEvent.RUN_REFUSED, {}, "no such app"),
        STOPS_REPLY_TIMER,
        *refused(1, "no such app"),
    ]
    scheduler.request_run()
    assert scheduler.run.run == SECOND_RUN


def test_a_refusal_does_not_end_a_run_that_is_open() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    scheduler.move_server(ServerEvent.RUN_REQUESTED, run=FIRST_RUN, plan=RunPlan())
    effects = scheduler.handle(OpeningAnswered(FIRST_RUN, "a run is in progress"))
    assert effects[1:] == [STOPS_REPLY_TIMER, *refused(1, "a run is in progress")]
    assert scheduler.run_state == RunState.RECRUITING


# --- following the server -------------------------------------------------------------------------


def test_a_run_follows_the_server_from_its_opening_to_a_version() -> None:
    scheduler = scheduler_with_run(RunState.REQUESTED)
    plan = RunPlan(rounds=9)
    scheduler.open_run(plan)
    assert (scheduler.run.plan, scheduler.run.code_version) == (plan, OLD)
    scheduler.move_server(ServerEvent.QUORUM_REACHED, cohort=("c1", "c2"))
    scheduler.finish_round(0, loss=2.0)
    scheduler.finish_round(1, loss=1.5)
    assert scheduler.move_server(ServerEvent.RUN_FINISHED) == []
    scheduler.move_server(ServerEvent.VERSION_PUBLISHED, model=model(2))
    assert scheduler.run_events == [
        "recruiting_started",
        "quorum_reached",
        "round_finished",
        "round_finished",
        "run_finished",
    ]
    assert [one.loss for one in scheduler.run.rounds] == [2.0, 1.5]
    assert (scheduler.run.cohort, scheduler.run.model, scheduler.run.promoted) == (
        ("c1", "c2"),
        model(2),
        True,
    )


def test_a_version_that_is_not_promoted_ends_its_run() -> None:
    scheduler = scheduler_with_run(RunState.RUNNING)
    scheduler.move_server(ServerEvent.RUN_FINISHED)
    effects = scheduler.move_server(ServerEvent.CANDIDATE_KEPT, candidate=model(2), reason="worse")
    assert effects == [MoveRun(RunEvent.RUN_FINISHED, {"model": model(2), "promoted": False}, "worse")]


def test_a_repeated_transition_of_the_server_changes_nothing() -> None:
    scheduler = scheduler_with_run(RunState.RUNNING)
    scheduler.move_server(ServerEvent.SERVER_LOST)
    assert scheduler.server.last is not None
    assert scheduler.handle(scheduler.server.last) == []


def test_a_transition_about_another_run_moves_no_run() -> None:
    scheduler = scheduler_with_run(RunState.REQUESTED)
    opened = scheduler.move_server(ServerEvent.RUN_REQUESTED, run="tiny-7", plan=RunPlan())
    assert opened == [CancelServerRun(cancels("the run was stopped before it was opened", "tiny-7"))]
    assert scheduler.move_server(ServerEvent.QUORUM_REACHED, cohort=("c1",)) == []
    assert scheduler.run_state == RunState.REQUESTED


def test_a_step_of_a_run_does_not_evaluate_the_schedule() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.request_run()
    scheduler.open_run()
    quorum = scheduler.move_server(ServerEvent.QUORUM_REACHED, cohort=("c1", "c2"))
    assert quorum == [MoveRun(RunEvent.QUORUM_REACHED, {"cohort": ("c1", "c2")})]


def test_a_recovered_run_repeats_the_round_without_checkpoint() -> None:
    scheduler = scheduler_with_run(RunState.RUNNING)
    scheduler.finish_round(1)
    scheduler.finish_round(2)
    scheduler.move_server(ServerEvent.SERVER_LOST, reason="the process was killed")
    scheduler.move_server(ServerEvent.SERVER_RECOVERED)
    scheduler.finish_round(2, loss=0.5)
    assert scheduler.run_events[-3:] == ["server_lost", "server_recovered", "round_finished"]
    assert [(one.round, one.loss) for one in scheduler.run.rounds] == [(1, None), (2, 0.5)]


@pytest.mark.parametrize("state", [RunState.RECRUITING, RunState.RUNNING, RunState.RECOVERING])
def test_a_run_fails_with_its_server(state: RunState) -> None:
    scheduler = scheduler_with_run(state)
    failed = scheduler.move_server(ServerEvent.RUN_FAILED, reason="the ServerApp raised")
    assert failed == [MoveRun(RunEvent.RUN_FAILED, {}, "the ServerApp raised")]
    assert scheduler.run_state == RunState.FAILED


def test_a_run_without_quorum_has_failed() -> None:
    scheduler = scheduler_with_run(RunState.RECRUITING)
    expired = scheduler.move_server(ServerEvent.RECRUITING_EXPIRED, reason="0 of 2")
    assert expired == [MoveRun(RunEvent.RECRUITING_EXPIRED, {}, "0 of 2")]


# --- stopping a run -------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [RunState.RECRUITING, RunState.RUNNING, RunState.RECOVERING])
def test_the_server_stops_a_run_that_it_has_opened(state: RunState) -> None:
    scheduler = scheduler_with_run(state)
    assert scheduler.request_stop() == [
        JoinRunTrace(),
        RequestCancellation(request(2), cancels("enough")),
    ]
    assert scheduler.handle(CancellationAnswered(request(2), FIRST_RUN)) == [Reply(request(2), STOPPED)]
    cancelled = scheduler.move_server(ServerEvent.RUN_CANCELLED, reason="enough")
    assert cancelled == [MoveRun(RunEvent.CANCELLED, {}, "enough")]


def test_a_stop_that_comes_too_late_is_refused() -> None:
    scheduler = scheduler_with_run(RunState.RUNNING)
    scheduler.request_stop()
    reason = "the server is publishing"
    assert scheduler.handle(CancellationAnswered(request(2), FIRST_RUN, reason)) == refused(2, reason)


def test_a_run_that_is_not_opened_yet_is_stopped_at_once() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    assert scheduler.request_stop() == [
        JoinRunTrace(),
        CancelOpening(),
        STOPS_REPLY_TIMER,
        *refused(1, f"{FIRST_RUN} was stopped: enough"),
        MoveRun(RunEvent.CANCELLED, {}, "enough"),
        Reply(request(2), STOPPED),
    ]


def test_a_stopped_run_that_the_server_opens_is_cancelled() -> None:
    scheduler = leading_scheduler()
    scheduler.request_run()
    scheduler.request_stop()
    reason = "the run was stopped before it was opened"
    opened = scheduler.move_server(ServerEvent.RUN_REQUESTED, run=FIRST_RUN, plan=RunPlan())
    assert opened == [CancelServerRun(cancels(reason))]
    assert scheduler.move_server(ServerEvent.RUN_CANCELLED, reason=reason) == []


def test_only_the_current_run_can_be_stopped() -> None:
    scheduler = scheduler_with_run(RunState.REQUESTED)
    reason = f"{SECOND_RUN} is not in progress: see `fedbus run ls`"
    assert scheduler.request_stop(SECOND_RUN) == refused(2, reason)
    scheduler.request_stop()
    reason = f"{FIRST_RUN} is not in progress: see `fedbus run ls`"
    assert scheduler.request_stop() == refused(4, reason)


def test_the_end_of_a_stopped_run_starts_the_one_that_is_due() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.request_run()
    scheduler.receive(drift("c1"))
    scheduler.request_stop()
    assert scheduler.causes == ["manual", "drift on 1 client (c1)"]


def test_a_refused_run_starts_the_one_that_is_due() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.request_run()
    scheduler.receive(drift("c1"))
    scheduler.handle(OpeningAnswered(FIRST_RUN, "no such app"))
    assert scheduler.causes == ["manual", "drift on 1 client (c1)"]


# --- the start ------------------------------------------------------------------------------------


def test_the_next_scheduler_opens_a_run_that_is_requested() -> None:
    scheduler = scheduler_with_run(RunState.REQUESTED)
    assert scheduler.start() == [
        LoadRun(scheduler.run),
        RequestOpening(opens(scheduler.run), trace=Trace.RUN),
    ]


def test_the_next_scheduler_follows_the_current_run() -> None:
    scheduler = scheduler_with_run(RunState.RUNNING)
    scheduler.finish_round(1)
    assert scheduler.start() == [LoadRun(scheduler.run)]
    scheduler.finish_round(2)
    assert [one.round for one in scheduler.run.rounds] == [1, 2]


def test_the_next_scheduler_counts_the_runs_of_its_task() -> None:
    begins = (RunEvent.RECRUITING_STARTED, RunEvent.QUORUM_REACHED)
    transitions = [
        run_transition(run_data("tiny-10", trigger="schedule"), *begins, RunEvent.RUN_FINISHED),
        run_transition(run_data("tiny-9", trigger="schedule"), *begins, RunEvent.RUN_FAILED),
        run_transition(run_data("tiny-8"), RunEvent.CANCELLED),
        run_transition(run_data("other-30", trigger="schedule"), *begins),
    ]
    scheduler = new_scheduler("every 60s")
    log = SchedulerStarted(
        server=scheduler.server.move(ServerEvent.MODEL_READY, model=model(1)),
        runs=tuple(TimedMessage(transition, NOW) for transition in transitions),
    )
    scheduler.start(log=log)
    assert scheduler.data.started == 2
    assert StartTimer(SchedulerTimer.EVALUATE, 60) in scheduler.handle(ServiceStarted())
    scheduler.request_run()
    assert scheduler.run.run == "tiny-11"


# --- the deployed code ----------------------------------------------------------------------------


def test_a_scheduler_starts_by_the_deployed_code() -> None:
    scheduler = new_scheduler("drift")
    scheduler.store(code_published(NEW))
    assert scheduler.start() == [LoadCodeAtStartup(NEW)]
    scheduler.handle(DeployedCodeLoaded(scheduled_task("labelled >= 5", code=NEW)))
    assert scheduler.data.rule == ScheduleRule(when="labelled >= 5")
    assert scheduler.data.code_version == NEW
    assert LoadDeployedCode(NEW) not in scheduler.handle(ServiceStarted())


@pytest.mark.parametrize(
    ("failure", "is_loaded_later"),
    [(DeployedCodeUnavailable(NEW, "no route to host"), True), (DeployedCodeRejected(NEW, "no"), False)],
)
def test_a_scheduler_starts_by_its_own_code_if_the_deployed_one_fails(
    failure: DeployedCodeUnavailable | DeployedCodeRejected, is_loaded_later: bool
) -> None:
    scheduler = new_scheduler("drift")
    scheduler.store(code_published(NEW))
    scheduler.start()
    log = Log(
        "warning",
        "Cannot load the deployed code; using the code of the start",
        {"code": NEW, "reason": failure.reason},
    )
    assert scheduler.handle(failure)[0] == log
    assert scheduler.data.rule == ScheduleRule(when="drift")
    assert (LoadDeployedCode(NEW) in scheduler.handle(ServiceStarted())) is is_loaded_later


def test_deployed_code_is_loaded_when_it_changes() -> None:
    scheduler = leading_scheduler()
    assert scheduler.receive(code_published(OLD)) == []
    assert scheduler.receive(code_published(NEW)) == [LoadDeployedCode(NEW)]
    assert scheduler.receive(code_published(NEW), drift("c1")) == []
    scheduler.handle(DeployedCodeLoaded(task_at(NEW, rounds=5)))
    assert scheduler.receive(code_published(NEW)) == []
    scheduler.request_run()
    assert scheduler.run.plan.rounds == 5


def test_options_stay_in_force_with_new_code() -> None:
    scheduler = leading_scheduler(overrides=RunOverrides(rounds=7))
    scheduler.receive(code_published(NEW))
    scheduler.handle(DeployedCodeLoaded(task_at(NEW, rounds=5, quorum=4)))
    scheduler.request_run()
    assert (scheduler.run.plan.rounds, scheduler.run.plan.quorum) == (7, 4)


def test_unavailable_code_is_loaded_again_until_it_is_there() -> None:
    scheduler = leading_scheduler()
    scheduler.receive(code_published(NEW))
    unavailable = DeployedCodeUnavailable(NEW, "no route to host")
    assert scheduler.handle(unavailable) == [
        Log(
            "warning",
            "Code repository unavailable; keeping the current run configuration",
            {"code": NEW, "reason": "no route to host"},
        ),
        RetryLater(SchedulerTimer.CODE, 0),
    ]
    assert scheduler.fire(SchedulerTimer.CODE) == [LoadDeployedCode(NEW)]
    assert scheduler.handle(unavailable) == [RetryLater(SchedulerTimer.CODE, 1)], "it is logged once"
    scheduler.fire(SchedulerTimer.CODE)
    scheduler.handle(DeployedCodeLoaded(task_at(NEW, rounds=5)))
    assert scheduler.fire(SchedulerTimer.CODE) == []
    scheduler.request_run()
    assert scheduler.run.plan.rounds == 5


def test_rejected_code_is_not_loaded_again() -> None:
    scheduler = leading_scheduler()
    scheduler.receive(code_published(NEW))
    assert scheduler.handle(DeployedCodeRejected(NEW, "not signed")) == [
        Log(
            "warning",
            "Code version rejected; keeping the current run configuration",
            {"code": NEW, "reason": "not signed"},
        )
    ]
    assert scheduler.receive(code_published(NEW), drift("c1")) == []
    assert scheduler.receive(code_published(NEWER)) == [LoadDeployedCode(NEWER)]


def test_only_the_code_that_is_deployed_now_is_used() -> None:
    scheduler = leading_scheduler()
    scheduler.receive(code_published(NEW))
    assert scheduler.receive(code_published(NEWER)) == [
        CancelTimer(SchedulerTimer.CODE),
        LoadDeployedCode(NEWER),
    ]
    assert scheduler.handle(DeployedCodeLoaded(task_at(NEW, rounds=5))) == []
    assert scheduler.handle(DeployedCodeUnavailable(NEW, "no route to host")) == []
    assert scheduler.receive(code_published(OLD)) == [CancelTimer(SchedulerTimer.CODE)]
    assert scheduler.handle(DeployedCodeLoaded(task_at(NEWER, rounds=6))) == []
    assert scheduler.fire(SchedulerTimer.CODE) == []


def test_options_that_conflict_with_the_schedule_are_ignored() -> None:
    scheduler = new_scheduler("every 1h", schedule_overrides=ScheduleOverrides(every_s=3))
    log = scheduler.start()[0]
    assert isinstance(log, Log)
    assert log.event == "Ignoring scheduler options that conflict with the task's schedule"
    assert log.data["code"] == OLD
    assert scheduler.data.rule == ScheduleRule(when="every 1h")


def test_options_replace_values_of_the_schedule() -> None:
    scheduler = new_scheduler(every_s=5, schedule_overrides=ScheduleOverrides(every_s=3, at_most=1))
    scheduler.start()
    assert scheduler.data.rule == ScheduleRule(when="every 3 s", at_most=1)
