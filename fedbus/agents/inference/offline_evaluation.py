"""The offline evaluation of a new model, before it answers requests; the current model serves meanwhile.

    load → predict the task's probe → predict the last captured inputs → compare scores on the labelled holdout

All functions here block and run in a separate thread. The holdout consists of the samples that the task declares,
and of the labelled captured rows of the device that are excluded from training.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from fedbus.agents.inference.loaded_model import LoadedModel, check_outputs
from fedbus.agents.inference.plain_json import to_one_line
from fedbus.contracts.task.serving import CaptureTable, ServingTable
from fedbus.domain.row_validation import is_shape_allowed
from fedbus.domain.serving_gates import PASSED, GateVerdict, judge_holdout, score
from fedbus.learning.predictor import ModelRefused, Predictor
from fedbus.stores.captured.reader import read_holdout_rows, read_newest_rows
from fedbus.stores.errors import StoreError

REPLAY_ROWS: Final = 64
"""Number of captured inputs, the newest ones, that a new model must predict."""
MAX_HOLDOUT_ROWS: Final = 1000
"""Maximum number of labelled rows for the comparison of scores."""
_BATCH_ROWS: Final = 256

log = structlog.get_logger("fedbus.inference")
Array: TypeAlias = np.ndarray[Any, Any]
Score: TypeAlias = Callable[[Array, Array], float]
Predict: TypeAlias = Callable[[Array], Array]
RunInModelThread: TypeAlias = Callable[[Callable[[], Array]], Array]
"""Runs a function in the model thread, between two batches."""


@dataclass(frozen=True)
class EvaluationResult:
    """The result of the offline evaluation of a new model."""

    probed_rows: int = 0
    replayed_rows: int = 0
    holdout_rows: int = 0
    old_score: float | None = None
    new_score: float | None = None
    verdict: GateVerdict = PASSED
    seconds: float = 0.0


class OfflineEvaluation:
    """The samples of a device for evaluation: *probe*, the rows captured in *database*, and *holdout* of the task."""

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

    def evaluate(
        self, new: LoadedModel, old: LoadedModel | None, in_turn: RunInModelThread
    ) -> EvaluationResult:
        """Evaluate *new*, and compare its score with that of *old*, if there is one.

        *in_turn* runs the predictions of *old* in the model thread, between two batches.

        Raises:
            ModelRefused: *new* fails to predict.

        """
        start = time.monotonic()
        replayed = self._replay(new.predictor)
        probed = 0 if self.probe is None else len(self.probe)
        inputs, labels = self._load_holdout(new.predictor)
        if old is None or len(labels) < self._serving.min_holdout:
            return EvaluationResult(probed, replayed, seconds=time.monotonic() - start)
        try:
            old_score = self._compute_score(
                lambda batch: in_turn(lambda: old.predictor.predict(batch)), inputs, labels
            )
            new_score = self._compute_score(new.predictor.predict, inputs, labels)
        except Exception as error:  # the task's own code
            raise ModelRefused(f"cannot compare the models on the holdout: {to_one_line(error)}") from error
        verdict = judge_holdout(old_score, new_score, len(labels), self._serving)
        return EvaluationResult(
            probed, replayed, len(labels), old_score, new_score, verdict, time.monotonic() - start
        )

    def _replay(self, predictor: Predictor) -> int:
        """Predict the last captured inputs and return their number."""
        inputs = _select_same_shape(
            self._read_captured(lambda path: read_newest_rows(path, REPLAY_ROWS).inputs), predictor
        )
        if not len(inputs):
            return 0
        try:
            check_outputs(predictor.predict(inputs), len(inputs))
        except Exception as error:  # the task's own code
            raise ModelRefused(
                f"the model fails on the last {len(inputs)} captured inputs: {to_one_line(error)}"
            ) from error
        return len(inputs)

    def _load_holdout(self, predictor: Predictor) -> tuple[Array, Array]:
        """Return the labelled samples that are excluded from training: captured rows, then those of the task."""
        task_inputs, task_labels = self._holdout if self._holdout is not None else (np.empty(0), np.empty(0))
        rows = self._read_captured(lambda path: read_holdout_rows(path, self._share, MAX_HOLDOUT_ROWS))
        if not len(rows):
            return task_inputs[:MAX_HOLDOUT_ROWS], task_labels[:MAX_HOLDOUT_ROWS]
        inputs, labels = _select_same_shape(rows.inputs, predictor), np.asarray(rows.labels)
        if not len(task_inputs):
            return inputs, labels[: len(inputs)]
        if inputs.shape[1:] != task_inputs.shape[1:] or labels.shape[1:] != task_labels.shape[1:]:
            return task_inputs[:MAX_HOLDOUT_ROWS], task_labels[:MAX_HOLDOUT_ROWS]
        inputs, labels = np.concatenate([inputs, task_inputs]), np.concatenate([labels, task_labels])
        return inputs[:MAX_HOLDOUT_ROWS], labels[:MAX_HOLDOUT_ROWS]

    def _compute_score(self, predict: Predict, inputs: Array, labels: Array) -> float:
        outputs = [
            check_outputs(predict(batch), len(batch))
            for batch in np.array_split(inputs, max(1, len(inputs) // _BATCH_ROWS))
        ]
        return float(self._score(np.concatenate(outputs), labels))

    def _read_captured(self, read: Callable[[Path], Any]) -> Any:
        """Return the captured rows that *read* selects, or an empty array if they cannot be read."""
        if self._database is None or not self._database.exists():
            return np.empty(0)
        try:
            return read(self._database)
        except StoreError as error:
            log.warning("Captured data unavailable; evaluating the model without it", reason=str(error))
            return np.empty(0)


def _select_same_shape(inputs: Array, predictor: Predictor) -> Array:
    """Return *inputs* if their shape and dtype are those of the model, otherwise none.

    Inputs captured for an older model can differ.
    """
    shape = predictor.input_shape
    is_same_shape = shape is None or is_shape_allowed(inputs.shape[1:], shape)
    return inputs if is_same_shape and inputs.dtype == predictor.input_dtype else inputs[:0]
