"""The messages of the training process, without an app and without a server."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.federation import FED, TASK, tiny_task
from support.memory_nats import memory_nats

from fedbus.agents.common.main_thread import MainThread
from fedbus.agents.common.process_orders import TrainerProcessConfig
from fedbus.agents.flower_client.client_app_process import ClientAppProcess
from fedbus.bus.bus import Bus, Delivery, Identity
from fedbus.contracts.envelope import make_envelope
from fedbus.contracts.model import BlobRef
from fedbus.contracts.round_messages import MessageContent, RoundMessage
from fedbus.contracts.run import RunPlan

RUN, CLIENT = f"{TASK}-1", "c1"


class ReceivedDelivery(Delivery):
    """A delivery without a consumer."""

    async def ack(self) -> None:
        pass


def message_of(server: str) -> RoundMessage:
    blob = BlobRef(sha256="ab" * 32, size_bytes=2000, chunk_bytes=1024, holder=server)
    return RoundMessage(
        task=TASK,
        client=CLIENT,
        run=RUN,
        message_id=f"of {server}",
        message_type="train",
        round=1,
        created_at=0.0,
        ttl_s=60,
        content=MessageContent(blob=blob),
    )


async def deliveries(*messages: RoundMessage) -> AsyncIterator[Delivery]:
    for message in messages:
        raw: Any = None
        yield ReceivedDelivery(message, make_envelope(message, source=""), raw)


async def test_servers_that_follow_each_other_end_a_download_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The download takes a while to end; the third server sends its message before that."""
    downloading, ending, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def download(blob: BlobRef, **_: object) -> bytes:
        downloading.set()
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await ended.wait()
        return b""

    config = TrainerProcessConfig(
        nats_url="",
        federation=FED,
        task=tiny_task(tmp_path),
        client=CLIENT,
        run=RUN,
        plan=RunPlan(),
        node_config={},
        captured=str(tmp_path / "captured.db"),
    )
    first, second, third = (message_of(f"server.flower-server_{number}") for number in (1, 2, 3))
    with memory_nats() as nats:
        async with Bus.connect(nats.url, Identity(FED, "trainer", CLIENT)) as bus, asyncio.timeout(30):
            process = ClientAppProcess(bus, config, MainThread())
            monkeypatch.setattr(bus.blobs, "fetch", download)
            await process._receive_messages(deliveries(first))
            handling = asyncio.create_task(process._handle(first, 0))
            await downloading.wait()
            await process._receive_messages(deliveries(second))
            await ending.wait()
            await process._receive_messages(deliveries(third))
            ended.set()
            await handling
            assert process._received.qsize() == 3
