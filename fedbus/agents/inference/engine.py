"""The inference engine of one task: a bounded request queue, one model thread, and dynamic batching.

    ask → queue → model thread: all queued requests of one model and shape that fit into a batch → prediction

A batch never waits for more requests, and the batch size grows only while a batch takes less than *batch_s*. A
request is answered by the model that was selected when the request arrived. When the queue is full, the engine
rejects the request with a Retry-After time.

While a new model is compared with the current one, both are a `ModelPair`:

    shadow   the old model answers; the new model predicts the same samples, for the comparison only
    canary   the new model answers a share of the requests
    watch    the new model answers all requests; the old one stays loaded as fallback

If the new model of a pair fails on a request, the old one answers it, so users see no error. The engine only
collects the metrics of the comparison; `fedbus.domain.serving_gates` decides on them.
"""

import asyncio
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from fedbus.agents.inference.plain_json import (
    INTERNAL_ERROR,
    NO_MODEL,
    SERVICE_UNAVAILABLE,
    TOO_MANY_REQUESTS,
    HttpError,
    to_one_line,
)
from fedbus.contracts.model import ModelRef
from fedbus.contracts.serving import ModelComparison
from fedbus.domain.prediction_comparison import count_disagreements, to_scalars
from fedbus.learning.predictor import ModelRefused, Predictor

NO_MODEL_RETRY_S: Final = 1
NOT_SERVED_RETRY_S: Final = 60
MAX_QUEUED: Final = 256
"""Maximum number of queued requests."""
MAX_BATCH: Final = 1024
"""Maximum number of samples in a batch."""
MAX_BATCH_S: Final = 0.05
"""Target duration of a batch."""
INITIAL_BATCH: Final = 32
"""Maximum number of samples in the first batch of a model."""
MAX_RECENT_OUTPUTS: Final = 1000
"""Predictions kept of each model, for the comparison of distributions."""
MAX_RECENT_TIMES: Final = 500
_NEWEST_BATCH_WEIGHT: Final = 0.2
"""Weight of the newest batch in the moving average of the time for a sample."""

log = structlog.get_logger("fedbus.inference")
Array: TypeAlias = np.ndarray[Any, Any]
MakePredictor: TypeAlias = Callable[[], Predictor]


@dataclass(eq=False)
class LoadedModel:
    """A loaded model with its statistics."""

    ref: ModelRef
    predictor: Predictor
    sample_s: float = 0.0
    """Moving average of the seconds for one sample; 0 before the first batch."""
    batch_limit: int = INITIAL_BATCH
    """Maximum number of samples in the next batch."""
    pending_requests: int = 0
    """Number of requests that this model has accepted and not answered yet."""
    example_output: Array | None = None
    """One prediction (1, …), for the dtype and shape of the output."""
    recent_outputs: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_OUTPUTS))
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    def record_batch(self, seconds: float, count: int, batch_s: float) -> None:
        """Record the duration of a batch of *count* samples, and adapt the size of the next batch to *batch_s*."""
        sample_s = seconds / count
        weight = _NEWEST_BATCH_WEIGHT if self.sample_s else 1.0
        self.sample_s += weight * (sample_s - self.sample_s)
        if seconds > batch_s:
            self.batch_limit = max(1, int(count * batch_s / seconds))
        elif seconds < batch_s / 2 and 2 * count >= self.batch_limit:
            self.batch_limit = min(MAX_BATCH, 2 * self.batch_limit)


class ComparisonRole(StrEnum):
    """The role of the new model in a pair."""

    SHADOW = "shadow"
    CANARY = "canary"
    WATCH = "watch"


@dataclass(eq=False)
class ModelPair:
    """Two models on the same requests, and the metrics of their comparison."""

    old: LoadedModel
    new: LoadedModel
    role: ComparisonRole
    share: float = 0.0
    """Share of the requests that a canary answers, 0 to 1."""
    samples: int = 0
    errors: int = 0
    reason: str = ""
    """The last error of the new model."""
    compared_samples: int = 0
    """Number of samples that both models have predicted."""
    disagreements: int = 0
    old_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TIMES))
    new_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TIMES))
    started_at: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after each change of the metrics."""
    is_shadow_busy: bool = False
    canary_credit: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    def routes_to_canary(self) -> bool:
        """Decide whether the canary answers the next request; deterministic, so that it gets exactly its share."""
        self.canary_credit += self.share
        if self.canary_credit < 1:
            return False
        self.canary_credit -= 1
        return True

    def compare(self) -> ModelComparison:
        """Return the metrics without the PSI of the predictions, which takes longer to compute."""
        return ModelComparison(
            samples=self.samples,
            errors=self.errors,
            disagreement=self.disagreements / self.compared_samples if self.compared_samples else None,
            old_ms=_median_ms(self.old_s),
            new_ms=_median_ms(self.new_s),
        )


@dataclass(frozen=True)
class Prediction:
    """The outputs of a model (n, …), and the model that computed them."""

    outputs: Array
    ref: ModelRef


@dataclass(frozen=True)
class _PendingRequest:
    """A queued request, with the model that was selected for it."""

    inputs: Array
    model: LoadedModel
    prediction: "asyncio.Future[Prediction]" = field(default_factory=asyncio.Future)

    @property
    def batch_key(self) -> tuple[int, tuple[int, ...]]:
        """The batching key: requests with the same model and sample shape can share a batch."""
        return id(self.model), self.inputs.shape[1:]


class InferenceEngine:
    """The request queue and the model thread of one task."""

    def __init__(self, *, max_queued: int = MAX_QUEUED, batch_s: float = MAX_BATCH_S) -> None:
        self._max_queued = max_queued
        self._batch_s = batch_s
        self._serving: LoadedModel | None = None
        self.not_served = ""
        """Why the newest version of the device is not served; empty if it is."""
        self._pair: ModelPair | None = None
        self._queue: deque[_PendingRequest] = deque()
        self._batch_task: asyncio.Task[None] | None = None
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix="load model")

    # --- selection of the model --------------------------------------------------------------

    @property
    def serving(self) -> LoadedModel | None:
        """The served model."""
        return self._serving

    @property
    def current(self) -> ModelRef | None:
        """The reference of the served model."""
        return self._serving.ref if self._serving else None

    @property
    def pair(self) -> ModelPair | None:
        return self._pair

    @property
    def queue_length(self) -> int:
        return len(self._queue)

    def choose_model(self) -> LoadedModel:
        """Select the model for the next request.

        Raises:
            HttpError: 503, no model is served, with the reason.

        """
        pair = self._pair
        if pair is not None and pair.role is ComparisonRole.CANARY and pair.routes_to_canary():
            return pair.new
        return self.require_model()

    def require_model(self) -> LoadedModel:
        """Return the served model.

        Raises:
            HttpError: 503, no model is served, with the reason.

        """
        if self._serving is None:
            raise HttpError(
                SERVICE_UNAVAILABLE, self.not_served or NO_MODEL, retry_after_s=self._retry_after_s
            )
        return self._serving

    @property
    def _retry_after_s(self) -> int:
        """The time after which a request may succeed: a version that is not served waits for a run or for new code."""
        return NOT_SERVED_RETRY_S if self.not_served else NO_MODEL_RETRY_S

    async def load_model(self, ref: ModelRef, make: MakePredictor, probe: Array | None = None) -> LoadedModel:
        """Load and probe a model while the current one serves. Raises ModelRefused."""
        model: LoadedModel = await self.run_in_load_thread(lambda: _load_and_probe(ref, make, probe))
        return model

    async def run_in_load_thread(self, work: Callable[[], Any]) -> Any:
        """Run the blocking *work* in the thread that loads and evaluates models."""
        return await asyncio.get_running_loop().run_in_executor(self._load_thread, work)

    def run_in_model_thread(self, work: Callable[[], Array]) -> Array:
        """Run *work* in the model thread, between two batches. Blocks; not for the event loop."""
        return self._model_thread.submit(work).result()

    def serve(self, model: LoadedModel) -> None:
        """Serve *model* from the next request on, and end the current pair."""
        self._serving = model
        self._pair = None
        self.not_served = ""

    def relabel(self, ref: ModelRef) -> None:
        """Serve the loaded weights as the version *ref*, which has the same weights."""
        assert self._serving is not None
        assert self._serving.ref.sha256 == ref.sha256, "other weights"
        self._serving.ref = ref
        self.not_served = ""

    def start_comparison(self, new: LoadedModel, role: ComparisonRole, *, share: float = 0.0) -> ModelPair:
        """Start to compare *new* with the served model; for a watch, *new* becomes the served model."""
        assert self._serving is not None, "a comparison needs a served model"
        pair = ModelPair(self._serving, new, role, share)
        if role is not ComparisonRole.SHADOW:
            new.recent_outputs.clear()
        if role is ComparisonRole.WATCH:
            self._serving = new
            self.not_served = ""
        self._pair = pair
        return pair

    def end_comparison(self, pair: ModelPair) -> None:
        """End the comparison of *pair*; the served model stays the same."""
        if self._pair is pair:
            self._pair = None

    def roll_back(self, pair: ModelPair) -> None:
        """Serve the old model of *pair* again."""
        if self._pair is pair:
            self.serve(pair.old)

    async def stop(self) -> None:
        """Answer the accepted requests, then stop the threads."""
        if self._batch_task is not None:
            await self._batch_task
        if self._shadow_tasks:
            await asyncio.wait(self._shadow_tasks)
        await asyncio.to_thread(self._model_thread.shutdown)
        await asyncio.to_thread(self._load_thread.shutdown)

    # --- queue and model thread -----------------------------------------------------------------

    async def predict(self, inputs: Array, model: LoadedModel) -> Prediction:
        """Predict *inputs* (n, …) with *model*, or with the fallback if it fails.

        Raises:
            HttpError: 429, the queue is full; 500, the model fails.

        """
        if len(self._queue) >= self._max_queued:
            raise HttpError(
                TOO_MANY_REQUESTS,
                f"too many queued requests (limit {self._max_queued})",
                retry_after_s=self._estimate_wait_s(),
            )
        request = _PendingRequest(inputs, model)
        self._queue.append(request)
        model.pending_requests += 1
        model.idle.clear()
        if self._batch_task is None or self._batch_task.done():
            self._batch_task = asyncio.create_task(self._process_queue(), name="predictions")
        try:
            return await request.prediction
        except _PredictionFailed as error:
            raise HttpError(INTERNAL_ERROR, str(error)) from error
        finally:
            model.pending_requests -= 1
            if not model.pending_requests:
                model.idle.set()

    def _estimate_wait_s(self) -> int:
        """Estimate the time to process the queue, in whole seconds."""
        return max(1, math.ceil(sum(len(request.inputs) * request.model.sample_s for request in self._queue)))

    async def _process_queue(self) -> None:
        """Process the queue in batches until it is empty."""
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = list(self._take_batch())
            if not batch:
                continue
            model = batch[0].model
            pair = self._pair
            fallback = pair.old if pair is not None and model is pair.new else None
            result = await loop.run_in_executor(self._model_thread, _run_batch, batch, model, fallback)
            for request, prediction in zip(batch, result.predictions, strict=True):
                _set_result(request.prediction, prediction)
            model.record_batch(result.seconds, result.samples, self._batch_s)
            model.recent_outputs.extend(result.scalars)
            if pair is not None:
                self._update_pair(pair, model, result)

    def _take_batch(self) -> Iterator[_PendingRequest]:
        """Take the first request and those directly behind it with the same batching key, up to the batch size."""
        first = self._queue[0]
        key, room = first.batch_key, max(first.model.batch_limit, len(first.inputs))
        while self._queue and self._queue[0].batch_key == key and len(self._queue[0].inputs) <= room:
            request = self._queue.popleft()
            room -= len(request.inputs)
            if not request.prediction.done():  # done: the client has disconnected
                yield request

    # --- comparison of two models --------------------------------------------------------------

    def _update_pair(self, pair: ModelPair, model: LoadedModel, result: "_BatchResult") -> None:
        """Add the result of a batch of *model* to the metrics of *pair*."""
        if model is pair.new:
            pair.samples += result.samples
            pair.errors += result.errors
            pair.reason = result.reason or pair.reason
            pair.new_s.append(result.seconds)
        else:
            pair.old_s.append(result.seconds)
            if pair.role is ComparisonRole.SHADOW and not pair.is_shadow_busy and result.outputs is not None:
                self._start_shadow(pair, result.inputs, result.outputs)
        pair.changed.set()

    def _start_shadow(self, pair: ModelPair, inputs: Array, outputs: Array) -> None:
        """Predict a batch of the old model with the new one; batches that arrive meanwhile are skipped."""
        pair.is_shadow_busy = True
        task = asyncio.create_task(self._run_shadow(pair, inputs, outputs), name="shadow")
        self._shadow_tasks.add(task)
        task.add_done_callback(self._shadow_tasks.discard)

    async def _run_shadow(self, pair: ModelPair, inputs: Array, outputs: Array) -> None:
        start = time.monotonic()
        try:
            new_outputs = await self.run_in_load_thread(
                lambda: check_outputs(pair.new.predictor.predict(inputs), len(inputs))
            )
        except Exception as error:  # noqa: BLE001 - code of the task: any exception counts as an error
            pair.errors += 1
            pair.reason = to_one_line(error)
        else:
            pair.new_s.append(time.monotonic() - start)
            pair.compared_samples += len(inputs)
            pair.disagreements += count_disagreements(outputs, new_outputs)
            pair.new.recent_outputs.extend(to_scalars(new_outputs))
        pair.samples += len(inputs)
        pair.is_shadow_busy = False
        pair.changed.set()


class _PredictionFailed(Exception):
    """The model failed on a request; the text is the reason."""


@dataclass
class _BatchResult:
    """The result of a batch."""

    inputs: Array
    samples: int
    predictions: list[Prediction | _PredictionFailed] = field(default_factory=list)
    outputs: Array | None = None
    """The outputs of the whole batch; None if the batch failed."""
    scalars: list[float] = field(default_factory=list)
    """The model's own outputs, each as one number; without those of the fallback."""
    seconds: float = 0.0
    errors: int = 0
    """Number of requests that the model failed and the fallback answered."""
    reason: str = ""


def check_outputs(outputs: Array, expected: int) -> Array:
    """Return *outputs* if there are *expected* finite ones.

    Raises:
        ValueError: there are more or fewer, or one has NaN or infinity.

    """
    if len(outputs) != expected:
        raise ValueError(f"the model returned {len(outputs)} outputs for {expected} samples")
    if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
        raise ValueError("the output of the model has NaN or infinity")
    return outputs


def _load_and_probe(ref: ModelRef, make: MakePredictor, probe: Array | None) -> LoadedModel:
    """Load the model with *make* and warm it up, on *probe* if given; runs in the load thread."""
    try:
        predictor = make()
        model = LoadedModel(ref, predictor)
        if probe is not None:
            _warm_up_on(model, probe)
        elif predictor.input_shape is not None:
            _warm_up_on_zeros(model, predictor.input_shape)
    except ModelRefused:
        raise
    except Exception as error:  # code of the task: any exception rejects the model
        raise ModelRefused(f"cannot load the model: {to_one_line(error)}") from error
    return model


def _warm_up_on(model: LoadedModel, samples: Array) -> None:
    """Predict *samples* twice, because the first prediction can include lazy initialization."""
    if probe := getattr(model.predictor, "probe", None):
        probe(samples)
    model.predictor.predict(samples)
    model.example_output = check_outputs(model.predictor.predict(samples), len(samples))[:1]


def _warm_up_on_zeros(model: LoadedModel, shape: tuple[int, ...]) -> None:
    """Predict a sample of zeros, so that the first request does not wait for lazy initialization.

    An error does not reject the model, because zeros are not a valid sample for all models.
    """
    zeros = np.zeros((1, *(1 if size == -1 else size for size in shape)), model.predictor.input_dtype)
    try:
        model.predictor.predict(zeros)
        model.example_output = check_outputs(model.predictor.predict(zeros), 1)
    except Exception as error:  # noqa: BLE001 - code of the task
        log.info("Model warm-up failed", version=model.ref.version, reason=to_one_line(error))


def _run_batch(
    batch: list[_PendingRequest], model: LoadedModel, fallback: LoadedModel | None
) -> _BatchResult:
    """Predict *batch*, whose requests have one batching key; runs in the model thread."""
    sizes = [len(request.inputs) for request in batch]
    inputs = np.concatenate([request.inputs for request in batch]) if len(batch) > 1 else batch[0].inputs
    result = _BatchResult(inputs, sum(sizes))
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
    batch: list[_PendingRequest], model: LoadedModel, fallback: LoadedModel | None, result: _BatchResult
) -> _BatchResult:
    """Predict each request of a failed batch separately, so that only the invalid ones fail."""
    for single in (_run_batch([request], model, fallback) for request in batch):
        result.predictions += single.predictions
        result.scalars += single.scalars
        result.errors += single.errors
        result.seconds += single.seconds
        result.reason = single.reason or result.reason
    return result


def _predict_with_fallback(
    request: _PendingRequest, fallback: LoadedModel | None, result: _BatchResult
) -> Prediction | _PredictionFailed:
    """Predict with the fallback; only if it succeeds, count an error of the new model."""
    failure = _PredictionFailed(f"prediction failed: {result.reason}")
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


def _set_result(future: "asyncio.Future[Prediction]", result: Prediction | _PredictionFailed) -> None:
    if future.done():
        return
    if isinstance(result, _PredictionFailed):
        future.set_exception(result)
    else:
        future.set_result(result)


def _median_ms(seconds: deque[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None
