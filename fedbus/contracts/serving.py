"""What a device says of its predictions and its data: how each new model fared, counts, checks, drift.

Every step of a model's way into service is an event with its figures:

    model_prepared → model_shadowed? → model_canaried? → model_committed → model_returned?
                  ↘ model_turned_down, at any of them

Of the data only counts leave a device: how many rows, how many of each class, how many in each
bin. The bins' edges stay, since an edge is a value that somebody had; so do labels that are no classes.
"""

from typing import ClassVar

from pydantic import Field

from fedbus.contracts.message import Body, ClientMessage, Family
from fedbus.contracts.model import ModelRef


class ModelComparison(Body):
    """Two models on the same requests, or on like ones."""

    samples: int = 0
    """What the new model was asked."""
    errors: int = 0
    """What it could not answer and the old one could."""
    disagreement: float | None = None
    """The share of samples that both answered, and differently; None where none was answered by both."""
    answer_psi: float | None = None
    """How far the new one's answers are distributed otherwise than the old one's."""
    old_ms: float | None = None
    new_ms: float | None = None
    """The median time of one batch."""


class ModelPrepared(ClientMessage):
    """A new model is loaded beside the old one, and has answered what it was tried on."""

    word: ClassVar[str] = "model_prepared"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int | None = None
    """The version that answers meanwhile."""
    load_s: float = 0.0
    probed: int = 0
    """Samples of the task that it answered."""
    replayed: int = 0
    """Captured inputs that it answered."""
    holdout: int = 0
    """Labelled samples that both were judged by; 0: too few, so that nothing was judged."""
    old_score: float | None = None
    new_score: float | None = None


class ModelRejected(ClientMessage):
    """A new model does not get to serve: why, and at which step."""

    word: ClassVar[str] = "model_turned_down"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int | None = None
    step: str
    """``load``, ``holdout``, ``shadow`` or ``canary``."""
    reason: str
    old_score: float | None = None
    new_score: float | None = None
    beside: ModelComparison | None = None


class ModelShadowed(ClientMessage):
    """Both models have answered the same requests; the users got the old one's answers."""

    word: ClassVar[str] = "model_shadowed"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int
    beside: ModelComparison
    seconds: float


class ModelCanaried(ClientMessage):
    """A share of the requests was answered by the new model."""

    word: ClassVar[str] = "model_canaried"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    serving: int
    share: float
    beside: ModelComparison
    seconds: float


class ModelCommitted(ClientMessage):
    """The new model answers all, and the old one has answered its last request."""

    word: ClassVar[str] = "model_committed"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    replaced: int | None = None
    drained: int = 0
    """Requests that the old one still had to answer at the swap."""
    drain_s: float = 0.0


class ModelRolledBack(ClientMessage):
    """The old model is back, by itself: the new one erred, or drifted."""

    word: ClassVar[str] = "model_returned"
    family: ClassVar[Family] = Family.CLIENT

    model: ModelRef
    """The old one, which serves again."""
    returned_from: ModelRef
    reason: str
    beside: ModelComparison


class CapturePaused(ClientMessage):
    """The device takes no more captured data for a while; predictions go on."""

    word: ClassVar[str] = "capture_paused"
    family: ClassVar[Family] = Family.CLIENT

    reason: str
    dropped: int = 0
    """Rows lost since the agent started, these among them."""


class CaptureResumed(ClientMessage):
    """The device captures again."""

    word: ClassVar[str] = "capture_resumed"
    family: ClassVar[Family] = Family.CLIENT

    dropped: int = 0


class DataCounted(ClientMessage):
    """How many captured rows the device holds for training."""

    word: ClassVar[str] = "data_counted"
    family: ClassVar[Family] = Family.CLIENT

    labelled: int = Field(ge=0)
    unlabelled: int = Field(ge=0)
    holdout: int = Field(default=0, ge=0)
    """Labelled rows that are kept out of training; not among *labelled*."""
    labelled_ever: int | None = Field(default=None, ge=0)
    """Rows that got a label since the database began, also those that made room since; it only grows."""
    unlabelled_ever: int | None = Field(default=None, ge=0)
    """The same of rows that came without a label, whether they have got one since or not."""
    database: str = ""
    """What these two are counted in: a device whose captured data were deleted begins another, at nought."""


class DataCheckResult(Body):
    """One check: what was looked at, what it came to, and what it may come to."""

    check: str
    """``schema``, ``range``, ``balance`` or ``labels``."""
    ok: bool
    value: float
    limit: float
    what: str = ""
    """In words, with no value of a sample in them."""


class FeatureDistribution(Body):
    """How one feature is distributed: counts in bins that have equal shares of the reference."""

    feature: str
    counts: tuple[int, ...]
    psi: float | None = None
    ks: float | None = None
    p: float | None = None


class LiveAccuracy(Body):
    """How often one version was right, of what users have said was true."""

    version: int
    labelled: int
    """Answers of it among the newest rows whose truth is known."""
    right: int


class DataChecked(ClientMessage):
    """What was checked of the newest captured rows, and how they are distributed."""

    word: ClassVar[str] = "data_checked"
    family: ClassVar[Family] = Family.CLIENT

    rows: int
    findings: tuple[DataCheckResult, ...] = ()
    classes: dict[str, int] = Field(default_factory=dict)
    """Labelled rows of each known class, and of all others together (``other``); none where labels are no classes."""
    inputs: tuple[FeatureDistribution, ...] = ()
    predictions: FeatureDistribution | None = None
    drifting: bool = False
    drift_unknown: str = ""
    """Why drift is not looked for, where it is not."""
    serving: int | None = None
    """The version that answered at the time of the check."""
    live: tuple[LiveAccuracy, ...] = ()
    """Of the newest rows, how often each version was right; nothing where labels are no classes."""
    seconds: float = 0.0
    """What the check took, beside the loop."""


class DriftDetected(ClientMessage):
    """The inputs or predictions of the device are no longer as the training data were."""

    word: ClassVar[str] = "drift_detected"
    family: ClassVar[Family] = Family.CLIENT

    of: str
    """``inputs`` or ``predictions``."""
    feature: str
    """The one that has drifted most."""
    score: float
    """Its population stability index."""
    ks: float | None = None
    p: float | None = None
    features: int = 1
    """How many have drifted."""
    rows: int = 0
