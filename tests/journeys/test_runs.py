"""Runs of a whole federation with real training processes, with and without failures."""

import signal
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
from support import OwnNatsServer, eventually
from support.all_agents import (
    is_settled,
    run_all_agents,
    run_server_side,
    served_versions,
    start_run,
    training_count,
    wait_for_run_end,
)
from support.cli import CliResult, FedbusCli
from support.federation import TASK, FederationHarness
from support.processes import child_processes

from fedbus.app.failures import ExitCode
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.champion import PromoteModel
from fedbus.contracts.client import ClientJoined, FailTrain, InferRefused
from fedbus.contracts.run import RunState, StopRun
from fedbus.contracts.server import ServerClosed


def state_of(fed: FederationHarness, run: str) -> str:
    return fed.last_transition("run", run).target


async def wait_for_round(fed: FederationHarness, run: str, number: int) -> None:
    """Wait until *run* is in round *number*; the result for the initial model is round 0."""
    await fed.wait_for_event("run", "round_finished", run, times=number)


async def request_prediction(fed: FederationHarness, client: str) -> int:
    """Request a prediction and return the model version of the answer."""
    endpoint = getattr(fed.last_transition("inference", f"{client}.{TASK}").facts, "endpoint", "")
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint}/predict", json={"inputs": [[1, 2, 3]]}) as response,
    ):
        assert response.status == 200
        version: int = (await response.json())["model_version"]
        return version


async def test_each_run_continues_from_the_model_of_the_previous_run(
    fed: FederationHarness,
) -> None:
    async with run_all_agents(fed):
        first = await wait_for_run_end(fed, await start_run(fed, quorum=2))
        assert await training_count(fed) == 2
        second = await wait_for_run_end(fed, await start_run(fed, quorum=2, rounds=3))
        assert await training_count(fed) == 5
        assert [await request_prediction(fed, client) for client in ("c1", "c2")] == [3, 3]
    assert [result.loss for result in first.rounds] == pytest.approx([100, 99, 98])
    assert [result.loss for result in second.rounds] == pytest.approx([98, 97, 96, 95])
    assert second.rounds[1].participants == {"c1": 10, "c2": 20}
    assert not child_processes("trainer")
    assert not child_processes("server")


async def start_when_scheduled(fedbus: FedbusCli, config: str) -> CliResult:
    """Start a run by the CLI, as soon as a scheduler has the lease: until then, the CLI says that none answers."""
    results: list[CliResult] = []

    async def is_answered() -> bool:
        results.append(await fedbus("run", "start", "--config", config))
        return results[-1].code != ExitCode.NO_ANSWER

    await eventually(is_answered, within_s=60)
    return results[-1]


async def test_a_wrong_run_configuration_is_refused_by_the_server(fed: FederationHarness) -> None:
    fedbus = FedbusCli(
        fed.config.home, FEDBUS_NATS_URL=fed.config.nats_url, FEDBUS_FEDERATION=fed.config.federation
    )
    async with run_server_side(fed):
        unknown = await start_when_scheduled(fedbus, "pause=1")
        wrong = await start_when_scheduled(fedbus, "poison=1")
    assert (unknown.code, unknown.out) == (ExitCode.FAILED, "")
    assert "has no key `pause`: did you mean `pause-s`" in unknown.err
    assert (wrong.code, wrong.out) == (ExitCode.FAILED, "")
    assert "`poison` = 1: use true or false; the task has false" in wrong.err
    assert state_of(fed, f"{TASK}-2") == RunState.FAILED
    assert fed.server_facts().run is None


async def test_a_failing_client_does_not_affect_the_others(fed: FederationHarness) -> None:
    async with run_all_agents(fed, clients=3):
        run_id = await start_run(fed, quorum=3, config={"dies": 1, "dies-in": 1, "pause-s": 0.3}, rounds=3)
        run = await wait_for_run_end(fed, run_id)
        assert state_of(fed, run_id) == RunState.FINISHED
        assert (await fed.wait_for_message(FailTrain)).client == "c2"
        assert set(run.rounds[1].participants) == {"c1", "c3"}
        assert "c2" in run.rounds[1].failures
        assert "trainer_lost" in fed.events_of("client", f"c2.{TASK}")

        run_id = await start_run(fed, quorum=3, config={"raises": 0})
        run = await wait_for_run_end(fed, run_id)
        assert state_of(fed, run_id) == RunState.FINISHED
        assert set(run.rounds[-1].participants) == {"c2", "c3"}
        assert "the run config makes this client fail" in run.rounds[-1].failures["c1"]
        assert await training_count(fed) == 5

        assert served_versions(fed) == dict.fromkeys(("c1", "c2", "c3"), 3)


async def test_a_run_survives_a_killed_nats_server(fed: FederationHarness, own_nats: OwnNatsServer) -> None:
    async with run_all_agents(fed):
        run_id = await start_run(fed, quorum=2, rounds=4, config={"pause-s": 0.3})
        await wait_for_round(fed, run_id, 1)
        await own_nats.kill()
        await own_nats.start()
        run = await wait_for_run_end(fed, run_id)
        assert state_of(fed, run_id) == RunState.FINISHED
        assert [result.round for result in run.rounds] == [0, 1, 2, 3, 4]
        assert await request_prediction(fed, "c1") == served_versions(fed)["c1"]


@pytest.mark.parametrize(
    ("weigh_by", "mean"),
    [
        pytest.param("samples", 5.0, marks=pytest.mark.slow),
        ("reliability", pytest.approx(10 / 3, abs=1e-3)),
    ],
)
async def test_updates_are_weighted_as_the_task_configures(
    fed: FederationHarness, weigh_by: str, mean: object
) -> None:
    """c1 adds 0 and c2 adds 10, with as many samples. c2 fails in the first run: reliability 1/3, and c1 2/3."""
    app = Path(fed.config.task.path) / "tiny" / "client_app.py"
    code = app.read_text().replace("step = 1.0", "step = 10.0 * number")
    app.write_text(code.replace('"num-examples": 10 * (number + 1)', '"num-examples": 10'))
    table = fed.config.task.table.model_dump() | {"selection": {"weigh-by": weigh_by}}
    weighted_task = fed.config.task.model_copy(update={"table": fed.config.task.table.model_validate(table)})
    fed.config = replace(fed.config, task=weighted_task)
    async with run_all_agents(fed):
        first = await wait_for_run_end(fed, await start_run(fed, quorum=2, rounds=1, config={"raises": 1}))
        assert set(first.rounds[-1].failures) == {"c2"}
        assert await training_count(fed) == 0
        second = await wait_for_run_end(fed, await start_run(fed, quorum=2, rounds=1))
        assert second.rounds[-1].participants == {"c1": 10, "c2": 10}
        assert await training_count(fed) == mean


async def test_a_slow_client_is_left_out_of_the_round(fed: FederationHarness) -> None:
    slow = {"slow": 1, "slow-s": 5.0}
    fed.override_plan(round_s=3.0)  # the time of the other client on a busy machine
    async with run_all_agents(fed):
        run = await start_run(fed, quorum=2, config=slow, rounds=1)
        facts = await wait_for_run_end(fed, run)
        assert state_of(fed, run) == RunState.FINISHED
        assert set(facts.rounds[1].participants) == {"c1"}
        assert "no reply within 3 s" in facts.rounds[1].failures["c2"]


@dataclass(frozen=True)
class TrainingHold:
    """Holds the trainings of a run by a file, which the tiny task looks for."""

    file: Path

    def hold_from(self, first_round: int) -> dict[str, str]:
        """Hold the trainings from *first_round* of a run with the returned configuration."""
        self.file.write_text(str(first_round))
        return {"hold": str(self.file)}

    def release(self) -> None:
        self.file.unlink()


@pytest.fixture
def training(tmp_path: Path) -> TrainingHold:
    return TrainingHold(tmp_path / "hold")


async def test_a_killed_flower_server_resumes_from_its_checkpoint(
    fed: FederationHarness, training: TrainingHold
) -> None:
    async with run_all_agents(fed):
        run = await start_run(fed, quorum=2, rounds=3, config=training.hold_from(2))
        await wait_for_round(fed, run, 2)
        (flower,) = child_processes("server")
        flower.send_signal(signal.SIGKILL)
        await fed.wait_for_event("run", "server_lost", run)
        training.release()
        facts = await wait_for_run_end(fed, run)
        assert state_of(fed, run) == RunState.FINISHED
        assert [result.round for result in facts.rounds] == [0, 1, 2, 3]
        assert await training_count(fed) == 3, facts.rounds
    events = fed.events_of("run", run)
    assert events.count("server_lost") == events.count("server_recovered") == 1
    assert "was killed (SIGKILL" in (await fed.wait_for_event("run", "server_lost", run)).reason


async def test_a_run_survives_restarts_of_the_server_side(
    fed: FederationHarness, training: TrainingHold
) -> None:
    async with run_all_agents(fed) as agents:
        run = await start_run(fed, quorum=2, rounds=4, config=training.hold_from(3))
        await wait_for_round(fed, run, 1)
        await agents["server"][AgentName.SERVER_MANAGER].restart()
        await agents["server"][AgentName.WORKFLOW_SCHEDULER].restart()
        await wait_for_round(fed, run, 3)
        assert "server_lost" not in fed.events_of("run", run)  # the run continued without recovery
        await agents["server"][AgentName.FLOWER_SERVER].restart()
        training.release()
        facts = await wait_for_run_end(fed, run)
        assert state_of(fed, run) == RunState.FINISHED
        assert await training_count(fed) == 4
    assert [result.round for result in facts.rounds] == [0, 1, 2, 3, 4]
    assert fed.events_of("run", run).count("server_lost") == 1


async def test_a_killed_client_rejoins_the_run(fed: FederationHarness, training: TrainingHold) -> None:
    async with run_all_agents(fed) as agents:
        run = await start_run(fed, quorum=2, rounds=5, config=training.hold_from(2))
        await wait_for_round(fed, run, 2)
        for agent in agents["c2"].values():
            await agent.kill()
        for agent in agents["c2"].values():
            agent.start()
        await fed.wait_for_message(ClientJoined, times=3)
        training.release()
        facts = await wait_for_run_end(fed, run)
        assert state_of(fed, run) == RunState.FINISHED
        assert set(facts.rounds[-1].participants) == {"c1", "c2"}
        assert served_versions(fed) == {"c1": 2, "c2": 2}


async def test_a_stopped_run_leaves_the_served_model_unchanged(fed: FederationHarness) -> None:
    async with run_all_agents(fed):
        run = await start_run(fed, quorum=2, rounds=50, config={"pause-s": 0.2})
        await wait_for_round(fed, run, 1)
        await fed.bus.request(StopRun(task=TASK, run=run, reason="enough"), timeout_s=20)
        await wait_for_run_end(fed, run)
        assert (await fed.wait_for_message(ServerClosed)).outcome == "cancelled"
        await fed.wait_for_event("fl_client", "failed", times=2)
        await fed.wait_until(
            lambda: is_settled(fed) and not child_processes("trainer") and not child_processes("server")
        )
        assert served_versions(fed) == {"c1": 1, "c2": 1}
        await wait_for_run_end(fed, await start_run(fed, quorum=2))
        assert await training_count(fed) == 2


async def test_a_model_with_nan_is_neither_promoted_nor_served(
    fed: FederationHarness,
) -> None:
    async with run_all_agents(fed):
        await start_run(fed, quorum=2, rounds=1, config={"poison": True})
        assert "loss is nan" in (await fed.wait_for_event("server", "candidate_kept", within_s=60)).reason
        await fed.wait_until(lambda: is_settled(fed))
        assert fed.messages_of(InferRefused) == []

        await fed.bus.request(PromoteModel(task=TASK, model_version=2, reason="by mistake"))
        refused = await fed.wait_for_message(InferRefused, times=2, within_s=60)
        assert (refused.model.version, refused.serving) == (2, 1)
        await fed.wait_until(lambda: is_settled(fed))
        assert [await request_prediction(fed, client) for client in ("c1", "c2")] == [1, 1]
        assert fed.last_transition("client", f"c1.{TASK}").event == "infer_refused"
