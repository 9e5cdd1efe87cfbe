"""Cases of several starts in one ServerApp, and of strategies of the app's own."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from differential.cases import App, add_trainer, arrays, case
from differential.recording import Unordered, observe
from differential.strategy_parts import centralized, start, train_only
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, Result, Strategy

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

    start(app, train_only, num_rounds=3)


@case("a strategy may aggregate into a record with only some of the arrays")
def part_of_the_arrays(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        observe(context, got=message.content)
        part = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + 1)})
        return Message(
            RecordDict({"arrays": part, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    start(app, train_only, num_rounds=2)


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
