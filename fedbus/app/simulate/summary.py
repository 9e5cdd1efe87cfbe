"""What `fedbus simulate` prints before the first round, for each round as JSON, and at the end."""

import shlex
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from fedbus.app.simulate.preparation import PreparedSimulation
from fedbus.app.simulate.publishing import PublishedModel
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import pluralize, print_json
from fedbus.app.terminal.trace_waterfall import format_duration
from fedbus.contracts.run import RoundResult
from fedbus.contracts.task.aggregation import AggregationMode
from fedbus.simulation.settings import SimulationSettings

_UPDATE_FIELDS: Final = {"mode", "updates", "staleness", "late_merged", "late_dropped"}
"""The fields of a round whose aggregation mode is not ``sync``."""


def print_head(prepared: PreparedSimulation, settings: SimulationSettings, console: Console) -> None:
    """Print the settings in one line, unless the output is JSON."""
    if prepared.options.json:
        return
    config = prepared.config
    parts = [
        pluralize(config.clients, "client"),
        f"cohort {config.cohort}" if config.cohort else "",
        f"rounds {prepared.first_round} to {config.rounds}"
        if config.rounds and prepared.first_round > 1
        else pluralize(config.rounds, "round")
        if config.rounds
        else "",
        f"partition {config.partition}" if config.partition else "",
        *_describe_aggregation(prepared),
        f"profile {prepared.options.profile}" if prepared.options.profile else "",
        pluralize(settings.worker_count, "worker"),
        f"{len(settings.gpus)} GPUs" if settings.gpus else "",
        f"seed {config.seed}",
        "deterministic" if config.deterministic else "",
    ]
    line = f"{prepared.name}: {', '.join(filter(None, parts))}"
    console.print(Text(line), soft_wrap=True)


def _describe_aggregation(prepared: PreparedSimulation) -> list[str]:
    """Describe the aggregation mode, also that of the task, and the other keys that the options override."""
    overrides = prepared.config.aggregation
    mode = prepared.task.table.aggregation.override(overrides).mode
    shown = {} if mode is AggregationMode.SYNC and "mode" not in overrides else {"mode": mode.value}
    return [f"{name} {value}" for name, value in {**shown, **overrides}.items()]


def print_summary(prepared: PreparedSimulation, published: PublishedModel | None, console: Console) -> None:
    """Print the results and the next commands, or one JSON object."""
    rounds = prepared.folder.read_rounds()
    facts = _summary(prepared, rounds, published)
    if prepared.options.json:
        print_json(facts)
        return
    last = rounds[-1] if rounds else None
    trained = sum(len(one.participants) for one in rounds)
    figures = [f"loss {last.loss:.4f}" if last and last.loss is not None else ""]
    figures += [f"accuracy {last.accuracy:.2%}" if last and last.accuracy is not None else ""]
    count = pluralize(sum(one.round > 0 for one in rounds), "round")
    has_profile = bool(prepared.config.profile)
    clock = " of real time" if has_profile else ""
    head = f"{prepared.name} finished: {count} in {format_duration(facts['seconds'])}{clock}"
    console.print(Text("  ".join(filter(None, [head, *figures])), "bold"), soft_wrap=True)
    rows = [("trained", f"{trained} client updates, {facts['clients_per_s']:.1f} a second{clock}")]
    if has_profile:
        simulated_s = facts["simulated_s"]
        speed = (
            f", {trained / simulated_s:.1f} client updates a second of virtual time" if simulated_s else ""
        )
        rows.append(("virtual time", f"{format_duration(simulated_s)}{speed}"))
    if facts["peak_memory_bytes"]:
        rows.append(
            ("peak memory", f"{output.format_size(facts['peak_memory_bytes'])}, all processes together")
        )
    rows.append(("results", _short_path(prepared.folder.path)))
    if published:
        standing = "the champion" if published.is_champion else "not the champion"
        rows.append(("published", f"version {published.manifest.version}, {standing}: {published.reason}"))
    rows.append(("next", _next_commands(prepared, published)))
    for name, text in rows:
        line = Text.assemble((f"  {name:<12} ", "dim"), text)
        console.print(line, soft_wrap=True, highlight=False)


def _next_commands(prepared: PreparedSimulation, published: PublishedModel | None) -> str:
    commands = [f"fedbus trace {prepared.name}"]
    if published:
        commands.append(f"fedbus model show {published.manifest.version}")
        commands.append(f"fedbus up --task {shlex.quote(prepared.options.task)}")
    else:
        commands.append(f"{resume_command(prepared)} --publish")
    return " · ".join(commands)


def _summary(
    prepared: PreparedSimulation, rounds: list[RoundResult], published: PublishedModel | None
) -> dict[str, Any]:
    record, last = prepared.folder.record, rounds[-1] if rounds else None
    seconds = record.seconds if record.config.profile else sum(one.seconds for one in rounds)
    trained = sum(len(one.participants) for one in rounds)
    return {
        "simulation": record.simulation,
        "state": record.state,
        "rounds": sum(one.round > 0 for one in rounds),
        "loss": last.loss if last else None,
        "accuracy": last.accuracy if last else None,
        "seconds": record.seconds,
        "simulated_s": record.simulated_s,
        "clients_per_s": trained / seconds if seconds else 0.0,
        "peak_memory_bytes": record.peak_memory_bytes,
        "results": str(prepared.folder.path.absolute()),
        "model_sha256": record.model_sha256,
        "trace_id": record.trace_parent.split("-")[1] if record.trace_parent else "",
        "published": published.facts if published else None,
    }


def round_facts(result: RoundResult) -> dict[str, Any]:
    """Return the line of a round with ``--json``."""
    return {
        "round": result.round,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "metrics": result.metrics,
        "seconds": result.seconds,
        "clients": len(result.participants),
        "samples": sum(result.participants.values()),
        "failures": result.failures,
        **(result.model_dump(include=_UPDATE_FIELDS) if result.mode else {}),
    }


def resume_command(prepared: PreparedSimulation) -> str:
    """Return the command that continues the simulation."""
    task, out = shlex.quote(prepared.options.task), shlex.quote(_short_path(prepared.folder.path))
    return f"fedbus simulate {task} --out {out} --resume"


def _short_path(path: Path) -> str:
    """Return *path* relative to the working directory if it is inside of it."""
    absolute = path.absolute()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)
