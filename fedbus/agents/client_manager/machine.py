"""The decisions of the client manager: events in, effects out. No bus, no store, no clock, no task.

    s0 –model_fetched→ pending_application –infer_ready→ serving –client_start→ learning –fin_train→ …

`ClientMachine.handle` takes one event and returns what the agent must do. The state is that of the
client's lifecycle; a *step* (`steps`) is what the client waits for in it. An event that no step waits for changes
nothing, so a repeated or late message is harmless.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final, Literal, assert_never

from fedbus.agents.client_manager.code_choice import CodeChoice
from fedbus.agents.client_manager.effects import (
    Effect,
    EnrollClient,
    Fail,
    FetchModel,
    HandOverModel,
    JoinTrace,
    OpenInbox,
    PrepareCode,
    ReadDeviceFacts,
    ReadOpenRun,
    ReadServerInfo,
    ReleaseSlot,
    SwitchCode,
    TakeSlot,
)
from fedbus.agents.client_manager.events import (
    ClientManagerStarted,
    ClientTimer,
    CodeNotPrepared,
    CodePrepared,
    DeviceFactsRead,
    EnrollmentAnswered,
    Event,
    ModelAnnounced,
    ModelAnnouncement,
    ModelFetched,
    ModelNotFetched,
    OpenRunRead,
    ServerInfoRead,
    SlotsBusy,
    SlotTaken,
)
from fedbus.agents.client_manager.model_choice import ModelChoice, announcement_from
from fedbus.agents.client_manager.records import ClientRecord
from fedbus.agents.client_manager.run_choice import (
    Ineligibility,
    RunChoice,
    ineligibility,
    rule_variables,
    run_limit_s,
)
from fedbus.agents.client_manager.steps import (
    STEPS,
    Applying,
    AskingServer,
    AwaitingVersion,
    CatchingUp,
    ChangingCode,
    CheckingRule,
    Created,
    Ended,
    Enrolling,
    Fetching,
    FetchingFirst,
    FirstRefused,
    PreparingCode,
    Ready,
    Search,
    SearchFailed,
    Step,
    TakingSlot,
    Training,
    TryingCode,
)
from fedbus.agents.common.machine import (
    CancelTimer,
    FinishStartup,
    Log,
    Publish,
    RetryLater,
    StartTimer,
    TimerFired,
)
from fedbus.contracts.client import (
    ClientChanges,
    ClientEvent,
    ClientState,
    FailTrain,
    FinTrain,
    InferReady,
    InferRefused,
    not_served_text,
)
from fedbus.contracts.code import CodePublished
from fedbus.contracts.message import Message
from fedbus.contracts.model import ModelRef
from fedbus.contracts.server import UpdateReady
from fedbus.contracts.serving import ModelRolledBack
from fedbus.contracts.task.task import Task
from fedbus.domain.run_participation import short_version, will_serve_soon

BOOTSTRAP_S: Final = 300.0
"""The limit of the enrollment, and again of the search for the first model."""
APPLY_S: Final = 120.0
SYNC_S: Final = 900.0
"""The limit to fetch, install and check new code, before the device stays on the old one."""
SLOT_AGAIN_S: Final = 2.0
FETCH_ATTEMPTS: Final = 5
MAX_TRANSITION_REASON: Final = 1000


class ClientMachine:
    """One client in one task.

    Args:
        task: The version of the task that the device has.
        record: The client lifecycle, as the log has it.
        labels: The labels of the device.
        bootstrap_s: The limit of the enrollment, and again of the search for the first model.

    """

    def __init__(
        self,
        task: Task,
        record: ClientRecord,
        labels: Mapping[str, str],
        *,
        bootstrap_s: float = BOOTSTRAP_S,
    ) -> None:
        self._task = task.id
        self._record = record
        self._client = record.data.client
        self._labels = dict(labels)
        self._bootstrap_s = bootstrap_s
        self._code = CodeChoice(task, client=self._client, labels=labels)
        self._models = ModelChoice(record.data.model, record.data.not_served)
        self._runs = RunChoice(task.id, self._client)
        self._step: Step = Created()
        self._now: datetime
        """The time of the event that is handled."""
        self._refusals = 0
        """How often the inference agent has refused a model in a row while it served none."""

    @property
    def state(self) -> ClientState:
        return self._record.state

    @property
    def task(self) -> Task:
        """The task at the version that the device has."""
        return self._code.task

    def validate(self) -> None:
        """Check that the step belongs to the state; for tests."""
        assert isinstance(self._step, STEPS[self.state]), f"{self._step} in {self.state}"

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: datetime) -> list[Effect]:  # noqa: PLR0911, PLR0912 - one line an event
        """Decide on *event*; the agent performs the effects in their order."""
        self._now = now
        match event:
            case ClientManagerStarted():
                return self._on_start()
            case EnrollmentAnswered(refusal=refusal):
                return self._on_enrollment_answer(refusal)
            case UpdateReady():
                return self._on_update_ready(event)
            case ModelAnnounced(announcement=announcement):
                return self._on_announcement(announcement)
            case CodePublished():
                return self._on_code_published(event)
            case FinTrain():
                return self._on_fin_train(event)
            case FailTrain():
                return self._on_fail_train(event)
            case InferReady():
                return self._on_infer_ready(event)
            case InferRefused():
                return self._on_infer_refused(event)
            case ModelRolledBack():
                return self._on_rolled_back(event)
            case ServerInfoRead():
                return self._on_server_info(event)
            case OpenRunRead(invitation=invitation):
                is_busy = self.state is ClientState.LEARNING
                return [] if invitation is None or is_busy else self._on_update_ready(invitation)
            case ModelFetched():
                return self._on_model_fetched(event)
            case ModelNotFetched():
                return self._on_model_not_fetched(event)
            case CodePrepared(task=task):
                return self._on_code_prepared(task)
            case CodeNotPrepared(version=version, reason=reason):
                return self._on_code_not_prepared(version, reason)
            case DeviceFactsRead(facts=facts):
                return self._on_device_facts(facts)
            case SlotTaken():
                return self._join(self._step.invitation) if isinstance(self._step, TakingSlot) else []
            case SlotsBusy():
                return self._on_slots_busy(event)
            case TimerFired(timer=timer):
                return self._on_timer(timer)
            case _:
                assert_never(event)

    def _on_timer(self, timer: ClientTimer) -> list[Effect]:  # noqa: PLR0911 - one line a timer
        match timer, self._step:
            case ClientTimer.BOOTSTRAP, _ if self.state is ClientState.S0:
                return self._on_bootstrap_timeout()
            case ClientTimer.MODEL, SearchFailed(search=search):
                return self._ask_server(search)
            case ClientTimer.REFUSED, FirstRefused():
                return self._ask_server(Search())
            case ClientTimer.APPLY, Applying() if self._models.served is None:
                return self._retry_first(_no_answer())
            case ClientTimer.APPLY, Applying(model=model):
                return self._keep_current(model, _no_answer())
            case ClientTimer.APPLY, TryingCode(task=task):
                return self._refuse_sync(task.code_version, _no_answer())
            case ClientTimer.VERSION, AwaitingVersion():
                reason = f"the run published no model version in time (limit {APPLY_S:g} s)"
                return self._serve(ClientEvent.NO_NEW_MODEL, reason)
            case ClientTimer.LEARN, Training(limit_s=limit_s):
                reason = f"the run did not end in time (limit {limit_s:g} s)"
                return self._leave_run(ClientEvent.DEADLINE, reason)
            case ClientTimer.ELIGIBLE, Ready():
                return [ReadOpenRun()]
            case _:
                return []

    def _ignore(self, message: Message) -> list[Effect]:
        return [Log("debug", "Ignoring message", {"message": message.name, "state": str(self.state)})]

    # --- the start: enroll, and serve a first model -------------------------------------------------

    def _on_start(self) -> list[Effect]:
        effects: list[Effect] = []
        if self.state is not ClientState.S0:
            changes: ClientChanges = {
                "run": None,
                "code_version": self._code.version,
                "labels": self._labels,
            }
            effects.append(self._record.move(ClientEvent.RESTARTED, changes))
        self._step = Enrolling()
        return [*effects, StartTimer(ClientTimer.BOOTSTRAP, self._bootstrap_s), EnrollClient()]

    def _on_enrollment_answer(self, refusal: str) -> list[Effect]:
        if not isinstance(self._step, Enrolling):
            return []
        if refusal:
            return self._give_up(refusal)
        restart = StartTimer(ClientTimer.BOOTSTRAP, self._bootstrap_s)
        return [OpenInbox(), restart, *self._ask_server(Search())]

    def _on_bootstrap_timeout(self) -> list[Effect]:
        limit = f"{self._bootstrap_s:g} s"
        match self._step:
            case CatchingUp(version=version):
                return self._give_up(f"code {short_version(version)} was not ready in time (limit {limit})")
            case FetchingFirst(announcement=announcement):
                number = announcement.model.version
                return self._give_up(f"model version {number} was not fetched in time (limit {limit})")
            case SearchFailed(search=search) | AskingServer(search=search) if search.reason:
                return self._give_up(f"no model in time (limit {limit}): {search.reason}")
            case _:
                return self._give_up(f"no server of {self._task} answered within {limit}")

    def _give_up(self, reason: str) -> list[Effect]:
        self._step = Ended()
        move = self._record.move(ClientEvent.BOOTSTRAP_FAILED, reason=reason)
        return [move, Fail(f"client {self._client} cannot start: {reason}")]

    def _ask_server(self, search: Search) -> list[Effect]:
        self._step = AskingServer(search)
        return [ReadServerInfo(until_answered=True)]

    def _on_server_info(self, event: ServerInfoRead) -> list[Effect]:
        info = event.info
        announcement = announcement_from(info) if info is not None else None
        match self._step:
            case AskingServer(search=search):
                if info is None or announcement is None:  # the server may just be starting
                    reason = event.reason or f"the server of {self._task} has no model"
                    return self._retry_search(search, reason, "info")
                self._code.follow(info.code)
                return self._catch_up(announcement, search)
            case ChangingCode():
                if announcement is not None:  # a model that the old code could not load may fit the new one
                    self._models.note(announcement)
                return self._serve(ClientEvent.CODE_READY)
            case _:
                return []

    def _catch_up(self, announcement: ModelAnnouncement, search: Search) -> list[Effect]:
        """Change to the code that belongs to the model; if that fails, start with the old code."""
        if (version := self._code.wanted) is None:
            return self._fetch_first(announcement, search)
        self._step = CatchingUp(announcement, version, search)
        return [PrepareCode(version, SYNC_S)]

    def _fetch_first(self, announcement: ModelAnnouncement, search: Search) -> list[Effect]:
        self._step = FetchingFirst(announcement, search)
        return [FetchModel(announcement, attempts=1)]

    def _retry_search(self, search: Search, reason: str, level: Literal["info", "warning"]) -> list[Effect]:
        """Try again later; the same reason is logged once."""
        log = Log(level, "No model yet", {"reason": reason})
        self._step = SearchFailed(replace(search, attempt=search.attempt + 1, reason=reason))
        retry = RetryLater(ClientTimer.MODEL, search.attempt)
        return [retry] if reason == search.reason else [log, retry]

    def _apply_first(self, announcement: ModelAnnouncement) -> list[Effect]:
        model = announcement.model
        self._models.note(announcement)
        self._models.target = model
        self._step = Applying(model)
        hand_over: list[Effect] = [
            StartTimer(ClientTimer.APPLY, APPLY_S),
            self._hand_over(announcement, is_first=True),
        ]
        if self.state is not ClientState.S0:
            return hand_over
        changes: ClientChanges = {"model": model, "code_version": self._code.version}
        move = self._record.move(ClientEvent.MODEL_FETCHED, changes)
        return [move, CancelTimer(ClientTimer.BOOTSTRAP), *hand_over, FinishStartup()]

    # --- training -----------------------------------------------------------------------------------

    def _on_update_ready(self, invitation: UpdateReady) -> list[Effect]:
        """Join the run, or publish why not. A client that is about to serve keeps the invitation until then."""
        if isinstance(self._step, Training) and self._step.run == invitation.run:
            return []
        if will_serve_soon(self.state):
            self._runs.keep(invitation)
            return []
        reason = self._runs.decline_reason(
            invitation, state=self.state, code_version=self._code.version, now=self._now
        )
        join_trace = JoinTrace(invitation.traceparent)
        if reason is not None:
            return [join_trace, Publish(self._runs.decline(invitation.run, reason))]
        return [join_trace, *self._check_rule(invitation)]

    def _check_rule(self, invitation: UpdateReady) -> list[Effect]:
        table = self.task.table
        if table.eligibility.rule is None:
            return self._take_slot(invitation)
        self._step = CheckingRule(invitation)
        names = rule_variables(table.eligibility.rule)
        return [ReadDeviceFacts(names, self._models.target, table.capture.holdout_share)]

    def _on_device_facts(self, facts: Mapping[str, float | None]) -> list[Effect]:
        rule = self.task.table.eligibility.rule
        if not isinstance(self._step, CheckingRule) or rule is None:
            return []
        invitation = self._step.invitation
        if (cause := ineligibility(rule, invitation.run, facts)) is None:
            return self._take_slot(invitation)
        return self._wait_until_eligible(cause, self.task.table.eligibility.again_s)

    def _take_slot(self, invitation: UpdateReady) -> list[Effect]:
        self._step = TakingSlot(invitation)
        return [TakeSlot(invitation.run)]

    def _on_slots_busy(self, event: SlotsBusy) -> list[Effect]:
        if not isinstance(self._step, TakingSlot):
            return []
        holders = ", ".join(event.holders) or "other tasks"
        reason = f"this device already trains {holders} (limit {event.limit} at a time)"
        return self._wait_until_eligible(Ineligibility(self._step.invitation.run, reason, {}), SLOT_AGAIN_S)

    def _wait_until_eligible(self, cause: Ineligibility, again_s: float) -> list[Effect]:
        """Decline once for each reason, and check again for as long as the run recruits clients."""
        self._step = Ready()
        timer = StartTimer(ClientTimer.ELIGIBLE, again_s)
        declined = self._runs.decline_once(cause, self.task.table.eligibility.rule or "")
        return [timer] if declined is None else [timer, Publish(declined)]

    def _join(self, invitation: UpdateReady) -> list[Effect]:
        limit_s = run_limit_s(invitation.plan)
        deadline = self._now + timedelta(seconds=limit_s)
        self._step = Training(invitation.run, limit_s)
        return [
            self._record.move(ClientEvent.CLIENT_START, {"run": invitation.run}, deadline=deadline),
            StartTimer(ClientTimer.LEARN, limit_s),
            Publish(self._runs.start(invitation)),
        ]

    def _on_fail_train(self, event: FailTrain) -> list[Effect]:
        if not isinstance(self._step, Training) or self._step.run != event.run:
            return self._ignore(event)
        lost = ClientEvent.TRAINER_LOST if event.trainer_lost else ClientEvent.FAIL_TRAIN
        if event.load_failed:
            self._runs.exclude(event.run)
        return self._leave_run(lost, event.reason)

    def _leave_run(self, event: ClientEvent, reason: str) -> list[Effect]:
        if not isinstance(self._step, Training):
            return []
        self._runs.count_failure(self._step.run)
        return [*self._end_run(event, reason), *self._next_work()]

    def _on_fin_train(self, event: FinTrain) -> list[Effect]:
        """Wait for the model version of the run, unless it is known already, or was not promoted."""
        if not isinstance(self._step, Training) or self._step.run != event.run:
            return self._ignore(event)
        effects = self._end_run(ClientEvent.FIN_TRAIN)
        if (announcement := self._models.next) is not None:
            return [*effects, *self._apply(announcement)]
        if not event.new_model:
            return [*effects, *self._serve(ClientEvent.NO_NEW_MODEL, "the result of the run is not promoted")]
        self._step = AwaitingVersion()
        return [*effects, StartTimer(ClientTimer.VERSION, APPLY_S)]

    def _end_run(self, event: ClientEvent, reason: str = "") -> list[Effect]:
        self._step = Ready()
        changes: ClientChanges = {"run": None, "model": self._models.target}
        return [
            CancelTimer(ClientTimer.LEARN),
            ReleaseSlot(),
            self._record.move(event, changes, reason=reason),
        ]

    # --- models -------------------------------------------------------------------------------------

    def _on_announcement(self, announcement: ModelAnnouncement) -> list[Effect]:
        """Apply the model now, unless another step is in progress."""
        self._models.note(announcement)
        if (newer := self._models.next) is None:
            return []
        match self._step:
            case Ready():
                return self._apply_while_serving(newer)
            case AwaitingVersion():
                return [CancelTimer(ClientTimer.VERSION), *self._apply(newer)]
            case _:
                return []

    def _apply_while_serving(self, announcement: ModelAnnouncement) -> list[Effect]:
        move = self._record.move(ClientEvent.MODEL_PUBLISHED, {"model": announcement.model})
        return [move, *self._apply(announcement)]

    def _apply(self, announcement: ModelAnnouncement) -> list[Effect]:
        """Fetch the model and hand it to the inference agent; the current one is served until then."""
        self._models.target = announcement.model
        self._step = Fetching(announcement)
        return [FetchModel(announcement, FETCH_ATTEMPTS)]

    def _on_model_fetched(self, event: ModelFetched) -> list[Effect]:
        match self._step:
            case Fetching(announcement=announcement) if announcement.model == event.model:
                self._step = Applying(event.model)
                again = self._models.announcement_of(event.model)
                return [
                    StartTimer(ClientTimer.APPLY, APPLY_S),
                    self._hand_over(again or announcement),
                ]
            case FetchingFirst(announcement=announcement) if announcement.model == event.model:
                return self._apply_first(announcement)
            case _:
                return []

    def _on_model_not_fetched(self, event: ModelNotFetched) -> list[Effect]:
        match self._step:
            case Fetching(announcement=announcement) if announcement.model == event.model:
                return self._keep_current(event.model, event.reason)
            case FetchingFirst(announcement=announcement, search=search) if announcement.model == event.model:
                return self._retry_search(search, event.reason, "warning")
            case _:
                return []

    def _hand_over(self, announcement: ModelAnnouncement, *, is_first: bool = False) -> HandOverModel:
        return HandOverModel(
            announcement.model,
            self._code.version,
            is_first=is_first,
            term=announcement.term,
            published_in=announcement.traceparent,
        )

    def _on_infer_ready(self, event: InferReady) -> list[Effect]:
        match self._step:
            case TryingCode(task=task) if task.code_version == event.code_version:
                return self._change_code(task)
            case Applying(model=model) if model == event.model:
                self._refusals = 0
                self._models.serve(model)
                return self._serve(ClientEvent.INFER_READY)
            case _:
                return self._ignore(event)

    def _on_infer_refused(self, event: InferRefused) -> list[Effect]:
        match self._step:
            case TryingCode(task=task) if task.code_version == event.code_version:
                return self._refuse_sync(task.code_version, event.reason)
            case Applying(model=model) if model == event.model:
                data = {"version": str(model.version), "reason": event.reason}
                log = Log("warning", "Inference agent refused the model", data)
                if event.not_served:
                    return [Log("info", "Model not served", data), *self._take_unserved(event)]
                if event.serving is None:
                    return [log, *self._retry_first(event.reason)]
                self._models.served = event.still or self._models.served
                return [log, *self._keep_current(event.model, event.reason)]
            case _:
                return self._ignore(event)

    def _take_unserved(self, event: InferRefused) -> list[Effect]:
        """Take a model that no code of the task can serve, and train from now on."""
        self._refusals = 0
        reason = not_served_text(event.model, event.reason)
        self._models.take_unserved(event.model, reason, event.still)
        return self._serve(ClientEvent.MODEL_NOT_SERVED, reason)

    def _retry_first(self, reason: str) -> list[Effect]:
        """Nothing is served: search for a model again, until one is accepted."""
        self._step = FirstRefused()
        retry = RetryLater(ClientTimer.REFUSED, self._refusals)
        self._refusals += 1
        changes = self._served_changes()
        move = self._record.move(ClientEvent.INFER_RETRIED, changes, reason=reason)
        return [CancelTimer(ClientTimer.APPLY), move, retry]

    def _on_rolled_back(self, event: ModelRolledBack) -> list[Effect]:
        """Record that the inference agent has rolled back to the previous model."""
        if self._models.served != event.returned_from:
            return self._ignore(event)  # it is about a model before the served one
        self._models.roll_back(event.model, event.returned_from)
        if self.state is ClientState.PENDING_APPLICATION:
            return []  # the target is the model that is about to be served
        self._models.target = event.model
        if self.state is not ClientState.SERVING:
            return []  # the next transition records it
        changes: ClientChanges = {"model": event.model}
        if self._record.data.not_served:
            changes["not_served"] = ""
        return [self._record.move(ClientEvent.MODEL_RETURNED, changes, reason=event.reason)]

    def _keep_current(self, rejected: ModelRef, reason: str) -> list[Effect]:
        """Do not try the model *rejected* again; the next version is tried."""
        self._models.keep_current(rejected)
        return self._serve(ClientEvent.INFER_REFUSED, reason)

    # --- serving ------------------------------------------------------------------------------------

    def _serve(self, event: ClientEvent, reason: str = "", then: Sequence[Effect] = ()) -> list[Effect]:
        """Continue to serve the current model, perform *then*, and start the next work."""
        self._step = Ready()
        move = self._record.move(event, self._served_changes(), reason=reason)
        return [CancelTimer(ClientTimer.APPLY), move, *then, *self._next_work()]

    def _served_changes(self) -> ClientChanges:
        """Return the target model, and what changed since the last transition: the code, or why it is not served."""
        changes: ClientChanges = {"model": self._models.target}
        if self._models.not_served != self._record.data.not_served:
            changes["not_served"] = self._models.not_served
        if self._code.version != self._record.data.code_version:
            changes["code_version"] = self._code.version
        return changes

    def _next_work(self) -> list[Effect]:
        """Start the next work: other code first, then a newer model, then a run that recruits clients."""
        if (version := self._code.wanted) is not None:
            return self._sync(version)
        if (announcement := self._models.next) is not None:
            return self._apply_while_serving(announcement)
        invitation = self._runs.take_invitation()
        return [ReadOpenRun()] if invitation is None else self._on_update_ready(invitation)

    # --- code ---------------------------------------------------------------------------------------

    def _on_code_published(self, event: CodePublished) -> list[Effect]:
        """Follow the plan, now or after the current step."""
        self._code.follow(event.plan)
        effects: list[Effect] = []
        if event.candidate == self._code.version:
            effects = [Publish(self._code.ready())]  # the server may have lost the first answer
        elif (reason := self._code.refused.get(event.candidate)) is not None:
            effects = self._refuse_code(event.candidate, reason)
        return [*effects, *self._next_work()] if isinstance(self._step, Ready) else effects

    def _sync(self, version: str) -> list[Effect]:
        self._step = PreparingCode(version)
        deadline = self._now + timedelta(seconds=SYNC_S)
        reason = f"code {short_version(version)}"
        move = self._record.move(ClientEvent.CODE_PUBLISHED, reason=reason, deadline=deadline)
        return [move, PrepareCode(version, SYNC_S)]

    def _on_code_prepared(self, task: Task) -> list[Effect]:
        """Let the inference agent serve with the new code as its last check; a new lineage skips that check."""
        match self._step:
            case CatchingUp(announcement=announcement, version=version, search=search) if (
                version == task.code_version
            ):
                return [*self._switch_to(task), *self._fetch_first(announcement, search)]
            case PreparingCode(version=version) if version == task.code_version:
                model = self._models.served
                if model is None or self._code.starts_lineage:
                    return self._change_code(task)
                self._step = TryingCode(task)
                known = self._models.announcement_of(model)
                hand_over = HandOverModel(
                    model,
                    task.code_version,
                    term=known.term if known else 0,
                    published_in=known.traceparent if known else "",
                )
                return [StartTimer(ClientTimer.APPLY, APPLY_S), hand_over]
            case _:
                return []

    def _on_code_not_prepared(self, version: str, reason: str) -> list[Effect]:
        match self._step:
            case CatchingUp(announcement=announcement, version=wanted, search=search) if wanted == version:
                return [*self._refuse_code(version, reason), *self._fetch_first(announcement, search)]
            case PreparingCode(version=wanted) if wanted == version:
                return self._refuse_sync(version, reason)
            case _:
                return []

    def _change_code(self, task: Task) -> list[Effect]:
        """Change the device to *task*, between two runs, and ask which model is served with it."""
        self._step = ChangingCode()
        return [CancelTimer(ClientTimer.APPLY), *self._switch_to(task), ReadServerInfo()]

    def _switch_to(self, task: Task) -> list[Effect]:
        self._code.task = task
        self._models.change_code()
        return [SwitchCode(task), Publish(self._code.ready())]

    def _refuse_sync(self, version: str, reason: str) -> list[Effect]:
        refused = self._refuse_code(version, reason)
        text = f"code {short_version(version)}: {reason}"[:MAX_TRANSITION_REASON]
        return self._serve(ClientEvent.CODE_REFUSED, text, then=refused)

    def _refuse_code(self, version: str, reason: str) -> list[Effect]:
        """Publish the refusal; the version is not tried again in this rollout."""
        refused = self._code.refuse(version, reason)
        log = Log("warning", "New code refused", {"code": version, "reason": reason})
        return [log, Publish(refused)]


def _no_answer() -> str:
    return f"the inference agent did not answer in time (limit {APPLY_S:g} s)"
