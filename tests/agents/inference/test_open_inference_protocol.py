"""The Open Inference Protocol, version 2, over HTTP, with JSON and binary tensors."""

import asyncio
import io
import json
import math
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually

from fedbus.agents.inference.http_server import InferenceServer
from fedbus.agents.inference.open_inference_protocol import DATATYPES, parse_request
from fedbus.agents.inference.plain_json import HttpError, ModelInput, parse_samples
from fedbus.contracts.model import ModelRef
from fedbus.stores.captured.store import CapturedData, CaptureStats

REF = ModelRef(version=3, sha256="0" * 64, size_bytes=1, architecture="0" * 64)
LENGTH = "Inference-Header-Content-Length"
Array = np.ndarray[Any, Any]


@dataclass
class SumPredictor:
    """Predicts the sum of a sample, in the dtype of the input."""

    input_dtype: np.dtype[Any]
    input_shape: tuple[int, ...] | None = (3,)
    classes: int | None = None
    batches: list[int] = field(default_factory=list)

    def predict(self, inputs: Array) -> Array:
        assert inputs.dtype == self.input_dtype
        self.batches.append(len(inputs))
        return np.asarray(inputs.reshape(len(inputs), -1).sum(axis=1), self.input_dtype)


@dataclass
class HttpResponse:
    """A response, read completely."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    @property
    def output(self) -> Any:
        return self.body["outputs"][0]["data"]


TENSOR = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}


@dataclass
class OpenInferenceClient:
    """A client of the Open Inference Protocol."""

    session: aiohttp.ClientSession
    url: str

    async def get(self, path: str) -> HttpResponse:
        async with self.session.get(self.url + path) as response:
            return HttpResponse(response.status, dict(response.headers), await response.read())

    async def post(self, path: str, content: bytes, **headers: str) -> HttpResponse:
        defaults = ("Content-Type",)  # aiohttp adds one otherwise
        async with self.session.post(
            self.url + path, data=io.BytesIO(content), headers=headers, skip_auto_headers=defaults
        ) as response:
            return HttpResponse(response.status, dict(response.headers), await response.read())

    async def infer(
        self, *data: Any, shape: Any = (1, 3), datatype: str = "FP32", **more: Any
    ) -> HttpResponse:
        tensor = {"name": "input", "shape": shape, "datatype": datatype, "data": data}
        return await self.infer_raw({"inputs": [tensor], **more})

    async def infer_raw(self, body: Any) -> HttpResponse:
        headers = {"Content-Type": "application/json"}
        return await self.post("/v2/models/sum/infer", json.dumps(body).encode(), **headers)

    async def infer_binary(self, array: Array, datatype: str = "FP32", **more: Any) -> HttpResponse:
        content, length = binary(array, datatype, **more)
        headers = {"Content-Type": "application/octet-stream", LENGTH: str(length)}
        return await self.post("/v2/models/sum/infer", content, **headers)


def binary(array: Array, datatype: str, **more: Any) -> tuple[bytes, int]:
    tensor = {
        "name": "input",
        "shape": array.shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": array.nbytes},
    }
    header = json.dumps({"inputs": [tensor], **more}).encode()
    return header + array.tobytes(), len(header)


@pytest.fixture
async def captured(tmp_path: Path) -> AsyncIterator[CapturedData]:
    captured = CapturedData(tmp_path / "captured.db")
    yield captured
    await captured.close()


@pytest.fixture
def dtype() -> str:
    return "float32"


@pytest.fixture
async def server(captured: CapturedData, dtype: str) -> AsyncIterator[InferenceServer]:
    server = InferenceServer(captured, name="sum")
    await server.load(REF, lambda: SumPredictor(np.dtype(dtype)), np.ones((2, 3), dtype))
    yield server
    await server.stop()


@pytest.fixture
async def client(server: InferenceServer) -> AsyncIterator[OpenInferenceClient]:
    url = await server.start()
    async with aiohttp.ClientSession() as session:
        yield OpenInferenceClient(session, url)


# --- health and metadata ---------------------------------------------------------------------


async def test_a_server_with_a_model_is_live_and_ready(client: OpenInferenceClient) -> None:
    for path in ("live", "ready"):
        assert (await client.get(f"/v2/health/{path}")).status == 200
    assert (await client.get("/v2/models/sum/ready")).status == 200
    assert (await client.get("/v2/models/sum/versions/3/ready")).status == 200


async def test_a_server_without_a_model_is_live_and_not_ready() -> None:
    server = InferenceServer(name="sum")
    url = await server.start()
    async with aiohttp.ClientSession() as session:
        client = OpenInferenceClient(session, url)
        assert (await client.get("/v2/health/live")).status == 200
        for path in ("/v2/health/ready", "/v2/models/sum/ready", "/v2/models/sum"):
            answer = await client.get(path)
            assert (answer.status, int(answer.headers["Retry-After"])) == (503, 1)
    await server.stop()


async def test_the_metadata_have_the_datatypes_and_shapes(client: OpenInferenceClient) -> None:
    assert (await client.get("/v2")).body["extensions"] == ["binary_tensor_data"]
    assert (await client.get("/v2/models/sum")).body == {
        "name": "sum",
        "versions": ["3"],
        "platform": "fedbus",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [
            {"name": "output", "datatype": "FP32", "shape": [-1]},
            {"name": "prediction_id", "datatype": "INT64", "shape": [-1]},
        ],
    }


@pytest.mark.parametrize(
    "path",
    ["/v2/models/other", "/v2/models/sum/versions/2", "/v2/models/sum/versions/x", "/v2/models/other/ready"],
)
async def test_an_unknown_model_or_version_is_not_found(client: OpenInferenceClient, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status, list(answer.body)) == (404, ["error"])


# --- inference ----------------------------------------------------------------------------------


async def test_a_json_request_is_answered(client: OpenInferenceClient, captured: CapturedData) -> None:
    answer = (await client.infer([1, 2, 3], [4, 5, 6], shape=[2, 3], id="7")).body
    ids = answer["outputs"][1].pop("data")
    assert answer == {
        "model_name": "sum",
        "model_version": "3",
        "id": "7",
        "outputs": [
            {"name": "output", "shape": [2], "datatype": "FP32", "data": [6.0, 15.0]},
            {"name": "prediction_id", "shape": [2], "datatype": "INT64"},
        ],
    }
    feedback = await client.post(
        f"/feedback/{ids[0]}", b'{"label": 6}', **{"Content-Type": "application/json"}
    )
    assert feedback.status == 204
    assert await captured.counts() == CaptureStats(rows=2, labelled=1, dropped=0)


async def test_the_data_of_a_tensor_can_be_flat(client: OpenInferenceClient) -> None:
    assert (await client.infer(1, 2, 3, 4, 5, 6, shape=[2, 3])).output == [6.0, 15.0]


async def test_a_binary_response_is_sent_on_request(
    client: OpenInferenceClient,
) -> None:
    array = np.array([[1, 2, 3], [4, 5, 6]], "<f4")
    answer = await client.infer_binary(array, parameters={"binary_data_output": True})
    assert answer.headers["Content-Type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    header = json.loads(answer.content[:length])
    sizes = [output["parameters"]["binary_data_size"] for output in header["outputs"]]
    assert sizes == [8, 16]
    rest = answer.content[length:]
    assert np.frombuffer(rest[:8], "<f4").tolist() == [6.0, 15.0]
    assert np.frombuffer(rest[8:], "<i8").min() >= 1
    only = await client.infer_binary(array, outputs=[{"name": "output", "parameters": {"binary_data": True}}])
    assert only.content[int(only.headers[LENGTH]) :] == rest[:8]
    plain = await client.infer_binary(array, outputs=[{"name": "output"}])
    assert plain.output == [6.0, 15.0]


@pytest.mark.parametrize("dtype", sorted(set(DATATYPES.values()) - {"bool"}))
async def test_each_numeric_datatype_is_supported(client: OpenInferenceClient, dtype: str) -> None:
    """For example token ids as integers and pixels as floats."""
    name = next(name for name, numpy_name in DATATYPES.items() if numpy_name == dtype)
    assert (await client.infer(1, 2, 3, datatype=name)).output == [6]
    array = np.array([[1, 2, 3]], np.dtype(dtype).newbyteorder("<"))
    assert (await client.infer_binary(array, name)).output == [6]
    plain = {"Content-Type": "application/json"}
    assert (await client.post("/predict", b'{"inputs": [[1, 2, 3]]}', **plain)).body["outputs"] == [6]


@pytest.mark.parametrize("dtype", ["int64"])
async def test_a_fraction_is_rejected_by_an_integer_model(client: OpenInferenceClient, dtype: str) -> None:
    plain = {"Content-Type": "application/json"}
    answer = await client.post("/predict", b'{"inputs": [[1, 2, 1.5]]}', **plain)
    assert (answer.status, "integers: the model has inputs of type int64" in answer.body["error"]) == (
        400,
        True,
    )


@pytest.mark.parametrize("dtype", ["uint8"])
async def test_a_number_out_of_range_is_rejected(client: OpenInferenceClient, dtype: str) -> None:
    for value in (-1, 256):
        answer = await client.infer(1, 2, value, datatype="UINT8")
        assert (answer.status, "from 0 to 255" in answer.body["error"]) == (400, True)


# --- invalid requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [1, 4]}, "a sample must have the shape [3], not [4]"),
        ({"shape": [2, 3]}, "data has 3 numbers, but the shape [2, 3] needs 6"),
        ({"shape": [0, 3]}, "integers above 0"),
        ({"shape": [-1, 3]}, "integers above 0"),
        ({"shape": [1.0, 3]}, "integers above 0"),
        ({"shape": []}, "integers above 0"),
        ({"shape": None}, "integers above 0"),
        ({"shape": [2**40, 3]}, "integers above 0"),
        ({"datatype": "FP64"}, "the datatype must be FP32, not 'FP64'"),
        ({"datatype": "BYTES"}, "the datatype must be FP32, not 'BYTES'"),
        ({"datatype": None}, "the datatype must be FP32, not None"),
        ({"data": ["a", 2, 3]}, "inputs must be numbers"),
        ({"data": [1, 2, 1e39]}, "finite numbers in the range of float32"),
        ({"data": "123"}, "data must be a list"),
        ({"data": [1, [2, 3]]}, "inputs must be numbers, and all samples must have the same shape"),
        ({"parameters": 7}, "parameters must be an object"),
        (
            {"parameters": {"binary_data_size": 12}},
            "needs 12 bytes, but binary_data_size is 12 and the body has 0 bytes of binary data",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_an_invalid_tensor_is_answered_with_its_error(
    client: OpenInferenceClient, captured: CapturedData, change: dict[str, Any], reason: str
) -> None:
    tensor = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3], **change}
    answer = await client.infer_raw({"inputs": [tensor]})
    assert (answer.status, list(answer.body)) == (400, ["error"])
    assert reason in answer.body["error"]
    assert (await captured.counts()).rows == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "inputs must be a list with one tensor"),
        ({"inputs": []}, "inputs must be a list with one tensor"),
        ({"inputs": [1]}, "inputs must be a list with one tensor"),
        ([], "the body must be a JSON object"),
    ],
    ids=str,
)
async def test_a_request_without_a_tensor_is_rejected(
    client: OpenInferenceClient, body: Any, reason: str
) -> None:
    answer = await client.infer_raw(body)
    assert (answer.status, reason in answer.body["error"]) == (400, True)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"id": 7}, "id must be a string"),
        ({"outputs": []}, "outputs must be a list"),
        ({"outputs": [{"name": "logits"}]}, "unknown output 'logits'"),
        ({"outputs": [7]}, "unknown output None"),
    ],
    ids=str,
)
async def test_invalid_requested_outputs_are_rejected(
    client: OpenInferenceClient, more: Any, reason: str
) -> None:
    answer = await client.infer(1, 2, 3, **more)
    assert (answer.status, reason in answer.body["error"]) == (400, True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_binary_data_with_nan_or_infinity_are_rejected(
    client: OpenInferenceClient, value: float
) -> None:
    answer = await client.infer_binary(np.array([[1, 2, value]], "<f4"))
    assert (answer.status, "finite numbers" in answer.body["error"]) == (400, True)


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        ("x", "must be the number of JSON bytes"),
        ("-1", "must be the number of JSON bytes"),
        ("99999", "but the body has"),
        ("5", "not valid JSON"),
    ],
)
async def test_an_invalid_header_length_is_rejected(
    client: OpenInferenceClient, length: str, reason: str
) -> None:
    content, _ = binary(np.ones((1, 3), "<f4"), "FP32")
    answer = await client.post("/v2/models/sum/infer", content, **{LENGTH: length})
    assert (answer.status, reason in answer.body["error"]) == (400, True)


async def test_binary_data_of_the_wrong_size_are_rejected(client: OpenInferenceClient) -> None:
    content, length = binary(np.ones((1, 3), "<f4"), "FP32")
    for changed in (content[:-1], content + b"\0"):
        answer = await client.post("/v2/models/sum/infer", changed, **{LENGTH: str(length)})
        assert (answer.status, "needs 12 bytes" in answer.body["error"]) == (400, True)


async def test_a_body_over_the_limit_is_rejected(client: OpenInferenceClient) -> None:
    answer = await client.infer_binary(np.zeros((1, 2_000_000), "<f4"))
    assert (answer.status, list(answer.body)) == (413, ["error"])
    assert (await client.infer(1, 2, 3)).output == [6.0]


async def test_too_many_samples_are_rejected(client: OpenInferenceClient) -> None:
    answer = await client.infer_binary(np.zeros((1025, 3), "<f4"))
    assert (answer.status, answer.body["error"]) == (
        413,
        "too many samples: 1025 (limit 1024)",
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/octet-stream"},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
async def test_a_request_that_a_web_page_could_send_is_rejected(
    client: OpenInferenceClient, headers: dict[str, str]
) -> None:
    content = json.dumps({"inputs": [TENSOR]}).encode()
    assert (await client.post("/v2/models/sum/infer", content, **headers)).status == 415


async def test_a_request_of_tritons_client_without_content_type_works(
    client: OpenInferenceClient,
) -> None:
    """As tritonclient 2.73 sends one JSON input without requested outputs: no Content-Type, binary output."""
    content = json.dumps({"inputs": [TENSOR], "parameters": {"binary_data_output": True}}).encode()
    answer = await client.post("/v2/models/sum/infer", content)
    assert answer.status == 200
    header = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert [output["name"] for output in header["outputs"]] == ["output", "prediction_id"]
    assert np.frombuffer(answer.content[int(answer.headers[LENGTH]) :][:4], "<f4").tolist() == [6.0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {"name": st.just("input")},
    optional={
        "shape": json_values | st.lists(st.integers(-1, 5), max_size=3),
        "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | json_values,
        "data": json_values | st.lists(st.integers(-300, 300) | st.floats(), max_size=12),
        "parameters": json_values | st.dictionaries(st.just("binary_data_size"), json_values),
    },
)
requests = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=2) | json_values},
    optional={"id": json_values, "outputs": json_values, "parameters": json_values},
)
takes = st.builds(
    ModelInput,
    st.sampled_from(sorted(DATATYPES.values())).map(np.dtype),
    st.none() | st.just((3,)) | st.just((-1,)) | st.just((2, 2)),
    st.just(8),
)


def result_or_error(parse: Callable[[], Any]) -> Any:
    """Return the result of *parse*, or its HttpError."""
    try:
        return parse()
    except HttpError as error:
        return error


@given(requests, takes, st.binary(max_size=64), st.booleans())
def test_any_binary_request_is_parsed_or_rejected(
    body: Any, takes: ModelInput, binary_data: bytes, with_binary: bool
) -> None:
    header = json.dumps(body).encode()
    content, length = (header + binary_data, len(header)) if with_binary else (header, None)
    result = result_or_error(lambda: parse_request(content, length, takes))
    if isinstance(result, HttpError):
        assert result.status in (400, 413)
        assert "\n" not in result.reason
    else:
        assert result.inputs.dtype == takes.dtype
        assert 1 <= len(result.inputs) <= takes.max_samples


@given(requests | json_values, takes)
def test_any_plain_request_is_parsed_or_rejected(body: Any, takes: ModelInput) -> None:
    result = result_or_error(lambda: parse_samples(json.dumps(body).encode(), takes))
    if isinstance(result, HttpError):
        assert result.status in (400, 413)
    else:
        assert result.inputs.dtype == takes.dtype
        assert len(result.labels) == len(result.inputs)


# --- batch size -----------------------------------------------------------------------------------------


@dataclass
class SlowSum(SumPredictor):
    """Blocks until `may_continue` is set."""

    may_continue: threading.Event = field(default_factory=threading.Event)
    is_busy: threading.Event = field(default_factory=threading.Event)

    def predict(self, inputs: Array) -> Array:
        self.is_busy.set()
        assert self.may_continue.wait(20)
        return super().predict(inputs)


async def test_a_slow_model_gets_smaller_batches() -> None:
    server, model = (
        InferenceServer(name="sum", batch_s=0.001),
        SlowSum(np.dtype(np.float32), input_shape=None),
    )
    await server.load(REF, lambda: model)
    url = await server.start()
    async with aiohttp.ClientSession() as session:
        client = OpenInferenceClient(session, url)
        first = asyncio.create_task(client.infer(1, 2, 3))
        await eventually(model.is_busy.is_set)  # its first batch takes longer than batch_s
        others = [asyncio.create_task(client.infer(n, 0, 0)) for n in range(10)]
        await eventually(lambda: server.engine.queue_length == 10)
        await asyncio.sleep(0.05)  # the minimum duration of the first batch
        model.may_continue.set()
        await asyncio.gather(first, *others)
    assert model.batches[:2] == [1, 1]
    assert sum(model.batches) == 11
    await server.stop()
