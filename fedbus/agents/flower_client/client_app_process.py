"""The process that trains one run on one client: ``python -m fedbus child trainer``.

It loads the ClientApp, says `joined`, and answers each Flower message of the run until it is
asked to stop. Weights come and go as blobs, straight between here and the Flower server; what
was captured on the device is handed to the app as ``node_config["captured-data"]``.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import exit_with_reason, parent_cause, parent_trace
from fedbus.agents.common.process_orders import TrainerProcessConfig, read_process_config
from fedbus.agents.flower_client.captured_training_data import NO_ROWS, WrittenRows, write_training_rows
from fedbus.bus.blobs import BlobCorrupt, BlobUnavailable
from fedbus.bus.bus import Bus, Delivery
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import set_current_cause
from fedbus.contracts.client import ClientJoined, RoundReply, RoundStarted
from fedbus.contracts.run import Scalar
from fedbus.contracts.server import RoundMessage
from fedbus.contracts.telemetry import (
    CLIENT,
    TASK,
    TRAIN_DURATION,
    TRAIN_LOSS,
    get_tracer,
    mark_failed,
    record,
    set_gauge,
)
from fedbus.learning.bus_protocol import OfferProtocol
from fedbus.learning.flower import record_codec
from fedbus.learning.flower.client_app_host import ClientAppHost, ClientAppReply, make_undelivered_reply
from fedbus.learning.flower.message_payload import MessagePayload, fetch_content
from fedbus.learning.flower.record_codec import RecordDecodeError
from fedbus.learning.flower.task_code import BadTask
from fedbus.stores.errors import StoreError

CAPTURED_DATA_FILE: Final = "captured-data"
MAX_OPEN_OFFERS: Final = 2
"""Replies that may still be fetched: this round's and the one before."""

log = structlog.get_logger("fedbus.trainer_process")
tracer = get_tracer("fedbus.trainer_process")


async def main(stop: asyncio.Event) -> int:
    """Train the run that this process was started for."""
    order = read_process_config(TrainerProcessConfig)
    otel_context.attach(parent_trace())
    set_current_cause(parent_cause())
    async with Bus.connect(
        order.nats_url, order.identity(AgentName.TRAINER, order.client), access=order.access
    ) as bus:
        try:
            await wait_for_first(ClientAppProcess(bus, order).run(), stop.wait(), bus.lost())
        except BadTask as error:
            return exit_with_reason(str(error))
    return 0


class ClientAppProcess:
    """One client's ClientApp at work in one run."""

    def __init__(self, bus: Bus, order: TrainerProcessConfig) -> None:
        self._bus = bus
        self._order = order
        self._task = order.task
        self._host = ClientAppHost(
            Path(order.task.path),
            order.task.clientapp,
            client=order.client,
            run=order.run,
            run_config={**order.task.run_config, **order.plan.config},
            node_config=order.node_config,
        )
        self._answered: set[str] = set()
        self._offers: deque[OfferProtocol] = deque()

    async def run(self) -> None:
        async with self._bus.listen(AgentName.TRAINER, task=self._task.id) as inbox:
            await asyncio.to_thread(self._host.load)
            await self._bus.publish(
                ClientJoined(
                    task=self._task.id,
                    client=self._order.client,
                    run=self._order.run,
                    code_version=self._task.code_version,
                )
            )
            await self._work(inbox)

    async def _work(self, inbox: AsyncIterator[Delivery]) -> None:
        """Each message once; one of an earlier run, or one that comes again, is let go."""
        async for delivery in inbox:
            await delivery.ack()
            message = delivery.message
            assert isinstance(message, RoundMessage)
            if message.run != self._order.run or message.message_id in self._answered:
                continue
            self._answered.add(message.message_id)
            with delivery.process():
                if len(self._answered) == 1:
                    await self._say_started(message)
                await self._answer(message)

    async def _say_started(self, message: RoundMessage) -> None:
        await self._bus.publish(
            RoundStarted(
                task=self._task.id, client=self._order.client, run=self._order.run, round=message.round
            )
        )

    async def _answer(self, message: RoundMessage) -> None:
        """Download, train, upload: each a span, so that a slow one shows."""
        try:
            with self._phase("download", message):
                data = await fetch_content(
                    message.content, self._bus.blobs, timeout_s=self._order.plan.round_s
                )
            answer, parcel = await asyncio.to_thread(self._trained, message, data)
        except (BlobUnavailable, BlobCorrupt, RecordDecodeError) as error:
            log.warning("the message could not be fetched", run=message.run, reason=str(error))
            await self._bus.publish(make_undelivered_reply(message, str(error)).event(None))
            return
        with self._phase("upload", message):
            await self._bus.publish(await self._posted(answer, parcel))

    def _trained(
        self, message: RoundMessage, data: bytes | memoryview
    ) -> tuple[ClientAppReply, MessagePayload | None]:
        """All that blocks, in one go: each change of threads costs a small round more than its work."""
        content = record_codec.decode(data)
        phase = message.message_type.partition(".")[0]
        with self._phase(phase, message) as span:
            captured = self._captured(message)
            answer = self._host.handle(message, content, node_config=self._node_config(captured))
            if answer.error_code is not None:
                mark_failed(span, answer.error_kind, answer.error_reason)
        answer = replace(answer, left_out=captured.left_out)
        self._measure(phase, answer)
        return answer, None if answer.content is None else MessagePayload.of(
            record_codec.encode(answer.content)
        )

    def _captured(self, message: RoundMessage) -> WrittenRows:
        """What the device has captured and knows the truth of by now, written for a training."""
        database = Path(self._order.captured)
        if not message.message_type.startswith("train") or not database.exists():
            return NO_ROWS
        try:
            return write_training_rows(self._task, database, self._snapshot)
        except (StoreError, BadTask) as error:
            log.warning("trained without captured data", reason=str(error))
            return NO_ROWS

    def _node_config(self, captured: WrittenRows) -> dict[str, Scalar]:
        """The device's own configuration, with where the captured rows are."""
        if captured.left_out:
            log.warning(
                "captured rows are not as the task wants them, and are left out", rows=captured.left_out
            )
        more: dict[str, Scalar] = {CAPTURED_DATA_FILE: str(self._snapshot)} if captured.rows else {}
        return {**self._order.node_config, **more}

    @property
    def _snapshot(self) -> Path:
        return Path(self._order.captured).with_name("captured.npz")

    async def _posted(self, answer: ClientAppReply, parcel: MessagePayload | None) -> RoundReply:
        if parcel is None:
            return answer.event(None)
        content, offer = await parcel.post(self._bus.blobs, receivers=1)
        if offer is not None:
            self._keep(offer)
        return answer.event(content)

    def _keep(self, offer: OfferProtocol) -> None:
        self._offers.append(offer)
        if len(self._offers) > MAX_OPEN_OFFERS:
            self._offers.popleft().release()

    def _measure(self, phase: str, answer: ClientAppReply) -> None:
        about = {TASK: self._task.id, CLIENT: self._order.client}
        record(TRAIN_DURATION, answer.train_s, about | {"fedbus.phase": phase})
        if (loss := answer.figures.get("train_loss")) is not None and math.isfinite(loss):
            set_gauge(TRAIN_LOSS, loss, about)

    def _phase(self, name: str, message: RoundMessage) -> AbstractContextManager[trace.Span]:
        attributes: dict[str, str | int] = {
            "fedbus.run": message.run,
            "fedbus.client": self._order.client,
            "fedbus.round": message.round or 0,
        }
        return tracer.start_as_current_span(name, attributes=attributes)
