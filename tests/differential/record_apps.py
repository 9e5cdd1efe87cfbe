"""Cases of the record types: `RecordDict`, `ArrayRecord`, `MetricRecord`, `ConfigRecord` and `Array`."""

import math
from typing import Any

import numpy as np
from differential.cases import App, arrays, case, echo, queries
from differential.recording import Unordered, observe
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common import ConfigsRecord, MetricsRecord, ParametersRecord, RecordSet, array_from_numpy
from flwr.serverapp import Grid


def send_and_observe(app: App, make: Any) -> None:
    """Send what *make* returns to each client, which observes it and sends it back."""

    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        observe(context, got=message.content)
        return Message(message.content, reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        content = make()
        replies = list(grid.send_and_receive(queries(grid, content=content)))
        observe(context, replies=Unordered(replies), equal=[reply.content == content for reply in replies])


@case("a ConfigRecord holds each type of value")
def config_values(app: App) -> None:
    values: dict[str, Any] = {
        "int": 5, "negative": -(2**62), "float": 0.1, "text": "grüße", "bytes": bytes(range(256)), "yes": True,
        "no": False, "ints": [1, 2], "floats": [0.5, 2.5], "texts": ["a", ""], "flags": [True, False],
        "blobs": [b"", b"\x00"], "none": [],
    }  # fmt: skip
    send_and_observe(app, lambda: RecordDict({"c": ConfigRecord(values), "empty": ConfigRecord()}))


@case("a MetricRecord holds numbers, not a number, and lists")
def metric_values(app: App) -> None:
    values: dict[str, Any] = {
        "i": 3,
        "f": 1e-300,
        "inf": math.inf,
        "list": [1.5, -2.0],
        "ints": [1, 2],
        "zero": 0.0,
    }
    send_and_observe(app, lambda: RecordDict({"m": MetricRecord(values), "empty": MetricRecord()}))


@case("an ArrayRecord holds each dtype and shape")
def array_dtypes(app: App) -> None:
    kinds = [
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint64",
        "bool",
        "complex64",
    ]
    record = {kind: Array(np.arange(6).reshape(2, 3).astype(kind)) for kind in kinds}
    record["scalar"] = Array(np.asarray(3.5))
    record["empty"] = Array(np.zeros((0, 4), np.float32))
    record["fortran"] = Array(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    record["sliced"] = Array(np.arange(10.0)[::3])
    record["big endian"] = Array(np.arange(3, dtype=">i4"))
    send_and_observe(app, lambda: RecordDict({"a": ArrayRecord(record), "none": ArrayRecord()}))


@case("an Array may have a serialization type of its own")
def own_serialization_type(app: App) -> None:
    own = Array(dtype="tree", shape=(2, 1), stype="my.booster.json", data=b'{"trees": []}')
    send_and_observe(
        app, lambda: RecordDict({"model": ArrayRecord({"booster": own, "w": Array(np.ones(2))})})
    )


@case("records of one kind may be many, and keep their order and names")
def many_records(app: App) -> None:
    def make() -> RecordDict:
        records: dict[str, Any] = {}
        for name in ("z", "a.b/c d", "", "ü"):
            records[f"arrays {name}"] = arrays(1.0)
            records[f"metrics {name}"] = MetricRecord({"same": 1.0, name or "x": 2})
            records[f"config {name}"] = ConfigRecord({"same": "x"})
        return RecordDict(records)

    send_and_observe(app, make)


@case("an empty RecordDict is content")
def empty_content(app: App) -> None:
    send_and_observe(app, RecordDict)


@case("an ArrayRecord may be made of a list of arrays, or of a torch state dict", slow=True)
def sources_of_arrays(app: App) -> None:
    def make() -> RecordDict:
        import torch

        layer = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(layer.weight, 0.25)
        torch.nn.init.constant_(layer.bias, -1.0)
        numbered = ArrayRecord([np.ones(2), np.zeros((1, 1), np.int32)])
        return RecordDict({"torch": ArrayRecord(layer.state_dict()), "list": numbered})

    send_and_observe(app, make)


@case("received arrays are copies that may be changed")
def received_arrays_are_writable(app: App) -> None:
    @app.client.query()
    def query(message: Message, context: Context) -> Message:
        record = message.content["a"]
        for array in record.to_numpy_ndarrays():
            array += 1
        observe(context, unchanged=record)
        record["w"] = Array(record["w"].numpy() * 2)
        record["new"] = Array(np.ones(1))
        del record["b"]
        return Message(message.content, reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"a": arrays(2.0)})
        replies = list(grid.send_and_receive(queries(grid, content=content)))
        observe(context, replies=Unordered(replies), own=content)
        for reply in replies:
            reply.content["a"]["w"] = Array(reply.content["a"]["w"].numpy() + 1)
            reply.content["more"] = MetricRecord({"x": 1})
        observe(context, changed=Unordered(replies))


@case("records of the old names arrive")
def old_record_names(app: App) -> None:
    def make() -> Any:
        return RecordSet(
            {
                "p": ParametersRecord({"w": array_from_numpy(np.ones(2))}),
                "m": MetricsRecord({"x": 1.0}),
                "c": ConfigsRecord({"y": "z"}),
            }
        )

    app.client.query()(echo)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        for reply in grid.send_and_receive(queries(grid, content=make())):
            parts = [reply.content.array_records, reply.content.metric_records, reply.content.config_records]
            observe(context, parts=[{name: dict(record) for name, record in part.items()} for part in parts])


@case("a metric of two records may have one name")
def one_metric_name_twice(app: App) -> None:
    @app.client.train()
    def train(message: Message, context: Context) -> Message:
        metrics = {"a": MetricRecord({"loss": 1.0}), "b": MetricRecord({"loss": 2.0, "num-examples": 3})}
        return Message(RecordDict(metrics), reply_to=message)

    @app.server.main()
    def main(grid: Grid, context: Context) -> None:
        observe(context, replies=Unordered(grid.send_and_receive(queries(grid, "train", group_id="1"))))
