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


async def test_failed_trainings_roll_all_clients_back(
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


async def test_a_worse_model_rolls_all_clients_back(
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
    assert info.model is not None
    assert info.model.version == 2


async def test_a_manual_promotion_during_a_trial_repeats_the_trial(
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
    assert "the champion is version 1 now" in (await fed.wait_for_event("server", "candidate_kept")).reason
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
    reply = await fed.bus.request(RevertCode(task=TASK, reason="users complain"), timeout_s=30)
    assert (reply.code_version, reply.stages) == (old, ("100%",))
    assert server.facts.candidate == old
    assert server.facts.rejected == {new: "users complain"}


async def test_a_second_revert_does_not_return_to_a_reverted_version(
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


async def test_a_revert_to_another_architecture_is_refused(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    peers.differences[old] = "weight is float32 (4, 3) there and float32 (5, 3) here"
    before, events = server.facts, fed.events_of("code")
    with pytest.raises(RequestRefused, match=r"nothing was changed: .* --new-lineage"):
        await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    assert (server.facts, fed.events_of("code")) == (before, events)


async def test_a_user_reverts_while_the_repository_is_unavailable(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    repository.path.rename(repository.path.with_name("elsewhere"))
    reply = await fed.bus.request(RevertCode(task=TASK), timeout_s=30)
    assert reply.code_version == server.facts.candidate == old


async def test_a_revert_during_a_run_takes_effect_at_its_end(
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
    reply = await fed.bus.request(RevertCode(task=TASK))
    assert reply.code_version == old
    await fed.wait_for_event("code", "rollout_reverted")


async def test_a_revert_without_a_target_is_refused_with_a_reason(
    fed: FederationHarness, server: RolloutServer
) -> None:
    with pytest.raises(RequestRefused, match="there is no version before"):
        await fed.bus.request(RevertCode(task=TASK))
    with pytest.raises(RequestRefused):
        await fed.bus.request(RollOutCode(task=TASK, code_version="feedface"), timeout_s=30)


# --- a manager that comes back ---------------------------------------------------------------------


async def test_a_restarted_manager_continues_a_rollout(
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


async def test_a_new_lineage_starts_with_the_code_that_makes_it(
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
    info = await fed.bus.request(GetServerInfo(task=TASK))
    assert info.model is not None
    assert info.model.version == 2
