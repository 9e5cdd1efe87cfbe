"""What a demonstration came to: as tables, as a plot, and as JSON for programs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedbus.app.demo.prediction_load import PredictionCounts
from fedbus.app.views.fleet import Fleet, rounds_as_json
from fedbus.contracts.run import RunData, RunState
from fedbus.domain.run_participation import short_version


@dataclass(frozen=True)
class DemoReport:
    """The end of a demonstration."""

    dataset: str
    fleet: Fleet
    predictions: PredictionCounts
    captured_samples: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Every run finished and every prediction was answered."""
        states = self.fleet.run_states
        finished = all(states[run.run] is RunState.FINISHED for run in self.fleet.ended)
        return bool(self.fleet.ended) and finished and self.predictions.failed == 0

    @property
    def continuity(self) -> list[dict[str, float | None]]:
        """For each two runs: the loss that one ended with, and that of the model the next began with."""
        runs = self.fleet.ended
        return [
            {"from_loss": _last_loss(before), "to_loss": _first_loss(after)}
            for before, after in itertools.pairwise(runs)
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "seconds": round(self.seconds, 1),
            "runs": [_run_as_json(run, self.fleet) for run in self.fleet.ended],
            "continuity": self.continuity,
            "predictions": self.predictions.as_json(),
            "clients": [
                {
                    "client": view.client,
                    "transitions": [step.as_json() for step in view.steps],
                }
                for _, view in sorted(self.fleet.clients.items())
            ],
            "server": {"transitions": [one.as_json() for one in self.fleet.steps if one.kind == "server"]},
            "captured_samples": self.captured_samples,
        }

    def print(self, console: Console) -> None:
        """The story as tables."""
        console.print()
        console.print(_rounds_table(self.fleet.ended))
        for step in self.continuity:
            console.print(
                f"continuity: the last run ended at loss {_format_number(step['from_loss'])}, "
                f"the next began at {_format_number(step['to_loss'])}"
            )
        console.print(_models_table(self.fleet))
        console.print(_transitions_table(self.fleet))
        counts = self.predictions
        versions = ", ".join(
            f"v{version}: {count}" for version, count in sorted(counts.by_model_version.items())
        )
        right = 100 * counts.right / max(1, counts.answered)
        console.print(
            f"predictions: [bold]{counts.answered} answered, {counts.failed} failed[/] "
            f"({right:.1f} % right; {versions or 'none'})"
        )
        for reason, count in counts.failures.most_common(5):
            console.print(f"  failed {count} times: {reason}")
        console.print(
            f"captured on the devices: {self.captured_samples} samples · {self.seconds:.0f} s in all"
        )


def plot_runs(runs: Sequence[RunData], path: Path) -> None:
    """Loss and accuracy over all rounds, one line over the runs, as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 (an extra, and slow to load)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    accuracy_axis = loss_axis.twinx()
    at = 0
    for index, run in enumerate(runs):
        losses = {at + one.round: one.loss for one in run.rounds if one.loss is not None}
        accuracies = {at + one.round: one.accuracy for one in run.rounds if one.accuracy is not None}
        loss_axis.plot(list(losses), list(losses.values()), "o-", color=f"C{index}", label=run.run)
        accuracy_axis.plot(list(accuracies), list(accuracies.values()), ":", color=f"C{index}")
        at += run.plan.rounds
        if index < len(runs) - 1:
            loss_axis.axvline(at, color="0.8", linewidth=1)
    loss_axis.set(xlabel="round, over all runs", ylabel="loss (solid)")
    accuracy_axis.set(ylabel="accuracy (dotted)")
    loss_axis.set_title("Each run begins where the last one ended")
    loss_axis.legend(loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _run_as_json(run: RunData, fleet: Fleet) -> dict[str, Any]:
    return {
        "run": run.run,
        "state": str(fleet.run_states[run.run]),
        "reason": fleet.run_reasons[run.run],
        "trigger": run.trigger,
        "code_version": run.code_version,
        "rounds": rounds_as_json(run),
        "model_version": run.model.version if run.model else None,
        "sha256": run.model.sha256 if run.model else None,
        "trace_id": run.trace_id,
    }


def _rounds_table(runs: Sequence[RunData]) -> Table:
    table = Table(title="rounds", title_justify="left")
    for name in ("run", "round", "loss", "accuracy", "seconds", "clients", "samples"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in runs:
        for one in run.rounds:
            table.add_row(
                run.run,
                str(one.round) if one.round else "start",
                _format_number(one.loss),
                f"{one.accuracy:.2%}" if one.accuracy is not None else "–",
                f"{one.seconds:.1f}",
                str(len(one.participants) or "–"),
                str(sum(one.participants.values()) or "–"),
                end_section=one.round == run.plan.rounds,
            )
    return table


def _models_table(fleet: Fleet) -> Table:
    table = Table(title="model versions", title_justify="left")
    for name in ("run", "state", "code", "version", "sha256", "trace"):
        table.add_column(name)
    for run in fleet.ended:
        version = f"v{run.model.version}" if run.model else "–"
        digest = run.model.sha256[:16] if run.model else "–"
        state = str(fleet.run_states[run.run])
        table.add_row(run.run, state, short_version(run.code_version), version, digest, run.trace_id)
    return table


def _transitions_table(fleet: Fleet) -> Table:
    table = Table(title="transitions", title_justify="left")
    table.add_column("lifecycle")
    table.add_column("went through")
    paths: dict[str, list[str]] = {}
    for step in fleet.steps:
        path = paths.setdefault(f"{step.kind} {step.thing}", [])
        if not path or path[-1] != step.target:
            path.append(step.target)
    for thing, path in sorted(paths.items()):
        table.add_row(thing, " → ".join(path))
    return table


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _first_loss(run: RunData) -> float | None:
    return run.rounds[0].loss if run.rounds else None


def _last_loss(run: RunData) -> float | None:
    return run.rounds[-1].loss if run.rounds else None
