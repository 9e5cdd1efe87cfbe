"""The result of a demo: as tables, as a plot, and as JSON."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedbus.app.demo.prediction_load import PredictionCounts
from fedbus.contracts.message import LifecycleData
from fedbus.contracts.run import RunData, RunState
from fedbus.contracts.server import ServerData
from fedbus.domain.federation_view import EntityState, FederationView
from fedbus.domain.run_participation import short_version


@dataclass(frozen=True)
class DemoReport:
    """What a demo has shown."""

    dataset: str
    view: FederationView
    """The final state, with all transitions in its history."""
    predictions: PredictionCounts
    captured_samples: int
    seconds: float

    @property
    def is_ok(self) -> bool:
        """Whether every run finished and every prediction was answered."""
        runs = self.finished_runs
        is_finished = all(run.state == RunState.FINISHED for run in runs)
        return bool(runs) and is_finished and self.predictions.failed == 0

    @property
    def finished_runs(self) -> list[EntityState[RunData]]:
        """The runs that have finished or failed, in the order of their requests."""
        return self.view.finished_runs

    @property
    def continuity(self) -> list[dict[str, float | None]]:
        """Of each two consecutive runs: the last loss of the first, and the loss that the second starts from."""
        return [
            {"from_loss": _last_loss(first.data), "to_loss": _first_loss(second.data)}
            for first, second in itertools.pairwise(self.finished_runs)
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "seconds": round(self.seconds, 1),
            "runs": [_run_record(run) for run in self.finished_runs],
            "continuity": self.continuity,
            "predictions": self.predictions.as_json(),
            "clients": [
                {"client": client, "transitions": self._client_transitions(client)}
                for client, _ in sorted(self.view.clients)
            ],
            "server": {
                "transitions": [
                    _transition_record(one) for one in self.view.history if isinstance(one.data, ServerData)
                ]
            },
            "captured_samples": self.captured_samples,
        }

    def _client_transitions(self, client: str) -> list[dict[str, str]]:
        return [
            _transition_record(one)
            for one in self.view.history
            if getattr(one.data, "client", None) == client
        ]

    def print(self, console: Console) -> None:
        """Print the tables."""
        runs = self.finished_runs
        console.print()
        console.print(_rounds_table([run.data for run in runs]))
        for step in self.continuity:
            console.print(
                f"continuity: a run ended at loss {_format_number(step['from_loss'])}, "
                f"the next run started at {_format_number(step['to_loss'])}"
            )
        console.print(_models_table(runs))
        console.print(_transitions_table(self.view))
        counts = self.predictions
        versions = ", ".join(
            f"v{version}: {count}" for version, count in sorted(counts.by_model_version.items())
        )
        right = 100 * counts.correct / max(1, counts.answered)
        console.print(
            f"predictions: [bold]{counts.answered} answered, {counts.failed} failed[/] "
            f"({right:.1f} % correct; by version: {versions or 'none'})"
        )
        for reason, count in counts.failures.most_common(5):
            console.print(f"  failed {count} times: {reason}")
        console.print(
            f"captured on the devices: {self.captured_samples} samples · total time {self.seconds:.0f} s"
        )


def plot_runs(runs: Sequence[RunData], path: Path) -> None:
    """Plot loss and accuracy over all rounds of all *runs* as a PNG file."""
    import matplotlib as mpl  # noqa: PLC0415 (an extra, and slow to load)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - takes a second

    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    accuracy_axis = loss_axis.twinx()
    at = 0
    for index, run in enumerate(runs):
        losses = {at + one.round: one.loss for one in run.rounds if one.loss is not None}
        accuracies = {at + one.round: one.accuracy for one in run.rounds if one.accuracy is not None}
        loss_axis.plot(list(losses), list(losses.values()), "o-", color=f"C{index}", label=run.run)
        accuracy_axis.plot(list(accuracies), list(accuracies.values()), ":", color=f"C{index}")
        at += max((one.round for one in run.rounds), default=0)
        if index < len(runs) - 1:
            loss_axis.axvline(at, color="0.8", linewidth=1)
    loss_axis.set(xlabel="round, over all runs", ylabel="loss (solid)")
    accuracy_axis.set(ylabel="accuracy (dotted)")
    loss_axis.set_title("Each run starts from the model of the run before")
    loss_axis.legend(loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _run_record(run: EntityState[RunData]) -> dict[str, Any]:
    data = run.data
    return {
        "run": data.run,
        "state": run.state,
        "reason": run.reason,
        "trigger": data.trigger,
        "code_version": data.code_version,
        "rounds": _round_records(data),
        "model_version": data.model.version if data.model else None,
        "sha256": data.model.sha256 if data.model else None,
        "trace_id": data.trace_id,
    }


def _round_records(run: RunData) -> list[dict[str, Any]]:
    """Return the rounds of *run* without round 0, the model that it starts from."""
    return [
        {"round": one.round, "loss": one.loss, "accuracy": one.accuracy, "seconds": round(one.seconds, 3)}
        for one in run.rounds
        if one.round > 0
    ]


def _transition_record(entity: EntityState[LifecycleData]) -> dict[str, str]:
    transition = entity.transition
    return {
        "at": entity.at.isoformat(),
        "kind": entity.data.kind,
        "thing": entity.data.key,
        "from": transition.source,
        "event": transition.event,
        "to": transition.target,
        "reason": transition.reason,
    }


def _rounds_table(runs: Sequence[RunData]) -> Table:
    table = Table(title="rounds", title_justify="left")
    for name in ("run", "round", "loss", "accuracy", "seconds", "clients", "samples"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in runs:
        for index, one in enumerate(run.rounds, start=1):
            table.add_row(
                run.run,
                str(one.round) if one.round else "start",
                _format_number(one.loss),
                f"{one.accuracy:.2%}" if one.accuracy is not None else "–",
                f"{one.seconds:.1f}",
                str(len(one.participants) or "–"),
                str(sum(one.participants.values()) or "–"),
                end_section=index == len(run.rounds),
            )
    return table


def _models_table(runs: Sequence[EntityState[RunData]]) -> Table:
    table = Table(title="model versions", title_justify="left")
    for name in ("run", "state", "code", "version", "sha256", "trace"):
        table.add_column(name)
    for run in runs:
        data = run.data
        version = f"v{data.model.version}" if data.model else "–"
        digest = data.model.sha256[:16] if data.model else "–"
        code = short_version(data.code_version)
        table.add_row(data.run, run.state, code, version, digest, data.trace_id)
    return table


def _transitions_table(view: FederationView) -> Table:
    table = Table(title="transitions", title_justify="left")
    table.add_column("lifecycle")
    table.add_column("states")
    paths: dict[str, list[str]] = {}
    for one in view.history:
        path = paths.setdefault(f"{one.data.kind} {one.data.key}", [])
        if not path or path[-1] != one.state:
            path.append(one.state)
    for entity, path in sorted(paths.items()):
        table.add_row(entity, " → ".join(path))
    return table


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _first_loss(run: RunData) -> float | None:
    return run.rounds[0].loss if run.rounds else None


def _last_loss(run: RunData) -> float | None:
    return run.rounds[-1].loss if run.rounds else None
