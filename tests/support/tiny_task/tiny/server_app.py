"""FedAvg that needs one client only; the loss falls by one in each round, or is NaN."""

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class PoisonedFedAvg(FedAvg):
    """FedAvg whose result is NaN: a fault of the server side, which no check of an update finds."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        poisoned = {name: Array(array.numpy() * np.float32("nan")) for name, array in (arrays or {}).items()}
        return ArrayRecord(poisoned), metrics


@app.main()
def main(grid: Grid, context: Context) -> None:
    initial = ArrayRecord(
        {"weight": Array(np.zeros((4, 3), np.float32)), "bias": Array(np.zeros(4, np.float32))}
    )
    strategy = PoisonedFedAvg if context.run_config["poison"] else FedAvg
    strategy(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1).start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )


def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
    trained = float(arrays["bias"].numpy().mean())
    return MetricRecord({"loss": 100.0 - trained, "accuracy": trained / 100.0})
