"""The replacements for parts of nats-py behave like the originals."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.protocol.command import pub_cmd as stock_pub_cmd
from nats.protocol.parser import Parser
from support import NatsServer

from fedbus.bus.nats.connection import open_connection
from fedbus.bus.nats.parser import READ_BYTES, LargePayloadParser, pub_cmd


class RecordingClient:
    """Records what the parser reports to its client."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def _process_msg(self, *message: Any) -> None:
        self.calls.append(message)

    async def _process_ping(self) -> None:
        self.calls.append(("ping",))

    async def _process_pong(self) -> None:
        self.calls.append(("pong",))


class SmallThresholdParser(LargePayloadParser):
    large_bytes = 10


def message(payload: bytes, *, reply: bytes = b"") -> bytes:
    return b"MSG some.where 7 %s%d\r\n%s\r\n" % (reply and reply + b" ", len(payload), payload)


def with_headers(payload: bytes) -> bytes:
    headers = b"NATS/1.0\r\nce-id: 1\r\n\r\n"
    return b"HMSG some.where 8 %d %d\r\n%s%s\r\n" % (
        len(headers),
        len(headers) + len(payload),
        headers,
        payload,
    )


payloads = st.binary(max_size=60) | st.sampled_from(
    [b"\r\n" * 9, b"PING\r\n" * 3, b"MSG a 1 3\r\nabc\r\n" * 2]
)
lines = (
    payloads.map(message)
    | payloads.map(lambda payload: message(payload, reply=b"_INBOX.x"))
    | payloads.map(with_headers)
    | st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n"])
)


async def calls_by(parser: type[Parser], reads: list[bytes]) -> list[tuple[Any, ...]]:
    client = RecordingClient()
    instance = parser(client)
    for read in reads:
        await instance.parse(read)
    return client.calls


@given(st.lists(lines), st.lists(st.integers(1, 40), min_size=1))
async def test_the_messages_do_not_depend_on_the_reads(sent: list[bytes], sizes: list[int]) -> None:
    wire, at = b"".join(sent), 0
    reads: list[bytes] = []
    while at < len(wire):
        size = sizes[len(reads) % len(sizes)]
        reads.append(wire[at : at + size])
        at += size
    assert await calls_by(SmallThresholdParser, reads) == await calls_by(Parser, [wire])


async def test_a_parser_reset_within_a_payload_drops_it() -> None:
    client = RecordingClient()
    parser = SmallThresholdParser(client)
    await parser.parse(message(b"x" * 50)[:40])
    await parser.parse(b"x" * 5)
    parser.reset()
    await parser.parse(b"PING\r\n")
    assert client.calls == [("ping",)]


@pytest.mark.parametrize("payload", [b"", b"some bytes", memoryview(b"a view")])
def test_a_publish_is_the_same_on_the_wire(payload: bytes | memoryview) -> None:
    assert pub_cmd("some.where", "_INBOX.x", payload) == stock_pub_cmd("some.where", "_INBOX.x", payload)


async def test_a_connection_uses_large_reads_and_the_parser(nats: NatsServer) -> None:
    async with open_connection(nats.url, name="reader", inbox="_INBOX") as connected:
        transport: Any = connected.client._transport
        assert transport._io_reader._limit == READ_BYTES
        assert isinstance(connected.client._ps, LargePayloadParser)
