"""`fedbus run curve`: the learning curve of a task over all runs, and the metrics of each client."""

import sys
from csv import DictWriter
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedbus.app.bus_session import connect_bus, resolve_task, run_async
from fedbus.app.failures import CliError, ExitCode, report_write_errors
from fedbus.app.terminal import output
from fedbus.app.terminal.chart import needs_log_scale, render_chart
from fedbus.app.terminal.plain import print_json
from fedbus.app.views.learning_curve import CurvePoint, LearningCurve, load_curve

WIDTH: Final = 80
"""Width of the charts without a terminal."""
MAX_WIDTH: Final = 120
HEIGHT: Final = 7
MAX_CLIENTS: Final = 20
BAR_WIDTH: Final = 12
TIME_COLUMNS: Final = {"client": "client", "rounds": "rounds", "failed": "failed", "train_s": "train"} | {
    "transfer_s": "transfer",
    "wait_s": "wait",
    "bar": "",
}
QUALITY_COLUMNS: Final = {
    name: name for name in ("client", "loss", "accuracy", "reliability", "contribution")
}
"""The columns of the two tables, with their headings."""


def curve(
    *,
    task: Annotated[
        str | None, typer.Option(help="The task's id; required if there are several tasks.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only this number of last runs.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rounds to this CSV file.")] = None,
    json: output.JsonOption = False,
) -> None:
    """Draw loss and accuracy over all runs, and list the time, quality and contribution of each client."""

    async def load() -> LearningCurve:
        async with connect_bus() as bus:
            return await load_curve(bus, await resolve_task(bus, task), last=last)

    history = run_async(load())
    if csv is not None:
        _write_csv(csv, history)
    if json:
        print_json(_curve_facts(history))
    elif history.points:
        _draw(history)
    else:
        output.print_note(f"no finished rounds of task {history.task}. Start a run: fedbus run start")


def _draw(history: LearningCurve) -> None:
    console = output.console()
    width = min(console.width, MAX_WIDTH) if sys.stdout.isatty() else WIDTH
    rounds = history.rounds
    begins = {point.run: float(point.step) for point in reversed(rounds)}
    marks = {step: run.rpartition("-")[2] for run, step in begins.items()}
    for name in ("loss", "accuracy"):
        values = [(float(one.step), getattr(one.result, name)) for one in rounds]
        points = [(x, y) for x, y in values if y is not None]
        heights = [y for _, y in points]
        steep = name == "loss" and bool(heights) and needs_log_scale(heights)
        if lines := render_chart(points, width=width, height=HEIGHT, marks=marks, logarithmic=steep):
            scale = ", on a logarithmic scale" if steep else ""
            console.print(f"[bold]{name}[/] of {history.task}: {heights[0]:.4f} → {heights[-1]:.4f}{scale}")
            console.print("\n".join(lines[:-1]), markup=False)
            console.print(f"{'run':>10}{lines[-1][10:]}\n", style="dim", markup=False)
    _draw_clients(history)


def _draw_clients(history: LearningCurve) -> None:
    """Draw the clients, slowest first: the others wait for them."""
    clients = _client_rows(history)
    slowest = sorted(clients, key=lambda one: -(_seconds(one, "train_s") + _seconds(one, "transfer_s")))
    shown = [one | {"bar": _time_bar(one)} for one in slowest[:MAX_CLIENTS]]
    _print_table(TIME_COLUMNS, shown, empty="no client has trained yet")
    if not clients:
        return
    output.console().print("█ train  ▒ transfer  · wait; mean seconds per round\n", style="dim")
    quality = [one | {name: _first_to_last(one[name]) for name in ("loss", "accuracy")} for one in shown]
    _print_table(QUALITY_COLUMNS, quality, empty="")
    output.console().print(
        "loss and accuracy that each client reported, first → last",
        style="dim",
    )
    if len(slowest) > MAX_CLIENTS:
        output.print_note(f"showing the slowest {MAX_CLIENTS} of {len(slowest)} clients. Show all: --json")


def _print_table(columns: dict[str, str], clients: list[dict[str, Any]], *, empty: str) -> None:
    rows = [[_format_cell(one, name) for name in columns] for one in clients]
    output.print_table(list(columns.values()), rows, empty=empty)


def _first_to_last(values: list[float]) -> str | None:
    return f"{values[0]:.4g} → {values[-1]:.4g}" if values else None


def _time_bar(one: dict[str, Any], width: int = BAR_WIDTH) -> str:
    """``███████▒▒···``."""
    parts = [_seconds(one, part) for part in ("train_s", "transfer_s", "wait_s")]
    total = sum(parts)
    if not total or one["transfer_s"] is None:
        return ""
    train, transferred = (round(width * part / total) for part in (parts[0], parts[0] + parts[1]))
    return "█" * train + "▒" * (transferred - train) + "·" * (width - transferred)


def _seconds(one: dict[str, Any], part: str) -> float:
    return one[part] or 0.0


def _format_cell(one: dict[str, Any], name: str) -> str:
    value = one[name]
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- JSON and CSV --------------------------------------------------------------------------------


def _curve_facts(history: LearningCurve) -> dict[str, Any]:
    rounds = [_round_facts(point) | {"clients": point.clients} for point in history.points]
    return {"task": history.task, "rounds": rounds, "clients": _client_rows(history)}


def _round_facts(point: CurvePoint) -> dict[str, Any]:
    result = point.result
    return {
        "run": point.run,
        "round": result.round,
        "step": point.step,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "seconds": result.seconds,
        "participants": len(result.participants),
        "failures": len(result.failures),
        "samples": sum(result.participants.values()),
    } | {part: point.mean_s(part) for part in ("train_s", "transfer_s", "wait_s")}


def _client_rows(history: LearningCurve) -> list[dict[str, Any]]:
    return [
        {
            "client": client,
            "rounds": stats.rounds,
            "failed": stats.failed,
            "samples": stats.samples,
            "reliability": stats.reliability,
            "contribution": stats.contribution,
            "loss": history.series_of(client, "loss"),
            "accuracy": history.series_of(client, "accuracy"),
            "train_s": stats.train_s,
            "transfer_s": None,
            "wait_s": None,
        }
        | (history.times_of(client) or {})
        for client, stats in history.client_stats.items()
    ]


def _write_csv(path: Path, history: LearningCurve) -> None:
    """Write the rounds as CSV.

    Raises:
        CliError: There are no rounds, or the file cannot be written.

    """
    rounds = [_round_facts(point) for point in history.points]
    if not rounds:
        raise CliError(f"no finished rounds of task {history.task}: nothing to write", ExitCode.NOT_FOUND)
    with report_write_errors(path), path.open("w", newline="") as file:
        writer = DictWriter(file, fieldnames=list(rounds[0]))
        writer.writeheader()
        writer.writerows(rounds)
    output.print_note(f"wrote {len(rounds)} rounds to {path}")
