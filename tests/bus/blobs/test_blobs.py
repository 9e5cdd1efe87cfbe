"""Blob transfers between two connections, over a real nats-server."""

import asyncio
import contextlib
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from support import NatsServer, OwnNatsServer, eventually
from support.memory_nats import nats_server_only
from support.raw_connection import connect_raw

from fedbus.bus.blobs import CHUNK_BYTES, WINDOW_BYTES, BlobCorrupt, Blobs, BlobUnavailable, protocol
from fedbus.bus.blobs import receiver as receiver_module
from fedbus.bus.blobs.protocol import ChunkRequest
from fedbus.bus.blobs.sinks import MemorySink
from fedbus.common import clock
from fedbus.contracts.identifiers import federation_id
from fedbus.contracts.model import MAX_BLOB_BYTES, BlobRef

FED = federation_id("fed")
HOLDER = "server-mnist-1-grid"
SEVERAL = 2 * WINDOW_BYTES + 17
LONG = 6 * WINDOW_BYTES

Connect: TypeAlias = Callable[[], Awaitable[Client]]
Party: TypeAlias = Callable[[str], Awaitable[Blobs]]


async def quiet(_: Exception) -> None:
    """Ignore the errors of a nats-server that the test kills."""


@pytest.fixture
async def exits() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def connect(nats: NatsServer, exits: AsyncExitStack) -> Connect:
    async def connected() -> Client:
        connection = await connect_raw(
            nats.url, reconnect_time_wait=0, max_reconnect_attempts=-1, error_cb=quiet
        )
        exits.push_async_callback(connection.close)
        return connection

    return connected


@pytest.fixture
def party(connect: Connect, exits: AsyncExitStack) -> Party:
    """Make a blob endpoint with a connection of its own."""

    async def opened(name: str) -> Blobs:
        return await exits.enter_async_context(Blobs.open(await connect(), FED, name))

    return opened


@pytest.fixture
async def holder(party: Party) -> Blobs:
    return await party(HOLDER)


@pytest.fixture
async def receiver(party: Party) -> Blobs:
    return await party("c1-mnist-trainer")


def sent_bytes(blobs: Blobs) -> int:
    sent: int = blobs._connection.stats["out_bytes"]
    return sent


def reference_to(data: bytes, *, chunk_bytes: int = CHUNK_BYTES, holder: str = HOLDER) -> BlobRef:
    digest = hashlib.sha256(data).hexdigest()
    return BlobRef(sha256=digest, size_bytes=len(data), chunk_bytes=chunk_bytes, holder=holder)


# --- transfers ----------------------------------------------------------------------------


async def test_a_list_of_buffers_arrives_as_one_blob(holder: Blobs, receiver: Blobs) -> None:
    head, arrays = b"head", [memoryview(os.urandom(size)) for size in (0, 3, CHUNK_BYTES + 1, CHUNK_BYTES)]
    async with await holder.offer([memoryview(head), *arrays]) as offer:
        assert await receiver.fetch(offer.ref) == head + b"".join(arrays)
    assert offer.ref.sha256 == hashlib.sha256(head + b"".join(arrays)).hexdigest()


async def test_a_file_arrives_even_when_its_path_gets_another_file(
    holder: Blobs, receiver: Blobs, tmp_path: Path
) -> None:
    data, path = os.urandom(SEVERAL), tmp_path / "model.safetensors"
    path.write_bytes(data)
    async with await holder.offer(path) as offer:
        path.unlink()
        path.write_bytes(b"another")
        assert await receiver.fetch(offer.ref) == data


async def test_a_fetch_writes_only_its_part_of_the_given_buffer(holder: Blobs, receiver: Blobs) -> None:
    buffer = bytearray(b"x" * 100)
    async with await holder.offer(b"weights") as offer:
        view = await receiver.fetch(offer.ref, memoryview(buffer))
    assert view.obj is buffer
    assert (bytes(view), bytes(buffer)) == (b"weights", b"weights" + b"x" * 93)


async def test_a_buffer_that_is_too_small_or_read_only_is_rejected(holder: Blobs, receiver: Blobs) -> None:
    async with await holder.offer(b"weights") as offer:
        for buffer in (memoryview(bytearray(6)), memoryview(bytes(7))):
            with pytest.raises(ValueError, match="writable and have 7 bytes"):
                await receiver.fetch(offer.ref, buffer)


async def test_two_concurrent_fetches_of_one_blob_succeed(holder: Blobs, receiver: Blobs) -> None:
    data = os.urandom(SEVERAL)
    async with await holder.offer(data) as offer:
        one, other = await asyncio.gather(receiver.fetch(offer.ref), receiver.fetch(offer.ref))
    assert one == other == data


async def test_two_offers_of_one_blob_are_released_one_by_one(holder: Blobs, receiver: Blobs) -> None:
    first, second = await holder.offer(b"weights"), await holder.offer(b"weights")
    second.release()
    assert bytes(await receiver.fetch(first.ref)) == b"weights"
    first.release()
    with pytest.raises(BlobUnavailable):
        await receiver.fetch(first.ref)


async def test_a_known_digest_is_not_computed_again(holder: Blobs) -> None:
    async with await holder.offer(b"weights", sha256="ab" * 32) as offer:
        assert offer.ref.sha256 == "ab" * 32


async def test_many_fetches_at_once_share_the_connection(holder: Blobs, receiver: Blobs) -> None:
    blobs = [os.urandom(CHUNK_BYTES + number) for number in range(20)]
    offers = [await holder.offer(data) for data in blobs]
    assert await asyncio.gather(*(receiver.fetch(offer.ref) for offer in offers)) == blobs


# --- into a file --------------------------------------------------------------------------


async def test_a_file_is_there_as_a_whole_or_not_at_all(
    holder: Blobs, receiver: Blobs, tmp_path: Path
) -> None:
    data, path = os.urandom(SEVERAL), tmp_path / "models" / "m.safetensors"
    async with await holder.offer(data) as offer:
        await receiver.fetch_to(offer.ref, path)
    assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


async def test_an_empty_blob_becomes_an_empty_file(holder: Blobs, receiver: Blobs, tmp_path: Path) -> None:
    async with await holder.offer(b"") as offer:
        await receiver.fetch_to(offer.ref, tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


async def test_an_interrupted_download_resumes(
    holder: Blobs, receiver: Blobs, connect: Connect, tmp_path: Path
) -> None:
    data, path = os.urandom(SEVERAL), tmp_path / "m"
    offer = await holder.offer(data)
    fetching = asyncio.create_task(receiver.fetch_to(offer.ref, path))
    await eventually(lambda: part_bytes(path) > WINDOW_BYTES)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    resumed, sent = part_bytes(path), sent_bytes(holder)
    if path.exists():
        pytest.skip("it was faster than the cancellation")

    await receiver.fetch_to(offer.ref, path)

    assert path.read_bytes() == data
    assert sent_bytes(holder) - sent < len(data) - resumed + CHUNK_BYTES + WINDOW_BYTES


async def test_a_corrupt_part_file_is_discarded(holder: Blobs, receiver: Blobs, tmp_path: Path) -> None:
    data = os.urandom(SEVERAL)
    offer = await holder.offer(data)
    part = tmp_path / f".m.{offer.ref.sha256[:16]}.part"
    part.write_bytes(os.urandom(2 * CHUNK_BYTES + 5))
    await receiver.fetch_to(offer.ref, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == data
    assert not part.exists()


async def test_two_downloads_to_one_path_do_not_write_into_each_other(
    holder: Blobs, receiver: Blobs, party: Party, tmp_path: Path
) -> None:
    data, other = os.urandom(SEVERAL), await party("c2-mnist-trainer")
    offer = await holder.offer(data)
    await asyncio.gather(*(one.fetch_to(offer.ref, tmp_path / "m") for one in (receiver, receiver, other)))
    assert (tmp_path / "m").read_bytes() == data
    assert files_in(tmp_path) == ["m"]


def files_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.is_file()]


def part_bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in path.parent.glob(f".{path.name}.*.part"))


# --- unavailable blobs --------------------------------------------------------------------


async def test_a_sender_refuses_an_unknown_blob_at_once(holder: Blobs, receiver: Blobs) -> None:
    with pytest.raises(BlobUnavailable, match="does not offer this blob"):
        await receiver.fetch(reference_to(b"never offered"), timeout_s=3600)


async def fetch_until_timeout(receiver: Blobs, ref: BlobRef, cause: str) -> None:
    """Fetch until the receiver knows *cause*, and let the timeout pass then."""
    passed_s = 0.0
    later = SimpleNamespace(monotonic_s=lambda: clock.monotonic_s() + passed_s, random_bits=clock.random_bits)
    downloads = receiver._receiver._downloads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receiver_module, "clock", later)
        fetching = asyncio.create_task(receiver.fetch(ref, timeout_s=3600))
        await eventually(
            lambda: fetching.done() or any(cause in one._timeout_cause for one in downloads.values())
        )
        passed_s = 3600.0
        await fetching


async def test_a_missing_sender_is_named_after_the_timeout(receiver: Blobs) -> None:
    cause = "the sender is not connected"
    with pytest.raises(BlobUnavailable, match=f"from {HOLDER} is unavailable.*{cause}"):
        await fetch_until_timeout(receiver, reference_to(b"weights"), cause)


async def test_a_sender_that_starts_within_the_timeout_is_found(receiver: Blobs, party: Party) -> None:
    fetching = asyncio.create_task(receiver.fetch(reference_to(b"weights")))
    downloads = receiver._receiver._downloads
    await eventually(  # the first request finds no sender
        lambda: any(one._timeout_cause == receiver_module.HOLDER_NOT_FOUND for one in downloads.values())
    )
    holder = await party(HOLDER)
    await holder.offer(b"weights")
    assert bytes(await fetching) == b"weights"


async def test_a_too_large_reference_is_rejected_without_a_request(receiver: Blobs) -> None:
    ref = reference_to(b"x").model_copy(update={"size_bytes": MAX_BLOB_BYTES + 1})
    with pytest.raises(BlobUnavailable, match="is too large"):
        await receiver.fetch(ref)


async def test_a_closed_connection_is_reported(receiver: Blobs) -> None:
    await receiver._connection.close()
    with pytest.raises(BlobUnavailable, match="connection to NATS is closed"):
        await receiver.fetch(reference_to(b"x"))


async def test_a_file_that_shrinks_while_it_is_offered_is_withdrawn(
    holder: Blobs, receiver: Blobs, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    path.write_bytes(os.urandom(SEVERAL))
    offer = await holder.offer(path)
    os.truncate(path, CHUNK_BYTES)
    with pytest.raises(BlobUnavailable, match="does not offer this blob"):
        await fetch_until_timeout(receiver, offer.ref, "does not offer this blob")
    assert offer.is_released


# --- a hostile sender -----------------------------------------------------------------------


Answers: TypeAlias = Callable[[int], list[tuple[str, bytes]]]
ServeAnswers: TypeAlias = Callable[[Answers], Awaitable[None]]


@pytest.fixture
async def hostile_sender(connect: Connect) -> ServeAnswers:
    """A sender that answers each requested chunk with the messages that the test chooses."""
    connection = await connect()

    async def serve(answers: Answers) -> None:
        async def answer(message: Msg) -> None:
            request = ChunkRequest.unpack(message.data)
            assert request is not None
            for index in range(request.first, request.until):
                for kind, body in answers(index):
                    await connection.publish(f"{message.reply}.{kind}", body)

        await connection.subscribe(protocol.request_subject(FED, HOLDER), cb=answer)
        await connection.flush()
        await connection.flush()  # nats-py sends the first PING before the SUB

    return serve


async def test_the_bytes_of_another_blob_are_corrupt_and_discarded(
    receiver: Blobs, hostile_sender: ServeAnswers, tmp_path: Path
) -> None:
    await hostile_sender(lambda index: [(str(index), b"y" * CHUNK_BYTES)])
    ref = reference_to(b"x" * 2 * CHUNK_BYTES)
    with pytest.raises(BlobCorrupt, match="its SHA-256 digest is"):
        await receiver.fetch(ref)
    with pytest.raises(BlobCorrupt):
        await receiver.fetch_to(ref, tmp_path / "m")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("index", "size"),
    [
        ("2", CHUNK_BYTES),
        ("0", CHUNK_BYTES + 1),
        ("0", 0),
        ("99999999999999999999999", 5),
        ("nonsense", 5),
        ("-1", 5),
    ],
)
async def test_an_impossible_chunk_is_corrupt(
    receiver: Blobs, hostile_sender: ServeAnswers, index: str, size: int
) -> None:
    await hostile_sender(lambda _: [(index, bytes(size))])
    with pytest.raises(BlobCorrupt, match="chunk"):
        await receiver.fetch(reference_to(b"x" * 2 * CHUNK_BYTES), timeout_s=3600)


async def test_repeated_chunks_do_not_count_as_progress(
    receiver: Blobs, hostile_sender: ServeAnswers
) -> None:
    await hostile_sender(
        lambda index: [("0", b"x" * CHUNK_BYTES)] * 3 if index == 0 else [("cast", b"7"), ("here", b"7" * 8)]
    )
    with pytest.raises(BlobUnavailable, match="no data for 1 s"):
        await asyncio.wait_for(receiver.fetch(reference_to(b"x" * 2 * CHUNK_BYTES), timeout_s=1), 60)


async def test_a_sender_sends_only_to_the_inbox_of_the_requester(holder: Blobs, connect: Connect) -> None:
    stranger = await connect()
    received: list[str] = []

    async def record(message: Msg) -> None:
        received.append(message.subject)

    await stranger.subscribe("fedbus.>", cb=record)
    offer = await holder.offer(b"weights")
    request = ChunkRequest(offer.ref.sha256, 0, 1).pack()
    for place in (
        "fedbus.fed.cmd.c1.mnist.client_start",
        "fedbus.other.blob.c1.in.x",
        "",
        protocol.inbox_subject(FED, "c1", "x"),
    ):
        await stranger.publish(protocol.request_subject(FED, HOLDER, "c1"), request, reply=place)
    await stranger.publish(
        protocol.request_subject(FED, HOLDER, "c1"),
        request,
        reply=protocol.inbox_subject(FED, "c2.trainer_0123", "x"),
    )
    await stranger.publish(
        protocol.request_subject(FED, HOLDER, "c1"),
        b"not a request",
        reply=protocol.inbox_subject(FED, "c1", "x"),
    )
    await eventually(lambda: f"{protocol.inbox_subject(FED, 'c1', 'x')}.0" in received)
    assert {subject for subject in received if ".ask." not in subject} == {
        f"{protocol.inbox_subject(FED, 'c1', 'x')}.0"
    }


# --- the receiver's pace ----------------------------------------------------------------------


async def test_chunks_that_are_not_requested_are_not_sent(holder: Blobs, connect: Connect) -> None:
    receiver, place = await connect(), protocol.inbox_subject(FED, "c1", "x")
    received: list[str] = []

    async def record(message: Msg) -> None:
        received.append(message.subject.rpartition(".")[2])

    await receiver.subscribe(f"{place}.*", cb=record)
    offer = await holder.offer(bytes(SEVERAL))
    requests = protocol.request_subject(FED, HOLDER, "c1")
    await receiver.publish(requests, ChunkRequest(offer.ref.sha256, 1, 3).pack(), reply=place)
    await receiver.publish(requests, ChunkRequest(offer.ref.sha256, 2, 2, probe=5).pack(), reply=place)
    await eventually(lambda: "here" in received)
    assert received == ["1", "2", "here"]


async def test_a_fetch_has_no_more_than_a_window_in_flight(
    holder: Blobs, receiver: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the receiver's thread is blocked, as by a slow disk, the sender sends only one window."""
    resume = asyncio.Event()
    put = MemorySink.put

    async def slow(self: MemorySink, chunks: list[bytes]) -> None:
        await resume.wait()
        await put(self, chunks)

    monkeypatch.setattr(MemorySink, "put", slow)
    data = os.urandom(SEVERAL)
    offer = await holder.offer(data)
    fetching = asyncio.create_task(receiver.fetch(offer.ref))
    await eventually(lambda: sent_bytes(holder) >= WINDOW_BYTES)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(eventually(lambda: sent_bytes(holder) > WINDOW_BYTES + CHUNK_BYTES), 0.5)
    assert sent_bytes(holder) < WINDOW_BYTES + CHUNK_BYTES
    resume.set()
    assert await fetching == data


def unwritten_bytes(connection: Client) -> int:
    pending: int = connection._pending_data_size
    in_transport: int = connection._transport._io_writer.transport.get_write_buffer_size()  # type: ignore[union-attr]
    return pending + in_transport


@nats_server_only("an in-memory connection has no socket")
async def test_a_sender_does_not_buffer_while_nats_does_not_read(
    own_nats: OwnNatsServer, holder: Blobs, receiver: Blobs
) -> None:
    connection = holder._connection
    connection._max_pending_size = 64 * 1024**2  # the connection itself would buffer everything
    data = os.urandom(4 * WINDOW_BYTES)
    offer = await holder.offer(data)
    with own_nats.freeze():
        place = protocol.inbox_subject(FED, "c1", "x")
        holder._sender._send_later(offer, place, range(offer.ref.chunk_count))
        await eventually(lambda: unwritten_bytes(connection) > 0)
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: unwritten_bytes(connection) > 3 * CHUNK_BYTES, within_s=0.5)
        assert unwritten_bytes(connection) <= 3 * CHUNK_BYTES
    assert await receiver.fetch(offer.ref) == data


@nats_server_only("an in-memory connection has no socket")
async def test_a_fetch_can_be_cancelled_while_its_requests_are_blocked(
    own_nats: OwnNatsServer, holder: Blobs, receiver: Blobs
) -> None:
    connection = receiver._connection
    offer = await holder.offer(b"weights")

    with own_nats.freeze():
        flooding = asyncio.create_task(connection.publish("nowhere", bytes(8_000_000)))
        await eventually(lambda: unwritten_bytes(connection) > CHUNK_BYTES)
        connection._max_pending_size = 1  # from here on a publish waits for the socket
        fetching = asyncio.create_task(receiver.fetch(offer.ref, timeout_s=60))
        for _ in range(5):
            await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    await flooding


# --- faults -----------------------------------------------------------------------------------


async def test_a_fetch_survives_a_killed_nats_server(
    own_nats: OwnNatsServer, holder: Blobs, receiver: Blobs
) -> None:
    data = os.urandom(LONG)
    offer = await holder.offer(data)
    fetching = asyncio.create_task(receiver.fetch(offer.ref))
    await eventually(lambda: sent_bytes(holder) > WINDOW_BYTES)
    await own_nats.kill()
    assert not fetching.done()
    await own_nats.start()
    assert await fetching == data
    assert sent_bytes(holder) < len(data) + 2 * WINDOW_BYTES


async def test_a_multicast_survives_a_killed_nats_server(
    own_nats: OwnNatsServer, holder: Blobs, party: Party
) -> None:
    data = os.urandom(LONG)
    cohort = [await party(f"c{number}-mnist-trainer") for number in range(3)]
    offer = await holder.offer(data, receivers=3)
    fetching = asyncio.gather(*(one.fetch(offer.ref) for one in cohort))
    await eventually(lambda: sent_bytes(holder) > WINDOW_BYTES)
    await own_nats.kill()
    assert not fetching.done()
    await own_nats.start()
    assert await fetching == [data] * 3


async def test_a_restarted_sender_continues_at_the_receivers_position(
    receiver: Blobs, connect: Connect
) -> None:
    data = os.urandom(LONG)
    async with Blobs.open(await connect(), FED, HOLDER) as first:
        offer = await first.offer(data)
        fetching = asyncio.create_task(receiver.fetch(offer.ref))
        await eventually(lambda: sent_bytes(first) > WINDOW_BYTES)
    assert not fetching.done()
    async with Blobs.open(await connect(), FED, HOLDER) as second:
        await second.offer(data)
        assert await fetching == data
        assert sent_bytes(second) < len(data)


async def test_lost_chunks_are_requested_again(
    holder: Blobs, receiver: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear, lost = receiver._receiver.on_message, set[str]()
    data = os.urandom(SEVERAL)
    offer = await holder.offer(data)

    async def lossy(message: Msg) -> None:
        index = message.subject.rpartition(".")[2]
        if index in {"0", "2", "3"} - lost:
            lost.add(index)
        else:
            await hear(message)

    [subscription] = [
        one
        for one in receiver._connection._subs.values()
        if one.subject == protocol.inbox_subject(FED, receiver.holder, ">")
    ]
    monkeypatch.setattr(subscription, "_cb", lossy)
    assert await receiver.fetch(offer.ref) == data
    assert lost == {"0", "2", "3"}
    assert sent_bytes(holder) < len(data) + 4 * CHUNK_BYTES


async def test_a_cancelled_fetch_ends_and_leaves_the_others_alone(holder: Blobs, receiver: Blobs) -> None:
    data = os.urandom(SEVERAL)
    offer = await holder.offer(data)
    cancelled, other = (asyncio.create_task(receiver.fetch(offer.ref)) for _ in range(2))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await other == data
    assert not receiver._receiver._downloads


async def test_leaving_the_block_releases_everything(connect: Connect) -> None:
    connection = await connect()
    async with Blobs.open(connection, FED, HOLDER) as blobs:
        offer = await blobs.offer(secrets.token_bytes(100))
    assert offer.is_released
    assert not connection._subs
