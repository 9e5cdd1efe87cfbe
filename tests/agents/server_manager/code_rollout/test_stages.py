"""Rollouts in stages: a real repository and bus, simulated clients."""

import pytest
from support.fake_peers import PLAN, REVISED_FILES, FakePeers, RolloutServer, rollout_table
from support.federation import TASK, TINY_TASK, FederationHarness
from support.git_repositories import CommitSigner, Repository

from fedbus.bus.errors import RequestRefused
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CodeData, CodePublished, RollOutCode
from fedbus.contracts.flower_server import BeginTraining
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.server import OpenRun


async def test_a_percentage_of_clients_is_first_and_the_rest_follow(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    fleet = [f"c{number}" for number in range(1, 6)]
    await peers.create_clients(*fleet)
    new = repository.commit({"pyproject.toml": rollout_table("40%", "100%")}, by=ada)
    await server.look_for_code()
    first = (await fed.wait_for_event("code", "code_found")).facts
    assert isinstance(first, CodeData)
    assert len(first.clients) == 2

    for client in first.clients:
        await peers.send_code_ready(client, new)
    await fed.wait_until(lambda: bool(peers.run_requests))
    await peers.complete_run(1, new, *first.clients)
    second = (await fed.wait_for_event("code", "stage_passed")).facts
    assert isinstance(second, CodeData)
    assert sorted(second.clients) == fleet

    for client in set(fleet) - set(first.clients):
        await peers.send_code_ready(client, new)
    await fed.wait_until(lambda: len(peers.run_requests) == 2)
    await peers.complete_run(2, new, *fleet)
    await fed.wait_for_event("code", "rollout_finished")


async def test_a_candidate_run_uses_its_own_task_and_the_overrides(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1", "c2")
    own = (TINY_TASK / "pyproject.toml").read_text().replace("\nrounds = 2", "\nrounds = 5")
    new = repository.commit({"pyproject.toml": own}, by=ada)
    await server.look_for_code()
    for client in ("c1", "c2"):
        await peers.send_code_ready(client, new)
    await fed.wait_until(lambda: bool(peers.run_requests))
    asked = RunOverrides(quorum=2, config={"pause-s": 0.1})
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN, overrides=asked))
    (started,) = peers.start_requests
    assert (started.code_version, started.plan.rounds) == (new, 5)
    assert (started.plan.quorum, started.plan.config) == (2, {"pause-s": 0.1})
    assert fed.server_facts().plan == started.plan


async def test_a_client_with_old_code_does_not_join_the_candidates_run(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN))
    for client, version in (("c1", old), ("c1", new), ("c2", new)):
        joined = ClientJoined(task=TASK, client=client, run=f"{TASK}-1", code_version=version)
        await fed.publish(joined, sender="trainer")
    assert (await fed.wait_for_message(BeginTraining)).cohort == ("c1", "c2")


async def test_labels_choose_a_stage_s_clients(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1", "c2", site="ward")
    await peers.create_clients("c3", site="lab")
    repository.commit({"pyproject.toml": rollout_table("site=lab", "100%")}, by=ada)
    await server.look_for_code()
    facts = (await fed.wait_for_event("code", "code_found")).facts
    assert isinstance(facts, CodeData)
    assert facts.clients == ("c3",)


async def test_a_stage_without_clients_is_refused_with_the_known_labels(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1", site="ward")
    new = repository.commit(REVISED_FILES, by=ada)
    request = RollOutCode(task=TASK, code_version=new, stages=("site=nowhere", "100%"))
    with pytest.raises(RequestRefused, match="no client has site=nowhere: existing labels are site=ward"):
        await fed.bus.request(request, timeout_s=30)


async def test_an_unanswered_stage_is_published_once_and_waits(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1", site="ward")
    new = repository.commit({"pyproject.toml": rollout_table("site=lab", "100%", wait_s=0.3)}, by=ada)
    await server.look_for_code()
    transition = await fed.wait_for_event("code", "stage_unanswered")
    assert transition.reason.startswith("stage site=lab: the stage has no client; the rollout keeps waiting")
    await peers.create_clients("c2", site="lab")
    await peers.send_code_ready("c2", new)
    await fed.wait_for_event("code", "stage_ready")
    assert fed.events_of("code").count("stage_unanswered") == 1


async def test_refusals_of_an_earlier_rollout_do_not_count(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1")
    new = repository.commit(REVISED_FILES, by=ada)
    await server.look_for_code()
    await fed.wait_for_event("code", "code_found")
    await peers.send_code_refused("c1", new, "it is not installed", attempt=1)
    await fed.wait_for_event("code", "rollout_reverted")
    await fed.bus.request(RollOutCode(task=TASK, code_version=new), timeout_s=30)
    message = await fed.wait_for_message(CodePublished, times=4)
    assert (message.candidate, message.attempt) == (new, 2)
    await server.agent.restart()
    await peers.send_code_ready("c1", new)
    await fed.wait_for_event("code", "stage_ready")
    assert fed.events_of("code").count("rollout_reverted") == 1
