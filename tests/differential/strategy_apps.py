"""Cases of `flwr.serverapp.strategy`: each strategy, and the arguments of a strategy and of its start."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from differential.cases import App, add_trainer, arrays, case, partition
from differential.recording import Unordered, observe
from differential.strategy_parts import add_one, centralized, start, train_only
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

STOCK: dict[str, tuple[Callable[[], Strategy], int]] = {
    "FedAvg": (FedAvg, 2),
    "FedProx": (lambda: FedProx(proximal_mu=0.25), 2),
    "FedAvgM": (lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9), 2),
    "FedAdam": (lambda: FedAdam(eta=0.1, tau=0.01), 2),
    "FedAdagrad": (lambda: FedAdagrad(eta=0.1, tau=0.01), 2),
    "FedYogi": (lambda: FedYogi(eta=0.1, tau=0.01), 2),
    "FedMedian": (FedMedian, 3),
    "FedTrimmedAvg": (lambda: FedTrimmedAvg(beta=0.25), 4),
    "Krum": (lambda: Krum(num_malicious_nodes=1), 5),
    "MultiKrum": (lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2), 5),
    "Bulyan": (lambda: Bulyan(num_malicious_nodes=1), 7),
    "QFedAvg": (lambda: QFedAvg(client_learning_rate=0.1, q=0.2, train_loss_key="train_loss"), 2),
    "DP_server_fixed": (lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 0.5, 2), 2),
    "DP_server_adaptive": (
        lambda: DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.0, 2, clipped_count_stddev=0.0),
        2,
    ),
}
for strategy_name, (make_strategy, client_count) in STOCK.items():
    is_slow = strategy_name in {"Bulyan", "QFedAvg"}  # Flower collects garbage after each array
    case(f"{strategy_name} runs for three rounds", name=strategy_name, clients=client_count, slow=is_slow)(
        lambda app, make=make_strategy: (
            add_trainer(app, power=2),
            start(app, make, num_rounds=3, evaluate_fn=centralized),
        )  # type: ignore[misc]  # mypy infers no type for a lambda with a default
    )


@case("client-side fixed clipping runs with its mod")
def DP_client_fixed(app: App) -> None:  # noqa: N802
    app.client = ClientApp(mods=[fixedclipping_mod])
    app.client.train()(add_one)
    start(app, lambda: DifferentialPrivacyClientSideFixedClipping(train_only(), 0.0, 0.5, 2), num_rounds=2)


@case("client-side adaptive clipping runs with its mod")
def DP_client_adaptive(app: App) -> None:  # noqa: N802
    app.client = ClientApp(mods=[adaptiveclipping_mod])
    app.client.train()(add_one)

    def make() -> Strategy:
        return DifferentialPrivacyClientSideAdaptiveClipping(train_only(), 0.0, 2, clipped_count_stddev=0.0)

    start(app, make, num_rounds=2)


def _booster(*trees: int) -> bytes:
    """Return JSON in the format of XGBoost, with the parts that Flower's bagging reads."""
    model = {
        "gbtree_model_param": {"num_trees": str(len(trees)), "num_parallel_tree": "1"},
        "iteration_indptr": list(range(len(trees) + 1)),
        "trees": [{"id": number, "leaf": leaf} for number, leaf in enumerate(trees)],
        "tree_info": [0] * len(trees),
    }
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


def _add_booster(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        got = message.content["arrays"]["0"].numpy().tobytes()
        observe(
            context, got=len(json.loads(got)["learner"]["gradient_booster"]["model"]["trees"]) if got else 0
        )
        tree = _booster(7)  # the same of each client: the order of replies decides the order of the trees
        record = ArrayRecord([np.frombuffer(tree, np.uint8)])
        return Message(
            RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
        )


@case("FedXgbBagging puts the trees of all clients together")
def FedXgbBagging_(app: App) -> None:  # noqa: N802
    _add_booster(app)
    initial = lambda: ArrayRecord([np.frombuffer(b"", np.uint8)])  # noqa: E731
    start(app, lambda: FedXgbBagging(fraction_evaluate=0.0), initial, num_rounds=3)


@case("FedXgbCyclic trains on one client in each round")
def FedXgbCyclic_(app: App) -> None:  # noqa: N802
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        got = message.content["arrays"]["0"].numpy()
        record = ArrayRecord([np.append(got, np.uint8(len(got)))])
        return Message(
            RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    initial = lambda: ArrayRecord([np.zeros(1, np.uint8)])  # noqa: E731
    start(app, lambda: FedXgbCyclic(fraction_evaluate=0.0), initial, num_rounds=4)


# --- arguments --------------------------------------------------------------------------------


@case("the number of rounds is the app's own")
def own_number_of_rounds(app: App) -> None:
    add_trainer(app)
    start(app, FedAvg, num_rounds=5)


@case("the default is three rounds")
def default_rounds(app: App) -> None:
    add_trainer(app)
    start(app, FedAvg)


@case("the configs of training and evaluation reach the clients")
def configs(app: App) -> None:
    add_trainer(app)
    start(
        app,
        FedAvg,
        num_rounds=2,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_config=ConfigRecord({"batch": 8}),
    )


@case("records and the weight may have other names")
def own_keys(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        observe(context, got=message)
        metrics = MetricRecord({"rows": 1 + partition(context), "loss": 1.0 * partition(context)})
        return Message(RecordDict({"anything": message.content["model"], "m": metrics}), reply_to=message)

    keys = {"weighted_by_key": "rows", "arrayrecord_key": "model", "configrecord_key": "settings"}
    start(app, lambda: FedAvg(fraction_evaluate=0.0, **keys), num_rounds=2)


@case("metrics may be aggregated by functions of the app")
def own_metric_functions(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        def total(records: list[RecordDict], key: str) -> MetricRecord:
            observe(context, records=Unordered(records), key=key, type=type(records).__name__)
            return MetricRecord(
                {"total": sum(int(record["metrics"][key]) for record in records), "n": len(records)}
            )

        strategy = FedAvg(train_metrics_aggr_fn=total, evaluate_metrics_aggr_fn=total)
        observe(context, result=strategy.start(grid, arrays(), num_rounds=2))


@case("a fraction of zero skips training or evaluation")
def fractions_of_zero(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, result=FedAvg(fraction_train=0.0).start(grid, arrays(), num_rounds=2))
        observe(context, result=FedAvg(fraction_evaluate=0.0).start(grid, arrays(), num_rounds=2))


@case("a fraction of the nodes is sampled", clients=4)
def fraction_of_nodes(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1, "one": 1.0})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        counts: list[int] = []

        def count(records: list[RecordDict], _: str) -> MetricRecord:
            counts.append(len(records))
            return MetricRecord({"n": len(records)})

        options: dict[str, Any] = {
            "fraction_evaluate": 0.0,
            "min_train_nodes": 1,
            "train_metrics_aggr_fn": count,
        }
        observe(
            context,
            result=FedAvg(fraction_train=0.5, **options).start(grid, arrays(), num_rounds=2),
            counts=counts,
        )


@case("an evaluate_fn that returns None leaves no metrics")
def evaluate_fn_without_result(app: App) -> None:
    add_trainer(app)
    start(
        app,
        FedAvg,
        num_rounds=2,
        evaluate_fn=lambda context: lambda number, record: observe(context, number=number),
    )


@case("the timeout of start leaves out late clients", slow=True)
def timeout_of_start(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        import time

        time.sleep(2.5 * partition(context))
        metrics = MetricRecord({"num-examples": 1 + partition(context)})
        return Message(
            RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message
        )

    start(app, lambda: FedAvg(fraction_evaluate=0.0), num_rounds=1, timeout=1.0)
