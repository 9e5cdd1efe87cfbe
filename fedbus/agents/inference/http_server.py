"""The HTTP server of the inference agent; it serves without interruption while models are swapped.

    POST /predict         {"inputs": [[…], …], "labels": [… or null, …]?}
                          → {"ids": [… or null], "outputs": […], "model_version": 3}
    POST /feedback/{id}   {"label": …} → 204; unknown id: 404; the id has another label: 409
    DELETE /feedback/{id} → 204: the label is removed, and another can be sent; unknown id: 404
    GET  /live            200 while the process runs
    GET  /ready           200, or 503 with Retry-After and the reason while no model is served
    GET  /model           {"model": {"version": 3, "sha256": …} or null, "not_served": "version 4 is not served: …"?}

The Open Inference Protocol, version 2, with JSON and binary tensors (see `open_inference_protocol`):

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{model}[/versions/{v}], …/ready
    POST /v2/models/{model}[/versions/{v}]/infer

Each error is one line of JSON, ``{"error": …}``. The status is 429 with Retry-After if the queue or the memory for
requests is full, and 503 with Retry-After while no model is served: before the first model, or if no code of the task
serves the device's version. An older version that is loaded answers in that case.

``ids`` are for feedback; an id is null if the prediction was not captured. Predicted samples become training data,
so the server rejects requests that a web page could send from a browser: a request needs the content type
``application/json`` or the header of the binary extension. ``infer`` also accepts JSON without a content type, if no
header shows that it comes from a browser.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Final

from aiohttp import web
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from fedbus.agents.inference.engine import MAX_BATCH_S, MAX_QUEUED, InferenceEngine
from fedbus.agents.inference.loaded_model import Array, MakePredictor
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
from fedbus.contracts.telemetry import (
    CLIENT,
    PREDICTION_DURATION,
    SERVED_VERSION,
    TASK,
    Attributes,
    get_tracer,
    observable_gauge,
    record,
)
from fedbus.stores.captured.store import CapturedData

STOP_S: Final = 5.0
TRACE_INTERVAL_S: Final = 1.0
MAX_CONCURRENT_BODIES: Final = 8
"""Request bodies of the maximum size for which there is memory at the same time."""
READ_TIMEOUT_S: Final = 30.0
"""Time limit for reading a body; its memory is reserved meanwhile."""
MAX_ID_DIGITS: Final = 16
_JSON: Final = "application/json"
_BYTES: Final = "application/octet-stream"
_BROWSER_HEADERS: Final = ("Content-Type", "Origin", "Sec-Fetch-Site")
_V2_MODEL: Final = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")

tracer = get_tracer("fedbus.inference")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InferenceBindError(Exception):
    """The server cannot bind its address: the port is in use, or the address is not a local one."""


class InferenceServer:
    """The server of one task, whose model has the name *name*; it adds all predictions to *capture*, if given."""

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
        self._attributes = {TASK: name, CLIENT: client}
        self._next_trace_at = 0.0
        self._runner: web.AppRunner | None = None
        self._gauges = ExitStack()

    @property
    def current_model(self) -> ModelRef | None:
        """The reference of the served model."""
        return self.engine.current

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen on *port*, or on any free port if it is 0, and return the URL.

        Raises:
            InferenceBindError: the address cannot be bound.

        """
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=STOP_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        try:
            await _run_uncancelled(site.start())
        except OSError as error:
            await self._runner.cleanup()
            raise InferenceBindError(
                f"cannot serve predictions on {host}:{port}: {error.strerror}. "
                "Choose another port, or 0 for any free port"
            ) from error
        self._gauges.enter_context(observable_gauge(SERVED_VERSION, self._read_version))
        actual_port = self._runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{actual_port}"

    async def stop(self) -> None:
        """Stop listening, and answer the accepted requests."""
        self._gauges.close()
        if self._runner is not None:
            await self._runner.cleanup()
        await self.engine.stop()

    def _read_version(self) -> Iterator[tuple[float, Attributes]]:
        model = self.current_model  # read once: this runs in the thread of the exporter
        yield model.version if model is not None else 0, self._attributes

    async def load(self, ref: ModelRef, make: MakePredictor, probe: Array | None = None) -> None:
        """Load and probe a model while the current one serves, then serve it.

        *make* runs in a thread.

        Raises:
            ModelRefused: the model cannot be loaded; the current model continues to serve.

        """
        self.engine.serve(await self.engine.load_model(ref, make, probe))

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
        """Wrap *handler* to record the duration of each request."""

        async def timed(request: web.Request) -> web.StreamResponse:
            start = time.perf_counter()
            with self._sample_span():
                response = await _json_errors(request, handler)
                attributes = self._attributes | {"http.response.status_code": str(response.status)}
                record(PREDICTION_DURATION, time.perf_counter() - start, attributes)
            return response

        return timed

    def _limit_memory(self, handler: Handler) -> Handler:
        """Wrap *handler* to reserve memory for the body."""

        async def bounded(request: web.Request) -> web.StreamResponse:
            with self.memory_limit.reserve(self._max_size_of(request)):
                return await handler(request)

        return bounded

    def _max_size_of(self, request: web.Request) -> int:
        """Return an upper bound of the body size; a compressed or chunked body counts as the maximum."""
        length = None if "Content-Encoding" in request.headers else request.content_length
        return self._max_body_bytes if length is None else min(length, self._max_body_bytes)

    def _sample_span(self) -> AbstractContextManager[object]:
        """Start a span at most every TRACE_INTERVAL_S, so that metrics have exemplars at low cost."""
        now = time.monotonic()
        if now < self._next_trace_at:
            return nullcontext()
        self._next_trace_at = now + TRACE_INTERVAL_S
        attributes: dict[str, str | int] = dict(self._attributes)
        if self.current_model is not None:
            attributes["fedbus.model.version"] = self.current_model.version
        return tracer.start_as_current_span("predict", Context(), SpanKind.SERVER, attributes)

    async def _live(self, _: web.Request) -> web.Response:
        return _json_response({"live": True})

    async def _ready(self, _: web.Request) -> web.Response:
        return _json_response(self.service.check_ready())

    async def _model(self, _: web.Request) -> web.Response:
        return _json_response(self.service.describe_model())

    async def _predict(self, request: web.Request) -> web.Response:
        body = await self.service.predict(await _read_json_body(request))
        return web.Response(body=body, content_type=_JSON)

    async def _feedback(self, request: web.Request) -> web.Response:
        row = _parse_row(request)
        await self.service.feedback(row, await _read_json_body(request))
        return web.Response(status=204)

    async def _withdraw(self, request: web.Request) -> web.Response:
        await self.service.remove_label(_parse_row(request))
        return web.Response(status=204)

    async def _server_metadata(self, _: web.Request) -> web.Response:
        return _json_response(self.service.build_server_metadata())

    async def _model_metadata(self, request: web.Request) -> web.Response:
        return _json_response(self.service.build_model_metadata(*_parse_model_path(request)))

    async def _model_ready(self, request: web.Request) -> web.Response:
        return _json_response(self.service.check_ready(*_parse_model_path(request)))

    async def _infer(self, request: web.Request) -> web.Response:
        json_bytes = _parse_json_length(request)
        if json_bytes is None:
            _check_json(request, optional=True)
        content = await _read_body(request)
        if json_bytes is not None and json_bytes > len(content):
            raise bad_request(f"{HEADER_LENGTH} is {json_bytes}, but the body has {len(content)} bytes")
        response = await self.service.infer(content, json_bytes, *_parse_model_path(request))
        if response.json_bytes is None:
            return web.Response(body=response.content, content_type=_JSON)
        headers = {HEADER_LENGTH: str(response.json_bytes)}
        return web.Response(body=response.content, content_type=_BYTES, headers=headers)


@web.middleware
async def _json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Convert each error, including those of aiohttp, to ``{"error": …}``."""
    try:
        return await handler(request)
    except HttpError as error:
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return web.Response(body=error.body, status=error.status, headers=headers, content_type=_JSON)
    except web.HTTPException as error:
        reason = f"{error.reason}: {error.text}" if error.status == 413 else error.reason
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return web.json_response({"error": reason}, status=error.status, headers=headers)


def _json_response(body: dict[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(body).encode(), content_type=_JSON)


async def _read_json_body(request: web.Request) -> bytes:
    _check_json(request)
    return await _read_body(request)


def _check_json(request: web.Request, *, optional: bool = False) -> None:
    """Raise HttpError unless the content type is JSON; if *optional*, it can be missing.

    Triton's client sends no content type if all tensors are JSON. A page in a browser can send such a request
    too, but its browser adds one of _BROWSER_HEADERS.
    """
    if optional and not any(name in request.headers for name in _BROWSER_HEADERS):
        return
    if request.content_type != _JSON:
        raise HttpError(
            UNSUPPORTED_MEDIA_TYPE, "unsupported media type. Send JSON, with Content-Type: application/json"
        )


async def _read_body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise HttpError(
            REQUEST_TIMEOUT, f"timeout while reading the body (limit {READ_TIMEOUT_S:g} s)"
        ) from None


def _parse_json_length(request: web.Request) -> int | None:
    """Return the length of the JSON part of a binary request, or None if the request is only JSON."""
    value = request.headers.get(HEADER_LENGTH)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise bad_request(f"{HEADER_LENGTH} must be the number of JSON bytes in the body, not {value!r}")
    return int(value)


def _parse_row(request: web.Request) -> int:
    """Return the prediction id in the path."""
    value = request.match_info["id"]
    if not (value.isascii() and value.isdigit() and len(value) <= MAX_ID_DIGITS):
        raise HttpError(
            NOT_FOUND,
            f"{value[:40]!r} is not a prediction id. Use one of the `ids` in the response to the prediction",
        )
    return int(value)


def _parse_model_path(request: web.Request) -> tuple[str, str | None]:
    """Return the model in the path, and the version if the path has one."""
    version = request.match_info.get("version")
    if version is not None and not version.isdigit():
        raise HttpError(NOT_FOUND, f"invalid version {version!r}. Versions are numbers")
    return request.match_info["model"], version


async def _run_uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """Complete *work* even if cancelled: a cancelled start would leak the listening socket in asyncio."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
