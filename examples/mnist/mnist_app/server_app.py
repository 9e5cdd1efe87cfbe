"""The server: the strategy, the first model, and a test set."""

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx, Krum, Strategy

from mnist_app import data
from mnist_app.task import Net, evaluate

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    torch.manual_seed(int(config["seed"]))
    make_strategy(config).start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        train_config=ConfigRecord({"lr": float(config["lr"])}),
        evaluate_fn=make_evaluator(str(config["data"])),
    )


def make_strategy(config: dict[str, bool | int | float | str]) -> Strategy:
    """Create the strategy that *config* names. Each needs at least two clients."""
    makers: dict[str, Callable[..., Strategy]] = {
        "fedavg": FedAvg,
        "fedprox": lambda **common: FedProx(**common, proximal_mu=float(config["proximal-mu"])),
        "fedadam": lambda **common: FedAdam(**common, eta=float(config["server-lr"])),
        "krum": lambda **common: Krum(**common, num_malicious_nodes=0),
    }
    name = str(config["strategy"])
    if name not in makers:
        raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(makers)}")
    return makers[name](
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_train_nodes=2,
        min_evaluate_nodes=2,
        min_available_nodes=2,
    )


def make_evaluator(folder: str) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Create a function that evaluates a global model on the whole test set."""
    inputs, labels = data.evaluation_set(folder)
    model = Net()

    def evaluate_model(_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(model, inputs, labels)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    return evaluate_model
