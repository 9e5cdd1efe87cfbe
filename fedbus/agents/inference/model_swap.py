"""How a new model comes to serve: prepared, shadowed, canaried, committed, watched; and back, where it must be.

    prepare   load it, try it, judge it on the device's own labelled samples
    shadow    both answer, the old one's answers are given          (where the task asks for it)
    canary    the new one answers a share of the requests           (where the task asks for it)
    commit    they change places; the old one answers what came in under it
    watch     for a while the old one stands behind the new one

At every step the old model serves, and a refusal leaves everything as it was. Every step is told with its
figures; what they mean is decided in `fedbus.domain.serving_gates`.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from fedbus.agents.inference.engine import (
    ComparisonRole,
    InferenceEngine,
    LoadedModel,
    MakePredictor,
    ModelPair,
)
from fedbus.agents.inference.offline_evaluation import EvaluationResult, OfflineEvaluation
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.serving import (
    ModelCanaried,
    ModelCommitted,
    ModelComparison,
    ModelPrepared,
    ModelRejected,
    ModelRolledBack,
    ModelShadowed,
)
from fedbus.contracts.task.serving import ServingTable
from fedbus.domain.prediction_comparison import prediction_psi
from fedbus.domain.serving_gates import GateVerdict, judge_canary, judge_shadow, judge_watch
from fedbus.learning.predictor import ModelRefused

JUDGE_INTERVAL_S: Final = 0.05
"""Figures are not looked at more often than this."""

Judge: TypeAlias = Callable[[ModelComparison, float, ServingTable], GateVerdict | None]


@dataclass(frozen=True)
class ComparisonOutcome:
    """What a pair of models came to."""

    verdict: GateVerdict
    beside: ModelComparison


class ModelSwap:
    """One client's way of taking up models in one task, as its *table* wants it."""

    def __init__(
        self,
        engine: InferenceEngine,
        trials: OfflineEvaluation,
        table: ServingTable,
        say: Callable[[Message], None],
        *,
        task: str,
        client: ClientId,
    ) -> None:
        self._engine = engine
        self._trials = trials
        self._table = table
        self._say = say
        self._task = task
        self._client = client

    async def first(self, ref: ModelRef, make: MakePredictor) -> None:
        """Serve a model where nothing serves yet. Raises ModelRefused."""
        self._engine.serve(await self._prepared(ref, make))
        self._say(ModelCommitted(task=self._task, client=self._client, model=ref))

    async def update(self, ref: ModelRef, make: MakePredictor) -> ModelPair:
        """Let a model take the place of the one that serves, which stands behind it. Raises ModelRefused."""
        served = await self._prepared(ref, make)
        if self._table.shadow_samples:
            await self._shadowed(served)
        if self._table.canary_share:
            await self._canaried(served)
        return await self._committed(served)

    async def watched(self, pair: ModelPair) -> bool:
        """Whether the new model of *pair* may stay, once that is known; else the old one serves again."""
        try:
            judged = await self._judged(pair, judge_watch, self._table.watch_s)
        finally:
            self._engine.part(pair)
        if judged.verdict.passed:
            return True
        self._engine.serve(pair.old)
        self._say(
            ModelRolledBack(
                task=self._task,
                client=self._client,
                model=pair.old.ref,
                returned_from=pair.new.ref,
                reason=_append_cause(judged.verdict.reason, pair),
                beside=judged.beside,
            )
        )
        return False

    # --- prepare -----------------------------------------------------------------------------

    async def _prepared(self, ref: ModelRef, make: MakePredictor) -> LoadedModel:
        began, old = time.monotonic(), self._engine.serving
        try:
            served = await self._engine.made(ref, make, self._trials.probe)
            load_s = time.monotonic() - began
            trial: EvaluationResult = await self._engine.run_in_load_thread(
                lambda: self._trials.of(served, old, self._engine.in_turn)
            )
        except ModelRefused as error:
            self._turn_down(ref, "load", str(error))
            raise
        if not trial.verdict.passed:
            self._turn_down(ref, "holdout", trial.verdict.reason, trial=trial)
            raise ModelRefused(trial.verdict.reason)
        self._say(
            ModelPrepared(
                task=self._task,
                client=self._client,
                model=ref,
                serving=old.ref.version if old else None,
                load_s=load_s,
                probed=trial.probed,
                replayed=trial.replayed,
                holdout=trial.holdout,
                old_score=trial.old_score,
                new_score=trial.new_score,
            )
        )
        return served

    # --- beside the old one --------------------------------------------------------------------

    async def _shadowed(self, served: LoadedModel) -> None:
        pair = self._engine.compare(served, ComparisonRole.SHADOW)
        judged = await self._passed(pair, "shadow", judge_shadow, self._table.shadow_s)
        self._say(
            ModelShadowed(
                task=self._task,
                client=self._client,
                model=served.ref,
                serving=pair.old.ref.version,
                beside=judged.beside,
                seconds=pair.seconds,
            )
        )

    async def _canaried(self, served: LoadedModel) -> None:
        share = self._table.canary_share
        pair = self._engine.compare(served, ComparisonRole.CANARY, share=share)
        judged = await self._passed(pair, "canary", judge_canary, self._table.canary_s)
        self._say(
            ModelCanaried(
                task=self._task,
                client=self._client,
                model=served.ref,
                serving=pair.old.ref.version,
                share=share,
                beside=judged.beside,
                seconds=pair.seconds,
            )
        )

    async def _passed(self, pair: ModelPair, step: str, judge: Judge, longest_s: float) -> ComparisonOutcome:
        """What *pair* came to, where the new one may go on. Raises ModelRefused."""
        try:
            judged = await self._judged(pair, judge, longest_s)
        finally:
            self._engine.part(pair)
        if not judged.verdict.passed:
            reason = _append_cause(judged.verdict.reason, pair)
            self._turn_down(pair.new.ref, step, reason, beside=judged.beside)
            raise ModelRefused(reason)
        return judged

    async def _judged(self, pair: ModelPair, judge: Judge, longest_s: float) -> ComparisonOutcome:
        """Look whenever there is something new, until there is a verdict: when time is up there is one."""
        while True:
            pair.moved.clear()
            beside = pair.figures()
            if self._table.max_answer_psi is not None:
                beside = await self._with_answers(pair)
            verdict = judge(beside, pair.seconds, self._table)
            if verdict is not None:
                return ComparisonOutcome(verdict, await self._with_answers(pair))
            await _wait_for_change(pair, longest_s - pair.seconds)

    async def _with_answers(self, pair: ModelPair) -> ModelComparison:
        """The figures, with how far the answers are distributed otherwise."""
        old, new = list(pair.old.answers), list(pair.new.answers)
        psi = await asyncio.to_thread(prediction_psi, old, new, at_least=self._table.min_answers)
        return pair.figures().model_copy(update={"answer_psi": psi})

    # --- commit ----------------------------------------------------------------------------------

    async def _committed(self, served: LoadedModel) -> ModelPair:
        pair = self._engine.compare(served, ComparisonRole.WATCH)
        old, began = pair.old, time.monotonic()
        left = old.waiting
        await old.idle.wait()
        self._say(
            ModelCommitted(
                task=self._task,
                client=self._client,
                model=served.ref,
                replaced=old.ref.version,
                drained=left,
                drain_s=time.monotonic() - began,
            )
        )
        return pair

    def _turn_down(
        self,
        ref: ModelRef,
        step: str,
        reason: str,
        *,
        trial: EvaluationResult | None = None,
        beside: ModelComparison | None = None,
    ) -> None:
        serving = self._engine.current
        self._say(
            ModelRejected(
                task=self._task,
                client=self._client,
                model=ref,
                serving=serving.version if serving else None,
                step=step,
                reason=reason[:500],
                old_score=trial.old_score if trial else None,
                new_score=trial.new_score if trial else None,
                beside=beside,
            )
        )


async def _wait_for_change(pair: ModelPair, within_s: float) -> None:
    """Wait until there is something new to judge, or the time is up."""
    try:
        async with asyncio.timeout(max(0.0, within_s)):
            await pair.moved.wait()
            await asyncio.sleep(JUDGE_INTERVAL_S)
    except TimeoutError:
        return


def _append_cause(reason: str, pair: ModelPair) -> str:
    return f"{reason}; the last time: {pair.reason}" if pair.errors and pair.reason else reason
