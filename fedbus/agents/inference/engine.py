"""The models of one task at work: a bounded queue, one thread, and models that change places.

    ask → queue → one thread: as many as wait and fit into the time of a batch, at once → answer

Nobody waits for company, and batches grow only as long as one takes less
than *batch_s*. A request stays with the model it came in under. The queue is bounded: who finds it full is
told when to come again, before anybody's memory is.

Beside the model that serves there may be a second one, and then they are a `Pair`:

    shadow   the old one answers; what it answered, the new one answers too, for the figures alone
    canary   the new one answers a share of the requests
    watch    the new one answers all, for a while after it took the old one's place

Whatever the new one of a pair fails is answered by the old one: nobody is told that it failed. What
the figures mean is not decided here, see `fedbus.domain.serving_gates`.
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
    SERVICE_UNAVAILABLE,
    TOO_MANY_REQUESTS,
    HttpError,
    to_one_line,
)
from fedbus.contracts.model import ModelRef
from fedbus.contracts.serving import ModelComparison
from fedbus.domain.prediction_comparison import count_disagreements, to_scalars
from fedbus.learning.predictor import ModelRefused, Predictor

MAX_QUEUED: Final = 256
"""Requests that may wait for the model."""
MAX_BATCH: Final = 1024
"""Samples that go through the model at once, however fast it is."""
MAX_BATCH_S: Final = 0.05
"""How long a batch may keep the model busy."""
INITIAL_BATCH: Final = 32
"""Samples in a batch while the pace of the model is not known."""
MAX_RECENT_OUTPUTS: Final = 1000
"""Of each model, to see how its answers are distributed."""
MAX_RECENT_TIMES: Final = 500
_PACE_WEIGHT: Final = 0.2
"""The weight of the newest batch in the pace of a model."""

log = structlog.get_logger("fedbus.inference_engine")
Array: TypeAlias = np.ndarray[Any, Any]
MakePredictor: TypeAlias = Callable[[], Predictor]


@dataclass(eq=False)
class LoadedModel:
    """One model that can answer, and what is known of its work."""

    ref: ModelRef
    predictor: Predictor
    sample_s: float = 0.0
    """What one sample takes, lately; 0 before the first."""
    room: int = INITIAL_BATCH
    """How many samples make a batch that ends in time, as far as was seen."""
    waiting: int = 0
    """Requests that came in under it and are not answered yet."""
    gives: Array | None = None
    """One answer, to show its type and shape."""
    answers: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_OUTPUTS))
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    def took(self, seconds: float, count: int, batch_s: float) -> None:
        """A batch of *count* samples took so long: the next may be larger, or must be smaller."""
        pace = seconds / count
        self.sample_s = pace if not self.sample_s else self.sample_s + _PACE_WEIGHT * (pace - self.sample_s)
        if seconds > batch_s:
            self.room = max(1, int(count * batch_s / seconds))
        elif seconds < batch_s / 2 and 2 * count >= self.room:
            self.room = min(MAX_BATCH, 2 * self.room)


class ComparisonRole(StrEnum):
    """How the second model of a pair takes part."""

    SHADOW = "shadow"
    CANARY = "canary"
    WATCH = "watch"


@dataclass(eq=False)
class ModelPair:
    """Two models on the same requests, and how they compare so far."""

    old: LoadedModel
    new: LoadedModel
    role: ComparisonRole
    share: float = 0.0
    """Of the requests, what a canary answers."""
    samples: int = 0
    errors: int = 0
    reason: str = ""
    """Why the new one could not answer, the last time."""
    both: int = 0
    """Samples that both have answered."""
    differing: int = 0
    old_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TIMES))
    new_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_TIMES))
    began: float = field(default_factory=time.monotonic)
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever there is something new to judge."""
    busy: bool = False
    due: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def takes_this(self) -> bool:
        """Whether the next request is one for the canary: exactly its share, and no dice."""
        self.due += self.share
        if self.due < 1:
            return False
        self.due -= 1
        return True

    def figures(self) -> ModelComparison:
        """How they compare, but for the distribution of their answers, which takes longer to say."""
        return ModelComparison(
            samples=self.samples,
            errors=self.errors,
            disagreement=self.differing / self.both if self.both else None,
            old_ms=_median_ms(self.old_s),
            new_ms=_median_ms(self.new_s),
        )


@dataclass(frozen=True)
class Prediction:
    """An answer, and whose it is."""

    outputs: Array
    ref: ModelRef


@dataclass(frozen=True)
class _PendingRequest:
    """What one request asks, of the model it came in under."""

    inputs: Array
    served: LoadedModel
    answer: "asyncio.Future[Prediction]" = field(default_factory=asyncio.Future)

    @property
    def kind(self) -> tuple[int, tuple[int, ...]]:
        """Questions of one kind can go through the model together."""
        return id(self.served), self.inputs.shape[1:]


class InferenceEngine:
    """Answers, with whichever model serves."""

    def __init__(self, *, max_queued: int = MAX_QUEUED, batch_s: float = MAX_BATCH_S) -> None:
        self._max_queued = max_queued
        self._batch_s = batch_s
        self._serving: LoadedModel | None = None
        self._pair: ModelPair | None = None
        self._queue: deque[_PendingRequest] = deque()
        self._answering: asyncio.Task[None] | None = None
        self._shadowing: set[asyncio.Task[None]] = set()
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._beside_thread = ThreadPoolExecutor(1, thread_name_prefix="load model")

    # --- which model answers -----------------------------------------------------------------

    @property
    def serving(self) -> LoadedModel | None:
        """The model that answers now."""
        return self._serving

    @property
    def current(self) -> ModelRef | None:
        """Its version."""
        return self._serving.ref if self._serving else None

    @property
    def pair(self) -> ModelPair | None:
        return self._pair

    @property
    def queued(self) -> int:
        return len(self._queue)

    def chosen(self) -> LoadedModel:
        """Who answers the request that has just come. Raises Refusal where there is no model yet."""
        pair = self._pair
        if pair is not None and pair.role is ComparisonRole.CANARY and pair.takes_this():
            return pair.new
        if self._serving is None:
            raise HttpError(
                SERVICE_UNAVAILABLE, "there is no model yet: ask again when /ready says so", retry_after_s=1
            )
        return self._serving

    async def made(self, ref: ModelRef, make: MakePredictor, probe: Array | None = None) -> LoadedModel:
        """A model, made and tried beside the one that serves. Raises ModelRefused."""
        served: LoadedModel = await self.run_in_load_thread(lambda: _load_and_probe(ref, make, probe))
        return served

    async def run_in_load_thread(self, work: Callable[[], Any]) -> Any:
        """Do *work*, which blocks, in the thread where models are loaded and tried."""
        return await asyncio.get_running_loop().run_in_executor(self._beside_thread, work)

    def in_turn(self, work: Callable[[], Array]) -> Array:
        """Do *work* where models answer, between two batches. Blocks: not for the loop."""
        return self._model_thread.submit(work).result()

    def serve(self, served: LoadedModel) -> None:
        """From the next request on *served* answers; a pair there was is over."""
        self._serving = served
        self._pair = None

    def compare(self, new: LoadedModel, role: ComparisonRole, *, share: float = 0.0) -> ModelPair:
        """Begin a pair: *new* beside the model that serves; for a watch, they change places."""
        assert self._serving is not None, "there is nothing to compare it with"
        pair = ModelPair(self._serving, new, role, share)
        if role is not ComparisonRole.SHADOW:
            new.answers.clear()
        if role is ComparisonRole.WATCH:
            self._serving = new
        self._pair = pair
        return pair

    def part(self, pair: ModelPair) -> None:
        """The pair is over; whoever serves goes on alone."""
        if self._pair is pair:
            self._pair = None

    def take_back(self, pair: ModelPair) -> None:
        """The old model of *pair* serves again."""
        if self._pair is pair:
            self.serve(pair.old)

    async def stop(self) -> None:
        """Answer what was accepted."""
        if self._answering is not None:
            await self._answering
        if self._shadowing:
            await asyncio.wait(self._shadowing)
        await asyncio.to_thread(self._model_thread.shutdown)
        await asyncio.to_thread(self._beside_thread.shutdown)

    # --- the queue, and the one thread behind it ------------------------------------------------

    async def ask(self, inputs: Array, served: LoadedModel) -> Prediction:
        """The answers to *inputs* (n, …), by *served* or who stands in for it. Raises Refusal."""
        if len(self._queue) >= self._max_queued:
            raise HttpError(TOO_MANY_REQUESTS, "too many requests wait already", retry_after_s=self._wait_s())
        question = _PendingRequest(inputs, served)
        self._queue.append(question)
        served.waiting += 1
        served.idle.clear()
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_all(), name="predictions")
        try:
            return await question.answer
        except _PredictionFailed as error:
            raise HttpError(INTERNAL_ERROR, str(error)) from error
        finally:
            served.waiting -= 1
            if not served.waiting:
                served.idle.set()

    def _wait_s(self) -> int:
        """About how long it takes until the queue is empty, in whole seconds."""
        return max(1, math.ceil(sum(len(one.inputs) * one.served.sample_s for one in self._queue)))

    async def _answer_all(self) -> None:
        """Whatever waits goes through the model together; nobody waits for company."""
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = list(self._next_batch())
            if not batch:
                continue
            served = batch[0].served
            pair = self._pair
            stand_in = pair.old if pair is not None and served is pair.new else None
            done = await loop.run_in_executor(self._model_thread, _run_batch, batch, served, stand_in)
            for question, answer in zip(batch, done.answers, strict=True):
                _set_result(question.answer, answer)
            served.took(done.seconds, done.samples, self._batch_s)
            served.answers.extend(done.own)
            if pair is not None:
                self._compare(pair, served, done)

    def _next_batch(self) -> Iterator[_PendingRequest]:
        """The first in the queue and those behind it that are of its kind, as far as they fit."""
        first = self._queue[0]
        kind, room = first.kind, max(first.served.room, len(first.inputs))
        while self._queue and self._queue[0].kind == kind and len(self._queue[0].inputs) <= room:
            question = self._queue.popleft()
            room -= len(question.inputs)
            if not question.answer.done():  # else who asked has gone
                yield question

    # --- two models beside each other ----------------------------------------------------------

    def _compare(self, pair: ModelPair, served: LoadedModel, done: "_BatchResult") -> None:
        """Note in *pair* what the batch has shown."""
        if served is pair.new:
            pair.samples += done.samples
            pair.errors += done.errors
            pair.reason = done.reason or pair.reason
            pair.new_s.append(done.seconds)
        else:
            pair.old_s.append(done.seconds)
            if pair.role is ComparisonRole.SHADOW and not pair.busy and done.whole is not None:
                self._shadow(pair, done.inputs, done.whole)
        pair.moved.set()

    def _shadow(self, pair: ModelPair, inputs: Array, outputs: Array) -> None:
        """Let the new model answer what the old one has answered; while it is at it, batches pass it by."""
        pair.busy = True
        task = asyncio.create_task(self._shadowed(pair, inputs, outputs), name="shadow")
        self._shadowing.add(task)
        task.add_done_callback(self._shadowing.discard)

    async def _shadowed(self, pair: ModelPair, inputs: Array, outputs: Array) -> None:
        began = time.monotonic()
        try:
            theirs = await self.run_in_load_thread(
                lambda: check_outputs(pair.new.predictor.predict(inputs), len(inputs))
            )
        except Exception as error:  # noqa: BLE001 - the task's own code: whatever it raises is a figure
            pair.errors += 1
            pair.reason = to_one_line(error)
        else:
            pair.new_s.append(time.monotonic() - began)
            pair.both += len(inputs)
            pair.differing += count_disagreements(outputs, theirs)
            pair.new.answers.extend(to_scalars(theirs))
        pair.samples += len(inputs)
        pair.busy = False
        pair.moved.set()


class _PredictionFailed(Exception):
    """The model could not answer; the text says why."""


@dataclass
class _BatchResult:
    """What became of a batch."""

    inputs: Array
    samples: int
    answers: list[Prediction | _PredictionFailed] = field(default_factory=list)
    whole: Array | None = None
    """All the answers in one, where the batch went through as it was."""
    own: list[float] = field(default_factory=list)
    """The model's own answers, each as one number."""
    seconds: float = 0.0
    errors: int = 0
    """Requests that it failed and whoever stood in answered."""
    reason: str = ""


def check_outputs(outputs: Array, expected: int) -> Array:
    """*outputs*, if they are as many numbers as they should be."""
    if len(outputs) != expected:
        raise ValueError(f"it gave {len(outputs)} answers to {expected} samples")
    if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
        raise ValueError("its answer holds NaN or infinity")
    return outputs


def _load_and_probe(ref: ModelRef, make: MakePredictor, probe: Array | None) -> LoadedModel:
    """The model that *make* makes, if it answers *probe*; runs in a thread."""
    try:
        predictor = make()
        served = LoadedModel(ref, predictor)
        if probe is not None:
            _warm_up_on(served, probe)
        elif predictor.input_shape is not None:
            _warm_up_on_zeros(served, predictor.input_shape)
    except ModelRefused:
        raise
    except Exception as error:  # the task's own code: whatever it raises, the old model stays
        raise ModelRefused(f"the model cannot be loaded: {to_one_line(error)}") from error
    return served


def _warm_up_on(served: LoadedModel, samples: Array) -> None:
    """Let the model answer *samples* twice: the first time it may still have things to set up."""
    if probe := getattr(served.predictor, "probe", None):
        probe(samples)
    served.predictor.predict(samples)
    served.gives = check_outputs(served.predictor.predict(samples), len(samples))[:1]


def _warm_up_on_zeros(served: LoadedModel, shape: tuple[int, ...]) -> None:
    """Let a model that has no samples to be tried on answer nought, so that no request waits for what it sets up.

    It is refused for nothing: to some models nought is no sample.
    """
    nought = np.zeros((1, *(1 if one == -1 else one for one in shape)), served.predictor.input_dtype)
    try:
        served.predictor.predict(nought)
        served.gives = check_outputs(served.predictor.predict(nought), 1)
    except Exception as error:  # noqa: BLE001 - the task's own code
        log.info("the model is not warm", version=served.ref.version, reason=to_one_line(error))


def _run_batch(
    batch: list[_PendingRequest], served: LoadedModel, stand_in: LoadedModel | None
) -> _BatchResult:
    """What becomes of *batch*, all of one kind; runs in the model's thread."""
    sizes = [len(question.inputs) for question in batch]
    together = np.concatenate([one.inputs for one in batch]) if len(batch) > 1 else batch[0].inputs
    done = _BatchResult(together, sum(sizes))
    began = time.monotonic()
    try:
        outputs = check_outputs(served.predictor.predict(together), done.samples)
    except Exception as error:  # noqa: BLE001 - the task's own code: whatever it raises, others go on
        if len(batch) > 1:
            return _run_one_by_one(batch, served, stand_in, done)
        done.reason = to_one_line(error)
        done.answers = [_predict_with_fallback(batch[0], stand_in, done)]
    else:
        done.whole = outputs
        done.own = to_scalars(outputs)
        ends = list(itertools.accumulate(sizes))
        done.answers = [Prediction(part, served.ref) for part in np.split(outputs, ends[:-1])]
        if served.gives is None:
            served.gives = outputs[:1]
    done.seconds = time.monotonic() - began
    return done


def _run_one_by_one(
    batch: list[_PendingRequest], served: LoadedModel, stand_in: LoadedModel | None, done: _BatchResult
) -> _BatchResult:
    """Find out whose question it was that failed all."""
    for one in (_run_batch([question], served, stand_in) for question in batch):
        done.answers += one.answers
        done.own += one.own
        done.errors += one.errors
        done.seconds += one.seconds
        done.reason = one.reason or done.reason
    return done


def _predict_with_fallback(
    question: _PendingRequest, stand_in: LoadedModel | None, done: _BatchResult
) -> Prediction | _PredictionFailed:
    """The old model's answer, where there is one: then it was not the question's fault."""
    no = _PredictionFailed(f"the model could not answer: {done.reason}")
    if stand_in is not None:
        try:
            outputs = check_outputs(stand_in.predictor.predict(question.inputs), len(question.inputs))
        except Exception as error:  # noqa: BLE001 - it is the task's own code, too
            log.warning("a prediction failed", reason=to_one_line(error))
            return no
        done.errors += 1
        return Prediction(outputs, stand_in.ref)
    log.warning("a prediction failed", reason=done.reason)
    return no


def _set_result(future: "asyncio.Future[Prediction]", answer: Prediction | _PredictionFailed) -> None:
    if future.done():
        return
    if isinstance(answer, _PredictionFailed):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _median_ms(seconds: deque[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None
