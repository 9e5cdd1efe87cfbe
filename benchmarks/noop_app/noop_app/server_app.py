"""FedAvg over all clients; records the time at the end of each round."""

import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from noop_app.size import CLIENTS, ROUNDS_PER_TURN, STAMPS, TURN_PIPE, weights

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"weights": Array(weights())}),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=stamp,
    )


def stamp(server_round: int, _arrays: ArrayRecord) -> MetricRecord:
    """Record the time. Flower calls this before the first round, and with the model of each round."""
    with STAMPS.open("a") as file:
        file.write(f"{server_round} {time.monotonic():.6f}\n")
    if TURN_PIPE and server_round % ROUNDS_PER_TURN == 0:
        Path(TURN_PIPE).read_bytes()  # blocks until the benchmark opens and closes the pipe
    return MetricRecord({"loss": 0.0})
