"""Recovery of a run whose Flower server was lost: resume it from a checkpoint, or give up."""

from dataclasses import dataclass

from fedbus.contracts.model import Artifact
from fedbus.contracts.situations import ServerTraining


@dataclass(frozen=True)
class Resume:
    """Start a new Flower server at *first_round*, from *artifact*."""

    artifact: Artifact
    first_round: int


@dataclass(frozen=True)
class GiveUp:
    reason: str


def decide_recovery(run: ServerTraining, reason: str) -> Resume | GiveUp:
    """Decide whether *run* resumes, from its last checkpoint or from its initial model."""
    if run.recoveries >= run.plan.max_recoveries:
        return GiveUp(
            f"{reason}; not resumed after {run.recoveries} recoveries (limit {run.plan.max_recoveries})"
        )
    return Resume(run.latest, run.round + 1)
