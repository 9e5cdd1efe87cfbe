"""Workers die at any moment, and no update and no state is lost or counted twice that is not in a dead worker."""

import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation.mortal_engine import CLIENTS, MortalEngine, WorkerProcess, WorkerStep
from simulation.tiny_tasks import write_task

from fedbus.contracts.run import RunPlan
from fedbus.learning.library import (
    ClientReply,
    ErrorCode,
    OutgoingMessage,
)
from fedbus.learning.payload import Payload
from fedbus.simulation import worker
from fedbus.simulation.engine import (
    MessageBatch,
    MessageItem,
    Replies,
    StateTaken,
    SumRequest,
    SumTaken,
    TakeState,
    WorkerJob,
    WorkerStarted,
)
from fedbus.simulation.messenger import SimulationMessenger
from fedbus.simulation.observer import SilentObserver
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.simulation.profiles.schema import Profile
from fedbus.simulation.settings import client_name
from fedbus.simulation.virtual_time import VirtualTime

NAMES = [client_name(client, CLIENTS) for client in range(CLIENTS)]
FOREVER_S = 1e9


class LossWarnings(SilentObserver):
    def __init__(self) -> None:
        self.losses: list[int] = []

    def on_warning(self, text: str) -> None:
        found = re.search(r"(\d+) clients have lost", text)
        self.losses.append(int(found.group(1)) if found else 0)


# --- the law ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallPlan:
    """The messages of one call."""

    clients: list[int]
    has_sum: bool


@dataclass(frozen=True)
class DeathPlan:
    """Calls, and what happens meanwhile."""

    workers: int
    calls: list[CallPlan]
    steps: list[WorkerStep]
    seconds: list[float]
    """The times of messages, again and again. Clients move because they differ."""
    deaths_of_receivers: int
    """So many workers die when the state of a client is on its way to them."""
    is_deterministic: bool
    sends_at_once: bool
    """Whether workers collect no replies and updates before they send them."""


CALLS = st.builds(
    CallPlan,
    clients=st.lists(st.integers(0, CLIENTS - 1), min_size=3, max_size=CLIENTS, unique=True),
    has_sum=st.booleans(),
)
STEPS = st.builds(
    WorkerStep,
    action=st.sampled_from(["work", "work", "work", "deliver", "deliver", "die", "send", "detach"]),
    worker=st.integers(0, 2),
    count=st.integers(0, 3),
)
PLANS = st.builds(
    DeathPlan,
    workers=st.sampled_from([1, 2, 2, 3]),
    calls=st.lists(CALLS, min_size=4, max_size=8),
    steps=st.lists(STEPS, max_size=80),
    seconds=st.lists(st.sampled_from([0.02, 0.05, 0.1, 0.2]), min_size=CLIENTS, max_size=3 * CLIENTS),
    deaths_of_receivers=st.integers(0, 5),
    is_deterministic=st.booleans(),
    sends_at_once=st.booleans(),
)


@pytest.fixture
def job(tmp_path: Path) -> WorkerJob:
    task = write_task(tmp_path / "task", "functions")
    return WorkerJob(task=task, run="run", plan=RunPlan(), clients=CLIENTS, node_config={})


class MortalRun:
    """A run whose workers die."""

    def __init__(self, job: WorkerJob, plan: DeathPlan, profile: Profile | None = None) -> None:
        self.engine = MortalEngine(job, plan.workers, plan.steps, plan.seconds, plan.deaths_of_receivers)
        self.observer = LossWarnings()
        self.is_deterministic = plan.is_deterministic
        self.messenger = SimulationMessenger(
            self.engine,  # type: ignore[arg-type]
            run=job.run,
            plan=job.plan,
            clients=NAMES,
            observer=self.observer,
            is_deterministic=plan.is_deterministic,
            adds_updates=True,
            virtual=None if profile is None else VirtualTime(Conditions(profile, NAMES), NAMES),
        )
        self.engine.actions = {"send": self._send_next, "detach": self._detach}
        self._calls: deque[CallPlan] = deque()
        self._replies: deque[Iterator[ClientReply]] = deque()
        self._sent: deque[list[str]] = deque()
        self._total = 0

    def make(self, calls: list[CallPlan]) -> None:
        """Make *calls*, some at the same time, and check all replies, sums, states and warnings."""
        self._calls.extend(calls)
        while self._calls:
            self._send_next()
            while self._replies:
                replies, sent = self._replies.popleft(), self._sent.popleft()
                self._check_replies(list(replies), sent)
        self.messenger._loop.wait_until(lambda: not self.messenger.has_open_messages, None)
        dispatcher = self.messenger._loop._dispatcher
        assert not dispatcher._sent_states
        self.engine.check_end(dispatcher._arrived_states)
        assert self.observer.losses == self.engine.losses

    def _send_next(self) -> None:
        if not self._calls:
            return
        call, total = self._calls.popleft(), self._total
        payload = Payload.pack([b"x"])
        messages = [
            OutgoingMessage(
                client=client_name(client, CLIENTS),
                kind="train",
                payload=payload,
                message_id=f"{total + position:04}",
                sum=b"sum" if call.has_sum and not self.is_deterministic else None,
            )
            for position, client in enumerate(sorted(call.clients))
        ]
        self._total = total + len(messages)
        self._sent.append([message.message_id for message in messages])
        self._replies.append(self.messenger.send(messages))

    def _detach(self) -> None:
        for exchange in list(self.messenger._exchanges.by_number.values())[:1]:
            if not (exchange.call.is_posted or exchange.call.is_detached):
                self.messenger._delivery.detach(exchange.call, 1.0)

    def _check_replies(self, replies: list[ClientReply], sent: list[str]) -> None:
        assert sorted(reply.request.message_id for reply in replies) == sent
        accepted = [reply for reply in replies if reply.error is None]
        assert {one.error.code for one in replies if one.error} <= {ErrorCode.CLIENT_LOST, ErrorCode.NO_REPLY}
        added = Counter[str]()
        for reply in accepted:
            if reply.request.sum is None:
                assert bytes(reply.data or b"").decode() == reply.request.message_id
                added[reply.request.message_id] += 1
            elif reply.sum is not None:
                added.update(json.loads(bytes(reply.sum)))
        assert added == Counter(reply.request.message_id for reply in accepted)


def test_updates_count_once_and_only_dead_workers_lose_state(job: WorkerJob) -> None:
    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=100)
    @given(PLANS)
    def check(plan: DeathPlan) -> None:
        interval_s = -1.0 if plan.sends_at_once else FOREVER_S
        with patch.multiple(worker, FLUSH_S=interval_s, SUM_S=interval_s, SUM_COST_RATIO=0):
            MortalRun(job, plan).make(plan.calls)

    check()


def make_calls(
    job: WorkerJob, steps: list[WorkerStep], call: CallPlan, *, workers: int, **changes: bool
) -> MortalEngine:
    flags = {"is_deterministic": False, "sends_at_once": False, **changes}
    plan = DeathPlan(
        workers=workers, calls=[call], steps=steps, seconds=[0.001], deaths_of_receivers=0, **flags
    )
    run = MortalRun(job, plan)
    with patch.multiple(worker, FLUSH_S=FOREVER_S, SUM_S=FOREVER_S):
        run.make(plan.calls)
    return run.engine


def test_updates_leave_a_worker_before_the_state_after_them(job: WorkerJob) -> None:
    """Else a client that has moved repeats its update when the worker dies, and its state has it twice."""
    process = WorkerProcess(MortalEngine(job, 1, [], []), 0, job)
    item = MessageItem(1, 0, "0001")
    process.orders.append(MessageBatch([item], 1, "train", 1, "", 60.0, 0.0, SumRequest(1, b"sum")))
    process.orders.append(TakeState(0))
    with patch.multiple(worker, FLUSH_S=FOREVER_S, SUM_S=FOREVER_S):
        while not process.is_idle:
            process.work()
    assert [type(event) for event in process.events] == [WorkerStarted, Replies, SumTaken, StateTaken]


def test_no_update_is_made_again_for_a_call_that_has_ended(job: WorkerJob) -> None:
    steps = [
        WorkerStep("work", 0, 0),
        WorkerStep("deliver", 0, 9),
        WorkerStep("detach", 0, 0),
        WorkerStep("die", 0, 0),
    ]
    engine = make_calls(job, steps, CallPlan([0], has_sum=True), workers=1)
    assert engine.processes_by_number[0].sessions == {}


def test_a_deterministic_call_that_ends_has_the_replies_that_came_early(job: WorkerJob) -> None:
    steps = [WorkerStep("work", 1, 0), WorkerStep("deliver", 1, 9), WorkerStep("detach", 0, 0)]
    make_calls(job, steps, CallPlan([0, 1], has_sum=False), workers=2, is_deterministic=True)


# --- with a profile, under virtual time -------------------------------------------------------


def send_under(
    profile: dict[str, object], job: WorkerJob, steps: list[WorkerStep], *, clients: int, limit_s: float
) -> tuple[MortalRun, list[ClientReply]]:
    """Send a message to each of the first *clients*, and return the run and the replies."""
    plan = DeathPlan(1, [], steps, [0.001], 0, is_deterministic=False, sends_at_once=True)
    run = MortalRun(job, plan, Profile.model_validate({"groups": {"all": profile}}))
    messages = [
        OutgoingMessage(
            client=name, kind="train", payload=Payload.pack([b"x"]), message_id=name, ttl_s=limit_s
        )
        for name in NAMES[:clients]
    ]
    with patch.multiple(worker, FLUSH_S=-1.0):
        return run, list(run.messenger.send(messages))


def test_a_worker_that_dies_under_a_profile_is_an_error_of_its_client(job: WorkerJob) -> None:
    run, (reply,) = send_under({"delay": 4}, job, [WorkerStep("die", 0, 1)], clients=1, limit_s=60)
    assert reply.error is not None
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_LOST, "client-0000: worker died")
    assert run.messenger.now() == 4.0
    assert not run.messenger.has_open_messages


def test_clients_later_than_the_limit_still_train(job: WorkerJob) -> None:
    """Their limit passes, on the virtual clock, before a worker has their messages."""
    run, replies = send_under({"delay": 100}, job, [], clients=4, limit_s=5)
    assert [reply.error and reply.error.code for reply in replies] == [ErrorCode.MESSAGE_UNAVAILABLE] * 4
    assert run.messenger.now() == 5.0
    assert sorted(run.engine.replied_ids) == [0, 1, 2, 3]
