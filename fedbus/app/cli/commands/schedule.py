"""`fedbus run schedule`: when each task's next run starts by itself, by which rule, and what it still waits for."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.bus.bus import Seen

OVERLAP: Final = {
    "skip": "the next one is left out",
    "queue": "the next one begins after its end",
    "cancel-running": "it is stopped for the next one",
}
MISSED: Final = {
    "skip": "are let go",
    "once": "are made up for by one run",
    "all": "are each made up for",
}


def schedule(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    json: output.AsJson = False,
) -> None:
    """Tell when the next run starts by itself: the rule, what it waits for, when it last did and why."""
    from fedbus.app.bus_session import lives, now, on_the_bus

    async def look() -> "list[Seen]":
        async with on_the_bus() as bus:
            return [seen for seen in await lives(bus, "schedule") if task in (None, seen.message.task)]

    found = [_facts(seen) for seen in now(look())]
    if json:
        output.as_json(found)
    elif not found:
        output.note(
            "no schedule: runs start when somebody asks. See docs/scheduling.md, or: fedbus run start"
        )
    else:
        for one in found:
            _tell(one)


def _facts(seen: "Seen") -> dict[str, Any]:
    from fedbus.app.bus_session import moved
    from fedbus.contracts.scheduling import ScheduleEvent, ScheduleFacts

    move = moved(seen)
    facts = move.facts
    assert isinstance(facts, ScheduleFacts)
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


def _tell(one: dict[str, Any]) -> None:
    console = output.console()
    console.print(f"[bold]{one['task']}[/]: ", output.state(one["state"]), sep="")
    lines = [*_rule_in_words(one["rule"] or {}), *_next_in_words(one), *_last_in_words(one)]
    for name, text in lines:
        if text:
            console.print(f"  [bold]{name:<15}[/] ", end="")
            console.print(output.printable(str(text)), markup=False)


def _rule_in_words(rule: dict[str, Any]) -> list[tuple[str, str]]:
    if not rule:
        return []
    calm = f"until devices have said nothing new for {rule['debounce_s']:g} s" if rule["debounce_s"] else ""
    return [
        ("starts", rule["when"]),
        ("time zone", rule["timezone"]),
        ("not while", rule["quiet"]),
        ("waits for calm", calm),
        ("while one runs", OVERLAP.get(rule["overlap"], rule["overlap"])),
        ("missed moments", MISSED.get(rule["missed"], rule["missed"])),
        ("at most", f"{rule['at_most']} runs" if rule["at_most"] else ""),
    ]


def _next_in_words(one: dict[str, Any]) -> list[tuple[str, str]]:
    at = f"{one['next_at'].astimezone():%Y-%m-%d %H:%M:%S %Z}" if one["next_at"] else ""
    if one["used_up"]:
        return [("next", f"none: all {one['started']} were started")]
    if one["state"] == "due":
        return [("due to", one["due_to"]), ("held back", one["held_back_by"]), ("next", at)]
    return [("next", at or "as soon as it happens"), *(("waits for", each) for each in one["awaits"])]


def _last_in_words(one: dict[str, Any]) -> list[tuple[str, str]]:
    if not one["fired_at"]:
        return [("last", "none yet")]
    return [("last", f"{one['run']}, {output.ago(one['fired_at'])}"), ("because of", one["fired_for"])]
