"""Whether the client joins a run, and what it has published about that. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from fedbus.contracts.client import ClientDeclined, ClientStart, ClientState
from fedbus.contracts.expressions.eligibility_rule import Predicate, parse_rule
from fedbus.contracts.expressions.parser import leaves
from fedbus.contracts.run import RunPlan
from fedbus.contracts.server import UpdateReady
from fedbus.domain.eligibility import unmet_reason
from fedbus.domain.run_participation import MAX_FAILURES, decline_reason

SPARE_S: Final = 60.0
"""The time that a run may take beyond its recruiting and its rounds."""
ASSUMED_ROUNDS: Final = 1000
"""The number of rounds for this limit if the plan leaves it to the app, which may exceed what it declares."""


@dataclass(frozen=True)
class Ineligibility:
    """Why the device does not train now; the client checks again for as long as the run recruits."""

    run: str
    reason: str
    facts: Mapping[str, float]

    @property
    def shape(self) -> str:
        """The reason without its numbers: the same reason with other numbers is not published again."""
        return re.sub(r"\d+(?:\.\d+)?", "#", self.reason)


class RunChoice:
    """The runs of one client in one task."""

    def __init__(self, task: str, client: str) -> None:
        self._task = task
        self._client = client
        self._invitation: UpdateReady | None = None
        self._failures = ("", 0)
        """The run that this client failed in last, and how often."""
        self._declined: Ineligibility | None = None
        """What was published last."""

    def keep(self, invitation: UpdateReady) -> None:
        """Keep *invitation*, which arrived before the client serves."""
        self._invitation = invitation

    def take_invitation(self) -> UpdateReady | None:
        """Return the kept invitation, once."""
        invitation, self._invitation = self._invitation, None
        return invitation

    def decline_reason(
        self, invitation: UpdateReady, *, state: ClientState, code_version: str, now: datetime
    ) -> str | None:
        """Return why the client declines the run without a look at the device; None if it does not."""
        failed_run, failures = self._failures
        return decline_reason(
            invitation,
            state=state,
            code_version=code_version,
            failures=failures if failed_run == invitation.run else 0,
            now=now,
        )

    def count_failure(self, run: str) -> None:
        failed_run, failures = self._failures
        self._failures = (run, failures + 1 if failed_run == run else 1)

    def exclude(self, run: str) -> None:
        """Do not join *run* again: the task's code cannot be loaded on this device."""
        self._failures = (run, MAX_FAILURES)

    def decline(
        self, run: str, reason: str, *, rule: str = "", facts: Mapping[str, float] | None = None
    ) -> ClientDeclined:
        content = {
            "task": self._task,
            "client": self._client,
            "run": run,
            "reason": reason,
            "rule": rule,
            "facts": dict(facts or {}),
        }
        return ClientDeclined.model_validate(content)

    def decline_once(self, cause: Ineligibility, rule: str) -> ClientDeclined | None:
        """Decline a run for *cause*; None if the client has published the same reason for it already."""
        before, self._declined = self._declined, cause
        if before is not None and (before.run, before.shape) == (cause.run, cause.shape):
            return None
        return self.decline(cause.run, cause.reason, rule=rule, facts=cause.facts)

    def start(self, invitation: UpdateReady) -> ClientStart:
        """Return the message that starts the training of the run."""
        return ClientStart(
            task=self._task,
            client=self._client,
            run=invitation.run,
            plan=invitation.plan,
            code_version=invitation.code_version,
        )


def rule_variables(rule: str) -> frozenset[str]:
    """Return the variables of an eligibility rule."""
    predicates: list[Predicate] = leaves(parse_rule(rule))
    return frozenset(leaf.name for leaf in predicates)


def ineligibility(rule: str, run: str, facts: Mapping[str, float | None]) -> Ineligibility | None:
    """Evaluate *rule* with the *facts* of the device; None if it is satisfied."""
    reason = unmet_reason(parse_rule(rule), facts)
    if reason is None:
        return None
    return Ineligibility(run, reason, {name: value for name, value in facts.items() if value is not None})


def run_limit_s(plan: RunPlan) -> float:
    """Return the time after which a client leaves a run that has not ended."""
    rounds = plan.rounds or max(plan.app_rounds, ASSUMED_ROUNDS)
    return plan.recruit_s + rounds * 2 * plan.round_s + SPARE_S
