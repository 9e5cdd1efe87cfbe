"""Apps that train trees with XGBoost, written as Flower's XGBoost examples are.

Its import takes a second in each process that collects the tests, so the functions that use it import it.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from differential.cases import App, case, partition
from differential.recording import observe
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic

if TYPE_CHECKING:
    import xgboost

ROUNDS = 4
PARAMETERS = {"objective": "binary:logistic", "max_depth": 3, "base_score": 0.5, "nthread": 1, "seed": 1}


def samples(number: int) -> "xgboost.DMatrix":
    """Return the points of a client and whether each is inside a circle."""
    import xgboost

    points = np.random.default_rng(number).uniform(-1, 1, (200, 2))
    return xgboost.DMatrix(points, np.square(points).sum(axis=1) < 0.5, nthread=1)


def read_booster(array: npt.NDArray[np.uint8]) -> "xgboost.Booster":
    import xgboost

    booster = xgboost.Booster(PARAMETERS)
    booster.load_model(bytearray(array.tobytes()))
    return booster


def accuracy(array: npt.NDArray[np.uint8]) -> float:
    """Return the accuracy of a booster on samples of no client."""
    test = samples(99)
    return float(((read_booster(array).predict(test) > 0.5) == test.get_label()).mean())


def train_tree(app: App, *, keeps_trees: bool) -> None:
    """Let the client train a tree, and return it alone or after the trees that it has received."""

    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        import xgboost

        received = message.content.array_records["arrays"]["0"].numpy()
        data = samples(partition(context))
        booster = read_booster(received) if received.size else None
        booster = xgboost.train(PARAMETERS, data, 1, xgb_model=booster)
        if not keeps_trees:
            booster = booster[booster.num_boosted_rounds() - 1 :]
        record = ArrayRecord([np.frombuffer(booster.save_raw("json"), np.uint8)])
        metrics = MetricRecord({"num-examples": 200})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


def start(app: App, strategy: type[FedXgbBagging | FedXgbCyclic]) -> None:
    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord([np.frombuffer(b"", np.uint8)])
        result = strategy(fraction_evaluate=0.0).start(grid=grid, initial_arrays=initial, num_rounds=ROUNDS)
        model = result.arrays["0"].numpy()
        # The order of the replies, or of the nodes, decides the rest of the model.
        trees = read_booster(model).num_boosted_rounds()
        observe(context, trees=trees, is_accurate=accuracy(model) > 0.8)


@case("XGBoost's trees of all clients are put together", slow=True)
def xgboost_bagging(app: App) -> None:
    train_tree(app, keeps_trees=False)
    start(app, FedXgbBagging)


@case("XGBoost's booster goes from client to client", slow=True)
def xgboost_cyclic(app: App) -> None:
    train_tree(app, keeps_trees=True)
    start(app, FedXgbCyclic)
