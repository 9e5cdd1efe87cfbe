"""A loaded model: whether a device accepts it, and how many samples fit into its next batch."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import structlog

from fedbus.agents.inference.plain_json import to_one_line
from fedbus.contracts.model import ModelRef
from fedbus.learning.predictor import ModelRefused, Predictor

MAX_BATCH: Final = 1024
"""Maximum number of samples in a batch."""
INITIAL_BATCH: Final = 32
"""Maximum number of samples in the first batch of a model."""
MAX_RECENT_OUTPUTS: Final = 1000
"""Predictions kept of each model, for the comparison of distributions."""
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
    fallback: "LoadedModel | None" = None
    """The model that answers the requests on which this one fails. It stays set after a roll-back or a failed canary,
    for the requests that this model has accepted before."""

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


def load_and_probe(ref: ModelRef, make: MakePredictor, probe: Array | None) -> LoadedModel:
    """Load the model with *make* and warm it up, on *probe* if given. Raises ModelRefused."""
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
