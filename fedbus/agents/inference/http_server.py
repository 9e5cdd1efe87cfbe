"""Predictions over HTTP, without a gap while models change.

    POST /predict         {"inputs": [[…], …], "labels": [… or null, …]?}
                          → {"ids": [… or null], "outputs": […], "model_version": 3}
    POST /feedback/{id}   {"label": …} → 204; unknown: 404; another answer than before: 409
    DELETE /feedback/{id} → 204: what was said is forgotten, and may be said otherwise; unknown: 404
    GET  /live            200 as long as the process answers
    GET  /ready           200, or 503 with Retry-After before the first model
    GET  /model           {"model": {"version": 3, "sha256": …} or null}

And the Open Inference Protocol, version 2, with JSON and binary tensors (see `inference_protocol`):

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{model}[/versions/{v}], …/ready
    POST /v2/models/{model}[/versions/{v}]/infer

Whatever is wrong with a request is said in one line: ``{"error": …}``. Where too many wait, or too much is in hand,
429 with Retry-After; where there is no model yet, 503 with Retry-After.

``ids`` are for feedback; null where a prediction was not captured. Only requests that no page in
somebody's browser can send are taken (``application/json``, or the header of the binary extension; ``infer`` also takes
JSON that is not said to be any, from who is no browser): what is predicted here becomes training data.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from aiohttp import web
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from fedbus.agents.inference.engine import MAX_BATCH_S, MAX_QUEUED, Array, InferenceEngine, MakePredictor
from fedbus.agents.inference.open_inference_protocol import HEADER_LENGTH
from fedbus.agents.inference.plain_json import (
    NOT_FOUND,
    REQUEST_TIMEOUT,
    UNSUPPORTED_MEDIA_TYPE,
    HttpError,
    bad_request,
)
from fedbus.agents.inference.request_memory import RequestMemoryLimit
from fedbus.agents.inference.service import MAX_BODY_BYTES, MAX_INPUTS, PredictionService
from fedbus.contracts.model import ModelRef
from fedbus.contracts.telemetry import CLIENT, PREDICTION_DURATION, TASK, get_tracer, record
from fedbus.stores.captured.store import CapturedData

STOP_S: Final = 5.0
TRACE_INTERVAL_S: Final = 1.0
MAX_CONCURRENT_BODIES: Final = 8
"""How many bodies of the greatest size may be read and taken apart at the same time; smaller ones count as such."""
READ_TIMEOUT_S: Final = 30.0
"""How long a body may take to come: meanwhile its room is nobody else's."""
MAX_ID_DIGITS: Final = 16
_JSON: Final = "application/json"
_BYTES: Final = "application/octet-stream"
_BROWSER_HEADERS: Final = ("Content-Type", "Origin", "Sec-Fetch-Site")
_V2_MODEL: Final = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

tracer = get_tracer("fedbus.inference_server")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InferenceBindError(Exception):
    """The port is taken, or the address is not this machine's."""


class InferenceServer:
    """Answers for one task, whose model is called *name*. What it was asked goes into *capture*, if there is one."""

    def __init__(
        self,
        capture: CapturedData | None = None,
        *,
        name: str = "model",
        client: str = "",
        max_body_bytes: int = MAX_BODY_BYTES,
        max_inputs: int = MAX_INPUTS,
        max_queued: int = MAX_QUEUED,
        batch_s: float = MAX_BATCH_S,
        classes: int | None = None,
    ) -> None:
        self.engine = InferenceEngine(max_queued=max_queued, batch_s=batch_s)
        self.service = PredictionService(
            self.engine, capture, name=name, max_inputs=max_inputs, classes=classes
        )
        self.memory_limit = RequestMemoryLimit(MAX_CONCURRENT_BODIES * max_body_bytes)
        self._max_body_bytes = max_body_bytes
        self._about = {TASK: name, CLIENT: client}
        self._next_trace_at = 0.0
        self._runner: web.AppRunner | None = None

    @property
    def current(self) -> ModelRef | None:
        """The version that answers now."""
        return self.engine.current

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Begin to listen, on a free port where *port* is 0; the URL. Raises CannotListen."""
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=STOP_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await _run_uncancelled(site.start())
        except OSError as error:
            await self._runner.cleanup()
            raise InferenceBindError(
                f"cannot serve predictions on {host}:{port}: {error.strerror}; choose another port, or 0 for any"
            ) from error
        actual = self._runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{actual}"

    async def stop(self) -> None:
        """Answer what was accepted, then listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
        await self.engine.stop()

    async def load(self, ref: ModelRef, make: MakePredictor, probe: Array | None = None) -> None:
        """Make and try a model beside the one that serves, then let it serve instead.

        *make* is called in a thread. Raises ModelRefused, and the old model stays.
        """
        self.engine.serve(await self.engine.made(ref, make, probe))

    # --- HTTP ------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=self._max_body_bytes, middlewares=[_json_errors])
        application.add_routes(
            [
                web.post("/predict", self._measure_duration(self._limit_memory(self._predict))),
                web.post("/feedback/{id}", self._limit_memory(self._feedback)),
                web.delete("/feedback/{id}", self._withdraw),
                web.get("/live", self._live),
                web.get("/ready", self._ready),
                web.get("/model", self._model),
                web.get("/v2", self._server_metadata),
                web.get("/v2/health/live", self._live),
                web.get("/v2/health/ready", self._ready),
            ]
        )
        for model in _V2_MODEL:
            application.add_routes(
                [
                    web.get(model, self._model_metadata),
                    web.get(f"{model}/ready", self._model_ready),
                    web.post(f"{model}/infer", self._measure_duration(self._limit_memory(self._infer))),
                ]
            )
        return application

    def _measure_duration(self, handler: Handler) -> Handler:
        """*handler*, with the time it takes from request to answer measured."""

        async def timed(request: web.Request) -> web.StreamResponse:
            began = time.perf_counter()
            with self._sample_span():
                response = await _json_errors(request, handler)
                about = self._about | {"http.response.status_code": str(response.status)}
                record(PREDICTION_DURATION, time.perf_counter() - began, about)
            return response

        return timed

    def _limit_memory(self, handler: Handler) -> Handler:
        """*handler*, where there is room for the body."""

        async def bounded(request: web.Request) -> web.StreamResponse:
            with self.memory_limit.room_for(self._size_of(request)):
                return await handler(request)

        return bounded

    def _size_of(self, request: web.Request) -> int:
        """What the body may come to: it is not read yet, and what is compressed or comes in chunks does not say."""
        said = None if "Content-Encoding" in request.headers else request.content_length
        return self._max_body_bytes if said is None else min(said, self._max_body_bytes)

    def _sample_span(self) -> AbstractContextManager[object]:
        """One prediction in EXAMPLE_S is a span, so that a figure has an example to show; the others cost nothing."""
        now = time.monotonic()
        if now < self._next_trace_at:
            return nullcontext()
        self._next_trace_at = now + TRACE_INTERVAL_S
        about: dict[str, str | int] = dict(self._about)
        if self.current is not None:
            about["fedbus.model.version"] = self.current.version
        return tracer.start_as_current_span("predict", Context(), SpanKind.SERVER, about)

    async def _live(self, _: web.Request) -> web.Response:
        return _json_response({"live": True})

    async def _ready(self, _: web.Request) -> web.Response:
        return _json_response(self.service.ready())

    async def _model(self, _: web.Request) -> web.Response:
        return _json_response(self.service.model())

    async def _predict(self, request: web.Request) -> web.Response:
        answer = await self.service.predict(await _read_json_body(request))
        return web.Response(body=answer, content_type=_JSON)

    async def _feedback(self, request: web.Request) -> web.Response:
        row = _parse_row(request)
        await self.service.feedback(row, await _read_json_body(request))
        return web.Response(status=204)

    async def _withdraw(self, request: web.Request) -> web.Response:
        await self.service.withdraw(_parse_row(request))
        return web.Response(status=204)

    async def _server_metadata(self, _: web.Request) -> web.Response:
        return _json_response(self.service.build_server_metadata())

    async def _model_metadata(self, request: web.Request) -> web.Response:
        return _json_response(self.service.build_model_metadata(*_parse_model_path(request)))

    async def _model_ready(self, request: web.Request) -> web.Response:
        return _json_response(self.service.ready(*_parse_model_path(request)))

    async def _infer(self, request: web.Request) -> web.Response:
        json_bytes = _parse_json_length(request)
        if json_bytes is None:
            _check_json(request, unnamed=True)
        content = await _read_body(request)
        if json_bytes is not None and json_bytes > len(content):
            raise bad_request(f"{HEADER_LENGTH} is {json_bytes}, and {len(content)} bytes came")
        answer = await self.service.infer(content, json_bytes, *_parse_model_path(request))
        if answer.json_bytes is None:
            return web.Response(body=answer.content, content_type=_JSON)
        headers = {HEADER_LENGTH: str(answer.json_bytes)}
        return web.Response(body=answer.content, content_type=_BYTES, headers=headers)


@web.middleware
async def _json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every refusal, ours or the web framework's, as ``{"error": …}``."""
    try:
        return await handler(request)
    except HttpError as refusal:
        headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
        return web.Response(body=refusal.body, status=refusal.status, headers=headers, content_type=_JSON)
    except web.HTTPException as error:
        said = f"{error.reason}: {error.text}" if error.status == 413 else error.reason
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return web.json_response({"error": said}, status=error.status, headers=headers)


def _json_response(body: dict[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(body).encode(), content_type=_JSON)


async def _read_json_body(request: web.Request) -> bytes:
    _check_json(request)
    return await _read_body(request)


def _check_json(request: web.Request, *, unnamed: bool = False) -> None:
    """Whether the body is said to be JSON; where it may be *unnamed*, nothing need be said of it.

    Triton's own client says nothing where all tensors are JSON. A page in a browser can send such a request too, but
    not without its browser saying where it comes from.
    """
    if unnamed and not any(name in request.headers for name in _BROWSER_HEADERS):
        return
    if request.content_type != _JSON:
        raise HttpError(UNSUPPORTED_MEDIA_TYPE, "send JSON, with Content-Type: application/json")


async def _read_body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise HttpError(REQUEST_TIMEOUT, f"the body did not come within {READ_TIMEOUT_S:g} s") from None


def _parse_json_length(request: web.Request) -> int | None:
    """How many bytes of the body are JSON, where the rest is tensors; None where all of it is."""
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return None
    if not given.isascii() or not given.isdigit() or len(given) > 9:
        raise bad_request(f"{HEADER_LENGTH} must be how many bytes of the body are JSON, and not {given!r}")
    return int(given)


def _parse_row(request: web.Request) -> int:
    """The prediction that feedback is about."""
    given = request.match_info["id"]
    if not (given.isascii() and given.isdigit() and len(given) <= MAX_ID_DIGITS):
        raise HttpError(
            NOT_FOUND,
            f"{given[:40]!r} is no id of a prediction: give one of the `ids` that came with the answer",
        )
    return int(given)


def _parse_model_path(request: web.Request) -> tuple[str, str | None]:
    """The model in the path, and its version where one is named."""
    version = request.match_info.get("version")
    if version is not None and not version.isdigit():
        raise HttpError(NOT_FOUND, f"{version!r} is no version: versions are numbers")
    return request.match_info["model"], version


async def _run_uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """Do *work* whole, also when cancelled meanwhile: asyncio loses a socket that it was about to listen on."""
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        raise
