"""The first phase of a new model: loaded, tried and judged beside the old one, which goes on answering.

    load → answers the task's probe → answers the last captured inputs → is no worse on the labelled holdout

Everything here blocks and runs in a thread of its own. The holdout is what the task names for it and what
the device has captured, knows the truth of, and keeps out of training.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from fedbus.agents.inference.engine import LoadedModel, check_outputs
from fedbus.agents.inference.plain_json import to_one_line
from fedbus.contracts.task.serving import CaptureTable, ServingTable
from fedbus.domain.row_validation import is_shape_allowed
from fedbus.domain.serving_gates import PASSED, GateVerdict, judge_holdout, score
from fedbus.learning.predictor import ModelRefused, Predictor
from fedbus.stores.captured.reader import read_holdout_rows, read_newest_rows
from fedbus.stores.errors import StoreError

REPLAY_ROWS: Final = 64
"""The last captured inputs that a new model must answer."""
MAX_HOLDOUT_ROWS: Final = 1000
"""Labelled rows that it is judged by, at most."""
_BATCH_ROWS: Final = 256

log = structlog.get_logger("fedbus.inference_trial")
Array: TypeAlias = np.ndarray[Any, Any]
Score: TypeAlias = Callable[[Array, Array], float]
Predict: TypeAlias = Callable[[Array], Array]
RunInModelThread: TypeAlias = Callable[[Callable[[], Array]], Array]
"""Does something where a model answers, in its turn."""


@dataclass(frozen=True)
class EvaluationResult:
    """How the new model did."""

    probed: int = 0
    replayed: int = 0
    holdout: int = 0
    old_score: float | None = None
    new_score: float | None = None
    verdict: GateVerdict = PASSED
    seconds: float = 0.0


class OfflineEvaluation:
    """What this device tries its models on: *probe*, the rows captured in *database*, the task's *holdout*."""

    def __init__(
        self,
        serving: ServingTable,
        capture: CaptureTable,
        *,
        database: Path | None = None,
        probe: Array | None = None,
        holdout: tuple[Array, Array] | None = None,
        score: Score = score,
    ) -> None:
        self._serving = serving
        self._share = capture.holdout_share
        self._database = database
        self.probe = probe
        self._holdout = holdout
        self._score = score

    def of(self, new: LoadedModel, old: LoadedModel | None, in_turn: RunInModelThread) -> EvaluationResult:
        """Try *new*, and judge it beside *old* where there is one. Raises ModelRefused where it does not answer.

        *old* is asked *in_turn*, between the batches that it answers.
        """
        began = time.monotonic()
        replayed = self._replay(new.predictor)
        probed = 0 if self.probe is None else len(self.probe)
        inputs, labels = self._labelled(new.predictor)
        if old is None or len(labels) < self._serving.min_holdout:
            return EvaluationResult(probed, replayed, seconds=time.monotonic() - began)
        try:
            before = self._scored(lambda some: in_turn(lambda: old.predictor.predict(some)), inputs, labels)
            now = self._scored(new.predictor.predict, inputs, labels)
        except Exception as error:  # the task's own code
            raise ModelRefused(f"the models cannot be compared: {to_one_line(error)}") from error
        verdict = judge_holdout(before, now, len(labels), self._serving)
        return EvaluationResult(probed, replayed, len(labels), before, now, verdict, time.monotonic() - began)

    def _replay(self, predictor: Predictor) -> int:
        """Let it answer what was asked last; how many that were."""
        inputs = _select_same_shape(
            self._captured(lambda at: read_newest_rows(at, REPLAY_ROWS).inputs), predictor
        )
        if not len(inputs):
            return 0
        try:
            check_outputs(predictor.predict(inputs), len(inputs))
        except Exception as error:  # the task's own code
            raise ModelRefused(
                f"the model does not answer the last {len(inputs)} captured inputs: {to_one_line(error)}"
            ) from error
        return len(inputs)

    def _labelled(self, predictor: Predictor) -> tuple[Array, Array]:
        """The device's own samples whose truth is known, and that no training gets."""
        named = self._holdout if self._holdout is not None else (np.empty(0), np.empty(0))
        rows = self._captured(lambda at: read_holdout_rows(at, self._share, MAX_HOLDOUT_ROWS))
        if not len(rows):
            return named[0][:MAX_HOLDOUT_ROWS], named[1][:MAX_HOLDOUT_ROWS]
        inputs, labels = _select_same_shape(rows.inputs, predictor), np.asarray(rows.labels)
        if not len(named[0]):
            return inputs, labels[: len(inputs)]
        if inputs.shape[1:] != named[0].shape[1:] or labels.shape[1:] != named[1].shape[1:]:
            return named[0][:MAX_HOLDOUT_ROWS], named[1][:MAX_HOLDOUT_ROWS]
        both = np.concatenate([inputs, named[0]]), np.concatenate([labels, named[1]])
        return both[0][:MAX_HOLDOUT_ROWS], both[1][:MAX_HOLDOUT_ROWS]

    def _scored(self, predict: Predict, inputs: Array, labels: Array) -> float:
        parts = [
            check_outputs(predict(some), len(some))
            for some in np.array_split(inputs, max(1, len(inputs) // _BATCH_ROWS))
        ]
        return float(self._score(np.concatenate(parts), labels))

    def _captured(self, read: Callable[[Path], Any]) -> Any:
        """What *read* finds among the captured rows; nothing where they cannot be read."""
        if self._database is None or not self._database.exists():
            return np.empty(0)
        try:
            return read(self._database)
        except StoreError as error:
            log.warning("a model is tried without captured data", reason=str(error))
            return np.empty(0)


def _select_same_shape(inputs: Array, predictor: Predictor) -> Array:
    """*inputs*, where the model takes such; else none: an older model may have taken others."""
    shape = predictor.input_shape
    fits = shape is None or is_shape_allowed(inputs.shape[1:], shape)
    return inputs if fits and inputs.dtype == predictor.input_dtype else inputs[:0]
