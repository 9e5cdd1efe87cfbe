"""Prediction of a batch: which of its requests the model answers, which the fallback, and which fail.

If a batch fails, each of its requests is predicted separately, so that only the invalid ones fail. The functions
block; the engine calls them in its model thread.
"""

import asyncio
import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import structlog

from fedbus.agents.inference.loaded_model import Array, LoadedModel, check_outputs
from fedbus.agents.inference.plain_json import to_one_line
from fedbus.contracts.model import ModelRef
from fedbus.domain.prediction_comparison import to_scalars

log = structlog.get_logger("fedbus.inference")


@dataclass(frozen=True)
class Prediction:
    """The outputs of a model (n, …), and the model that computed them."""

    outputs: Array
    ref: ModelRef


class RequestFailed(Exception):
    """The model failed on a request; the text is the reason."""


@dataclass(frozen=True)
class PendingRequest:
    """A queued request, with the model that was selected for it."""

    inputs: Array
    model: LoadedModel
    prediction: "asyncio.Future[Prediction]" = field(default_factory=asyncio.Future)

    @property
    def batch_key(self) -> tuple[int, tuple[int, ...]]:
        """The batching key: requests with the same model and sample shape can share a batch."""
        return id(self.model), self.inputs.shape[1:]

    def answer(self, result: Prediction | RequestFailed) -> None:
        """End the request, unless its client has disconnected."""
        if self.prediction.done():
            return
        if isinstance(result, RequestFailed):
            self.prediction.set_exception(result)
        else:
            self.prediction.set_result(result)


@dataclass
class BatchResult:
    """The result of a batch."""

    inputs: Array
    samples: int
    predictions: list[Prediction | RequestFailed] = field(default_factory=list)
    outputs: Array | None = None
    """The outputs of the whole batch; None if the batch failed."""
    scalars: list[float] = field(default_factory=list)
    """The model's own outputs, each as one number; without those of the fallback."""
    seconds: float = 0.0
    errors: int = 0
    """Number of requests that the model failed and the fallback answered."""
    reason: str = ""


def run_batch(batch: list[PendingRequest], model: LoadedModel, fallback: LoadedModel | None) -> BatchResult:
    """Predict *batch*, whose requests have one batching key."""
    sizes = [len(request.inputs) for request in batch]
    inputs = np.concatenate([request.inputs for request in batch]) if len(batch) > 1 else batch[0].inputs
    result = BatchResult(inputs, sum(sizes))
    start = time.monotonic()
    try:
        outputs = check_outputs(model.predictor.predict(inputs), result.samples)
    except Exception as error:  # noqa: BLE001 - code of the task: other requests must not fail with it
        if len(batch) > 1:
            return _run_one_by_one(batch, model, fallback, result)
        result.reason = to_one_line(error)
        result.predictions = [_predict_with_fallback(batch[0], fallback, result)]
    else:
        result.outputs = outputs
        result.scalars = to_scalars(outputs)
        ends = list(itertools.accumulate(sizes))
        result.predictions = [Prediction(part, model.ref) for part in np.split(outputs, ends[:-1])]
        if model.example_output is None:
            model.example_output = outputs[:1]
    result.seconds = time.monotonic() - start
    return result


def _run_one_by_one(
    batch: list[PendingRequest], model: LoadedModel, fallback: LoadedModel | None, result: BatchResult
) -> BatchResult:
    """Predict each request of a failed batch separately, so that only the invalid ones fail."""
    for single in (run_batch([request], model, fallback) for request in batch):
        result.predictions += single.predictions
        result.scalars += single.scalars
        result.errors += single.errors
        result.seconds += single.seconds
        result.reason = single.reason or result.reason
    return result


def _predict_with_fallback(
    request: PendingRequest, fallback: LoadedModel | None, result: BatchResult
) -> Prediction | RequestFailed:
    """Predict with the fallback; only if it succeeds, count an error of the new model."""
    failure = RequestFailed(f"prediction failed: {result.reason}")
    if fallback is not None:
        try:
            outputs = check_outputs(fallback.predictor.predict(request.inputs), len(request.inputs))
        except Exception as error:  # noqa: BLE001 - code of the task
            log.warning("Prediction failed", reason=to_one_line(error))
            return failure
        result.errors += 1
        return Prediction(outputs, fallback.ref)
    log.warning("Prediction failed", reason=result.reason)
    return failure
