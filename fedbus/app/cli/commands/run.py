"""`fedbus run`: start training campaigns, look at them, stop them.

Facts come from the life stream, where the last transition of a run is its state; wishes go
to the workflow scheduler, which may refuse them.
"""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedbus.app.cli.commands.curve import curve
from fedbus.app.cli.commands.schedule import schedule
from fedbus.app.failures import Exit, Failure
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.bus.bus import Bus, Seen
    from fedbus.contracts.run import RoundResult, RunFacts

app = typer.Typer(no_args_is_help=True, help="Start training runs, look at them, stop them.")

SECONDS_TO_REFUSE: Final = 15.0
BEGINNING: Final = "1970-01-01T00:00:00+00:00"

Run = Annotated[str, typer.Argument(help="The run, as `fedbus run ls` calls it.")]
Task = Annotated[str | None, typer.Option(help="The task; needed where there are several.")]


@app.command()
def start(
    *,
    task: Task = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds; default: the task's.")] = None,
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Clients to wait for; default: the task's.")
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", help="Overrides the app's run config: lr=0.1.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, and tell how it goes.")] = False,
    json: output.AsJson = False,
) -> None:
    """Start a run now."""
    from fedbus.app.bus_session import now, on_the_bus, the_task
    from fedbus.contracts.run import StartRun

    overrides = dict(_override(text) for text in config or [])

    async def ask() -> None:
        async with on_the_bus() as bus:
            wish = StartRun(task=await the_task(bus, task), rounds=rounds, quorum=quorum, config=overrides)
            run = (await bus.request(wish, timeout_s=SECONDS_TO_REFUSE)).run
            if json:
                output.as_json({"run": run})
            else:
                output.console().print(f"run {run} is requested. See: fedbus run watch {run}")
            if watch:
                await _follow(bus, await _find(bus, run), json=json)

    now(ask())


@app.command()
def ls(*, task: Task = None, json: output.AsJson = False) -> None:
    """List all runs and how they stand."""
    from fedbus.app.bus_session import lives, now, on_the_bus

    async def look() -> "list[Seen]":
        async with on_the_bus() as bus:
            return [seen for seen in await lives(bus, "run") if task in (None, seen.message.task)]

    runs = [_summary(seen) for seen in now(look())]
    if json:
        output.as_json(runs)
        return
    output.table(
        ("run", "state", "rounds", "loss", "accuracy", "clients", "model", "trigger", "since"),
        [
            (
                run["run"],
                output.state(run["state"]),
                f"{run['rounds_done']}/{run['rounds_planned']}",
                _figure(run["loss"]),
                _figure(run["accuracy"]),
                len(run["cohort"]),
                f"v{run['model_version']}" if run["model_version"] else "",
                run["trigger"],
                output.ago(run["since"]),
            )
            for run in runs
        ],
        empty="no runs yet. Start one: fedbus run start",
    )


@app.command("show")
def show_(run: Run, *, json: output.AsJson = False) -> None:
    """Show one run: how it stands, each round, who took part, who failed and why."""
    from rich.text import Text

    from fedbus.app.bus_session import now, on_the_bus

    async def look() -> "Seen":
        async with on_the_bus() as bus:
            return await _find(bus, run)

    seen = now(look())
    facts = _summary(seen)
    if json:
        output.as_json(facts)
        return
    console = output.console()
    for name in (
        "run",
        "task",
        "state",
        "reason",
        "waits_for",
        "trigger",
        "requested_at",
        "model_version",
        "trace_id",
    ):
        if facts[name]:
            heading = Text(f"{name.replace('_', ' '):<14} ", "bold")
            console.print(heading, Text(output.in_words(facts[name])), sep="")
    console.print()
    _rounds_table(facts["rounds"])


@app.command()
def watch(run: Run, *, json: output.AsJson = False) -> None:
    """Tell how a run goes until it ends; the exit code says how it ended."""
    from fedbus.app.bus_session import now, on_the_bus

    async def look() -> None:
        async with on_the_bus() as bus:
            await _follow(bus, await _find(bus, run), json=json)

    now(look())


@app.command()
def stop(
    run: Run,
    *,
    reason: Annotated[str, typer.Option(help="Why, for the log.")] = "stopped by hand",
    json: output.AsJson = False,
) -> None:
    """Cancel a run: what its last round came to is not published."""
    from fedbus.app.bus_session import now, on_the_bus
    from fedbus.contracts.run import StopRun

    async def ask() -> None:
        async with on_the_bus() as bus:
            task = (await _find(bus, run)).message.task
            await bus.request(StopRun(task=task, run=run, reason=reason), timeout_s=SECONDS_TO_REFUSE)

    now(ask())
    if json:
        output.as_json({"run": run, "stopping": True})
    else:
        output.console().print(f"run {run} is being cancelled")


app.command()(curve)
app.command()(schedule)


# --- reading the log -----------------------------------------------------------------------


async def _find(bus: "Bus", run: str) -> "Seen":
    from fedbus.app.bus_session import lives
    from fedbus.contracts.identifiers import check_id

    found = await lives(bus, "run", thing=check_id("run", run))
    if not found:
        raise Failure(f"no run {run} here. See: fedbus run ls", Exit.NOT_FOUND)
    return found[0]


async def _follow(bus: "Bus", found: "Seen", *, json: bool) -> None:
    """Every move of the run that was *found*, from its first to its last; raises Failure where it did not finish.

    Below them, on a terminal, how far it is.
    """
    from contextlib import aclosing
    from datetime import datetime

    from fedbus.app.bus_session import moved
    from fedbus.app.terminal.event_lines import line, record
    from fedbus.app.terminal.run_progress import progress_shown, told
    from fedbus.app.views.event_tail import until_lost
    from fedbus.bus.streams import life_stream
    from fedbus.contracts import subjects
    from fedbus.contracts.run import RUN, RunState

    console = output.console()
    facts: RunFacts = moved(found).facts  # type: ignore[assignment]
    run = facts.run
    wanted = [subjects.life(bus.fed, "run", run)]
    everything = datetime.fromisoformat(BEGINNING)
    async with (
        bus.watch(life_stream(bus.fed), wanted, since=everything) as stream,
        aclosing(until_lost(bus, stream)) as moves,
        progress_shown(
            bus, run, task=facts.task, since=facts.requested_at, console=console, wanted=not json
        ) as progress,
    ):
        async for seen in moves:
            progress.see(seen)
            if json:
                print(output.to_json(record(seen)), flush=True)
            elif console.is_terminal:
                console.print(told(seen), soft_wrap=False)
            else:
                console.print(line(seen), *_figures(seen))
            move = moved(seen)
            if move.target in RUN.final:
                break
    if move.target != RunState.FINISHED:
        raise Failure(f"run {run} {move.target}: {move.reason or move.event}")


def _figures(seen: "Seen") -> list[str]:
    """What the round came to, on a move that tells of one."""
    from fedbus.app.bus_session import moved
    from fedbus.app.terminal.event_lines import short
    from fedbus.contracts.run import RunEvent

    move = moved(seen)
    rounds = getattr(move.facts, "rounds", ())
    if not rounds or move.event != RunEvent.ROUND_FINISHED:
        return []
    return [f"round {rounds[-1].round}", short(rounds[-1])]


def _summary(seen: "Seen") -> dict[str, Any]:
    from fedbus.app.bus_session import moved

    move = moved(seen)
    facts: RunFacts = move.facts  # type: ignore[assignment]
    trained = [one for one in facts.rounds if one.round > 0]
    last = facts.rounds[-1] if facts.rounds else None
    return {
        "run": facts.run,
        "task": facts.task,
        "state": move.target,
        "event": move.event,
        "reason": move.reason,
        "waits_for": move.waits_for,
        "deadline": move.deadline,
        "since": seen.envelope.time,
        "trigger": facts.trigger,
        "requested_at": facts.requested_at,
        "rounds_planned": facts.plan.rounds,
        "rounds_done": max((one.round for one in trained), default=0),
        "loss": last.loss if last else None,
        "accuracy": last.accuracy if last else None,
        "cohort": list(facts.cohort),
        "model_version": facts.model.version if facts.model else None,
        "sha256": facts.model.sha256 if facts.model else None,
        "trace_id": facts.trace_id,
        "rounds": [_round(one) for one in facts.rounds],
    }


def _round(result: "RoundResult") -> dict[str, Any]:
    return result.model_dump() | {"loss": result.loss, "accuracy": result.accuracy}


def _rounds_table(rounds: list[dict[str, Any]]) -> None:
    output.table(
        ("round", "loss", "accuracy", "seconds", "clients (samples)", "failures"),
        [
            (
                one["round"],
                _figure(one["loss"]),
                _figure(one["accuracy"]),
                f"{one['seconds']:.2f}",
                ", ".join(f"{client} ({samples})" for client, samples in one["participants"].items()),
                ", ".join(f"{client}: {why}" for client, why in one["failures"].items()),
            )
            for one in rounds
        ],
        empty="no round is over yet",
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _override(text: str) -> tuple[str, bool | int | float | str]:
    """``lr=0.1`` as Flower reads it: numbers and booleans are what they look like, the rest is text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Failure(f"{text!r} is not an override: write name=value, as in --config lr=0.1", Exit.USAGE)
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value.strip("'\"")
