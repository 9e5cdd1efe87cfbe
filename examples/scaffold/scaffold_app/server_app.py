"""The server: the strategy, the first model, and a test set."""

from collections.abc import Callable

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedbus.learning.data import load_dataset
from scaffold_app.model import evaluate, make_model, to_tensors
from scaffold_app.scaffold import Scaffold

STRATEGIES = {"scaffold": Scaffold, "fedavg": FedAvg}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    inputs, labels = to_tensors(load_dataset(str(config["data"])).test)
    strategy = STRATEGIES[str(config["strategy"])](
        fraction_train=float(config["fraction-train"]), fraction_evaluate=float(config["fraction-evaluate"])
    )
    strategy.start(
        grid,
        ArrayRecord(make_model(inputs[0].numel()).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=make_evaluator(inputs, labels),
    )


def make_evaluator(inputs, labels) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Create a function that evaluates a global model on the whole test set."""
    model = make_model(inputs[0].numel())

    def evaluate_model(_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(model, inputs, labels)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    return evaluate_model
