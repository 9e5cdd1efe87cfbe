"""The HTTP server of the inference agent, over real sockets, also during model swaps."""

import asyncio
import gzip
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
import pytest
from support import eventually

from fedbus.agents.inference import http_server
from fedbus.agents.inference.http_server import MAX_CONCURRENT_BODIES, InferenceBindError, InferenceServer
from fedbus.agents.inference.model_swap import ModelSwap
from fedbus.agents.inference.offline_evaluation import OfflineEvaluation
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.serving import ModelCommitted
from fedbus.contracts.task.serving import CaptureTable, ServingTable
from fedbus.learning.predictor import ModelRefused
from fedbus.stores.captured.reader import read_labelled_rows
from fedbus.stores.captured.store import CapturedData, CaptureStats

T = TypeVar("T")
PROBE = np.zeros((2, 3), np.float32)
MAX_BODY = 10_000
FLOAT: np.dtype[Any] = np.dtype(np.float32)


def ref(version: int) -> ModelRef:
    return ModelRef(version=version, sha256=f"{version:064x}", size_bytes=1, architecture="0" * 64)


@dataclass
class AddingPredictor:
    """Adds its number to the sum of each sample, so that the output identifies the model."""

    number: int
    input_shape: tuple[int, ...] | None = (3,)
    input_dtype: np.dtype[Any] = FLOAT
    classes: int | None = None
    batches: list[int] = field(default_factory=list)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        self.batches.append(len(inputs))
        return np.asarray(inputs.sum(1) + self.number)


@dataclass
class SlowAdder(AddingPredictor):
    """Blocks until `may_continue` is set. Its input shape is unknown, so it is not warmed up."""

    input_shape: tuple[int, ...] | None = None
    is_busy: threading.Event = field(default_factory=threading.Event)
    may_continue: threading.Event = field(default_factory=threading.Event)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        self.is_busy.set()
        assert self.may_continue.wait(20)
        return super().predict(inputs)


class NanPredictor(AddingPredictor):
    """Predicts NaN."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return np.full(len(inputs), np.nan)


class FailsOnThirteen(SlowAdder):
    """Fails on a sample with a 13."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        outputs = super().predict(inputs)
        if (inputs == 13).any():
            raise RuntimeError("failed\non 13")
        return outputs


@dataclass
class PlainJsonClient:
    """A client of the plain JSON API."""

    session: aiohttp.ClientSession
    url: str

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        content, headers = io.BytesIO(json.dumps(body).encode()), {"Content-Type": "application/json"}
        async with self.session.post(self.url + path, data=content, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def predict(self, *inputs: list[float], **more: Any) -> dict[str, Any]:
        status, body = await self.post("/predict", {"inputs": inputs, **more})
        assert status == 200, body
        return dict(body)

    async def predict_error(self, body: Any) -> tuple[int, str]:
        status, reply = await self.post("/predict", body)
        assert set(reply) == {"error"}
        assert "\n" not in reply["error"]
        return status, reply["error"]


async def queue_behind(
    model: SlowAdder, server: InferenceServer, first: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, T]
) -> "list[asyncio.Task[T]]":
    """Start *first*, wait until *model* predicts it, then queue *others* behind it."""
    tasks = [asyncio.create_task(first)]
    await eventually(model.is_busy.is_set)
    before = server.engine.queue_length
    tasks += [asyncio.create_task(other) for other in others]
    await eventually(lambda: server.engine.queue_length == before + len(others))
    return tasks


@asynccontextmanager
async def open_client(server: InferenceServer) -> AsyncIterator[PlainJsonClient]:
    url = await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield PlainJsonClient(session, url)
    finally:
        await server.stop()


@pytest.fixture
async def captured(tmp_path: Path) -> AsyncIterator[CapturedData]:
    captured = CapturedData(tmp_path / "captured.db")
    yield captured
    await captured.close()


@pytest.fixture
async def server(captured: CapturedData) -> InferenceServer:
    return InferenceServer(captured, name="adder", batch_s=3600.0)


@pytest.fixture
async def client(server: InferenceServer) -> AsyncIterator[PlainJsonClient]:
    """A client of a server with version 1."""
    await server.load(ref(1), lambda: AddingPredictor(100))
    async with open_client(server) as client:
        yield client


# --- predictions -----------------------------------------------------------------------------


async def test_a_prediction_has_the_version_of_its_model(client: PlainJsonClient) -> None:
    answer = await client.predict([1, 2, 3], [0, 0, 0.5])
    assert answer["outputs"] == [106.0, 100.5]
    assert answer["model_version"] == 1
    assert len(answer["ids"]) == 2


async def test_before_the_first_model_the_server_is_not_ready(server: InferenceServer) -> None:
    async with open_client(server) as client:
        for request in (
            client.session.get(client.url + "/ready"),
            client.session.post(client.url + "/predict", json={}),
        ):
            async with request as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
        assert await client.get("/live") == (200, {"live": True})
        assert await client.get("/model") == (200, {"model": None})
        await server.load(ref(1), lambda: AddingPredictor(1))
        assert await client.get("/ready") == (200, {"ready": True, "model_version": 1})
        assert (await client.get("/model"))[1]["model"]["sha256"] == ref(1).sha256


async def test_queued_requests_are_batched(server: InferenceServer) -> None:
    model = SlowAdder(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        queued = await queue_behind(model, server, *(client.predict([n, 0, 0]) for n in range(20)))
        model.may_continue.set()
        answers = await asyncio.gather(*queued)
    assert [answer["outputs"] for answer in answers] == [[float(n)] for n in range(20)]
    assert model.batches == [1, 19]


async def test_a_failing_request_does_not_fail_its_batch(server: InferenceServer) -> None:
    model = FailsOnThirteen(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        requests = (client.post("/predict", {"inputs": [[n, 0, 0]]}) for n in (1, 2, 13, 4))
        queued = await queue_behind(model, server, *requests)
        model.may_continue.set()
        answers = await asyncio.gather(*queued)
    assert [status for status, _ in answers] == [200, 200, 500, 200]
    assert answers[2][1] == {"error": "prediction failed: failed on 13"}


# --- model swaps ---------------------------------------------------------------------------------


async def test_no_request_fails_during_model_swaps(server: InferenceServer, captured: CapturedData) -> None:
    await server.load(ref(1), lambda: AddingPredictor(1))
    stop = asyncio.Event()
    versions: list[int] = []

    async def predict_until_stopped(client: PlainJsonClient) -> None:
        while not stop.is_set():
            answer = await client.predict([0, 0, 0])
            assert answer["outputs"] == [float(answer["model_version"])]
            versions.append(answer["model_version"])

    async with open_client(server) as client, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(predict_until_stopped(client))
        for version in range(1, 42):
            await server.load(ref(version), partial(AddingPredictor, version), PROBE)
            await eventually(partial(versions.__contains__, version))
        stop.set()
    assert set(versions) == set(range(1, 42))
    assert (await captured.counts()).rows == len(versions)


async def test_the_current_model_answers_while_a_new_one_loads(
    client: PlainJsonClient, server: InferenceServer
) -> None:
    may_load = threading.Event()

    def load_slowly() -> AddingPredictor:
        assert may_load.wait(20)
        return AddingPredictor(200)

    loading = asyncio.create_task(server.load(ref(2), load_slowly))
    for _ in range(5):
        assert (await client.predict([0, 0, 0]))["model_version"] == 1
    may_load.set()
    await loading
    assert (await client.predict([0, 0, 0]))["outputs"] == [200.0]


async def test_a_queued_request_keeps_its_model(server: InferenceServer) -> None:
    old = SlowAdder(1)
    await server.load(ref(1), lambda: old)
    async with open_client(server) as client:
        queued = await queue_behind(old, server, *(client.predict([0, 0, 0]) for _ in range(3)))
        await server.load(ref(2), lambda: AddingPredictor(2))
        later = asyncio.create_task(client.predict([0, 0, 0]))
        await eventually(lambda: server.engine.queue_length == 3)
        old.may_continue.set()
        assert [answer["model_version"] for answer in await asyncio.gather(*queued)] == [1, 1, 1]
        assert (await later)["outputs"] == [2.0]


async def test_after_the_commit_the_old_model_answers_its_requests(server: InferenceServer) -> None:
    old, events = SlowAdder(1), list[Message]()
    await server.load(ref(1), lambda: old)
    evaluation = OfflineEvaluation(ServingTable(), CaptureTable())
    swap = ModelSwap(
        server.engine, evaluation, ServingTable(), events.append, task="t", client=client_id("c1")
    )
    async with open_client(server) as client:
        queued = await queue_behind(old, server, *(client.predict([0, 0, 0]) for _ in range(3)))
        updating = asyncio.create_task(swap.replace(ref(2), lambda: AddingPredictor(2)))
        await eventually(lambda: server.current_model == ref(2))
        assert not [event for event in events if isinstance(event, ModelCommitted)]  # it drains
        old.may_continue.set()
        assert [answer["outputs"] for answer in await asyncio.gather(*queued)] == [[1.0]] * 3
        await updating
    (committed,) = [event for event in events if isinstance(event, ModelCommitted)]
    assert (committed.replaced, committed.drained) == (1, 3)
    assert committed.drain_s > 0


async def test_a_model_without_a_probe_is_warmed_up_with_zeros(
    server: InferenceServer,
) -> None:
    model = AddingPredictor(1, input_shape=(-1, 3))
    await server.load(ref(1), lambda: model)
    assert model.batches == [1, 1]  # twice: the first can include lazy initialization
    assert server.engine.serving is not None
    assert server.engine.serving.example_output is not None


async def test_a_model_that_fails_on_zeros_is_served(server: InferenceServer) -> None:
    await server.load(ref(1), lambda: NanPredictor(1))
    assert server.current_model == ref(1)


def load_rejected() -> AddingPredictor:
    raise ModelRefused("tensor 'fc1.weight' is missing")


def load_failing() -> AddingPredictor:
    raise RuntimeError("out\nof memory")


def load_nan_predictor() -> AddingPredictor:
    return NanPredictor(1)


def load_failing_on_thirteen() -> AddingPredictor:
    model = FailsOnThirteen(1)
    model.may_continue.set()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (load_rejected, "^tensor 'fc1.weight' is missing$"),
        (load_failing, "^cannot load the model: out of memory$"),
        (load_nan_predictor, "NaN or infinity"),
        (load_failing_on_thirteen, "failed on 13"),
    ],
)
async def test_a_bad_model_is_refused_and_the_current_one_stays(
    client: PlainJsonClient, server: InferenceServer, make: Callable[[], AddingPredictor], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        await server.load(ref(2), make, np.full((1, 3), 13, np.float32))
    assert server.current_model == ref(1)
    assert (await client.predict([0, 0, 0]))["outputs"] == [100.0]


async def test_after_a_bad_first_model_the_server_has_no_model(server: InferenceServer) -> None:
    with pytest.raises(ModelRefused):
        await server.load(ref(1), load_failing)
    assert server.current_model is None


# --- captured data and feedback ---------------------------------------------------------------------


async def test_predictions_are_captured_with_their_labels(
    client: PlainJsonClient, captured: CapturedData
) -> None:
    await client.predict([1, 2, 3], [4, 5, 6], labels=[7, None])
    assert await captured.counts() == CaptureStats(rows=2, labelled=1, dropped=0)
    inputs, labels = read_labelled_rows(captured.path)
    assert (inputs.tolist(), labels.tolist()) == ([[1.0, 2.0, 3.0]], [7])


async def test_feedback_labels_a_prediction(client: PlainJsonClient, captured: CapturedData) -> None:
    first, second = (await client.predict([1, 2, 3], [4, 5, 6]))["ids"]
    assert (await client.post(f"/feedback/{first}", {"label": 3}))[0] == 204
    assert (await client.post(f"/feedback/{first}", {"label": 3}))[0] == 204
    status, answer = await client.post(f"/feedback/{first}", {"label": 4})
    assert (status, answer["error"]) == (
        409,
        f"captured prediction {first} is already labelled 3; the first label is kept; DELETE the label to send another",
    )
    assert (await client.post(f"/feedback/{second}", {"label": [0.5, 0.5]}))[0] == 204
    assert (await captured.counts()).labelled == 2


async def test_a_withdrawn_label_can_be_replaced(client: PlainJsonClient, captured: CapturedData) -> None:
    (row,) = (await client.predict([1, 2, 3]))["ids"]
    await client.post(f"/feedback/{row}", {"label": 3})
    for _ in range(2):  # DELETE is idempotent
        async with client.session.delete(f"{client.url}/feedback/{row}") as response:
            assert response.status == 204
        assert await captured.counts() == CaptureStats(rows=1, labelled=0, dropped=0)
    assert (await client.post(f"/feedback/{row}", {"label": 4}))[0] == 204
    _, labels = read_labelled_rows(captured.path)
    assert labels.tolist() == [4]


@pytest.mark.parametrize("row", ["99", "abc"])
async def test_the_label_of_an_unknown_prediction_cannot_be_withdrawn(
    client: PlainJsonClient, row: str
) -> None:
    async with client.session.delete(f"{client.url}/feedback/{row}") as response:
        assert response.status == 404
        assert list(await response.json()) == ["error"]


async def test_the_error_for_an_invalid_id_describes_an_id(client: PlainJsonClient) -> None:
    status, answer = await client.post("/feedback/abc", {"label": 1})
    assert status == 404
    assert answer["error"] == (
        "'abc' is not a prediction id. Use one of the `ids` in the response to the prediction"
    )


# --- invalid labels -----------------------------------------------------------------------------------


@pytest.fixture(params=["classes of the task", "classes of the model"])
async def two_class_client(
    request: pytest.FixtureRequest, captured: CapturedData
) -> AsyncIterator[PlainJsonClient]:
    """A client of a server with two classes, which the task or the model declares."""
    in_task = request.param == "classes of the task"
    server = InferenceServer(captured, classes=2 if in_task else None)
    await server.load(ref(1), lambda: AddingPredictor(0, classes=3 if in_task else 2))
    async with open_client(server) as client:
        yield client


@pytest.mark.parametrize("label", [99, 2, -1, 0.5, [0.0, 1.0]])
async def test_a_label_outside_the_classes_is_rejected(
    two_class_client: PlainJsonClient, captured: CapturedData, label: Any
) -> None:
    reason = f"a label must be a class of the model, an integer from 0 to 1, not {label}"
    assert await two_class_client.predict_error({"inputs": [[0, 0, 0]], "labels": [label]}) == (400, reason)
    assert (await captured.counts()).rows == 0
    (row,) = (await two_class_client.predict([0, 0, 0]))["ids"]
    assert await two_class_client.post(f"/feedback/{row}", {"label": label}) == (400, {"error": reason})
    assert (await two_class_client.post(f"/feedback/{row}", {"label": 1.0}))[0] == 204
    assert await captured.counts() == CaptureStats(rows=1, labelled=1, dropped=0)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/feedback/99", {"label": 1}, 404),
        ("/feedback/-1", {"label": 1}, 404),
        ("/feedback/abc", {"label": 1}, 404),
        (f"/feedback/{10**16}", {"label": 1}, 404),
        ("/feedback/1", {}, 400),
        ("/feedback/1", {"label": "three"}, 400),
        ("/feedback/1", {"label": None}, 400),
        ("/feedback/1", {"label": [[1]]}, 400),
        ("/feedback/1", [1], 400),
    ],
)
async def test_invalid_feedback_is_rejected(
    client: PlainJsonClient, path: str, body: Any, status: int
) -> None:
    response_status, response = await client.post(path, body)
    assert (response_status, list(response)) == (status, ["error"])


async def test_without_capture_predictions_have_no_id(tmp_path: Path) -> None:
    server = InferenceServer()
    await server.load(ref(1), lambda: AddingPredictor(0))
    async with open_client(server) as client:
        assert (await client.predict([0, 0, 0]))["ids"] == [None]
        assert (await client.post("/feedback/1", {"label": 1}))[0] == 404


async def test_predictions_continue_without_the_store(
    client: PlainJsonClient, captured: CapturedData
) -> None:
    await captured.close()
    assert (await client.predict([0, 0, 0]))["ids"] == [None]
    assert (await client.post("/feedback/1", {"label": 1}))[0] == 503


# --- invalid requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([[1, 2, 3]], "the body must be a JSON object"),
        ({}, "with at least one sample"),
        ({"inputs": []}, "with at least one sample"),
        ({"inputs": "1,2,3"}, "with at least one sample"),
        ({"inputs": [[1, 2]]}, "a sample must have the shape [3], not [2]"),
        ({"inputs": [1, 2, 3]}, "a sample must have the shape [3], not []"),
        ({"inputs": [[[1, 2, 3]]]}, "a sample must have the shape [3], not [1, 3]"),
        ({"inputs": [[1, 2, 3], [1, 2]]}, "all samples must have the same shape"),
        ({"inputs": [["1", "2", "3"]]}, "inputs must be numbers, not text"),
        ({"inputs": [[1, 2, None]]}, "inputs must be numbers, not null or objects"),
        ({"inputs": [[True, False, True]]}, "inputs must be numbers, not true or false"),
        ({"inputs": [[1, 2, {}]]}, "inputs must be numbers, not null or objects"),
        ({"inputs": [[1, 2, 1e39]]}, "finite numbers in the range of float32"),
        ({"inputs": [[1, 2, 10**400]]}, "inputs must be numbers, each in the range of 64 bits"),
        ({"inputs": [[1, 2, 3]], "labels": 5}, "labels must be a list of 1, one for each sample"),
        ({"inputs": [[1, 2, 3]], "labels": [1, 2]}, "labels must be a list"),
        ({"inputs": [[1, 2, 3]], "labels": ["x"]}, "a label must be a finite number"),
        ({"inputs": [[1, 2, 3]], "labels": [2**70]}, "a label must be a finite number"),
        ({"inputs": [[1, 2, 3]], "labels": [True]}, "a label must be a finite number"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
async def test_an_invalid_request_is_answered_with_its_error(
    client: PlainJsonClient, captured: CapturedData, body: Any, reason: str
) -> None:
    status, error = await client.predict_error(body)
    assert status == 400
    assert reason in error
    assert (await captured.counts()).rows == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"inputs": [[NaN, 0, 0]]}', b'{"inputs": [[Infinity, 0, 0]]}', b"[" * 100_000],
    ids=["empty", "truncated", "not UTF-8", "NaN", "infinity", "deep"],
)
async def test_a_body_that_is_not_json_is_rejected(client: PlainJsonClient, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with client.session.post(client.url + "/predict", data=content, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"].startswith("the body is not valid JSON")
    assert (await client.predict([0, 0, 0]))["outputs"] == [100.0]


async def test_a_request_that_a_web_page_could_send_is_rejected(client: PlainJsonClient) -> None:
    async with client.session.post(client.url + "/predict", data=b'{"inputs": [[1, 2, 3]]}') as response:
        assert response.status == 415
        assert "Content-Type: application/json" in (await response.json())["error"]


async def test_a_body_over_the_limit_is_rejected(client: PlainJsonClient) -> None:
    status, error = await client.predict_error({"inputs": [[0.0] * 2_000_000]})
    assert status == 413
    assert error


async def test_too_many_samples_in_a_request_are_rejected(client: PlainJsonClient) -> None:
    status, error = await client.predict_error({"inputs": [[0, 0, 0]] * 1025})
    assert (status, error) == (413, "too many samples: 1025 (limit 1024)")
    assert len((await client.predict(*[[0.0, 0.0, 0.0]] * 1024))["outputs"]) == 1024


async def test_a_large_body_is_parsed_in_a_thread(client: PlainJsonClient, server: InferenceServer) -> None:
    await server.load(ref(2), lambda: AddingPredictor(0, input_shape=(700,)))
    assert len((await client.predict(*[[0.25] * 700] * 900))["outputs"]) == 900
    status, error = await client.predict_error({"inputs": [["x"] * 700] * 900})
    assert (status, error) == (400, "inputs must be numbers, not text")


async def test_a_request_is_rejected_when_the_queue_is_full() -> None:
    server, model = InferenceServer(max_queued=5), SlowAdder(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        queued = await queue_behind(model, server, *(client.predict([0, 0, 0]) for _ in range(6)))
        async with client.session.post(client.url + "/predict", json={"inputs": [[0, 0, 0]]}) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
        model.may_continue.set()
        assert [answer["outputs"] for answer in await asyncio.gather(*queued)] == [[0.0]] * 6


@pytest.fixture
async def large_server() -> InferenceServer:
    """A server with memory for eight bodies of the maximum size."""
    return InferenceServer(max_body_bytes=MAX_BODY)


def large_body(size_bytes: int = MAX_BODY) -> bytes:
    body = json.dumps({"inputs": [[0.0, 0.0, 0.0]]}).encode()
    return body + b" " * (size_bytes - len(body))


async def chunks(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def is_rejected_for_memory(client: PlainJsonClient, **request: Any) -> bool:
    headers = {"Content-Type": "application/json"} | request.pop("headers", {})
    async with client.session.post(client.url + "/predict", headers=headers, **request) as response:
        if response.status == 200:
            return False
        assert (response.status, int(response.headers["Retry-After"])) == (429, 1)
        assert await response.json() == {"error": "too many large requests at the same time. Retry later"}
        return True


async def test_bodies_over_the_memory_limit_are_not_read(
    large_server: InferenceServer,
) -> None:
    """Eight bodies wait for a slow model, and half a body is free; a body of unknown size counts as the maximum."""
    model = SlowAdder(0)
    await large_server.load(ref(1), lambda: model)
    async with open_client(large_server) as client:
        sizes = [MAX_BODY] * (MAX_CONCURRENT_BODIES - 1) + [MAX_BODY // 2]
        queued = await queue_behind(
            model, large_server, *(is_rejected_for_memory(client, data=large_body(size)) for size in sizes)
        )
        assert large_server.memory_limit.reserved_bytes == sum(sizes)
        small = gzip.compress(large_body(200))
        assert await is_rejected_for_memory(client, data=large_body())
        assert await is_rejected_for_memory(client, data=chunks(large_body(200)))
        assert await is_rejected_for_memory(client, data=small, headers={"Content-Encoding": "gzip"})
        fits = asyncio.create_task(is_rejected_for_memory(client, data=large_body(200)))
        await eventually(lambda: large_server.engine.queue_length == len(sizes))
        model.may_continue.set()
        assert not any(await asyncio.gather(fits, *queued))
        assert not await is_rejected_for_memory(client, data=large_body())
        assert not await is_rejected_for_memory(client, data=small, headers={"Content-Encoding": "gzip"})
    assert large_server.memory_limit.reserved_bytes == 0


async def test_a_read_timeout_releases_the_memory_of_the_body(
    large_server: InferenceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "READ_TIMEOUT_S", 0.05)
    await large_server.load(ref(1), lambda: AddingPredictor(0))

    async def forever() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with open_client(large_server) as client:
        headers = {"Content-Type": "application/json"}
        async with client.session.post(client.url + "/predict", headers=headers, data=forever()) as response:
            assert response.status == 408
            assert await response.json() == {"error": "timeout while reading the body (limit 0.05 s)"}
        assert large_server.memory_limit.reserved_bytes == 0


async def test_an_unknown_path_or_method_is_answered_with_json(client: PlainJsonClient) -> None:
    assert await client.get("/nowhere") == (404, {"error": "Not Found"})
    assert await client.get("/predict") == (405, {"error": "Method Not Allowed"})


# --- start and stop -----------------------------------------------------------------------------------------


async def test_a_port_in_use_is_reported(client: PlainJsonClient) -> None:
    port = int(client.url.rpartition(":")[2])
    with pytest.raises(InferenceBindError, match=f"127.0.0.1:{port}: .*Choose another port"):
        await InferenceServer().start("127.0.0.1", port)


async def test_stop_answers_the_accepted_requests(server: InferenceServer) -> None:
    model = SlowAdder(7)
    await server.load(ref(1), lambda: model)
    url = await server.start()
    async with aiohttp.ClientSession() as session:
        client = PlainJsonClient(session, url)
        (queued,) = await queue_behind(model, server, client.predict([0, 0, 0]))
        stopping = asyncio.create_task(server.stop())
        model.may_continue.set()
        assert (await queued)["outputs"] == [7.0]
        await stopping
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get("/live")


async def test_a_slow_model_does_not_block_the_event_loop(server: InferenceServer) -> None:
    model = SlowAdder(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        (queued,) = await queue_behind(model, server, client.predict([0, 0, 0]))
        assert (await client.get("/live"))[0] == 200
        assert not queued.done()
        model.may_continue.set()
        await queued
