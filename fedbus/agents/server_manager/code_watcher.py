"""Follows the code repository of a task, and answers requests about its code.

    poll the ref → fetch and verify → let the Flower server check it → propose it for a rollout, or reject it

A commit is rejected only for its own fault. If the repository or the check is unavailable, that is published
(`following_held_up`), and the poll is repeated with backoff.

Git and the check take long, and run here. `code_rollout` decides what becomes of a version that passes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from fedbus.agents.common.asyncio_tools import request_until_answered, wait_for_first
from fedbus.agents.common.machine import RequestId
from fedbus.agents.server_manager.code_rollout import AFTER_THE_RUN
from fedbus.agents.server_manager.events import (
    CodeProposed,
    CodeRejectedByCheck,
    Event,
    FollowingPaused,
    FollowingResumed,
    ProposedVersion,
    RevertRequested,
)
from fedbus.agents.server_manager.flower_server_client import FlowerServerClient
from fedbus.agents.server_manager.machine import ServerMachine
from fedbus.bus.bus import Bus, Handler
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.client import CLIENT, ClientData, ClientState
from fedbus.contracts.code import (
    CheckCode,
    CodeLookedFor,
    LookForCode,
    RevertCode,
    RolloutBegun,
    RollOutCode,
)
from fedbus.contracts.message import Body, RefusalKind, Refused, Request
from fedbus.contracts.model import ModelRef
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import ALL_CLIENTS, describe_stage, previous_version, unmatched_stage_reason
from fedbus.domain.run_participation import short_version
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    HistoryRewritten,
    SignerNotAllowed,
)
from fedbus.stores.errors import StoreError

POLL_S: Final = 5.0
MAX_POLL_S: Final = 300.0
"""The interval of polls grows from `POLL_S` to this while nothing is new; a `LookForCode` request polls at once."""
MAX_RETRY_S: Final = 60.0
"""The longest interval while the repository or the check is unavailable."""
POLL_BACKOFF: Final = 1.5
CHECK_OVERHEAD_S: Final = 60.0
"""How long a check may take beyond the task's own limit: it starts a process and loads torch."""

Decide = Callable[[Event], Awaitable[None]]
Ask = Callable[[Callable[[RequestId], Event]], Awaitable[Body]]
CompareArchitecture = Callable[[ModelRef, str], Awaitable[str]]


class FollowingBlocked(Exception):
    """New code cannot be fetched or checked now, for a reason outside the code; the text gives the reason."""


class CodeWatcher:
    """Follows *code* for one task.

    Args:
        bus: The bus of the server manager.
        code: The repository.
        flower: The flower-server agent, which checks code.
        machine: The decisions of the server manager, read-only.
        compare: Describes why a model does not fit a code version; empty if it does. Raises StoreError.
        decide: Lets the machine handle an event.
        ask: Lets the machine handle a request, and returns the reply.

    """

    def __init__(
        self,
        bus: Bus,
        code: CodeRepository,
        flower: FlowerServerClient,
        machine: ServerMachine,
        *,
        compare: CompareArchitecture,
        decide: Decide,
        ask: Ask,
    ) -> None:
        self._bus = bus
        self._code = code
        self._flower = flower
        self._machine = machine
        self._rollout = machine.rollout
        self._compare = compare
        self._decide = decide
        self._ask = ask
        self._poll_requested = asyncio.Event()
        self._signers: object = None
        """The allowed signers at the last poll; None at first, so that the first poll counts as a change."""
        self._review_lock = asyncio.Lock()
        """Held during a review and during the deletion of old versions: no version is deleted in its review."""

    async def run(self) -> None:
        """Poll the ref for ever, in intervals that grow while nothing is new."""
        wait_s = POLL_S
        while self._code.can_update:
            try:
                found = await self._poll()
            except FollowingBlocked as error:
                await self._decide(FollowingPaused(str(error)))
                wait_s = min(MAX_RETRY_S, wait_s * POLL_BACKOFF)
            else:
                await self._decide(FollowingResumed())
                wait_s = POLL_S if found.news else min(MAX_POLL_S, wait_s * POLL_BACKOFF)
            self._poll_requested.clear()
            await wait_for_first(self._poll_requested.wait(), asyncio.sleep(wait_s))

    async def prune(self) -> None:
        """Delete the files of versions that are no longer in use."""
        async with self._review_lock:
            await self._code.prune(self._rollout.versions_in_use)

    async def _poll(self) -> CodeLookedFor:
        """Fetch the ref, and review its version if it is new. Raises FollowingBlocked."""
        async with self._review_lock:
            signers = self._code.signers_fingerprint
            try:
                found = await self._code.fetch_latest()
            except HistoryRewritten as error:
                return CodeLookedFor(found=error.new, news=await self._reject_rewrite(error))
            except CodeUnavailable as error:
                raise FollowingBlocked(str(error)) from error
            news = await self._review(found) if self._needs_review(found) else ""
            self._signers = signers
            return CodeLookedFor(found=found, news=news)

    def _needs_review(self, version: str) -> bool:
        """True for a new version, and for an unsigned version after the allowed signers have changed."""
        have_signers_changed = self._code.signers_fingerprint != self._signers
        is_unsigned = version in self._rollout.data.not_signed
        return (is_unsigned and have_signers_changed) or not self._rollout.is_known(version)

    async def _reject_rewrite(self, error: HistoryRewritten) -> str:
        if error.new in self._rollout.data.rejected:
            return ""
        return await self._reject(error.new, str(error))

    async def _review(self, version: str) -> str:
        """Propose *version*, or reject it, and describe the result for a user. Raises FollowingBlocked."""
        try:
            proposal = await self._check_proposal(version)
        except CodeRejected as error:
            return await self._reject(version, error.reason, is_unsigned=isinstance(error, SignerNotAllowed))
        return await self._propose(proposal)

    async def _reject(self, version: str, reason: str, *, is_unsigned: bool = False) -> str:
        await self._decide(CodeRejectedByCheck(version, reason, is_unsigned))
        return f"rejected: {reason}"

    async def _propose(self, proposal: ProposedVersion) -> str:
        await self._decide(CodeProposed(proposal))
        return self._rollout.outcome_of(proposal)

    async def _check_proposal(
        self, version: str, stages: Sequence[str] = (), *, new_lineage: bool = False
    ) -> ProposedVersion:
        """Verify and check *version*; raises CodeRejected and FollowingBlocked."""
        task = await self._load_checked_task(version, new_lineage=new_lineage)
        chosen = (ALL_CLIENTS,) if new_lineage else tuple(stages) or task.table.rollout.stages
        return ProposedVersion(task, chosen, new_lineage)

    async def _load_checked_task(self, version: str, *, new_lineage: bool) -> Task:
        """Return the task at *version* if it passes its check; raises CodeRejected and FollowingBlocked."""
        try:
            task = await self._code.load_task(version)
        except CodeUnavailable as error:
            raise FollowingBlocked(str(error)) from error
        own = self._rollout.deployed_task.id
        if task.id != own:
            raise CodeRejected(version, f"it contains task {task.id!r}, and this server runs {own!r}")
        champion = self._machine.champion
        like = champion.sha256 if champion and not new_lineage else ""
        check = CheckCode(task=own, code_version=version, like=like)
        timeout_s = task.table.code.check_s + CHECK_OVERHEAD_S
        try:
            checked = await request_until_answered(self._bus, check, timeout_s=timeout_s)
        except RequestRefused as error:
            if error.kind is RefusalKind.RETRYABLE:
                raise FollowingBlocked(f"{short_version(version)} cannot be checked: {error}") from error
            raise CodeRejected(version, str(error)) from error
        if champion and not new_lineage:
            self._flower.record_comparison(version, champion, checked)
            await self._check_fit(version, champion)
        return task

    async def _check_fit(self, version: str, champion: ModelRef) -> None:
        """Raise CodeRejected if the model of the checked *version* does not fit the champion."""
        try:
            difference = await self._compare(champion, version)
        except StoreError as error:
            raise FollowingBlocked(f"{short_version(version)} cannot be checked: {error}") from error
        if difference:
            raise CodeRejected(
                version,
                f"its model does not fit the champion: {difference}. To start a lineage with another "
                f"architecture: fedbus code rollout {version[:12]} --new-lineage",
            )

    # --- requests -----------------------------------------------------------------------------------

    @property
    def handlers(self) -> dict[type[Request[Body]], Handler]:
        return {LookForCode: self._poll_now, RollOutCode: self._roll_out, RevertCode: self._revert}

    async def _poll_now(self, _: LookForCode) -> Body:
        if not self._code.can_update:
            return Refused(
                reason=f"the code is a directory, {self._code.source}, and no repository is followed: "
                "start the server with --task git+URL"
            )
        self._poll_requested.set()
        try:
            found = await self._poll()
        except FollowingBlocked as error:
            return Refused(reason=str(error), kind=RefusalKind.RETRYABLE)
        return found if found.news else found.model_copy(update={"news": self._describe_known(found.found)})

    def _describe_known(self, version: str) -> str:
        if self._rollout.waits_for_run_end(version):  # the regular poll may have found it a moment ago
            return AFTER_THE_RUN
        reason = self._rollout.data.rejected.get(version)
        return (
            f"nothing new: it was rejected: {reason}"
            if reason
            else f"nothing new: {describe_stage(self._rollout.data)}"
        )

    async def _roll_out(self, request: RollOutCode) -> Body:
        """Roll out the version that a request names by commit, branch or tag."""
        try:
            version = await self._code.resolve(request.code_version)
            if version == self._rollout.data.code_version and not self._rollout.data.candidate:
                return _already_in_use(version)
            async with self._review_lock:
                proposal = await self._check_proposal(
                    version, request.stages, new_lineage=request.new_lineage
                )
                fleet = await read_fleet(self._bus, self._rollout.deployed_task.id)
                if (reason := unmatched_stage_reason(proposal.stages, fleet)) is not None:
                    return Refused(reason=reason)
                await self._propose(proposal)
        except (CodeRejected, CodeUnavailable, FollowingBlocked) as error:
            return Refused(reason=str(error))
        return RolloutBegun(code_version=version, stages=proposal.stages)

    async def _revert(self, request: RevertCode) -> Body:
        """End the current rollout; without one, roll out the previous version."""
        if not request.to:
            ended = await self._ask(lambda request_id: RevertRequested(request_id, request.reason))
            if not isinstance(ended, Refused):
                return ended
        to = request.to or previous_version(self._rollout.data)
        if not to:
            return Refused(
                reason=f"there is no version before {short_version(self._rollout.data.code_version)} "
                "that was not reverted or "
                "rejected: name one with --to"
            )
        try:
            async with self._review_lock:
                return await self._replace_version(await self._code.resolve(to), request.reason)
        except (CodeRejected, CodeUnavailable, FollowingBlocked) as error:
            return Refused(reason=f"nothing was changed: {error}")

    async def _replace_version(self, version: str, reason: str) -> Body:
        """Replace the deployed version by *version* if it passes its check.

        Raises CodeRejected and FollowingBlocked.
        """
        if version == self._rollout.data.code_version:
            ended = await self._ask(lambda request_id: RevertRequested(request_id, reason))
            return _already_in_use(version) if isinstance(ended, Refused) else ended
        task = await self._load_checked_task(version, new_lineage=False)
        await self._propose(ProposedVersion(task, (ALL_CLIENTS,), revert_reason=reason))
        return RolloutBegun(code_version=version, stages=(ALL_CLIENTS,))


async def read_fleet(bus: Bus, task: str) -> Mapping[str, Mapping[str, str]]:
    """Return the labels of every client of *task* that is not terminated."""
    found = await bus.current_states(CLIENT.kind, f"*.{task}")
    return {
        one.facts.client: one.facts.labels
        for one in found
        if isinstance(one.facts, ClientData) and one.target != ClientState.TERMINATED
    }


def _already_in_use(version: str) -> Refused:
    return Refused(reason=f"every client is on {short_version(version)} already")
