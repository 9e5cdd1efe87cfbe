"""The decisions of a schedule: what devices report, what time brings, and what postpones a run."""

from datetime import UTC, datetime, timedelta

import pytest
from support.scheduler_machine import (
    FIRST_RUN,
    SECOND_RUN,
    SchedulerDriver,
    checked,
    code_published,
    counted,
    drift,
    leading_scheduler,
    live_accuracy,
    moves_in,
    new_scheduler,
    scheduled_task,
)
from support.server_machine import NAME, NEW, NOW, OLD, model

from fedbus.agents.common.machine import CancelTimer, StartTimer
from fedbus.agents.workflow_scheduler.effects import (
    CancelServerRun,
    Cause,
    CreateRun,
    CreateSchedule,
    FollowOtherTasks,
    LoadDeployedCode,
    MoveSchedule,
    RequestOpening,
    Trace,
)
from fedbus.agents.workflow_scheduler.events import DeployedCodeLoaded, SchedulerTimer, ServiceStarted
from fedbus.agents.workflow_scheduler.runs import SCHEDULED
from fedbus.agents.workflow_scheduler.schedule import MAX_EVALUATE_DELAY
from fedbus.agents.workflow_scheduler.trigger_inputs import TriggerInputTracker
from fedbus.contracts.run import RunPlan
from fedbus.contracts.scheduling import ScheduleData, ScheduleEvent, ScheduleRule, ScheduleState
from fedbus.contracts.server import CancelRun, OpenRun, ServerEvent

EVALUATES_BY_EVENT = CancelTimer(SchedulerTimer.EVALUATE)
DRIFT = "drift on 1 client (c1)"


def evaluates_in(seconds: float) -> StartTimer[SchedulerTimer]:
    return StartTimer(SchedulerTimer.EVALUATE, seconds)


def postponed(reason: str, until: datetime | None = None) -> MoveSchedule:
    return MoveSchedule(
        ScheduleEvent.POSTPONED,
        reason=reason,
        deadline=until,
        trace=Trace.DUE_RUN,
        cause=Cause.SCHEDULE,
    )


def scheduler_without_model(when: str) -> SchedulerDriver:
    scheduler = new_scheduler(when)
    scheduler.start()
    scheduler.handle(ServiceStarted())
    return scheduler


# --- a run that becomes due -----------------------------------------------------------------------


def test_a_trigger_that_holds_starts_a_run_in_a_trace_of_its_own() -> None:
    scheduler = leading_scheduler("drift")
    triggered, fired, created, opening, waits, planned = scheduler.receive(drift("c1"))

    assert triggered == MoveSchedule(
        ScheduleEvent.TRIGGERED, {"due_since": NOW, "cause": DRIFT}, DRIFT, trace=Trace.NEW_TRACE
    )
    assert isinstance(fired, MoveSchedule)
    assert (fired.event, fired.reason) == (ScheduleEvent.FIRED, DRIFT)
    assert (fired.trace, fired.cause) == (Trace.DUE_RUN, Cause.SCHEDULE)
    assert fired.changes == {
        "since": NOW,
        "clock_since": NOW,
        "due_since": None,
        "cause": "",
        "labelled": {},
        "unlabelled": {},
        "databases": {},
        "drifted": ("c1",),
        "accuracy": {},
        "code_version": OLD,
        "next_at": None,
        "awaits": (),
        "started": 1,
        "run": FIRST_RUN,
        "fired_for": DRIFT,
        "fired_at": NOW,
    }
    assert created == CreateRun(scheduler.run, DRIFT, trace=Trace.DUE_RUN, cause=Cause.SCHEDULE)
    assert (scheduler.run.run, scheduler.run.trigger) == (FIRST_RUN, SCHEDULED)
    request = OpenRun(task=NAME, run=FIRST_RUN, plan=scheduler.task.plan_run(), overrides=scheduler.overrides)
    assert opening == RequestOpening(request, trace=Trace.RUN, cause=Cause.RUN)
    day = timedelta(days=1)
    assert waits == evaluates_in(MAX_EVALUATE_DELAY.total_seconds())
    assert planned == MoveSchedule(
        ScheduleEvent.PLANNED, {"next_at": NOW + day, "awaits": ("drift on 1 client",)}, trace=Trace.NONE
    )


def test_labelled_rows_on_enough_clients_start_a_run_once() -> None:
    scheduler = leading_scheduler("labelled >= 64 on 2 clients")
    scheduler.receive(counted("c1", 70), counted("c2", 63))
    assert scheduler.causes == []
    scheduler.receive(counted("c2", 64))
    scheduler.fail_run()
    assert scheduler.causes == ["labelled >= 64 on 2 clients (c1: 70, c2: 64)"]

    scheduler.receive(counted("c1", 100), counted("c2", 128))
    assert len(scheduler.causes) == 1
    scheduler.receive(counted("c1", 134))
    assert scheduler.causes[1:] == ["labelled >= 64 on 2 clients (c1: 64, c2: 64)"]
    assert (scheduler.data.labelled, scheduler.data.started) == ({"c1": 134, "c2": 128}, 2)


def test_rows_count_from_zero_in_a_new_database() -> None:
    scheduler = leading_scheduler("labelled >= 20")
    scheduler.receive(counted("c1", 60))  # an older device reports only the rows that it stores
    scheduler.fail_run()
    scheduler.receive(counted("c1", 59, ever=59, database="a"))  # a row expired
    scheduler.receive(counted("c1", 60, ever=80, database="a"))
    scheduler.fail_run()
    scheduler.receive(counted("c1", 60, ever=99, database="a"))
    scheduler.restart()
    scheduler.receive(counted("c1", 60, ever=101, database="a"))
    scheduler.fail_run()
    scheduler.receive(counted("c1", 60, ever=120, database="b"))
    scheduler.fail_run()
    scheduler.receive(counted("c1", 60, ever=19, database="c"))
    scheduler.receive(counted("c1", 60, ever=22, database="c"))
    rows = [cause.removeprefix("labelled >= 20 on 1 client ") for cause in scheduler.causes]
    assert rows == ["(c1: 60)", "(c1: 20)", "(c1: 21)", "(c1: 120)", "(c1: 22)"]
    assert scheduler.data.databases == {"c1": "c"}


def test_a_total_that_fell_counts_from_zero() -> None:
    """The device restored an older copy of its database."""
    scheduler = leading_scheduler("labelled >= 20")
    scheduler.receive(counted("c1", 100, ever=100, database="a"))
    scheduler.fail_run()
    scheduler.receive(counted("c1", 30, ever=30, database="a"))
    assert scheduler.causes[1:] == ["labelled >= 20 on 1 client (c1: 30)"]


def test_code_that_is_published_again_is_not_newer() -> None:
    tracker = TriggerInputTracker(scheduled_task())
    tracker.record(code_published(NEW), NOW)
    tracker.record(code_published(NEW), NOW + timedelta(hours=1))
    assert tracker.code == (NEW, NOW)


def test_conditions_joined_by_and_are_kept_over_a_restart() -> None:
    scheduler = leading_scheduler("drift and labelled >= 5")
    scheduler.receive(drift("c1"))
    scheduler.restart()
    assert scheduler.causes == []
    scheduler.receive(counted("c2", 5))
    assert scheduler.causes == ["drift on 1 client (c1), and labelled >= 5 on 1 client (c2: 5)"]


def test_drift_that_a_run_did_not_remove_starts_the_next_run_later() -> None:
    scheduler = leading_scheduler("drift on 2 clients", again_s=3)
    scheduler.receive(drift("c1"), checked("c1", drifting=False), drift("c2"))
    assert scheduler.causes == [], "c1 has recovered"
    scheduler.receive(drift("c3"))
    scheduler.fail_run()
    scheduler.wait(1)
    scheduler.receive(checked("c2", drifting=True), drift("c3"))
    assert evaluates_in(2) in scheduler.restart()
    assert len(scheduler.causes) == 1

    scheduler.wait(2)
    scheduler.fire(SchedulerTimer.EVALUATE)
    scheduler.fail_run()
    scheduler.receive(checked("c3", drifting=False), drift("c1"))
    assert scheduler.causes == [f"drift on 2 clients ({two})" for two in ("c2, c3", "c2, c3", "c1, c2")]
    assert scheduler.data.drifted == ("c1", "c2")


def test_an_older_check_does_not_replace_a_newer_one() -> None:
    scheduler = leading_scheduler("drift on 2 clients")
    scheduler.receive(drift("c1"))
    scheduler.wait(-1)
    scheduler.receive(checked("c1", drifting=False))
    scheduler.wait(1)
    scheduler.receive(drift("c2"))
    assert scheduler.causes == ["drift on 2 clients (c1, c2)"]


def test_low_live_accuracy_of_the_served_model_starts_one_run() -> None:
    scheduler = leading_scheduler("live_accuracy < 0.8 or new_code")
    scheduler.receive(live_accuracy("c1", 10, version=1))  # it serves another version
    scheduler.receive(live_accuracy("c2", 10, labelled=49))  # fewer labels than min-labelled
    scheduler.receive(live_accuracy("c3", 80))
    assert scheduler.causes == []
    scheduler.receive(live_accuracy("c3", 79))
    scheduler.fail_run()
    scheduler.receive(live_accuracy("c3", 70))
    scheduler.receive(code_published(NEW))
    scheduler.fail_run()
    scheduler.receive(live_accuracy("c1", 60))
    assert scheduler.causes == [
        "live_accuracy < 0.8 on 1 client (c3: 0.79)",
        "new_code",
        "live_accuracy < 0.8 on 1 client (c1: 0.6, c3: 0.7)",
    ]


def test_new_code_a_metric_and_another_task_start_runs() -> None:
    scheduler = leading_scheduler("new_code or accuracy drops 0.1 or after other")
    assert LoadDeployedCode(NEW) in scheduler.receive(code_published(NEW))
    scheduler.wait(1)
    scheduler.finish_run(accuracy=0.9)
    scheduler.request_run()
    scheduler.wait(1)
    scheduler.finish_run(accuracy=0.75)
    scheduler.wait(1)
    scheduler.fail_run()
    scheduler.wait(1)
    scheduler.finish_other_run()
    scheduler.fail_run()
    scheduler.wait(1)
    assert scheduler.finish_other_run(NAME) == []
    assert scheduler.causes == ["new_code", "manual", "accuracy drops 0.1 (0.9 → 0.75)", "after other"]


def test_other_tasks_are_followed_once_and_only_if_needed() -> None:
    scheduler = new_scheduler("drift")
    scheduler.start()
    assert FollowOtherTasks() not in scheduler.handle(ServiceStarted())
    scheduler = new_scheduler("after other")
    scheduler.start()
    assert FollowOtherTasks() in scheduler.handle(ServiceStarted())
    scheduler.receive(code_published(NEW))
    loaded = DeployedCodeLoaded(scheduled_task("after other or drift", code=NEW))
    assert FollowOtherTasks() not in scheduler.handle(loaded)


# --- time -----------------------------------------------------------------------------------------


def test_the_schedule_starts_at_most_as_many_runs_as_it_may() -> None:
    scheduler = leading_scheduler(every_s=10, at_most=2)
    scheduler.fail_run()
    scheduler.wait(10)
    scheduler.fire(SchedulerTimer.EVALUATE)
    assert scheduler.fail_run()[1:] == [], "the second run was the last one"
    scheduler.wait(10)
    assert scheduler.fire(SchedulerTimer.EVALUATE) == []
    assert EVALUATES_BY_EVENT not in scheduler.restart()
    scheduler.request_run()
    assert [run.data.trigger for run in scheduler.runs] == [SCHEDULED, SCHEDULED, "manual"]


def test_an_interval_begins_when_a_run_ends_and_outlasts_a_restart() -> None:
    scheduler = leading_scheduler(every_s=10)
    scheduler.wait(3)
    assert evaluates_in(10) in scheduler.fail_run()
    scheduler.wait(4)
    assert evaluates_in(6) in scheduler.restart()
    scheduler.wait(6)
    scheduler.fire(SchedulerTimer.EVALUATE)
    assert scheduler.run.run == SECOND_RUN


def test_a_timer_is_never_longer_than_an_hour() -> None:
    scheduler = leading_scheduler("cron '0 3 * * *'")
    day = [scheduler.fire(SchedulerTimer.EVALUATE)]
    for _ in range(14):
        scheduler.wait(3600)
        day.append(scheduler.fire(SchedulerTimer.EVALUATE))
    assert day == [[evaluates_in(3600)]] * 15
    scheduler.wait(1800)
    assert scheduler.fire(SchedulerTimer.EVALUATE) == [evaluates_in(1800)]
    scheduler.wait(1800)
    scheduler.fire(SchedulerTimer.EVALUATE)
    assert scheduler.causes == ["cron '0 3 * * *'"]


@pytest.mark.parametrize(("missed", "runs"), [("skip", 0), ("once", 1), ("all", 3)])
def test_missed_cron_times_start_as_many_runs_as_configured(missed: str, runs: int) -> None:
    scheduler = leading_scheduler("cron '0 * * * *'", missed=missed)
    scheduler.wait(3 * 3600 + 60)
    scheduler.restart()
    while scheduler.run_state == "requested":
        scheduler.fail_run()
    assert scheduler.causes == ["cron '0 * * * *'"] * runs
    assert scheduler.data.clock_since <= scheduler.now


# --- what postpones a run -------------------------------------------------------------------------


def test_a_due_run_waits_for_the_current_run() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.request_run()
    triggered, waits = scheduler.receive(drift("c1"))
    assert triggered == moves_in([triggered])[0]
    assert waits == postponed(f"{FIRST_RUN} is in progress")
    assert scheduler.receive(counted("c1", 1)) == [], "it is published once"
    scheduler.fail_run()
    assert scheduler.causes == ["manual", DRIFT]


def test_a_due_run_is_skipped_and_not_started_later() -> None:
    scheduler = leading_scheduler("drift", overlap="skip")
    scheduler.request_run()
    skipped = moves_in(scheduler.receive(drift("c1")))[1]
    assert (skipped.event, skipped.reason) == (ScheduleEvent.SKIPPED, f"{FIRST_RUN} is in progress")
    assert (skipped.trace, skipped.cause) == (Trace.DUE_RUN, Cause.EVENT)
    assert skipped.changes["drifted"] == ("c1",)
    scheduler.fail_run()
    assert scheduler.causes == ["manual"]
    assert scheduler.state is ScheduleState.WATCHING


def test_a_due_run_cancels_the_current_one_once() -> None:
    scheduler = leading_scheduler("drift", overlap="cancel-running")
    scheduler.request_run()
    scheduler.open_run()
    cancel = CancelRun(task=NAME, run=FIRST_RUN, reason=f"the next run is due: {DRIFT}")
    assert scheduler.receive(drift("c1"))[1:] == [
        postponed(f"{FIRST_RUN} must end first"),
        CancelServerRun(cancel, trace=Trace.RUN),
    ]
    assert scheduler.receive(drift("c2")) == []
    scheduler.move_server(ServerEvent.RUN_CANCELLED)
    assert scheduler.causes == ["manual", DRIFT]


def test_quiet_hours_postpone_a_run_and_name_their_end() -> None:
    scheduler = leading_scheduler("drift", quiet="hour in 12..14")
    end = NOW + timedelta(hours=2)
    assert scheduler.receive(drift("c1"))[1:] == [
        evaluates_in(3600),
        postponed("quiet hours or debounce", end),
    ]
    scheduler.wait(3600)
    assert scheduler.fire(SchedulerTimer.EVALUATE) == [evaluates_in(3600)]
    scheduler.wait(3600)
    scheduler.fire(SchedulerTimer.EVALUATE)
    assert scheduler.causes == [DRIFT]


def test_quiet_hours_without_an_end_wait_for_another_schedule() -> None:
    scheduler = leading_scheduler("drift", quiet="hour in 0..24")
    assert scheduler.receive(drift("c1"))[1:] == [
        EVALUATES_BY_EVENT,
        postponed("quiet hours or debounce"),
    ]


def test_a_debounce_waits_until_the_devices_send_nothing_new() -> None:
    scheduler = leading_scheduler("labelled >= 5", debounce_s=60)
    assert evaluates_in(60) in scheduler.receive(counted("c1", 5))
    scheduler.wait(50)
    assert scheduler.receive(counted("c1", 7)) == [evaluates_in(60)]
    scheduler.wait(59)
    assert scheduler.fire(SchedulerTimer.EVALUATE) == [evaluates_in(1)]
    scheduler.wait(1)
    scheduler.fire(SchedulerTimer.EVALUATE)
    assert scheduler.causes == ["labelled >= 5 on 1 client (c1: 5)"]
    assert scheduler.data.labelled == {"c1": 7}


def test_an_unchanged_check_does_not_prolong_the_debounce() -> None:
    scheduler = leading_scheduler("drift", debounce_s=60)
    scheduler.receive(drift("c1"))
    scheduler.wait(50)
    assert scheduler.receive(checked("c1", drifting=True)) == [evaluates_in(10)]


def test_no_run_becomes_due_while_the_server_cannot_open_one() -> None:
    scheduler = scheduler_without_model("drift")
    assert scheduler.receive(drift("c1")) == []
    assert scheduler.move_server(ServerEvent.MODEL_NOT_BUILT, reason="the app raised") == []
    scheduler.move_server(ServerEvent.MODEL_READY, model=model(1))
    assert scheduler.causes == [DRIFT]


# --- what is published of the schedule ------------------------------------------------------------


def test_a_schedule_publishes_its_rule_and_what_it_waits_for() -> None:
    when = "cron '0 3 1 1 *' or labelled >= 64 on 2 clients"
    scheduler = leading_scheduler(when, overlap="skip", timezone="Asia/Tokyo")
    assert scheduler.data.rule == ScheduleRule(when=when, timezone="Asia/Tokyo", overlap="skip")
    assert scheduler.data.next_at == datetime(2026, 12, 31, 18, tzinfo=UTC), "03:00 in Tokyo"
    scheduler.receive(counted("c1", 70))
    assert scheduler.data.awaits == ("cron '0 3 1 1 *'", "labelled >= 64 on 2 clients (1 so far)")
    scheduler.receive(counted("c2", 64))
    scheduler.fail_run()
    assert scheduler.data.awaits == ("cron '0 3 1 1 *'", "labelled >= 64 on 2 clients (0 so far)")
    assert scheduler.data.fired_for == "labelled >= 64 on 2 clients (c1: 70, c2: 64)"
    assert scheduler.data.fired_at == NOW


def test_a_plan_is_published_only_when_it_changes() -> None:
    scheduler = leading_scheduler("labelled >= 64 on 2 clients")
    for rows in range(10):
        assert scheduler.receive(counted("c1", rows)) == [EVALUATES_BY_EVENT]
    planned = MoveSchedule(
        ScheduleEvent.PLANNED,
        {"next_at": None, "awaits": ("labelled >= 64 on 2 clients (1 so far)",)},
        trace=Trace.NONE,
    )
    assert scheduler.receive(counted("c1", 64)) == [EVALUATES_BY_EVENT, planned]


# --- the start, and other code --------------------------------------------------------------------


def test_a_new_schedule_is_created_with_the_deployed_code() -> None:
    scheduler = new_scheduler("drift")
    data = ScheduleData(
        task=NAME,
        holder="first",
        since=NOW,
        clock_since=NOW,
        code_version=OLD,
        rule=ScheduleRule(when="drift"),
    )
    assert scheduler.start() == [CreateSchedule(data)]


def test_a_task_without_trigger_has_no_schedule() -> None:
    scheduler = leading_scheduler()
    assert scheduler.receive(drift("c1"), counted("c1", 100)) == []
    assert scheduler.fire(SchedulerTimer.EVALUATE) == []
    assert scheduler.schedule is None
    assert scheduler.restart() == []


def test_the_next_scheduler_takes_over_the_schedule() -> None:
    scheduler = leading_scheduler("drift")
    clock_since = scheduler.data.clock_since
    assert scheduler.restart("another") == [
        MoveSchedule(
            ScheduleEvent.TAKEN_OVER,
            {"holder": "another", "clock_since": clock_since, "rule": scheduler.data.rule},
            "another took over the schedule",
        ),
        EVALUATES_BY_EVENT,
    ]


def test_the_next_scheduler_starts_the_run_that_is_due() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.request_run()
    scheduler.receive(drift("c1"))
    assert scheduler.state is ScheduleState.DUE
    assert scheduler.restart()[-1] == postponed(f"{FIRST_RUN} is in progress")
    scheduler.fail_run()
    assert scheduler.causes == ["manual", DRIFT]


def test_a_fired_run_that_was_not_created_is_created() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.receive(drift("c1"))
    scheduler.runs.clear()  # the scheduler ended before it created the run
    taken_over, created, opening = scheduler.start("another")
    assert moves_in([taken_over])[0].event is ScheduleEvent.TAKEN_OVER
    assert created == CreateRun(scheduler.run, "fired before the scheduler restarted", trace=Trace.DUE_RUN)
    assert isinstance(opening, RequestOpening)
    assert (scheduler.run.run, scheduler.data.started) == (FIRST_RUN, 1)
    scheduler.handle(ServiceStarted())
    assert len(scheduler.runs) == 1


def test_new_code_brings_its_plan_and_its_schedule() -> None:
    scheduler = leading_scheduler()
    scheduler.receive(code_published(NEW))
    effects = scheduler.handle(DeployedCodeLoaded(scheduled_task("drift", code=NEW, task={"rounds": 5})))
    assert isinstance(effects[1], CreateSchedule)
    rescheduled = {
        "clock_since": NOW,
        "due_since": None,
        "cause": "",
        "rule": ScheduleRule(when="drift"),
        "next_at": None,
        "awaits": (),
    }
    assert effects[2] == MoveSchedule(ScheduleEvent.RESCHEDULED, rescheduled, f"code {NEW[:12]}")  # type: ignore[arg-type]  # a plain dict of changes
    scheduler.receive(drift("c1"))
    assert scheduler.run.plan == RunPlan(rounds=5)


def test_new_code_withdraws_a_run_that_is_due() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.request_run()
    scheduler.receive(drift("c1"), code_published(NEW))
    assert scheduler.state is ScheduleState.DUE
    effects = scheduler.handle(DeployedCodeLoaded(scheduled_task(code=NEW)))
    assert effects[0] == EVALUATES_BY_EVENT
    assert [one.event for one in moves_in(effects)] == [ScheduleEvent.RESCHEDULED]
    assert (scheduler.state, scheduler.data.rule) == (ScheduleState.WATCHING, None)
    scheduler.fail_run()
    assert scheduler.causes == ["manual"]


def test_code_with_the_same_schedule_changes_nothing() -> None:
    scheduler = leading_scheduler("drift")
    scheduler.receive(code_published(NEW))
    effects = scheduler.handle(DeployedCodeLoaded(scheduled_task("drift", code=NEW)))
    assert effects == [EVALUATES_BY_EVENT]
