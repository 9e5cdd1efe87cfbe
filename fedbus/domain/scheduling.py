"""When the next run starts by itself."""

from datetime import datetime, timedelta

from fedbus.contracts.task import ScheduleTable


def next_start(
    schedule: ScheduleTable, *, started: int, last_ended: datetime | None, now: datetime
) -> datetime | None:
    """The time of the next scheduled run, or None where there is none.

    *started* counts the runs that the schedule has started so far; the first is due at once, each
    further one *every_s* after the last run ended, whoever started that.
    """
    if schedule.every_s is None or started >= (schedule.at_most or started + 1):
        return None
    if last_ended is None:
        return now
    return max(now, last_ended + timedelta(seconds=schedule.every_s))
