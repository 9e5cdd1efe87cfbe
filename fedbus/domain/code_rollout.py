"""How new code comes to the clients: who is in a stage's cohort, and what becomes of it after a run.

A client's rank is drawn from its id and the version, as a hash bucket is: everybody who knows the two
computes the same, it differs from version to version, so that not the same devices are the first each
time, and a share of the ranks is that share of the clients.
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
"""As many as a float can tell apart."""


def client_rank(client: str, version: str) -> float:
    """Where *client* stands in the order in which *version* comes to the clients: in [0, 1)."""
    drawn = sha256(f"{version}/{client}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") // 2**11 / _RANKS


def is_in_cohort(cohort: RolloutCohort, client: str, labels: Mapping[str, str], version: str) -> bool:
    """Whether *version*, which is for *cohort*, is for this client."""
    return cohort.labels.items() <= labels.items() and client_rank(client, version) <= cohort.up_to


def stage_cohort(stage: str, clients: Mapping[str, Mapping[str, str]], version: str) -> RolloutCohort:
    """The cohort of a stage: ``25%`` of the *clients*, rounded up, or those with the labels ``site=lab``.

    *clients*: the labels of each that is known. Who comes later is in it if its rank is.
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
    """Who of the *clients* is in *cohort*."""
    return tuple(sorted(one for one, labels in clients.items() if is_in_cohort(cohort, one, labels, version)))


def target_code_version(plan: CodePlan, client: str, labels: Mapping[str, str]) -> str:
    """The code version that this client should be on."""
    if plan.candidate and is_in_cohort(plan.cohort, client, labels, plan.candidate):
        return plan.candidate
    return plan.code_version


def unmatched_stage_reason(stages: Sequence[str], clients: Mapping[str, Mapping[str, str]]) -> str | None:
    """The first of *stages* that is for labels which none of the *clients* has, in words; None where there is none."""
    for stage in stages:
        if not stage.endswith("%") and not cohort_members(stage_cohort(stage, clients, ""), clients, ""):
            known = sorted(
                {f"{name}={value}" for labels in clients.values() for name, value in labels.items()}
            )
            there = f"there are {', '.join(known[:10])}" if known else "no client has a label"
            return f"no client has {stage}: {there} (fedbus clients show ID; fedbus client up --label)"
    return None


def previous_version(facts: CodeData) -> str:
    """What everybody was on before, and nobody has left or sent back since; empty where there is none."""
    passed = (facts.code_version, *facts.rejected)
    return next((one for one in facts.previous if one not in passed), "")


# --- judging -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialResult:
    """What a run of the candidate came to."""

    failed: str = ""
    """Why the run came to nothing; empty where it came to a model."""
    trainings: int = 0
    failures: int = 0
    """Of the trainings, over all rounds."""
    kept_back: str = ""
    """Why its model was not promoted; empty where it was."""
    unjudged: bool = False
    """Whether its model was not looked at, since another one has been served meanwhile: another run is needed."""


def have_all_answered(facts: CodeData, ready: frozenset[str], refused: frozenset[str]) -> bool:
    """Whether everybody in the stage's cohort has said yes or no to the candidate."""
    return bool(ready) and set(facts.clients) <= ready | refused


def rejection_reason(table: RolloutTable, facts: CodeData, refused: Mapping[str, str]) -> str | None:
    """Why the candidate goes back before it was tried at all, or None: too many devices do not take it."""
    asked = max(len(facts.clients), len(refused))
    if not refused or len(refused) <= table.max_fail_rate * asked:
        return None
    client, reason = next(iter(refused.items()))
    return f"{len(refused)} of {asked} clients refused it, {client} because {reason}"


def revert_reason(table: RolloutTable, trial: TrialResult) -> str | None:
    """Why the candidate goes back after *trial*, or None: then it goes on."""
    if trial.failed:
        return f"its run failed: {trial.failed}"
    if trial.trainings and trial.failures > table.max_fail_rate * trial.trainings:
        return (
            f"{trial.failures} of {trial.trainings} trainings failed, and {table.max_fail_rate:.0%} may: "
            "see fail_train in `fedbus events tail`"
        )
    if trial.kept_back:
        return f"its model was kept back: {trial.kept_back}"
    return None


def describe_unanswered_stage(facts: CodeData) -> str:
    """Why a stage does not go on, for people: nobody in it has taken the candidate, and too few have refused it."""
    stage = facts.stages[facts.stage]
    who = (
        f"none of {len(facts.clients)} clients has said that it is ready"
        if facts.clients
        else "no client is in it"
    )
    return (
        f"stage {stage}: {who}; it waits on: choose other stages with "
        f"`fedbus code rollout {short_version(facts.candidate)} --stage …`, or end it with `fedbus code revert`"
    )


def describe_stage(facts: CodeData) -> str:
    """A rollout's stage in words, for people."""
    if not facts.candidate:
        return f"everybody is on {short_version(facts.code_version)}"
    stage = facts.stages[facts.stage] if facts.stage < len(facts.stages) else ALL_CLIENTS
    return f"{short_version(facts.candidate)} is tried by {stage} of the clients"
