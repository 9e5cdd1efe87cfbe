"""The client manager: one client in one task. It fetches models, has them served, and decides about training.

    s0 –model_fetched→ pending_application –infer_ready→ serving –client_start→ learning –fin_train→ …

Its lifecycle has one possible owner, so it moves even when the bus is away. It holds no weights
and runs no code of the task: models are files, the inference agent serves them, the FL client
trains. What it says to them goes over the bus like everything else. It alone decides when the
device changes to other code: between two runs, when that code is fetched and checked (`device_code`)
and the inference agent answers with it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from fedbus.agents.client_manager.code import VERSION_FILE, Check, CodeNotReady, DeviceCode
from fedbus.agents.client_manager.eligibility import Ineligible, check_eligibility
from fedbus.agents.client_manager.models import DeviceModels, ModelAnnouncement, announcement_from
from fedbus.agents.client_manager.training_slots import TrainingSlot, TrainingSlots
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import (
    Timers,
    backoff_s,
    handle_each,
    request_until_answered,
    run_until,
)
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.bus.blobs import BlobCorrupt, BlobUnavailable
from fedbus.bus.bus import Bus
from fedbus.bus.errors import NoResponse, RequestRefused
from fedbus.bus.lifecycles import LifecycleHandle, LifecycleStore, TransitionOutbox
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import (
    CLIENT,
    ClientChanges,
    ClientData,
    ClientDeclined,
    ClientEvent,
    ClientStart,
    ClientState,
    FailTrain,
    FinTrain,
    InferReady,
    InferRefused,
    InferStart,
    InferUpdate,
)
from fedbus.contracts.code import CodePublished, CodeReady, CodeRefused
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.lifecycle import NO_CHANGES
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import (
    Enroll,
    GetServerInfo,
    HealthCheck,
    HealthStatus,
    ModelPublished,
    ServerInfo,
    UpdateReady,
)
from fedbus.contracts.serving import ModelRolledBack
from fedbus.contracts.task.task import Task
from fedbus.domain.run_participation import decline_reason, short_version, will_serve_soon
from fedbus.stores.code.open import CodeRepository, DirectoryCodeRepository
from fedbus.stores.errors import StoreError
from fedbus.stores.models.signing import TrustedKeys

BOOTSTRAP_S: Final = 300.0
APPLY_S: Final = 120.0
SYNC_S: Final = 900.0
"""How long new code may take to be fetched, installed and checked, before the device stays on the old one."""
SPARE_S: Final = 60.0
"""What a run may take beyond its recruiting and its rounds, before the client gives up on it."""
APPLYING: Final = "the model is applied"
LEARNING: Final = "the run ends"
AGAIN: Final = "try the model again"
AWAITED: Final = "the run's model comes"
SLOT_AGAIN_S: Final = 2.0
"""How soon to see again whether another task of the device has done with its training."""
SYNCING: Final = "the code is got ready"
ELIGIBLE: Final = "look again whether the rule holds"

log = structlog.get_logger("fedbus.client_manager")


class BootstrapFailed(Exception):
    """The client could not begin: no server, no model, or it was turned away. The supervisor starts it anew."""


@log_method_calls
class ClientManager:
    """One client in one task. Models are kept under *directory*; *outbox* keeps what the bus has not taken."""

    def __init__(
        self,
        bus: Bus,
        task: Task,
        client: ClientId,
        *,
        directory: Path,
        outbox: TransitionOutbox,
        code: CodeRepository | None = None,
        check: Check | None = None,
        labels: Mapping[str, str] | None = None,
        trusted: TrustedKeys | None = None,
        slots: TrainingSlots | None = None,
        bootstrap_s: float = BOOTSTRAP_S,
    ) -> None:
        self._bus = bus
        self._id = task.id
        self._client = client
        self._labels = dict(labels or {})
        self._models = DeviceModels(bus, task.id, directory, trusted)
        self._slots = slots
        self._slot: TrainingSlot | None = None
        """Where this task trains, among the others of the device."""
        self._code = DeviceCode(
            code or DirectoryCodeRepository(Path(task.path)),
            task,
            client=client,
            labels=self._labels,
            check=check,
            kept=directory / VERSION_FILE,
        )
        self._prepared: Task | None = None
        """Code that waits for the inference agent to answer with it."""
        self._directory = directory
        self._outbox = outbox
        self._bootstrap_s = bootstrap_s
        self._turn = asyncio.Lock()
        self._invitation: UpdateReady | None = None
        self._attempt = 0
        self._declined = ("", "")
        """The run that was last declined by the task's rule, and what failed."""
        self._target: ModelRef | None = None
        """The model that is served, or about to be; the next transition records it."""
        self._failures: Counter[str] = Counter()
        """How often this client has failed in the run of the moment."""
        self._life: LifecycleHandle[ClientState, ClientEvent, ClientData, ClientChanges]
        self._timers: Timers
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Be the client until *stop* is set. Raises BootstrapFailed where it cannot begin."""
        async with LifecycleStore.open(self._bus, self._outbox) as lives, Timers.running() as self._timers:
            try:
                await run_until(stop, self._live(lives))
            finally:
                self._give_back_the_slot()

    async def _live(self, lives: LifecycleStore) -> None:
        version, labels = self._code.version, self._labels
        facts = ClientData(task=self._id, client=self._client, code_version=version, labels=labels)
        self._life = await lives.of(CLIENT, facts)
        self._target = self._life.facts.model
        if self._life.born and self._life.state is not ClientState.S0:
            await self._life.transition(
                ClientEvent.RESTARTED, {"run": None, "code_version": version, "labels": labels}
            )
        elif not self._life.born:
            await self._life.create()
        await self._enroll()
        async with self._bus.listen(AgentName.CLIENT_MANAGER, task=self._id) as inbox:
            await self._bootstrap()
            await self._hear_all(inbox)

    async def _hear_all(self, inbox: AsyncIterator[Any]) -> None:
        self.ready.set()
        await handle_each(inbox, self._hear)

    # --- beginning -----------------------------------------------------------------------------

    async def _enroll(self) -> None:
        request = Enroll(task=self._id, client=self._client, labels=self._labels)
        try:
            async with asyncio.timeout(self._bootstrap_s):
                await request_until_answered(self._bus, request)
        except (RequestRefused, TimeoutError) as error:
            await self._give_up(error)

    async def _bootstrap(self) -> None:
        """Fetch the newest model and have it served."""
        try:
            async with asyncio.timeout(self._bootstrap_s):
                model, path = await self._first_model()
        except TimeoutError as error:
            await self._give_up(error)
        else:
            self._target = model
            await self._life.transition(
                ClientEvent.MODEL_FETCHED, {"model": model, "code_version": self._code.version}
            )
            await self._have_served(InferStart, model, path)

    async def _first_model(self) -> tuple[ModelRef, Path]:
        """The model that is served now, and before it the code that it belongs to."""
        attempt, said = 0, ""
        while True:
            try:
                info: ServerInfo = await request_until_answered(self._bus, GetServerInfo(task=self._id))
                await self._first_code(info)
                offered = announcement_from(info)
                assert offered is not None
                self._models.check_signature(offered)
                self._models.newest = offered
                return offered.model, await self._models.fetch(offered.model, offered.blob)
            except (RequestRefused, BlobUnavailable, BlobCorrupt, StoreError) as error:
                if (reason := str(error)) != said:
                    say = log.info if isinstance(error, RequestRefused) else log.warning  # it may only begin
                    say("no model yet", reason=reason)
                    said = reason
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1

    async def _first_code(self, info: ServerInfo) -> None:
        """Who was away while the code changed catches up before anything else; where that fails, with the old."""
        self._code.follow(info.code)
        if (version := self._code.wanted) is None:
            return
        try:
            await self._code.switch_to(await self._code.prepare(version))
        except CodeNotReady as error:
            await self._refuse_code(version, str(error))
        else:
            await self._say_code_ready()

    async def _give_up(self, error: Exception) -> None:
        reason = str(error) or f"no server of {self._id} answered within {self._bootstrap_s:g} s"
        await self._life.transition(ClientEvent.BOOTSTRAP_FAILED, reason=reason)
        raise BootstrapFailed(f"client {self._client} cannot begin: {reason}")

    # --- what is heard ---------------------------------------------------------------------------

    async def _hear(self, message: Message) -> None:
        async with self._turn:
            match message:
                case UpdateReady():
                    await self._invited(message)
                case ModelPublished():
                    await self._model_published(message)
                case CodePublished():
                    await self._code_published(message)
                case InferReady():
                    await self._infer_ready(message)
                case InferRefused():
                    await self._infer_refused(message)
                case ModelRolledBack():
                    await self._model_returned(message)
                case FinTrain() if self._learns(message.run):
                    await self._fin_train(message)
                case FailTrain() if self._learns(message.run):
                    event = ClientEvent.TRAINER_LOST if message.trainer_lost else ClientEvent.FAIL_TRAIN
                    await self._leave_run(event, message.reason)
                case _:
                    log.debug("nothing to do", word=message.word, state=str(self._state))

    @property
    def _state(self) -> ClientState:
        return self._life.state

    def _learns(self, run: str) -> bool:
        return self._state is ClientState.LEARNING and self._life.facts.run == run

    # --- training -----------------------------------------------------------------------------------

    async def _invited(self, invitation: UpdateReady) -> None:
        """Join the run, or say why not. Who will be serving in a moment keeps the invitation until then."""
        if self._learns(invitation.run):
            return
        if will_serve_soon(self._state):
            self._invitation = invitation
            return
        reason = decline_reason(
            invitation,
            state=self._state,
            code_version=self._code.version,
            failures=self._failures[invitation.run],
            now=datetime.now(UTC),
        )
        with tracing.use_trace(invitation.traceparent):
            if reason is not None:
                await self._decline(invitation, reason)
            elif (why_not := await self._ineligible()) is not None:
                await self._wait_until_eligible(invitation, why_not)
            elif not await self._has_a_slot(invitation.run):
                await self._wait_until_eligible(invitation, self._crowded(), SLOT_AGAIN_S)
            else:
                await self._join(invitation)

    async def _has_a_slot(self, run: str) -> bool:
        """Whether this task may train beside the others of the device: it holds its slot until the run is over."""
        if self._slots is None or self._slot is not None:
            return True
        self._slot = await asyncio.to_thread(self._slots.take, run)
        return self._slot is not None

    def _crowded(self) -> Ineligible:
        assert self._slots is not None
        others = ", ".join(self._slots.list_holders()) or "others"
        return Ineligible(f"this device trains {others}, and {self._slots.count} at a time", {})

    def _give_back_the_slot(self) -> None:
        if self._slot is not None:
            self._slot.give_back()
            self._slot = None

    async def _ineligible(self) -> Ineligible | None:
        """Why the task's rule does not hold on this device now, or None."""
        model = self._target
        return await check_eligibility(
            self._code.task.table, self._directory, self._models.path_of(model) if model is not None else None
        )

    async def _wait_until_eligible(
        self, invitation: UpdateReady, why_not: Ineligible, again_s: float | None = None
    ) -> None:
        """Say no, once for each reason, and look again for as long as the run takes in clients."""
        table = self._code.task.table.eligibility
        self._timers.after(ELIGIBLE, again_s or table.again_s, self._look_again)
        if self._declined != (invitation.run, why_not.shape):
            self._declined = (invitation.run, why_not.shape)
            await self._decline(invitation, why_not.reason, rule=table.rule or "", facts=why_not.facts)

    async def _look_again(self) -> None:
        async with self._turn:
            if self._state is ClientState.SERVING and (invitation := await self._open_run()) is not None:
                await self._invited(invitation)

    async def _decline(self, invitation: UpdateReady, reason: str, **more: Any) -> None:
        await self._bus.publish(
            ClientDeclined.model_validate(
                {"task": self._id, "client": self._client, "run": invitation.run, "reason": reason, **more}
            )
        )

    async def _join(self, invitation: UpdateReady) -> None:
        plan = invitation.plan
        longest_s = plan.recruit_s + plan.rounds * 2 * plan.round_s + SPARE_S
        deadline = datetime.now(UTC) + timedelta(seconds=longest_s)
        await self._life.transition(ClientEvent.CLIENT_START, {"run": invitation.run}, deadline=deadline)
        self._timers.at(LEARNING, deadline, self._run_took_too_long)
        await self._bus.publish(
            ClientStart(
                task=self._id,
                client=self._client,
                run=invitation.run,
                plan=plan,
                code_version=invitation.code_version,
            )
        )

    async def _run_took_too_long(self) -> None:
        async with self._turn:
            if self._state is ClientState.LEARNING:
                await self._leave_run(ClientEvent.DEADLINE, "the run did not end in time")

    async def _leave_run(self, event: ClientEvent, reason: str) -> None:
        self._timers.cancel(LEARNING)
        self._give_back_the_slot()
        self._failures = Counter(
            {run: count for run, count in self._failures.items() if run == self._life.facts.run}
        )
        self._failures[str(self._life.facts.run)] += 1
        await self._life.transition(event, {"run": None, "model": self._target}, reason=reason)
        await self._serving()

    async def _fin_train(self, message: FinTrain) -> None:
        """The run is over: what it came to is published, or will be in a moment, unless it is kept back."""
        self._timers.cancel(LEARNING)
        self._give_back_the_slot()
        await self._life.transition(ClientEvent.FIN_TRAIN, {"run": None, "model": self._target})
        if self._has_newer():
            await self._apply_newest()
        elif not message.new_model:
            await self._back_to_serving(ClientEvent.NO_NEW_MODEL, "what the run came to is kept back")
        else:
            self._timers.after(AWAITED, APPLY_S, self._no_new_model)

    # --- models ---------------------------------------------------------------------------------------

    async def _model_published(self, message: ModelPublished) -> None:
        """Remember it; take it up now, unless something else is under way."""
        offered = ModelAnnouncement(
            message.model, message.blob, message.term, message.seal, tracing.current_traceparent()
        )
        self._models.note(offered)
        if not self._has_newer():
            return
        if self._state is ClientState.SERVING:
            self._target = message.model
            await self._life.transition(ClientEvent.MODEL_PUBLISHED, {"model": message.model})
            await self._apply_newest()
        elif self._timers.waits(AWAITED):
            await self._apply_newest()

    def _has_newer(self) -> bool:
        """Whether another model than the one in service has been named since."""
        return self._models.has_other_than(self._target)

    async def _apply_newest(self) -> None:
        """Fetch the newest model and hand it to the inference agent; without it the old one goes on."""
        assert self._models.newest is not None
        self._timers.cancel(AWAITED)
        model = self._models.newest.model
        self._target = model
        try:
            self._models.check_signature(self._models.newest)
            path = await self._models.fetch_with_fallback(model, self._models.newest.blob)
        except (BlobUnavailable, BlobCorrupt, RequestRefused, NoResponse, StoreError) as error:
            await self._keep_the_old(str(error))
        else:
            self._timers.after(APPLYING, APPLY_S, self._not_applied)
            await self._have_served(InferUpdate, model, path)

    async def _have_served(self, word: type[InferStart], model: ModelRef, path: Path) -> None:
        await self._bus.publish(
            word(
                task=self._id,
                client=self._client,
                model=model,
                path=str(path),
                code_version=(self._prepared or self._code.task).code_version,
                published_in=self._models.named_in(model),
                term=self._models.term_of(model),
            )
        )

    def _awaits(self, model: ModelRef) -> bool:
        """Whether it is this model that is to be applied: a word about an earlier one may come twice."""
        return self._state is ClientState.PENDING_APPLICATION and self._target == model

    async def _infer_ready(self, message: InferReady) -> None:
        if self._prepares(message.code_version):
            assert self._prepared is not None
            await self._code_is_ready(self._prepared)
        elif self._awaits(message.model) and not self._timers.waits(AGAIN):
            self._attempt = 0
            self._models.served = message.model
            await self._back_to_serving(ClientEvent.INFER_READY)

    async def _infer_refused(self, message: InferRefused) -> None:
        if self._prepares(message.code_version):
            await self._code_refused(message.code_version, message.reason)
            return
        if not self._awaits(message.model):
            return
        log.warning("the model was refused", version=message.model.version, reason=message.reason)
        if message.serving is not None:
            self._models.served = message.still or self._models.served
            await self._keep_the_old(message.reason)
        else:
            await self._life.transition(
                ClientEvent.INFER_RETRIED, {"model": message.model}, reason=message.reason
            )
            self._timers.after(AGAIN, backoff_s(self._attempt), self._try_again)
            self._attempt += 1

    async def _model_returned(self, message: ModelRolledBack) -> None:
        """The inference agent went back by itself, to another model than was believed; the new one is past."""
        if self._models.served != message.returned_from:
            return  # of a model before the one that serves now
        self._models.served = message.model
        if self._models.newest is not None and self._models.newest.model == message.returned_from:
            self._models.newest = None
        if self._state is ClientState.SERVING:
            self._target = message.model
            await self._life.transition(
                ClientEvent.MODEL_RETURNED, {"model": message.model}, reason=message.reason
            )
        elif self._state is not ClientState.PENDING_APPLICATION:  # which says what is *about* to be served
            self._target = message.model

    async def _try_again(self) -> None:
        """There is nothing to serve yet: ask for the newest model anew, until one is taken."""
        async with self._turn:
            self._timers.cancel(AGAIN)
            model, path = await self._first_model()
            self._target = model
            await self._have_served(InferStart, model, path)

    async def _no_new_model(self) -> None:
        async with self._turn:
            if self._state is ClientState.PENDING_APPLICATION:
                await self._back_to_serving(ClientEvent.NO_NEW_MODEL, "the run brought no new version")

    async def _not_applied(self) -> None:
        async with self._turn:
            if self._state is ClientState.PENDING_APPLICATION:
                await self._keep_the_old(f"the inference agent did not answer within {APPLY_S:g} s")

    async def _keep_the_old(self, reason: str) -> None:
        """The new model is not taken, and not tried again: the next version is."""
        self._models.newest = None
        self._target = self._models.served
        await self._back_to_serving(ClientEvent.INFER_REFUSED, reason)

    async def _back_to_serving(
        self, event: ClientEvent, reason: str = "", changes: ClientChanges = NO_CHANGES
    ) -> None:
        self._timers.cancel(APPLYING)
        await self._life.transition(event, {"model": self._target, **changes}, reason=reason)
        await self._serving()

    # --- serving ------------------------------------------------------------------------------------------

    async def _serving(self) -> None:
        """Now that nothing is under way: other code first, then a newer model, then a run that waits for clients."""
        if (version := self._code.wanted) is not None:
            await self._sync(version)
            return
        if self._has_newer():
            assert self._models.newest is not None
            self._target = self._models.newest.model
            await self._life.transition(ClientEvent.MODEL_PUBLISHED, {"model": self._target})
            await self._apply_newest()
            return
        invitation, self._invitation = self._invitation, None
        if invitation is None:
            invitation = await self._open_run()
        if invitation is not None:
            await self._invited(invitation)

    async def _open_run(self) -> UpdateReady | None:
        """The run that takes in clients now: who was away when it was told of may still join."""
        try:
            status: HealthStatus = await self._bus.request(HealthCheck(task=self._id))
        except (NoResponse, RequestRefused):
            return None
        return status.open_run

    # --- code -----------------------------------------------------------------------------------------------

    async def _code_published(self, message: CodePublished) -> None:
        """Which code belongs where, from now on: at once where nothing is under way, else when that is over."""
        self._code.follow(message.plan)
        if message.candidate == self._code.version:
            await self._say_code_ready()  # the server may have lost count
        elif (reason := self._code.refused.get(message.candidate)) is not None:
            await self._refuse_code(message.candidate, reason)
        if self._state is ClientState.SERVING:
            await self._serving()

    async def _sync(self, version: str) -> None:
        deadline = datetime.now(UTC) + timedelta(seconds=SYNC_S)
        await self._life.transition(
            ClientEvent.CODE_PUBLISHED, reason=f"code {short_version(version)}", deadline=deadline
        )
        self._timers.after(SYNCING, 0, partial(self._get_code_ready, version))

    async def _get_code_ready(self, version: str) -> None:
        """Outside the turn, since it may take minutes: the device serves and hears all the while."""
        try:
            async with asyncio.timeout(SYNC_S):
                task = await self._code.prepare(version)
        except (CodeNotReady, TimeoutError) as error:
            reason = str(error) or f"it was not ready within {SYNC_S:g} s"
            async with self._turn:
                await self._code_refused(version, reason)
        else:
            async with self._turn:
                await self._code_fetched(task)

    async def _code_fetched(self, task: Task) -> None:
        """The last test of new code is that the inference agent answers with it, unless it is for other models."""
        assert self._code.plan is not None
        if self._models.served is None or self._code.plan.new_lineage:
            await self._code_is_ready(task)
            return
        self._prepared = task
        self._timers.after(APPLYING, APPLY_S, self._code_not_applied)
        await self._have_served(InferUpdate, self._models.served, self._models.path_of(self._models.served))

    def _prepares(self, version: str) -> bool:
        """Whether it is code of this *version* that the inference agent is asked about."""
        prepared = self._prepared
        return (
            self._state is ClientState.SYNCING and prepared is not None and prepared.code_version == version
        )

    async def _code_not_applied(self) -> None:
        async with self._turn:
            if self._state is ClientState.SYNCING and self._prepared is not None:
                reason = f"the inference agent did not answer within {APPLY_S:g} s"
                await self._code_refused(self._prepared.code_version, reason)

    async def _code_is_ready(self, task: Task) -> None:
        """Between two runs, and nothing under way: the device changes over."""
        self._prepared = None
        await self._code.switch_to(task)
        await self._say_code_ready()
        await self._ask_what_is_served()
        await self._back_to_serving(ClientEvent.CODE_READY, changes={"code_version": task.code_version})

    async def _ask_what_is_served(self) -> None:
        """A model that did not fit the old code may fit this one."""
        try:
            info: ServerInfo = await self._bus.request(GetServerInfo(task=self._id))
        except (NoResponse, RequestRefused):
            return
        self._models.newest = announcement_from(info) or self._models.newest

    async def _code_refused(self, version: str, reason: str) -> None:
        self._prepared = None
        await self._refuse_code(version, reason)
        await self._back_to_serving(
            ClientEvent.CODE_REFUSED, f"code {short_version(version)}: {reason}"[:1000]
        )

    async def _refuse_code(self, version: str, reason: str) -> None:
        """Say it, and do not try again by ourselves."""
        log.warning("new code is refused", code=version, reason=reason)
        self._code.refused[version] = reason
        await self._bus.publish(
            CodeRefused(
                task=self._id,
                client=self._client,
                code_version=version,
                reason=reason[:500],
                stays_on=self._code.version,
                attempt=self._code.attempt,
            )
        )

    async def _say_code_ready(self) -> None:
        ready = CodeReady(
            task=self._id,
            client=self._client,
            code_version=self._code.version,
            attempt=self._code.attempt,
        )
        await self._bus.publish(ready)
