"""The HTTP API and feed of the gateway, over real sockets, with a real nats-server."""

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
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, trace_id=TRACE)


def make_declined(number: int, reason: str = "the battery is at 10 %") -> ClientDeclined:
    return ClientDeclined(task=TASK, client=f"c{number}", run="mnist-1", reason=reason)


class FeedReader:
    """A reader of the event feed, like a browser: its records, other events and cursor."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.cursor = ""
        self.other_events: list[tuple[str, Any]] = []
        self.records: list[dict[str, Any]] = []

    async def read_until(self, count: int) -> list[dict[str, Any]]:
        """Read until there are *count* records."""
        async with asyncio.timeout(30):
            while len(self.records) < count:
                await self.read()
        return self.records

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
                case _:
                    pass
        if name != "message":
            self.other_events.append((name, json.loads(data)))
        elif data:
            self.cursor = cursor
            self.records += json.loads(data)


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


async def post_action(url: str, name: str, action: object, **headers: str) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/actions/{name}", json=action, headers=headers) as response,
    ):
        return response.status, await response.json()


# --- the feed -------------------------------------------------------------------------------------


async def test_the_state_has_the_last_message_of_each_subject(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.create_clients(["c1", "c2"])
    await simulation.publish(make_declined(1, "before"))
    await simulation.publish(make_declined(1, "after"))
    async with run_gateway(nats.url) as url:
        state = await get_json(url, "/api/state")
    reasons = [one["body"]["reason"] for one in state["records"] if one["word"] == "declined"]
    assert reasons == ["after"]
    moves = {one["subject"]: one["body"]["target"] for one in state["records"] if one["word"] == "transition"}
    assert moves[f"fedbus.test.life.client.c2.{TASK}"] == "serving"
    assert len(moves) == 6
    assert set(state["presence"]["heard"]) == {"c1", "c2"}


async def test_the_feed_continues_both_streams_after_the_state(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url:
        cursor = (await get_json(url, "/api/state"))["cursor"]
        async with open_feed(url, cursor) as line:
            await simulation.publish(make_declined(1))
            await simulation.create_server()
            words = [one["word"] for one in await line.read_until(2)]
    assert sorted(words) == ["declined", "transition"]


async def test_a_browser_that_reconnects_gets_each_record_once(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url:
        async with open_feed(url, "e0-l0") as line:
            for number in range(5):
                await simulation.publish(make_declined(number))
            await simulation.create_server()
            first = {(one["s"], one["n"]) for one in await line.read_until(6)}
        for number in range(5, 8):
            await simulation.publish(make_declined(number))
        async with open_feed(url, "e0-l0", last_id=line.cursor) as second_line:
            second = {(one["s"], one["n"]) for one in await second_line.read_until(3)}
    assert first == {("e", number) for number in range(1, 6)} | {("l", 1)}
    assert second == {("e", 6), ("e", 7), ("e", 8)}


async def test_a_cursor_is_valid_at_another_gateway(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url, open_feed(url, "e0-l0") as line:
        await simulation.publish(make_declined(1))
        await line.read_until(1)
    await simulation.publish(make_declined(2))
    async with (
        run_gateway(nats.url) as other_url,
        open_feed(other_url, "e0-l0", last_id=line.cursor) as other_line,
    ):
        assert [one["n"] for one in await other_line.read_until(1)] == [2]


async def test_records_beyond_the_buffer_are_read_from_the_streams(
    simulation: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_RECORDS", 3)
    async with run_gateway(nats.url) as url:
        await get_json(url, "/api/state")
        for number in range(10):
            await simulation.publish(make_declined(number))

        async def is_received() -> bool:
            return str((await get_json(url, "/api/state"))["cursor"]).startswith("e10-")

        await eventually(is_received)
        async with open_feed(url, "e2-l0") as line:
            assert [one["n"] for one in await line.read_until(8)] == list(range(3, 11))


@pytest.mark.parametrize("cursor", ["e999-l0", "e0-l999"])
async def test_a_cursor_beyond_the_streams_is_expired(
    simulation: SimulatedFederation, nats: NatsServer, cursor: str
) -> None:
    async with run_gateway(nats.url) as url, open_feed(url, cursor) as line:
        await eventually(lambda: _read_until(line, "lost"))


async def _read_until(line: FeedReader, event: str) -> bool:
    await line.read()
    return any(name == event for name, _ in line.other_events)


async def test_updates_are_sent_in_batches(simulation: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url, open_feed(url, "e0-l0") as line:
        await asyncio.gather(*(simulation.publish(make_declined(number)) for number in range(200)))
        batches = 0
        while len(line.records) < 200:
            before = len(line.records)
            await line.read()
            batches += len(line.records) > before
    assert batches < 40


async def test_a_browser_that_does_not_read_is_disconnected(
    simulation: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
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
        for _ in range(30):  # more than the socket buffers can store
            await asyncio.gather(*(simulation.publish(make_declined(number, long)) for number in range(200)))

        async def has_a_free_place() -> bool:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/api/feed") as response:
                return response.status == 200

        await eventually(has_a_free_place, within_s=60)
        writer.transport.abort()


async def test_a_new_gateway_has_the_last_report_of_each_device(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    async with Bus.connect(nats.url, Identity(FED, "device-monitor", "c7")) as device:
        for cpu in (0.9, 0.5):
            await device.publish(DeviceReport(task=TASK, client="c7", cpu=cpu, memory=0.25, disk=0.1))
        await eventually(lambda: has_stored_report(simulation.bus), within_s=30)
    async with run_gateway(nats.url) as url:
        presence = (await get_json(url, "/api/state"))["presence"]
    assert presence["devices"]["c7"]["cpu"] == 0.5
    assert "c7" in presence["heard"]


async def has_stored_report(bus: Bus) -> bool:
    return [one.message.cpu for one in await bus.last_per_device(DeviceReport)] == [0.5]  # type: ignore[attr-defined]  # the bus returns the base class of messages


async def test_heartbeats_and_device_reports_reach_the_browser(
    simulation: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_api, "PRESENCE_INTERVAL_S", 0.1)
    async with (
        run_gateway(nats.url) as url,
        open_feed(url, "e0-l0") as line,
        Bus.connect(nats.url, Identity(FED, "device-monitor", "c7")) as device,
    ):
        await get_json(url, "/api/state")  # the gateway is now subscribed
        await device.publish(Heartbeat(task=TASK, client="c7", run="mnist-1"))
        await device.publish(DeviceReport(task=TASK, client="c7", cpu=0.5, memory=0.25, disk=0.1))

        async def reported() -> bool:
            await line.read()
            return any(
                presence["devices"].get("c7", {}).get("cpu") == 0.5 for _, presence in line.other_events
            )

        await eventually(reported)


async def test_a_gateway_that_starts_first_waits_for_the_federation(nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url:
        async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
            await bus.create_streams()
            await SimulatedFederation(bus).create_clients(["c1"])
        assert len((await get_json(url, "/api/state"))["records"]) == 3


async def test_a_run_has_its_messages_since_its_request(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.create_clients(["c1"])
    simulation.advance(5)
    run = simulation.make_run_facts(1, 0)
    await simulation.transition(run, "recruiting_started", "requested", "recruiting")
    await simulation.publish(make_declined(1))
    await simulation.publish(ClientDeclined(task=TASK, client="c1", run="mnist-2", reason="another run"))
    async with run_gateway(nats.url) as url:
        records = await get_json(url, "/api/runs/mnist-1")
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/runs/no-such") as response:
            assert response.status == 404
    assert [one["word"] for one in records] == ["transition", "declined"]


async def test_a_trace_and_a_full_message_can_be_read(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    await simulation.publish(make_declined(1, "x" * (MAX_TEXT_CHARS + 1)))
    async with run_gateway(nats.url) as url:
        (short,) = await get_json(url, "/api/recent")
        assert short["body"]["reason"].endswith(f"… ({MAX_TEXT_CHARS + 1} characters)")
        whole = await get_json(url, "/api/messages/e/1")
        assert whole["body"]["reason"] == "x" * (MAX_TEXT_CHARS + 1)
        chain = await get_json(url, f"/api/traces/{TRACE}", params={"around": simulation.clock.isoformat()})
        assert [one["n"] for one in chain] == [1]


async def test_the_causes_of_a_message_lead_back_to_the_root_cause(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    run = simulation.make_run_facts(1, 0)
    root_id = await simulation.transition(run, "requested", "", "requested")
    with cause_scope(root_id):
        first_step_id = await simulation.publish(make_declined(1, "the first step"))
        await simulation.publish(make_declined(2, "another effect of the root cause"))
    for number in range(300):
        await simulation.publish(make_declined(number, "unrelated"))
    with cause_scope(first_step_id):
        second_step_id = await simulation.transition(run, "recruiting_started", "requested", "recruiting")
    with cause_scope(second_step_id):
        await simulation.publish(make_declined(3, "the end"))
    async with run_gateway(nats.url) as url:
        found = await get_json(url, "/api/causes/e/303")
        assert (await get_json(url, "/api/causes/l/1"))["chain"][0]["id"] == root_id
    assert found["whole"]
    assert [one["body"].get("reason") or one["body"]["event"] for one in found["chain"]] == [
        "requested",
        "the first step",
        "recruiting_started",
        "the end",
    ]


async def test_a_chain_without_its_root_cause_is_incomplete(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    for cause in (uuid7(), "not a UUID"):
        with cause_scope(cause):
            await simulation.publish(make_declined(1))
    async with run_gateway(nats.url) as url:
        for number in (1, 2):
            found = await get_json(url, f"/api/causes/e/{number}")
            assert (len(found["chain"]), found["whole"]) == (1, False)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/api/messages/e/0", "invalid sequence '0'. Use a number from 1, with at most 15 digits"),
        ("/api/messages/e/" + "9" * 5000, "invalid sequence '999"),
        ("/api/messages/l/%C2%B2", "invalid sequence '²'"),
        ("/api/causes/l/-1", "invalid sequence '-1'"),
        ("/api/recent?limit=" + "9" * 5000, "invalid limit '999"),
        ("/api/recent?limit=%D9%A3", "invalid limit '٣'"),
        (
            f"/api/traces/{TRACE}?around=0001-01-01T00:00:00Z",
            "invalid time '0001-01-01T00:00:00Z' in around.",
        ),
        (f"/api/traces/{TRACE}?around=9999-12-31T23:59:59Z", "with a year from 1970 to 9000"),
        (f"/api/traces/{TRACE}?around=yesterday", "invalid time 'yesterday' in around"),
        ("/api/feed?after=" + "9" * 5000, "Use the form e812-l344"),
    ],
)
async def test_an_invalid_parameter_is_answered_with_its_error(
    simulation: SimulatedFederation, nats: NatsServer, path: str, error: str
) -> None:
    async with (
        run_gateway(nats.url) as url,
        aiohttp.ClientSession() as session,
        session.get(URL(f"{url}{path}", encoded=True)) as response,
    ):
        status, answer = response.status, await response.json()
    assert status == 400
    assert error in answer["error"]
    assert len(answer["error"]) < 200


# --- access control ----------------------------------------------------------------------------------


async def test_an_unknown_host_name_is_rejected(simulation: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url, hosts=["board.example"]) as url, aiohttp.ClientSession() as session:
        for host, status in (
            ("evil.example", 421),
            ("board.example:80", 200),
            ("localhost", 200),
            ("[", 421),
        ):
            async with session.get(f"{url}/api/about", headers={"Host": host}) as response:
                assert response.status == status, host


async def test_every_response_forbids_foreign_scripts(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url, aiohttp.ClientSession() as session:
        for path in ("/", "/app.js", "/style.css", "/icon.svg", "/api/about", "/api/nothing", "/../cli.py"):
            async with session.get(f"{url}{path}") as response:
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'; script-src 'self'" in policy
                assert "unsafe" not in policy
                assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_without_a_token_the_dashboard_is_read_only(
    simulation: SimulatedFederation, nats: NatsServer
) -> None:
    async with run_gateway(nats.url) as url:
        status, answer = await post_action(url, "start_run", {"task": TASK}, Authorization="Bearer ")
        assert status == 403
        assert "FEDBUS_GATEWAY_TOKEN" in answer["error"]
        assert (await get_json(url, "/api/about"))["acts"] is False


async def test_runs_are_started_and_stopped_with_the_token(
    simulation: SimulatedFederation, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.agents.gateway.access_control.WRONG_TOKEN_DELAY_S", 0.0)
    received: list[object] = []

    async def start(request: StartRun) -> RunStarted:
        received.append(request)
        return RunStarted(run="mnist-1")

    async def stop(request: StopRun) -> RunStopped:
        received.append(request)
        return RunStopped(run=request.run)

    authorized = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        Bus.connect(nats.url, Identity(FED, "workflow-scheduler")) as scheduler,
        scheduler.serve({StartRun: start, StopRun: stop}, task=TASK, version="1.0.0"),
        run_gateway(nats.url, token=TOKEN) as url,
    ):
        action = {"task": TASK, "rounds": 2}
        assert await post_action(url, "start_run", action, **authorized) == (200, {"run": "mnist-1"})
        assert (await post_action(url, "stop_run", {"task": TASK, "run": "mnist-1"}, **authorized))[0] == 200
        assert await post_action(url, "../token", {}, **authorized) == (200, {})
        assert (await post_action(url, "../token", {}, Authorization="Bearer guessed"))[0] == 401
        assert (await post_action(url, "start_run", action))[0] == 401
        assert (await post_action(url, "start_run", action, Authorization=f"Bearer {TOKEN}x"))[0] == 401
        assert (await post_action(url, "start_run", action, Origin="http://evil.example", **authorized))[
            0
        ] == 403
        assert (await post_action(url, "open_run", action, **authorized))[0] == 404
        status, answer = await post_action(url, "start_run", {"task": TASK, "rounds": 0}, **authorized)
        assert (status, answer["error"]) == (400, "rounds: Input should be greater than or equal to 1")
        status, answer = await post_action(url, "start_run", {"task": TASK, "rounds": 10**30}, **authorized)
        assert (status, answer["error"]) == (400, "StartRun contains an integer of more than 64 bits")
    assert received == [StartRun(task=TASK, rounds=2), StopRun(task=TASK, run="mnist-1")]


async def test_a_port_in_use_is_reported(simulation: SimulatedFederation, nats: NatsServer) -> None:
    async with run_gateway(nats.url) as url:
        port = urlsplit(url).port or 0
        with pytest.raises(GatewayBindError, match=f"cannot serve the dashboard on 127.0.0.1:{port}"):
            async with run_gateway(nats.url, port=port):
                pass


# --- records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "e1", "e1-l", "e-1-l2", "l1-e2", "e1-l٣", "e1-l2; x", "e" + "9" * 20 + "-l1"]
)
def test_an_invalid_cursor_is_rejected(text: str) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)


def test_a_cursor_is_parsed_from_its_text() -> None:
    assert Cursor.parse(str(Cursor(812, 344))) == Cursor(812, 344)


def test_records_are_truncated_and_converted_to_json_types() -> None:
    converted = to_jsonable({"a": float("nan"), "b": b"\x00\xff", "c": "half \ud800", "d": [1, None]})
    assert converted == {"a": "nan", "b": "<2 bytes: 00ff>", "c": "half ?", "d": [1, None]}
    assert truncate({"a": list(range(MAX_ITEMS + 2))})["a"][-1] == "… 2 more"
