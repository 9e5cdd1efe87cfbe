"""Following a task's code repository: which commit is new, whether it may become a version, and what people ask.

    look at the ref → fetched, verified → checked by the Flower server → proposed for a rollout, or rejected

What takes long (git, the task's own check) is done here, outside the server manager's turn; what becomes of
a version that passes stands in `rollouts`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import structlog

from fedbus.agents.rollouts import Proposed, Rollouts, TheServer
from fedbus.agents.tasks import ask_until_answered, first_of
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
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.task import Task
from fedbus.domain.participation import short
from fedbus.domain.rollout import EVERYBODY, told
from fedbus.stores.code import CodeRejected, CodeRepository, CodeUnavailable, HistoryRewritten

LOOK_S: Final = 5.0
LOOK_SELDOM_S: Final = 300.0
"""The repository is looked at this often at first, and less and less while nothing comes; a nudge is heard at once."""
MORE_TO_CHECK_S: Final = 60.0
"""What a check may take beyond the task's own limit: a process starts, torch is loaded."""

log = structlog.get_logger("fedbus.code_following")


class CodeFollowing:
    """Follows *code* for the *rollouts* of one task."""

    def __init__(self, bus: Bus, code: CodeRepository, rollouts: Rollouts, server: TheServer) -> None:
        self._bus = bus
        self._code = code
        self._rollouts = rollouts
        self._server = server
        self._nudge = asyncio.Event()
        self._looking = asyncio.Lock()
        """One look at a time: two would find the same commit, and each begin a rollout of it."""

    async def follow(self) -> None:
        """Look at the ref, again and again: often after news, seldom when there are none, at once when nudged."""
        wait_s, away = LOOK_S, ""
        while self._code.follows:
            try:
                found = await self._look()
            except CodeUnavailable as error:
                if str(error) != away:
                    log.warning("the code repository is away", reason=str(error))
                away = str(error)
            else:
                away, wait_s = "", LOOK_S if found.news else min(LOOK_SELDOM_S, wait_s * 1.5)
            self._nudge.clear()
            await first_of(self._nudge.wait(), asyncio.sleep(wait_s))

    async def _look(self) -> CodeLookedFor:
        """What the ref points at, and what comes of it, if that is new. Raises CodeUnavailable."""
        async with self._looking:
            try:
                found = await self._code.newest()
            except HistoryRewritten as error:
                return CodeLookedFor(found=error.new, news=await self._rewritten(error))
            news = "" if self._rollouts.is_known(found) else await self._consider(found)
            return CodeLookedFor(found=found, news=news)

    async def _rewritten(self, error: HistoryRewritten) -> str:
        if error.new in self._rollouts.facts.rejected:
            return ""
        return await self._rollouts.reject(error.new, str(error))

    async def _consider(self, version: str, stages: Sequence[str] = (), *, new_lineage: bool = False) -> str:
        """Have *version* verified and checked, and rolled out as soon as no run is under way; what comes of it."""
        try:
            task = await self._checked(version, new_lineage=new_lineage)
        except CodeRejected as error:
            return await self._rollouts.reject(version, error.reason)
        chosen = (EVERYBODY,) if new_lineage else tuple(stages) or task.table.rollout.stages
        return await self._rollouts.propose(Proposed(task, chosen, new_lineage))

    async def _checked(self, version: str, *, new_lineage: bool) -> Task:
        """The task at *version*, if it passes its check; raises CodeRejected and CodeUnavailable."""
        task = await self._code.task_at(version)
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
            raise CodeRejected(version, str(error)) from error
        if checked.differs:
            raise CodeRejected(
                version,
                f"its model is not the one that is served: {checked.differs}; a model of another architecture is "
                f"begun by hand: fedbus code rollout {version[:12]} --new-lineage",
            )
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
        try:
            found = await self._look()
        except CodeUnavailable as error:
            return Refused(reason=str(error))
        self._nudge.set()
        return found if found.news else found.model_copy(update={"news": self._old_news(found.found)})

    def _old_news(self, found: str) -> str:
        reason = self._rollouts.facts.rejected.get(found)
        return (
            f"nothing new: it was rejected: {reason}"
            if reason
            else f"nothing new: {told(self._rollouts.facts)}"
        )

    async def _roll_out(self, request: RollOutCode) -> Body:
        return await self._bring(request.code_version, request.stages, new_lineage=request.new_lineage)

    async def _bring(self, name: str, stages: Sequence[str], *, new_lineage: bool = False) -> Body:
        """Roll out what *name* means in the repository, because somebody said so."""
        try:
            version = await self._code.resolve(name)
            if version == self._rollouts.facts.code_version and not self._rollouts.facts.candidate:
                return _is_there(version)
            async with self._looking:
                await self._consider(version, stages, new_lineage=new_lineage)
        except (CodeRejected, CodeUnavailable) as error:
            return Refused(reason=str(error))
        if (why := self._rollouts.facts.rejected.get(version)) is not None:
            return Refused(reason=why)
        return RolloutBegun(code_version=version, stages=self._rollouts.stages)

    async def _revert_by_hand(self, request: RevertCode) -> Body:
        here = self._rollouts.facts
        if not request.to and await self._rollouts.end_by_hand(request.reason):
            return RolloutBegun(code_version=here.code_version)
        to = request.to or next(iter(here.previous), "")
        if not to:
            return Refused(reason=f"there is no version before {short(here.code_version)}")
        try:
            async with self._looking:
                return await self._go_back(await self._code.resolve(to), request.reason)
        except (CodeRejected, CodeUnavailable) as error:
            return Refused(reason=f"nothing was changed: {error}")

    async def _go_back(self, version: str, reason: str) -> Body:
        """Leave what is in use for *version*, once that has passed its check. Raises CodeRejected, CodeUnavailable."""
        if version == self._rollouts.facts.code_version:
            ended = await self._rollouts.end_by_hand(reason)
            return RolloutBegun(code_version=version) if ended else _is_there(version)
        task = await self._checked(version, new_lineage=False)
        await self._rollouts.propose(Proposed(task, (EVERYBODY,), leaving=reason))
        return RolloutBegun(code_version=version, stages=(EVERYBODY,))


def _is_there(version: str) -> Refused:
    return Refused(reason=f"everybody is on {short(version)} already")
