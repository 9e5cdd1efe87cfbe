"""Following a task's code repository: which commit is new, whether it may become a version, and what people ask.

    look at the ref → fetched, verified → checked by the Flower server → proposed for a rollout, or rejected

Rejected is what is the commit's own fault. Whatever else stands in the way, a repository or a store that is
away, is said (`following_held_up`), and tried again, less and less often.

What takes long (git, the task's own check) is done here, outside the server manager's turn; what becomes of
a version that passes stands in `rollouts`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from fedbus.agents.common.asyncio_tools import ask_until_answered, first_of
from fedbus.agents.server_manager.code_rollout import AFTER_THE_RUN, Proposed, Rollouts, TheServer
from fedbus.bus.bus import Bus
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.code import (
    CheckCode,
    CodeChecked,
    CodeLookedFor,
    LookForCode,
    RevertCode,
    RolloutBegun,
    RollOutCode,
)
from fedbus.contracts.message import Body, RefusalKind, Refused
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import EVERYBODY, before, told
from fedbus.domain.run_participation import short
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    CodeUnavailable,
    HistoryRewritten,
    SignerNotAllowed,
)

LOOK_S: Final = 5.0
LOOK_SELDOM_S: Final = 300.0
"""The repository is looked at this often at first, and less and less while nothing comes; a nudge is heard at once."""
LOOK_AGAIN_S: Final = 60.0
"""How long it is left alone at most while it is away, or while nothing can be checked."""
LESS_OFTEN: Final = 1.5
MORE_TO_CHECK_S: Final = 60.0
"""What a check may take beyond the task's own limit: a process starts, torch is loaded."""


class HeldUp(Exception):
    """New code cannot be looked for or checked now, through no fault of its own; the text says why."""


class CodeFollowing:
    """Follows *code* for the *rollouts* of one task."""

    def __init__(self, bus: Bus, code: CodeRepository, rollouts: Rollouts, server: TheServer) -> None:
        self._bus = bus
        self._code = code
        self._rollouts = rollouts
        self._server = server
        self._nudge = asyncio.Event()
        self._trust: object = None
        """Whom we believed at the last look; a look after the start finds it changed, for it may have."""

    async def follow(self) -> None:
        """Look at the ref, again and again: often after news, seldom when there are none, at once when nudged."""
        wait_s = LOOK_S
        while self._code.follows:
            try:
                found = await self._look()
            except HeldUp as error:
                await self._rollouts.held_up(str(error))
                wait_s = min(LOOK_AGAIN_S, wait_s * LESS_OFTEN)
            else:
                await self._rollouts.resumed()
                wait_s = LOOK_S if found.news else min(LOOK_SELDOM_S, wait_s * LESS_OFTEN)
            self._nudge.clear()
            await first_of(self._nudge.wait(), asyncio.sleep(wait_s))

    async def _look(self) -> CodeLookedFor:
        """What the ref points at, and what comes of it, if that is new. Raises HeldUp."""
        async with self._rollouts.considering:
            trust = self._code.trust
            try:
                found = await self._code.newest()
            except HistoryRewritten as error:
                return CodeLookedFor(found=error.new, news=await self._rewritten(error))
            except CodeUnavailable as error:
                raise HeldUp(str(error)) from error
            news = await self._consider(found) if self._is_to_be_considered(found) else ""
            self._trust = trust
            return CodeLookedFor(found=found, news=news)

    def _is_to_be_considered(self, version: str) -> bool:
        """It is new; or nobody who was allowed had signed it, and the allowed signers are others now."""
        signers_changed = self._code.trust != self._trust
        is_in_doubt = version in self._rollouts.facts.not_signed and signers_changed
        return is_in_doubt or not self._rollouts.is_known(version)

    async def _rewritten(self, error: HistoryRewritten) -> str:
        if error.new in self._rollouts.facts.rejected:
            return ""
        return await self._rollouts.reject(error.new, str(error))

    async def _consider(self, version: str) -> str:
        """Have *version* rolled out as soon as no run is under way, or reject it; what comes of it. Raises HeldUp."""
        try:
            proposed = await self._passing(version)
        except CodeRejected as error:
            not_signed = isinstance(error, SignerNotAllowed)
            return await self._rollouts.reject(version, error.reason, not_signed=not_signed)
        return await self._rollouts.propose(proposed)

    async def _passing(
        self, version: str, stages: Sequence[str] = (), *, new_lineage: bool = False
    ) -> Proposed:
        """*version*, which is verified and passes its check; raises CodeRejected and HeldUp."""
        task = await self._checked(version, new_lineage=new_lineage)
        chosen = (EVERYBODY,) if new_lineage else tuple(stages) or task.table.rollout.stages
        return Proposed(task, chosen, new_lineage)

    async def _checked(self, version: str, *, new_lineage: bool) -> Task:
        """The task at *version*, if it passes its check; raises CodeRejected and HeldUp."""
        try:
            task = await self._code.task_at(version)
        except CodeUnavailable as error:
            raise HeldUp(str(error)) from error
        if task.id != self._rollouts.task.id:
            raise CodeRejected(
                version, f"it is task {task.id!r}, and this is the server of {self._rollouts.task.id!r}"
            )
        champion = self._server.champion
        check = CheckCode(
            task=self._rollouts.task.id,
            code_version=version,
            like=champion.sha256 if champion and not new_lineage else "",
        )
        timeout_s = task.table.code.check_s + MORE_TO_CHECK_S
        try:
            checked: CodeChecked = await ask_until_answered(self._bus, check, timeout_s=timeout_s)
        except RequestRefused as error:
            if error.kind is RefusalKind.RETRYABLE:
                raise HeldUp(f"{short(version)} cannot be checked: {error}") from error
            raise CodeRejected(version, str(error)) from error
        if checked.differs:
            raise CodeRejected(
                version,
                f"its model is not the one that is served: {checked.differs}; a model of another architecture is "
                f"begun by hand: fedbus code rollout {version[:12]} --new-lineage",
            )
        if champion and not new_lineage:
            self._server.note_fit(version, champion)
        return task

    # --- what is asked by hand -------------------------------------------------------------------------

    @property
    def answers(self) -> dict[Any, Callable[[Any], Awaitable[Body]]]:
        return {LookForCode: self._look_now, RollOutCode: self._roll_out, RevertCode: self._revert_by_hand}

    async def _look_now(self, _: LookForCode) -> Body:
        if not self._code.follows:
            return Refused(
                reason=f"the code is a directory, {self._code.source}, and no repository is followed: "
                "start the server with --task git+URL"
            )
        self._nudge.set()
        try:
            found = await self._look()
        except HeldUp as error:
            return Refused(reason=str(error), kind=RefusalKind.RETRYABLE)
        return found if found.news else found.model_copy(update={"news": self._old_news(found.found)})

    def _old_news(self, found: str) -> str:
        if self._rollouts.waits_for_run_end(found):  # the regular look may have found it a moment ago
            return AFTER_THE_RUN
        reason = self._rollouts.facts.rejected.get(found)
        return (
            f"nothing new: it was rejected: {reason}"
            if reason
            else f"nothing new: {told(self._rollouts.facts)}"
        )

    async def _roll_out(self, request: RollOutCode) -> Body:
        """Roll out what the name means in the repository, because somebody said so."""
        try:
            version = await self._code.resolve(request.code_version)
            if version == self._rollouts.facts.code_version and not self._rollouts.facts.candidate:
                return _is_there(version)
            async with self._rollouts.considering:
                proposed = await self._passing(version, request.stages, new_lineage=request.new_lineage)
                if (why := await self._rollouts.nobody_in(proposed.stages)) is not None:
                    return Refused(reason=why)
                await self._rollouts.propose(proposed)
        except (CodeRejected, CodeUnavailable, HeldUp) as error:
            return Refused(reason=str(error))
        return RolloutBegun(code_version=version, stages=proposed.stages)

    async def _revert_by_hand(self, request: RevertCode) -> Body:
        here = self._rollouts.facts
        if not request.to and await self._rollouts.end_by_hand(request.reason):
            return RolloutBegun(code_version=here.code_version)
        to = request.to or before(here)
        if not to:
            return Refused(
                reason=f"there is no version before {short(here.code_version)} that was not left or rejected: "
                "name one with --to"
            )
        try:
            async with self._rollouts.considering:
                return await self._go_back(await self._code.resolve(to), request.reason)
        except (CodeRejected, CodeUnavailable, HeldUp) as error:
            return Refused(reason=f"nothing was changed: {error}")

    async def _go_back(self, version: str, reason: str) -> Body:
        """Leave what is in use for *version*, once that has passed its check. Raises CodeRejected and HeldUp."""
        if version == self._rollouts.facts.code_version:
            ended = await self._rollouts.end_by_hand(reason)
            return RolloutBegun(code_version=version) if ended else _is_there(version)
        task = await self._checked(version, new_lineage=False)
        await self._rollouts.propose(Proposed(task, (EVERYBODY,), leaving=reason))
        return RolloutBegun(code_version=version, stages=(EVERYBODY,))


def _is_there(version: str) -> Refused:
    return Refused(reason=f"everybody is on {short(version)} already")
