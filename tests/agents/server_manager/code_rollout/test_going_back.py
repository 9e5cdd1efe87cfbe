"""Reverting code, by itself or by request, and managers that restart in between."""

import pytest
from support.fake_peers import REVISED_FILES, FakePeers, RolloutServer
from support.federation import TASK, FederationHarness
from support.git_repositories import CommitSigner, Repository

from fedbus.bus.errors import RequestRefused
from fedbus.contracts.champion import RollBackModel
from fedbus.contracts.code import CodePublished, RevertCode, RollOutCode
from fedbus.contracts.server import GetServerInfo

# --- back ----------------------------------------------------------------------------------------


async def test_failing_trainings_send_everybody_back_by_themselves(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    await peers.complete_run(1, new, "c1", "c2", failures=("c2",))
    back = await fed.wait_for_event("code", "rollout_reverted")
    assert "1 of 2 trainings failed" in back.reason
    assert (server.facts.code_version, server.facts.candidate) == (old, "")
    assert fed.messages_of(CodePublished)[-1].plan.code_version == old
    assert (await server.look_for_code()).startswith("nothing new: it was rejected")


async def test_a_model_that_is_worse_sends_everybody_back_and_is_not_served(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.complete_run(1, repository.head, "c1", "c2", loss=0.2)
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    await peers.complete_run(2, new, "c1", "c2", loss=2.0)
    assert "model not promoted" in (await fed.wait_for_event("code", "rollout_reverted")).reason
    assert fed.events_of("server")[-1] == "candidate_kept"
    info = await fed.bus.request(GetServerInfo(task=TASK))
    assert info.model.version == 2


async def test_a_promotion_by_hand_in_the_candidate_s_run_is_not_laid_at_its_code_s_door_and_it_is_tried_again(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.complete_run(1, repository.head, "c1", "c2", loss=0.2)
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    async with peers.training_run(2, new, "c1", "c2", loss=0.1):
        await fed.bus.request(RollBackModel(task=TASK))
    assert "version 1 has been served since" in (await fed.wait_for_event("server", "candidate_kept")).reason
    await fed.wait_until(lambda: len(peers.run_requests) == 2, "another run of the candidate to be asked for")
    await peers.complete_run(3, new, "c1", "c2", loss=0.1)
    await fed.wait_for_event("code", "rollout_finished")
    assert (server.facts.code_version, server.facts.rejected) == (new, {})


async def test_a_person_goes_back_to_the_version_before(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    begun = await fed.bus.request(RevertCode(task=TASK, reason="users complain"), timeout_s=30)
    assert (begun.code_version, begun.stages) == (old, ("100%",))
    assert server.facts.candidate == old
    assert server.facts.rejected == {new: "users complain"}


async def test_going_back_twice_does_not_lead_to_what_was_left(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    for client in ("c1", "c2"):
        await peers.send_code_ready(client, old)
    await fed.wait_until(lambda: len(peers.run_requests) == 2)
    await peers.complete_run(2, old, "c1", "c2")
    await fed.wait_for_event("code", "rollout_finished", times=2)
    with pytest.raises(
        RequestRefused, match=f"no version before {old[:12]} that was not reverted or rejected"
    ):
        await fed.bus.request(RevertCode(task=TASK), timeout_s=30)


async def test_going_back_to_another_architecture_changes_nothing_and_names_the_way(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    peers.differences[old] = "weight is float32 (4, 3) there and float32 (5, 3) here"
    before, told = server.facts, fed.events_of("code")
    with pytest.raises(RequestRefused, match=r"nothing was changed: .* --new-lineage"):
        await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    assert (server.facts, fed.events_of("code")) == (before, told)


async def test_a_person_goes_back_while_the_repository_is_away(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    repository.path.rename(repository.path.with_name("elsewhere"))
    begun = await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    assert begun.code_version == server.facts.candidate == old


async def test_who_goes_back_during_a_run_leaves_the_version_when_the_run_is_over(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    new = await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    async with peers.training_run(2, new, "c1", "c2"):
        await fed.bus.request(RevertCode(task=TASK, reason="users complain"), timeout_s=30)
        assert (server.facts.rejected, server.facts.candidate) == ({}, "")
    await fed.wait_for_event("code", "code_found", times=2)
    assert (server.facts.rejected, server.facts.candidate) == ({new: "users complain"}, old)


async def test_a_person_ends_a_rollout(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.create_clients("c1")
    repository.commit(REVISED_FILES, by=ada)
    await server.look_for_code()
    await fed.wait_for_event("code", "code_found")
    begun = await fed.bus.request(RevertCode(task=TASK))
    assert begun.code_version == old
    await fed.wait_for_event("code", "rollout_reverted")


async def test_what_is_not_there_is_refused_in_words(fed: FederationHarness, server: RolloutServer) -> None:
    with pytest.raises(RequestRefused, match="there is no version before"):
        await fed.bus.request(RevertCode(task=TASK))
    with pytest.raises(RequestRefused):
        await fed.bus.request(RollOutCode(task=TASK, code_version="feedface"), timeout_s=30)


# --- a manager that comes back ---------------------------------------------------------------------


async def test_a_manager_that_comes_back_in_a_rollout_goes_on_with_it(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1", "c2")
    new = repository.commit(REVISED_FILES, by=ada)
    await server.look_for_code()
    await fed.wait_for_event("code", "code_found")
    await peers.send_code_ready("c1", new)
    await server.agent.restart()
    await peers.send_code_ready("c2", new)
    await fed.wait_for_event("code", "stage_ready")
    await fed.wait_until(lambda: bool(peers.run_requests))
    await peers.complete_run(1, new, "c1", "c2")
    await fed.wait_for_event("code", "rollout_finished")


async def test_a_new_lineage_is_begun_with_the_code_that_makes_it(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1")
    new = repository.commit(REVISED_FILES, by=ada)
    peers.differences[new] = "weight is another"
    await server.look_for_code()
    await fed.wait_for_event("code", "code_rejected")
    peers.differences.clear()
    await fed.bus.request(RollOutCode(task=TASK, code_version=new, new_lineage=True), timeout_s=30)
    await peers.send_code_ready("c1", new)
    await fed.wait_for_event("server", "lineage_started")
    await fed.wait_for_event("code", "rollout_finished")
    latest = await peers.store.read_latest()
    assert latest is not None
    assert (latest.version, latest.parent, latest.lineage, latest.code_version) == (2, None, 2, new)
    assert (await fed.bus.request(GetServerInfo(task=TASK))).model.version == 2
