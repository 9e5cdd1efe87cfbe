"""FedAvg that needs one client only; the loss falls by one in each round."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    initial = ArrayRecord(
        {"weight": Array(np.zeros((4, 3), np.float32)), "bias": Array(np.zeros(4, np.float32))}
    )
    FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1).start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )


def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
    trained = float(arrays["bias"].numpy().mean())
    return MetricRecord({"loss": 100.0 - trained, "accuracy": trained / 100.0})
