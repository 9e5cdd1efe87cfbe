"""The process of one run's ServerApp: ``python -m fedbus child server``.

    ServerApp (a thread)  ⇄  BusGrid  ⇄  the loop (this thread)  ⇄  the bus

It says `server_started`, waits for the quorum, runs the app, keeps the global model after each
round, and ends with `run_finished` or `run_failed`. It exits with 0 when it has said so; any
other end is for the wrapper to tell.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import structlog
from opentelemetry import context as otel_context
from opentelemetry import trace

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.child_process import parent_cause, parent_trace
from fedbus.agents.common.process_orders import ServerProcessConfig, read_process_config
from fedbus.bus.bus import Bus, Delivery
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.causation import current_cause, set_current_cause
from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply
from fedbus.contracts.envelope import uuid7
from fedbus.contracts.model import Artifact
from fedbus.contracts.run import RoundResult
from fedbus.contracts.server import BeginTraining, RoundFinished, RunFailed, RunFinished, ServerStarted
from fedbus.contracts.telemetry import get_tracer
from fedbus.domain.client_scores import collect_client_stats, compute_scores, task_rounds
from fedbus.learning import weights
from fedbus.learning.client_selection import ClientSelection
from fedbus.learning.flower import task_code
from fedbus.learning.flower.contribution import ContributionLimits
from fedbus.learning.flower.grid import BusGrid
from fedbus.learning.flower.node_polling import NotEnoughClients
from fedbus.learning.flower.replies import GridClosed
from fedbus.learning.flower.server_app_host import ServerAppFailed, ServerJob, run_server_app
from fedbus.learning.weights import Arrays, BadWeights, SafetensorsFile
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import ModelStore, open_model_store

GRID_AGENT = AgentName.FLOWER_SERVER_GRID
EXPECTED_ERRORS = (task_code.BadTask, BadWeights, NotEnoughClients, GridClosed, ServerAppFailed, StoreError)
"""What ends a run with a word; anything else is a bug, and the process falls."""

log = structlog.get_logger("fedbus.server_process")
tracer = get_tracer("fedbus.server_process")


async def main(stop: asyncio.Event) -> int:
    """Run the ServerApp that this process was started for, in the trace of who started it."""
    order = read_process_config(ServerProcessConfig)
    otel_context.attach(parent_trace())
    set_current_cause(parent_cause())
    async with Bus.connect(
        order.nats_url, order.identity(AgentName.FLOWER_SERVER), access=order.access
    ) as bus:
        await wait_for_first(ServerAppProcess(bus, order).run(), stop.wait(), bus.lost())
    return 0


class ServerAppProcess:
    """One run's ServerApp at work."""

    def __init__(self, bus: Bus, order: ServerProcessConfig) -> None:
        self._bus = bus
        self._order = order
        self._task = order.task
        self._store = open_model_store(order.store, order.task.id)
        self._grid = BusGrid(bus, task=order.task.id, run=order.run, plan=order.plan)
        self._begin: asyncio.Future[tuple[BeginTraining, str]] = asyncio.get_running_loop().create_future()
        """Whom to begin with, and the id of the message that says so."""

    async def run(self) -> None:
        """From the first word to the last."""
        async with (
            self._bus.listen(GRID_AGENT, task=self._task.id) as inbox,
            self._bus.subscribe_ephemeral(Heartbeat, task=self._task.id) as beats,
        ):
            hearing = asyncio.gather(self._hear(inbox), self._feel(beats))
            try:
                await wait_for_first(self._train(), hearing)
            finally:
                self._grid.close("the run is over")

    async def _hear(self, inbox: AsyncIterator[Delivery]) -> None:
        async for delivery in inbox:
            match delivery.message:
                case BeginTraining() as begin if begin.run == self._order.run and not self._begin.done():
                    self._begin.set_result((begin, delivery.envelope.id))
                case ClientJoined() as joined if joined.code_version != self._task.code_version:
                    log.warning("a client with other code may not join", client=joined.client)
                case RoundReply() as reply:
                    self._grid.deliver(
                        reply, sender_span=delivery.sender_span, message_id=delivery.envelope.id
                    )
                case ClientJoined() | FailTrain() as event:
                    self._grid.deliver(event)
            await delivery.ack()

    async def _feel(self, beats: AsyncIterator[Any]) -> None:
        async for beat in beats:
            self._grid.deliver(beat)

    async def _train(self) -> None:
        try:
            job = await asyncio.to_thread(self._job, await self._initial(), await self._selection())
            await self._bus.publish(ServerStarted(task=self._task.id, run=self._order.run))
            begin, said_in = await self._begin
            set_current_cause(said_in)
            self._grid.admit(begin.cohort)
            await self._run_app(job)
        except EXPECTED_ERRORS as error:
            log.warning("the run failed", run=self._order.run, reason=str(error))
            await self._bus.publish(
                RunFailed(task=self._task.id, run=self._order.run, reason=" ".join(str(error).split())[:500])
            )

    async def _initial(self) -> Path:
        """The file that the run begins with, verified by this process, whatever others saw of it."""
        return await self._store.path_of(self._order.initial_sha256)

    async def _selection(self) -> ClientSelection:
        """Who is to train and what updates weigh, by what the log tells of each client; this run's rounds included."""
        table = self._task.table.selection
        if table.clients is None and table.weigh_by == "samples":
            return ClientSelection()
        known = collect_client_stats(task_rounds(self._task.id, await self._bus.states("run")))
        return ClientSelection(
            most=table.clients,
            explore=table.explore,
            scores=compute_scores(known, table.by),
            weights=None if table.weigh_by == "samples" else compute_scores(known, table.weigh_by),
        )

    def _job(self, initial: Path, selection: ClientSelection) -> ServerJob:
        """What is to be run; the app is loaded once here, so that a broken one fails before clients come."""
        path = Path(self._task.path)
        task_code.load_server_app(path, self._task.serverapp)
        return ServerJob(
            path=path,
            serverapp=self._task.serverapp,
            plan=self._order.plan,
            model=weights.load(initial),
            run_config=dict(self._task.run_config),
            first_round=self._order.first_round,
            streaming=self._task.table.aggregation == "streaming",
            selection=selection,
            contribution=ContributionLimits(**self._task.table.contribution.model_dump(by_alias=False)),
        )

    async def _run_app(self, job: ServerJob) -> None:
        with CheckpointWriter(self._bus, self._order, self._store) as checkpoints:
            with _start_span("run the ServerApp", self._order.run):
                final = await asyncio.to_thread(run_server_app, self._grid, job, checkpoints.round_finished)
            await asyncio.to_thread(checkpoints.all_told)
            set_current_cause(checkpoints.last_published or current_cause())
        artifact = await _store_model(weights.pack(final), self._store, self._order)
        await self._bus.publish(
            RunFinished(
                task=self._task.id, run=self._order.run, artifact=artifact, rounds=self._order.plan.rounds
            )
        )


class CheckpointWriter:
    """Keeps the global model after each round and says so, while the next round is under way.

    One at a time: if the disk is slower than the rounds, the app waits for it.
    """

    def __init__(self, bus: Bus, order: ServerProcessConfig, store: ModelStore) -> None:
        self._bus = bus
        self._order = order
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._last: Future[None] | None = None
        self.last_published = ""
        """The id of the last word on a round."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._last.cancel()

    def round_finished(self, result: RoundResult, arrays: Arrays) -> None:
        """Called by the app's thread after each round."""
        self.all_told()
        work = self._keep_and_tell(result, weights.pack(arrays))
        self._last = asyncio.run_coroutine_threadsafe(work, self._loop)

    def all_told(self) -> None:
        """Wait for the round before; raises what kept it from being kept."""
        if self._last is not None:
            self._last.result()

    async def _keep_and_tell(self, result: RoundResult, model: SafetensorsFile) -> None:
        finished = RoundFinished(
            task=self._order.task.id,
            run=self._order.run,
            round=result.round,
            result=result,
            checkpoint=await _store_model(model, self._store, self._order, result.round),
        )
        told = uuid7()
        await self._bus.publish(finished, id=told)
        self.last_published = told


async def _store_model(
    model: SafetensorsFile, store: ModelStore, order: ServerProcessConfig, number: int | None = None
) -> Artifact:
    """*model* in *store*, from where it lies in memory, its digest taken on the way."""
    about: dict[str, str | int] = {"fedbus.run": order.run, "fedbus.round": number or order.plan.rounds}
    with tracer.start_as_current_span("store", attributes=about):
        return model.artifact(await store.put(model.buffers))


@contextmanager
def _start_span(name: str, run: str) -> Iterator[None]:
    """What is done inside hangs on a span that is sent at once: one that lasts as long as a run shows too late."""
    span = tracer.start_span(name, attributes={"fedbus.run": run})
    span.end()
    with trace.use_span(span):
        yield
