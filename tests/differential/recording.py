"""What a Flower app observed, in a form that does not depend on ids, times and the order of replies.

`observe` appends a line to the file that the run config names ``record``, from the ServerApp and from the
ClientApps, in whichever process they run. `read` returns the observations of each of them in their order.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common import Parameters, parameters_to_ndarrays
from flwr.server import History

RECORD: Final = "record"
"""The key of the run config with the path of the file."""
RELATIVE_TOLERANCE: Final = 2e-6
"""Of floats: sums in another order differ in their last digits, under Flower itself, too."""

Recording = dict[str, list[Any]]
"""The observations by who made them: ``server``, ``client 0``, …"""


class Unordered(list[Any]):
    """A list whose order is not compared, such as replies in order of arrival."""


def observe(context: Context, **values: Any) -> None:
    """Record *values*. Messages, records, arrays, errors and exceptions are described."""
    number = context.node_config.get("partition-id")
    who = "server" if number is None else f"client {number}"
    line = json.dumps({"who": who, "values": describe(values)}) + "\n"
    with open(str(context.run_config[RECORD]), "ab") as file:  # noqa: PTH123 - one write, so that lines stay whole
        file.write(line.encode())


def read(path: Path, numbers: Mapping[int, int]) -> Recording:
    """Return the observations in the file at *path*. *numbers* are the numbers of the clients by their node ids."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    nodes = {str(node): f"client {number}" for node, number in numbers.items()} | {"1": "server"}
    recording: Recording = {}
    for line in lines:
        recording.setdefault(line["who"], []).append(_normalize(line["values"], nodes))
    return recording


def describe(value: Any) -> Any:  # noqa: PLR0911, PLR0912 - one line for each type
    """Return *value* as JSON. Node ids become ``{"node": …}``; see `read`."""
    match value:
        case Message():
            return _describe_message(value)
        case RecordDict():
            return {name: describe(record) for name, record in value.items()}
        case ArrayRecord():
            return {"arrays": {name: describe(array) for name, array in value.items()}}
        case MetricRecord() | ConfigRecord():
            return {type(value).__name__: describe(dict(value))}
        case Array():
            return [value.dtype, list(value.shape), value.stype, _describe_tensor(value.data)]
        case Parameters():
            return {
                "parameters": [_describe_tensor(tensor) for tensor in value.tensors],
                "type": value.tensor_type,
            }
        case History():
            return describe(vars(value))
        case Error():
            return {"error": value.code}
        case np.ndarray():
            plain = value.astype(str) if value.dtype.kind == "c" else value
            return {
                "ndarray": str(value.dtype),
                "shape": list(value.shape),
                "values": describe(plain.tolist()),
            }
        case np.generic():
            return describe(value.item())
        case BaseException():
            return {"raised": type(value).__name__, "text": str(value)}
        case bytes():
            return {"bytes": value.decode("latin1")}
        case Unordered():
            return {"unordered": [describe(item) for item in value]}
        case bool() | str() | None:
            return value
        case int():
            return {"node": str(value)} if value > 2**32 else value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {str(key): describe(item) for key, item in value.items()}
        case set() | frozenset():
            return {"unordered": [describe(item) for item in value]}
        case Sequence():
            return [describe(item) for item in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return describe(asdict(value)) if not hasattr(value, "arrays") else describe(vars(value))
        case _:
            return type(value).__name__


def _describe_message(message: Message) -> Any:
    metadata = message.metadata
    described = {
        "type": metadata.message_type,
        "group": metadata.group_id,
        "from": {"node": str(metadata.src_node_id)},
        "to": {"node": str(metadata.dst_node_id)},
        "is_reply": bool(metadata.reply_to_message_id),
    }
    if message.has_error():
        return described | {"error": message.error.code}
    return described | {"content": describe(message.content)}


def _describe_tensor(tensor: bytes) -> Any:
    if tensor.startswith(b"\x93NUMPY"):
        return describe(parameters_to_ndarrays(Parameters([tensor], "numpy.ndarray"))[0])
    return describe(tensor)


def _normalize(value: Any, nodes: Mapping[str, str]) -> Any:
    match value:
        case {"node": str() as node}:
            return nodes.get(node, "unknown node")
        case {"unordered": list() as items}:
            return sorted((_normalize(item, nodes) for item in items), key=_sort_key)
        case dict():
            return {key: _normalize(item, nodes) for key, item in value.items()}
        case list():
            return [_normalize(item, nodes) for item in value]
        case _:
            return value


def _sort_key(value: Any) -> str:
    return json.dumps(value, default=str)


def compare(expected: Any, actual: Any, path: str = "") -> list[str]:
    """Describe where *actual* differs from *expected*. An empty list: they are equal."""
    match expected, actual:
        case dict(), dict():
            missing = [f"{path}/{key} is missing: {expected[key]!r}" for key in expected if key not in actual]
            extra = [
                f"{path}/{key} is not expected: {actual[key]!r}" for key in actual if key not in expected
            ]
            both = [
                line
                for key in expected
                if key in actual
                for line in compare(expected[key], actual[key], f"{path}/{key}")
            ]
            return missing + extra + both
        case list(), list() if len(expected) == len(actual):
            pairs = enumerate(zip(expected, actual, strict=True))
            return [line for index, (one, other) in pairs for line in compare(one, other, f"{path}[{index}]")]
        case float(), float() if math.isclose(expected, actual, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9):
            return []
        case _ if type(expected) is type(actual) and expected == actual:
            return []
        case _:
            return [f"{path}: {expected!r} under Flower, {actual!r} over fedbus"]
