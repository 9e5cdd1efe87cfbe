"""Cases of `ServerApp` and `ClientApp`: functions, lifespan, mods, contexts and their state."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from differential.cases import App, add_trainer, arrays, case, echo, numbers, partition, queries
from differential.recording import Unordered, observe
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    message_size_mod,
)
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg


def ask(app: App, *kinds: str, content: Any = None, **options: Any) -> None:
    """Let the ServerApp send a message of each of *kinds* to each node, and observe the replies."""

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        for kind in kinds:
            messages = queries(grid, kind, content=content() if content else None, **options)
            observe(context, kind=kind, replies=Unordered(grid.send_and_receive(messages, timeout=170.0)))


@case("train, evaluate, query and their named actions are functions of their own")
def named_actions(app: App) -> None:
    app.client.train()(lambda message, context: numbers(message, train=1))
    app.client.train("warm_up")(lambda message, context: numbers(message, warm_up=1))
    app.client.evaluate()(lambda message, context: numbers(message, evaluate=1))
    app.client.evaluate("global_model")(lambda message, context: numbers(message, evaluate_global=1))
    app.client.query()(lambda message, context: numbers(message, query=1))
    app.client.query("schema")(lambda message, context: numbers(message, schema=1))
    kinds = [
        "train",
        "train.warm_up",
        "train.default",
        "evaluate",
        "evaluate.global_model",
        "query",
        "query.schema",
    ]
    ask(app, *kinds)


@case("the state of a client lasts from message to message, of any type")
def client_state(app: App) -> None:
    def count(message: Message, context: Context) -> Message:
        counts = context.state.get("counts") or ConfigRecord({"all": 0})
        counts["all"] += 1
        counts[message.metadata.message_type] = counts.get(message.metadata.message_type, 0) + 1
        context.state["counts"] = counts
        observe(context, state=context.state)
        return numbers(message, count=counts["all"])

    app.client.train()(count)
    app.client.evaluate()(count)
    app.client.query("other")(count)
    ask(app, "train", "evaluate", "train", "query.other", "train")


@case("the state may hold arrays, such as a head that stays on the device")
def arrays_in_state(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        head = context.state.array_records.get("head", arrays(float(partition(context))))
        context.state["head"] = ArrayRecord({name: Array(array.numpy() * 2) for name, array in head.items()})
        context.state["seen"] = MetricRecord({"sum": float(head["w"].numpy().sum())})
        observe(context, state=context.state)
        return Message(RecordDict({"seen": context.state["seen"]}), reply_to=message)

    ask(app, "train", "train", "train")


@case("a ClientApp that raises leaves its state as it was before the message")
def state_after_an_error(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        counts = context.state.get("counts") or ConfigRecord({"n": 0, "list": [0]})
        observe(context, before=counts)
        counts["n"] += 1
        counts["list"].append(1)
        context.state["counts"] = counts
        context.state[f"extra {counts['n']}"] = MetricRecord({"x": 1})
        if counts["n"] == 2:
            raise ValueError("half done")
        return numbers(message, n=counts["n"], records=len(context.state))

    ask(app, "train", "train", "train")


@case(
    "the context of a client has its ids, node config and run config",
    config={"lr": 0.1, "name": "x", "flag": True, "n": 7},
)
def client_context(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        config = {key: value for key, value in context.run_config.items() if key != "record"}
        observe(context, node_config=dict(context.node_config), run_config=config, state=context.state)
        observe(
            context,
            run=context.run_id == message.metadata.run_id,
            types=[type(v).__name__ for v in config.values()],
        )
        return Message(message.content, reply_to=message)

    ask(app, "query")


@case(
    "the context of the ServerApp has a run config and an empty state",
    config={"num-server-rounds": 4, "lr": 0.5},
)
def server_context(app: App) -> None:
    app.client.query()(echo)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        config = {key: value for key, value in context.run_config.items() if key != "record"}
        observe(
            context,
            run_config=config,
            node_config=dict(context.node_config),
            node=context.node_id,
            state=context.state,
        )


@case("a client that changes its run config gets an error")
def run_config_is_fixed(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        if partition(context) == 0:
            context.run_config["lr"] = 5.0
        return numbers(message, n=1)

    ask(app, "query", "query")


@case("mods wrap each function, the first outermost; those of a function come after those of the app")
def order_of_mods(app: App) -> None:
    def make(name: str) -> Any:
        def mod(message: Message, context: Context, call_next: Any) -> Message:
            observe(context, enters=name, kind=message.metadata.message_type)
            reply = call_next(message, context)
            observe(context, leaves=name)
            return reply

        return mod

    app.client = ClientApp(mods=[make("first"), make("second")])
    app.client.query()(echo)
    app.client.train(mods=[make("of train"), make("of train, too")])(echo)
    ask(app, "query", "train", "train.unknown")


@case("a mod may change the message, the reply and the state, or answer itself")
def mods_change_messages(app: App) -> None:
    def change(message: Message, context: Context, call_next: Any) -> Message:
        message.content["config"] = ConfigRecord({"by": "the mod"})
        context.state["mod"] = ConfigRecord({"n": len(context.state)})
        reply = call_next(message, context)
        if reply.has_content():
            reply.content["added"] = MetricRecord({"x": 1.5})
        return reply

    def answer(message: Message, context: Context, call_next: Any) -> Message:
        if partition(context) == 1:
            return Message(Error(77, "the mod declines"), reply_to=message)
        return call_next(message, context)

    app.client = ClientApp(mods=[change, answer])

    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        observe(context, got=message.content, state=context.state)
        return Message(message.content, reply_to=message)

    ask(app, "query", "query")


@case("a mod that raises is an error of its client")
def mod_raises(app: App) -> None:
    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if partition(context) == 0:
            raise OSError("no access")
        return call_next(message, context)

    app.client = ClientApp(mods=[mod])
    app.client.query()(echo)
    ask(app, "query")


@case("the mods that log sizes change nothing")
def size_mods(app: App) -> None:
    app.client = ClientApp(mods=[message_size_mod, arrays_size_mod])
    app.client.query()(echo)
    ask(app, "query", content=lambda: RecordDict({"a": arrays(), "c": ConfigRecord({"x": 1})}))


@case("the clipping mods clip the update of a client")
def clipping_mods(app: App) -> None:
    app.client = ClientApp(mods=[])
    for name, mod in (("fixed", fixedclipping_mod), ("adaptive", adaptiveclipping_mod)):

        @app.client.train(name, mods=[mod])
        def train(message: Message, context: Context) -> Message:
            updated = ArrayRecord(
                {key: Array(array.numpy() + 3) for key, array in message.content["arrays"].items()}
            )
            metrics = MetricRecord({"num-examples": 2})
            return Message(RecordDict({"arrays": updated, "metrics": metrics}), reply_to=message)

    config = {"clipping_norm": 0.5}
    ask(
        app,
        "train.fixed",
        "train.adaptive",
        content=lambda: RecordDict({"arrays": arrays(), "c": ConfigRecord(config)}),
    )


@case("a mod whose precondition fails replies with Flower's error")
def mod_precondition(app: App) -> None:
    app.client = ClientApp(mods=[fixedclipping_mod])
    app.client.train()(echo)
    ask(app, "train", content=lambda: RecordDict({"a": arrays(), "b": arrays(), "c": ConfigRecord()}))


@case("LocalDpMod clips, and adds noise to the update")
def local_dp_mod(app: App) -> None:
    app.client = ClientApp(mods=[LocalDpMod(clipping_norm=0.5, sensitivity=0.0, epsilon=1.0, delta=0.1)])
    add_trainer(app)
    ask(app, "train", content=lambda: RecordDict({"arrays": arrays()}))


@case("the lifespan of a ClientApp encloses each message")
def client_lifespan(app: App) -> None:
    @app.client.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        context.state["life"] = ConfigRecord(
            {"n": context.state["life"]["n"] + 1 if "life" in context.state else 1}
        )
        observe(context, enters=context.state)
        yield
        observe(context, leaves=True)

    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        observe(context, query=context.state)
        if partition(context) == 1:
            raise ValueError("in the middle")
        return numbers(message, n=1)

    ask(app, "query", "query")


@case("a lifespan that raises, or does not yield, is an error of its client")
def broken_client_lifespan(app: App) -> None:
    @app.client.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        if partition(context) == 0:
            raise OSError("no data")
        return
        yield

    app.client.query()(echo)
    ask(app, "query")


@case("the lifespan of a ServerApp encloses its main function")
def server_lifespan(app: App) -> None:
    app.client.query()(echo)

    @app.server.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        observe(context, enters=True)
        context.state["life"] = ConfigRecord({"n": 1})
        yield
        observe(context, leaves=context.state["done"])

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, main=context.state["life"])
        context.state["done"] = ConfigRecord({"yes": True})


@case("a ServerApp that raises ends the run, after its lifespan")
def server_raises(app: App) -> None:
    app.client.query()(echo)

    @app.server.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        try:
            yield
        finally:
            observe(context, leaves=True)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        raise KeyError("what is missing")


@case("a ServerApp may be a strategy in a main function of one line", config={"num-server-rounds": 2})
def main_of_one_line(app: App) -> None:
    add_trainer(app)
    app.server = ServerApp()

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        rounds = int(context.run_config["num-server-rounds"])
        observe(context, result=FedAvg().start(grid, arrays(), rounds))


@case("federated analytics: queries and no model")
def analytics(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        values = np.arange(5.0) + partition(context)
        return numbers(message, sum=float(values.sum()), count=len(values))

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        sums = [reply.content["m"] for reply in grid.send_and_receive(queries(grid))]
        observe(context, mean=sum(s["sum"] for s in sums) / sum(s["count"] for s in sums))


@case("a loop of the app's own, without a strategy", clients=3)
def own_loop(app: App) -> None:
    add_trainer(app)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        model = arrays()
        for number in range(1, 4):
            content = RecordDict({"model": model, "config": ConfigRecord({"server-round": number})})
            replies = list(
                grid.send_and_receive(queries(grid, "train", content=content, group_id=str(number)))
            )
            means = [
                np.mean([reply.content["model"][name].numpy() for reply in replies], axis=0) for name in model
            ]
            model = ArrayRecord({name: Array(mean) for name, mean in zip(model, means, strict=True)})
            observe(context, round=number, model=model)


@case("an own loop may leave its result in the state, and begin with the stored model")
def own_loop_with_a_result(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        name, record = next(iter(message.content.array_records.items()))
        trained = ArrayRecord({key: Array(array.numpy() + 1) for key, array in record.items()})
        return Message(RecordDict({name: trained}), reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        model = context.state.get("fedbus.model", arrays())
        replies = grid.send_and_receive(queries(grid, "train", content=RecordDict({"model": model})))
        context.state["fedbus.result"] = next(iter(replies)).content["model"]
        observe(context, result=context.state["fedbus.result"])


@case("scikit-learn trains a linear model whose weights are the arrays")
def scikit_learn(app: App) -> None:
    from sklearn.linear_model import SGDClassifier

    def data(number: int) -> Any:
        inputs = np.random.default_rng(number).normal(size=(40, 3))
        return inputs, (inputs.sum(axis=1) > 0).astype(int)

    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        inputs, labels = data(partition(context))
        model = SGDClassifier(random_state=0)
        model.partial_fit(inputs, labels, classes=[0, 1])
        model.coef_, model.intercept_ = message.content["arrays"].to_numpy_ndarrays()
        model.partial_fit(inputs, labels)
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": float(model.score(inputs, labels))})
        record = ArrayRecord([model.coef_, model.intercept_])
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord([np.zeros((1, 3)), np.zeros(1)])
        observe(context, result=FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=2))


@case("only the body of a model is federated; each client keeps its head")
def personal_heads(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        head = context.state.array_records.get("head", arrays(10.0 * partition(context)))
        context.state["head"] = ArrayRecord({name: Array(array.numpy() - 1) for name, array in head.items()})
        body = message.content["arrays"]
        observe(context, head=context.state["head"], body=body)
        trained = ArrayRecord({name: Array(array.numpy() + 1) for name, array in body.items()})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(
            {"weight": Array(np.zeros((2, 3), np.float32)), "bias": Array(np.zeros(2, np.float32))}
        )
        observe(context, result=FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=2))
