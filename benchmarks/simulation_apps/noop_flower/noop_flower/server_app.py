"""FedAvg over all clients, with ten numbers."""

# ruff: noqa: ARG001, PLC0415 - the signatures of the library; the benchmark is optional

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    evaluate = None
    if os.environ.get("BENCH_TURNS"):  # Flower's own simulation: the benchmark decides when a round begins
        from benchmarks.simulation_turns import wait_for_turn

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            wait_for_turn()
            return MetricRecord({"loss": 0.0})

    FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.zeros(10, np.float32))}),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
