"""The dashboard's answers, asked as a browser asks: a real gateway on a real bus, real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from support import NatsServer, eventually
from support.gateway import FED, TOKEN, run_gateway
from support.simulated_federation import TASK, TRACE, SimulatedFederation
from yarl import URL

from fedbus.agents.gateway import feed, http_api
from fedbus.agents.gateway.agent import GatewayBindError
from fedbus.agents.gateway.feed import Cursor, InvalidCursor
from fedbus.agents.gateway.records import MAX_ITEMS, MAX_TEXT_CHARS, to_jsonable, truncate
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.client import ClientDeclined, Heartbeat
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.envelope import uuid7
from fedbus.contracts.run import RunStarted, RunStopped, StartRun, StopRun


@pytest.fixture
async def told(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, trace=TRACE)


def make_declined(number: int, reason: str = "the battery is at 10 %") -> ClientDeclined:
    return ClientDeclined(task=TASK, client=f"c{number}", run="mnist-1", reason=reason)


class FeedReader:
    """A browser's line: what it was told, and the cursor that it would come back with."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.cursor = ""
        self.others: list[tuple[str, Any]] = []
        self.told: list[dict[str, Any]] = []

    async def until(self, records: int) -> list[dict[str, Any]]:
        """Read until it was told so many."""
        async with asyncio.timeout(30):
            while len(self.told) < records:
                await self.read()
        return self.told

    async def read(self) -> None:
        name, cursor, data = "message", "", ""
        while line := (await self._response.content.readline()).decode().rstrip("\n"):
            field, _, value = line.partition(": ")
            match field:
                case "event":
                    name = value
                case "id":
                    cursor = value
                case "data":
                    data = value
        if name != "message":
            self.others.append((name, json.loads(data)))
        elif data:
            self.cursor = cursor
            self.told += json.loads(data)


@asynccontextmanager
async def open_feed(url: str, after: str, *, last_id: str | None = None) -> AsyncIterator[FeedReader]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with (
        aiohttp.ClientSession(read_bufsize=2**22) as session,
        session.get(f"{url}/api/feed", params={"after": after}, headers=headers) as response,
    ):
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        yield FeedReader(response)


async def get_json(url: str, path: str, **options: Any) -> Any:
    async with aiohttp.ClientSession() as session, session.get(f"{url}{path}", **options) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def post_action(url: str, word: str, wish: object, **headers: str) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/actions/{word}", json=wish, headers=headers) as response,
    ):
        return response.status, await response.json()


# --- the feed -------------------------------------------------------------------------------------


async def test_the_state_is_the_last_word_on_every_subject(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    await told.clients(["c1", "c2"])
    await told.say(make_declined(1, "before"))
    await told.say(make_declined(1, "after"))
    async with run_gateway(nats.url) as url:
        state = await get_json(url, "/api/state")
    reasons = [one["body"]["reason"] for one in state["records"] if one["word"] == "declined"]
    assert reasons == ["after"]
    moves = {one["subject"]: one["body"]["target"] for one in state["records"] if one["word"] == "transition"}
    assert moves[f"fedbus.test.life.client.c2.{TASK}"] == "serving"
    assert len(moves) == 6
    assert set(state["presence"]["heard"]) == {"c1", "c2"}


async def test_what_comes_after_the_state_is_told_whichever_stream_it_is_in(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url:
        cursor = (await get_json(url, "/api/state"))["cursor"]
        async with open_feed(url, cursor) as line:
            await told.say(make_declined(1))
            await told.server()
            words = [one["word"] for one in await line.until(2)]
    assert sorted(words) == ["declined", "transition"]


async def test_a_browser_that_comes_back_misses_nothing_and_hears_nothing_twice(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url:
        async with open_feed(url, "e0-l0") as line:
            for number in range(5):
                await told.say(make_declined(number))
            await told.server()
            first = {(one["s"], one["n"]) for one in await line.until(6)}
        for number in range(5, 8):
            await told.say(make_declined(number))
        async with open_feed(url, "e0-l0", last_id=line.cursor) as again:
            then = {(one["s"], one["n"]) for one in await again.until(3)}
    assert first == {("e", number) for number in range(1, 6)} | {("l", 1)}
    assert then == {("e", 6), ("e", 7), ("e", 8)}


async def test_a_cursor_is_good_at_another_gateway_too(told: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url, open_feed(url, "e0-l0") as line:
        await told.say(make_declined(1))
        await line.until(1)
    await told.say(make_declined(2))
    async with run_gateway(nats.url) as another, open_feed(another, "e0-l0", last_id=line.cursor) as again:
        assert [one["n"] for one in await again.until(1)] == [2]


async def test_what_is_no_longer_in_memory_is_read_from_the_streams(
    told: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_RECORDS", 3)
    async with run_gateway(nats.url) as url:
        await get_json(url, "/api/state")
        for number in range(10):
            await told.say(make_declined(number))

        async def it_has_come() -> bool:
            return str((await get_json(url, "/api/state"))["cursor"]).startswith("e10-")

        await eventually(it_has_come)
        async with open_feed(url, "e2-l0") as line:
            assert [one["n"] for one in await line.until(8)] == list(range(3, 11))


@pytest.mark.parametrize("cursor", ["e999-l0", "e0-l999"])
async def test_a_cursor_of_another_life_begins_anew(
    told: SimulatedFederation, nats: NatsServer, cursor: str
) -> None:
    async with run_gateway(nats.url) as url, open_feed(url, cursor) as line:
        await eventually(lambda: _read_until(line, "lost"))


async def _read_until(line: FeedReader, event: str) -> bool:
    await line.read()
    return any(name == event for name, _ in line.others)


async def test_updates_are_told_together_and_not_one_by_one(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url, open_feed(url, "e0-l0") as line:
        await asyncio.gather(*(told.say(make_declined(number)) for number in range(200)))
        batches = 0
        while len(line.told) < 200:
            before = len(line.told)
            await line.read()
            batches += len(line.told) > before
    assert batches < 40


async def test_a_browser_that_never_reads_is_let_go_and_costs_nobody_anything(
    told: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_api, "WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_api, "MAX_BROWSERS", 1)
    async with run_gateway(nats.url) as url:
        await get_json(url, "/api/state")
        at = urlsplit(url)
        reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=1024)
        writer.write(f"GET /api/feed?after=e0-l0 HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        await reader.readline()
        long = "x" * 1900
        for _ in range(30):  # more than the sockets between us hold
            await asyncio.gather(*(told.say(make_declined(number, long)) for number in range(200)))

        async def there_is_room_again() -> bool:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/api/feed") as response:
                return response.status == 200

        await eventually(there_is_room_again, within_s=60)
        writer.transport.abort()


async def test_a_gateway_that_starts_knows_at_once_how_the_devices_said_last_that_they_are(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    async with Bus.connect(nats.url, Identity(FED, "device-monitor", "c7")) as device:
        for cpu in (0.9, 0.5):
            await device.publish(DeviceReport(task=TASK, client="c7", cpu=cpu, memory=0.25, disk=0.1))
        await eventually(lambda: has_stored_report(told.bus), within_s=30)
    async with run_gateway(nats.url) as url:
        presence = (await get_json(url, "/api/state"))["presence"]
    assert presence["devices"]["c7"]["cpu"] == 0.5
    assert "c7" in presence["heard"]


async def has_stored_report(bus: Bus) -> bool:
    return [one.message.cpu for one in await bus.latest(DeviceReport)] == [0.5]  # type: ignore[attr-defined]


async def test_presence_is_told_as_it_comes_though_no_record_holds_it(
    told: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_api, "PRESENCE_INTERVAL_S", 0.1)
    async with (
        run_gateway(nats.url) as url,
        open_feed(url, "e0-l0") as line,
        Bus.connect(nats.url, Identity(FED, "device-monitor", "c7")) as device,
    ):
        await get_json(url, "/api/state")  # from here on the gateway overhears
        await device.publish(Heartbeat(task=TASK, client="c7", run="mnist-1"))
        await device.publish(DeviceReport(task=TASK, client="c7", cpu=0.5, memory=0.25, disk=0.1))

        async def reported() -> bool:
            await line.read()
            return any(seen["devices"].get("c7", {}).get("cpu") == 0.5 for _, seen in line.others)

        await eventually(reported)


async def test_a_gateway_that_is_there_first_waits_for_its_federation(nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url:
        async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
            await bus.create_streams()
            await SimulatedFederation(bus).clients(["c1"])
        assert len((await get_json(url, "/api/state"))["records"]) == 3


async def test_a_run_is_told_from_its_request_on(told: SimulatedFederation, nats: NatsServer) -> None:
    await told.clients(["c1"])
    told.passes(5)
    run = told.run(1, 0)
    await told.move(run, "recruiting_started", "requested", "recruiting")
    await told.say(make_declined(1))
    await told.say(ClientDeclined(task=TASK, client="c1", run="mnist-2", reason="another run's"))
    async with run_gateway(nats.url) as url:
        told_of = await get_json(url, "/api/runs/mnist-1")
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/runs/no-such") as response:
            assert response.status == 404
    assert [one["word"] for one in told_of] == ["transition", "declined"]


async def test_a_trace_and_a_whole_message_are_read_again(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    await told.say(make_declined(1, "x" * (MAX_TEXT_CHARS + 1)))
    async with run_gateway(nats.url) as url:
        (short,) = await get_json(url, "/api/recent")
        assert short["body"]["reason"].endswith(f"… ({MAX_TEXT_CHARS + 1} characters)")
        whole = await get_json(url, "/api/messages/e/1")
        assert whole["body"]["reason"] == "x" * (MAX_TEXT_CHARS + 1)
        chain = await get_json(url, f"/api/traces/{TRACE}", params={"around": told.clock.isoformat()})
        assert [one["n"] for one in chain] == [1]


async def test_what_led_to_a_message_is_a_chain_back_to_what_began_it(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    run = told.run(1, 0)
    began = await told.move(run, "requested", "", "requested")
    with cause_scope(began):
        begun = await told.say(make_declined(1, "the first step"))
        await told.say(make_declined(2, "what else came of it"))
    for number in range(300):
        await told.say(make_declined(number, "of no account"))
    with cause_scope(begun):
        step = await told.move(run, "recruiting_started", "requested", "recruiting")
    with cause_scope(step):
        await told.say(make_declined(3, "the end"))
    async with run_gateway(nats.url) as url:
        found = await get_json(url, "/api/causes/e/303")
        assert (await get_json(url, "/api/causes/l/1"))["chain"][0]["id"] == began
    assert found["whole"]
    assert [one["body"].get("reason") or one["body"]["event"] for one in found["chain"]] == [
        "requested",
        "the first step",
        "recruiting_started",
        "the end",
    ]


async def test_a_chain_whose_beginning_nobody_holds_says_so_and_one_in_a_circle_ends(
    told: SimulatedFederation, nats: NatsServer
) -> None:
    for cause in (uuid7(), "no id of ours"):
        with cause_scope(cause):
            await told.say(make_declined(1))
    async with run_gateway(nats.url) as url:
        for number in (1, 2):
            found = await get_json(url, f"/api/causes/e/{number}")
            assert (len(found["chain"]), found["whole"]) == (1, False)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/api/messages/e/0", "a sequence is a number from 1 on, of at most 15 digits: not '0'"),
        ("/api/messages/e/" + "9" * 5000, "a sequence is a number from 1 on"),
        ("/api/messages/l/%C2%B2", "a sequence is a number from 1 on"),
        ("/api/causes/l/-1", "a sequence is a number from 1 on"),
        ("/api/recent?limit=" + "9" * 5000, "limit is a number from 1 on"),
        ("/api/recent?limit=%D9%A3", "limit is a number from 1 on"),
        (
            f"/api/traces/{TRACE}?around=0001-01-01T00:00:00Z",
            "around: '0001-01-01T00:00:00Z' is no time from",
        ),
        (f"/api/traces/{TRACE}?around=9999-12-31T23:59:59Z", "is no time from 1970 to 9000: write"),
        (f"/api/traces/{TRACE}?around=yesterday", "around: 'yesterday' is no time"),
        ("/api/feed?after=" + "9" * 5000, "is no cursor: it looks like e812-l344"),
    ],
)
async def test_a_question_that_makes_no_sense_is_answered_by_what_is_wrong_with_it(
    told: SimulatedFederation, nats: NatsServer, path: str, why: str
) -> None:
    async with (
        run_gateway(nats.url) as url,
        aiohttp.ClientSession() as session,
        session.get(URL(f"{url}{path}", encoded=True)) as response,
    ):
        status, answer = response.status, await response.json()
    assert status == 400
    assert why in answer["error"]
    assert len(answer["error"]) < 200


# --- who may -----------------------------------------------------------------------------------------


async def test_a_foreign_name_is_not_answered(told: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url, hosts=["board.example"]) as url, aiohttp.ClientSession() as session:
        for host, status in (
            ("evil.example", 421),
            ("board.example:80", 200),
            ("localhost", 200),
            ("[", 421),
        ):
            async with session.get(f"{url}/api/about", headers={"Host": host}) as response:
                assert response.status == status, host


async def test_every_answer_forbids_foreign_scripts(told: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url, aiohttp.ClientSession() as session:
        for path in ("/", "/app.js", "/style.css", "/icon.svg", "/api/about", "/api/nothing", "/../cli.py"):
            async with session.get(f"{url}{path}") as response:
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'; script-src 'self'" in policy
                assert "unsafe" not in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_without_a_token_it_only_shows(told: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url:
        status, answer = await post_action(url, "start_run", {"task": TASK}, Authorization="Bearer ")
        assert status == 403
        assert "FEDBUS_GATEWAY_TOKEN" in answer["error"]
        assert (await get_json(url, "/api/about"))["acts"] is False


async def test_the_token_lets_runs_be_started_and_stopped(
    told: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.agents.gateway.access_control.WRONG_TOKEN_DELAY_S", 0.0)
    wishes: list[object] = []

    async def start(wish: StartRun) -> RunStarted:
        wishes.append(wish)
        return RunStarted(run="mnist-1")

    async def stop(wish: StopRun) -> RunStopped:
        wishes.append(wish)
        return RunStopped(run=wish.run)

    right = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        Bus.connect(nats.url, Identity(FED, "workflow-scheduler")) as scheduler,
        scheduler.serve({StartRun: start, StopRun: stop}, task=TASK, version="1.0.0"),
        run_gateway(nats.url, token=TOKEN) as url,
    ):
        wish = {"task": TASK, "rounds": 2}
        assert await post_action(url, "start_run", wish, **right) == (200, {"run": "mnist-1"})
        assert (await post_action(url, "stop_run", {"task": TASK, "run": "mnist-1"}, **right))[0] == 200
        assert await post_action(url, "../token", {}, **right) == (200, {})
        assert (await post_action(url, "../token", {}, Authorization="Bearer guessed"))[0] == 401
        assert (await post_action(url, "start_run", wish))[0] == 401
        assert (await post_action(url, "start_run", wish, Authorization=f"Bearer {TOKEN}x"))[0] == 401
        assert (await post_action(url, "start_run", wish, Origin="http://evil.example", **right))[0] == 403
        assert (await post_action(url, "open_run", wish, **right))[0] == 404
        status, answer = await post_action(url, "start_run", {"task": TASK, "rounds": 0}, **right)
        assert (status, answer["error"]) == (400, "rounds: Input should be greater than or equal to 1")
        status, answer = await post_action(url, "start_run", {"task": TASK, "rounds": 10**30}, **right)
        assert (status, answer["error"]) == (400, "StartRun has a number of more than 64 bits")
    assert wishes == [StartRun(task=TASK, rounds=2), StopRun(task=TASK, run="mnist-1")]


async def test_a_port_that_is_taken_is_named(told: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url:
        port = urlsplit(url).port or 0
        with pytest.raises(GatewayBindError, match=f"cannot serve the dashboard on 127.0.0.1:{port}"):
            async with run_gateway(nats.url, port=port):
                pass


# --- records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "e1", "e1-l", "e-1-l2", "l1-e2", "e1-l٣", "e1-l2; x", "e" + "9" * 20 + "-l1"]
)
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)


def test_a_cursor_reads_as_it_is_written() -> None:
    assert Cursor.parse(str(Cursor(812, 344))) == Cursor(812, 344)


def test_what_is_long_is_cut_and_what_json_lacks_is_said_in_words() -> None:
    said = to_jsonable({"a": float("nan"), "b": b"\x00\xff", "c": "half \ud800", "d": [1, None]})
    assert said == {"a": "nan", "b": "<2 bytes: 00ff>", "c": "half ?", "d": [1, None]}
    assert truncate({"a": list(range(MAX_ITEMS + 2))})["a"][-1] == "… 2 more"
