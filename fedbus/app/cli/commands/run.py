"""`fedbus run`: start, show, watch and stop runs.

The state of a run is its last transition in the lifecycle stream. Requests go to the workflow scheduler, which may
refuse them.
"""

from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from fedbus.app.bus_session import connect_bus, latest_transitions, resolve_task, run_async, transition_of
from fedbus.app.cli.options import AggregationOption, ModeOption, parse_aggregation, parse_override
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.event_lines import message_record, render_line, short_text
from fedbus.app.terminal.plain import print_json, to_json
from fedbus.app.terminal.run_progress import render_transition, show_progress
from fedbus.app.terminal.top_screen import rounds_done
from fedbus.app.views.event_tail import read_until_lost
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.identifiers import check_id
from fedbus.contracts.run import RUN, RoundResult, RunData, RunEvent, RunState, StartRun, StopRun

REQUEST_TIMEOUT_S: Final = 15.0
EPOCH: Final = "1970-01-01T00:00:00+00:00"

RunArgument = Annotated[str, typer.Argument(help="The run's id, from `fedbus run ls`.")]
TaskOption = Annotated[str | None, typer.Option(help="The task's id; required if there are several tasks.")]


def start(
    *,
    task: TaskOption = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds.", show_default="the task's")
    ] = None,
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Number of clients to wait for.", show_default="the task's")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help="Override a value of the run configuration: lr=0.1. Repeatable."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the random numbers of all processes of the run.", show_default="none"
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Add updates in the order of client names; takes memory for all of them."
        ),
    ] = False,
    mode: ModeOption = None,
    aggregation: AggregationOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the run ends.")] = False,
    json: output.JsonOption = False,
) -> None:
    """Start a run now."""
    aggregation_overrides = parse_aggregation(mode, aggregation)
    overrides = dict(parse_override(text, "--config") for text in config or [])

    async def send() -> None:
        async with connect_bus() as bus:
            request = StartRun(
                task=await resolve_task(bus, task),
                rounds=rounds,
                quorum=quorum,
                config=overrides,
                seed=seed,
                deterministic=deterministic or None,
                aggregation=aggregation_overrides,
            )
            run = (await bus.request(request, timeout_s=REQUEST_TIMEOUT_S)).run
            if json:
                print_json({"run": run})
            else:
                output.console().print(f"requested run {run}. See: fedbus run watch {run}")
            if watch:
                await _watch_run(bus, await _find_run(bus, run), json=json)

    run_async(send())


def ls(
    *,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    json: output.JsonOption = False,
) -> None:
    """List all runs and their states."""

    async def load() -> list[StoredMessage]:
        async with connect_bus() as bus:
            return [
                stored
                for stored in await latest_transitions(bus, RUN.kind)
                if task in (None, stored.message.task)
            ]

    runs = [_run_facts(stored) for stored in run_async(load())]
    if json:
        print_json(runs)
        return
    output.print_table(
        ("run", "state", "rounds", "loss", "accuracy", "clients", "model", "trigger", "since"),
        [
            (
                run["run"],
                output.state_text(run["state"]),
                "/".join(str(run[key]) for key in ("rounds_done", "rounds_planned") if run[key] is not None),
                _format_number(run["loss"]),
                _format_number(run["accuracy"]),
                len(run["cohort"]),
                f"v{run['model_version']}" if run["model_version"] else "",
                run["trigger"],
                output.format_age(run["since"]),
            )
            for run in runs
        ],
        empty="no runs yet. Start one: fedbus run start",
    )


def show(run: RunArgument, *, json: output.JsonOption = False) -> None:
    """Show one run: its state, and each round with its participants and failures."""

    async def load() -> StoredMessage:
        async with connect_bus() as bus:
            return await _find_run(bus, run)

    stored = run_async(load())
    facts = _run_facts(stored)
    if json:
        print_json(facts)
        return
    console = output.console()
    for name in (
        "run",
        "task",
        "state",
        "reason",
        "waits_for",
        "trigger",
        "aggregation",
        "seed",
        "deterministic",
        "requested_at",
        "model_version",
        "evaluation_failure",
        "trace_id",
    ):
        is_known = bool(facts[name]) or (name == "seed" and facts[name] is not None)  # a seed may be 0
        if is_known and not (name == "evaluation_failure" and facts[name] in facts["reason"]):
            heading = Text(f"{name.replace('_', ' '):<18} ", "bold")
            console.print(heading, Text(output.format_value(facts[name])), sep="")
    console.print()
    _rounds_table(facts["rounds"])


def watch(run: RunArgument, *, json: output.JsonOption = False) -> None:
    """Show a run's progress until it ends; the exit code is 0 if it finished."""

    async def follow() -> None:
        async with connect_bus() as bus:
            await _watch_run(bus, await _find_run(bus, run), json=json)

    run_async(follow())


def stop(
    run: RunArgument,
    *,
    reason: Annotated[str, typer.Option(help="Reason, for the event stream.")] = "stopped by hand",
    json: output.JsonOption = False,
) -> None:
    """Cancel a run; the result of its last round is not published."""

    async def send() -> None:
        async with connect_bus() as bus:
            task = (await _find_run(bus, run)).message.task
            await bus.request(StopRun(task=task, run=run, reason=reason), timeout_s=REQUEST_TIMEOUT_S)

    run_async(send())
    if json:
        print_json({"run": run, "stopping": True})
    else:
        output.console().print(f"run {run} is being cancelled")


# --- transitions ---------------------------------------------------------------------------


async def _find_run(bus: Bus, run: str) -> StoredMessage:
    transitions = await latest_transitions(bus, RUN.kind, key=check_id("run", run))
    if not transitions:
        raise CliError(f"no run {run} in this federation. See: fedbus run ls", ExitCode.NOT_FOUND)
    return transitions[0]


async def _watch_run(bus: Bus, latest: StoredMessage, *, json: bool) -> None:
    """Print all transitions of the run in *latest*, until its last; on a terminal with a progress display below.

    Raises:
        CliError: The run failed or was cancelled.

    """
    console = output.console()
    facts: RunData = transition_of(latest).facts  # type: ignore[assignment]
    run = facts.run
    subject_filter = [subjects.lifecycle(bus.fed, "run", run)]
    epoch = datetime.fromisoformat(EPOCH)
    async with (
        bus.read_stream(lifecycle_stream(bus.fed), subject_filter, since=epoch) as stream,
        aclosing(read_until_lost(bus, stream)) as transitions,
        show_progress(
            bus, run, task=facts.task, since=facts.requested_at, console=console, wanted=not json
        ) as progress,
    ):
        async for stored in transitions:
            progress.apply(stored)
            if json:
                print(to_json(message_record(stored)), flush=True)
            elif console.is_terminal:
                console.print(render_transition(stored), soft_wrap=False)
            else:
                console.print(render_line(stored), *_round_figures(stored))
            transition = transition_of(stored)
            if transition.target in RUN.final:
                break
    if transition.target != RunState.FINISHED:
        raise CliError(f"run {run} {transition.target}: {transition.reason or transition.event}")


def _round_figures(stored: StoredMessage) -> list[str]:
    """Return the result of a round, if the transition ends one."""
    transition = transition_of(stored)
    rounds = getattr(transition.facts, "rounds", ())
    if not rounds or transition.event != RunEvent.ROUND_FINISHED:
        return []
    return [f"round {rounds[-1].round}", short_text(rounds[-1])]


def _run_facts(stored: StoredMessage) -> dict[str, Any]:
    transition = transition_of(stored)
    facts: RunData = transition.facts  # type: ignore[assignment]
    done = rounds_done(facts)
    last = facts.rounds[-1] if facts.rounds else None
    return {
        "run": facts.run,
        "task": facts.task,
        "state": transition.target,
        "event": transition.event,
        "reason": transition.reason,
        "waits_for": transition.waits_for,
        "deadline": transition.deadline,
        "since": stored.envelope.time,
        "trigger": facts.trigger,
        "seed": facts.plan.seed,
        "deterministic": facts.plan.deterministic,
        "requested_at": facts.requested_at,
        "rounds_planned": facts.plan.total_rounds_after(
            done, is_finished=transition.target == RunState.FINISHED
        )
        or None,
        "rounds_done": done,
        "loss": last.loss if last else None,
        "accuracy": last.accuracy if last else None,
        "aggregation": describe_mode(facts),
        "cohort": list(facts.cohort),
        "model_version": facts.model.version if facts.model else None,
        "evaluation_failure": last.evaluation_failure if last else "",
        "sha256": facts.model.sha256 if facts.model else None,
        "trace_id": facts.trace_id,
        "rounds": [_round_facts(one) for one in facts.rounds],
    }


def _round_facts(result: RoundResult) -> dict[str, Any]:
    return result.model_dump() | {"loss": result.loss, "accuracy": result.accuracy}


def describe_mode(facts: RunData) -> str:
    """Return the aggregation mode of the finished rounds, and the keys that the run overrides: ``async, alpha=0.5``."""
    overrides = {name: value for name, value in facts.plan.aggregation.items() if name != "mode"}
    modes = [one.mode for one in facts.rounds if one.mode] or [str(facts.plan.aggregation.get("mode", ""))]
    return ", ".join(filter(None, [modes[-1], *(f"{name}={value}" for name, value in overrides.items())]))


def _rounds_table(rounds: list[dict[str, Any]]) -> None:
    has_mode = any(one["mode"] for one in rounds)
    output.print_table(
        (
            "round",
            "loss",
            "accuracy",
            "seconds",
            *(("updates", "late", "dropped", "staleness") if has_mode else ()),
            "clients (samples)",
            "failures",
        ),
        [
            (
                one["round"],
                _format_number(one["loss"]),
                _format_number(one["accuracy"]),
                f"{one['seconds']:.2f}",
                *(_update_cells(one) if has_mode else ()),
                ", ".join(f"{client} ({samples})" for client, samples in one["participants"].items()),
                ", ".join(f"{client}: {why}" for client, why in one["failures"].items()),
            )
            for one in rounds
        ],
        empty="no finished rounds yet",
    )


def _update_cells(one: dict[str, Any]) -> tuple[str | int, ...]:
    """Return the cells of an aggregation: updates, late and dropped ones, and the staleness of those that are late."""
    if not one["mode"]:
        return ("", "", "", "")
    stale = ", ".join(f"{client} {staleness}" for client, staleness in one["staleness"].items() if staleness)
    return (one["updates"], one["late_merged"] or "", one["late_dropped"] or "", stale)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
