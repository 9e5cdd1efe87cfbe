"""Serving, captured data and data checks: three tables of ``[tool.fedbus]``.

[tool.fedbus.serving]   the limits of requests, and the steps of a model replacement
[tool.fedbus.capture]   the captured data that a device keeps, and what training uses of them
[tool.fedbus.checks]    the data checks on a device, and the limits for drift
"""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from fedbus.contracts.task.base import ConfigSection, ObjectReference

MAX_TRIAL_S: Final = 90.0
"""The limit for shadow and canary together. It is below the two minutes that the client manager waits for a model."""

Dtype = Literal[
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
]


class ServingTable(ConfigSection):
    """The limits of requests, the batching of requests, and the steps of a model replacement."""

    input_dtype: Dtype | None = None
    """The dtype of the model's inputs. Default: the dtype of `samples`, else float32."""
    input_shape: tuple[int, ...] | None = None
    """The shape of one sample, with -1 for any length. Default: the shape of `samples`, else any shape."""
    max_inputs: int = Field(default=1024, ge=1)
    """The maximum number of samples in a request."""
    max_body_bytes: int = Field(default=4 * 1024**2, ge=1024)
    """The maximum size of a request."""
    max_queued: int = Field(default=256, ge=1)
    """The maximum number of requests in the queue of the model."""
    batch_ms: float = Field(default=50.0, gt=0)
    """The target duration of one batch, which limits the wait of the next request."""

    holdout: ObjectReference | None = None
    """Loads labelled samples of the device that are never used for training:
    ``(partition_id, num_partitions) -> (inputs, labels)``."""
    score: ObjectReference | None = None
    """Computes the score of a model: ``(outputs, labels) -> float``, higher is better. Default: accuracy if the outputs
    are classes (integers), else R²: for a regression, or for the probability of a class with the labels 0 and 1. Name a
    function if the outputs are logits."""
    tolerance: float = Field(default=0.05, ge=0)
    """How much the score of a new model on the holdout may be below that of the current model."""
    min_holdout: int = Field(default=50, ge=1)
    """The minimum number of labelled samples for this comparison. With fewer, every model passes."""

    shadow_samples: int = Field(default=0, ge=0)
    """Samples that both models answer in the shadow step; users get the answers of the current model. 0: no shadow."""
    shadow_s: float = Field(default=30.0, gt=0)
    """The maximum duration of the shadow step."""
    max_disagreement: float = Field(default=1.0, ge=0, le=1)
    """The maximum share of samples that both models answer differently."""

    canary_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of requests that the new model answers in the canary step. 0: no canary."""
    canary_samples: int = Field(default=200, ge=1)
    """The number of samples that the new model answers in the canary step."""
    canary_s: float = Field(default=30.0, gt=0)
    """The maximum duration of the canary step."""

    watch_s: float = Field(default=300.0, ge=0)
    """How long the previous model stays loaded as fallback after the commit."""
    max_errors: int = Field(default=3, ge=1)
    """The number of requests that the new model fails and the previous one answers, at which the device rolls back."""
    max_answer_psi: float | None = Field(default=None, gt=0)
    """The maximum population stability index (PSI) between the answers of both models. Default: no limit."""
    min_answers: int = Field(default=200, ge=20)
    """The minimum number of answers of each model for this comparison."""

    @model_validator(mode="after")
    def _check_trial_duration(self) -> Self:
        shadow_s = self.shadow_s if self.shadow_samples else 0.0
        canary_s = self.canary_s if self.canary_share else 0.0
        if shadow_s + canary_s > MAX_TRIAL_S:
            raise ValueError(
                f"shadow-s and canary-s add up to {shadow_s + canary_s:g} s (limit {MAX_TRIAL_S:g} s)"
            )
        return self


class CaptureTable(ConfigSection):
    """The captured data that a device keeps, and what training uses of them."""

    enabled: bool = True
    """If false, the device captures nothing."""
    max_rows: int = Field(default=20_000, ge=1)
    """The maximum number of rows. Beyond it, the oldest are deleted."""
    max_bytes: int = Field(default=1024**3, ge=1024**2)
    """The maximum size on disk. Beyond it, the oldest rows are deleted."""
    max_age_s: float = Field(default=30 * 24 * 3600.0, gt=0)
    """The maximum age of a row."""
    retry_s: float = Field(default=60.0, gt=0)
    """How long capture pauses after a failed write."""
    holdout_share: float = Field(default=0.2, ge=0, lt=1)
    """The share of rows that is excluded from training. New models are evaluated on them."""
    training_data: ObjectReference | None = None
    """Converts captured rows to training data: ``(inputs, outputs, labels) -> (inputs, labels)``. Default: the labelled
    rows, unchanged."""


class ChecksTable(ConfigSection):
    """The data checks on a device, which compare captured rows with a reference."""

    every_s: float = Field(default=60.0, gt=0)
    """The interval of the checks."""
    reference: ObjectReference | None = None
    """Loads the reference, which has the distribution of the training data:
    ``(partition_id, num_partitions) -> (inputs, labels)``. Default: `samples`."""
    min_rows: int = Field(default=200, ge=20)
    """The minimum number of rows for the detection of drift."""
    max_rows: int = Field(default=1000, ge=20)
    """The maximum number of rows in a check, newest first."""
    min_labelled: int = Field(default=50, ge=1)
    """The minimum number of labelled rows of the served model, among the checked rows, for its live accuracy."""
    minimum: float | None = None
    """The minimum of an input. Default: the minimum of the reference minus a tenth of its range."""
    maximum: float | None = None
    """The maximum of an input. Default: the maximum of the reference plus a tenth of its range."""
    classes: int | None = Field(default=None, ge=2)
    """The number of classes. Default: that of the reference."""
    min_class_share: float = Field(default=0.0, ge=0, lt=1)
    """The minimum share of each class in the labelled rows."""
    max_unlabelled_share: float = Field(default=1.0, ge=0, le=1)
    """The maximum share of rows without a label."""
    max_psi: float = Field(default=0.25, gt=0)
    """The population stability index (PSI) of a feature from which it counts as drift."""
    max_p: float = Field(default=0.01, gt=0, lt=1)
    """The maximum p-value of the Kolmogorov-Smirnov test for drift, over all features together."""
