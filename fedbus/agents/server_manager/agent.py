"""The server manager: owns the server lifecycle of one task.

It takes in clients for a run, has the Flower server train it, makes a version of what came
out, and tells the clients. It alone moves the server; whatever comes is handled one at a
time, so a decision is never interrupted half-way.

    scheduler –open_run→ recruiting –quorum_reached→ training –run_finished→ publishing → waiting

It runs no code of the task and holds no weights: the Flower server does the first, the model
repository and the blobs the second. Which code is whose stands in `rollouts`, which model is served
and why in `versions` and `promotions`, what becomes of it where the repository fails in `keeping`; all decide in the
manager's turn.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import structlog

from fedbus import __version__
from fedbus.agents.common import tracing
from fedbus.agents.common.asyncio_tools import Timers, handle_each, until
from fedbus.agents.common.debug_logging import told_step_by_step
from fedbus.agents.server_manager.code_rollout import Rollouts
from fedbus.agents.server_manager.code_watcher import CodeFollowing
from fedbus.agents.server_manager.flower_server_client import FlowerAsked
from fedbus.agents.server_manager.model_availability import Keeping
from fedbus.agents.server_manager.model_promotion import Promotions
from fedbus.agents.server_manager.model_versions import Served, Versions, waiting_for
from fedbus.agents.server_manager.run_metrics import round_measured, run_measured
from fedbus.bus.bus import Bus
from fedbus.bus.errors import RequestRefused
from fedbus.bus.lifecycles import Life, Lives
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.catalogue import OF_A_CLIENT
from fedbus.contracts.client import Declined, Joined
from fedbus.contracts.code import CodeReady, CodeRefused
from fedbus.contracts.identifiers import client_id
from fedbus.contracts.lifecycle import NO_CHANGES
from fedbus.contracts.message import Body, Message, RefusalKind, Refused
from fedbus.contracts.model import Artifact, Manifest, ModelRef
from fedbus.contracts.server import (
    SERVER,
    BeginTraining,
    CancelRun,
    Enroll,
    Enrolled,
    GetServerInfo,
    HealthCheck,
    HealthStatus,
    ModelPublished,
    OpenRun,
    RoundFinished,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunOpened,
    ServerChanges,
    ServerClosed,
    ServerEvent,
    ServerFacts,
    ServerInfo,
    ServerLost,
    ServerStarted,
    ServerState,
    StartServer,
    StoreTrouble,
    UpdateReady,
)
from fedbus.contracts.situations import server_publishing, server_training
from fedbus.contracts.subjects import RESERVED
from fedbus.contracts.task.task import Task
from fedbus.domain.code_rollout import Trial
from fedbus.domain.model_promotion import Verdict
from fedbus.domain.run_outcome import nothing_taken
from fedbus.domain.run_participation import who_came
from fedbus.domain.run_recovery import GiveUp, after_server_lost
from fedbus.stores.code.open import CodeRepository, FixedCode
from fedbus.stores.errors import StoreError
from fedbus.stores.models.open import ModelStore
from fedbus.stores.models.signing import Signer

PUBLISH_S = 120.0
"""How long a finished run's model may wait for the model repository before it is given up."""
HINDERED_S = 60.0
"""How long after a run that a store or a missing agent hindered a candidate is tried once more."""
RECRUITING = "recruiting expires"
FITTING = "see whether the code fits the served model"
RUN_FAILED = frozenset({ServerEvent.RECRUITING_EXPIRED, ServerEvent.RUN_FAILED, ServerEvent.VERSION_REFUSED})
Outcome = Literal["finished", "failed", "cancelled"]

log = structlog.get_logger("fedbus.server_manager")


@told_step_by_step
class ServerManager:
    """The server of one task. *models* is where versions are kept."""

    def __init__(
        self,
        bus: Bus,
        task: Task,
        models: ModelStore,
        *,
        code: CodeRepository | None = None,
        signer: Signer | None = None,
    ) -> None:
        self._bus = bus
        self._id = task.id
        self._turn = asyncio.Lock()
        self._flower = FlowerAsked(bus, task.id)
        self._versions = Versions(bus, task.id, models, signer)
        code = code or FixedCode(Path(task.path))
        self._rollouts = Rollouts(bus, code, task, self, self._turn)
        self._following = CodeFollowing(bus, code, self._rollouts, self)
        self._promotions = Promotions(self, self._versions)
        self._joined: dict[str, None] = {}
        self._life: Life[ServerState, ServerEvent, ServerFacts, ServerChanges]
        self._timers: Timers
        self._keeping: Keeping
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Be the server until *stop* is set. What is under way then is taken up by the next manager."""
        await self._bus.make_streams()
        async with (
            Lives.open(self._bus) as lives,
            Timers.running() as self._timers,
            self._bus.listen(AgentName.SERVER_MANAGER, task=self._id) as inbox,
        ):
            self._life = await lives.of(SERVER, ServerFacts(task=self._id))
            self._keeping = Keeping(self, self._versions, self._timers)
            await self._rollouts.wake(lives, self._timers)
            try:
                async with self._bus.serve(self._answers, task=self._id, version=__version__):
                    await until(stop, self._live(inbox))
            finally:
                self._versions.withdraw()

    async def _live(self, inbox: AsyncIterator[Any]) -> None:
        async with self._turn:
            with tracing.going_on(await self._trace_to_go_on()):
                await self._wake()
        self.ready.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._following.follow(), name="follow the code repository")
            await handle_each(inbox, self._hear)

    # --- waking up ---------------------------------------------------------------------

    async def _trace_to_go_on(self) -> str:
        """That of the run whose end is still to come, or to be told; what is only told again is of no run."""
        told = await self._bus.said_last(ServerClosed, task=self._id)
        is_over = self._life.state is ServerState.WAITING
        if is_over and any(isinstance(one, ServerClosed) and one.run == self._facts.run for one in told):
            return ""
        return self._facts.traceparent

    async def _wake(self) -> None:
        """Go on from where the log says the server stands."""
        if not self._life.born:
            await self._life.create()
        found_waiting = self._life.state is ServerState.WAITING
        event, reason = self._life.event, self._life.reason
        match self._life.state:
            case ServerState.MODEL_INIT:
                await self._keeping.begin()
            case ServerState.RECRUITING | ServerState.TRAINING:
                await self._go_on_with_the_run()
            case ServerState.PUBLISHING:
                await self._publish()
            case ServerState.WAITING:
                pass
        if self._facts.model is not None and self._keeping.on_offer is None:
            await self._keeping.take_up()
        if found_waiting and self._facts.run is not None:
            await self._tell_the_end(event, reason)
        if self.at_rest:
            self._timers.after(FITTING, 0.0, self._tell_a_misfit)
            await self._rollouts.at_rest()
        await self._rollouts.tell()

    async def _go_on_with_the_run(self) -> None:
        """Count again who had joined. Whether the Flower server is there, we hear behind all that it said."""
        assert self._facts.run is not None
        self._joined = dict.fromkeys(self._facts.cohort)
        for joined in await self._bus.said_last(Joined, task=self._id):
            if isinstance(joined, Joined) and joined.run == self._facts.run:
                await self._client_joined(joined)
        if self._life.state is ServerState.RECRUITING:
            assert self._facts.recruit_until is not None
            self._timers.at(RECRUITING, self._facts.recruit_until, self._recruiting_expired)
        await self._flower.is_up(self._facts.run, say_so=True)

    async def _tell_the_end(self, event: ServerEvent | None, reason: str) -> None:
        """Of the last run, whose end we may not have come to tell. Who knows it already is not disturbed.

        *event*, *reason*: what had last happened when we woke.
        """
        outcomes: dict[ServerEvent | None, Outcome] = {
            ServerEvent.VERSION_PUBLISHED: "finished",
            ServerEvent.CANDIDATE_KEPT: "finished",
            ServerEvent.RUN_CANCELLED: "cancelled",
        }
        if event is ServerEvent.VERSION_PUBLISHED and self._keeping.on_offer is not None:
            await self.tell_the_version()
        if (outcome := outcomes.get(event)) or event in RUN_FAILED:
            await self._close(outcome or "failed", reason, new_model=event is not ServerEvent.CANDIDATE_KEPT)

    async def first_version(self) -> Served:
        """Have the first model of all built and crowned; raises StoreError, RequestRefused."""
        return await self._first_version(self._rollouts.task)

    async def begin_with(self, served: Served) -> None:
        """There is a model now: from here on runs may come."""
        version = self._rollouts.task.code_version
        await self.serve(ServerEvent.MODEL_READY, served, {"code_version": version, "trouble": None})

    async def settle(self) -> None:
        """All is well again: what has waited for that begins."""
        if self.at_rest:
            await self._rollouts.at_rest()

    async def _first_version(self, task: Task, *, new_lineage: bool = False) -> Served:
        """Have a first model built and make it the champion."""
        artifact = await self._flower.first_model(task.code_version)
        manifest = await self._versions.publish_first(
            artifact, code_version=task.code_version, new_lineage=new_lineage
        )
        return await self._versions.crown(manifest.version, f"the first model of lineage {manifest.lineage}")

    # --- what is served ------------------------------------------------------------------

    async def serve(
        self, event: ServerEvent, served: Served, changes: ServerChanges = NO_CHANGES, *, reason: str = ""
    ) -> None:
        """Move by *event*: from here on *served* is the champion."""
        model, seal, term = served.manifest.ref, served.manifest.seal, served.champion.term
        await self._life.transition(
            event, {"model": model, "seal": seal, "term": term, **changes}, reason=reason
        )

    async def serve_instead(
        self, event: ServerEvent, served: Served, reason: str, changes: ServerChanges = NO_CHANGES
    ) -> None:
        """The same, and every client hears of it: the turn is ours."""
        await self.serve(event, served, changes, reason=reason)
        await self._keeping.give_out(reason)

    async def begin_lineage(self, task: Task, reason: str) -> None:
        """Build a first model anew and serve it; raises StoreError and RequestRefused."""
        served = await self._first_version(task, new_lineage=True)
        await self.serve_instead(
            ServerEvent.LINEAGE_STARTED, served, reason, {"code_version": task.code_version}
        )

    async def begin_lineage_by_hand(self, reason: str) -> None:
        """The same, of the code that everybody has."""
        await self.begin_lineage(self._rollouts.task, reason)

    async def check_fits(self, model: Artifact) -> str:
        """Where *model* is not what everybody's code makes, in words; empty where it is. Raises RequestRefused."""
        return await self._flower.differs(model, self._rollouts.task.code_version)

    def note_fit(self, code_version: str, model: ModelRef) -> None:
        """It was found out by the check that came before the code was rolled out."""
        self._flower.note_fit(code_version, model)

    async def _misfit(self, task: Task) -> str:
        """Why the code of *task* cannot train from the champion; empty where it can. Raises StoreError."""
        model = self._facts.model
        assert model is not None
        if await self._versions.code_of(model) == task.code_version:
            return ""
        try:
            differs = await self._flower.differs(model, task.code_version)
        except RequestRefused as error:  # the run itself will meet what is wrong, and say it
            log.warning("whether the code fits the served model was not found out", reason=str(error))
            return ""
        return differs and (
            f"version {model.version}, which is served, does not fit the task's code: {differs}; go back to code that "
            "fits, or begin anew with this one: fedbus model init --new-lineage"
        )

    async def _tell_a_misfit(self) -> None:
        """The code may have changed while we were away: whoever reads the log need not wait for the next run."""
        with suppress(StoreError):
            if misfit := await self._misfit(self._rollouts.task):
                log.warning("runs will be refused", reason=misfit)

    # --- what is asked -----------------------------------------------------------------

    @property
    def _answers(self) -> dict[Any, Callable[[Any], Awaitable[Body]]]:
        return {
            HealthCheck: self._health,
            GetServerInfo: self._info,
            Enroll: self._enroll,
            OpenRun: self._open_run,
            CancelRun: self._cancel_run,
            **self._promotions.answers,
            **self._following.answers,
        }

    async def _health(self, _: HealthCheck) -> Body:
        return HealthStatus(state=self._life.state, open_run=self._invitation())

    async def _info(self, _: GetServerInfo) -> Body:
        if (blob := self._keeping.on_offer) is None:
            what = "has no model yet" if self._facts.model is None else "has no model to give out now"
            why = self._keeping.trouble or f"its server is {self._life.state}"
            return Refused(reason=f"task {self._id} {what}: {why}")
        return ServerInfo(
            code_version=self._rollouts.facts.code_version,
            model=self._facts.model,
            blob=blob,
            term=self._facts.term,
            seal=self._facts.seal,
            code=self._rollouts.facts.plan,
        )

    async def _enroll(self, request: Enroll) -> Body:
        if request.client in RESERVED:
            return Refused(
                reason=f"a client cannot be called {request.client!r}: on the bus that name stands for others"
            )
        client = client_id(request.client)
        names = [await self._bus.enroll(agent, task=self._id, client=client) for agent in OF_A_CLIENT]
        return Enrolled(consumers=tuple(names))

    async def _open_run(self, request: OpenRun) -> Body:
        if self._keeping.trouble and request.run != self._facts.run:
            return Refused(reason=self._keeping.trouble)  # at once: the turn may be long in coming
        async with self._turn:
            if request.run == self._facts.run:  # asked for again by who did not hear our answer
                assert self._facts.recruit_until is not None
                return RunOpened(recruit_until=self._facts.recruit_until)
            if self._life.state is not ServerState.WAITING:
                return Refused(
                    reason=f"the server of {self._id} is {self._life.state} with {self._facts.run}"
                )
            return await self._recruit(request)

    async def _cancel_run(self, request: CancelRun) -> Body:
        async with self._turn:
            if request.run != self._facts.run or not self._life.allows(ServerEvent.RUN_CANCELLED):
                return Refused(reason=f"{request.run} is not under way: the server is {self._life.state}")
            await self._flower.stop(request.run)
            await self._end_run(ServerEvent.RUN_CANCELLED, "cancelled", request.reason)
            return RunCancelled()

    async def _recruit(self, request: OpenRun) -> Body:
        task, plan = self._rollouts.for_a_run(request)
        try:
            hindrance = await self._misfit(task)
        except StoreError as error:
            hindrance = str(error)
        if hindrance:
            return Refused(reason=hindrance)
        expires = datetime.now(UTC) + timedelta(seconds=plan.recruit_s)
        self._joined.clear()
        await self._life.transition(
            ServerEvent.RUN_REQUESTED,
            {
                "run": request.run,
                "plan": plan,
                "code_version": task.code_version,
                "base": self._facts.model,
                "candidate": None,
                "recruit_until": expires,
                "cohort": (),
                "round": 0,
                "trainings": 0,
                "failures": 0,
                "last": None,
                "checkpoint": None,
                "recoveries": 0,
                "missing": 0,
                "traceparent": tracing.here(),
            },
            deadline=expires,
        )
        assert self._facts.model is not None
        if (refusal := await self._start_server(self._facts.model, first_round=1)) is not None:
            await self._end_run(
                ServerEvent.RUN_FAILED,
                "failed",
                refusal.reason,
                hindered=refusal.kind is not RefusalKind.CALLER,
            )
            return refusal
        self._timers.at(RECRUITING, expires, self._recruiting_expired)
        return RunOpened(recruit_until=expires)

    async def _start_server(self, artifact: Artifact, *, first_round: int) -> Refused | None:
        """Have the run's Flower server started; why not, where it was not."""
        assert self._facts.run is not None
        assert self._facts.plan is not None
        start = StartServer(
            task=self._id,
            run=self._facts.run,
            plan=self._facts.plan,
            artifact=Artifact.model_validate(artifact.model_dump()),
            first_round=first_round,
            code_version=self._facts.code_version,
        )
        return await self._flower.start(start)

    # --- what is heard -----------------------------------------------------------------

    async def _hear(self, message: Message) -> None:
        """One event. Of a run that is not ours any more there is nothing to be done."""
        async with self._turn:
            if isinstance(message, CodeReady | CodeRefused):
                await self._rollouts.hear(message)
                return
            if getattr(message, "run", None) != self._facts.run:
                return
            match message:
                case ServerStarted():
                    await self._server_started()
                case Joined():
                    await self._client_joined(message)
                case RoundFinished():
                    await self._round_finished(message)
                case RunFinished():
                    await self._run_finished(message)
                case RunFailed() if self._life.allows(ServerEvent.RUN_FAILED):
                    await self._end_run(ServerEvent.RUN_FAILED, "failed", message.reason)
                case ServerLost() if self._invitation() is not None:
                    await self._server_lost(message.reason)
                case _:
                    log.debug("too late", word=message.word, state=str(self._life.state))

    async def _server_started(self) -> None:
        if self._life.state is ServerState.TRAINING:
            await self._life.transition(ServerEvent.SERVER_RECOVERED, {"cohort": self._everyone()})
            await self._begin_training()
        elif (invitation := self._invitation()) is not None:
            await self._bus.publish(invitation)

    async def _client_joined(self, message: Joined) -> None:
        if message.code_version != self._facts.code_version:
            log.warning(
                "a client with other code may not join", client=message.client, code=message.code_version
            )
            return
        self._joined[message.client] = None
        plan = self._facts.plan
        if plan and self._life.state is ServerState.RECRUITING and len(self._joined) >= plan.quorum:
            self._timers.cancel(RECRUITING)
            await self._life.transition(ServerEvent.QUORUM_REACHED, {"cohort": tuple(self._joined)})
            await self._begin_training()

    async def _begin_training(self) -> None:
        assert self._facts.run is not None
        await self._bus.publish(BeginTraining(task=self._id, run=self._facts.run, cohort=self._facts.cohort))

    async def _recruiting_expired(self) -> None:
        async with self._turn:
            if self._life.state is not ServerState.RECRUITING:
                return
            assert self._facts.run is not None
            assert self._facts.plan is not None
            there, wanted = list(self._joined), self._facts.plan.quorum
            reason = who_came(there, wanted, await self._declined())
            await self._flower.stop(self._facts.run)
            await self._end_run(
                ServerEvent.RECRUITING_EXPIRED, "failed", reason, {"missing": wanted - len(there)}
            )

    async def _declined(self) -> dict[str, str]:
        """Who said that it does not take part in this run, and why."""
        said = await self._bus.said_last(Declined, task=self._id)
        return {
            one.client: one.reason
            for one in said
            if isinstance(one, Declined) and one.run == self._facts.run and one.client not in self._joined
        }

    async def _round_finished(self, message: RoundFinished) -> None:
        if self._life.state is ServerState.TRAINING:
            checkpoint = message.checkpoint or self._facts.checkpoint
            failed = len(message.result.failures)
            await self._life.transition(
                ServerEvent.ROUND_FINISHED,
                {
                    "round": message.round,
                    "trainings": self._facts.trainings + len(message.result.participants) + failed,
                    "failures": self._facts.failures + failed,
                    "last": message.result,
                    "checkpoint": checkpoint,
                    "cohort": self._everyone(),
                },
            )
            round_measured(self._id, message.result)

    def _everyone(self) -> tuple[str, ...]:
        """Who began the run, and who has joined it since."""
        return tuple(dict.fromkeys((*self._facts.cohort, *self._joined)))

    async def _server_lost(self, reason: str) -> None:
        """So it was said. It may be up again by now: when we and its agent come back, both look for it."""
        assert self._facts.run is not None
        if await self._flower.is_up(self._facts.run):
            return
        if self._life.state is ServerState.TRAINING:
            await self._recover(reason)
        else:
            await self._end_run(
                ServerEvent.RUN_FAILED, "failed", f"{reason}, while the server was recruiting"
            )

    async def _recover(self, reason: str) -> None:
        """The Flower server is gone: start another from the last round that was kept, or give the run up."""
        match after_server_lost(server_training(self._facts), reason):
            case GiveUp(reason=why):
                await self._end_run(ServerEvent.RUN_FAILED, "failed", why)
            case resume:
                await self._life.transition(
                    ServerEvent.SERVER_LOST, {"recoveries": self._facts.recoveries + 1}, reason=reason
                )
                refusal = await self._start_server(resume.artifact, first_round=resume.first_round)
                if refusal is not None:
                    await self._end_run(
                        ServerEvent.RUN_FAILED,
                        "failed",
                        refusal.reason,
                        hindered=refusal.kind is not RefusalKind.CALLER,
                    )

    # --- the end of a run ----------------------------------------------------------------

    async def _run_finished(self, message: RunFinished) -> None:
        if self._life.state is ServerState.TRAINING:
            if why := nothing_taken(server_training(self._facts)):
                await self._end_run(ServerEvent.RUN_FAILED, "failed", why)
                return
            deadline = datetime.now(UTC) + timedelta(seconds=PUBLISH_S)
            await self._life.transition(
                ServerEvent.RUN_FINISHED,
                {"checkpoint": message.artifact, "round": message.rounds},
                deadline=deadline,
            )
            await self._publish()

    async def _publish(self) -> None:
        """Make a version of the run's model, and have it served everywhere if it is good enough."""
        task = await self._rollouts.at(self._facts.code_version)
        try:
            async with asyncio.timeout(PUBLISH_S):
                manifest, verdict, served = await waiting_for(lambda: self._versioned(task))
        except (TimeoutError, StoreError) as error:
            reason = str(error) or f"the model repository did not take the version within {PUBLISH_S:g} s"
            await self._end_run(ServerEvent.VERSION_REFUSED, "failed", reason, hindered=True)
            return
        if served is not None:
            await self.serve(
                ServerEvent.VERSION_PUBLISHED, served, {"candidate": manifest.ref}, reason=verdict.reason
            )
            await self._keeping.give_out()
            await self._close("finished")
        else:
            reason = f"version {manifest.version} is kept back: {verdict.reason}"
            await self._end_run(ServerEvent.CANDIDATE_KEPT, "finished", reason, {"candidate": manifest.ref})
        await self._versions.retire(self._facts, task.table.keep_models)
        kept_back = "" if verdict.promote or not verdict.judged else verdict.reason
        await self._after_the_run(kept_back=kept_back, unjudged=not verdict.judged)

    async def _versioned(self, task: Task) -> tuple[Manifest, Verdict, Served | None]:
        """The run's version, what the gate says of it, and, where that is a yes, the new champion. Twice is fine."""
        run = server_publishing(self._facts)
        manifest = await self._versions.publish(run)
        verdict = await self._versions.verdict(task.table, manifest, run)
        served = await self._versions.crown(manifest.version, verdict.reason) if verdict.promote else None
        return manifest, verdict, served

    async def _after_the_run(self, *, failed: str = "", kept_back: str = "", unjudged: bool = False) -> None:
        """The run is over: its code is judged by it, and what waited for its end begins."""
        facts = self._facts
        trial = Trial(failed, facts.trainings, facts.failures, kept_back, unjudged)
        await self._rollouts.judge(facts.code_version, trial)
        await self._rollouts.at_rest()

    async def tell_the_version(self, reason: str = "") -> None:
        assert self._facts.model is not None
        blob = self._keeping.on_offer
        assert blob is not None
        await self._bus.publish(
            ModelPublished(
                task=self._id,
                model=self._facts.model,
                blob=blob,
                run=self._facts.run,
                term=self._facts.term,
                seal=self._facts.seal,
                reason=reason,
            )
        )

    async def _end_run(
        self,
        event: ServerEvent,
        outcome: Outcome,
        reason: str,
        changes: ServerChanges = NO_CHANGES,
        *,
        hindered: bool = False,
    ) -> None:
        """The run came to nothing. *hindered*: by what says nothing of its code, and passes."""
        self._timers.cancel(RECRUITING)
        await self._life.transition(event, changes, reason=reason)
        await self._close(outcome, reason, new_model=event is not ServerEvent.CANDIDATE_KEPT)
        if hindered:
            await self._rollouts.at_rest(pause_s=HINDERED_S)
        elif outcome == "failed":
            await self._after_the_run(failed=reason)
        elif outcome == "cancelled":  # which says nothing of its code
            await self._rollouts.at_rest()

    async def _close(self, outcome: Outcome, reason: str = "", *, new_model: bool = True) -> None:
        """Say that the run is over: its trainers give their memory back."""
        assert self._facts.run is not None
        await self._bus.publish(
            ServerClosed(
                task=self._id,
                run=self._facts.run,
                outcome=outcome,
                rounds=self._facts.round,
                reason=reason,
                new_model=new_model,
            )
        )
        run_measured(self._id, outcome)

    # --- what is so ------------------------------------------------------------------------

    @property
    def _facts(self) -> ServerFacts:
        return self._life.facts

    @property
    def turn(self) -> asyncio.Lock:
        """Held while something is decided."""
        return self._turn

    @property
    def term(self) -> int:
        return self._facts.term

    @property
    def trouble(self) -> StoreTrouble | None:
        """What is wrong with the model repository, as the log has it."""
        return self._facts.trouble

    @property
    def receivers(self) -> int:
        """How many clients may ask for the model at once."""
        return len(self._facts.cohort)

    async def record_trouble(
        self, event: ServerEvent, reason: str = "", *, trouble: StoreTrouble | None
    ) -> None:
        """Publish *event* about the model repository, with what is wrong with it from here on."""
        await self._life.transition(event, {"trouble": trouble}, reason=reason)

    def allows(self, event: ServerEvent) -> bool:
        """Whether the server can move by *event* now."""
        return self._life.allows(event)

    @property
    def at_rest(self) -> bool:
        """Whether no run is under way, and there is a model."""
        return self._life.state is ServerState.WAITING

    @property
    def champion(self) -> ModelRef | None:
        return self._facts.model

    def _invitation(self) -> UpdateReady | None:
        """The run that takes in clients now: who is late may still join a run in training."""
        facts = self._facts
        if self._life.state not in (ServerState.RECRUITING, ServerState.TRAINING):
            return None
        assert facts.run is not None
        assert facts.plan is not None
        assert facts.recruit_until is not None
        in_training = self._life.state is ServerState.TRAINING
        until_when = (
            datetime.now(UTC) + timedelta(seconds=facts.plan.round_s) if in_training else facts.recruit_until
        )
        return UpdateReady(
            task=self._id,
            run=facts.run,
            plan=facts.plan,
            recruit_until=until_when,
            code_version=facts.code_version,
            model=facts.model,
            traceparent=facts.traceparent,
        )
