"""`fedbus run schedule`: when each task's next run starts by itself, by which rule, and what it still waits for."""

from typing import Annotated, Any, Final

import typer

from fedbus.app.bus_session import connect_bus, latest_transitions, run_async, transition_of
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json, printable
from fedbus.bus.bus import StoredMessage
from fedbus.contracts.scheduling import ScheduleData, ScheduleEvent

OVERLAP_TEXT: Final = {
    "skip": "the next one is left out",
    "queue": "the next one begins after its end",
    "cancel-running": "it is stopped for the next one",
}
MISSED_TEXT: Final = {
    "skip": "are let go",
    "once": "are made up for by one run",
    "all": "are each made up for",
}


def schedule(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Show the schedule: its rule, the next run, what that waits for, and the last run with its trigger."""

    async def look() -> list[StoredMessage]:
        async with connect_bus() as bus:
            return [
                seen
                for seen in await latest_transitions(bus, "schedule")
                if task in (None, seen.message.task)
            ]

    found = [_schedule_facts(seen) for seen in run_async(look())]
    if json:
        print_json(found)
    elif not found:
        output.print_note(
            "no schedule: runs start on request only. See docs/scheduling.md, or: fedbus run start"
        )
    else:
        for one in found:
            _print_schedule(one)


def _schedule_facts(seen: StoredMessage) -> dict[str, Any]:
    move = transition_of(seen)
    facts = move.facts
    assert isinstance(facts, ScheduleData)
    rule = facts.rule.model_dump() if facts.rule else None
    used_up = (
        facts.rule is not None and facts.rule.at_most is not None and facts.started >= facts.rule.at_most
    )
    return {
        "task": facts.task,
        "state": move.target,
        "rule": rule,
        "next_at": move.deadline if move.target == "due" else None if used_up else facts.next_at,
        "awaits": [] if used_up else list(facts.awaits),
        "used_up": used_up,
        "due_to": facts.cause,
        "held_back_by": move.reason if move.event == ScheduleEvent.POSTPONED else "",
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
    calm = f"until devices have said nothing new for {rule['debounce_s']:g} s" if rule["debounce_s"] else ""
    return [
        ("starts", rule["when"]),
        ("time zone", rule["timezone"]),
        ("not while", rule["quiet"]),
        ("waits for calm", calm),
        ("while one runs", OVERLAP_TEXT.get(rule["overlap"], rule["overlap"])),
        ("missed moments", MISSED_TEXT.get(rule["missed"], rule["missed"])),
        ("at most", f"{rule['at_most']} runs" if rule["at_most"] else ""),
    ]


def _describe_next(one: dict[str, Any]) -> list[tuple[str, str]]:
    at = f"{one['next_at'].astimezone():%Y-%m-%d %H:%M:%S %Z}" if one["next_at"] else ""
    if one["used_up"]:
        return [("next", f"none: all {one['started']} were started")]
    if one["state"] == "due":
        return [("due to", one["due_to"]), ("held back", one["held_back_by"]), ("next", at)]
    return [("next", at or "as soon as it happens"), *(("waits for", each) for each in one["awaits"])]


def _describe_last(one: dict[str, Any]) -> list[tuple[str, str]]:
    if not one["fired_at"]:
        return [("last", "none yet")]
    return [("last", f"{one['run']}, {output.format_age(one['fired_at'])}"), ("because of", one["fired_for"])]
