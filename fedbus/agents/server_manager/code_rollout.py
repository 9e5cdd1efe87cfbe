"""A rollout of new code: tried by part of the clients, judged by a run, taken by everybody or sent back.

    proposed → code_found → the cohort is ready → a run → judged → the next stage …
        → rollout_finished, or → rollout_reverted

It owns the `code` lifecycle and is part of the server manager, which lends it its turn: what is
decided here is never interrupted half-way, and no run begins meanwhile. How versions are found and
checked before they are proposed stands in `code_following`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from fedbus.agents.common.asyncio_tools import Timers, ask_until_answered, backoff
from fedbus.bus.bus import Bus
from fedbus.bus.errors import RequestRefused
from fedbus.bus.lifecycles import Life, Lives
from fedbus.contracts.client import ClientFacts, ClientState
from fedbus.contracts.code import (
    CODE,
    CodeChanges,
    CodeEvent,
    CodeFacts,
    CodePublished,
    CodeReady,
    CodeRefused,
    CodeState,
)
from fedbus.contracts.lifecycle import NO_CHANGES
from fedbus.contracts.model import ModelRef
from fedbus.contracts.run import RunPlan, StartRun
from fedbus.contracts.server import OpenRun
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import (
    Trial,
    all_answered,
    cohort_of,
    members,
    refusal_of,
    told,
    unanswered,
    verdict,
    without_clients,
)
from fedbus.domain.run_participation import short
from fedbus.stores.code.open import CodeRejected, CodeRepository, CodeUnavailable
from fedbus.stores.errors import StoreError

VERSIONS_REMEMBERED: Final = 20
WORKTREES_KEPT: Final = 3
NEW_CODE: Final = "new code"
AFTER_THE_RUN: Final = "it is rolled out when the run that is under way has ended"
STAGE: Final = "the stage begins without the others"
TRY: Final = "try the candidate"

log = structlog.get_logger("fedbus.rollouts")


class TheServer(Protocol):
    """What the server manager does for a rollout."""

    @property
    def at_rest(self) -> bool:
        """Whether no run is under way, so that code may change."""

    @property
    def champion(self) -> ModelRef | None:
        """The model that is served."""

    async def begin_lineage(self, task: Task, reason: str) -> None:
        """Have a first model of *task* built, and serve it; raises StoreError and RequestRefused."""

    def note_fit(self, code_version: str, model: ModelRef) -> None:
        """This code has passed its check beside *model*: its runs need not be asked for that again."""


@dataclass(frozen=True)
class Proposed:
    """A version that may be rolled out as soon as no run is under way."""

    task: Task
    stages: tuple[str, ...]
    new_lineage: bool = False
    leaving: str = ""
    """Why what is in use is left for it, and not to be taken again; empty where it is not left."""


class Rollouts:
    """The code versions of one task. *first* is what the server was started with."""

    def __init__(
        self, bus: Bus, code: CodeRepository, first: Task, server: TheServer, turn: asyncio.Lock
    ) -> None:
        self._bus = bus
        self._code = code
        self._task = first
        self._server = server
        self._turn = turn
        self._candidate: Task | None = None
        self._proposed: Proposed | None = None
        self._ready: dict[str, None] = {}
        self._refused: dict[str, str] = {}
        self._attempt = 0
        self.considering = asyncio.Lock()
        """Held while one version is considered, and while old ones are removed, which it must not be."""
        self._life: Life[CodeState, CodeEvent, CodeFacts, CodeChanges]
        self._timers: Timers

    @property
    def task(self) -> Task:
        """The task as everybody has it, outside a rollout's cohort."""
        return self._task

    @property
    def facts(self) -> CodeFacts:
        return self._life.facts

    @property
    def stages(self) -> tuple[str, ...]:
        """Of the rollout that is under way, or will be in a moment."""
        return self._proposed.stages if self._proposed else self.facts.stages

    @property
    def _rolling(self) -> bool:
        return self._life.state is CodeState.ROLLING

    # --- waking up ---------------------------------------------------------------------------

    async def wake(self, lives: Lives, timers: Timers) -> None:
        """Go on from where the log says the code stands."""
        self._timers = timers
        facts = CodeFacts(task=self._task.id, code_version=self._task.code_version, source=self._code.source)
        self._life = await lives.of(CODE, facts)
        if not self._life.born:
            await self._life.create()
        elif self.facts.code_version != self._task.code_version:
            await self._take_up_the_version()
        if self._rolling:
            await self._take_up_the_rollout()

    async def _take_up_the_version(self) -> None:
        """What the server was started with is not what the log has: the log is right, if its code can be had."""
        try:
            self._task = await self._had(self.facts.code_version)
        except CodeRejected as error:
            reason = f"{short(self.facts.code_version)} is not to be had any more: {error}"
            if self._rolling:
                await self._move(
                    CodeEvent.ROLLOUT_REVERTED, {"candidate": "", "clients": (), "ready": ()}, reason=reason
                )
            await self._move(CodeEvent.CODE_READ, {"code_version": self._task.code_version}, reason=reason)

    async def _take_up_the_rollout(self) -> None:
        try:
            self._candidate = await self._had(self.facts.candidate)
        except CodeRejected as error:
            await self._revert(str(error))
            return
        for message in [
            *await self._bus.said_last(CodeReady, task=self._task.id),
            *await self._bus.said_last(CodeRefused, task=self._task.id),
        ]:
            self._note(message)
        self._wait_for_the_stage()
        if self.facts.ready:
            self._go_on()

    async def _had(self, version: str) -> Task:
        """The task at *version*, however long the repository is away; raises CodeRejected."""
        attempt = 0
        while True:
            try:
                return await self._code.task_at(version)
            except CodeUnavailable as error:
                if attempt == 0:
                    log.warning("the code repository is away", reason=str(error))
                await asyncio.sleep(backoff(attempt))
                attempt += 1

    # --- what comes to it ------------------------------------------------------------------------

    def is_known(self, version: str) -> bool:
        """Whether something was made of it already: it is in use, on its way, or rejected."""
        proposed = self._proposed.task.code_version if self._proposed else ""
        return version in (self.facts.code_version, self.facts.candidate, proposed, *self.facts.rejected)

    def waits_for_run_end(self, version: str) -> bool:
        """Whether the rollout of *version* begins when the run that is under way has ended."""
        return self._proposed is not None and self._proposed.task.code_version == version

    async def nobody_in(self, stages: Sequence[str]) -> str | None:
        """Which of the *stages* is for labels that no client has, in words; None where each has somebody."""
        return without_clients(stages, await self._fleet())

    async def propose(self, proposed: Proposed) -> str:
        """Roll it out as soon as no run is under way; what comes of it, in words."""
        async with self._turn:
            self._proposed = proposed
            if not self._server.at_rest:
                return AFTER_THE_RUN
            await self.at_rest()
            return told(self.facts)

    async def reject(self, version: str, reason: str, *, not_signed: bool = False) -> str:
        """Remember that *version* is not to be taken, and say why. *not_signed*: the signers may come to be others."""
        async with self._turn:
            rejected = self._with(version, reason)
            if rejected[version] != self.facts.rejected.get(version):
                log.warning("new code is rejected", code=version, reason=reason)
                others = (one for one in self.facts.not_signed if one in rejected and one != version)
                await self._move(
                    CodeEvent.CODE_REJECTED,
                    {"rejected": rejected, "not_signed": (*others, version) if not_signed else tuple(others)},
                    reason=f"{short(version)}: {reason}",
                )
        return f"rejected: {reason}"

    async def held_up(self, reason: str) -> None:
        """New code cannot be looked for or checked now; said once for each reason."""
        async with self._turn:
            if reason != self.facts.held_up:
                log.warning("new code cannot be looked for or checked", reason=reason)
                await self._move(CodeEvent.FOLLOWING_HELD_UP, {"held_up": reason[:1000]}, reason=reason)

    async def resumed(self) -> None:
        """It can be again."""
        async with self._turn:
            if self.facts.held_up:
                await self._move(CodeEvent.FOLLOWING_RESUMED, {"held_up": ""})

    def _with(self, version: str, reason: str) -> dict[str, str]:
        """What is rejected, and *version* too."""
        return _newest({**_without(version, self.facts.rejected), version: reason[:500]})

    async def end_by_hand(self, reason: str) -> bool:
        """Bring everybody back from the rollout that is under way; False where there is none."""
        async with self._turn:
            if not self._rolling:
                return False
            await self._revert(reason)
            return True

    # --- a rollout -----------------------------------------------------------------------------------------

    async def at_rest(self, *, pause_s: float = 0.0) -> None:
        """No run is under way, and the turn is ours: what was proposed begins, what waits for a run asks for it.

        *pause_s*: how long the latter waits before.
        """
        if self._proposed is not None:
            proposed, self._proposed = self._proposed, None
            await self._begin(proposed)
        elif self._rolling and self.facts.ready:
            self._go_on(pause_s)

    async def _begin(self, proposed: Proposed) -> None:
        version = proposed.task.code_version
        self._candidate, self._ready, self._refused = proposed.task, {}, {}
        rejected = self._rejected_now(proposed)
        await self._move(
            CodeEvent.CODE_FOUND,
            {
                "candidate": version,
                "attempt": self.facts.attempt + 1,
                "stages": proposed.stages,
                "new_lineage": proposed.new_lineage,
                "rejected": rejected,
                "not_signed": tuple(one for one in self.facts.not_signed if one in rejected),
                **await self._stage(0, proposed.stages, version),
            },
            reason=f"{short(version)}, stage by stage: {', '.join(proposed.stages)}",
        )
        await self._ask_the_cohort()

    def _rejected_now(self, proposed: Proposed) -> dict[str, str]:
        """What is rejected when *proposed* begins: not that one, but whatever is left for it."""
        left = (self.facts.code_version, self.facts.candidate) if proposed.leaving else ()
        why = dict.fromkeys(filter(None, left), proposed.leaving[:500])
        return _newest(_without(proposed.task.code_version, {**self.facts.rejected, **why}))

    async def _stage(self, number: int, stages: Sequence[str], version: str) -> CodeChanges:
        """The facts of a stage: who is in it, and that nobody has answered yet."""
        fleet = await self._fleet()
        cohort = cohort_of(stages[number], fleet, version)
        return {
            "stage": number,
            "cohort": cohort,
            "clients": members(cohort, fleet, version),
            "ready": (),
            "refused": {},
        }

    async def _fleet(self) -> Mapping[str, Mapping[str, str]]:
        """The labels of every client that has not been given up."""
        found = await self._bus.states("client", f"*.{self._task.id}")
        return {
            one.facts.client: one.facts.labels
            for one in found
            if isinstance(one.facts, ClientFacts) and one.target != ClientState.TERMINATED
        }

    async def _ask_the_cohort(self) -> None:
        await self.tell()
        self._wait_for_the_stage()
        await self._weigh()  # who was ready in the stage before is so still

    def _wait_for_the_stage(self) -> None:
        assert self._candidate is not None
        self._timers.after(STAGE, self._candidate.table.rollout.wait_s, self._stage_waited)

    async def tell(self) -> None:
        """Tell all clients which code belongs where."""
        plan = self.facts.plan.model_dump(include=set(type(self.facts.plan).model_fields))
        await self._bus.publish(CodePublished(task=self._task.id, **plan))

    async def hear(self, message: CodeReady | CodeRefused) -> None:
        """A client has said yes or no; the turn is ours."""
        self._note(message)
        if self._rolling:
            await self._weigh()

    def _note(self, message: object) -> None:
        match message:
            case CodeReady() if self._is_of_this_rollout(message):
                self._ready[message.client] = None
                self._refused.pop(message.client, None)
            case CodeRefused() if self._is_of_this_rollout(message):
                self._refused[message.client] = message.reason
                self._ready.pop(message.client, None)

    def _is_of_this_rollout(self, message: CodeReady | CodeRefused) -> bool:
        """An older device does not say of which it speaks."""
        facts = self.facts
        return message.code_version == facts.candidate and message.attempt in (None, facts.attempt)

    async def _weigh(self) -> None:
        """Whether too many refuse, or all have answered."""
        assert self._candidate is not None
        reason = refusal_of(self._candidate.table.rollout, self.facts, self._refused)
        if reason is not None:
            await self._revert(reason)
        elif not self.facts.ready and all_answered(
            self.facts, frozenset(self._ready), frozenset(self._refused)
        ):
            await self._stage_ready("")

    async def _stage_waited(self) -> None:
        """Not all have answered in time: go on with those that have; where there are none, wait on."""
        async with self._turn:
            if not self._rolling or self.facts.ready:
                return
            if self._ready:
                silent = sorted(set(self.facts.clients) - set(self._ready) - set(self._refused))
                await self._stage_ready(f"without {', '.join(silent[:10]) or 'anybody else'}")
                return
            if (
                self._life.event is not CodeEvent.STAGE_UNANSWERED
            ):  # once: who comes later is heard all the same
                await self._move(CodeEvent.STAGE_UNANSWERED, reason=unanswered(self.facts))
            self._wait_for_the_stage()

    async def _stage_ready(self, reason: str) -> None:
        self._timers.cancel(STAGE)
        await self._move(
            CodeEvent.STAGE_READY,
            {"ready": tuple(sorted(self._ready)), "refused": dict(self._refused)},
            reason=reason,
        )
        self._go_on()

    def _go_on(self, pause_s: float = 0.0) -> None:
        """The candidate is where it should be: have it tried, or its first model made."""
        assert self._candidate is not None
        if self.facts.new_lineage:
            self._timers.after(TRY, pause_s, self._begin_lineage)
        elif self._candidate.table.schedule.on_new_code:
            self._timers.after(TRY, pause_s, self._ask_for_a_run)

    async def _ask_for_a_run(self) -> None:
        """Outside the turn: who starts the run will ask us to open it. A run under way is waited for: see `at_rest`."""
        try:
            await ask_until_answered(self._bus, StartRun(task=self._task.id, trigger=NEW_CODE), timeout_s=60)
            self._attempt = 0
        except RequestRefused as error:
            log.info("the candidate's run waits", reason=str(error))
            if self._server.at_rest:
                self._attempt += 1
                self._timers.after(TRY, backoff(self._attempt), self._ask_for_a_run)

    async def _begin_lineage(self) -> None:
        async with self._turn:
            if not self._rolling or self._candidate is None:
                return
            try:
                await self._server.begin_lineage(self._candidate, f"code {short(self.facts.candidate)}")
            except (StoreError, RequestRefused) as error:
                await self._revert(str(error))
            else:
                await self._finish()

    # --- a run of the candidate ----------------------------------------------------------------------------------

    def for_a_run(self, asked: OpenRun) -> tuple[Task, RunPlan]:
        """The task that a run is to be made of now, and its plan: a cohort can bring no larger quorum than it is."""
        if self._rolling and self._ready and self._candidate is not None and not self.facts.new_lineage:
            plan = _plan(asked, self._candidate)
            quorum = min(plan.quorum, len(self._ready))
            return self._candidate, plan.model_copy(update={"quorum": quorum})
        return self._task, _plan(asked, self._task)

    async def at(self, version: str) -> Task:
        """The task at a version that a run was opened with."""
        known = {one.code_version: one for one in (self._task, self._candidate) if one is not None}
        return known.get(version) or await self._had(version)

    async def judge(self, version: str, trial: Trial) -> None:
        """A run has ended and the turn is ours: where it was the candidate's, that goes on or back."""
        if not self._rolling or version != self.facts.candidate:
            return
        assert self._candidate is not None
        reason = verdict(self._candidate.table.rollout, trial)
        if reason is not None:
            await self._revert(reason)
        elif trial.unjudged:
            log.info("the candidate's run says nothing of its model: it is tried again", code=version)
        elif self.facts.stage + 1 < len(self.facts.stages):
            await self._next_stage()
        else:
            await self._finish()

    async def _next_stage(self) -> None:
        stage = await self._stage(self.facts.stage + 1, self.facts.stages, self.facts.candidate)
        passed = self.facts.stages[self.facts.stage]
        await self._move(CodeEvent.STAGE_PASSED, stage, reason=f"{passed} passed")
        await self._ask_the_cohort()

    async def _finish(self) -> None:
        assert self._candidate is not None
        before = tuple(dict.fromkeys((self.facts.code_version, *self.facts.previous)))[:VERSIONS_REMEMBERED]
        self._task, self._candidate = self._candidate, None
        await self._end(
            CodeEvent.ROLLOUT_FINISHED, "", {"code_version": self._task.code_version, "previous": before}
        )

    async def _revert(self, reason: str) -> None:
        """Bring everybody back. The candidate is not tried again unless somebody asks for it."""
        log.warning("the rollout is reverted", code=self.facts.candidate, reason=reason)
        self._candidate = None
        await self._end(
            CodeEvent.ROLLOUT_REVERTED, reason, {"rejected": self._with(self.facts.candidate, reason)}
        )

    async def _end(self, event: CodeEvent, reason: str, changes: CodeChanges) -> None:
        self._timers.cancel(STAGE)
        self._timers.cancel(TRY)
        said = f"{short(self.facts.candidate)}{f': {reason}' if reason else ''}"
        await self._move(
            event,
            {
                "candidate": "",
                "stages": (),
                "stage": 0,
                "clients": (),
                "ready": (),
                "refused": {},
                "new_lineage": False,
                **changes,
            },
            reason=said,
        )
        await self.tell()
        self._timers.after("old code is removed", 0, self._prune)

    async def _prune(self) -> None:
        async with self.considering:
            waits = (self._proposed.task.code_version,) if self._proposed else ()
            in_use = (self.facts.code_version, self.facts.candidate, *waits)
            await self._code.prune((*in_use, *self.facts.previous[:WORKTREES_KEPT]))

    async def _move(self, event: CodeEvent, changes: CodeChanges = NO_CHANGES, *, reason: str = "") -> None:
        await self._life.transition(event, changes, reason=reason[:1000])


def _plan(asked: OpenRun, task: Task) -> RunPlan:
    return asked.plan if asked.overrides is None else asked.overrides.over(task.table.plan)


def _without(version: str, rejected: Mapping[str, str]) -> dict[str, str]:
    return {one: why for one, why in rejected.items() if one != version}


def _newest(rejected: Mapping[str, str]) -> dict[str, str]:
    return dict(list(rejected.items())[-VERSIONS_REMEMBERED:])
