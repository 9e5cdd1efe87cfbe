"""`fedbus run curve`: how a task has learnt over all of its runs, and each of its clients in it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedbus.app.failures import Exit, Failure, writing
from fedbus.app.terminal import output

if TYPE_CHECKING:
    from fedbus.app.views.learning_curve import Curve, Point

WIDTH: Final = 80
"""Of the charts where there is no terminal that has one."""
WIDEST: Final = 120
HEIGHT: Final = 7
CLIENTS_SHOWN: Final = 20
BAR: Final = 12
TIMES: Final = {"client": "client", "rounds": "rounds", "failed": "failed", "train_s": "train"} | {
    "transfer_s": "transfer",
    "wait_s": "wait",
    "bar": "",
}
WORTH: Final = {name: name for name in ("client", "loss", "accuracy", "reliability", "contribution")}
"""Columns of the two tables, with their titles."""


def curve(
    *,
    task: Annotated[str | None, typer.Option(help="The task; needed where there are several.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only its last runs, so many.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rounds into this file, a line each.")] = None,
    json: output.AsJson = False,
) -> None:
    """Draw loss and accuracy over all runs, and what each client's are, where its time went and what it brings."""
    from fedbus.app.bus_session import now, on_the_bus, the_task
    from fedbus.app.views.learning_curve import curve_of

    async def look() -> "Curve":
        async with on_the_bus() as bus:
            return await curve_of(bus, await the_task(bus, task), last=last)

    found = now(look())
    if csv is not None:
        _write(csv, found)
    if json:
        output.as_json(_facts(found))
    elif found.points:
        _draw(found)
    else:
        output.note(f"no round of {found.task} is over yet. Start a run: fedbus run start")


def _draw(found: "Curve") -> None:
    from fedbus.app.terminal.chart import chart, is_steep

    console = output.console()
    width = min(console.width, WIDEST) if sys.stdout.isatty() else WIDTH
    rounds = found.rounds
    begins = {point.run: float(point.step) for point in reversed(rounds)}
    marks = {step: run.rpartition("-")[2] for run, step in begins.items()}
    for name in ("loss", "accuracy"):
        values = [(float(one.step), getattr(one.result, name)) for one in rounds]
        known = [(x, y) for x, y in values if y is not None]
        heights = [y for _, y in known]
        steep = name == "loss" and bool(heights) and is_steep(heights)
        if lines := chart(known, width=width, height=HEIGHT, marks=marks, logarithmic=steep):
            scale = ", on a logarithmic scale" if steep else ""
            console.print(f"[bold]{name}[/] of {found.task}: {heights[0]:.4f} → {heights[-1]:.4f}{scale}")
            console.print("\n".join(lines[:-1]), markup=False)
            console.print(f"{'run':>10}{lines[-1][10:]}\n", style="dim", markup=False)
    _draw_clients(found)


def _draw_clients(found: "Curve") -> None:
    """The slowest first: they are whom the others wait for."""
    clients = _clients(found)
    slowest = sorted(clients, key=lambda one: -(_seconds(one, "train_s") + _seconds(one, "transfer_s")))
    shown = [one | {"bar": _bar(one)} for one in slowest[:CLIENTS_SHOWN]]
    _table(TIMES, shown, empty="no client has trained yet")
    if not clients:
        return
    output.console().print("█ train  ▒ transfer  · wait; seconds a round, on average\n", style="dim")
    learnt = [one | {name: _way(one[name]) for name in ("loss", "accuracy")} for one in shown]
    _table(WORTH, learnt, empty="")
    output.console().print(
        "loss and accuracy as each client tells of itself, first → last",
        style="dim",
    )
    if len(slowest) > CLIENTS_SHOWN:
        output.note(f"the slowest {CLIENTS_SHOWN} of {len(slowest)} clients; all of them: --json")


def _table(columns: dict[str, str], clients: list[dict[str, Any]], *, empty: str) -> None:
    rows = [[_cell(one, name) for name in columns] for one in clients]
    output.table(list(columns.values()), rows, empty=empty)


def _way(values: list[float]) -> str | None:
    return f"{values[0]:.4g} → {values[-1]:.4g}" if values else None


def _bar(one: dict[str, Any], width: int = BAR) -> str:
    """``███████▒▒···``."""
    parts = [_seconds(one, part) for part in ("train_s", "transfer_s", "wait_s")]
    whole = sum(parts)
    if not whole or one["transfer_s"] is None:
        return ""
    train, away = (round(width * part / whole) for part in (parts[0], parts[0] + parts[1]))
    return "█" * train + "▒" * (away - train) + "·" * (width - away)


def _seconds(one: dict[str, Any], part: str) -> float:
    return one[part] or 0.0


def _cell(one: dict[str, Any], name: str) -> str:
    value = one[name]
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- for programs --------------------------------------------------------------------------------


def _facts(found: "Curve") -> dict[str, Any]:
    rounds = [_round(point) | {"clients": point.clients} for point in found.points]
    return {"task": found.task, "rounds": rounds, "clients": _clients(found)}


def _round(point: "Point") -> dict[str, Any]:
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


def _clients(found: "Curve") -> list[dict[str, Any]]:
    return [
        {
            "client": client,
            "rounds": standing.rounds,
            "failed": standing.failed,
            "samples": standing.samples,
            "reliability": standing.reliability,
            "contribution": standing.contribution,
            "loss": found.series_of(client, "loss"),
            "accuracy": found.series_of(client, "accuracy"),
            "train_s": standing.train_s,
            "transfer_s": None,
            "wait_s": None,
        }
        | (found.times_of(client) or {})
        for client, standing in found.standings.items()
    ]


def _write(path: Path, found: "Curve") -> None:
    """Raises Failure where it cannot."""
    from csv import DictWriter

    rounds = [_round(point) for point in found.points]
    if not rounds:
        raise Failure(f"no round of {found.task} is over yet: there is nothing to write", Exit.NOT_FOUND)
    with writing(path), path.open("w", newline="") as file:
        writer = DictWriter(file, fieldnames=list(rounds[0]))
        writer.writeheader()
        writer.writerows(rounds)
    output.note(f"{len(rounds)} rounds are in {path}")
