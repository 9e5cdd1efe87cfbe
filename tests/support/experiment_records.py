"""Records of cells with chosen outcomes, for the reports of experiments."""

from collections.abc import Sequence
from typing import Any

from fedbus.simulation.experiments.cells import Cell, CellRecord, Level


def make_record(outcome: dict[str, Any], digest: str = "0" * 64, **factors: Level) -> CellRecord:
    return CellRecord(
        digest=digest, factors=factors, settings={}, outcome=outcome, wall_s=1, finished_at="2026-01-01"
    )


def record_of(cell: Cell, outcome: dict[str, Any]) -> CellRecord:
    """The record of a planned cell."""
    return make_record(outcome, cell.digest, **cell.factors)


def make_rounds(
    accuracies: Sequence[float | None],
    *,
    round_s: float = 1.0,
    train_s: Sequence[float] = (1.0, 1.0, 1.0),
    local: Sequence[float | None] = (),
) -> dict[str, Any]:
    """The outcome of a run with these accuracies after round 0, 1, …"""
    clients = {f"client-{number:04}": seconds for number, seconds in enumerate(train_s)}
    rounds = [
        {
            "round": number,
            "at_s": number * round_s,
            "accuracy": accuracy,
            "loss": None if accuracy is None else 1 - accuracy,
            "local_accuracy": local[number] if number < len(local) else None,
            "train_s": sum(train_s) / len(train_s),
            "train_s_by_client": clients if number else {},
            "cpu_s_by_client": clients if number else {},
            "updates": len(clients) if number else 0,
            "failures": {},
        }
        for number, accuracy in enumerate(accuracies)
    ]
    return {"rounds": rounds, "simulated_s": rounds[-1]["at_s"], "seconds": 1.0, "peak_memory_mb": 1.0}
