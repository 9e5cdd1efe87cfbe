"""Predictions over HTTP, without a gap while models change.

    POST /predict         {"inputs": [[…], …], "labels": [… or null, …]?}
                          → {"ids": [… or null], "outputs": […], "model_version": 3}
    POST /feedback/{id}   {"label": …} → 204; unknown: 404; another answer than before: 409
    GET  /live            200 as long as the process answers
    GET  /ready           200, or 503 with Retry-After before the first model
    GET  /model           {"model": {"version": 3, "sha256": …} or null}

    request → checked → queue → one thread, one model: as many as wait, at once → captured → answer

A new model is loaded and tried in a thread of its own while the old one answers; then they change
places in one assignment. A request stays with the model it came in under. The queue is bounded:
who finds it full is told to come again (503), before anybody's memory is. Whatever is wrong
with a request is said in one line: ``{"error": …}``.

``ids`` are for feedback; null where a prediction was not captured. Only requests with
``Content-Type: application/json`` are taken, which a page in somebody's browser cannot send: what
is predicted here becomes training data.
"""

import asyncio
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

import numpy as np
import structlog
from aiohttp import web

from fedbus.contracts.model import ModelRef
from fedbus.learning.predictor import ModelRefused, Predictor
from fedbus.stores.captured import CapturedData, Label, LabelContradicted, UnknownRow
from fedbus.stores.errors import StoreError

MAX_BODY_BYTES: Final = 4 * 1024**2
MAX_INPUTS: Final = 1024
"""Samples in one request."""
MAX_QUEUED: Final = 256
"""Requests that may wait for the model."""
MAX_BATCH: Final = 1024
"""Samples that go through the model at once."""
STOP_S: Final = 5.0
RETRY_AFTER_S: Final = 1

_ON_THE_LOOP_BYTES: Final = 64 * 1024
_MAX_LABEL: Final = 2**53

log = structlog.get_logger("fedbus.inference_server")
Array: TypeAlias = np.ndarray[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")


class CannotListen(Exception):
    """The port is taken, or the address is not this machine's."""


@dataclass(frozen=True)
class _Serving:
    """One model at work."""

    ref: ModelRef
    predictor: Predictor


@dataclass(frozen=True)
class _Question:
    """What one request asks, of the model it came in under."""

    inputs: Array
    serving: _Serving
    answer: "asyncio.Future[Array]" = field(default_factory=asyncio.Future)

    @property
    def kind(self) -> tuple[int, tuple[int, ...]]:
        """Questions of one kind can go through the model together."""
        return id(self.serving), self.inputs.shape[1:]


class InferenceServer:
    """Answers for one task. What it was asked goes into *capture*, where there is one."""

    def __init__(
        self,
        capture: CapturedData | None = None,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_inputs: int = MAX_INPUTS,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self._capture = capture
        self._max_body_bytes = max_body_bytes
        self._max_inputs = max_inputs
        self._max_queued = max_queued
        self._serving: _Serving | None = None
        self._queue: deque[_Question] = deque()
        self._answering: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._load_thread = ThreadPoolExecutor(1, thread_name_prefix="load model")
        self._runner: web.AppRunner | None = None

    @property
    def current(self) -> ModelRef | None:
        """The version that answers now."""
        return self._serving.ref if self._serving else None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Begin to listen, on a free port where *port* is 0; the URL. Raises CannotListen."""
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=STOP_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise CannotListen(
                f"cannot serve predictions on {host}:{port}: {error.strerror}; choose another port, or 0 for any"
            ) from error
        actual = self._runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{actual}"

    async def stop(self) -> None:
        """Answer what was accepted, then listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._answering is not None:
            await self._answering
        await asyncio.to_thread(self._model_thread.shutdown)
        await asyncio.to_thread(self._load_thread.shutdown)

    async def load(self, ref: ModelRef, make: Callable[[], Predictor], probe: Array | None = None) -> None:
        """Make and try a model beside the one that serves, then let it serve instead.

        *make* is called in a thread. Raises ModelRefused, and the old model stays.
        """
        async with self._changing:
            loop = asyncio.get_running_loop()
            predictor = await loop.run_in_executor(self._load_thread, _tried, make, probe)
            self._serving = _Serving(ref, predictor)

    # --- HTTP ------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=self._max_body_bytes, middlewares=[_in_one_line])
        application.add_routes(
            [
                web.post("/predict", self._predict),
                web.post(r"/feedback/{id:\d{1,16}}", self._feedback),
                web.get("/live", self._live),
                web.get("/ready", self._ready),
                web.get("/model", self._model),
            ]
        )
        return application

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, _: web.Request) -> web.Response:
        return web.json_response({"ready": True, "model_version": self._serving_now().ref.version})

    async def _model(self, _: web.Request) -> web.Response:
        return web.json_response({"model": self.current.model_dump(mode="json") if self.current else None})

    async def _predict(self, request: web.Request) -> web.Response:
        content, serving = await _content(request), self._serving_now()
        shape, version = serving.predictor.input_shape, serving.ref.version
        inputs, labels = await _beside(len(content), _samples, content, shape, self._max_inputs)
        outputs = await self._ask(_Question(inputs, serving))
        ids = await _beside(inputs.nbytes, self._captured, inputs, outputs, labels, version)
        return web.json_response({"ids": ids, "outputs": outputs.tolist(), "model_version": version})

    async def _feedback(self, request: web.Request) -> web.Response:
        body, row = _object(await _content(request)), int(request.match_info["id"])
        if "label" not in body:
            raise _bad('say what is true: {"label": …}')
        label = _label(body["label"])
        try:
            await self._say(row, label)
        except UnknownRow as error:
            raise _refusal(web.HTTPNotFound, str(error)) from error
        except LabelContradicted as error:
            raise _refusal(web.HTTPConflict, str(error)) from error
        except StoreError as error:
            raise _come_again(str(error)) from error
        return web.Response(status=204)

    async def _say(self, row: int, label: Label) -> None:
        if self._capture is None:
            raise UnknownRow(row)
        await self._capture.label(row, label)

    def _serving_now(self) -> _Serving:
        if self._serving is None:
            raise _come_again("there is no model yet: ask again when /ready says so")
        return self._serving

    def _captured(
        self, inputs: Array, outputs: Array, labels: list[Label | None], version: int
    ) -> list[int | None]:
        if self._capture is None:
            return [None] * len(inputs)
        add = self._capture.add
        return [
            add(sample, output, label, model_version=version)
            for sample, output, label in zip(inputs, outputs, labels, strict=True)
        ]

    # --- the queue, and the one thread behind it -----------------------------------------------

    async def _ask(self, question: _Question) -> Array:
        if len(self._queue) >= self._max_queued:
            raise _come_again("too many requests wait already")
        self._queue.append(question)
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_all(), name="predictions")
        try:
            return await question.answer
        except _NoAnswer as error:
            raise _refusal(web.HTTPInternalServerError, str(error)) from error

    async def _answer_all(self) -> None:
        """Whatever waits goes through the model together; nobody waits for company."""
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = list(self._next_batch())
            answers = await loop.run_in_executor(self._model_thread, _answers, batch)
            for question, answer in zip(batch, answers, strict=True):
                _tell(question.answer, answer)

    def _next_batch(self) -> Iterator[_Question]:
        """The first in the queue and those behind it that are of its kind, as far as they fit."""
        kind, room = self._queue[0].kind, max(MAX_BATCH, len(self._queue[0].inputs))
        while self._queue and self._queue[0].kind == kind and len(self._queue[0].inputs) <= room:
            question = self._queue.popleft()
            room -= len(question.inputs)
            if not question.answer.done():  # else who asked has gone
                yield question


class _NoAnswer(Exception):
    """The model could not answer; the text says why."""


def _tried(make: Callable[[], Predictor], probe: Array | None) -> Predictor:
    """The predictor that *make* makes, if it answers *probe*; runs in a thread."""
    try:
        predictor = make()
        if probe is not None:
            _probe(predictor, probe)
    except ModelRefused:
        raise
    except Exception as error:  # the task's own code: whatever it raises, the old model stays
        raise ModelRefused(f"the model cannot be loaded: {_line(error)}") from error
    return predictor


def _probe(predictor: Predictor, samples: Array) -> None:
    if probe := getattr(predictor, "probe", None):
        probe(samples)
    else:
        _checked(predictor.predict(samples), len(samples))


def _answers(batch: list[_Question]) -> list[Array | _NoAnswer]:
    """The answer to each question of *batch*, all of one kind; runs in the model's thread."""
    if not batch:
        return []
    predictor = batch[0].serving.predictor
    sizes = [len(question.inputs) for question in batch]
    try:
        together = (
            np.concatenate([question.inputs for question in batch]) if len(batch) > 1 else batch[0].inputs
        )
        outputs = _checked(predictor.predict(together), sum(sizes))
    except Exception as error:  # noqa: BLE001 - the task's own code: whatever it raises, others go on
        if len(batch) == 1:
            log.warning("a prediction failed", reason=_line(error))
            return [_NoAnswer(f"the model could not answer: {_line(error)}")]
        return [answer for question in batch for answer in _answers([question])]  # find out whose it was
    ends = list(itertools.accumulate(sizes))
    return list(np.split(outputs, ends[:-1]))


def _checked(outputs: Array, expected: int) -> Array:
    if len(outputs) != expected:
        raise ValueError(f"it gave {len(outputs)} answers to {expected} samples")
    if outputs.dtype.kind == "f" and not np.isfinite(outputs).all():
        raise ValueError("its answer holds NaN or infinity")
    return outputs


def _tell(future: "asyncio.Future[Array]", answer: Array | _NoAnswer) -> None:
    if future.done():
        return
    if isinstance(answer, _NoAnswer):
        future.set_exception(answer)
    else:
        future.set_result(answer)


# --- what a request may say --------------------------------------------------------------------


@web.middleware
async def _in_one_line(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """Every refusal, ours or the web framework's, as ``{"error": …}``."""
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        if error.content_type == "application/json":
            raise
        said = {"error": f"{error.reason}: {error.text}" if error.status == 413 else error.reason}
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return web.json_response(said, status=error.status, headers=headers)
    return response


def _refusal(
    kind: Callable[..., web.HTTPException], reason: str, headers: dict[str, str] | None = None
) -> web.HTTPException:
    return kind(text=json.dumps({"error": reason}), content_type="application/json", headers=headers)


def _come_again(reason: str) -> web.HTTPException:
    return _refusal(web.HTTPServiceUnavailable, reason, {"Retry-After": str(RETRY_AFTER_S)})


def _bad(reason: str) -> web.HTTPException:
    return _refusal(web.HTTPBadRequest, reason)


async def _content(request: web.Request) -> bytes:
    if request.content_type != "application/json":
        raise _refusal(web.HTTPUnsupportedMediaType, "send JSON, with Content-Type: application/json")
    return await request.read()


async def _beside(size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do *work*, in a thread where it is enough to hold the loop up."""
    if size_bytes <= _ON_THE_LOOP_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def _object(content: bytes) -> dict[str, Any]:
    """The body, which must be a JSON object."""
    try:
        body = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(f"the body is not JSON: {_line(error)}") from error
    if not isinstance(body, dict):
        raise _bad("the body must be a JSON object")
    return body


def _samples(content: bytes, shape: tuple[int, ...] | None, most: int) -> tuple[Array, list[Label | None]]:
    """What is to be predicted, and what is known to be true of it."""
    body = _object(content)
    inputs = _inputs(body, shape, most)
    return inputs, _labels(body, len(inputs))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _inputs(body: dict[str, Any], shape: tuple[int, ...] | None, most: int) -> Array:
    """The samples, as the model takes them."""
    rows = body.get("inputs")
    if not isinstance(rows, list) or not rows:
        raise _bad('give at least one sample: {"inputs": [[…], …]}')
    if len(rows) > most:
        raise _refusal(
            lambda **said: web.HTTPRequestEntityTooLarge(max_size=most, actual_size=len(rows), **said),
            f"{len(rows)} samples are too many: send at most {most} at once",
        )
    inputs = _numbers(rows)
    if shape is not None and inputs.shape[1:] != shape:
        raise _bad(f"a sample must have the shape {list(shape)}, and not {list(inputs.shape[1:])}")
    return inputs


def _numbers(rows: list[Any]) -> Array:
    try:
        given = np.asarray(rows)
    except (ValueError, OverflowError) as error:
        raise _bad("inputs must be numbers, and all samples of one shape") from error
    if given.dtype.kind not in "iuf":
        raise _bad("inputs must be numbers, and numbers that fit into 64 bits")
    with np.errstate(over="ignore"):
        inputs: Array = given.astype(np.float32)
    if not np.isfinite(inputs).all():
        raise _bad("inputs must be finite numbers that fit into 32 bits")
    return inputs


def _labels(body: dict[str, Any], count: int) -> list[Label | None]:
    labels = body.get("labels")
    if labels is None:
        return [None] * count
    if not isinstance(labels, list) or len(labels) != count:
        raise _bad(f"labels must be a list with one for each of the {count} samples, or null where unknown")
    return [None if label is None else _label(label) for label in labels]


def _label(value: Any) -> Label:
    """A number, or a list of numbers."""
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [float(one) for one in value]
    if _is_number(value):
        number: int | float = value
        return number
    raise _bad("a label must be a finite number, or a list of them")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= _MAX_LABEL


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
