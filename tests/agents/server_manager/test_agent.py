"""The server manager on a real bus: requests and events in, transitions and events out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from support import eventually
from support.consumers import has_consumed_all
from support.fake_flower_server import FakeFlowerServer
from support.federation import TASK, FederationHarness, RunningAgent
from support.held_timer import hold_timer
from support.recorded_telemetry import record_spans

from fedbus.agents.server_manager.agent import ServerManager
from fedbus.agents.server_manager.events import TimerName
from fedbus.app.composition.agents import server_manager
from fedbus.bus.errors import RequestRefused, StaleOwner
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import ClientDeclined, ClientJoined
from fedbus.contracts.code import CodePublished
from fedbus.contracts.flower_server import (
    BeginTraining,
    FindServer,
    InitModel,
    ModelInitialised,
    RoundFinished,
    RunFailed,
    RunFinished,
    ServerFound,
    ServerLost,
    ServerStarted,
    ServerStarting,
    StartServer,
    StopServer,
)
from fedbus.contracts.identifiers import TaskId
from fedbus.contracts.message import Body, Refused
from fedbus.contracts.model import Manifest
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.server import (
    SERVER,
    CancelRun,
    Enroll,
    GetServerInfo,
    HealthCheck,
    ModelPublished,
    OpenRun,
    ServerChanges,
    ServerClosed,
    ServerData,
    ServerEvent,
    StoreProblem,
    UpdateReady,
)
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.learning import weights
from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.models.directory import DirectoryObjectStore
from fedbus.stores.models.open import ModelRepository, ModelStore

RUN = f"{TASK}-1"
PLAN = RunPlan(rounds=2, quorum=2, recruit_s=30, round_s=30)


@dataclass
class StatefulFlowerServer(FakeFlowerServer):
    """It reports when a Flower server is up, and knows whether one is."""

    running_run: str = ""
    """The run that has a Flower server."""
    refusal: str = ""

    async def lose_server(self) -> None:
        self.running_run = ""
        await self.fed.publish(ServerLost(task=TASK, run=RUN, reason="it was killed"), sender="flower-server")

    async def finish_round(self, number: int, **participants: int) -> None:
        """A round comes to its end."""
        result = RoundResult(round=number, metrics={"loss": 1.0 / number}, participants=participants)
        checkpoint = await self.make_model(number)
        message = RoundFinished(task=TASK, run=RUN, round=number, result=result, checkpoint=checkpoint)
        await self.fed.publish(message, sender="flower-server")

    async def fail_round(self, number: int, **failures: str) -> None:
        """A round without any update."""
        message = RoundFinished(
            task=TASK, run=RUN, round=number, result=RoundResult(round=number, failures=failures)
        )
        await self.fed.publish(message, sender="flower-server")

    async def finish_training(self, rounds: int = 2) -> None:
        message = RunFinished(task=TASK, run=RUN, rounds=rounds, artifact=await self.make_model(rounds))
        await self.fed.publish(message, sender="flower-server")
        self.running_run = ""

    async def init(self, request: InitModel) -> Body:
        self.build_requests.append(request)
        return (
            Refused(reason=self.refusal)
            if self.refusal
            else ModelInitialised(artifact=await self.make_model(0))
        )

    async def start(self, request: StartServer) -> Body:
        self.start_requests.append(request)
        if self.refusal:
            return Refused(reason=self.refusal)
        self.running_run = request.run
        await self.fed.publish(ServerStarted(task=TASK, run=request.run), sender="flower-server")
        return ServerStarting()

    async def stop(self, request: StopServer) -> Body:
        self.running_run = ""
        return await super().stop(request)

    async def find(self, request: FindServer) -> Body:
        up = self.running_run == request.run
        if request.say_so and not up:
            await self.fed.publish(
                ServerLost(task=TASK, run=RUN, reason="it is gone"), sender="flower-server"
            )
        return ServerFound(up=up)


@pytest.fixture
async def flower(fed: FederationHarness) -> AsyncIterator[StatefulFlowerServer]:
    flower = StatefulFlowerServer(fed)
    await flower.store.prepare()
    async with flower.serve():
        yield flower


@pytest.fixture
async def manager(fed: FederationHarness, flower: StatefulFlowerServer) -> AsyncIterator[RunningAgent]:
    """A server manager without a run."""
    async with fed.run_agent(lambda stop: server_manager(fed.config, stop)) as agent:
        await fed.wait_for_message(CodePublished)  # the last message before it consumes
        yield agent


async def open_run(fed: FederationHarness, **changes: Any) -> None:
    await fed.bus.request(OpenRun(task=TASK, run=RUN, plan=PLAN.model_copy(update=changes)))


async def join(fed: FederationHarness, client: str, *, code: str | None = None) -> None:
    code = fed.config.task.code_version if code is None else code
    await fed.publish(ClientJoined(task=TASK, client=client, run=RUN, code_version=code), sender="trainer")


async def train(fed: FederationHarness) -> None:
    """A run with its quorum there."""
    await open_run(fed)
    await fed.wait_for_message(UpdateReady)
    await join(fed, "c1")
    await join(fed, "c2")
    await fed.wait_for_message(BeginTraining)


# --- a whole run ---------------------------------------------------------------------------------


async def test_a_run_ends_with_a_published_version(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await flower.finish_round(1, c1=10, c2=20)
    await flower.finish_round(2, c1=10, c2=20)
    await flower.finish_training()
    await fed.wait_for_message(ServerClosed)

    assert fed.events_of("server") == [
        "started",
        "model_ready",
        "run_requested",
        "quorum_reached",
        "round_finished",
        "round_finished",
        "run_finished",
        "version_published",
    ]
    assert fed.messages_of(BeginTraining) == [BeginTraining(task=TASK, run=RUN, cohort=("c1", "c2"))]
    (published,) = fed.messages_of(ModelPublished)
    assert (published.model.version, published.run) == (2, RUN)
    assert fed.messages_of(ServerClosed) == [ServerClosed(task=TASK, run=RUN, outcome="finished", rounds=2)]
    latest = await flower.store.read_latest()
    assert latest is not None
    assert (latest.version, latest.parent, latest.rounds) == (2, 1, 2)
    assert latest.participants == {"c1": 10, "c2": 20}
    assert latest.metrics == {"loss": 0.5}


async def test_a_run_without_updates_fails_and_the_model_stays(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    for number in (1, 2):
        await flower.fail_round(number, c1="update unavailable", c2="out of memory")
    await flower.finish_training()
    closed = await fed.wait_for_message(ServerClosed)
    assert (closed.outcome, fed.events_of("server")[-1]) == ("failed", "run_failed")
    assert "no client's update is in any of the 2 rounds" in closed.reason
    assert "c1: update unavailable; c2: out of memory" in closed.reason
    assert fed.messages_of(ModelPublished) == []
    latest = await flower.store.read_latest()
    assert latest is not None
    assert latest.version == 1


async def test_the_announced_model_can_be_fetched(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer, tmp_path: Path
) -> None:
    info = await fed.bus.request(GetServerInfo(task=TASK))
    assert info.blob is not None
    assert info.model is not None
    await fed.bus.blobs.fetch_to(info.blob, tmp_path / "fetched")
    np.testing.assert_array_equal(weights.load(tmp_path / "fetched")["w"], np.zeros(3))
    assert (info.model.version, info.code_version) == (1, fed.config.task.code_version)


async def test_health_names_the_run_that_accepts_clients(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    assert (await fed.bus.request(HealthCheck(task=TASK))).open_run is None
    await train(fed)
    late = (await fed.bus.request(HealthCheck(task=TASK))).open_run
    assert late is not None
    assert late.run == RUN
    await join(fed, "late")
    await flower.finish_round(1)
    await fed.wait_for_event("server", "round_finished")
    assert fed.server_facts().cohort == ("c1", "c2", "late")


# --- start ---------------------------------------------------------------------------------------


class UnavailableModelStore(ModelRepository):
    """A model store whose volume can be unmounted."""

    is_unavailable = True

    async def read_latest(self) -> Manifest | None:
        self._check_available()
        return await super().read_latest()

    async def local_path(self, sha256: str) -> Path:
        self._check_available()
        return await super().local_path(sha256)

    async def publish(self, manifest: Manifest) -> Manifest:
        self._check_available()
        return await super().publish(manifest)

    def _check_available(self) -> None:
        if self.is_unavailable:
            raise StoreUnavailable(Path(self.url), "the volume is not mounted")


def make_manager(fed: FederationHarness, store: ModelStore) -> Any:
    async def run(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("server-manager") as bus:
            await ServerManager(bus, fed.config.task, store).run(stop)

    return run


async def test_a_failed_model_build_is_published_once_and_retried(
    fed: FederationHarness, flower: StatefulFlowerServer
) -> None:
    flower.refusal = "tiny.model:Net cannot build a model: NameError"
    async with fed.run_agent(lambda stop: server_manager(fed.config, stop)):
        await eventually(lambda: len(flower.build_requests) >= 3)
        assert fed.events_of("server") == ["started", "model_not_built"]
        flower.refusal = ""
        await fed.wait_for_state("server", "waiting")


async def test_a_client_is_enrolled_and_a_reserved_name_is_refused(
    fed: FederationHarness, manager: RunningAgent
) -> None:
    enrolled = await fed.bus.request(Enroll(task=TASK, client="c1"))
    assert "c1_tiny_inference" in enrolled.consumers
    with pytest.raises(RequestRefused, match="cannot be called 'server'"):
        await fed.bus.request(Enroll(task=TASK, client="server"))


# --- recruiting ------------------------------------------------------------------------------------


async def test_expired_recruiting_names_the_clients_that_declined(
    fed: FederationHarness,
    manager: RunningAgent,
    flower: StatefulFlowerServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_expire = hold_timer(monkeypatch, TimerName.RECRUITING)
    await open_run(fed)
    for client, run in (("c1", RUN), ("c2", RUN), ("c3", f"{TASK}-9")):
        reason = f"{client} trains for another task"
        await fed.publish(
            ClientDeclined(task=TASK, client=client, run=run, reason=reason), sender="client-manager"
        )
    await join(fed, "c2")  # which has looked again
    await eventually(lambda: has_consumed_all(fed, SERVER_SIDE, AgentName.SERVER_MANAGER))
    may_expire.set()
    transition = await fed.wait_for_event("server", "recruiting_expired")
    assert transition.reason == (
        "1 of 2 clients joined in time (c2); c1 declined: c1 trains for another task"
    )


async def test_a_run_is_opened_once_for_repeated_requests(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await open_run(fed)
    await open_run(fed)  # the scheduler did not receive the reply
    await train(fed)
    await flower.finish_training()
    await fed.wait_for_message(ServerClosed)
    await open_run(fed)  # nor the end
    assert fed.events_of("server").count("run_requested") == 1
    assert len(flower.start_requests) == 1


async def test_a_flower_server_that_does_not_start_fails_the_run(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    flower.refusal = "no such app"
    with pytest.raises(RequestRefused, match="no such app"):
        await open_run(fed)
    assert (await fed.wait_for_event("server", "run_failed")).source == "recruiting"
    assert (await fed.wait_for_message(ServerClosed)).reason == "no such app"


async def test_a_flower_server_lost_while_recruiting_fails_the_run(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await open_run(fed)
    await flower.lose_server()
    assert (await fed.wait_for_event("server", "run_failed")).reason.startswith("it was killed, while")


# --- the ends that a run may come to -----------------------------------------------------------------


async def test_a_run_that_is_cancelled_leaves_the_version_as_it_was(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await open_run(fed)
    await fed.bus.request(CancelRun(task=TASK, run=RUN, reason="enough"))
    assert fed.last_transition("server").source == "recruiting"
    with pytest.raises(RequestRefused, match="is not in progress"):
        await fed.bus.request(CancelRun(task=TASK, run=RUN, reason="enough"))
    closed = await fed.wait_for_message(ServerClosed)
    assert (closed.outcome, closed.reason) == ("cancelled", "enough")
    assert flower.stopped_runs == [RUN]
    assert [one.version for one in await flower.store.list_versions()] == [1]


async def test_a_run_may_be_cancelled_in_training_too(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await fed.bus.request(CancelRun(task=TASK, run=RUN, reason="enough"))
    assert fed.last_transition("server").source == "training"


async def test_an_app_that_gives_up_fails_its_run_and_the_version_stays(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await fed.publish(RunFailed(task=TASK, run=RUN, reason="the ServerApp raised"), sender="flower-server")
    closed = await fed.wait_for_message(ServerClosed)
    assert (closed.outcome, closed.reason) == ("failed", "the ServerApp raised")
    assert [one.version for one in await flower.store.list_versions()] == [1]


async def test_a_version_that_another_has_published_is_not_overwritten(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    versions = Path(fed.config.store_url) / TASK / "versions"
    (versions / "1.json").write_text("not a manifest")
    await flower.finish_training()
    transition = await fed.wait_for_event("server", "version_refused")
    assert "is corrupt" in transition.reason
    assert (await fed.wait_for_message(ServerClosed)).outcome == "failed"
    assert not fed.messages_of(ModelPublished)


# --- a Flower server that is lost ----------------------------------------------------------------------


async def test_a_lost_flower_server_resumes_from_the_last_checkpoint(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await flower.finish_round(1)
    await fed.wait_for_event("server", "round_finished")
    await join(fed, "late")
    await flower.lose_server()
    await fed.wait_for_event("server", "server_recovered")
    again = await fed.wait_for_message(BeginTraining, times=2)

    assert fed.events_of("server")[-3:] == ["round_finished", "server_lost", "server_recovered"]
    assert [start.first_round for start in flower.start_requests] == [1, 2]
    assert flower.start_requests[1].artifact == await flower.make_model(1)
    assert set(again.cohort) == {
        "c1",
        "c2",
        "late",
    }  # including the client that joined while the server was lost


async def test_a_second_owner_ends_the_manager_during_a_request_too(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    async with LifecycleStore.open(await fed.connect_as("server-manager")) as lifecycles:
        other = await lifecycles.load(SERVER, ServerData(task=TASK))
        changes = ServerChanges(trouble=StoreProblem.UNAVAILABLE)
        await other.transition(ServerEvent.STORE_UNAVAILABLE, changes, reason="of another manager")
    with pytest.raises(RequestRefused, match="another owner changed"):
        await fed.bus.request(CancelRun(task=TASK, run=RUN, reason="enough"), timeout_s=30)
    with pytest.RaisesGroup(StaleOwner, flatten_subgroups=True):
        await manager.wait_for_end()


# --- a manager that is killed goes on from the log ---------------------------------------------------------


async def test_a_restart_while_waiting_publishes_code_and_model(
    fed: FederationHarness, manager: RunningAgent
) -> None:
    await fed.wait_for_message(CodePublished)
    await manager.restart()
    again = await fed.wait_for_message(CodePublished, times=2)
    assert again.code_version == fed.config.task.code_version
    await train(fed)


async def test_a_restart_while_recruiting_keeps_joined_clients(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await open_run(fed)
    await fed.wait_for_message(UpdateReady)
    await join(fed, "c1")
    await fed.wait_for_message(ClientJoined)
    await manager.restart()
    await join(fed, "c2")
    begin = await fed.wait_for_message(BeginTraining)
    assert begin.cohort == ("c1", "c2")
    assert len(flower.start_requests) == 1


async def test_restarted_while_recruiting_it_still_gives_up_in_time(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await open_run(fed, recruit_s=1.5)
    await manager.restart()
    transition = await fed.wait_for_event("server", "recruiting_expired")
    assert transition.reason == "0 of 2 clients joined in time (none)"


async def test_a_restart_in_recruiting_without_flower_server_fails_the_run(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await open_run(fed)
    await manager.kill()
    flower.running_run = ""
    manager.start()
    transition = await fed.wait_for_event("server", "run_failed")
    assert transition.reason == "it is gone, while the server was recruiting"


async def test_a_restart_in_training_keeps_a_running_flower_server(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await manager.kill()
    await flower.finish_round(1)
    await flower.finish_round(2)
    await flower.finish_training()
    flower.running_run = RUN  # its process needs a moment to end
    manager.start()
    await fed.wait_for_message(ModelPublished)
    assert fed.events_of("server")[3:] == [
        "quorum_reached",
        "round_finished",
        "round_finished",
        "run_finished",
        "version_published",
    ]
    assert len(flower.start_requests) == 1


async def test_a_restart_in_training_replaces_a_lost_flower_server(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await flower.finish_round(1)
    await fed.wait_for_event("server", "round_finished")
    await manager.kill()
    await flower.lose_server()
    manager.start()
    await fed.wait_for_event("server", "server_recovered")
    assert [start.first_round for start in flower.start_requests] == [1, 2]
    assert (
        fed.events_of("server").count("server_lost") == 1
    )  # the first report was out of date when it was delivered


async def test_a_restart_after_training_publishes_the_version(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await manager.kill()
    await flower.finish_round(1)
    await flower.finish_round(2)
    await flower.finish_training()
    manager.start()
    await fed.wait_for_message(ModelPublished)
    assert (await fed.wait_for_message(ServerClosed)).outcome == "finished"
    assert flower.running_run == ""  # no process is left running


async def test_restarted_while_publishing_it_publishes_once(
    fed: FederationHarness, flower: StatefulFlowerServer
) -> None:
    store = UnavailableModelStore(DirectoryObjectStore(Path(fed.config.store_url), TaskId(TASK)))
    store.is_unavailable = False
    async with fed.run_agent(make_manager(fed, store)) as manager:
        await fed.wait_for_message(CodePublished)
        await train(fed)
        store.is_unavailable = True
        await flower.finish_training()
        await fed.wait_for_state("server", "publishing")
        await manager.kill()
        store.is_unavailable = False
        manager.start()
        await fed.wait_for_message(ModelPublished)
        await fed.wait_for_message(ServerClosed)
    assert [one.version for one in await flower.store.list_versions()] == [1, 2]
    assert fed.last_transition("server").event == "version_published"


async def test_a_restart_publishes_the_end_of_a_run_that_was_missed(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    await train(fed)
    await flower.finish_training()
    await fed.wait_for_state("server", "waiting")
    await manager.kill()
    closed = len(fed.messages_of(ServerClosed))
    manager.start()
    again = await fed.wait_for_message(ServerClosed, times=closed + 1)
    assert (again.run, again.outcome) == (RUN, "finished")


async def test_a_repeated_end_of_a_run_is_not_in_its_trace(
    fed: FederationHarness, manager: RunningAgent, flower: StatefulFlowerServer
) -> None:
    with record_spans() as spans:
        with trace.get_tracer("test").start_as_current_span("a run") as span:
            await train(fed)
            await flower.finish_training()
        await fed.wait_for_message(ServerClosed)
        await manager.restart()
        await fed.wait_for_message(ServerClosed, times=2)
    run_trace = span.get_span_context().trace_id
    in_trace = {
        name: [
            one.context.trace_id == run_trace
            for one in spans.get_finished_spans()
            if one.name == name and one.context
        ]
        for name in ("publish model_published", "publish server_closed")
    }
    assert in_trace == {"publish model_published": [True, False], "publish server_closed": [True, False]}
