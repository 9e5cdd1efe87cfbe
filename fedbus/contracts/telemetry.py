"""All that fedbus measures and traces: two tables, from which instruments, dashboards' checks and a page are derived.

A metric has a name, a unit as UCUM writes it, and the attributes it may be split by, each of
which has few values: a run, a message or a trace is never one of them. A client is one where the
client itself measures, so that no process has more than its own, and where the training monitor tells of clients:
of `CLIENTS_TRACKED` in a round, and of `SERIES` in all.

    add(ROUNDS, {"fedbus.task": task})        a counter
    record(ROUND_DURATION, 1.2, {...})        a histogram
    note(TRAIN_LOSS, 0.3, {...})              a gauge, as it is now
    with observed(QUEUE_DEPTH, read): ...      a figure that is asked for when it is sent
    tracer = tracer_of("fedbus.bus")          what makes the spans of a module

Only OpenTelemetry's API is used here: where nobody has set up its SDK, measuring does nothing.
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
"""How many combinations of attributes one metric of one process may have; what is more is counted together."""

Attributes = Mapping[str, str]
ReadMetric = Callable[[], Iterable[tuple[float, Attributes]]]


class MetricKind(StrEnum):
    """What a metric is, and so what may be asked of it."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"
    OBSERVED = "observed"  # a gauge that is read when it is sent
    OBSERVED_TOTAL = "observed total"  # a counter that somebody else keeps


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric, and what it says, in a sentence."""

    name: str
    kind: MetricKind
    unit: str
    says: str
    attributes: tuple[str, ...] = ()
    boundaries: tuple[float, ...] | None = None
    """Of a histogram's buckets, in *unit*."""


SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
SHORT_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

TASK, CLIENT, MESSAGE = "fedbus.task", "fedbus.client", "fedbus.word"

# --- runs and rounds, as the server side sees them ------------------------------------------
RUNS = Metric(
    "fedbus.runs", MetricKind.COUNTER, "{run}", "Runs that ended, by outcome", (TASK, "fedbus.outcome")
)
ROUNDS = Metric("fedbus.rounds", MetricKind.COUNTER, "{round}", "Rounds that ended", (TASK,))
ROUND_DURATION = Metric(
    "fedbus.round.duration", MetricKind.HISTOGRAM, "s", "How long a round took", (TASK,), SECONDS
)
ROUND_PARTICIPANTS = Metric(
    "fedbus.round.participants",
    MetricKind.GAUGE,
    "{client}",
    "Clients whose update is in the last round",
    (TASK,),
)
ROUND_FAILURES = Metric(
    "fedbus.round.failures", MetricKind.COUNTER, "{client}", "Updates that were asked for and failed", (TASK,)
)
ROUND_METRIC = Metric(
    "fedbus.round.metric", MetricKind.GAUGE, "1", "A figure of the last round", (TASK, "fedbus.metric")
)
CLIENT_CONTRIBUTION = Metric(
    "fedbus.client.contribution",
    MetricKind.GAUGE,
    "1",
    "What a client's updates were worth to the aggregate, on average, where that was looked at",
    (TASK, CLIENT),
)
CLIENT_RELIABILITY = Metric(
    "fedbus.client.reliability",
    MetricKind.GAUGE,
    "1",
    "How often a client answered of the times that it was asked, 0 to 1",
    (TASK, CLIENT),
)
TRANSITIONS = Metric(
    "fedbus.transitions",
    MetricKind.COUNTER,
    "{transition}",
    "Lifecycles that moved",
    ("fedbus.kind", "fedbus.from", "fedbus.to"),
)

# --- training and predicting, on a device -----------------------------------------------------
TRAIN_DURATION = Metric(
    "fedbus.train.duration",
    MetricKind.HISTOGRAM,
    "s",
    "How long the ClientApp took",
    (TASK, CLIENT, "fedbus.phase"),
    SECONDS,
)
TRAIN_LOSS = Metric(
    "fedbus.train.loss", MetricKind.GAUGE, "1", "The loss that the client's training came to", (TASK, CLIENT)
)
PREDICTION_DURATION = Metric(
    "fedbus.prediction.duration",
    MetricKind.HISTOGRAM,
    "s",
    "How long a prediction took, from request to answer",
    (TASK, CLIENT, "http.response.status_code"),
    SHORT_SECONDS,
)
DATA_ROWS = Metric(
    "fedbus.data.rows",
    MetricKind.GAUGE,
    "{row}",
    "Captured rows, by what they are for",
    (TASK, CLIENT, "fedbus.use"),
)
DATA_CHECK = Metric(
    "fedbus.data.check",
    MetricKind.GAUGE,
    "1",
    "What a check of the captured rows came to, 0 to 1",
    (TASK, CLIENT, "fedbus.check"),
)
DATA_PSI = Metric(
    "fedbus.data.psi",
    MetricKind.GAUGE,
    "1",
    "How far a feature is distributed otherwise than in the reference",
    (TASK, CLIENT, "fedbus.feature"),
)
DATA_CHECK_DURATION = Metric(
    "fedbus.data.check.duration",
    MetricKind.HISTOGRAM,
    "s",
    "How long a check of the captured rows took",
    (TASK, CLIENT),
    SECONDS,
)

# --- the bus --------------------------------------------------------------------------------------
MESSAGES = Metric(
    "fedbus.messages",
    MetricKind.COUNTER,
    "{message}",
    "Messages that were sent or received",
    (MESSAGE, "network.io.direction"),
)
MESSAGE_IO = Metric(
    "fedbus.message.io",
    MetricKind.COUNTER,
    "By",
    "Bytes of messages' bodies",
    (MESSAGE, "network.io.direction"),
)
BLOB_IO = Metric("fedbus.blob.io", MetricKind.COUNTER, "By", "Bytes of weights", ("network.io.direction",))
EVENT_AGE = Metric(
    "fedbus.event.age", MetricKind.HISTOGRAM, "s", "From saying a thing to hearing it", (MESSAGE,), SECONDS
)
REDELIVERIES = Metric(
    "fedbus.event.redeliveries", MetricKind.COUNTER, "{message}", "Messages that came again", (MESSAGE,)
)
DEAD_LETTERS = Metric(
    "fedbus.event.dead_letters", MetricKind.COUNTER, "{message}", "Messages that nobody could read"
)
QUEUE_DEPTH = Metric(
    "fedbus.queue.depth",
    MetricKind.OBSERVED,
    "{item}",
    "What waits in this process, to be heard or sent",
    ("fedbus.queue",),
)

# --- a process ---------------------------------------------------------------------------------------
LOOP_LAG = Metric(
    "fedbus.loop.lag",
    MetricKind.HISTOGRAM,
    "s",
    "How much later than asked the loop came round",
    (),
    SHORT_SECONDS,
)
LOG_LINES = Metric("fedbus.log.lines", MetricKind.COUNTER, "{line}", "Warnings and errors", ("fedbus.level",))

# --- a device ------------------------------------------------------------------------------------------
CPU = Metric(
    "system.cpu.utilization", MetricKind.OBSERVED, "1", "How much of all cores is in use, 0 to 1", (CLIENT,)
)
MEMORY = Metric(
    "system.memory.utilization",
    MetricKind.OBSERVED,
    "1",
    "How much of the memory is in use, 0 to 1",
    (CLIENT,),
)
DISK = Metric(
    "system.filesystem.utilization",
    MetricKind.OBSERVED,
    "1",
    "How full the disk is that fedbus writes to, 0 to 1",
    (CLIENT,),
)
TEMPERATURE = Metric("hw.temperature", MetricKind.OBSERVED, "Cel", "The hottest sensor", (CLIENT,))
GPU = Metric("hw.gpu.utilization", MetricKind.OBSERVED, "1", "How busy a GPU is, 0 to 1", (CLIENT, "hw.id"))
GPU_MEMORY = Metric(
    "hw.gpu.memory.usage", MetricKind.OBSERVED, "By", "Memory of a GPU that is in use", (CLIENT, "hw.id")
)
AGENTS_ALIVE = Metric(
    "fedbus.agents.alive",
    MetricKind.OBSERVED,
    "1",
    "1 for an agent that runs, else 0",
    (CLIENT, "fedbus.agent"),
)

# --- nats-server itself, where its monitoring port is known ----------------------------------------------
NATS_CONNECTIONS = Metric(
    "fedbus.nats.connections", MetricKind.OBSERVED, "{connection}", "Who is connected to nats-server"
)
NATS_CPU = Metric("fedbus.nats.cpu.utilization", MetricKind.OBSERVED, "1", "Cores that nats-server uses")
NATS_MEMORY = Metric("fedbus.nats.memory", MetricKind.OBSERVED, "By", "Memory that nats-server uses")
NATS_MESSAGES = Metric(
    "fedbus.nats.messages",
    MetricKind.OBSERVED_TOTAL,
    "{message}",
    "Messages through nats-server",
    ("network.io.direction",),
)
NATS_IO = Metric(
    "fedbus.nats.io", MetricKind.OBSERVED_TOTAL, "By", "Bytes through nats-server", ("network.io.direction",)
)
NATS_SLOW_CONSUMERS = Metric(
    "fedbus.nats.slow_consumers",
    MetricKind.OBSERVED_TOTAL,
    "{connection}",
    "Connections that were cut off because they read too slowly",
)
NATS_STREAM_MESSAGES = Metric(
    "fedbus.nats.stream.messages", MetricKind.OBSERVED, "{message}", "What a stream holds", ("fedbus.stream",)
)
NATS_STREAM_SIZE = Metric(
    "fedbus.nats.stream.size", MetricKind.OBSERVED, "By", "What a stream takes on disk", ("fedbus.stream",)
)

METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric for metric in list(globals().values()) if isinstance(metric, Metric)
}


# --- spans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpanSpec:
    """One kind of span: its name, with what varies in braces, and the attributes that it always or sometimes has."""

    name: str
    says: str
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
    SpanSpec("publish {word}", "An event or command is said, until the stream has it", MESSAGING_ATTRIBUTES),
    SpanSpec("process {word}", "What an agent does because it heard", RECEIVE_ATTRIBUTES),
    SpanSpec("request {word}", "A question, until its answer is there", MESSAGING_ATTRIBUTES),
    SpanSpec("answer {word}", "What the asked agent does for the answer", MESSAGING_ATTRIBUTES),
    SpanSpec(
        "{kind} {from} → {to}",
        "A lifecycle moves",
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
    SpanSpec("run by {trigger}", "What begins a run: a schedule, or a person", (RUN,)),
    SpanSpec("run the ServerApp", "Flower's ServerApp is begun; what it does follows", (RUN,)),
    SpanSpec("round", "A round, from its first message to its last figure", (RUN, ROUND)),
    SpanSpec("download", "A client fetches what it is to train on", PHASE_ATTRIBUTES),
    SpanSpec("train", "A client's ClientApp trains", PHASE_ATTRIBUTES),
    SpanSpec("evaluate", "A client's ClientApp evaluates", PHASE_ATTRIBUTES),
    SpanSpec("upload", "A client offers its update and says so", PHASE_ATTRIBUTES),
    SpanSpec("receive", "The server fetches a client's update", PHASE_ATTRIBUTES),
    SpanSpec("aggregate", "Updates become one model; linked to each upload", (RUN, ROUND)),
    SpanSpec("store", "A model is written into the repository", (RUN, "fedbus.model.version", ROUND)),
    SpanSpec(
        "swap model",
        "A client's inference agent changes models; linked to the publishing",
        (CLIENT, "fedbus.model.version"),
    ),
    SpanSpec(
        "predict", "One prediction in a while, for the exemplars", (TASK, CLIENT, "fedbus.model.version")
    ),
)

ERROR_TYPE: Final = "error.type"
"""What every span has that came to nothing: of what kind that was, one of few."""

ATTRIBUTES: Final = frozenset(
    [ERROR_TYPE]
    + [name for metric in METRICS.values() for name in metric.attributes]
    + [name for span in SPANS for name in span.attributes]
)
"""Every attribute of every metric and span."""


# --- saying it -----------------------------------------------------------------------------------------------


class _Tracer(trace.ProxyTracer):
    """The API's, which finds out at the first span who is behind it, but for the generator that it puts around each."""

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer.start_as_current_span(*args, **kwargs)


def get_tracer(module: str) -> trace.Tracer:
    """Makes the spans of *module*; may be had before anybody has set up where they go."""
    return _Tracer(module)


def increment(metric: Metric, about: Attributes | None = None, amount: float = 1) -> None:
    """Count *amount* more."""
    _instrument(metric).add(amount, about)


def record(metric: Metric, value: float, about: Attributes | None = None) -> None:
    """Put *value* into a histogram, with the current span as its example."""
    _instrument(metric).record(value, about)


def mark_failed(span: Span, kind: str, why: str) -> None:
    """*span* came to nothing, as OpenTelemetry's conventions have it: of what *kind*, one of few, and why in words."""
    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(StatusCode.ERROR, why)


def set_gauge(metric: Metric, value: float, about: Attributes | None = None) -> None:
    """Say what a gauge shows now."""
    _instrument(metric).set(value, about)


@contextmanager
def observable_gauge(metric: Metric, read: ReadMetric) -> Iterator[None]:
    """While the block runs, *read* is asked for the metric's values, in a thread of the exporter's."""
    _CALLBACKS.setdefault(metric.name, []).append(read)
    _instrument(metric)
    try:
        yield
    finally:
        _CALLBACKS[metric.name].remove(read)


_CALLBACKS: Final[dict[str, list[ReadMetric]]] = {}


@functools.cache
def _instrument(metric: Metric) -> Any:
    """The one instrument of *metric*; it comes to life when the SDK is set up, whichever came first."""
    meter = metrics.get_meter(SCOPE)
    match metric.kind:
        case MetricKind.COUNTER:
            return meter.create_counter(metric.name, metric.unit, metric.says)
        case MetricKind.HISTOGRAM:
            return meter.create_histogram(
                metric.name,
                metric.unit,
                metric.says,
                explicit_bucket_boundaries_advisory=metric.boundaries,
            )
        case MetricKind.GAUGE:
            return meter.create_gauge(metric.name, metric.unit, metric.says)
        case MetricKind.OBSERVED:
            asked = [functools.partial(_read, metric.name)]
            return meter.create_observable_gauge(metric.name, asked, metric.unit, metric.says)
        case MetricKind.OBSERVED_TOTAL:
            asked = [functools.partial(_read, metric.name)]
            return meter.create_observable_counter(metric.name, asked, metric.unit, metric.says)


def _read(name: str, _: CallbackOptions) -> Iterator[Observation]:
    for read in list(_CALLBACKS.get(name, ())):
        yield from (Observation(value, about) for value, about in read())
