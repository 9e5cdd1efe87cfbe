"""The swap of the served model in phases: prepare, shadow, canary, commit, watch; and the roll-back.

    prepare   load the new model, probe it, and compare scores on the labelled samples of the device
    shadow    both models answer each request; users get the answers of the current one     (optional)
    canary    the new model answers a share of the requests                                 (optional)
    commit    the new model answers all new requests; the old one finishes those it accepted
    watch     for `watch-s` the old model stays loaded as fallback

The current model serves in each phase, and a rejected new model changes nothing. Each phase publishes an event
with its comparison of the models; `fedbus.domain.serving_gates` decides on it.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from fedbus.agents.inference.engine import InferenceEngine
from fedbus.agents.inference.loaded_model import LoadedModel, MakePredictor
from fedbus.agents.inference.model_pair import ComparisonRole, ModelPair
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
"""Minimum pause between two judgements of a comparison."""

Judge: TypeAlias = Callable[[ModelComparison, float, ServingTable], GateVerdict | None]


@dataclass(frozen=True)
class ComparisonOutcome:
    """The verdict on a pair of models, and the comparison that it is based on."""

    verdict: GateVerdict
    comparison: ModelComparison


class ModelSwap:
    """The model swaps of one client in one task, with the phases that *table* configures."""

    def __init__(
        self,
        engine: InferenceEngine,
        evaluation: OfflineEvaluation,
        table: ServingTable,
        publish: Callable[[Message], None],
        *,
        task: str,
        client: ClientId,
    ) -> None:
        self._engine = engine
        self._evaluation = evaluation
        self._table = table
        self._publish = publish
        self._task = task
        self._client = client

    async def serve_first(self, ref: ModelRef, make: MakePredictor) -> None:
        """Serve the first model. Raises ModelRefused."""
        self._engine.serve(await self._prepare(ref, make))
        self._publish(ModelCommitted(task=self._task, client=self._client, model=ref))

    def relabel(self, ref: ModelRef) -> None:
        """Serve the loaded weights as the version *ref*, which has the same weights."""
        replaced = self._engine.current
        self._engine.relabel(ref)
        version = replaced.version if replaced else None
        self._publish(ModelCommitted(task=self._task, client=self._client, model=ref, replaced=version))

    async def replace(self, ref: ModelRef, make: MakePredictor) -> ModelPair:
        """Replace the served model and return the pair to watch. Raises ModelRefused."""
        model = await self._prepare(ref, make)
        if self._table.shadow_samples:
            await self._run_shadow(model)
        if self._table.canary_share:
            await self._run_canary(model)
        return await self._commit(model)

    async def watch(self, pair: ModelPair) -> bool:
        """Watch the new model of *pair* and return True if it passes; otherwise roll back to the old one.

        If this is cancelled, the caller ends the comparison.
        """
        outcome = await self._judge(pair, judge_watch, self._table.watch_s)
        if outcome.verdict.passed:
            self._engine.end_comparison(pair)
            return True
        self._engine.roll_back(pair)
        self._publish(
            ModelRolledBack(
                task=self._task,
                client=self._client,
                model=pair.old.ref,
                returned_from=pair.new.ref,
                reason=_append_cause(outcome.verdict.reason, pair),
                beside=outcome.comparison,
            )
        )
        return False

    # --- prepare -----------------------------------------------------------------------------

    async def _prepare(self, ref: ModelRef, make: MakePredictor) -> LoadedModel:
        start, old = time.monotonic(), self._engine.serving
        try:
            model = await self._engine.load_model(ref, make, self._evaluation.probe)
            load_s = time.monotonic() - start
            result: EvaluationResult = await self._engine.run_in_load_thread(
                lambda: self._evaluation.evaluate(model, old, self._engine.run_in_model_thread)
            )
        except ModelRefused as error:
            self._publish_rejected(ref, "load", str(error))
            raise
        if not result.verdict.passed:
            self._publish_rejected(ref, "holdout", result.verdict.reason, result=result)
            raise ModelRefused(result.verdict.reason)
        self._publish(
            ModelPrepared(
                task=self._task,
                client=self._client,
                model=ref,
                serving=old.ref.version if old else None,
                load_s=load_s,
                probed=result.probed_rows,
                replayed=result.replayed_rows,
                holdout=result.holdout_rows,
                old_score=result.old_score,
                new_score=result.new_score,
            )
        )
        return model

    # --- shadow and canary ---------------------------------------------------------------------

    async def _run_shadow(self, model: LoadedModel) -> None:
        pair = self._engine.start_comparison(model, ComparisonRole.SHADOW)
        outcome = await self._require_pass(pair, "shadow", judge_shadow, self._table.shadow_s)
        self._publish(
            ModelShadowed(
                task=self._task,
                client=self._client,
                model=model.ref,
                serving=pair.old.ref.version,
                beside=outcome.comparison,
                seconds=pair.elapsed_s,
            )
        )

    async def _run_canary(self, model: LoadedModel) -> None:
        share = self._table.canary_share
        pair = self._engine.start_comparison(model, ComparisonRole.CANARY, share=share)
        outcome = await self._require_pass(pair, "canary", judge_canary, self._table.canary_s)
        self._publish(
            ModelCanaried(
                task=self._task,
                client=self._client,
                model=model.ref,
                serving=pair.old.ref.version,
                share=share,
                beside=outcome.comparison,
                seconds=pair.elapsed_s,
            )
        )

    async def _require_pass(
        self, pair: ModelPair, step: str, judge: Judge, timeout_s: float
    ) -> ComparisonOutcome:
        """Return the outcome of *pair* if the new model passes.

        Raises:
            ModelRefused: it does not pass.

        """
        try:
            outcome = await self._judge(pair, judge, timeout_s)
        finally:
            self._engine.end_comparison(pair)
        if not outcome.verdict.passed:
            reason = _append_cause(outcome.verdict.reason, pair)
            self._publish_rejected(pair.new.ref, step, reason, comparison=outcome.comparison)
            raise ModelRefused(reason)
        return outcome

    async def _judge(self, pair: ModelPair, judge: Judge, timeout_s: float) -> ComparisonOutcome:
        """Judge *pair* after each change until there is a verdict; *judge* decides at the latest at *timeout_s*."""
        while True:
            pair.changed.clear()
            comparison = pair.compare()
            if self._table.max_answer_psi is not None:
                comparison = await self._compare_with_psi(pair)
            verdict = judge(comparison, pair.elapsed_s, self._table)
            if verdict is not None:
                return ComparisonOutcome(verdict, await self._compare_with_psi(pair))
            await _wait_for_change(pair, timeout_s - pair.elapsed_s)

    async def _compare_with_psi(self, pair: ModelPair) -> ModelComparison:
        """Return the comparison with the PSI between the predictions of both models."""
        old, new = list(pair.old.recent_outputs), list(pair.new.recent_outputs)
        psi = await asyncio.to_thread(prediction_psi, old, new, at_least=self._table.min_answers)
        return pair.compare().model_copy(update={"answer_psi": psi})

    # --- commit ----------------------------------------------------------------------------------

    async def _commit(self, model: LoadedModel) -> ModelPair:
        pair = self._engine.start_comparison(model, ComparisonRole.WATCH)
        old, start = pair.old, time.monotonic()
        pending = old.pending_requests
        await old.idle.wait()
        self._publish(
            ModelCommitted(
                task=self._task,
                client=self._client,
                model=model.ref,
                replaced=old.ref.version,
                drained=pending,
                drain_s=time.monotonic() - start,
            )
        )
        return pair

    def _publish_rejected(
        self,
        ref: ModelRef,
        step: str,
        reason: str,
        *,
        result: EvaluationResult | None = None,
        comparison: ModelComparison | None = None,
    ) -> None:
        serving = self._engine.current
        self._publish(
            ModelRejected(
                task=self._task,
                client=self._client,
                model=ref,
                serving=serving.version if serving else None,
                step=step,
                reason=reason[:500],
                old_score=result.old_score if result else None,
                new_score=result.new_score if result else None,
                beside=comparison,
            )
        )


async def _wait_for_change(pair: ModelPair, within_s: float) -> None:
    """Wait until *pair* changes, at most *within_s*."""
    try:
        async with asyncio.timeout(max(0.0, within_s)):
            await pair.changed.wait()
            await asyncio.sleep(JUDGE_INTERVAL_S)
    except TimeoutError:
        return


def _append_cause(reason: str, pair: ModelPair) -> str:
    return f"{reason}; last error: {pair.reason}" if pair.errors and pair.reason else reason
