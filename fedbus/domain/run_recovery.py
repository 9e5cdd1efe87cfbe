"""Whether a run whose Flower server was lost is taken up again, and from where."""

from dataclasses import dataclass

from fedbus.contracts.model import Artifact
from fedbus.contracts.server import ServerFacts


@dataclass(frozen=True)
class Resume:
    """Start a new Flower server at *first_round*, from *artifact*."""

    artifact: Artifact
    first_round: int


@dataclass(frozen=True)
class GiveUp:
    reason: str


def after_server_lost(facts: ServerFacts, reason: str) -> Resume | GiveUp:
    """What becomes of the run: it goes on after the last round that was kept, a bounded number of times."""
    assert facts.plan is not None
    artifact = facts.checkpoint or facts.model
    if facts.recoveries >= facts.plan.max_recoveries or artifact is None:
        return GiveUp(f"{reason}; given up after {facts.recoveries} recoveries")
    return Resume(artifact, facts.round + 1)
