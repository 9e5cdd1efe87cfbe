"""The process that trains one run on one client: ``python -m fedbus child trainer``.

It loads the app's client side, publishes `joined`, and replies to each message of the run until it is stopped. The
app runs in the main thread, the event loop in another one. Weights are transferred as blobs between this process and
the server's. The app gets the path of the captured data as ``node_config["captured-data"]``.
"""

import asyncio
import itertools
import math
import time
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
from fedbus.agents.common.main_thread import MainThread
from fedbus.agents.common.process_orders import (
    LOAD_FAILED_EXIT_CODE,
    TrainerConditions,
    TrainerProcessConfig,
    read_process_config,
)
from fedbus.agents.flower_client.captured_training_data import NO_ROWS, WrittenRows, write_training_rows
from fedbus.bus.blobs import BlobCorrupt, BlobUnavailable
from fedbus.bus.bus import Bus, Delivery
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import set_current_cause
from fedbus.contracts.client import ClientJoined, RoundStarted
from fedbus.contracts.round_messages import MessageContent, RoundMessage, is_training
from fedbus.contracts.run import Scalar
from fedbus.contracts.task.app import LibraryUnusable
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
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import (
    CAPTURED_DATA_KEY,
    BadTask,
    ClientJob,
    ClientResponse,
    ClientSession,
    ErrorCode,
    ReplyError,
)
from fedbus.learning.payload import ContentMissing, fetch_content
from fedbus.learning.round_reply import make_incoming, make_reply
from fedbus.learning.seeding import seed_client
from fedbus.stores.errors import StoreError

MAX_QUEUED_MESSAGES: Final = 16
"""Messages of the run that are received and not handled yet; more of them wait in the stream."""
MAX_OPEN_OFFERS: Final = 2
"""Blobs of replies that stay available: those of this round and the previous one."""

log = structlog.get_logger("fedbus.client_app_process")
tracer = get_tracer("fedbus.client_app_process")


async def main(stop: asyncio.Event, main_thread: MainThread) -> int:
    """Train the run of this process's configuration."""
    config = read_process_config(TrainerProcessConfig)
    otel_context.attach(parent_trace())
    set_current_cause(parent_cause())
    async with Bus.connect(
        config.nats_url, config.identity(AgentName.TRAINER, config.client), access=config.bus_access
    ) as bus:
        try:
            await wait_for_first(
                ClientAppProcess(bus, config, main_thread).run(), stop.wait(), bus.wait_closed()
            )
        except (BadTask, LibraryUnusable) as error:
            exit_with_reason(str(error))
            return LOAD_FAILED_EXIT_CODE
    return 0


class _ServerReplaced(Exception):
    """A later message came from another Flower server process."""


class ClientAppProcess:
    """Runs the app of one client in one run."""

    def __init__(self, bus: Bus, config: TrainerProcessConfig, main_thread: MainThread) -> None:
        self._bus = bus
        self._config = config
        self._task = config.task
        self._main_thread = main_thread
        self._session: ClientSession
        self._received_ids: set[str] = set()
        self._received: asyncio.Queue[Delivery] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self._server = ""
        """The blob holder of the newest Flower server process; a lost server is replaced by another process."""
        self._download: asyncio.Timeout | None = None
        self._has_started = False
        self._message_numbers = itertools.count()
        """Of the messages of this run, as a simulation counts them."""
        self._offers: deque[OfferProtocol] = deque()

    async def run(self) -> None:
        """Load the app, join the run and handle its messages. Raises BadTask and LibraryUnusable."""
        async with self._bus.consume(AgentName.TRAINER, task=self._task.id) as inbox:
            await self._main_thread.run(self._open_session)
            await self._bus.publish(
                ClientJoined(
                    task=self._task.id,
                    client=self._config.client,
                    run=self._config.run,
                    code_version=self._task.code_version,
                )
            )
            await wait_for_first(self._receive_messages(inbox), self._handle_messages())

    def _open_session(self) -> None:
        job = ClientJob(
            task=self._task,
            client=self._config.client,
            run=self._config.run,
            plan=self._config.plan,
            node_config=self._config.node_config,
        )
        self._session = open_library(self._task.table.library).open_client(job)
        self._main_thread.at_end(self._session.close)

    async def _receive_messages(self, inbox: AsyncIterator[Delivery]) -> None:
        """Queue each message once. Drop messages of earlier runs and repeated ones."""
        async for delivery in inbox:
            await delivery.ack()
            message = delivery.message
            assert isinstance(message, RoundMessage)
            if message.run != self._config.run or message.message_id in self._received_ids:
                continue
            self._received_ids.add(message.message_id)
            if (server := _blob_holder(message)) not in ("", self._server):
                self._server = server
                if self._download is not None and not self._download.expired():
                    self._download.reschedule(asyncio.get_running_loop().time())
            await self._received.put(delivery)

    async def _handle_messages(self) -> None:
        while True:
            delivery = await self._received.get()
            message = delivery.message
            assert isinstance(message, RoundMessage)
            with delivery.process():
                if not self._has_started:
                    self._has_started = True
                    await self._publish_started(message)
                await self._handle(message, next(self._message_numbers))

    async def _publish_started(self, message: RoundMessage) -> None:
        await self._bus.publish(
            RoundStarted(
                task=self._task.id, client=self._config.client, run=self._config.run, round=message.round
            )
        )

    async def _handle(self, message: RoundMessage, number: int) -> None:
        """Download, train and upload, each in a span of its own.

        Drop a message of a lost Flower server that is not downloaded yet: its successor does not know the message, and
        the successor's own would wait behind the download.
        """
        conditions = self._config.conditions
        if conditions is not None and conditions.loses_message(number):
            log.info("Message lost by the profile", run=message.run, round=message.round)
            return
        try:
            with self._phase_span("download", message):
                data = await self._fetch(message)
        except (BlobUnavailable, BlobCorrupt, ContentMissing) as error:
            log.warning("Message download failed", run=message.run, reason=str(error))
            reason = f"cannot fetch the message: {error}"
            failed = ClientResponse(error=ReplyError(ErrorCode.MESSAGE_UNAVAILABLE, reason))
            await self._bus.publish(make_reply(message, failed, None))
            return
        except _ServerReplaced:
            log.info("Dropping message of a lost Flower server", run=message.run, round=message.round)
            return
        response, left_out = await self._main_thread.run(self._run_app, message, data)
        if conditions is not None:
            response = await self._apply_conditions(conditions, message, number, response)
            if conditions.loses_reply(number):
                log.info("Reply lost by the profile", run=message.run, round=message.round)
                return
        with self._phase_span("upload", message):
            content = await self._offer(response)
            await self._bus.publish(make_reply(message, response, content, left_out=left_out))

    async def _apply_conditions(
        self, conditions: TrainerConditions, message: RoundMessage, number: int, response: ClientResponse
    ) -> ClientResponse:
        """Wait as long as the device would work and be delayed, and return the response with its working time."""
        trains = is_training(message.message_type)
        measured_s = response.train_s or 0.0
        work = conditions.training if trains else conditions.evaluation
        work_s = work.work_s(number, measured_s, response.samples)
        delay_s = conditions.delay_s(number) if trains else 0.0
        if (wait_s := work_s - measured_s + delay_s) > 0:
            with self._phase_span("delay", message):
                await asyncio.sleep(wait_s)
        return replace(response, train_s=work_s)

    async def _fetch(self, message: RoundMessage) -> bytes | memoryview:
        """Download the content of *message*. Raises _ServerReplaced, and the errors of `fetch_content`."""
        if _blob_holder(message) not in ("", self._server):
            raise _ServerReplaced
        try:
            async with asyncio.timeout(None) as self._download:
                return await fetch_content(
                    message.content, self._bus.blobs, timeout_s=self._config.plan.round_s
                )
        except TimeoutError:
            raise _ServerReplaced from None
        finally:
            self._download = None

    def _run_app(self, message: RoundMessage, data: bytes | memoryview) -> tuple[ClientResponse, int]:
        """Return the app's response, and the number of captured rows that were left out.

        All blocking work is one call: a switch of threads costs more than the work of a small round.
        """
        phase = message.message_type.partition(".")[0]
        with self._phase_span(phase, message) as span:
            captured = self._write_captured(message)
            seed_client(
                self._config.plan.seed,
                client=self._config.client,
                round_number=message.round,
                kind=message.message_type,
            )
            start = time.monotonic()
            response = self._session.handle(make_incoming(message, data, self._node_config(captured)))
            if response.train_s is None:
                response = replace(response, train_s=time.monotonic() - start)
            if response.payload is not None:
                _ = response.payload.sha256  # computed in this thread, not on the loop
            if response.error is not None:
                mark_failed(span, response.error.kind or str(response.error.code), response.error.reason)
        self._record_metrics(phase, response)
        return response, captured.skipped_rows

    def _write_captured(self, message: RoundMessage) -> WrittenRows:
        """Write the captured data for a training message. If that fails, train without it."""
        database = Path(self._config.captured)
        if not message.message_type.startswith("train") or not database.exists():
            return NO_ROWS
        try:
            return write_training_rows(self._task, database, self._captured_path)
        except (StoreError, BadTask) as error:
            log.warning("Training without captured data", reason=str(error))
            return NO_ROWS

    def _node_config(self, captured: WrittenRows) -> dict[str, Scalar]:
        """Return the device's node configuration, with the path of the captured rows if there are any."""
        if captured.skipped_rows:
            log.warning("Captured rows do not validate; excluding them", rows=captured.skipped_rows)
        captured_data: dict[str, Scalar] = (
            {CAPTURED_DATA_KEY: str(self._captured_path)} if captured.rows else {}
        )
        return {**self._config.node_config, **captured_data}

    @property
    def _captured_path(self) -> Path:
        return Path(self._config.captured).with_name("captured.npz")

    async def _offer(self, response: ClientResponse) -> MessageContent | None:
        if response.payload is None or response.error is not None:
            return None
        content, offer = await response.payload.prepare(self._bus.blobs, receivers=1)
        if offer is not None:
            self._add_offer(offer)
        return content

    def _add_offer(self, offer: OfferProtocol) -> None:
        self._offers.append(offer)
        if len(self._offers) > MAX_OPEN_OFFERS:
            self._offers.popleft().release()

    def _record_metrics(self, phase: str, response: ClientResponse) -> None:
        attributes = {TASK: self._task.id, CLIENT: self._config.client}
        record(TRAIN_DURATION, response.train_s or 0.0, attributes | {"fedbus.phase": phase})
        if (loss := response.metrics.get("train_loss")) is not None and math.isfinite(loss):
            set_gauge(TRAIN_LOSS, loss, attributes)

    def _phase_span(self, name: str, message: RoundMessage) -> AbstractContextManager[trace.Span]:
        attributes: dict[str, str | int] = {
            "fedbus.run": message.run,
            "fedbus.client": self._config.client,
            "fedbus.round": message.round or 0,
        }
        return tracer.start_as_current_span(name, attributes=attributes)


def _blob_holder(message: RoundMessage) -> str:
    """Return the process that offers the content of *message*; "" for inline content, which needs no process."""
    return (
        message.content.blob.holder
        if message.content is not None and message.content.blob is not None
        else ""
    )
