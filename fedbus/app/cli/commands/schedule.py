"""`fedbus run schedule`: the schedule of each task, its next run and the conditions that are not met yet."""

from typing import Annotated, Any, Final

import typer

from fedbus.app.bus_session import connect_bus, latest_transitions, run_async, transition_of
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json, printable
from fedbus.bus.stream_reader import StoredMessage
from fedbus.contracts.scheduling import SCHEDULE, ScheduleData, ScheduleEvent, ScheduleState

OVERLAP_TEXT: Final = {
    "skip": "skip the next run",
    "queue": "start the next run after it ends",
    "cancel-running": "cancel it and start the next run",
}
MISSED_TEXT: Final = {
    "skip": "skip them",
    "once": "start one run for all of them",
    "all": "start one run for each",
}


def schedule(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Show each schedule: its trigger, the next run and what it waits for, and the last run."""

    async def load() -> list[StoredMessage]:
        async with connect_bus() as bus:
            return [
                stored
                for stored in await latest_transitions(bus, SCHEDULE.kind)
                if task in (None, stored.message.task)
            ]

    schedules = [_schedule_facts(stored) for stored in run_async(load())]
    if json:
        print_json(schedules)
    elif not schedules:
        output.print_note(
            "no schedule: runs start on request only. See docs/scheduling.md, or start one: fedbus run start"
        )
    else:
        for one in schedules:
            _print_schedule(one)


def _schedule_facts(stored: StoredMessage) -> dict[str, Any]:
    transition = transition_of(stored)
    facts = transition.facts
    assert isinstance(facts, ScheduleData)
    rule = facts.rule.model_dump() if facts.rule else None
    used_up = (
        facts.rule is not None and facts.rule.at_most is not None and facts.started >= facts.rule.at_most
    )
    is_due = transition.target == ScheduleState.DUE
    return {
        "task": facts.task,
        "state": transition.target,
        "rule": rule,
        "next_at": transition.deadline if is_due else None if used_up else facts.next_at,
        "awaits": [] if used_up else list(facts.awaits),
        "used_up": used_up,
        "due_to": facts.cause,
        "held_back_by": transition.reason if transition.event == ScheduleEvent.POSTPONED else "",
        "started": facts.started,
        "run": facts.run,
        "fired_at": facts.fired_at,
        "fired_for": facts.fired_for,
        "holder": facts.holder,
    }


def _print_schedule(one: dict[str, Any]) -> None:
    console = output.console()
    console.print(f"[bold]{one['task']}[/]: ", output.state_text(one["state"]), sep="")
    lines = [*_describe_rule(one["rule"] or {}), *_describe_next(one), *_describe_last(one)]
    for name, text in lines:
        if text:
            console.print(f"  [bold]{name:<15}[/] ", end="")
            console.print(printable(str(text)), markup=False)


def _describe_rule(rule: dict[str, Any]) -> list[tuple[str, str]]:
    if not rule:
        return []
    debounce = f"until no new event for {rule['debounce_s']:g} s" if rule["debounce_s"] else ""
    return [
        ("trigger", rule["when"]),
        ("time zone", rule["timezone"]),
        ("quiet hours", rule["quiet"]),
        ("debounce", debounce),
        ("during a run", OVERLAP_TEXT.get(rule["overlap"], rule["overlap"])),
        ("missed times", MISSED_TEXT.get(rule["missed"], rule["missed"])),
        ("at most", f"{rule['at_most']} runs" if rule["at_most"] else ""),
    ]


def _describe_next(one: dict[str, Any]) -> list[tuple[str, str]]:
    at = f"{one['next_at'].astimezone():%Y-%m-%d %H:%M:%S %Z}" if one["next_at"] else ""
    if one["used_up"]:
        return [("next run", f"none: all {one['started']} runs were started")]
    if one["state"] == ScheduleState.DUE:
        return [("due because", one["due_to"]), ("postponed", one["held_back_by"]), ("next run", at)]
    return [
        ("next run", at or "as soon as the trigger fires"),
        *(("waits for", each) for each in one["awaits"]),
    ]


def _describe_last(one: dict[str, Any]) -> list[tuple[str, str]]:
    if not one["fired_at"]:
        return [("last run", "none yet")]
    return [
        ("last run", f"{one['run']}, {output.format_age(one['fired_at'])}"),
        ("started by", one["fired_for"]),
    ]
