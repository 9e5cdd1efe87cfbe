"""Properties of blobs of every size, and of chunks in every order."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TypeAlias

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import nats_server
from support.memory_nats import memory_nats
from support.raw_connection import connect_raw

from fedbus.bus.blobs import CHUNK_BYTES, WINDOW_BYTES, Blobs
from fedbus.bus.blobs.protocol import ChunkRequest
from fedbus.bus.blobs.receive_progress import ReceiveProgress
from fedbus.bus.blobs.sources import open_source
from fedbus.contracts.identifiers import federation_id
from fedbus.contracts.model import BlobRef

FED = federation_id("fed")
NOISE = memoryview(os.urandom(WINDOW_BYTES + 2 * CHUNK_BYTES + 5))
MOST = len(NOISE)

Pair: TypeAlias = tuple[Blobs, Blobs]

sizes = st.builds(
    lambda chunks, more: max(0, chunks * CHUNK_BYTES + more), st.integers(0, 4), st.integers(-2, 2)
)
one_server = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["nats-server", pytest.param("memory", marks=pytest.mark.slow)],
)
async def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    """A holder and a receiver, on one server for all examples."""
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            url = stack.enter_context(memory_nats()).url
        else:
            url = (await stack.enter_async_context(nats_server(tmp_path_factory.mktemp("nats")))).url
        one, other = await connect_raw(url), await connect_raw(url)
        async with Blobs.open(one, FED, "holder") as holder, Blobs.open(other, FED, "receiver") as receiver:
            yield holder, receiver
        await one.close()
        await other.close()


@pytest.mark.asyncio(loop_scope="module")
@one_server
@given(size=sizes, receivers=st.integers(1, 2))
@example(size=MOST, receivers=1)
async def test_what_is_fetched_is_what_was_offered(
    pair: Pair, tmp_path: Path, size: int, receivers: int
) -> None:
    holder, receiver = pair
    async with await holder.offer(NOISE[:size], receivers=receivers) as offer:
        assert await receiver.fetch(offer.ref) == NOISE[:size]
        await receiver.fetch_to(offer.ref, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == NOISE[:size]


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.asyncio(loop_scope="module")
@one_server
@given(size=sizes, length=st.integers(0, MOST), is_valid=st.booleans())
async def test_the_file_is_correct_whatever_the_part_file_contained(
    pair: Pair, tmp_path: Path, size: int, length: int, is_valid: bool
) -> None:
    holder, receiver = pair
    async with await holder.offer(NOISE[:size]) as offer:
        part = NOISE[:length] if is_valid else bytes(length)
        (tmp_path / f".blob.{offer.ref.sha256[:16]}.part").write_bytes(part)
        await receiver.fetch_to(offer.ref, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == NOISE[:size]
    assert names_in(tmp_path) == ["blob"]


@given(cuts=st.lists(st.integers(0, 999), max_size=6), start=st.integers(0, 999), length=st.integers(0, 999))
async def test_buffers_read_as_if_they_were_one(cuts: list[int], start: int, length: int) -> None:
    ends = sorted({0, *cuts, 999})
    content = open_source([NOISE[a:b] for a, b in pairwise(ends)])
    end = min(start + length, 999)
    assert content.size_bytes == 999
    assert bytes(await content.read(start, max(start, end))) == NOISE[start:end]


@given(
    chunks=st.integers(1, 40),
    window=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
    losses=st.sets(st.integers(0, 39)),
)
def test_chunks_are_taken_once_in_order_within_one_window(
    chunks: int, window: int, order: Random, losses: set[int]
) -> None:
    progress, taken, in_flight = ReceiveProgress(chunks=chunks), list[bytes](), list[int]()
    lost = set(losses)
    while not progress.is_complete:
        in_flight += progress.request_window(window)
        if not in_flight:
            in_flight += [index for missing in progress.missing_ranges(chunks) for index in missing]
        assert progress.requested_until - len(taken) <= window
        order.shuffle(in_flight)
        index = in_flight.pop()
        if index in lost:
            lost.remove(index)
            continue
        assert progress.record_arrival(index, b"%d" % index)
        assert not progress.record_arrival(index, b"again")
        taken += progress.take_ready()
    assert taken == [b"%d" % index for index in range(chunks)]


@given(size=st.integers(0, 10**9), chunk=st.integers(1024, 16 * 1024**2))
def test_the_chunks_of_a_reference_make_up_its_size(size: int, chunk: int) -> None:
    ref = BlobRef(sha256="ab" * 32, size_bytes=size, chunk_bytes=chunk, holder="h")
    *full, last = (
        ref.chunk_size(index) for index in sorted({0, max(0, ref.chunk_count - 2), ref.chunk_count - 1})
    )
    assert all(one == chunk for one in full)
    assert (ref.chunk_count - 1) * chunk + last == size
    assert ref.chunk_size(ref.chunk_count) < 0 > ref.chunk_size(-1)


@given(
    st.builds(ChunkRequest, st.just("ab" * 32), *[st.integers(0, 2**32 - 1)] * 2, st.integers(0, 2**64 - 1))
)
def test_a_packed_request_unpacks_to_the_same(packed: ChunkRequest) -> None:
    assert ChunkRequest.unpack(packed.pack()) == packed


@given(st.binary(max_size=200).filter(lambda text: len(text) != 52))
def test_an_invalid_request_unpacks_to_none(text: bytes) -> None:
    assert ChunkRequest.unpack(text) is None
