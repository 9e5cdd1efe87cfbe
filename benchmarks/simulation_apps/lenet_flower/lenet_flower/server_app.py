"""FedAvg over all clients."""

# ruff: noqa: ARG001, PLC0415 - the signatures of the library; the benchmark is optional

import os

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from lenet_flower.task import LeNet

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for as many rounds as the configuration has."""
    strategy = FedAvg(fraction_evaluate=0.0)
    evaluate = None
    if os.environ.get("BENCH_TURNS"):  # Flower's own simulation: the benchmark decides when a round begins
        from benchmarks.simulation_turns import wait_for_turn

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            wait_for_turn()
            return MetricRecord({"loss": 0.0})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(LeNet().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
