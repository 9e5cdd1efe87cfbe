"""Parts of apps that run a strategy of `flwr.serverapp.strategy`."""

from collections.abc import Callable
from typing import Any

from differential.cases import App, arrays
from differential.recording import observe
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy


def start(
    app: App, make: Callable[[], Strategy], initial: Callable[[], ArrayRecord] = arrays, **options: Any
) -> None:
    """Let the ServerApp start the strategy that *make* returns, and observe its Result."""

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        given = {name: value(context) if name == "evaluate_fn" else value for name, value in options.items()}
        result = make().start(grid=grid, initial_arrays=initial(), **given)
        observe(context, result=result, type=type(result).__name__, records=type(result.arrays).__name__)


def centralized(context: Context) -> Callable[[int, ArrayRecord], MetricRecord]:
    def evaluate(server_round: int, record: ArrayRecord) -> MetricRecord:
        observe(context, evaluates=server_round, arrays=record)
        return MetricRecord({"loss": 10.0 - server_round, "list": [1.0, float(server_round)]})

    return evaluate


def train_only() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def add_one(message: Message, context: Context) -> Message:
    trained = ArrayRecord(
        {name: Array(array.numpy() + 1) for name, array in message.content["arrays"].items()}
    )
    observe(context, config=message.content["config"])
    return Message(
        RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 3})}), reply_to=message
    )
