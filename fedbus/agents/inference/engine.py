"""The inference engine of one task: a bounded request queue, one model thread, and dynamic batching.

    ask → queue → model thread: all queued requests of one model and shape that fit into a batch → prediction

A batch never waits for more requests, and the batch size grows only while a batch takes less than *batch_s*. A
request is answered by the model that was selected when the request arrived. When the queue is full, the engine
rejects the request with a Retry-After time.

While a new model is compared with the current one, both are a `ModelPair`. If the new model of a pair fails on a
request, the old one answers it, so users see no error.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from fedbus.agents.inference.loaded_model import (
    Array,
    LoadedModel,
    MakePredictor,
    check_outputs,
    load_and_probe,
)
from fedbus.agents.inference.model_pair import ComparisonRole, ModelPair
from fedbus.agents.inference.plain_json import (
    INTERNAL_ERROR,
    NO_MODEL,
    SERVICE_UNAVAILABLE,
    TOO_MANY_REQUESTS,
    HttpError,
    to_one_line,
)
from fedbus.agents.inference.prediction_batch import (
    BatchResult,
    PendingRequest,
    Prediction,
    RequestFailed,
    run_batch,
)
from fedbus.contracts.model import ModelRef
from fedbus.domain.prediction_comparison import count_disagreements, to_scalars

NO_MODEL_RETRY_S: Final = 1
NOT_SERVED_RETRY_S: Final = 60
MAX_QUEUED: Final = 256
"""Maximum number of queued requests."""
MAX_BATCH_S: Final = 0.05
"""Target duration of a batch."""


class InferenceEngine:
    """The request queue and the model thread of one task."""

    def __init__(self, *, max_queued: int = MAX_QUEUED, batch_s: float = MAX_BATCH_S) -> None:
        self._max_queued = max_queued
        self._batch_s = batch_s
        self._serving: LoadedModel | None = None
        self.not_served = ""
        """Why the newest version of the device is not served; empty if it is."""
        self._pair: ModelPair | None = None
        self._queue: deque[PendingRequest] = deque()
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
        model: LoadedModel = await self.run_in_load_thread(lambda: load_and_probe(ref, make, probe))
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
            new.fallback = pair.old
        if role is ComparisonRole.WATCH:
            self._serving = new
            self.not_served = ""
        self._pair = pair
        return pair

    def end_comparison(self, pair: ModelPair) -> None:
        """End the comparison of *pair*; the served model stays the same. A new model that serves has no fallback."""
        if self._pair is pair:
            self._pair = None
        if self._serving is pair.new:
            pair.new.fallback = None

    def roll_back(self, pair: ModelPair) -> None:
        """Serve the old model of *pair* again. It also answers the pending requests on which the new one fails."""
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
        request = PendingRequest(inputs, model)
        self._queue.append(request)
        model.pending_requests += 1
        model.idle.clear()
        if self._batch_task is None or self._batch_task.done():
            self._batch_task = asyncio.create_task(self._process_queue(), name="predictions")
        try:
            return await request.prediction
        except RequestFailed as error:
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
            result = await loop.run_in_executor(self._model_thread, run_batch, batch, model, model.fallback)
            for request, prediction in zip(batch, result.predictions, strict=True):
                request.answer(prediction)
            model.record_batch(result.seconds, result.samples, self._batch_s)
            model.recent_outputs.extend(result.scalars)
            if pair is not None:
                self._update_pair(pair, model, result)

    def _take_batch(self) -> Iterator[PendingRequest]:
        """Take the first request and those directly behind it with the same batching key, up to the batch size."""
        first = self._queue[0]
        key, room = first.batch_key, max(first.model.batch_limit, len(first.inputs))
        while self._queue and self._queue[0].batch_key == key and len(self._queue[0].inputs) <= room:
            request = self._queue.popleft()
            room -= len(request.inputs)
            if not request.prediction.done():  # done: the client has disconnected
                yield request

    # --- comparison of two models --------------------------------------------------------------

    def _update_pair(self, pair: ModelPair, model: LoadedModel, result: BatchResult) -> None:
        """Add the result of a batch of *model* to the metrics of *pair*."""
        if model is pair.new:
            pair.samples += result.samples
            pair.errors += result.errors
            pair.reason = result.reason or pair.reason
            pair.new_s.append(result.seconds)
        elif model is pair.old:
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
