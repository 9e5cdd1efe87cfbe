"""Small Flower apps, each for one behaviour of Flower's API, and the recorder with which they observe it.

A case is a function that registers the functions of a ServerApp and a ClientApp:

    @case("get_node_ids returns each node once")
    def node_ids(app: App) -> None:
        @app.server.main()
        def main(grid, context):
            observe(context, nodes=sorted(grid.get_node_ids()))

The app runs under Flower's simulation and over fedbus. What it passes to `observe` is compared, see `recording`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from differential.recording import observe
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp


@dataclass
class App:
    """The two apps of a case. A case may replace them."""

    server: ServerApp = field(default_factory=ServerApp)
    client: ClientApp = field(default_factory=ClientApp)


Register = Callable[[App], None]


@dataclass(frozen=True)
class FlowerCase:
    """An app and how it runs. *differs* names the differences that remain: see docs/flower-compatibility.md."""

    name: str
    claim: str
    register: Register
    clients: int = 2
    config: dict[str, Any] = field(default_factory=dict)
    differs: frozenset[str] = frozenset()
    plan: dict[str, Any] = field(default_factory=dict)
    """Values of fedbus's `RunPlan`."""
    slow: bool = False
    """Whether the app waits for seconds, so that only `make test-flower` runs it."""

    def build(self) -> App:
        """Return fresh apps, without state of an earlier run."""
        app = App()
        self.register(app)
        return app


CASES: dict[str, FlowerCase] = {}
"""The cases by name."""


def case(claim: str, *, name: str = "", **options: Any) -> Callable[[Register], Register]:
    """Register a case, named for its function. *claim* states the behaviour that it exercises."""

    def decorate(register: Register) -> Register:
        key = name or register.__name__
        assert key not in CASES, key
        differs = frozenset(options.pop("differs", ()))
        CASES[key] = FlowerCase(key, claim, register, differs=differs, **options)
        return register

    return decorate


# --- parts of apps ----------------------------------------------------------------------------


def partition(context: Context) -> int:
    """Return the number of a client: 0, 1, … in both runs, while node ids are random."""
    return int(context.node_config["partition-id"])


def queries(
    grid: Grid, kind: str = "query", content: RecordDict | None = None, **options: Any
) -> list[Message]:
    """Return a message for each node."""
    nodes = sorted(grid.get_node_ids())
    return [Message(RecordDict() if content is None else content, node, kind, **options) for node in nodes]


def numbers(reply_to: Message, **values: Any) -> Message:
    """Reply with a record of metrics."""
    return Message(RecordDict({"m": MetricRecord(values)}), reply_to=reply_to)


def echo(message: Message, context: Context) -> Message:
    """Reply with the content of the message."""
    return Message(message.content, reply_to=message)


def arrays(*values: float, dtype: Any = np.float32) -> ArrayRecord:
    """Return a model of one array ``w`` with a row for each value, and an array ``b``."""
    rows = np.asarray([[value, value + 0.5] for value in values or (0.0, 1.0)], dtype)
    return ArrayRecord({"w": Array(rows), "b": Array(np.asarray([1, 2], dtype))})


def add_trainer(app: App, *, power: int = 1) -> None:
    """Let the client train by adding 1 + its number to the *power*, and evaluate by the mean of the model."""

    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        observe(context, train=message)
        number = partition(context)
        name, record = next(iter(message.content.array_records.items()))
        trained = ArrayRecord(
            {
                key: Array((array.numpy() + 1 + number**power).astype(array.dtype))
                for key, array in record.items()
            }
        )
        metrics = MetricRecord({"num-examples": 10 + 5 * number, "train_loss": 1.0 / (1 + number)})
        return Message(RecordDict({name: trained, "metrics": metrics}), reply_to=message)

    @app.client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        observe(context, evaluate=message)
        record = next(iter(message.content.array_records.values()))
        loss = float(sum(array.numpy().astype(np.float64).mean() for array in record.values()))
        metrics = MetricRecord({"num-examples": 4 + partition(context), "eval_loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
