"""The HTTP API of the dashboard: static files, state, event feed, queries and actions.

GET  /                         the pages; their files are in `fedbus/web`
GET  /api/about                federation, fedbus version, lifecycles, whether actions are enabled
GET  /api/state                the last message of each subject, and the cursor of this state
GET  /api/feed?after=CURSOR    new messages as server-sent events; `Last-Event-ID` has precedence over *after*
GET  /api/recent?limit=N       the newest messages
GET  /api/runs/RUN             the messages of a run
GET  /api/traces/ID            the messages of a trace
GET  /api/messages/e/SEQ       one message without truncation
GET  /api/causes/e/SEQ         the chain of causes of a message, root cause first
GET  /api/models/TASK          the versions in the model repository
POST /api/token                check the token
POST /api/actions/NAME         send one of `ACTIONS`; requires the token

An invalid parameter is answered with 400; each error is JSON, ``{"error": "…"}``.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Any, Final

import structlog
from aiohttp import web
from pydantic import ValidationError

from fedbus import __version__
from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.agents.gateway.access_control import SECURITY_HEADERS, AccessControl
from fedbus.agents.gateway.feed import Cursor, CursorExpired, Feed, InvalidCursor
from fedbus.agents.gateway.history import StreamHistory
from fedbus.agents.gateway.records import EVENTS, LIFECYCLE, FeedRecord
from fedbus.bus.bus import Bus
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.contracts.champion import PromoteModel, RollBackModel
from fedbus.contracts.code import RevertCode, RollOutCode
from fedbus.contracts.envelope import pack
from fedbus.contracts.message import Body, Request
from fedbus.contracts.run import StartRun, StopRun
from fedbus.contracts.transition import LIFECYCLES

BATCH_PAUSE_S: Final = 0.25
"""Minimum pause between two batches for one browser."""
PRESENCE_INTERVAL_S: Final = 5.0
"""Interval of the presence events, which also keep the connection alive."""
BEGINNING_OF_TIME: Final = datetime.min.replace(tzinfo=UTC)
WRITE_TIMEOUT_S: Final = 15.0
"""A browser that does not read for this time is disconnected; it reconnects with its cursor."""
READY_TIMEOUT_S: Final = 10.0
REPLY_TIMEOUT_S: Final = 15.0
MAX_BROWSERS: Final = 64
MAX_RECENT: Final = 5_000
MAX_DIGITS: Final = 15
FIRST_YEAR: Final = 1970
LAST_YEAR: Final = 9000
"""Range of years that a query for a time accepts."""
MESSAGE_GONE: Final = "the stream no longer contains this message"
MAX_BODY_BYTES: Final = 64 * 1024

ACTIONS: Final[Mapping[str, type[Request[Body]]]] = {
    kind.name: kind for kind in (StartRun, StopRun, PromoteModel, RollBackModel, RollOutCode, RevertCode)
}
"""Requests that the dashboard can send, by name."""
CONTENT_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}

DescribeModels = Callable[[str], Awaitable[dict[str, Any]]]

log = structlog.get_logger("fedbus.gateway")


class HttpApi:
    """The routes of the dashboard.

    *models* describes the model repository of a task; *trace_url* is the URL template of the trace viewer.
    """

    def __init__(
        self,
        bus: Bus,
        feed: Feed,
        guard: AccessControl,
        stop: asyncio.Event,
        *,
        models: DescribeModels,
        trace_url: str = "",
    ) -> None:
        self._bus = bus
        self._feed = feed
        self._guard = guard
        self._stop = stop
        self._models = models
        self._trace_url = trace_url
        self._history = StreamHistory(bus)
        self._files = dict(_load_files())
        self._browsers = 0

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard.middleware])
        application.add_routes(
            [
                web.get("/", self._get_file),
                web.get("/api/about", self._get_about),
                web.get("/api/state", self._get_state),
                web.get("/api/feed", self._stream_feed),
                web.get("/api/recent", self._get_recent),
                web.get("/api/runs/{run}", self._get_run),
                web.get("/api/traces/{trace:[0-9a-f]{32}}", self._get_trace),
                web.get("/api/messages/{stream:[el]}/{sequence}", self._get_message),
                web.get("/api/causes/{stream:[el]}/{sequence}", self._get_causes),
                web.get("/api/models/{task}", self._get_versions),
                web.post("/api/token", self._check_token),
                web.post("/api/actions/{name}", self._send_action),
                web.get(r"/{name:[a-z_]+\.(?:js|css|svg)}", self._get_file),
            ]
        )
        return application

    # --- files ------------------------------------------------------------------------------------

    async def _get_file(self, request: web.Request) -> web.StreamResponse:
        file = self._files.get(request.match_info.get("name", "index.html"))
        if file is None:
            raise web.HTTPNotFound(text="file not found")
        content_type, body, tag = file
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    # --- queries ----------------------------------------------------------------------------------

    async def _get_about(self, _: web.Request) -> web.Response:
        lifecycles = {
            kind: {"waits": {str(state): wait.waiting_for for state, wait in lifecycle.waits.items()}}
            for kind, lifecycle in LIFECYCLES.items()
        }
        return web.json_response(
            {
                "federation": self._bus.fed,
                "version": __version__,
                "acts": self._guard.can_act,
                "trace_url": self._trace_url,
                "lifecycles": lifecycles,
            }
        )

    async def _get_state(self, _: web.Request) -> web.Response:
        await self._wait_ready()
        cursor = self._feed.position
        records = ",".join(record.json for record in self._feed.snapshot())
        presence = json.dumps(self._feed.presence(BEGINNING_OF_TIME))
        body = f'{{"cursor":"{cursor}","presence":{presence},"records":[{records}]}}'
        response = web.Response(text=body, content_type="application/json")
        response.enable_compression()
        return response

    async def _get_recent(self, request: web.Request) -> web.Response:
        await self._wait_ready()
        limit = _parse_number(request.query.get("limit", "500"), "limit")
        return _records_response(self._feed.newest_records(min(limit, MAX_RECENT)))

    async def _get_run(self, request: web.Request) -> web.Response:
        records = await self._history.read_run(request.match_info["run"])
        if records is None:
            raise web.HTTPNotFound(text="run not found in the lifecycle stream")
        return _records_response(records)

    async def _get_trace(self, request: web.Request) -> web.Response:
        await self._wait_ready()
        trace = request.match_info["trace"]
        return _records_response(
            await self._history.read_trace(trace, _parse_since(request)) or self._feed.records_in_trace(trace)
        )

    async def _get_message(self, request: web.Request) -> web.Response:
        record = await self._history.read_message(*_parse_position(request))
        if record is None:
            raise web.HTTPNotFound(text=MESSAGE_GONE)
        return web.Response(text=record.json, content_type="application/json")

    async def _get_causes(self, request: web.Request) -> web.Response:
        result = await self._history.read_causes(*_parse_position(request))
        if result is None:
            raise web.HTTPNotFound(text=MESSAGE_GONE)
        chain, is_complete = result
        text = f'{{"chain":[{",".join(record.json for record in chain)}],"whole":{json.dumps(is_complete)}}}'
        return web.Response(text=text, content_type="application/json")

    async def _get_versions(self, request: web.Request) -> web.Response:
        return web.json_response(await self._models(request.match_info["task"]))

    async def _wait_ready(self) -> None:
        try:
            await wait_within(READY_TIMEOUT_S, self._feed.ready.wait())
        except TimeoutError:
            raise web.HTTPServiceUnavailable(
                text=f"federation {self._bus.fed} has no streams. Start its server side with fedbus up"
            ) from None

    # --- event feed -------------------------------------------------------------------------------

    async def _stream_feed(self, request: web.Request) -> web.StreamResponse:
        cursor = _parse_cursor(request) or self._feed.position
        await self._wait_ready()
        if self._browsers >= MAX_BROWSERS:
            raise web.HTTPServiceUnavailable(
                text=f"too many open dashboards (limit {MAX_BROWSERS}). Close one"
            )
        response = web.StreamResponse(headers={**SECURITY_HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._browsers += 1
        try:
            await self._write_feed(response, cursor)
        except (TimeoutError, ConnectionError):  # the browser stopped reading; it reconnects with its cursor
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._browsers -= 1
        return response

    async def _write_feed(self, response: web.StreamResponse, cursor: Cursor) -> None:
        await _write(response, b"retry: 1000\n\n")
        batches = aiter(self._feed.follow(cursor))
        next_batch = asyncio.ensure_future(anext(batches))
        stopped = asyncio.ensure_future(self._stop.wait())
        presence_sent_at = datetime.now(UTC)
        try:
            while not stopped.done():
                await asyncio.wait(
                    [next_batch, stopped], timeout=PRESENCE_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
                )
                if (now := datetime.now(UTC)) - presence_sent_at >= timedelta(seconds=PRESENCE_INTERVAL_S):
                    await _write(response, _presence_event(self._feed.presence(presence_sent_at)))
                    presence_sent_at = now
                if next_batch.done():
                    records, cursor = next_batch.result()
                    await _write(response, _batch_event(records, cursor))
                    await asyncio.wait([stopped], timeout=BATCH_PAUSE_S)
                    next_batch = asyncio.ensure_future(anext(batches))
        except CursorExpired:
            await _write(response, b"event: lost\ndata: {}\n\n")
        finally:
            for task in (next_batch, stopped):
                task.cancel()
            await asyncio.gather(next_batch, stopped, return_exceptions=True)

    # --- actions ----------------------------------------------------------------------------------

    async def _check_token(self, request: web.Request) -> web.Response:
        return await self._guard.rejection(request) or web.json_response({})

    async def _send_action(self, request: web.Request) -> web.Response:
        if (refusal := await self._guard.rejection(request)) is not None:
            return refusal
        kind = ACTIONS.get(request.match_info["name"])
        if kind is None:
            raise web.HTTPNotFound(text=f"unknown action. Use one of: {', '.join(ACTIONS)}")
        action = await _parse_action(kind, request)
        log.info("Sending action", message=action.name, task=action.task, remote=request.remote)
        try:
            reply = await self._bus.request(action, timeout_s=REPLY_TIMEOUT_S)
        except RequestRefused as refused:
            return web.json_response({"error": refused.reason}, status=409)
        except NoResponse as error:
            return web.json_response({"error": str(error)}, status=503)
        return web.json_response(reply.model_dump(mode="json"))


async def _parse_action(kind: type[Request[Body]], request: web.Request) -> Request[Body]:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="unsupported media type. Send application/json")
    try:
        action = kind.model_validate_json(await request.read())
        pack(action)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise web.HTTPBadRequest(text=f"{field}: {first['msg']}".removeprefix(": ")) from None
    except ValueError as error:  # the message cannot be encoded
        raise web.HTTPBadRequest(text=str(error)) from None
    return action


def _batch_event(records: list[FeedRecord], cursor: Cursor) -> bytes:
    return f"id: {cursor}\ndata: [{','.join(record.json for record in records)}]\n\n".encode()


def _presence_event(presence: dict[str, Any]) -> bytes:
    return f"event: heard\ndata: {json.dumps(presence)}\n\n".encode()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Write *data* to the browser.

    Raises:
        TimeoutError: the browser does not read within WRITE_TIMEOUT_S.

    """
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(data)


def _records_response(records: list[FeedRecord]) -> web.Response:
    response = web.Response(
        text=f"[{','.join(record.json for record in records)}]", content_type="application/json"
    )
    response.enable_compression()
    return response


def _parse_cursor(request: web.Request) -> Cursor | None:
    text = request.headers.get("Last-Event-ID") or request.query.get("after")
    try:
        return Cursor.parse(text) if text else None
    except InvalidCursor as error:
        raise web.HTTPBadRequest(text=str(error)) from None


def _parse_since(request: web.Request) -> datetime | None:
    """Return the start of the time window around the ``around`` parameter, or None without it."""
    text = request.query.get("around")
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None or not FIRST_YEAR <= at.year <= LAST_YEAR:
        raise web.HTTPBadRequest(
            text=f"invalid time {text[:40]!r} in around. Use the form 2026-03-14T12:00:00Z, "
            f"with a year from {FIRST_YEAR} to {LAST_YEAR}"
        )
    return at - timedelta(minutes=10)


def _parse_position(request: web.Request) -> tuple[str, int]:
    """Return the stream and the sequence in the path."""
    return request.match_info["stream"], _parse_number(request.match_info["sequence"], "sequence")


def _parse_number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) > 0):
        raise web.HTTPBadRequest(
            text=f"invalid {name} {text[:40]!r}. Use a number from 1, with at most {MAX_DIGITS} digits"
        )
    return int(text)


def _load_files() -> Iterator[tuple[str, tuple[str, bytes, str]]]:
    """Yield each static file with its content type, its content and its ETag."""
    for file in (resources.files("fedbus") / "web").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in CONTENT_TYPES:
            body = file.read_bytes()
            yield file.name, (CONTENT_TYPES[suffix], body, f'"{hashlib.sha256(body).hexdigest()[:16]}"')


assert {EVENTS, LIFECYCLE} == {"e", "l"}, "the routes of messages and causes contain these names"
