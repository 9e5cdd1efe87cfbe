"""When the next run starts by itself."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from fedbus.contracts.scheduling import ScheduleTable
from fedbus.domain.scheduling import next_start

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
seconds = st.floats(0.001, 1e6)
whens = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 (Hypothesis adds the zone)


def every(seconds: float, at_most: int | None = None) -> ScheduleTable:
    return ScheduleTable.model_validate({"every-s": seconds, "at-most": at_most})


def test_a_task_without_a_schedule_is_started_by_hand() -> None:
    assert next_start(ScheduleTable(), started=0, last_ended=None, now=NOON) is None


def test_the_first_run_is_due_at_once() -> None:
    assert next_start(every(3600), started=0, last_ended=None, now=NOON) == NOON


def test_the_next_is_due_so_long_after_the_last_has_ended() -> None:
    due = next_start(every(3600), started=1, last_ended=NOON, now=NOON + timedelta(seconds=10))
    assert due == NOON + timedelta(hours=1)


def test_what_was_due_while_nobody_was_there_is_due_now_and_once() -> None:
    later = NOON + timedelta(days=3)
    assert next_start(every(3600), started=1, last_ended=NOON, now=later) == later


def test_no_more_than_so_many() -> None:
    assert next_start(every(1, at_most=2), started=1, last_ended=NOON, now=NOON) is not None
    assert next_start(every(1, at_most=2), started=2, last_ended=NOON, now=NOON) is None


@given(seconds, st.integers(0, 10), st.one_of(st.none(), whens), whens)
def test_a_run_is_never_due_in_the_past_nor_sooner_than_every_s_after_the_last(
    every_s: float, started: int, last_ended: datetime | None, now: datetime
) -> None:
    due = next_start(every(every_s), started=started, last_ended=last_ended, now=now)
    assert due is not None
    assert due >= now
    if last_ended is not None:
        assert due >= last_ended + timedelta(seconds=every_s)
