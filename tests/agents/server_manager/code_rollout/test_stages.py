"""Rollouts in stages: a real repository and bus, simulated clients."""

import pytest
from support.fake_peers import PLAN, REVISED_FILES, FakePeers, RolloutServer, rollout_table
from support.federation import TASK, TINY_TASK, FederationHarness
from support.git_repositories import CommitSigner, Repository

from fedbus.bus.errors import RequestRefused
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CodeData, CodePublished, RollOutCode
from fedbus.contracts.run import RunOverrides
from fedbus.contracts.server import BeginTraining, OpenRun


async def test_a_share_of_the_clients_comes_first_and_the_others_after_a_good_run(
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


async def test_a_run_of_the_candidate_is_as_its_own_task_says_and_what_was_asked_for_stands_over_that(
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
    asked = RunOverrides(quorum=2, config={"lr": 0.1})
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN, overrides=asked))
    (started,) = peers.start_requests
    assert (started.code_version, started.plan.rounds) == (new, 5)
    assert (started.plan.quorum, started.plan.config) == (2, {"lr": 0.1})
    assert fed.server_facts().plan == started.plan


async def test_a_client_with_the_old_code_does_not_join_the_candidate_s_run(
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


async def test_a_stage_that_nobody_is_in_is_refused_by_hand_with_the_labels_that_there_are(
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


async def test_a_stage_that_nobody_answers_in_is_told_once_and_goes_on_with_who_comes(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1", site="ward")
    new = repository.commit({"pyproject.toml": rollout_table("site=lab", "100%", wait_s=0.3)}, by=ada)
    await server.look_for_code()
    told = await fed.wait_for_event("code", "stage_unanswered")
    assert told.reason.startswith("stage site=lab: the stage has no client; the rollout keeps waiting")
    await peers.create_clients("c2", site="lab")
    await peers.send_code_ready("c2", new)
    await fed.wait_for_event("code", "stage_ready")
    assert fed.events_of("code").count("stage_unanswered") == 1


async def test_what_a_device_refused_in_an_earlier_rollout_counts_no_more_over_a_restart(
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
    told = await fed.wait_for_message(CodePublished, times=4)
    assert (told.candidate, told.attempt) == (new, 2)
    await server.agent.restart()
    await peers.send_code_ready("c1", new)
    await fed.wait_for_event("code", "stage_ready")
    assert fed.events_of("code").count("rollout_reverted") == 1
