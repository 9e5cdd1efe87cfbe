"""Events of a device about its models and its data: model replacement, row counts, data checks and drift.

Each step of a model replacement is an event with its measurements:

    model_prepared → model_shadowed? → model_canaried? → model_committed → model_returned?
                  ↘ model_turned_down, at any step

Only counts of the captured data leave a device: rows, rows of each class, rows in each bin. The edges of
bins do not leave it, because an edge is a value of a sample; neither do labels that are not classes.
"""

from typing import ClassVar

from pydantic import Field

from fedbus.contracts.message import Body, ClientMessage, Family
from fedbus.contracts.model import ModelRef


class ModelComparison(Body):
    """A comparison of the new and the current model, on the same requests or on similar ones."""

    samples: int = 0
    """Samples that the new model received."""
    errors: int = 0
    """Samples that the new model failed on and the current model did not."""
    disagreement: float | None = None
    """The share of different answers among the samples that both answered; None if there are none."""
    answer_psi: float | None = None
    """The population stability index (PSI) between the answers of both models."""
    old_ms: float | None = None
    """The median duration of one batch of the current model."""
    new_ms: float | None = None
    """The median duration of one batch of the new model."""


class ModelPrepared(ClientMessage):
    """The device has loaded a new model in addition to the current one, and the new model has passed the probe."""

    name: ClassVar[str] = "model_prepared"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int | None = None
    """The current version, which still serves."""
    load_s: float = 0.0
    probed: int = 0
    """Samples of the task that the new model answered."""
    replayed: int = 0
    """Captured inputs that the new model answered."""
    holdout: int = 0
    """Labelled samples that both models were evaluated on; 0 if there were too few for a comparison."""
    old_score: float | None = None
    """The score of the current model on these samples."""
    new_score: float | None = None
    """The score of the new model on these samples."""


class ModelRejected(ClientMessage):
    """The device has rejected a new model, at *step* and for *reason*."""

    name: ClassVar[str] = "model_turned_down"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int | None = None
    step: str
    """``load``, ``holdout``, ``shadow`` or ``canary``."""
    reason: str
    old_score: float | None = None
    """The score of the current model on the holdout."""
    new_score: float | None = None
    """The score of the new model on the holdout."""
    beside: ModelComparison | None = None
    """The comparison of both models in the shadow or canary step."""


class ModelShadowed(ClientMessage):
    """The shadow step has ended: both models answered the same requests, users got the answers of the current one."""

    name: ClassVar[str] = "model_shadowed"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int
    beside: ModelComparison
    seconds: float
    """The duration of the step."""


class ModelCanaried(ClientMessage):
    """The canary step has ended: the new model answered a share of the requests."""

    name: ClassVar[str] = "model_canaried"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int
    share: float
    """The share of requests that the new model answered, 0 to 1."""
    beside: ModelComparison
    seconds: float
    """The duration of the step."""


class ModelCommitted(ClientMessage):
    """The new model answers all requests, and the previous one has answered its last."""

    name: ClassVar[str] = "model_committed"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    replaced: int | None = None
    drained: int = 0
    """Requests that the previous model still had to answer at the swap."""
    drain_s: float = 0.0


class ModelRolledBack(ClientMessage):
    """The device has rolled back to the previous model because of errors or drift of the new one."""

    name: ClassVar[str] = "model_returned"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    """The previous model, which serves again."""
    returned_from: ModelRef
    """The new model, which failed."""
    reason: str
    beside: ModelComparison
    """The comparison of both models since the commit."""


class CapturePaused(ClientMessage):
    """The device has paused data capture. Predictions continue."""

    name: ClassVar[str] = "capture_paused"
    family: ClassVar[Family] = Family.CLIENT

    reason: str
    dropped: int = 0
    """Rows lost since the agent started."""


class CaptureResumed(ClientMessage):
    """The device has resumed data capture."""

    name: ClassVar[str] = "capture_resumed"
    family: ClassVar[Family] = Family.CLIENT

    dropped: int = 0
    """Rows lost since the agent started."""


class DataCounted(ClientMessage):
    """The number of captured rows that the device has for training."""

    name: ClassVar[str] = "data_counted"
    family: ClassVar[Family] = Family.CLIENT

    labelled: int = Field(ge=0)
    unlabelled: int = Field(ge=0)
    holdout: int = Field(default=0, ge=0)
    """Labelled rows that are excluded from training; *labelled* does not include them."""
    labelled_ever: int | None = Field(default=None, ge=0)
    """Rows that got a label since the database was created, including deleted ones. It never decreases."""
    unlabelled_ever: int | None = Field(default=None, ge=0)
    """Rows that arrived without a label since the database was created, including deleted and later labelled ones. It
    never decreases."""
    database: str = ""
    """The id of the database of these two counters. After the captured data were deleted, a new database counts from
    0."""


class DataCheckResult(Body):
    """The result of one data check: its value and its limit."""

    check: str
    """``schema``, ``range``, ``balance`` or ``labels``."""
    ok: bool
    value: float
    limit: float
    what: str = ""
    """The finding as text, without any value of a sample."""


class FeatureDistribution(Body):
    """The distribution of one feature, as counts in bins that have equal shares of the reference."""

    feature: str
    counts: tuple[int, ...]
    psi: float | None = None
    """The population stability index (PSI) against the reference."""
    ks: float | None = None
    """The Kolmogorov-Smirnov statistic against the reference."""
    p: float | None = None
    """The p-value of the Kolmogorov-Smirnov test."""


class LiveAccuracy(Body):
    """The accuracy of one model version on the rows with feedback."""

    version: int
    labelled: int
    """Labelled rows among the newest ones that this version answered."""
    right: int
    """Those of them that it answered correctly."""


class DataChecked(ClientMessage):
    """The results of the data checks on the newest captured rows, and the distribution of these rows."""

    name: ClassVar[str] = "data_checked"
    family: ClassVar[Family] = Family.CLIENT

    rows: int
    findings: tuple[DataCheckResult, ...] = ()
    classes: dict[str, int] = Field(default_factory=dict)
    """Labelled rows of each known class, and of all others together (``other``); empty if labels are not classes."""
    inputs: tuple[FeatureDistribution, ...] = ()
    predictions: FeatureDistribution | None = None
    drifting: bool = False
    drift_unknown: str = ""
    """Why drift is not checked; empty if it is."""
    serving: int | None = None
    """The version that served at the time of the check."""
    live: tuple[LiveAccuracy, ...] = ()
    """The accuracy of each version on the newest rows; empty if labels are not classes."""
    seconds: float = 0.0
    """The duration of the check."""


class DriftDetected(ClientMessage):
    """The distribution of the device's inputs or predictions differs from the reference."""

    name: ClassVar[str] = "drift_detected"
    family: ClassVar[Family] = Family.CLIENT

    of: str
    """``inputs`` or ``predictions``."""
    feature: str
    """The feature with the strongest drift."""
    score: float
    """The population stability index (PSI) of *feature*."""
    ks: float | None = None
    """The Kolmogorov-Smirnov statistic of *feature*."""
    p: float | None = None
    """The p-value of the Kolmogorov-Smirnov test of *feature*."""
    features: int = 1
    """The number of features with drift."""
    rows: int = 0
    """The number of rows that were compared with the reference."""
