"""Which version of the task's code the device has, and which one it should have. Pure."""

from collections.abc import Mapping
from typing import Final

from fedbus.contracts.code import CodePlan, CodeReady, CodeRefused
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import target_code_version

MAX_REASON_CHARS: Final = 500


class CodeChoice:
    """The code of the device *client*, which was started with *task*."""

    def __init__(self, task: Task, *, client: str, labels: Mapping[str, str]) -> None:
        self._client = client
        self._labels = labels
        self.task = task
        self.plan: CodePlan | None = None
        """What the server announced last."""
        self.refused: dict[str, str] = {}
        """Versions that are not tried again in this rollout, and why."""

    @property
    def version(self) -> str:
        return self.task.code_version

    @property
    def attempt(self) -> int | None:
        """Which rollout of the task it is."""
        return None if self.plan is None else self.plan.attempt

    @property
    def wanted(self) -> str | None:
        """The version to change to; None if the device has it, or has refused it."""
        if self.plan is None:
            return None
        version = target_code_version(self.plan, self._client, self._labels)
        return version if version != self.version and version not in self.refused else None

    @property
    def starts_lineage(self) -> bool:
        """True if the candidate's models have another architecture than the served one."""
        return self.plan is not None and self.plan.new_lineage

    def follow(self, plan: CodePlan | None) -> None:
        """Take *plan*. In another rollout a refused version is tried again, since its cause may be gone."""
        before, self.plan = self.attempt, plan
        if before is not None and before != self.attempt:
            self.refused.clear()

    def ready(self) -> CodeReady:
        """Return the message that reports the version of the device as usable."""
        return CodeReady(
            task=self.task.id, client=self._client, code_version=self.version, attempt=self.attempt
        )

    def refuse(self, version: str, reason: str) -> CodeRefused:
        """Refuse *version* for the rest of this rollout, and return the message about it."""
        self.refused[version] = reason
        return CodeRefused(
            task=self.task.id,
            client=self._client,
            code_version=version,
            reason=reason[:MAX_REASON_CHARS],
            stays_on=self.version,
            attempt=self.attempt,
        )
