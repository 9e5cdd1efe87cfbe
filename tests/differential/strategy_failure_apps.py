"""Cases of `flwr.serverapp.strategy` with clients that fail, and with replies that a strategy rejects."""

from collections.abc import Callable
from typing import Any

from differential.cases import App, arrays, case, partition
from differential.strategy_parts import add_one, centralized, start, train_only
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping


@case("a client that fails is left out", clients=3)
def failing_client(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        if partition(context) == 1:
            raise RuntimeError("no memory")
        return add_one(message, context)

    start(app, train_only, num_rounds=2)


@case("without a valid reply the model stays, and the Result has no arrays")
def all_clients_fail(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no memory")

    start(app, train_only, num_rounds=2, evaluate_fn=centralized)


@case("the DP wrappers skip a round with a failed client")
def dp_with_a_failing_client(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        if partition(context) == 1 and message.content["config"]["server-round"] == 1:
            raise RuntimeError("no memory")
        return add_one(message, context)

    start(app, lambda: DifferentialPrivacyServerSideFixedClipping(train_only(), 0.0, 5.0, 2), num_rounds=2)


def _wrong_reply(app: App, change: Callable[[RecordDict, int], None]) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        content = RecordDict(
            {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1, "x": 1.0})}
        )
        change(content, partition(context))
        return Message(content, reply_to=message)

    start(app, train_only, num_rounds=1)


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
        lambda app, change=change_reply: _wrong_reply(app, change)  # type: ignore[misc]  # mypy infers no type for a lambda with a default
    )
