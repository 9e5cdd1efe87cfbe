"""Multicast of one blob to a cohort: sent once, at the pace of the slowest receiver."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeAlias

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from support import NatsServer, eventually
from support.raw_connection import connect_raw

from fedbus.bus.blobs import WINDOW_BYTES, Blobs, protocol, sender
from fedbus.bus.blobs.multicast import MulticastPhase, MulticastState
from fedbus.bus.blobs.offer import MULTICAST_MIN_SAVED_BYTES
from fedbus.bus.blobs.protocol import ChunkRequest, ProbeReply
from fedbus.contracts.identifiers import federation_id

FED = federation_id("fed")
SEVERAL = 2 * WINDOW_BYTES + 17

Party: TypeAlias = Callable[[str], Awaitable[Blobs]]


@pytest.fixture
async def exits() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long timeouts, so that a busy machine does not make a cohort incomplete, or a receiver slow."""
    monkeypatch.setattr(sender, "MULTICAST_GATHER_S", 3600.0)
    monkeypatch.setattr(sender, "SLOW_RECEIVER_S", 3600.0)


@pytest.fixture
async def connection(nats: NatsServer, exits: AsyncExitStack) -> Client:
    connection = await connect_raw(nats.url)
    exits.push_async_callback(connection.close)
    return connection


@pytest.fixture
def party(nats: NatsServer, exits: AsyncExitStack) -> Party:
    async def opened(name: str) -> Blobs:
        connection = await connect_raw(nats.url)
        exits.push_async_callback(connection.close)
        return await exits.enter_async_context(Blobs.open(connection, FED, name))

    return opened


@pytest.fixture
async def holder(party: Party) -> Blobs:
    return await party("holder")


def sent_bytes(blobs: Blobs) -> int:
    sent: int = blobs._connection.stats["out_bytes"]
    return sent


@pytest.mark.usefixtures("patience")
async def test_a_cohort_gets_a_blob_that_is_sent_once(holder: Blobs, party: Party) -> None:
    data, cohort = os.urandom(SEVERAL), [await party(f"c{number}") for number in range(4)]
    offer = await holder.offer(data, receivers=4)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4
    assert sent_bytes(holder) < 1.01 * len(data)
    # requests and chunks: no receiver still subscribes to the multicast
    assert [len(one._connection._subs) for one in cohort] == [2] * 4


@pytest.mark.usefixtures("patience")
async def test_a_cast_of_one_chunk_is_sent_once_too(holder: Blobs, party: Party) -> None:
    data, cohort = (
        os.urandom(MULTICAST_MIN_SAVED_BYTES // 3 + 1),
        [await party(f"c{number}") for number in range(4)],
    )
    offer = await holder.offer(data, receivers=4)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4
    assert sent_bytes(holder) < 1.1 * len(data)


async def test_a_small_blob_is_sent_by_unicast(holder: Blobs, party: Party) -> None:
    data, cohort = os.urandom(50_000), [await party(f"c{number}") for number in range(4)]
    offer = await holder.offer(data, receivers=9)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4
    assert sent_bytes(holder) >= 4 * len(data)


async def test_an_incomplete_cohort_does_not_wait_long(holder: Blobs, party: Party) -> None:
    data, receiver = os.urandom(SEVERAL), await party("c1")
    offer = await holder.offer(data, receivers=9)
    assert await asyncio.wait_for(receiver.fetch(offer.ref), 60) == data


async def test_a_late_receiver_is_served_by_unicast(holder: Blobs, party: Party) -> None:
    data, early, late = os.urandom(SEVERAL), await party("c1"), await party("c2")
    offer = await holder.offer(data, receivers=2)
    assert await early.fetch(offer.ref) == data
    assert await late.fetch(offer.ref) == data
    assert sent_bytes(holder) > 2 * len(data)


async def test_more_receivers_than_expected_are_all_served(holder: Blobs, party: Party) -> None:
    data, cohort = os.urandom(SEVERAL), [await party(f"c{number}") for number in range(4)]
    offer = await holder.offer(data, receivers=2)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4


@pytest.mark.usefixtures("patience")
async def test_a_frozen_receiver_is_dropped(holder: Blobs, party: Party, connection: Client) -> None:
    data, receivers = os.urandom(SEVERAL), [await party("c1"), await party("c2")]
    offer = await holder.offer(data, receivers=3)
    place, received = protocol.inbox_subject(FED, "frozen", "x"), list[int]()

    async def accept_and_freeze(message: Msg) -> None:
        cast = int(message.data)
        await connection.subscribe(f"{protocol.multicast_subject(FED, 'holder', cast)}.*", cb=count)
        ask = ChunkRequest(offer.ref.sha256, 0, 2, cast)
        await connection.publish(protocol.request_subject(FED, "holder", "frozen"), ask.pack(), reply=place)

    async def count(message: Msg) -> None:
        received.append(int(message.subject.rpartition(".")[2]))

    await connection.subscribe(f"{place}.cast", cb=accept_and_freeze)
    await connection.publish(
        protocol.request_subject(FED, "holder", "frozen"),
        ChunkRequest(offer.ref.sha256, 0, 2).pack(),
        reply=place,
    )
    await connection.flush()

    fetching = asyncio.gather(*(one.fetch(offer.ref) for one in receivers))
    assert offer.multicast is not None
    cast = offer.multicast
    await eventually(lambda: cast.position == 2 and cast.is_blocked)
    holder._sender._drop_slow_receivers(holder._sender._multicasts[offer])

    assert await fetching == [data] * 2
    assert sent_bytes(holder) < 1.01 * len(data)
    assert received == [0, 1]


async def test_a_dropped_receiver_fetches_the_rest_by_unicast(
    holder: Blobs, party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MULTICAST_GATHER_S", 3600.0)
    data, quick, slow = os.urandom(SEVERAL), await party("c1"), await party("c2")
    offer = await holder.offer(data, receivers=2)
    publish, resume = slow._connection.publish, asyncio.Event()
    requests = 0

    async def delayed_publish(subject: str, payload: bytes = b"", reply: str = "") -> None:
        nonlocal requests
        requests += 1
        if requests == 3:
            await resume.wait()
        await publish(subject, payload, reply=reply)

    monkeypatch.setattr(slow._connection, "publish", delayed_publish)
    waiting = asyncio.create_task(slow.fetch(offer.ref))
    assert await asyncio.wait_for(quick.fetch(offer.ref), 60) == data
    assert not waiting.done()
    resume.set()
    assert await asyncio.wait_for(waiting, 60) == data


# --- the state machine ------------------------------------------------------------------------


def make_requests(cast: MulticastState, **credit: int) -> None:
    for place, until in credit.items():
        assert cast.invite(place, range(until))
        assert cast.grant_credit(place, cast.number, until)


def test_a_multicast_waits_for_its_slowest_receiver() -> None:
    cast = MulticastState(chunks=9, receivers=2)
    make_requests(cast, a=4, b=2)
    assert cast.has_all_receivers
    assert not cast.start()
    assert [cast.next_chunk() for _ in range(3)] == [0, 1, None]
    assert cast.is_blocked
    assert cast.grant_credit("b", cast.number, 3)
    assert [cast.next_chunk() for _ in range(2)] == [2, None]


def test_a_cast_is_over_with_its_last_chunk() -> None:
    cast = MulticastState(chunks=2, receivers=2)
    make_requests(cast, a=2, b=2)
    cast.start()
    assert [cast.next_chunk() for _ in range(3)] == [0, 1, None]
    assert cast.phase is MulticastPhase.DONE
    assert not cast.is_blocked


def test_an_invited_receiver_that_does_not_join_gets_its_chunks() -> None:
    cast = MulticastState(chunks=9, receivers=3)
    make_requests(cast, a=4)
    assert cast.invite("b", range(1, 3))
    assert cast.start() == {"b": range(1, 3)}
    assert not cast.grant_credit("b", cast.number, 3)
    assert not cast.invite("c", range(4))


def test_the_remaining_receivers_gather_under_a_new_number() -> None:
    cast = MulticastState(chunks=9, receivers=3)
    make_requests(cast, a=4, b=2, c=5)
    cast.start()
    assert [cast.next_chunk() for _ in range(3)] == [0, 1, None]
    before = cast.number
    assert cast.drop_slow_receivers() == {"a", "c"}
    assert cast.number != before
    assert not cast.grant_credit("b", before, 9)
    make_requests(cast, a=4)
    assert cast.start() == {"c": range(2, 5)}
    assert cast.next_chunk() == 2


def test_a_probe_does_not_withdraw_requested_chunks() -> None:
    cast = MulticastState(chunks=9, receivers=2)
    assert cast.invite("a", range(4))
    assert cast.invite("a", range(4, 4))
    assert cast.start() == {"a": range(4)}


@pytest.mark.usefixtures("patience")
async def test_a_probe_returns_the_position_of_the_multicast(holder: Blobs, connection: Client) -> None:
    """Otherwise the chunks in transit to a slow receiver would be sent to it again."""
    offer = await holder.offer(bytes(SEVERAL), receivers=2)
    assert offer.multicast is not None
    replies: list[Msg] = []

    async def record(message: Msg) -> None:
        replies.append(message)

    async def send(first: int, until: int, *, client: str = "c1", cast: int = 0, probe: int = 0) -> None:
        request = ChunkRequest(offer.ref.sha256, first, until, cast, probe)
        place = protocol.inbox_subject(FED, client, "x")
        await connection.publish(protocol.request_subject(FED, "holder", client), request.pack(), reply=place)

    await connection.subscribe(f"{protocol.inbox_subject(FED, 'c1', 'x')}.*", cb=record)
    for client in ("c1", "c2"):
        await send(0, 3, client=client)
    await eventually(lambda: len(replies) == 1)
    for client in ("c1", "c2"):
        await send(3, 3, client=client, cast=offer.multicast.number)
    await eventually(lambda: offer.multicast is not None and offer.multicast.position == 3)
    await send(3, 3, cast=offer.multicast.number, probe=5)
    await eventually(lambda: len(replies) == 2)
    assert ProbeReply.unpack(replies[1].data) == ProbeReply(probe=5, until=3)
