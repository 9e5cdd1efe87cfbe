"""The metrics and spans of fedbus, as two tables. The instruments and the dashboards are derived from them.

A metric has a name, a unit in UCUM notation, and attributes with few values each: never a run, a message or a
trace. A client is an attribute in two cases: if the client itself measures, so that a process has only one
value, and in the training monitor, which limits the number of clients.

    increment(ROUNDS, {"fedbus.task": task})          a counter
    record(ROUND_DURATION, 1.2, {...})                a histogram
    set_gauge(TRAIN_LOSS, 0.3, {...})                 a gauge
    with observable_gauge(QUEUE_DEPTH, read): ...     a gauge that is read at each export
    tracer = get_tracer("fedbus.bus")                 the spans of a module

This module uses only the API of OpenTelemetry. Without a configured SDK, all calls do nothing.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Span, StatusCode

SCOPE: Final = "fedbus"
MAX_SERIES: Final = 200
"""Limit for the attribute combinations of one metric in one process. Further ones share one overflow series."""

Attributes = Mapping[str, str]
ReadMetric = Callable[[], Iterable[tuple[float, Attributes]]]


class MetricKind(StrEnum):
    """The instrument of a metric."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"
    OBSERVABLE_GAUGE = "observed"  # a gauge that is read at each export
    OBSERVABLE_COUNTER = (
        "observed total"  # a counter that another program keeps and that is read at each export
    )


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric."""

    name: str
    kind: MetricKind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    boundaries: tuple[float, ...] | None = None
    """The boundaries of a histogram's buckets, in *unit*."""


SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
SHORT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

TASK, CLIENT, MESSAGE = "fedbus.task", "fedbus.client", "fedbus.word"

# --- runs and rounds, measured on the server side -------------------------------------------
RUNS = Metric(
    "fedbus.runs",
    MetricKind.COUNTER,
    "{run}",
    "Finished, failed and cancelled runs",
    (TASK, "fedbus.outcome"),
)
ROUNDS = Metric("fedbus.rounds", MetricKind.COUNTER, "{round}", "Finished rounds", (TASK,))
ROUND_DURATION = Metric(
    "fedbus.round.duration", MetricKind.HISTOGRAM, "s", "Duration of a round", (TASK,), SECONDS
)
ROUND_PARTICIPANTS = Metric(
    "fedbus.round.participants",
    MetricKind.GAUGE,
    "{client}",
    "Clients whose update was aggregated in the last round",
    (TASK,),
)
ROUND_FAILURES = Metric(
    "fedbus.round.failures", MetricKind.COUNTER, "{client}", "Requested updates that failed", (TASK,)
)
ROUND_METRIC = Metric(
    "fedbus.round.metric", MetricKind.GAUGE, "1", "Metrics of the last round", (TASK, "fedbus.metric")
)
CLIENT_CONTRIBUTION = Metric(
    "fedbus.client.contribution",
    MetricKind.GAUGE,
    "1",
    "Mean contribution of a client's updates to the aggregate, where it was measured",
    (TASK, CLIENT),
)
CLIENT_RELIABILITY = Metric(
    "fedbus.client.reliability",
    MetricKind.GAUGE,
    "1",
    "Share of a client's rounds that it completed, 0 to 1",
    (TASK, CLIENT),
)
TRANSITIONS = Metric(
    "fedbus.transitions",
    MetricKind.COUNTER,
    "{transition}",
    "Lifecycle transitions",
    ("fedbus.kind", "fedbus.from", "fedbus.to"),
)

# --- training and predictions, measured on a device -------------------------------------------
TRAIN_DURATION = Metric(
    "fedbus.train.duration",
    MetricKind.HISTOGRAM,
    "s",
    "Duration of a training or evaluation of the ClientApp",
    (TASK, CLIENT, "fedbus.phase"),
    SECONDS,
)
TRAIN_LOSS = Metric(
    "fedbus.train.loss", MetricKind.GAUGE, "1", "Loss at the end of the client's training", (TASK, CLIENT)
)
PREDICTION_DURATION = Metric(
    "fedbus.prediction.duration",
    MetricKind.HISTOGRAM,
    "s",
    "Duration of a prediction, from request to answer",
    (TASK, CLIENT, "http.response.status_code"),
    SHORT_SECONDS,
)
SERVED_VERSION = Metric(
    "fedbus.served.version",
    MetricKind.OBSERVABLE_GAUGE,
    "{version}",
    "Model version that the device serves; 0 if it serves none",
    (TASK, CLIENT),
)
DATA_ROWS = Metric(
    "fedbus.data.rows",
    MetricKind.GAUGE,
    "{row}",
    "Captured rows, by use",
    (TASK, CLIENT, "fedbus.use"),
)
DATA_CHECK = Metric(
    "fedbus.data.check",
    MetricKind.GAUGE,
    "1",
    "Result of a check of the captured rows, 0 to 1",
    (TASK, CLIENT, "fedbus.check"),
)
DATA_PSI = Metric(
    "fedbus.data.psi",
    MetricKind.GAUGE,
    "1",
    "Population stability index of a feature against the reference",
    (TASK, CLIENT, "fedbus.feature"),
)
DATA_CHECK_DURATION = Metric(
    "fedbus.data.check.duration",
    MetricKind.HISTOGRAM,
    "s",
    "Duration of a check of the captured rows",
    (TASK, CLIENT),
    SECONDS,
)

# --- the bus --------------------------------------------------------------------------------------
MESSAGES = Metric(
    "fedbus.messages",
    MetricKind.COUNTER,
    "{message}",
    "Published and received messages",
    (MESSAGE, "network.io.direction"),
)
MESSAGE_IO = Metric(
    "fedbus.message.io",
    MetricKind.COUNTER,
    "By",
    "Bytes of message bodies",
    (MESSAGE, "network.io.direction"),
)
BLOB_IO = Metric("fedbus.blob.io", MetricKind.COUNTER, "By", "Bytes of weights", ("network.io.direction",))
EVENT_AGE = Metric(
    "fedbus.event.age",
    MetricKind.HISTOGRAM,
    "s",
    "Time from publishing a message to receiving it",
    (MESSAGE,),
    SECONDS,
)
REDELIVERIES = Metric(
    "fedbus.event.redeliveries", MetricKind.COUNTER, "{message}", "Redelivered messages", (MESSAGE,)
)
DEAD_LETTERS = Metric(
    "fedbus.event.dead_letters",
    MetricKind.COUNTER,
    "{message}",
    "Messages that could not be decoded or handled",
)
QUEUE_DEPTH = Metric(
    "fedbus.queue.depth",
    MetricKind.OBSERVABLE_GAUGE,
    "{item}",
    "Items in the queues of a process",
    ("fedbus.queue",),
)

# --- a process ---------------------------------------------------------------------------------------
LOOP_LAG = Metric(
    "fedbus.loop.lag",
    MetricKind.HISTOGRAM,
    "s",
    "Delay of the event loop",
    (),
    SHORT_SECONDS,
)
LOG_LINES = Metric(
    "fedbus.log.lines", MetricKind.COUNTER, "{line}", "Warnings and errors in the log", ("fedbus.level",)
)

# --- a device ------------------------------------------------------------------------------------------
CPU = Metric(
    "system.cpu.utilization",
    MetricKind.OBSERVABLE_GAUGE,
    "1",
    "Utilization of all CPU cores, 0 to 1",
    (CLIENT,),
)
MEMORY = Metric(
    "system.memory.utilization",
    MetricKind.OBSERVABLE_GAUGE,
    "1",
    "Utilization of the memory, 0 to 1",
    (CLIENT,),
)
DISK = Metric(
    "system.filesystem.utilization",
    MetricKind.OBSERVABLE_GAUGE,
    "1",
    "Utilization of the disk that fedbus writes to, 0 to 1",
    (CLIENT,),
)
TEMPERATURE = Metric(
    "hw.temperature", MetricKind.OBSERVABLE_GAUGE, "Cel", "Temperature of the hottest sensor", (CLIENT,)
)
GPU = Metric(
    "hw.gpu.utilization", MetricKind.OBSERVABLE_GAUGE, "1", "Utilization of a GPU, 0 to 1", (CLIENT, "hw.id")
)
GPU_MEMORY = Metric(
    "hw.gpu.memory.usage", MetricKind.OBSERVABLE_GAUGE, "By", "Used memory of a GPU", (CLIENT, "hw.id")
)
AGENTS_ALIVE = Metric(
    "fedbus.agents.alive",
    MetricKind.OBSERVABLE_GAUGE,
    "1",
    "1 for a running agent, otherwise 0",
    (CLIENT, "fedbus.agent"),
)

# --- nats-server, if its monitoring port is configured -----------------------------------------------------
NATS_CONNECTIONS = Metric(
    "fedbus.nats.connections", MetricKind.OBSERVABLE_GAUGE, "{connection}", "Connections to nats-server"
)
NATS_CPU = Metric(
    "fedbus.nats.cpu.utilization", MetricKind.OBSERVABLE_GAUGE, "1", "CPU cores that nats-server uses"
)
NATS_MEMORY = Metric("fedbus.nats.memory", MetricKind.OBSERVABLE_GAUGE, "By", "Memory that nats-server uses")
NATS_MESSAGES = Metric(
    "fedbus.nats.messages",
    MetricKind.OBSERVABLE_COUNTER,
    "{message}",
    "Messages through nats-server",
    ("network.io.direction",),
)
NATS_IO = Metric(
    "fedbus.nats.io",
    MetricKind.OBSERVABLE_COUNTER,
    "By",
    "Bytes through nats-server",
    ("network.io.direction",),
)
NATS_SLOW_CONSUMERS = Metric(
    "fedbus.nats.slow_consumers",
    MetricKind.OBSERVABLE_COUNTER,
    "{connection}",
    "Connections that nats-server closed because they read too slowly",
)
NATS_STREAM_MESSAGES = Metric(
    "fedbus.nats.stream.messages",
    MetricKind.OBSERVABLE_GAUGE,
    "{message}",
    "Messages in a stream",
    ("fedbus.stream",),
)
NATS_STREAM_SIZE = Metric(
    "fedbus.nats.stream.size",
    MetricKind.OBSERVABLE_GAUGE,
    "By",
    "Size of a stream on disk",
    ("fedbus.stream",),
)

METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric for metric in list(globals().values()) if isinstance(metric, Metric)
}


# --- spans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpanSpec:
    """One kind of span: its name, with variable parts in braces, and all attributes that it can have."""

    name: str
    description: str
    attributes: tuple[str, ...] = ()


RUN, ROUND = "fedbus.run", "fedbus.round"
MESSAGING_ATTRIBUTES: Final = (
    "messaging.system",
    "messaging.operation.name",
    "messaging.operation.type",
    "messaging.destination.name",
    "messaging.destination.template",
    "messaging.message.id",
    "messaging.client.id",
    "fedbus.word",
    "fedbus.about",
    TASK,
    RUN,
    ROUND,
    CLIENT,
)
RECEIVE_ATTRIBUTES: Final = (*MESSAGING_ATTRIBUTES, "messaging.consumer.group.name")
PHASE_ATTRIBUTES: Final = (RUN, CLIENT, ROUND)

SPANS: Final = (
    SpanSpec(
        "publish {word}", "Publish an event or command, until the stream has stored it", MESSAGING_ATTRIBUTES
    ),
    SpanSpec("process {word}", "Handle a received message", RECEIVE_ATTRIBUTES),
    SpanSpec("request {word}", "Send a request and wait for its reply", MESSAGING_ATTRIBUTES),
    SpanSpec("answer {word}", "Handle a request, until the reply is sent", MESSAGING_ATTRIBUTES),
    SpanSpec(
        "{kind} {from} → {to}",
        "Transition of a lifecycle",
        (
            "fedbus.kind",
            "fedbus.thing",
            TASK,
            "fedbus.event",
            "fedbus.from",
            "fedbus.to",
            "fedbus.reason",
            RUN,
            CLIENT,
            ROUND,
            "fedbus.model.version",
            "fedbus.code.version",
        ),
    ),
    SpanSpec("run by {trigger}", "Start of a run, by a schedule or a user", (RUN,)),
    SpanSpec(
        "run the ServerApp",
        "Start of the app's server side; the spans of its rounds are its children",
        (RUN,),
    ),
    SpanSpec("round", "A round, from its first message to its result", (RUN, ROUND)),
    SpanSpec("download", "A client fetches the global model", PHASE_ATTRIBUTES),
    SpanSpec("train", "A client's app trains", PHASE_ATTRIBUTES),
    SpanSpec("evaluate", "A client's app evaluates", PHASE_ATTRIBUTES),
    SpanSpec("upload", "A client offers its update as a blob and publishes its reply", PHASE_ATTRIBUTES),
    SpanSpec("receive", "The server fetches a client's update", PHASE_ATTRIBUTES),
    SpanSpec("aggregate", "Aggregation of the updates into one model; linked to each upload", (RUN, ROUND)),
    SpanSpec("store", "Writing of a model into the model repository", (RUN, "fedbus.model.version", ROUND)),
    SpanSpec(
        "swap model",
        "Replacement of the served model on a client; linked to the publish of the version",
        (CLIENT, "fedbus.model.version"),
    ),
    SpanSpec(
        "predict",
        "A sampled prediction, for the exemplars of the metrics",
        (TASK, CLIENT, "fedbus.model.version"),
    ),
)

ERROR_TYPE: Final = "error.type"
"""The attribute of every failed span: the kind of the failure, one of few values."""

ATTRIBUTES: Final = frozenset(
    [ERROR_TYPE]
    + [name for metric in METRICS.values() for name in metric.attributes]
    + [name for span in SPANS for name in span.attributes]
)
"""All attributes of all metrics and spans."""


# --- recording -------------------------------------------------------------------------------------------------


class _Tracer(trace.ProxyTracer):
    """The proxy tracer of the API, without the generator that the API wraps around each span."""

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.start_as_current_span(*args, **kwargs)


def get_tracer(module: str) -> trace.Tracer:
    """Return the tracer of *module*. It can be created before the SDK is configured."""
    return _Tracer(module)


def increment(metric: Metric, attributes: Attributes | None = None, amount: float = 1) -> None:
    """Add *amount* to a counter."""
    _instrument(metric).add(amount, attributes)


def record(metric: Metric, value: float, attributes: Attributes | None = None) -> None:
    """Record *value* in a histogram, with the current span as exemplar."""
    _instrument(metric).record(value, attributes)


def mark_failed(span: Span, kind: str, reason: str) -> None:
    """Mark *span* as failed, by OpenTelemetry's conventions: *kind* is one of few values, *reason* is free text."""
    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(StatusCode.ERROR, reason)


def set_gauge(metric: Metric, value: float, attributes: Attributes | None = None) -> None:
    """Set the current value of a gauge."""
    _instrument(metric).set(value, attributes)


@contextmanager
def observable_gauge(metric: Metric, read: ReadMetric) -> Iterator[None]:
    """While the block runs, the exporter calls *read* in its own thread for the values of the metric."""
    _CALLBACKS.setdefault(metric.name, []).append(read)
    _instrument(metric)
    try:
        yield
    finally:
        _CALLBACKS[metric.name].remove(read)


_CALLBACKS: Final[dict[str, list[ReadMetric]]] = {}


@functools.cache
def _instrument(metric: Metric) -> Any:
    """Return the instrument of *metric*. It becomes active when the SDK is configured, before or after this call."""
    meter = metrics.get_meter(SCOPE)
    match metric.kind:
        case MetricKind.COUNTER:
            return meter.create_counter(metric.name, metric.unit, metric.description)
        case MetricKind.HISTOGRAM:
            return meter.create_histogram(
                metric.name,
                metric.unit,
                metric.description,
                explicit_bucket_boundaries_advisory=metric.boundaries,
            )
        case MetricKind.GAUGE:
            return meter.create_gauge(metric.name, metric.unit, metric.description)
        case MetricKind.OBSERVABLE_GAUGE:
            callbacks = [functools.partial(_read, metric.name)]
            return meter.create_observable_gauge(metric.name, callbacks, metric.unit, metric.description)
        case MetricKind.OBSERVABLE_COUNTER:
            callbacks = [functools.partial(_read, metric.name)]
            return meter.create_observable_counter(metric.name, callbacks, metric.unit, metric.description)


def _read(name: str, _: CallbackOptions) -> Iterator[Observation]:
    for read in list(_CALLBACKS.get(name, ())):
        yield from (Observation(value, attributes) for value, attributes in read())
