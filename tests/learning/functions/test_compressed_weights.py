"""Compressed updates of the library `functions`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.learning.functions.compressed_weights import ENCODINGS_KEY, decode_weights
from fedbus.learning.functions.message_codec import BadContent, Content, decode, encode
from fedbus.learning.library import ClientResponse, OutgoingMessage
from fedbus.learning.payload import Payload

from .local_run import LocalRun, make_task

FUNCTIONS = """
import numpy as np

def load(partition_id):
    return np.random.default_rng(partition_id)

def initial(config):
    return {"w": np.zeros((20, 10), np.float32), "n": np.zeros(3, np.int64)}

def train(weights, data, config):
    step = np.linspace(-1, 1, 200).reshape(20, 10) + data.normal(size=(20, 10))
    return {"w": weights["w"] + step.astype(np.float32), "n": weights["n"] + 1}, {"train_loss": 1.0}, 10

def evaluate(weights, data, config):
    return {"eval_loss": 1.0}, 1
"""


def compression(method: str, **options: Any) -> str:
    lines = [f"{key} = {value}" for key, value in options.items()]
    return "\n".join(["[tool.fedbus.compression]", f'method = "{method}"', *lines])


def run(path: Path, extra: str = "", **options: Any) -> tuple[LocalRun, list[int]]:
    """Return a run of three rounds, and the sizes of the updates in bytes."""
    sizes = []
    intercept = options.pop("intercept", lambda _, response: response)

    def measure(message: OutgoingMessage, response: ClientResponse) -> ClientResponse:
        if message.kind == "train" and response.payload is not None:
            sizes.append(response.payload.size_bytes)
        changed: ClientResponse = intercept(message, response)
        return changed

    path.mkdir(exist_ok=True)
    return LocalRun(make_task(path, FUNCTIONS, extra), intercept=measure, **options), sizes


@pytest.mark.parametrize(
    ("method", "options", "ratio", "tolerance"),
    [("bf16", {}, 0.85, 0.02), ("int8", {}, 0.7, 0.03), ("top-k", {"share": 0.5}, 1.3, 1.5)],
)
def test_updates_are_smaller_at_a_bounded_error(
    tmp_path: Path, method: str, options: dict[str, float], ratio: float, tolerance: float
) -> None:
    exact, sizes = run(tmp_path / "exact")
    lossy, small_sizes = run(tmp_path / "lossy", compression(method, **options))
    assert exact.final is not None
    assert lossy.final is not None
    assert max(small_sizes) < ratio * min(sizes)
    assert lossy.final["w"].dtype == np.float32
    np.testing.assert_allclose(lossy.final["w"], exact.final["w"], atol=tolerance)
    np.testing.assert_array_equal(lossy.final["n"], [3, 3, 3])
    assert all(not result.failures for result in lossy.results)


def test_error_feedback_keeps_what_an_encoding_loses(tmp_path: Path) -> None:
    exact, _ = run(tmp_path / "exact", rounds=8)
    errors = []
    for feedback in ("true", "false"):
        table = compression("top-k", **{"share": 0.2, "error-feedback": feedback})
        lossy, _ = run(tmp_path / feedback, table, rounds=8)
        assert lossy.final is not None
        assert exact.final is not None
        errors.append(np.linalg.norm(lossy.final["w"] - exact.final["w"]))
    assert errors[0] < errors[1] / 2


def garble(**changes: Any) -> Callable[[OutgoingMessage, ClientResponse], ClientResponse]:
    """Return an interceptor that changes the values or the array ``w`` of the updates of ``c1``."""

    def change(message: OutgoingMessage, response: ClientResponse) -> ClientResponse:
        if message.client != "c1" or message.kind != "train" or response.payload is None:
            return response
        content = decode(response.payload.to_bytes())
        values = {**content.values, **changes.get("values", {})}
        weights = {**content.weights, **changes.get("weights", {})}
        return ClientResponse(payload=Payload.pack(encode(Content(values, weights))))

    return change


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": {ENCODINGS_KEY: ["w"]}}, "'encodings' of the reply is a list instead of an object"),
        ({"values": {ENCODINGS_KEY: {"w": "zip"}}}, "compressed array 'w': the encoding 'zip' is unknown"),
        ({"values": {ENCODINGS_KEY: {"w": [1]}}}, r"compressed array 'w': the encoding '\[1\]' is unknown"),
        ({"values": {ENCODINGS_KEY: {"x": "int8"}}}, "'x' is compressed, but there is no such array"),
        (
            {"values": {ENCODINGS_KEY: {"n": "int8"}}},
            r"'n' is compressed, but it is int64\[3\] instead of bytes",
        ),
        ({"weights": {"w": np.zeros(5, np.uint8)}}, "compressed array 'w': 5 bytes instead of 204"),
        ({"values": {ENCODINGS_KEY: {}}}, r"'w' has shape \(204,\) instead of \(20, 10\)"),
    ],
)
def test_a_hostile_update_is_the_failure_of_its_client(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    lossy, _ = run(tmp_path, compression("int8"), intercept=garble(**changes))
    for result in lossy.results:
        assert result.participants == {"c0": 10}
        assert re.search(reason, result.failures["c1"])


def test_a_value_beyond_float32_fails_with_the_function_and_the_line(tmp_path: Path) -> None:
    functions = """
        import numpy as np
        def load(): return None
        def initial(config): return {"w": np.zeros(2)}
        def train(weights, data, config): return {"w": weights["w"] + 1e300}, {}, 1
        def evaluate(weights, data, config): return {}, 1
    """
    task = make_task(tmp_path, functions.replace("\n        ", "\n"), compression("int8"))
    with pytest.raises(
        RuntimeError, match=r"train at tiny_app/functions\.py:5: cannot compress 'w'.*beyond float32"
    ):
        LocalRun(task, rounds=1)


def test_bytes_of_an_array_that_was_not_compressed_are_not_decoded() -> None:
    weights = {"w": np.zeros(5, np.uint8)}
    assert decode_weights(weights, None, {}) is weights
    with pytest.raises(BadContent, match="there is no such array"):
        decode_weights(weights, {"w": "int8"}, {})
