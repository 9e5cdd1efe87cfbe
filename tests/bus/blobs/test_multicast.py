"""One blob for a whole cohort: sent once, at the pace of the slowest who keeps up."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeAlias

import nats as nats_py
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from support import NatsServer, eventually

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
    """A machine that is busy with other tests must not make a cohort incomplete."""
    monkeypatch.setattr(sender, "MULTICAST_GATHER_S", 5.0)
    monkeypatch.setattr(sender, "SLOW_RECEIVER_S", 1.0)


@pytest.fixture
async def connection(nats: NatsServer, exits: AsyncExitStack) -> Client:
    connection = await nats_py.connect(nats.url)
    exits.push_async_callback(connection.close)
    return connection


@pytest.fixture
def party(nats: NatsServer, exits: AsyncExitStack) -> Party:
    async def opened(name: str) -> Blobs:
        connection = await nats_py.connect(nats.url)
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
    assert [len(one._connection._subs) for one in cohort] == [
        2
    ] * 4  # asks and chunks: nobody listens to a cast any more


@pytest.mark.usefixtures("patience")
async def test_a_cast_of_one_chunk_is_sent_once_too(holder: Blobs, party: Party) -> None:
    data, cohort = (
        os.urandom(MULTICAST_MIN_SAVED_BYTES // 3 + 1),
        [await party(f"c{number}") for number in range(4)],
    )
    offer = await holder.offer(data, receivers=4)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4
    assert sent_bytes(holder) < 1.1 * len(data)


async def test_a_small_blob_is_sent_to_each_at_once_without_an_invitation(
    holder: Blobs, party: Party
) -> None:
    data, cohort = os.urandom(50_000), [await party(f"c{number}") for number in range(4)]
    offer = await holder.offer(data, receivers=9)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4
    assert sent_bytes(holder) >= 4 * len(data)


async def test_a_cohort_that_is_not_complete_does_not_wait_long(holder: Blobs, party: Party) -> None:
    data, receiver = os.urandom(SEVERAL), await party("c1")
    offer = await holder.offer(data, receivers=9)
    assert await asyncio.wait_for(receiver.fetch(offer.ref), 2) == data


async def test_who_asks_too_late_gets_it_alone(holder: Blobs, party: Party) -> None:
    data, early, late = os.urandom(SEVERAL), await party("c1"), await party("c2")
    offer = await holder.offer(data, receivers=2)
    assert await early.fetch(offer.ref) == data
    assert await late.fetch(offer.ref) == data
    assert sent_bytes(holder) > 2 * len(data)


async def test_more_than_were_expected_get_it_all_the_same(holder: Blobs, party: Party) -> None:
    data, cohort = os.urandom(SEVERAL), [await party(f"c{number}") for number in range(4)]
    offer = await holder.offer(data, receivers=2)
    assert await asyncio.gather(*(one.fetch(offer.ref) for one in cohort)) == [data] * 4


@pytest.mark.usefixtures("patience")
async def test_a_listener_that_stops_listening_holds_up_nobody_and_nothing_piles_up_for_it(
    holder: Blobs, party: Party, connection: Client
) -> None:
    data, receivers = os.urandom(SEVERAL), [await party("c1"), await party("c2")]
    offer = await holder.offer(data, receivers=3)
    place, got = protocol.inbox_subject(FED, "frozen", "x"), list[int]()

    async def accept_and_freeze(message: Msg) -> None:
        cast = int(message.data)
        await connection.subscribe(f"{protocol.multicast_subject(FED, 'holder', cast)}.*", cb=count)
        ask = ChunkRequest(offer.ref.sha256, 0, 2, cast)
        await connection.publish(protocol.request_subject(FED, "holder", "frozen"), ask.pack(), reply=place)

    async def count(message: Msg) -> None:
        got.append(int(message.subject.rpartition(".")[2]))

    await connection.subscribe(f"{place}.cast", cb=accept_and_freeze)
    await connection.publish(
        protocol.request_subject(FED, "holder", "frozen"),
        ChunkRequest(offer.ref.sha256, 0, 2).pack(),
        reply=place,
    )
    await connection.flush()

    fetched = await asyncio.wait_for(asyncio.gather(*(one.fetch(offer.ref) for one in receivers)), 15)

    assert fetched == [data] * 2
    assert sent_bytes(holder) < 1.01 * len(data)
    assert got == [0, 1]


@pytest.mark.usefixtures("patience")
async def test_the_listener_that_fell_out_fetches_the_rest_alone(
    holder: Blobs, party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, quick, slow = os.urandom(SEVERAL), await party("c1"), await party("c2")
    offer = await holder.offer(data, receivers=2)
    asked, go_on = slow._connection.publish, asyncio.Event()
    asks = 0

    async def held(subject: str, payload: bytes = b"", reply: str = "") -> None:
        nonlocal asks
        asks += 1
        if asks == 3:
            await go_on.wait()
        await asked(subject, payload, reply=reply)

    monkeypatch.setattr(slow._connection, "publish", held)
    waiting = asyncio.create_task(slow.fetch(offer.ref))
    assert await asyncio.wait_for(quick.fetch(offer.ref), 5) == data
    assert not waiting.done()
    go_on.set()
    assert await asyncio.wait_for(waiting, 5) == data


# --- the decisions, by themselves -------------------------------------------------------------


def make_requests(cast: MulticastState, **credit: int) -> None:
    for place, until in credit.items():
        assert cast.invite(place, range(until))
        assert cast.grant(place, cast.number, until)


def test_a_cast_goes_as_far_as_its_slowest_listener_has_asked() -> None:
    cast = MulticastState(chunks=9, receivers=2)
    make_requests(cast, a=4, b=2)
    assert cast.all_here
    assert not cast.begin()
    assert [cast.next_chunk() for _ in range(3)] == [0, 1, None]
    assert cast.held_up
    assert cast.grant("b", cast.number, 3)
    assert [cast.next_chunk() for _ in range(2)] == [2, None]


def test_a_cast_is_over_with_its_last_chunk() -> None:
    cast = MulticastState(chunks=2, receivers=2)
    make_requests(cast, a=2, b=2)
    cast.begin()
    assert [cast.next_chunk() for _ in range(3)] == [0, 1, None]
    assert cast.phase is MulticastPhase.OVER
    assert not cast.held_up


def test_who_was_invited_and_did_not_come_is_still_owed_what_it_asked_for() -> None:
    cast = MulticastState(chunks=9, receivers=3)
    make_requests(cast, a=4)
    assert cast.invite("b", range(1, 3))
    assert cast.begin() == {"b": range(1, 3)}
    assert not cast.grant("b", cast.number, 3)
    assert not cast.invite("c", range(4))


def test_who_is_left_gathers_under_a_number_that_the_laggard_does_not_hear() -> None:
    cast = MulticastState(chunks=9, receivers=3)
    make_requests(cast, a=4, b=2, c=5)
    cast.begin()
    assert [cast.next_chunk() for _ in range(3)] == [0, 1, None]
    before = cast.number
    assert cast.drop_laggards() == {"a", "c"}
    assert cast.number != before
    assert not cast.grant("b", before, 9)
    make_requests(cast, a=4)
    assert cast.begin() == {"c": range(2, 5)}
    assert cast.next_chunk() == 2


def test_a_probe_takes_back_nothing_of_what_was_asked_for() -> None:
    cast = MulticastState(chunks=9, receivers=2)
    assert cast.invite("a", range(4))
    assert cast.invite("a", range(4, 4))
    assert cast.begin() == {"a": range(4)}


async def test_a_probe_in_a_cast_is_answered_with_how_far_the_cast_is(
    holder: Blobs, connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what is on its way to a slow listener would be sent to it once more."""
    monkeypatch.setattr(sender, "MULTICAST_GATHER_S", 1.0)
    monkeypatch.setattr(sender, "SLOW_RECEIVER_S", 60.0)
    offer = await holder.offer(bytes(SEVERAL), receivers=2)
    assert offer.cast is not None
    place, said = protocol.inbox_subject(FED, "c1", "x"), list[Msg]()

    async def note(message: Msg) -> None:
        said.append(message)

    async def ask(first: int, until: int, *, cast: int = 0, probe: int = 0) -> None:
        asked = ChunkRequest(offer.ref.sha256, first, until, cast, probe)
        await connection.publish(protocol.request_subject(FED, "holder", "c1"), asked.pack(), reply=place)

    await connection.subscribe(f"{place}.*", cb=note)
    await ask(0, 3)
    await eventually(lambda: len(said) == 1)
    await ask(3, 3, cast=offer.cast.number)
    await eventually(lambda: offer.cast is not None and offer.cast.position == 3)
    await ask(3, 3, cast=offer.cast.number, probe=5)
    await eventually(lambda: len(said) == 2)
    assert ProbeReply.unpack(said[1].data) == ProbeReply(probe=5, until=3)
