"""Which version is the champion, and why: the gate after a run, and requests. The Flower server is simulated."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import eventually
from support.fake_flower_server import FakeFlowerServer
from support.federation import TASK, AgentFunction, FederationHarness, RunningAgent

from fedbus.agents.server_manager.agent import ServerManager
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.champion import Champion, PromoteModel, RollBackModel, StartLineage
from fedbus.contracts.code import CodePublished
from fedbus.contracts.model import Manifest
from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.contracts.server import GetServerInfo, ModelPublished, OpenRun, ServerClosed
from fedbus.stores.models.signing import ModelSigner, TrustedKeys, generate_key

PLAN = RunPlan(rounds=1, quorum=1, recruit_s=30, round_s=30)


class OneClientFlowerServer(FakeFlowerServer):
    """It trains with one client."""

    async def begin_training_run(self, number: int) -> None:
        """A run that is in training."""
        await self.begin_run(number, PLAN, "c1")

    async def finish_with_metrics(self, number: int, **metrics: float) -> None:
        """The run comes to a model with these metrics."""
        await self.finish_run(number, RoundResult(round=1, metrics=metrics, participants={"c1": 10}))

    async def complete_run(self, number: int, **metrics: float) -> None:
        await self.begin_training_run(number)
        await self.finish_with_metrics(number, **metrics)

    def set_difference(self, how: str) -> None:
        self.differences[self.fed.config.task.code_version] = how


@pytest.fixture
async def flower(fed: FederationHarness) -> AsyncIterator[OneClientFlowerServer]:
    flower = OneClientFlowerServer(fed)
    await flower.store.prepare()
    async with flower.serve():
        yield flower


@pytest.fixture
def signer(tmp_path: Path) -> ModelSigner:
    generate_key(tmp_path / "fedbus.key")
    return ModelSigner.load(tmp_path / "fedbus.key")


@pytest.fixture
async def manager(
    fed: FederationHarness, flower: OneClientFlowerServer, signer: ModelSigner
) -> AsyncIterator[RunningAgent]:
    async def manage(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("server-manager") as bus:
            await ServerManager(bus, fed.config.task, flower.store, signer=signer).run(stop)

    async with fed.run_agent(manage) as agent:
        await fed.wait_for_message(CodePublished)
        yield agent


def make_server(fed: FederationHarness, flower: OneClientFlowerServer) -> AgentFunction:
    """A server manager without a signer."""

    async def manage(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("server-manager") as bus:
            await ServerManager(bus, fed.config.task, flower.store).run(stop)

    return manage


async def publish_first_version(flower: OneClientFlowerServer, *, code_version: str) -> None:
    """A first version that was published before."""
    facts = (await flower.make_artifact()).model_dump()
    created = datetime.now(UTC)
    await flower.store.publish(
        Manifest(**facts, version=1, task=TASK, created=created, code_version=code_version)
    )


async def served_version(fed: FederationHarness) -> tuple[int, int]:
    """Return the version and the term that clients get."""
    offered: list[tuple[int, int]] = []

    async def is_offered() -> bool:
        with suppress(RequestRefused):  # a manager that has come back asks its repository first
            info = await fed.bus.request(GetServerInfo(task=TASK))
            assert info.model is not None
            offered.append((info.model.version, info.term))
        return bool(offered)

    await eventually(is_offered)
    return offered[0]


async def read_champion(flower: OneClientFlowerServer) -> Champion:
    found = await flower.store.read_champion()
    assert found is not None
    return found


# --- the gate --------------------------------------------------------------------------------------


async def test_a_model_that_is_not_worse_is_promoted_and_announced(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.complete_run(2, loss=0.4)
    assert await served_version(fed) == (3, 3)
    assert [one.model.version for one in fed.messages_of(ModelPublished)] == [2, 3]
    assert [one.term for one in fed.messages_of(ModelPublished)] == [2, 3]
    assert (await read_champion(flower)).before == (2, 1)


async def test_a_worse_model_is_stored_but_not_promoted(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.complete_run(2, loss=0.8)
    transition = await fed.wait_for_event("server", "candidate_kept")
    assert "loss 0.8, champion 0.5: 60.0 % worse (limit 10 %)" in transition.reason
    assert await served_version(fed) == (2, 2)
    assert len(fed.messages_of(ModelPublished)) == 1
    assert not fed.messages_of(ServerClosed)[-1].new_model
    assert [one.version for one in await flower.store.list_versions()] == [1, 2, 3]
    facts = fed.server_facts()
    assert facts.candidate is not None
    assert (facts.candidate.version, facts.model and facts.model.version) == (3, 2)


async def test_the_next_run_starts_from_the_champion(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.complete_run(2, loss=0.8)
    await flower.complete_run(3, loss=0.45)
    second = await flower.store.read_manifest(2)
    assert flower.start_requests[2].artifact.sha256 == second.sha256
    assert [one.parent for one in await flower.store.list_versions()] == [None, 1, 2, 2]
    assert await served_version(fed) == (4, 3)


async def test_a_model_with_a_loss_of_nan_is_never_promoted(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=float("nan"))
    assert "nan" in (await fed.wait_for_event("server", "candidate_kept")).reason
    assert await served_version(fed) == (1, 1)


async def test_a_version_based_on_a_former_champion_is_not_promoted(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.begin_training_run(2)
    await fed.bus.request(RollBackModel(task=TASK, reason="version 2 was poisoned"))
    await flower.finish_with_metrics(2, loss=0.1)
    transition = await fed.wait_for_event("server", "candidate_kept")
    assert "its base is version 2, but the champion is version 1 now" in transition.reason
    assert (await served_version(fed))[0] == 1


# --- by hand ---------------------------------------------------------------------------------------


async def test_a_version_that_was_not_promoted_can_be_promoted_by_hand(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.complete_run(2, loss=0.8)
    answer = await fed.bus.request(PromoteModel(task=TASK, model_version=3, reason="better on rare classes"))
    assert (answer.model.version, answer.instead_of) == (3, 2)
    message = await fed.wait_for_message(ModelPublished, times=2)
    assert (message.model.version, message.term, message.reason) == (3, 3, "better on rare classes")
    assert (await read_champion(flower)).reason == "better on rare classes"
    assert fed.events_of("server")[-1] == "model_promoted"


async def test_a_rollback_announces_the_previous_champion(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.complete_run(2, loss=0.4)
    answer = await fed.bus.request(RollBackModel(task=TASK))
    assert (answer.model.version, answer.instead_of) == (2, 3)
    message = await fed.wait_for_message(ModelPublished, times=3)
    assert (message.model.version, message.term) == (2, 4)
    assert await served_version(fed) == (2, 4)


async def test_a_rollback_may_name_the_version(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await flower.complete_run(2, loss=0.4)
    await fed.bus.request(RollBackModel(task=TASK, to=1))
    assert (await served_version(fed))[0] == 1


@pytest.mark.parametrize("training", [False, True], ids=["recruiting", "training"])
async def test_the_champion_may_change_during_a_run(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer, training: bool
) -> None:
    await flower.complete_run(1, loss=0.5)
    if training:
        await flower.begin_training_run(2)
    else:
        await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-2", plan=PLAN))
    state = "training" if training else "recruiting"
    await fed.bus.request(RollBackModel(task=TASK))
    assert (await fed.wait_for_event("server", "model_rolled_back")).target == state
    await fed.bus.request(PromoteModel(task=TASK, model_version=2))
    assert (await fed.wait_for_event("server", "model_promoted")).target == state


async def test_an_impossible_promotion_is_refused_with_a_reason(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    for request, reason in (
        (RollBackModel(task=TASK), "no champion before this one"),
        (PromoteModel(task=TASK, model_version=9), "has no version 9; it has 1 to 1"),
        (RollBackModel(task=TASK, to=1), "version 1 is the champion already"),
    ):
        with pytest.raises(RequestRefused, match=reason):
            await fed.bus.request(request)
    assert await served_version(fed) == (1, 1)


async def test_a_champion_can_be_promoted_again_after_device_rollbacks(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    answer = await fed.bus.request(PromoteModel(task=TASK, model_version=1, reason="again"))
    assert (answer.model.version, answer.instead_of) == (1, 1)
    message = await fed.wait_for_message(ModelPublished)
    assert (message.model.version, message.term, message.reason) == (1, 2, "again")
    assert await served_version(fed) == (1, 2)
    with pytest.raises(RequestRefused, match="no champion before this one"):
        await fed.bus.request(RollBackModel(task=TASK))


async def test_a_version_that_does_not_fit_the_code_is_refused(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    flower.width = 5
    await fed.bus.request(StartLineage(task=TASK))
    flower.set_difference("w is float32 (3,) there and float32 (5,) here")
    with pytest.raises(RequestRefused, match=r"does not fit the code that is in use: w is float32 \(3,\)"):
        await fed.bus.request(RollBackModel(task=TASK))
    assert await served_version(fed) == (2, 2)


async def test_a_run_whose_code_makes_another_model_is_refused(
    fed: FederationHarness, flower: OneClientFlowerServer
) -> None:
    await publish_first_version(flower, code_version="of yesterday")
    flower.width = 5
    flower.set_difference("w is float32 (3,) there and float32 (5,) here")
    async with fed.run_agent(make_server(fed, flower)):
        await fed.wait_for_message(CodePublished)
        open_run = OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN)
        for _ in range(2):
            with pytest.raises(
                RequestRefused, match=r"w is float32 \(3,\) there.*fedbus model init --new-lineage"
            ):
                await fed.bus.request(open_run)
        assert (flower.start_requests, len(flower.check_requests)) == ([], 1)
        assert fed.server_facts().run is None
        await fed.bus.request(StartLineage(task=TASK))
        await fed.bus.request(open_run)  # it was made by the code that there is
        assert len(flower.check_requests) == 1


async def test_a_run_of_new_code_that_makes_the_same_model_starts(
    fed: FederationHarness, flower: OneClientFlowerServer
) -> None:
    await publish_first_version(flower, code_version="of yesterday")
    async with fed.run_agent(make_server(fed, flower)):
        await fed.wait_for_message(CodePublished)
        await flower.begin_training_run(1)
    assert [one.code_version for one in flower.check_requests] == [fed.config.task.code_version]


async def test_a_new_lineage_begins_with_a_first_model_and_no_parent(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    flower.width = 5
    answer = await fed.bus.request(StartLineage(task=TASK, reason="a wider layer"))
    assert (answer.model.version, answer.instead_of) == (3, 2)
    manifest = await flower.store.read_manifest(3)
    assert (manifest.parent, manifest.lineage) == (None, 2)
    assert (await fed.wait_for_message(ModelPublished, times=2)).reason == "a wider layer"
    await flower.complete_run(2, loss=9.0)  # the champion has no metric to compare with
    assert [one.lineage for one in await flower.store.list_versions()] == [1, 1, 2, 2]
    assert (await served_version(fed))[0] == 4


# --- signatures, and a manager that comes back -----------------------------------------------------


async def test_every_announcement_has_the_signature_of_its_version(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer, tmp_path: Path
) -> None:
    trusted = TrustedKeys.load(tmp_path / "fedbus.key.pub")
    await flower.complete_run(1, loss=0.5)
    for manifest in await flower.store.list_versions():
        trusted.verify_manifest(manifest)
    info = await fed.bus.request(GetServerInfo(task=TASK))
    assert info.model is not None
    trusted.verify(TASK, info.model, info.seal)
    transition = fed.messages_of(ModelPublished)[0]
    trusted.verify(TASK, transition.model, transition.seal)


async def test_a_restart_announces_a_champion_that_was_not_announced(
    fed: FederationHarness, manager: RunningAgent, flower: OneClientFlowerServer
) -> None:
    await flower.complete_run(1, loss=0.5)
    await manager.kill()
    before = await read_champion(flower)
    moved = before.model_copy(update={"version": 1, "term": before.term + 1, "before": (2,)})
    await flower.store.set_champion(moved)
    manager.start()
    await fed.wait_for_event("server", "model_promoted")
    assert await served_version(fed) == (1, 3)


async def test_a_repository_without_a_champion_serves_its_newest_version(
    fed: FederationHarness, flower: OneClientFlowerServer
) -> None:
    await publish_first_version(flower, code_version="x")
    async with fed.run_agent(make_server(fed, flower)):
        await fed.wait_for_event("server", "model_ready")
        assert (await read_champion(flower)).version == 1
