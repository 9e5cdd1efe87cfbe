"""Cases of `flwr.serverapp.strategy`: each strategy, its arguments, its Result, and strategies of the app's own."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from differential.cases import App, add_trainer, arrays, case, partition
from differential.recording import Unordered, observe
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
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
    Result,
    Strategy,
)


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
        )  # type: ignore[misc]
    )


@case("client-side fixed clipping runs with its mod")
def DP_client_fixed(app: App) -> None:  # noqa: N802
    app.client = ClientApp(mods=[fixedclipping_mod])
    app.client.train()(_plain_train)
    start(
        app, lambda: DifferentialPrivacyClientSideFixedClipping(_no_evaluation(), 0.0, 0.5, 2), num_rounds=2
    )


@case("client-side adaptive clipping runs with its mod")
def DP_client_adaptive(app: App) -> None:  # noqa: N802
    app.client = ClientApp(mods=[adaptiveclipping_mod])
    app.client.train()(_plain_train)

    def make() -> Strategy:
        return DifferentialPrivacyClientSideAdaptiveClipping(
            _no_evaluation(), 0.0, 2, clipped_count_stddev=0.0
        )

    start(app, make, num_rounds=2)


def _no_evaluation() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def _plain_train(message: Message, context: Context) -> Message:
    trained = ArrayRecord(
        {name: Array(array.numpy() + 1) for name, array in message.content["arrays"].items()}
    )
    observe(context, config=message.content["config"])
    return Message(
        RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 3})}), reply_to=message
    )


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


# --- failures ---------------------------------------------------------------------------------


@case("a client that fails is left out", clients=3)
def failing_client(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        if partition(context) == 1:
            raise RuntimeError("no memory")
        return _plain_train(message, context)

    start(app, _no_evaluation, num_rounds=2)


@case("without a valid reply the model stays, and the Result has no arrays")
def all_clients_fail(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no memory")

    start(app, _no_evaluation, num_rounds=2, evaluate_fn=centralized)


@case("the DP wrappers skip a round with a failed client")
def dp_with_a_failing_client(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        if partition(context) == 1 and message.content["config"]["server-round"] == 1:
            raise RuntimeError("no memory")
        return _plain_train(message, context)

    start(
        app, lambda: DifferentialPrivacyServerSideFixedClipping(_no_evaluation(), 0.0, 5.0, 2), num_rounds=2
    )


def _wrong_reply(app: App, change: Callable[[RecordDict, int], None]) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        content = RecordDict(
            {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1, "x": 1.0})}
        )
        change(content, partition(context))
        return Message(content, reply_to=message)

    start(app, _no_evaluation, num_rounds=1)


WRONG: dict[str, Callable[[RecordDict, int], Any]] = {
    "no_arrays": lambda content, number: content.pop("arrays"),
    "two_records_of_arrays": lambda content, number: content.update(more=arrays()),
    "other_array_names": lambda content, number: content["arrays"].pop("w") if number else None,
    "no_metrics": lambda content, number: content.pop("metrics"),
    "two_records_of_metrics": lambda content, number: content.update(more=MetricRecord({"x": 1})),
    "other_metrics": lambda content, number: content["metrics"].update({f"only {number}": 1.0}),
    "no_weight": lambda content, number: content["metrics"].pop("num-examples"),
    "list_as_weight": lambda content, number: content["metrics"].update({"num-examples": [1]}),
    "weights_of_zero": lambda content, number: content["metrics"].update({"num-examples": 0}),
}
for wrong_name, change_reply in WRONG.items():
    case(f"a reply with {wrong_name.replace('_', ' ')} raises Flower's error", name=f"reply_{wrong_name}")(
        lambda app, change=change_reply: _wrong_reply(app, change)  # type: ignore[misc]
    )


# --- several starts ---------------------------------------------------------------------------


@case("a second start counts its rounds from one")
def second_start(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        warm = FedAvg().start(grid, arrays(), num_rounds=3, evaluate_fn=centralized(context))
        fine = FedAvg().start(grid, warm.arrays, num_rounds=2, evaluate_fn=centralized(context))
        observe(context, warm=warm, fine=fine)


@case("one strategy may start twice, from a model of its own each time")
def one_strategy_twice(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvgM(server_momentum=0.9)
        for first in (0.0, 100.0):
            observe(context, result=strategy.start(grid, arrays(first), num_rounds=2))


@case("a query may come before and after a start")
def queries_around_a_start(app: App) -> None:
    add_trainer(app)
    app.client.query()(lambda message, context: Message(message.content, reply_to=message))

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        def ask() -> None:
            messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            observe(context, replies=Unordered(grid.send_and_receive(messages)))

        ask()
        observe(context, result=FedAvg().start(grid, arrays(), num_rounds=1))
        ask()


# --- strategies of the app's own --------------------------------------------------------------


@case("a strategy may sort its replies, add to them and read them twice")
def sorting_strategy(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class OrderedReplies(FedAvg):
            def aggregate_train(self, server_round: int, replies: Any) -> Any:
                replies.sort(key=lambda reply: reply.content["metrics"]["num-examples"])
                observe(context, replies=replies, type=type(replies).__name__)
                result = super().aggregate_train(server_round, replies + replies[:1])
                observe(context, again=replies, count=len(replies))
                return result

            def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
                observe(
                    context,
                    evaluation=Unordered(replies),
                    pops=replies.pop().has_content(),
                    left=len(replies),
                )
                return super().aggregate_evaluate(server_round, replies)

        observe(context, result=OrderedReplies().start(grid, arrays(), num_rounds=2))


@case("a strategy may read its replies after the inherited aggregation")
def replies_after_aggregation(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class Reads(FedAvg):
            def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
                result = super().aggregate_train(server_round, replies)
                observe(context, replies=Unordered(replies))
                return result

        observe(context, result=Reads().start(grid, arrays(), num_rounds=1))


@case("a strategy may check its replies itself")
def own_checks(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class Checks(FedAvg):
            def _check_and_log_replies(self, replies: Any, is_train: bool, validate: bool = True) -> Any:
                observe(context, replies=Unordered(replies), is_train=is_train)
                return super()._check_and_log_replies(replies, is_train, validate)

        observe(context, result=Checks().start(grid, arrays(), num_rounds=1))


@case("configure_train and configure_evaluate may return nothing")
def nothing_configured(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class EverySecondRound(FedAvg):
            def configure_train(self, server_round: int, *args: Any) -> Iterable[Message]:
                return super().configure_train(server_round, *args) if server_round % 2 == 0 else []

            def configure_evaluate(self, server_round: int, *args: Any) -> Iterable[Message]:
                return super().configure_evaluate(server_round, *args) if server_round % 2 else ()

        observe(
            context,
            result=EverySecondRound().start(grid, arrays(), num_rounds=4, evaluate_fn=centralized(context)),
        )


@case("configure_train may be a generator, and may change the config of each message")
def generating_strategy(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class Generates(FedAvg):
            def configure_train(self, server_round: int, *args: Any) -> Iterable[Message]:
                for message in super().configure_train(server_round, *args):
                    config = ConfigRecord({**message.content["config"], "lr": 1.0 / server_round})
                    message.content = RecordDict({"arrays": message.content["arrays"], "config": config})
                    yield message

        observe(context, result=Generates().start(grid, arrays(), num_rounds=2))


@case("a strategy may have a start of its own")
def own_start(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class OwnStart(FedAvg):
            def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, **_: Any) -> Result:
                record, result = initial_arrays, Result()
                for number in range(1, num_rounds + 1):
                    messages = list(self.configure_train(number, record, ConfigRecord({"own": True}), grid))
                    replies = grid.send_and_receive(messages, timeout=20.0)
                    observe(context, replies=Unordered(replies), is_list=isinstance(replies, list))
                    record = ArrayRecord(
                        {
                            key: Array(
                                max(r.content["arrays"][key].numpy().max() for r in replies) * np.ones(2)
                            )
                            for key in record
                        }
                    )
                result.arrays = record
                return result

        observe(context, result=OwnStart().start(grid, arrays(), num_rounds=2))


@case("a start of its own may call the inherited one, and change its Result")
def start_calls_the_inherited_one(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class InheritedStart(FedAvg):
            def start(self, *args: Any, **options: Any) -> Result:
                result = super().start(*args, **options)
                result.arrays = ArrayRecord(
                    {key: Array(array.numpy() * 0) for key, array in result.arrays.items()}
                )
                return result

        observe(context, result=InheritedStart().start(grid, arrays(), num_rounds=2))


@case("a strategy need not inherit from FedAvg")
def strategy_from_scratch(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        class Scratch(Strategy):
            def configure_train(
                self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
            ) -> Any:
                observe(context, train=server_round, arrays=arrays, config=config)
                content = RecordDict({"a": arrays, "c": config})
                return [
                    Message(content, node, "train", group_id=f"t{server_round}")
                    for node in grid.get_node_ids()
                ]

            def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
                replies = list(replies)
                observe(context, replies=Unordered(replies))
                best = max(replies, key=lambda reply: reply.content["metrics"]["num-examples"])
                return best.content["a"], best.content["metrics"]

            def configure_evaluate(
                self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
            ) -> Any:
                return []

            def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
                observe(context, evaluate=server_round, replies=replies)
                return MetricRecord({"nothing": server_round})

            def summary(self) -> None:
                observe(context, summary=True)

        observe(context, result=Scratch().start(grid, arrays(), num_rounds=2))


@case("the aggregated arrays may have other names and shapes than the initial ones")
def arrays_that_change(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        grown = {f"{name}+": Array(np.append(array.numpy(), 1.0)) for name, array in record.items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(grown), "metrics": metrics}), reply_to=message)

    start(app, _no_evaluation, num_rounds=3)


@case("a strategy may aggregate into a record with only some of the arrays")
def part_of_the_arrays(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        observe(context, got=message.content)
        part = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + 1)})
        return Message(
            RecordDict({"arrays": part, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    start(app, _no_evaluation, num_rounds=2)


@case("an Array of a serialization type of the app's own may be the model")
def model_of_own_type(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content["arrays"]
        observe(context, got=record)
        grown = Array("tree", (), "my.booster", record["booster"].data + b"+")
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": ArrayRecord({"booster": grown}), "metrics": metrics}), reply_to=message
        )

    class FirstNodes(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return next(iter(replies)).content["arrays"], None

    initial = lambda: ArrayRecord({"booster": Array("tree", (), "my.booster", b"tree")})  # noqa: E731
    start(app, lambda: FirstNodes(fraction_evaluate=0.0), initial, num_rounds=2)
