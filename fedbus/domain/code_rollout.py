"""Code rollout: the cohort of each stage, and the verdict on a candidate after its run.

The rank of a client is a hash of its id and the code version. Every agent computes the same rank. The order
differs from version to version, so that the first stage is not always the same devices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from fedbus.contracts.code import CodeData, CodePlan, RolloutCohort
from fedbus.contracts.task.task import RolloutTable
from fedbus.domain.run_participation import short_version

ALL_CLIENTS: Final = "100%"
_RANKS: Final = 2**53
"""The number of integers that a float represents exactly."""


def client_rank(client: str, version: str) -> float:
    """Return the position of *client* in the rollout order of *version*, in [0, 1)."""
    digest = sha256(f"{version}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") // 2**11 / _RANKS


def is_in_cohort(cohort: RolloutCohort, client: str, labels: Mapping[str, str], version: str) -> bool:
    """Return whether the client belongs to *cohort* in the rollout of *version*."""
    return cohort.labels.items() <= labels.items() and client_rank(client, version) <= cohort.up_to


def stage_cohort(stage: str, clients: Mapping[str, Mapping[str, str]], version: str) -> RolloutCohort:
    """Return the cohort of a stage: ``25%`` of the *clients*, rounded up, or those with the labels ``site=lab``.

    A client that joins the federation later belongs to the cohort if its rank or its labels do.
    *clients* has the labels of each known client.
    """
    if not stage.endswith("%"):
        return RolloutCohort(labels=dict(pair.split("=", 1) for pair in stage.split(",")))
    if stage == ALL_CLIENTS or not clients:
        return RolloutCohort()
    ranks = sorted(client_rank(client, version) for client in clients)
    return RolloutCohort(up_to=ranks[math.ceil(len(ranks) * int(stage[:-1]) / 100) - 1])


def cohort_members(
    cohort: RolloutCohort, clients: Mapping[str, Mapping[str, str]], version: str
) -> tuple[str, ...]:
    """Return the ids of the *clients* in *cohort*, sorted."""
    return tuple(sorted(one for one, labels in clients.items() if is_in_cohort(cohort, one, labels, version)))


def target_code_version(plan: CodePlan, client: str, labels: Mapping[str, str]) -> str:
    """Return the code version that this client should run."""
    if plan.candidate and is_in_cohort(plan.cohort, client, labels, plan.candidate):
        return plan.candidate
    return plan.code_version


def unmatched_stage_reason(stages: Sequence[str], clients: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return why the first stage whose labels match none of the *clients* is invalid; None if all stages match."""
    for stage in stages:
        if not stage.endswith("%") and not cohort_members(stage_cohort(stage, clients, ""), clients, ""):
            known = sorted(
                {f"{name}={value}" for labels in clients.values() for name, value in labels.items()}
            )
            existing = f"existing labels are {', '.join(known[:10])}" if known else "no client has a label"
            return f"no client has {stage}: {existing} (fedbus clients show ID; fedbus client up --label)"
    return None


def previous_version(facts: CodeData) -> str:
    """Return the last deployed version that is neither deployed now nor rejected; empty if there is none."""
    excluded = (facts.code_version, *facts.rejected)
    return next((one for one in facts.previous if one not in excluded), "")


# --- verdicts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialResult:
    """The result of a run with the candidate code."""

    failed: str = ""
    """Why the run failed; empty if it produced a model."""
    trainings: int = 0
    """Trainings of all clients, over all rounds."""
    failures: int = 0
    """Failed trainings, over all rounds."""
    kept_back: str = ""
    """Why the model was not promoted; empty if it was."""
    is_unjudged: bool = False
    """True if the model was not evaluated because the champion changed during the run: another run is needed."""


def have_all_answered(facts: CodeData, ready: frozenset[str], refused: frozenset[str]) -> bool:
    """Return whether every client in the stage's cohort is ready or has refused, and at least one is ready."""
    return bool(ready) and set(facts.clients) <= ready | refused


def rejection_reason(table: RolloutTable, facts: CodeData, refused: Mapping[str, str]) -> str | None:
    """Return why the candidate is rolled back before its first run: too many clients refused it. None otherwise."""
    cohort_size = max(len(facts.clients), len(refused))
    if not refused or len(refused) <= table.max_fail_rate * cohort_size:
        return None
    client, reason = next(iter(refused.items()))
    return (
        f"{len(refused)} of {cohort_size} clients refused it (limit {_percent(table.max_fail_rate)}); "
        f"{client}: {reason}"
    )


def revert_reason(table: RolloutTable, trial: TrialResult) -> str | None:
    """Return why the candidate is rolled back after *trial*; None if the rollout continues."""
    if trial.failed:
        return f"run failed: {trial.failed}"
    if trial.trainings and trial.failures > table.max_fail_rate * trial.trainings:
        return (
            f"{trial.failures} of {trial.trainings} trainings failed (limit {_percent(table.max_fail_rate)}); "
            "see fail_train in `fedbus events tail`"
        )
    if trial.kept_back:
        return f"model not promoted: {trial.kept_back}"
    return None


def describe_unanswered_stage(facts: CodeData) -> str:
    """Return why a stage is still waiting: no client is ready, and too few have refused to roll back."""
    stage = facts.stages[facts.stage]
    cause = f"none of {len(facts.clients)} clients is ready" if facts.clients else "the stage has no client"
    return (
        f"stage {stage}: {cause}; the rollout keeps waiting. Choose other stages with "
        f"`fedbus code rollout {short_version(facts.candidate)} --stage …`, or end it with `fedbus code revert`"
    )


def describe_stage(facts: CodeData) -> str:
    """Describe the current stage of a rollout for the command line."""
    if not facts.candidate:
        return f"all clients run {short_version(facts.code_version)}"
    stage = facts.stages[facts.stage] if facts.stage < len(facts.stages) else ALL_CLIENTS
    return f"{short_version(facts.candidate)} is being rolled out to {stage} of the clients"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
