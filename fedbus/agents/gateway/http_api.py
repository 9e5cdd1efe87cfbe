"""The dashboard over HTTP: its files, the state, the feed, and the few things that can be asked for.

GET  /                         the pages; their files lie in `fedbus/web`
GET  /api/about                which federation, which version, whether anything can be changed
GET  /api/state                the last word on every subject, and the cursor that it goes up to
GET  /api/feed?after=CURSOR    what comes, as server-sent events; `Last-Event-ID` goes before *after*
GET  /api/recent?limit=N       what was said last
GET  /api/runs/RUN             what happened between the beginning and the end of a run
GET  /api/traces/ID            what is remembered of a trace
GET  /api/messages/e/SEQ       one message with all that it says
GET  /api/causes/e/SEQ         what led to it, back to what began it all
GET  /api/models/TASK          the versions in the model repository
POST /api/token                whether the token is the right one
POST /api/actions/WORD         one of `ACTIONS`: with the token

A question that makes no sense is answered by 400 and a line that says what is wrong with it.
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
from fedbus.contracts.message import Request
from fedbus.contracts.run import StartRun, StopRun
from fedbus.contracts.transition import LIFECYCLES

BATCH_PAUSE_S: Final = 0.25
"""A browser is told at most every so often."""
PRESENCE_INTERVAL_S: Final = 5.0
"""So often it is told who was heard of, and by that, that the line is still there."""
BEGINNING_OF_TIME: Final = datetime.min.replace(tzinfo=UTC)
WRITE_TIMEOUT_S: Final = 15.0
"""A browser that has not taken what it was sent within this is let go; it comes back with its cursor."""
READY_TIMEOUT_S: Final = 10.0
REPLY_TIMEOUT_S: Final = 15.0
MAX_BROWSERS: Final = 64
MAX_RECENT: Final = 5_000
MAX_DIGITS: Final = 15
FIRST_YEAR: Final = 1970
LAST_YEAR: Final = 9000
"""What a stream can be asked about."""
MESSAGE_GONE: Final = "the stream no longer holds this message"
MAX_BODY_BYTES: Final = 64 * 1024

ACTIONS: Final[Mapping[str, type[Request]]] = {
    kind.word: kind for kind in (StartRun, StopRun, PromoteModel, RollBackModel, RollOutCode, RevertCode)
}
"""What can be asked for from the dashboard."""
CONTENT_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}

DescribeModels = Callable[[str], Awaitable[dict[str, Any]]]

log = structlog.get_logger("fedbus.gateway")


class HttpApi:
    """What the dashboard answers. *models* tells of a task's model repository; *trace_url* leads to a trace."""

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
                web.get("/", self._file),
                web.get("/api/about", self._about),
                web.get("/api/state", self._state),
                web.get("/api/feed", self._tell),
                web.get("/api/recent", self._recent),
                web.get("/api/runs/{run}", self._run),
                web.get("/api/traces/{trace:[0-9a-f]{32}}", self._trace),
                web.get("/api/messages/{stream:[el]}/{sequence}", self._message),
                web.get("/api/causes/{stream:[el]}/{sequence}", self._causes),
                web.get("/api/models/{task}", self._versions),
                web.post("/api/token", self._unlock),
                web.post("/api/actions/{word}", self._act),
                web.get(r"/{name:[a-z_]+\.(?:js|css|svg)}", self._file),
            ]
        )
        return application

    # --- files ------------------------------------------------------------------------------------

    async def _file(self, request: web.Request) -> web.StreamResponse:
        found = self._files.get(request.match_info.get("name", "index.html"))
        if found is None:
            raise web.HTTPNotFound(text="there is no such file here")
        kind, body, tag = found
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    # --- what is so -------------------------------------------------------------------------------

    async def _about(self, _: web.Request) -> web.Response:
        lives = {
            kind: {"waits": {str(state): wait.waiting_for for state, wait in one.waits.items()}}
            for kind, one in LIFECYCLES.items()
        }
        return web.json_response(
            {
                "federation": self._bus.fed,
                "version": __version__,
                "acts": self._guard.acts,
                "trace_url": self._trace_url,
                "lifecycles": lives,
            }
        )

    async def _state(self, _: web.Request) -> web.Response:
        await self._ready()
        cursor = self._feed.position
        records = ",".join(one.json for one in self._feed.standing())
        presence = json.dumps(self._feed.presence(BEGINNING_OF_TIME))
        body = f'{{"cursor":"{cursor}","presence":{presence},"records":[{records}]}}'
        response = web.Response(text=body, content_type="application/json")
        response.enable_compression()
        return response

    async def _recent(self, request: web.Request) -> web.Response:
        await self._ready()
        limit = _parse_number(request.query.get("limit", "500"), "limit")
        return _records_response(self._feed.newest(min(limit, MAX_RECENT)))

    async def _run(self, request: web.Request) -> web.Response:
        found = await self._history.of_run(request.match_info["run"])
        if found is None:
            raise web.HTTPNotFound(text="there is no such run in the log")
        return _records_response(found)

    async def _trace(self, request: web.Request) -> web.Response:
        await self._ready()
        trace = request.match_info["trace"]
        return _records_response(
            await self._history.of_trace(trace, _parse_since(request)) or self._feed.records_in_trace(trace)
        )

    async def _message(self, request: web.Request) -> web.Response:
        found = await self._history.message(*_parse_position(request))
        if found is None:
            raise web.HTTPNotFound(text=MESSAGE_GONE)
        return web.Response(text=found.json, content_type="application/json")

    async def _causes(self, request: web.Request) -> web.Response:
        found = await self._history.causes(*_parse_position(request))
        if found is None:
            raise web.HTTPNotFound(text=MESSAGE_GONE)
        chain, whole = found
        text = f'{{"chain":[{",".join(one.json for one in chain)}],"whole":{json.dumps(whole)}}}'
        return web.Response(text=text, content_type="application/json")

    async def _versions(self, request: web.Request) -> web.Response:
        return web.json_response(await self._models(request.match_info["task"]))

    async def _ready(self) -> None:
        try:
            await wait_within(READY_TIMEOUT_S, self._feed.ready.wait())
        except TimeoutError:
            raise web.HTTPServiceUnavailable(
                text=f"federation {self._bus.fed} has no streams yet: start its server with fedbus up"
            ) from None

    # --- what comes -------------------------------------------------------------------------------

    async def _tell(self, request: web.Request) -> web.StreamResponse:
        cursor = _parse_cursor(request) or self._feed.position
        await self._ready()
        if self._browsers >= MAX_BROWSERS:
            raise web.HTTPServiceUnavailable(text=f"{MAX_BROWSERS} browsers look already: close one")
        response = web.StreamResponse(headers={**SECURITY_HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._browsers += 1
        try:
            await self._tell_all(response, cursor)
        except (TimeoutError, ConnectionError):  # it reads no more: when it does again, it has its cursor
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._browsers -= 1
        return response

    async def _tell_all(self, response: web.StreamResponse, cursor: Cursor) -> None:
        await _write(response, b"retry: 1000\n\n")
        news = aiter(self._feed.follow(cursor))
        coming = asyncio.ensure_future(anext(news))
        stopped = asyncio.ensure_future(self._stop.wait())
        told_of = datetime.now(UTC)
        try:
            while not stopped.done():
                await asyncio.wait(
                    [coming, stopped], timeout=PRESENCE_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
                )
                if (now := datetime.now(UTC)) - told_of >= timedelta(seconds=PRESENCE_INTERVAL_S):
                    await _write(response, _presence_event(self._feed.presence(told_of)))
                    told_of = now
                if coming.done():
                    records, cursor = coming.result()
                    await _write(response, _batch_event(records, cursor))
                    await asyncio.wait([stopped], timeout=BATCH_PAUSE_S)
                    coming = asyncio.ensure_future(anext(news))
        except CursorExpired:
            await _write(response, b"event: lost\ndata: {}\n\n")
        finally:
            for task in (coming, stopped):
                task.cancel()
            await asyncio.gather(coming, stopped, return_exceptions=True)

    # --- what is asked for ----------------------------------------------------------------------------

    async def _unlock(self, request: web.Request) -> web.Response:
        return await self._guard.refusal(request) or web.json_response({})

    async def _act(self, request: web.Request) -> web.Response:
        if (refusal := await self._guard.refusal(request)) is not None:
            return refusal
        kind = ACTIONS.get(request.match_info["word"])
        if kind is None:
            raise web.HTTPNotFound(text=f"choose one of {', '.join(ACTIONS)}")
        wish = await _parse_action(kind, request)
        log.info("asked for", word=wish.word, task=wish.task, by=request.remote)
        try:
            answer = await self._bus.request(wish, timeout_s=REPLY_TIMEOUT_S)
        except RequestRefused as refused:
            return web.json_response({"error": refused.reason}, status=409)
        except NoResponse as silence:
            return web.json_response({"error": str(silence)}, status=503)
        return web.json_response(answer.model_dump(mode="json"))


async def _parse_action(kind: type[Request], request: web.Request) -> Request:
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    try:
        wish = kind.model_validate_json(await request.read())
        pack(wish)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise web.HTTPBadRequest(text=f"{where}: {first['msg']}".removeprefix(": ")) from None
    except ValueError as error:  # it could not be sent
        raise web.HTTPBadRequest(text=str(error)) from None
    return wish


def _batch_event(records: list[FeedRecord], cursor: Cursor) -> bytes:
    return f"id: {cursor}\ndata: [{','.join(one.json for one in records)}]\n\n".encode()


def _presence_event(presence: dict[str, Any]) -> bytes:
    return f"event: heard\ndata: {json.dumps(presence)}\n\n".encode()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Send *data*; raises TimeoutError where nobody takes it."""
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(data)


def _records_response(records: list[FeedRecord]) -> web.Response:
    response = web.Response(
        text=f"[{','.join(one.json for one in records)}]", content_type="application/json"
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
    """A little before the moment that is asked about, if any is."""
    text = request.query.get("around")
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None or not FIRST_YEAR <= at.year <= LAST_YEAR:
        raise web.HTTPBadRequest(
            text=f"around: {text[:40]!r} is no time from {FIRST_YEAR} to {LAST_YEAR}: write 2026-03-14T12:00:00Z"
        )
    return at - timedelta(minutes=10)


def _parse_position(request: web.Request) -> tuple[str, int]:
    """The stream and the sequence in it that are asked about."""
    return request.match_info["stream"], _parse_number(request.match_info["sequence"], "a sequence")


def _parse_number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) > 0):
        raise web.HTTPBadRequest(
            text=f"{what} is a number from 1 on, of at most {MAX_DIGITS} digits: not {text[:40]!r}"
        )
    return int(text)


def _load_files() -> Iterator[tuple[str, tuple[str, bytes, str]]]:
    """The pages' files, with their type and a tag that changes with them."""
    for file in (resources.files("fedbus") / "web").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in CONTENT_TYPES:
            body = file.read_bytes()
            yield file.name, (CONTENT_TYPES[suffix], body, f'"{hashlib.sha256(body).hexdigest()[:16]}"')


assert {EVENTS, LIFECYCLE} == {"e", "l"}, "the route of a message spells them"
