"""When the next run is due, from given inputs; the machine's clock has no influence."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.expressions.parser import And, Or
from fedbus.contracts.expressions.trigger import (
    CronCondition,
    DriftCondition,
    IntervalCondition,
    LiveAccuracyCondition,
    NewCodeCondition,
    RowCountCondition,
    TaskFinishedCondition,
    TriggerCondition,
    parse_trigger,
)
from fedbus.contracts.scheduling import ScheduleTable
from fedbus.domain.triggers import (
    MAX_DEBOUNCE_FACTOR,
    MAX_MISSED,
    ClientAccuracy,
    ClientRowCount,
    RunMetric,
    TriggerFired,
    TriggerInputs,
    cron_start_after_restart,
    cron_start_after_run,
    evaluate_trigger,
    first_cron_time,
    next_evaluation,
    quiet_hours_end,
    ready_at,
    unmet_conditions,
)

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")
MOMENTS = st.timedeltas(timedelta(0), timedelta(days=365)).map(lambda later: NEW_YEAR + later)
CONDITIONS: st.SearchStrategy[TriggerCondition] = st.one_of(
    st.sampled_from(
        [
            CronCondition("0 3 * * *"),
            CronCondition("*/7 * * * *"),
            CronCondition("30 2 * * SUN"),
            NewCodeCondition(),
            DriftCondition(1),
            DriftCondition(2),
        ]
    ),
    st.builds(LiveAccuracyCondition, st.sampled_from([0.5, 1.0]), st.integers(1, 3)),
    st.builds(IntervalCondition, st.floats(1, 1e6)),
    st.builds(
        RowCountCondition, st.sampled_from(["labelled", "unlabelled"]), st.integers(1, 50), st.integers(1, 3)
    ),
    st.builds(TaskFinishedCondition, st.sampled_from(["a", "b"])),
)
CLIENTS = st.sampled_from(["c1", "c2", "c3"])
INPUTS = st.builds(
    lambda since, later, **rest: TriggerInputs(since=since, clock_since=since, now=since + later, **rest),
    since=MOMENTS,
    later=st.timedeltas(timedelta(0), timedelta(days=3)),
    is_running=st.booleans(),
    is_first_run=st.booleans(),
    last_ended=st.none() | MOMENTS,
    labelled=st.dictionaries(CLIENTS, st.builds(ClientRowCount, st.integers(0, 60), MOMENTS)),
    unlabelled=st.dictionaries(CLIENTS, st.builds(ClientRowCount, st.integers(0, 60), MOMENTS)),
    drifted=st.dictionaries(CLIENTS, MOMENTS),
    drifted_before=st.frozensets(CLIENTS),
    accuracy=st.dictionaries(CLIENTS, st.builds(ClientAccuracy, st.floats(0, 1), MOMENTS)),
    accuracy_before=st.dictionaries(CLIENTS, st.floats(0, 1)),
    repeat_after=st.timedeltas(timedelta(seconds=1), timedelta(days=3)),
    new_code_at=st.none() | MOMENTS,
    finished=st.dictionaries(st.sampled_from(["a", "b"]), MOMENTS),
)


def make_inputs(**what: Any) -> TriggerInputs:
    return TriggerInputs(
        **{"now": NOON, "since": NOON - timedelta(hours=1), "clock_since": NOON - timedelta(hours=1), **what}
    )


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


# --- laws -----------------------------------------------------------------------------------------


@given(st.lists(CONDITIONS, min_size=2, max_size=4), INPUTS)
def test_or_holds_since_the_first_and_and_since_the_last(
    parts: list[TriggerCondition], what: TriggerInputs
) -> None:
    each = [evaluate_trigger(part, what) for part in parts]
    there = [one.at for one in each if one]
    either, both = evaluate_trigger(Or(tuple(parts)), what), evaluate_trigger(And(tuple(parts)), what)
    assert (either.at if either else None) == min(there, default=None)
    assert (both.at if both else None) == (max(there) if len(there) == len(parts) else None)


@given(st.lists(CONDITIONS, min_size=1, max_size=4), INPUTS)
def test_firing_is_in_the_past_and_the_next_evaluation_is_not(
    parts: list[TriggerCondition], what: TriggerInputs
) -> None:
    either = evaluate_trigger(Or(tuple(parts)), what)
    look = next_evaluation(Or(tuple(parts)), what)
    assert either is None or either.at <= what.now
    assert look is None or look > what.now


@given(st.sampled_from(["0 3 * * *", "30 2 * * *", "*/15 * * * *", "0 0 29 2 *"]), MOMENTS, MOMENTS)
def test_the_next_cron_time_is_later_and_monotonic(text: str, one: datetime, other: datetime) -> None:
    first, second = sorted((one, other))
    after_first = first_cron_time(CronCondition(text), first, BERLIN)
    assert after_first > first
    assert after_first <= first_cron_time(CronCondition(text), second, BERLIN)


@given(CONDITIONS, INPUTS)
def test_a_condition_holds_at_its_next_evaluation(condition: TriggerCondition, what: TriggerInputs) -> None:
    if (look := next_evaluation(condition, what)) is not None:
        later = TriggerInputs(**{**vars(what), "now": look})
        assert evaluate_trigger(condition, later) is not None


# --- conditions ---------------------------------------------------------------------------------------


def test_cron_holds_from_its_time_until_a_run_starts() -> None:
    nightly = parse_trigger("cron '0 3 * * *'")
    since = datetime(2026, 3, 14, 1, tzinfo=UTC)
    asleep = make_inputs(clock_since=since, now=datetime(2026, 3, 14, 2, 59, tzinfo=UTC))
    assert evaluate_trigger(nightly, asleep) is None
    assert next_evaluation(nightly, asleep) == datetime(2026, 3, 14, 3, tzinfo=UTC)
    awake = evaluate_trigger(nightly, make_inputs(clock_since=since, now=NOON))
    assert awake is not None
    assert (awake.at.hour, awake.reason) == (3, "cron '0 3 * * *'")
    assert evaluate_trigger(nightly, make_inputs(clock_since=awake.at, now=NOON)) is None


def test_cron_follows_daylight_saving_time() -> None:
    at_three = CronCondition("0 3 * * *")
    saturday = datetime(2026, 3, 28, 12, tzinfo=UTC)
    sunday = first_cron_time(at_three, saturday, BERLIN)
    assert sunday == datetime(2026, 3, 29, 1, tzinfo=UTC), "03:00 in summer time"
    assert first_cron_time(at_three, sunday, BERLIN) - sunday == timedelta(days=1)
    skipped = first_cron_time(CronCondition("30 2 * * *"), saturday, BERLIN)
    assert skipped == datetime(2026, 3, 29, 1, tzinfo=UTC), (
        "02:30 does not exist that night: it is caught up at once"
    )
    autumn = first_cron_time(CronCondition("30 2 * * *"), datetime(2026, 10, 24, 12, tzinfo=UTC), BERLIN)
    assert first_cron_time(CronCondition("30 2 * * *"), autumn, BERLIN).astimezone(BERLIN).day == 26, (
        "02:30 exists twice, and counts once"
    )


@given(st.lists(CONDITIONS, min_size=1, max_size=4), INPUTS)
def test_no_condition_is_unmet_exactly_if_all_hold(
    parts: list[TriggerCondition], what: TriggerInputs
) -> None:
    everything: And[TriggerCondition] = And(tuple(parts))
    either: Or[TriggerCondition] = Or(tuple(parts))
    assert (unmet_conditions(everything, what) == ()) == (evaluate_trigger(everything, what) is not None)
    assert unmet_conditions(either, what) == unmet_conditions(everything, what)


def test_an_unmet_condition_shows_its_progress() -> None:
    rows = {"c1": ClientRowCount(64, NOON), "c2": ClientRowCount(63, NOON)}
    text = "labelled >= 64 on 2 clients or drift on 3 clients or every 6h or after other"
    so_far = make_inputs(labelled=rows, drifted={"c1": NOON}, is_running=True)
    assert unmet_conditions(parse_trigger(text), so_far) == (
        "labelled >= 64 on 2 clients (1 so far)",
        "drift on 3 clients (1 so far)",
        "every 21600 s, after the current run ends",
        "after other",
    )


def test_a_row_count_must_hold_on_enough_clients() -> None:
    enough = parse_trigger("labelled >= 64 on 2 clients")
    counts = {
        "c1": ClientRowCount(70, NOON - minutes(9)),
        "c2": ClientRowCount(63, NOON - minutes(5)),
        "c3": ClientRowCount(1, NOON),
    }
    assert evaluate_trigger(enough, make_inputs(labelled=counts)) is None
    fired = evaluate_trigger(
        enough, make_inputs(labelled=counts | {"c2": ClientRowCount(64, NOON - minutes(3))})
    )
    assert fired is not None
    assert fired.at == NOON - minutes(3)
    assert fired.reason == "labelled >= 64 on 2 clients (c1: 70, c2: 64)"


def test_low_live_accuracy_counts_like_drift() -> None:
    poor = parse_trigger("live_accuracy < 80% on 2 clients")
    accuracy = {
        "c1": ClientAccuracy(0.5, NOON),
        "c2": ClientAccuracy(0.75, NOON),
        "c3": ClientAccuracy(0.8, NOON),
    }
    why = "live_accuracy < 0.8 on 2 clients (c1: 0.5, c2: 0.75)"
    assert evaluate_trigger(poor, make_inputs(accuracy=accuracy)) == TriggerFired(NOON, why)
    assert evaluate_trigger(
        poor, make_inputs(accuracy=accuracy, accuracy_before={"c1": 0.5, "c2": 0.9})
    ) == TriggerFired(NOON, why)
    uncured = make_inputs(
        accuracy=accuracy, accuracy_before={"c1": 0.1, "c2": 0.79}, repeat_after=timedelta(hours=3)
    )
    assert evaluate_trigger(poor, uncured) is None
    assert next_evaluation(poor, uncured) == uncured.since + timedelta(hours=3)
    assert evaluate_trigger(poor, make_inputs(accuracy={"c1": ClientAccuracy(0.5, NOON)})) is None


def test_drift_that_a_run_did_not_end_counts_a_day_later() -> None:
    both = parse_trigger("drift on 2 clients")
    old, new, day = NOON - timedelta(hours=2), NOON - timedelta(minutes=5), timedelta(days=1)
    assert evaluate_trigger(both, make_inputs(drifted={"c1": old})) is None
    assert evaluate_trigger(
        both, make_inputs(drifted={"c1": old, "c2": new}, drifted_before=["c1"])
    ) == TriggerFired(new, "drift on 2 clients (c1, c2)")
    uncured = make_inputs(drifted={"c1": old, "c2": old}, drifted_before=["c1", "c2", "c3"])
    assert evaluate_trigger(both, uncured) is None
    assert next_evaluation(both, uncured) == uncured.since + day
    later = replace(uncured, now=uncured.since + day)
    assert evaluate_trigger(both, later) == TriggerFired(later.now, "drift on 2 clients (c1, c2)")


@pytest.mark.parametrize(
    ("text", "before", "latest", "holds"),
    [
        ("accuracy drops 0.05", 0.9, 0.84, True),
        ("accuracy drops 0.05", 0.9, 0.86, False),
        ("accuracy drops 0.05", 0.84, 0.9, False),
        ("loss rises 10%", 2.0, 2.3, True),
        ("loss rises 10%", 2.0, 2.1, False),
    ],
)
def test_a_metric_that_got_worse_starts_a_run(text: str, before: float, latest: float, holds: bool) -> None:
    metrics = {"accuracy": RunMetric(before, latest, NOON), "loss": RunMetric(before, latest, NOON)}
    assert (evaluate_trigger(parse_trigger(text), make_inputs(metrics=metrics)) is not None) is holds


def test_a_finished_run_of_another_task_fires() -> None:
    after = parse_trigger("after other")
    assert evaluate_trigger(after, make_inputs(finished={"other": NOON - timedelta(hours=2)})) is None
    assert evaluate_trigger(after, make_inputs(finished={"other": NOON})) is not None


def test_an_interval_starts_at_the_end_of_a_run() -> None:
    hourly = parse_trigger("every 1h")
    assert evaluate_trigger(hourly, make_inputs(is_first_run=True)) is not None
    assert evaluate_trigger(hourly, make_inputs(last_ended=NOON - minutes(59))) is None
    assert next_evaluation(hourly, make_inputs(last_ended=NOON - minutes(59))) == NOON + minutes(1)
    assert evaluate_trigger(hourly, make_inputs(last_ended=NOON - minutes(60))) is not None
    assert evaluate_trigger(hourly, make_inputs(last_ended=NOON - minutes(60), is_running=True)) is None


def test_a_skipped_interval_starts_again() -> None:
    skipped = make_inputs(since=NOON - minutes(10), last_ended=NOON - timedelta(hours=2))
    assert evaluate_trigger(parse_trigger("every 1h"), skipped) is None
    assert next_evaluation(parse_trigger("every 1h"), skipped) == NOON + minutes(50)


# --- debounce, quiet hours and missed times ---------------------------------------------------------------


def schedule(**table: Any) -> ScheduleTable:
    return ScheduleTable.model_validate({name.replace("_", "-"): value for name, value in table.items()})


def test_a_debounce_has_a_limit() -> None:
    calm = schedule(debounce_s=60)
    assert ready_at(calm, due_since=NOON, last_input=None) == NOON + minutes(1)
    assert ready_at(calm, due_since=NOON, last_input=NOON + minutes(3)) == NOON + minutes(4)
    assert ready_at(calm, due_since=NOON, last_input=NOON + minutes(60)) == NOON + minutes(
        MAX_DEBOUNCE_FACTOR
    )


def test_quiet_hours_are_in_the_time_zone_of_the_schedule() -> None:
    office = schedule(quiet="hour in 8..18 and weekday in mon..fri", timezone="Europe/Berlin")
    tuesday = datetime(2026, 3, 17, 9, 7, tzinfo=UTC)  # 10:07 in Berlin
    assert quiet_hours_end(office, tuesday) == datetime(2026, 3, 17, 17, tzinfo=UTC)
    assert quiet_hours_end(office, NOON) == NOON, "a Saturday"
    assert quiet_hours_end(schedule(quiet="hour in 0..24"), NOON) is None


@pytest.mark.parametrize(("missed", "runs"), [("skip", 0), ("once", 1), ("all", 3)])
def test_missed_times_are_skipped_or_caught_up(missed: str, runs: int) -> None:
    hourly, table = parse_trigger("cron '0 * * * *'"), schedule(when="cron '0 * * * *'", missed=missed)
    offline = make_inputs(clock_since=NOON - minutes(150), now=NOON + minutes(30))
    assert evaluate_trigger(hourly, offline) is not None
    clock, started = cron_start_after_restart(table, hourly, offline), 0
    while (
        evaluate_trigger(hourly, now := TriggerInputs(**{**vars(offline), "clock_since": clock})) is not None
    ):
        clock, started = cron_start_after_run(table, hourly, now), started + 1
    assert started == runs


def test_catching_up_missed_times_has_a_limit() -> None:
    often, table = parse_trigger("cron '* * * * *'"), schedule(when="cron '* * * * *'", missed="all")
    offline = make_inputs(clock_since=NOON - timedelta(days=30))
    clock, started = cron_start_after_restart(table, often, offline), 0
    while (
        evaluate_trigger(often, now := TriggerInputs(**{**vars(offline), "clock_since": clock})) is not None
    ):
        clock, started = cron_start_after_run(table, often, now), started + 1
    assert started == MAX_MISSED


@pytest.mark.parametrize(
    "table",
    [
        {"when": "labelled >= 3 on", "every-s": None},
        {"when": "every 1h", "every-s": 3},
        {"timezone": "Mars/Base"},
        {"quiet": "labelled > 3"},
        {"overlap": "pile-up"},
    ],
)
def test_an_invalid_schedule_is_rejected(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        ScheduleTable.model_validate(table)
