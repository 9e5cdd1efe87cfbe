"""The Open Inference Protocol, version 2, as its clients speak it: over HTTP, with JSON and with binary tensors."""

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
    """Answers with the sum of a sample, in the type that it takes."""

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
    """What came back."""

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
    """Somebody who asks."""

    session: aiohttp.ClientSession
    url: str

    async def get(self, path: str) -> HttpResponse:
        async with self.session.get(self.url + path) as response:
            return HttpResponse(response.status, dict(response.headers), await response.read())

    async def post(self, path: str, content: bytes, **headers: str) -> HttpResponse:
        own = ("Content-Type",)  # aiohttp would name one
        async with self.session.post(
            self.url + path, data=io.BytesIO(content), headers=headers, skip_auto_headers=own
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


# --- what there is to know -------------------------------------------------------------------


async def test_health_is_told(client: OpenInferenceClient) -> None:
    for path in ("live", "ready"):
        assert (await client.get(f"/v2/health/{path}")).status == 200
    assert (await client.get("/v2/models/sum/ready")).status == 200
    assert (await client.get("/v2/models/sum/versions/3/ready")).status == 200


async def test_without_a_model_one_is_alive_and_not_ready() -> None:
    server = InferenceServer(name="sum")
    url = await server.start()
    async with aiohttp.ClientSession() as session:
        client = OpenInferenceClient(session, url)
        assert (await client.get("/v2/health/live")).status == 200
        for path in ("/v2/health/ready", "/v2/models/sum/ready", "/v2/models/sum"):
            answer = await client.get(path)
            assert (answer.status, int(answer.headers["Retry-After"])) == (503, 1)
    await server.stop()


async def test_metadata_say_what_the_model_takes_and_gives(client: OpenInferenceClient) -> None:
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
async def test_another_model_or_version_is_not_here(client: OpenInferenceClient, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status, list(answer.body)) == (404, ["error"])


# --- inference ----------------------------------------------------------------------------------


async def test_json_tensors_are_answered(client: OpenInferenceClient, captured: CapturedData) -> None:
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


async def test_data_may_be_flat_as_the_protocol_has_it(client: OpenInferenceClient) -> None:
    assert (await client.infer(1, 2, 3, 4, 5, 6, shape=[2, 3])).output == [6.0, 15.0]


async def test_binary_tensors_are_answered_in_binary_where_that_is_asked_for(
    client: OpenInferenceClient,
) -> None:
    array = np.array([[1, 2, 3], [4, 5, 6]], "<f4")
    answer = await client.infer_binary(array, parameters={"binary_data_output": True})
    assert answer.headers["Content-Type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    header = json.loads(answer.content[:length])
    sizes = [one["parameters"]["binary_data_size"] for one in header["outputs"]]
    assert sizes == [8, 16]
    rest = answer.content[length:]
    assert np.frombuffer(rest[:8], "<f4").tolist() == [6.0, 15.0]
    assert np.frombuffer(rest[8:], "<i8").min() >= 1
    only = await client.infer_binary(array, outputs=[{"name": "output", "parameters": {"binary_data": True}}])
    assert only.content[int(only.headers[LENGTH]) :] == rest[:8]
    plain = await client.infer_binary(array, outputs=[{"name": "output"}])
    assert plain.output == [6.0, 15.0]


@pytest.mark.parametrize("dtype", sorted(set(DATATYPES.values()) - {"bool"}))
async def test_every_type_of_number_goes_in_and_comes_out(client: OpenInferenceClient, dtype: str) -> None:
    """Token ids as whole numbers, pixels as floats: what the model takes is what it is given."""
    name = next(name for name, known in DATATYPES.items() if known == dtype)
    assert (await client.infer(1, 2, 3, datatype=name)).output == [6]
    array = np.array([[1, 2, 3]], np.dtype(dtype).newbyteorder("<"))
    assert (await client.infer_binary(array, name)).output == [6]
    plain = {"Content-Type": "application/json"}
    assert (await client.post("/predict", b'{"inputs": [[1, 2, 3]]}', **plain)).body["outputs"] == [6]


@pytest.mark.parametrize("dtype", ["int64"])
async def test_what_is_no_whole_number_is_no_token(client: OpenInferenceClient, dtype: str) -> None:
    plain = {"Content-Type": "application/json"}
    answer = await client.post("/predict", b'{"inputs": [[1, 2, 1.5]]}', **plain)
    assert (answer.status, "whole numbers: the model takes int64" in answer.body["error"]) == (400, True)


@pytest.mark.parametrize("dtype", ["uint8"])
async def test_a_number_that_does_not_fit_is_refused(client: OpenInferenceClient, dtype: str) -> None:
    for value in (-1, 256):
        answer = await client.infer(1, 2, value, datatype="UINT8")
        assert (answer.status, "from 0 to 255" in answer.body["error"]) == (400, True)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [1, 4]}, "a sample must have the shape [3], and not [4]"),
        ({"shape": [2, 3]}, "data has 3 numbers, and the shape [2, 3] asks for 6"),
        ({"shape": [0, 3]}, "whole numbers above 0"),
        ({"shape": [-1, 3]}, "whole numbers above 0"),
        ({"shape": [1.0, 3]}, "whole numbers above 0"),
        ({"shape": []}, "whole numbers above 0"),
        ({"shape": None}, "whole numbers above 0"),
        ({"shape": [2**40, 3]}, "whole numbers above 0"),
        ({"datatype": "FP64"}, "the model takes FP32, and not 'FP64'"),
        ({"datatype": "BYTES"}, "the model takes FP32, and not 'BYTES'"),
        ({"datatype": None}, "the model takes FP32, and not None"),
        ({"data": ["a", 2, 3]}, "inputs must be numbers"),
        ({"data": [1, 2, 1e39]}, "finite numbers that fit into 32 bits"),
        ({"data": "123"}, "data must be a list"),
        ({"data": [1, [2, 3]]}, "inputs must be numbers, and all samples of one shape"),
        ({"parameters": 7}, "parameters must be an object"),
        (
            {"parameters": {"binary_data_size": 12}},
            "takes 12 bytes: binary_data_size is 12, and 0 bytes came",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_tensor_that_makes_no_sense_is_refused_with_the_reason(
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
        ({}, "the model takes one tensor"),
        ({"inputs": []}, "the model takes one tensor"),
        ({"inputs": [1]}, "the model takes one tensor"),
        ([], "the body must be a JSON object"),
    ],
    ids=str,
)
async def test_a_request_without_its_tensor_is_refused(
    client: OpenInferenceClient, body: Any, reason: str
) -> None:
    answer = await client.infer_raw(body)
    assert (answer.status, reason in answer.body["error"]) == (400, True)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"id": 7}, "id must be a string"),
        ({"outputs": []}, "outputs must be a list"),
        ({"outputs": [{"name": "logits"}]}, "there is no output 'logits'"),
        ({"outputs": [7]}, "there is no output None"),
    ],
    ids=str,
)
async def test_a_wish_that_cannot_be_met_is_refused(
    client: OpenInferenceClient, more: Any, reason: str
) -> None:
    answer = await client.infer(1, 2, 3, **more)
    assert (answer.status, reason in answer.body["error"]) == (400, True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_bytes_that_are_no_number_are_refused(client: OpenInferenceClient, value: float) -> None:
    answer = await client.infer_binary(np.array([[1, 2, value]], "<f4"))
    assert (answer.status, "finite numbers" in answer.body["error"]) == (400, True)


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        ("x", "must be how many bytes"),
        ("-1", "must be how many bytes"),
        ("99999", "bytes came"),
        ("5", "not JSON"),
    ],
)
async def test_a_header_length_that_is_wrong_is_refused(
    client: OpenInferenceClient, length: str, reason: str
) -> None:
    content, _ = binary(np.ones((1, 3), "<f4"), "FP32")
    answer = await client.post("/v2/models/sum/infer", content, **{LENGTH: length})
    assert (answer.status, reason in answer.body["error"]) == (400, True)


async def test_bytes_too_few_or_too_many_are_refused(client: OpenInferenceClient) -> None:
    content, length = binary(np.ones((1, 3), "<f4"), "FP32")
    for changed in (content[:-1], content + b"\0"):
        answer = await client.post("/v2/models/sum/infer", changed, **{LENGTH: str(length)})
        assert (answer.status, "takes 12 bytes" in answer.body["error"]) == (400, True)


async def test_a_huge_body_is_refused(client: OpenInferenceClient) -> None:
    answer = await client.infer_binary(np.zeros((1, 2_000_000), "<f4"))
    assert (answer.status, list(answer.body)) == (413, ["error"])
    assert (await client.infer(1, 2, 3)).output == [6.0]


async def test_too_many_samples_are_refused(client: OpenInferenceClient) -> None:
    answer = await client.infer_binary(np.zeros((1025, 3), "<f4"))
    assert (answer.status, answer.body["error"]) == (
        413,
        "1025 samples are too many: send at most 1024 at once",
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
async def test_what_a_page_in_a_browser_could_send_is_refused(
    client: OpenInferenceClient, headers: dict[str, str]
) -> None:
    content = json.dumps({"inputs": [TENSOR]}).encode()
    assert (await client.post("/v2/models/sum/infer", content, **headers)).status == 415


async def test_json_that_is_not_said_to_be_any_is_taken_as_tritons_own_client_sends_it(
    client: OpenInferenceClient,
) -> None:
    """What tritonclient 2.73 sends for one JSON input and no named output: no Content-Type, an answer in bytes."""
    content = json.dumps({"inputs": [TENSOR], "parameters": {"binary_data_output": True}}).encode()
    answer = await client.post("/v2/models/sum/infer", content)
    assert answer.status == 200
    said = json.loads(answer.content[: int(answer.headers[LENGTH])])
    assert [one["name"] for one in said["outputs"]] == ["output", "prediction_id"]
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


def result_or_refusal(ask: Callable[[], Any]) -> Any:
    """What *ask* makes of it, or the refusal."""
    try:
        return ask()
    except HttpError as refusal:
        return refusal


@given(requests, takes, st.binary(max_size=64), st.booleans())
def test_whatever_is_said_is_understood_or_refused(
    body: Any, takes: ModelInput, rest: bytes, with_bytes: bool
) -> None:
    header = json.dumps(body).encode()
    content, length = (header + rest, len(header)) if with_bytes else (header, None)
    asked = result_or_refusal(lambda: parse_request(content, length, takes))
    if isinstance(asked, HttpError):
        assert asked.status in (400, 413)
        assert "\n" not in asked.reason
    else:
        assert asked.inputs.dtype == takes.dtype
        assert 1 <= len(asked.inputs) <= takes.most


@given(requests | json_values, takes)
def test_whatever_is_said_plainly_is_understood_or_refused(body: Any, takes: ModelInput) -> None:
    asked = result_or_refusal(lambda: parse_samples(json.dumps(body).encode(), takes))
    if isinstance(asked, HttpError):
        assert asked.status in (400, 413)
    else:
        assert asked.inputs.dtype == takes.dtype
        assert len(asked.labels) == len(asked.inputs)


# --- batches end in time --------------------------------------------------------------------------------


@dataclass
class SlowSum(SumPredictor):
    """Takes its time: until it is told to go on."""

    go_on: threading.Event = field(default_factory=threading.Event)
    busy: threading.Event = field(default_factory=threading.Event)

    def predict(self, inputs: Array) -> Array:
        self.busy.set()
        assert self.go_on.wait(20)
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
        await eventually(model.busy.is_set)  # and so its only batch so far takes much longer than it may
        others = [asyncio.create_task(client.infer(n, 0, 0)) for n in range(10)]
        await eventually(lambda: server.engine.queued == 10)
        await asyncio.sleep(0.05)  # what the first batch takes at least
        model.go_on.set()
        await asyncio.gather(first, *others)
    assert model.batches[:2] == [1, 1]
    assert sum(model.batches) == 11
    await server.stop()
