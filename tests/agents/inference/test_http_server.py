"""Predictions over HTTP, asked as a user asks: a real server, real sockets, and models that change meanwhile."""

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
from fedbus.stores.captured.store import CapturedData, CaptureStats

T = TypeVar("T")
PROBE = np.zeros((2, 3), np.float32)
MAX_BODY = 10_000
FLOAT: np.dtype[Any] = np.dtype(np.float32)


def ref(version: int) -> ModelRef:
    return ModelRef(version=version, sha256=f"{version:064x}", size_bytes=1, architecture="0" * 64)


@dataclass
class AddingPredictor:
    """A model that adds its number to the sum of each sample: the answer shows which model gave it."""

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
    """Takes its time: until it is told to go on. Nobody knows what it takes, so it is not warmed up."""

    input_shape: tuple[int, ...] | None = None
    busy: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        self.busy.set()
        assert self.go_on.wait(20)
        return super().predict(inputs)


class NanPredictor(AddingPredictor):
    """Answers, but not with numbers."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return np.full(len(inputs), np.nan)


class FailsOnThirteen(SlowAdder):
    """Cannot bear a 13."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        answers = super().predict(inputs)
        if (inputs == 13).any():
            raise RuntimeError("thirteen\nis unlucky")
        return answers


@dataclass
class PlainJsonClient:
    """Somebody who asks."""

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
        status, answer = await self.post("/predict", {"inputs": inputs, **more})
        assert status == 200, answer
        return dict(answer)

    async def refusal(self, body: Any) -> tuple[int, str]:
        status, answer = await self.post("/predict", body)
        assert set(answer) == {"error"}
        assert "\n" not in answer["error"]
        return status, answer["error"]


async def queue_behind(
    model: SlowAdder, server: InferenceServer, first: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, T]
) -> "list[asyncio.Task[T]]":
    """*model* is at work on *first*, and *others* wait in the queue."""
    tasks = [asyncio.create_task(first)]
    await eventually(model.busy.is_set)
    before = server.engine.queued
    tasks += [asyncio.create_task(other) for other in others]
    await eventually(lambda: server.engine.queued == before + len(others))
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
    """Somebody who asks a server with the first model."""
    await server.load(ref(1), lambda: AddingPredictor(100))
    async with open_client(server) as client:
        yield client


# --- answers ---------------------------------------------------------------------------------


async def test_a_prediction_says_which_model_made_it(client: PlainJsonClient) -> None:
    answer = await client.predict([1, 2, 3], [0, 0, 0.5])
    assert answer["outputs"] == [106.0, 100.5]
    assert answer["model_version"] == 1
    assert len(answer["ids"]) == 2


async def test_before_the_first_model_one_is_told_when_to_come_again(server: InferenceServer) -> None:
    async with open_client(server) as client:
        for ask in (
            client.session.get(client.url + "/ready"),
            client.session.post(client.url + "/predict", json={}),
        ):
            async with ask as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
        assert await client.get("/live") == (200, {"live": True})
        assert await client.get("/model") == (200, {"model": None})
        await server.load(ref(1), lambda: AddingPredictor(1))
        assert await client.get("/ready") == (200, {"ready": True, "model_version": 1})
        assert (await client.get("/model"))[1]["model"]["sha256"] == ref(1).sha256


async def test_requests_that_wait_go_through_the_model_together(server: InferenceServer) -> None:
    model = SlowAdder(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        asked = await queue_behind(model, server, *(client.predict([n, 0, 0]) for n in range(20)))
        model.go_on.set()
        answers = await asyncio.gather(*asked)
    assert [answer["outputs"] for answer in answers] == [[float(n)] for n in range(20)]
    assert model.batches == [1, 19]


async def test_what_one_asks_wrongly_does_not_fail_the_others(server: InferenceServer) -> None:
    model = FailsOnThirteen(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        requests = (client.post("/predict", {"inputs": [[n, 0, 0]]}) for n in (1, 2, 13, 4))
        asked = await queue_behind(model, server, *requests)
        model.go_on.set()
        answers = await asyncio.gather(*asked)
    assert [status for status, _ in answers] == [200, 200, 500, 200]
    assert answers[2][1] == {"error": "the model could not answer: thirteen is unlucky"}


# --- models that change --------------------------------------------------------------------------


async def test_no_request_fails_while_models_change(server: InferenceServer, captured: CapturedData) -> None:
    await server.load(ref(1), lambda: AddingPredictor(1))
    over = asyncio.Event()
    versions: list[int] = []

    async def keep_asking(client: PlainJsonClient) -> None:
        while not over.is_set():
            answer = await client.predict([0, 0, 0])
            assert answer["outputs"] == [float(answer["model_version"])]
            versions.append(answer["model_version"])

    async with open_client(server) as client, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(keep_asking(client))
        for version in range(1, 42):
            await server.load(ref(version), partial(AddingPredictor, version), PROBE)
            await eventually(partial(versions.__contains__, version))
        over.set()
    assert set(versions) == set(range(1, 42))
    assert (await captured.counts()).rows == len(versions)


async def test_a_new_model_is_loaded_while_the_old_one_answers(
    client: PlainJsonClient, server: InferenceServer
) -> None:
    built = threading.Event()

    def slowly_built() -> AddingPredictor:
        assert built.wait(20)
        return AddingPredictor(200)

    loading = asyncio.create_task(server.load(ref(2), slowly_built))
    for _ in range(5):
        assert (await client.predict([0, 0, 0]))["model_version"] == 1
    built.set()
    await loading
    assert (await client.predict([0, 0, 0]))["outputs"] == [200.0]


async def test_a_request_is_answered_by_the_model_it_came_in_under(server: InferenceServer) -> None:
    old = SlowAdder(1)
    await server.load(ref(1), lambda: old)
    async with open_client(server) as client:
        asked = await queue_behind(old, server, *(client.predict([0, 0, 0]) for _ in range(3)))
        await server.load(ref(2), lambda: AddingPredictor(2))
        later = asyncio.create_task(client.predict([0, 0, 0]))
        await eventually(lambda: server.engine.queued == 3)
        old.go_on.set()
        assert [answer["model_version"] for answer in await asyncio.gather(*asked)] == [1, 1, 1]
        assert (await later)["outputs"] == [2.0]


async def test_after_the_swap_the_old_model_answers_what_came_in_under_it(server: InferenceServer) -> None:
    old, said = SlowAdder(1), list[Message]()
    await server.load(ref(1), lambda: old)
    trials = OfflineEvaluation(ServingTable(), CaptureTable())
    phases = ModelSwap(server.engine, trials, ServingTable(), said.append, task="t", client=client_id("c1"))
    async with open_client(server) as client:
        asked = await queue_behind(old, server, *(client.predict([0, 0, 0]) for _ in range(3)))
        updating = asyncio.create_task(phases.update(ref(2), lambda: AddingPredictor(2)))
        await eventually(lambda: server.current == ref(2))
        assert not [one for one in said if isinstance(one, ModelCommitted)]  # it drains
        old.go_on.set()
        assert [answer["outputs"] for answer in await asyncio.gather(*asked)] == [[1.0]] * 3
        await updating
    (committed,) = [one for one in said if isinstance(one, ModelCommitted)]
    assert (committed.replaced, committed.drained) == (1, 3)
    assert committed.drain_s > 0


async def test_a_model_without_samples_to_be_tried_on_is_warm_before_it_serves(
    server: InferenceServer,
) -> None:
    model = AddingPredictor(1, input_shape=(-1, 3))
    await server.load(ref(1), lambda: model)
    assert model.batches == [1, 1]  # the first time it may still have things to set up
    assert server.engine.serving is not None
    assert server.engine.serving.gives is not None


async def test_a_model_to_which_nought_is_no_sample_serves_all_the_same(server: InferenceServer) -> None:
    await server.load(ref(1), lambda: NanPredictor(1))
    assert server.current == ref(1)


def load_rejected() -> AddingPredictor:
    raise ModelRefused("tensor 'fc1.weight' is missing")


def load_failing() -> AddingPredictor:
    raise RuntimeError("out\nof memory")


def load_nan_predictor() -> AddingPredictor:
    return NanPredictor(1)


def load_failing_on_thirteen() -> AddingPredictor:
    model = FailsOnThirteen(1)
    model.go_on.set()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (load_rejected, "^tensor 'fc1.weight' is missing$"),
        (load_failing, "^the model cannot be loaded: out of memory$"),
        (load_nan_predictor, "NaN or infinity"),
        (load_failing_on_thirteen, "thirteen is unlucky"),
    ],
)
async def test_a_bad_model_is_refused_and_the_old_one_stays(
    client: PlainJsonClient, server: InferenceServer, make: Callable[[], AddingPredictor], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        await server.load(ref(2), make, np.full((1, 3), 13, np.float32))
    assert server.current == ref(1)
    assert (await client.predict([0, 0, 0]))["outputs"] == [100.0]


async def test_a_bad_first_model_leaves_the_server_without_one(server: InferenceServer) -> None:
    with pytest.raises(ModelRefused):
        await server.load(ref(1), load_failing)
    assert server.current is None


# --- what was asked is kept -------------------------------------------------------------------------


async def test_what_was_asked_is_captured_with_its_answer(
    client: PlainJsonClient, captured: CapturedData, tmp_path: Path
) -> None:
    await client.predict([1, 2, 3], [4, 5, 6], labels=[7, None])
    assert await captured.counts() == CaptureStats(rows=2, labelled=1, dropped=0)
    assert await captured.snapshot_labelled(tmp_path / "data.npz") == 1
    with np.load(tmp_path / "data.npz") as data:
        assert data["inputs"].tolist() == [[1.0, 2.0, 3.0]]


async def test_feedback_labels_what_was_predicted(client: PlainJsonClient, captured: CapturedData) -> None:
    first, second = (await client.predict([1, 2, 3], [4, 5, 6]))["ids"]
    assert (await client.post(f"/feedback/{first}", {"label": 3}))[0] == 204
    assert (await client.post(f"/feedback/{first}", {"label": 3}))[0] == 204
    status, answer = await client.post(f"/feedback/{first}", {"label": 4})
    assert (status, answer["error"]) == (
        409,
        f"captured prediction {first} is already labelled 3; the first label is kept; DELETE it to give another",
    )
    assert (await client.post(f"/feedback/{second}", {"label": [0.5, 0.5]}))[0] == 204
    assert (await captured.counts()).labelled == 2


async def test_feedback_that_was_withdrawn_may_be_given_otherwise(
    client: PlainJsonClient, captured: CapturedData, tmp_path: Path
) -> None:
    (row,) = (await client.predict([1, 2, 3]))["ids"]
    await client.post(f"/feedback/{row}", {"label": 3})
    for _ in range(2):  # the same twice is fine, as with feedback itself
        async with client.session.delete(f"{client.url}/feedback/{row}") as response:
            assert response.status == 204
        assert await captured.counts() == CaptureStats(rows=1, labelled=0, dropped=0)
    assert (await client.post(f"/feedback/{row}", {"label": 4}))[0] == 204
    await captured.snapshot_labelled(tmp_path / "data.npz")
    with np.load(tmp_path / "data.npz") as data:
        assert data["labels"].tolist() == [4]


@pytest.mark.parametrize("row", ["99", "abc"])
async def test_feedback_that_is_unknown_cannot_be_withdrawn(client: PlainJsonClient, row: str) -> None:
    async with client.session.delete(f"{client.url}/feedback/{row}") as response:
        assert response.status == 404
        assert list(await response.json()) == ["error"]


async def test_an_id_that_is_none_is_told_what_an_id_is(client: PlainJsonClient) -> None:
    status, answer = await client.post("/feedback/abc", {"label": 1})
    assert status == 404
    assert answer["error"] == (
        "'abc' is no id of a prediction: give one of the `ids` that came with the answer"
    )


# --- labels that cannot be ----------------------------------------------------------------------------


@pytest.fixture(params=["the task says so", "the model has as many outputs"])
async def two_class_client(
    request: pytest.FixtureRequest, captured: CapturedData
) -> AsyncIterator[PlainJsonClient]:
    """Somebody who asks where there are two classes."""
    said = request.param == "the task says so"
    server = InferenceServer(captured, classes=2 if said else None)
    await server.load(ref(1), lambda: AddingPredictor(0, classes=3 if said else 2))
    async with open_client(server) as client:
        yield client


@pytest.mark.parametrize("label", [99, 2, -1, 0.5, [0.0, 1.0]])
async def test_a_label_that_is_no_class_is_refused_with_a_prediction_and_later(
    two_class_client: PlainJsonClient, captured: CapturedData, label: Any
) -> None:
    reason = f"a label must be a class of the model, a whole number from 0 to 1, and not {label}"
    assert await two_class_client.refusal({"inputs": [[0, 0, 0]], "labels": [label]}) == (400, reason)
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
async def test_feedback_that_makes_no_sense_is_refused(
    client: PlainJsonClient, path: str, body: Any, status: int
) -> None:
    answered, answer = await client.post(path, body)
    assert (answered, list(answer)) == (status, ["error"])


async def test_without_capture_nothing_has_an_id(tmp_path: Path) -> None:
    server = InferenceServer()
    await server.load(ref(1), lambda: AddingPredictor(0))
    async with open_client(server) as client:
        assert (await client.predict([0, 0, 0]))["ids"] == [None]
        assert (await client.post("/feedback/1", {"label": 1}))[0] == 404


async def test_predictions_go_on_when_the_store_is_gone(
    client: PlainJsonClient, captured: CapturedData
) -> None:
    await captured.close()
    assert (await client.predict([0, 0, 0]))["ids"] == [None]
    assert (await client.post("/feedback/1", {"label": 1}))[0] == 503


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([[1, 2, 3]], "the body must be a JSON object"),
        ({}, "give at least one sample"),
        ({"inputs": []}, "give at least one sample"),
        ({"inputs": "1,2,3"}, "give at least one sample"),
        ({"inputs": [[1, 2]]}, "a sample must have the shape [3], and not [2]"),
        ({"inputs": [1, 2, 3]}, "a sample must have the shape [3], and not []"),
        ({"inputs": [[[1, 2, 3]]]}, "a sample must have the shape [3], and not [1, 3]"),
        ({"inputs": [[1, 2, 3], [1, 2]]}, "all samples of one shape"),
        ({"inputs": [["1", "2", "3"]]}, "inputs must be numbers, and not text"),
        ({"inputs": [[1, 2, None]]}, "inputs must be numbers, and neither null nor objects"),
        ({"inputs": [[True, False, True]]}, "inputs must be numbers, and not true or false"),
        ({"inputs": [[1, 2, {}]]}, "inputs must be numbers, and neither null nor objects"),
        ({"inputs": [[1, 2, 1e39]]}, "finite numbers that fit into 32 bits"),
        ({"inputs": [[1, 2, 10**400]]}, "inputs must be numbers, and numbers that fit into 64 bits"),
        ({"inputs": [[1, 2, 3]], "labels": 5}, "labels must be a list with one for each of the 1 samples"),
        ({"inputs": [[1, 2, 3]], "labels": [1, 2]}, "labels must be a list"),
        ({"inputs": [[1, 2, 3]], "labels": ["x"]}, "a label must be a finite number"),
        ({"inputs": [[1, 2, 3]], "labels": [2**70]}, "a label must be a finite number"),
        ({"inputs": [[1, 2, 3]], "labels": [True]}, "a label must be a finite number"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
async def test_a_request_that_makes_no_sense_is_refused_with_the_reason(
    client: PlainJsonClient, captured: CapturedData, body: Any, reason: str
) -> None:
    status, error = await client.refusal(body)
    assert status == 400
    assert reason in error
    assert (await captured.counts()).rows == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"inputs": [[NaN, 0, 0]]}', b'{"inputs": [[Infinity, 0, 0]]}', b"[" * 100_000],
    ids=["empty", "cut off", "not text", "NaN", "infinity", "deep"],
)
async def test_a_body_that_is_not_json_is_refused(client: PlainJsonClient, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with client.session.post(client.url + "/predict", data=content, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"].startswith("the body is not JSON")
    assert (await client.predict([0, 0, 0]))["outputs"] == [100.0]


async def test_what_a_page_in_a_browser_could_send_is_refused(client: PlainJsonClient) -> None:
    async with client.session.post(client.url + "/predict", data=b'{"inputs": [[1, 2, 3]]}') as response:
        assert response.status == 415
        assert "Content-Type: application/json" in (await response.json())["error"]


async def test_a_body_that_is_too_large_is_refused(client: PlainJsonClient) -> None:
    status, error = await client.refusal({"inputs": [[0.0] * 2_000_000]})
    assert status == 413
    assert error


async def test_too_many_samples_at_once_are_refused(client: PlainJsonClient) -> None:
    status, error = await client.refusal({"inputs": [[0, 0, 0]] * 1025})
    assert (status, error) == (413, "1025 samples are too many: send at most 1024 at once")
    assert len((await client.predict(*[[0.0, 0.0, 0.0]] * 1024))["outputs"]) == 1024


async def test_a_large_body_is_checked_beside_the_loop(
    client: PlainJsonClient, server: InferenceServer
) -> None:
    await server.load(ref(2), lambda: AddingPredictor(0, input_shape=(700,)))
    assert len((await client.predict(*[[0.25] * 700] * 900))["outputs"]) == 900
    status, error = await client.refusal({"inputs": [["x"] * 700] * 900})
    assert (status, error) == (400, "inputs must be numbers, and not text")


async def test_who_finds_the_queue_full_is_told_to_come_again() -> None:
    server, model = InferenceServer(max_queued=5), SlowAdder(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        asked = await queue_behind(model, server, *(client.predict([0, 0, 0]) for _ in range(6)))
        async with client.session.post(client.url + "/predict", json={"inputs": [[0, 0, 0]]}) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
        model.go_on.set()
        assert [answer["outputs"] for answer in await asyncio.gather(*asked)] == [[0.0]] * 6


@pytest.fixture
async def large_server() -> InferenceServer:
    """One that has room for eight bodies of the greatest size, and a model of large samples."""
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
        assert await response.json() == {"error": "too many large requests are in hand already"}
        return True


async def test_bodies_that_would_take_too_much_memory_at_once_are_not_read(
    large_server: InferenceServer,
) -> None:
    """Eight wait for a slow model, with room for half a body left; what does not say its size counts as a whole one."""
    model = SlowAdder(0)
    await large_server.load(ref(1), lambda: model)
    async with open_client(large_server) as client:
        sizes = [MAX_BODY] * (MAX_CONCURRENT_BODIES - 1) + [MAX_BODY // 2]
        asked = await queue_behind(
            model, large_server, *(is_rejected_for_memory(client, data=large_body(size)) for size in sizes)
        )
        assert large_server.memory_limit.bytes == sum(sizes)
        small = gzip.compress(large_body(200))
        assert await is_rejected_for_memory(client, data=large_body())
        assert await is_rejected_for_memory(client, data=chunks(large_body(200)))
        assert await is_rejected_for_memory(client, data=small, headers={"Content-Encoding": "gzip"})
        fits = asyncio.create_task(is_rejected_for_memory(client, data=large_body(200)))
        await eventually(lambda: large_server.engine.queued == len(sizes))
        model.go_on.set()
        assert not any(await asyncio.gather(fits, *asked))
        assert not await is_rejected_for_memory(client, data=large_body())
        assert not await is_rejected_for_memory(client, data=small, headers={"Content-Encoding": "gzip"})
    assert large_server.memory_limit.bytes == 0


async def test_a_body_that_does_not_come_gives_its_room_back(
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
            assert await response.json() == {"error": "the body did not come within 0.05 s"}
        assert large_server.memory_limit.bytes == 0


async def test_a_path_that_is_not_there_is_refused_in_one_line(client: PlainJsonClient) -> None:
    assert await client.get("/nowhere") == (404, {"error": "Not Found"})
    assert await client.get("/predict") == (405, {"error": "Method Not Allowed"})


# --- beginning and end --------------------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_said_to_be(client: PlainJsonClient) -> None:
    port = int(client.url.rpartition(":")[2])
    with pytest.raises(InferenceBindError, match=f"127.0.0.1:{port}: .*choose another port"):
        await InferenceServer().start("127.0.0.1", port)


async def test_stopping_answers_what_was_accepted(server: InferenceServer) -> None:
    model = SlowAdder(7)
    await server.load(ref(1), lambda: model)
    url = await server.start()
    async with aiohttp.ClientSession() as session:
        client = PlainJsonClient(session, url)
        (asked,) = await queue_behind(model, server, client.predict([0, 0, 0]))
        stopping = asyncio.create_task(server.stop())
        model.go_on.set()
        assert (await asked)["outputs"] == [7.0]
        await stopping
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get("/live")


async def test_a_slow_model_does_not_hold_up_the_loop(server: InferenceServer) -> None:
    model = SlowAdder(0)
    await server.load(ref(1), lambda: model)
    async with open_client(server) as client:
        (asked,) = await queue_behind(model, server, client.predict([0, 0, 0]))
        assert (await client.get("/live"))[0] == 200
        assert not asked.done()
        model.go_on.set()
        await asked
