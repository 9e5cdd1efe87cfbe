"""How a task wants its models served, its captured data kept, and both looked at: three parts of ``[tool.fedbus]``.

[tool.fedbus.serving]   what a request may be, and what a new model must show before it serves
[tool.fedbus.capture]   what a device keeps of its predictions, and what training gets of it
[tool.fedbus.checks]    what is checked of the data on a device, and from when on it has drifted
"""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from fedbus.contracts.task.base import ConfigSection, ObjectReference

MAX_TRIAL_S: Final = 90.0
"""The client manager waits two minutes for a new model: what it is tried for stays well below."""

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
    """What a request may be, how requests go through the model, and how a new model takes the old one's place."""

    input_dtype: Dtype | None = None
    """What the model takes; left out: as the task's samples are, else float32."""
    input_shape: tuple[int, ...] | None = None
    """The shape of one sample, -1 where any length will do; left out: as the task's samples are, else anything."""
    max_inputs: int = Field(default=1024, ge=1)
    """Samples in one request."""
    max_body_bytes: int = Field(default=4 * 1024**2, ge=1024)
    """Of one request."""
    max_queued: int = Field(default=256, ge=1)
    """Requests that may wait for the model."""
    batch_ms: float = Field(default=50.0, gt=0)
    """How long one batch may keep the model busy: so long waits, at most, who comes just after it began."""

    holdout: ObjectReference | None = None
    """``(partition_id, num_partitions) -> (inputs, labels)``: labelled samples of the device, never trained on."""
    score: ObjectReference | None = None
    """``(outputs, labels) -> float``, more is better; left out: accuracy, or R² where labels are no classes."""
    tolerance: float = Field(default=0.05, ge=0)
    """By how much a new model's score on the holdout may be below the old one's."""
    min_holdout: int = Field(default=50, ge=1)
    """Labelled samples that it takes to judge; with fewer, every model passes this gate."""

    shadow_samples: int = Field(default=0, ge=0)
    """Samples that both models answer before the new one may; only the old one's answers are given. 0: none."""
    shadow_s: float = Field(default=30.0, gt=0)
    """After which the shadow ends, whatever has been asked by then."""
    max_disagreement: float = Field(default=1.0, ge=0, le=1)
    """The share of answers in which the new model may differ from the old one."""

    canary_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of requests that the new model answers before it answers all. 0: none."""
    canary_samples: int = Field(default=200, ge=1)
    """Samples that it answers so."""
    canary_s: float = Field(default=30.0, gt=0)
    """After which the canary ends, whatever it has been asked by then."""

    watch_s: float = Field(default=300.0, ge=0)
    """For how long the old model is kept at hand after the swap, to be returned to."""
    max_errors: int = Field(default=3, ge=1)
    """Requests that the new model fails and the old one answers, before the old one is back."""
    max_answer_psi: float | None = Field(default=None, gt=0)
    """How far the new model's answers may drift from the old one's (PSI); left out: as far as they like."""
    min_answers: int = Field(default=200, ge=20)
    """Answers of each model that it takes to say so."""

    @model_validator(mode="after")
    def _check_trial_duration(self) -> Self:
        shadow_s = self.shadow_s if self.shadow_samples else 0.0
        canary_s = self.canary_s if self.canary_share else 0.0
        if shadow_s + canary_s > MAX_TRIAL_S:
            raise ValueError(f"shadow-s and canary-s may come to {MAX_TRIAL_S:g} s in all")
        return self


class CaptureTable(ConfigSection):
    """What a device keeps of the predictions it made, and what training gets of it."""

    enabled: bool = True
    """false: nothing is kept."""
    max_rows: int = Field(default=20_000, ge=1)
    """Beyond this the oldest go."""
    max_bytes: int = Field(default=1024**3, ge=1024**2)
    """On disk; beyond this the oldest go."""
    max_age_s: float = Field(default=30 * 24 * 3600.0, gt=0)
    """How old a row may become."""
    retry_s: float = Field(default=60.0, gt=0)
    """How long capture rests where the disk takes nothing, before it tries again."""
    holdout_share: float = Field(default=0.2, ge=0, lt=1)
    """The share of rows that no training gets: by their labels new models are judged."""
    training_data: ObjectReference | None = None
    """``(inputs, outputs, labels) -> (inputs, labels)``; left out: the rows with a label, as they are."""


class ChecksTable(ConfigSection):
    """What is checked of a device's data, against what the model was trained on."""

    every_s: float = Field(default=60.0, gt=0)
    """From one look to the next."""
    reference: ObjectReference | None = None
    """``(partition_id, num_partitions) -> (inputs, labels)``: as the model's training data; left out: `samples`."""
    min_rows: int = Field(default=200, ge=20)
    """Rows that it takes to speak of drift."""
    max_rows: int = Field(default=1000, ge=20)
    """The newest rows are looked at, so many at most."""
    min_labelled: int = Field(default=50, ge=1)
    """Labelled rows of the model that serves, among these, that it takes to speak of its live accuracy."""
    minimum: float | None = None
    """What an input may be at the least; left out: as for the maximum."""
    maximum: float | None = None
    """What an input may be at the most; left out: what the reference has, and a tenth of its width to either side."""
    classes: int | None = Field(default=None, ge=2)
    """How many classes there are; left out: as many as the reference has."""
    min_class_share: float = Field(default=0.0, ge=0, lt=1)
    """Of the labelled rows, how many each class should have at least."""
    max_unlabelled_share: float = Field(default=1.0, ge=0, le=1)
    """How many of the rows may be without a label."""
    max_psi: float = Field(default=0.25, gt=0)
    """From this population stability index on it is drift."""
    max_p: float = Field(default=0.01, gt=0, lt=1)
    """And the Kolmogorov-Smirnov test must be as sure as this, over all features together."""
