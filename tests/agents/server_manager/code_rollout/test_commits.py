"""From a commit to every client, and which commits are rejected: a real repository and bus, simulated clients."""

import asyncio
import re
from pathlib import Path

import pytest
from support.fake_peers import PLAN, REVISED_FILES, FakePeers, RolloutServer, has_checkout
from support.federation import TASK, FederationHarness
from support.git_repositories import CommitSigner, Repository, make_signer

from fedbus.agents.server_manager import flower_server_client, training_run
from fedbus.bus.errors import RequestRefused
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.code import CodePublished, RollOutCode
from fedbus.contracts.flower_server import BeginTraining, RunFinished
from fedbus.contracts.server import OpenRun

# --- all clients at once ---------------------------------------------------------------------------


async def test_a_commit_is_rolled_out_tried_by_a_run_and_deployed(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await peers.create_clients("c1", "c2")
    new = repository.commit(REVISED_FILES, by=ada)
    await server.look_for_code()
    message = await fed.wait_for_message(CodePublished, times=2)
    assert (message.code_version, message.candidate, message.cohort.up_to) == (old, new, 1.0)

    await peers.send_code_ready("c1", new)
    await peers.send_code_ready("c2", new)
    await fed.wait_until(lambda: bool(peers.run_requests), "a run of the candidate to be asked for")
    assert peers.run_requests[0].trigger == "new code"
    await peers.complete_run(1, new, "c1", "c2")

    await fed.wait_for_event("code", "rollout_finished")
    assert fed.events_of("code") == ["started", "code_found", "stage_ready", "rollout_finished"]
    assert (server.facts.code_version, server.facts.previous, server.facts.candidate) == (new, (old,), "")
    await fed.wait_until(
        lambda: fed.messages_of(CodePublished)[-1].code_version == new, "all clients to get the version"
    )
    assert (peers.start_requests[0].code_version, fed.server_facts().code_version) == (new, new)


async def test_the_first_model_and_each_run_name_their_code_version(
    fed: FederationHarness, server: RolloutServer, peers: FakePeers, repository: Repository
) -> None:
    await peers.complete_run(1, repository.head, "c1", "c2")
    assert peers.build_requests[0].code_version == repository.head
    latest = await peers.store.read_latest()
    assert latest is not None
    assert latest.code_version == repository.head


async def test_old_code_is_removed_without_what_is_being_checked(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
    tmp_path: Path,
) -> None:
    await peers.create_clients("c1", "c2")
    second = repository.commit(REVISED_FILES, by=ada)
    await server.look_for_code()
    for client in ("c1", "c2"):
        await peers.send_code_ready(client, second)
    await fed.wait_until(lambda: bool(peers.run_requests))
    peers.check_gate = asyncio.Event()
    async with peers.training_run(1, second, "c1", "c2"):
        third = repository.commit({"tiny/__init__.py": "REVISION = 3\n"}, by=ada)
        looking = asyncio.ensure_future(server.look_for_code())
        await fed.wait_until(lambda: peers.check_requests[-1].code_version == third, "it to be checked")
    await fed.wait_for_event("code", "rollout_finished")
    for _ in range(3):
        await server.code.list_commits()  # behind whatever is at work there
    peers.check_gate.set()
    assert "is being rolled out to" in await looking
    assert has_checkout(tmp_path, third)


async def test_a_commit_during_a_run_waits_for_its_end(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    old = repository.head
    await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN))
    new = repository.commit(REVISED_FILES, by=ada)
    for _ in range(2):  # the second finds nothing new
        assert await server.look_for_code() == "the rollout starts when the current run has ended"
    for client in ("c1", "c2"):
        joined = ClientJoined(task=TASK, client=client, run=f"{TASK}-1", code_version=old)
        await fed.publish(joined, sender="trainer")
    await fed.wait_for_message(BeginTraining)
    assert fed.events_of("code") == ["started"]
    artifact = await peers.make_artifact()
    await fed.publish(
        RunFinished(task=TASK, run=f"{TASK}-1", rounds=1, artifact=artifact), sender="flower-server"
    )
    await fed.wait_for_event("code", "code_found")
    assert server.facts.candidate == new


# --- what is no version --------------------------------------------------------------------------


async def test_an_unsigned_commit_is_rejected_and_not_published(
    fed: FederationHarness, server: RolloutServer, repository: Repository
) -> None:
    unsigned = repository.commit(REVISED_FILES)
    assert "it is not signed" in await server.look_for_code()
    await fed.wait_for_event("code", "code_rejected")
    assert unsigned in server.facts.rejected
    assert all(message.candidate != unsigned for message in fed.messages_of(CodePublished))


async def test_a_stranger_s_commit_is_rejected(
    fed: FederationHarness, server: RolloutServer, repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "stranger").mkdir()
    forged = repository.commit({"tiny/__init__.py": "X = 1\n"}, by=make_signer("eve", tmp_path / "stranger"))
    await server.look_for_code()
    await fed.wait_for_event("code", "code_rejected")
    assert forged in server.facts.rejected


async def test_a_commit_whose_check_fails_is_rejected_once(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    broken = repository.commit(REVISED_FILES, by=ada)
    peers.check_errors[broken] = "module 'tiny.client_app' cannot be imported"
    await server.look_for_code()
    assert "cannot be imported" in (await fed.wait_for_event("code", "code_rejected")).reason
    assert (await server.look_for_code()).startswith("nothing new: it was rejected:")
    assert len(peers.check_requests) == 1


async def test_another_architecture_is_rejected_with_the_remedy(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    other = repository.commit(REVISED_FILES, by=ada)
    peers.differences[other] = "weight is float32 (4, 3) there and float32 (5, 3) here"
    await server.look_for_code()
    reason = (await fed.wait_for_event("code", "code_rejected")).reason
    assert "weight is float32 (4, 3)" in reason
    assert "--new-lineage" in reason


async def test_a_rewritten_history_needs_a_manual_rollout(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.create_clients("c1")
    old = repository.head
    repository.git("commit", "--quiet", "--amend", "-m", "another past", by=ada)
    assert "rewritten" in await server.look_for_code()
    assert server.facts.code_version == old
    await fed.bus.request(RollOutCode(task=TASK, code_version=repository.head), timeout_s=30)
    assert (await fed.wait_for_event("code", "code_found")).facts.candidate == repository.head  # type: ignore[union-attr]


# --- what passes ---------------------------------------------------------------------------------


async def test_a_commit_that_cannot_be_checked_now_is_retried(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    new = repository.commit(REVISED_FILES, by=ada)
    peers.blocked_reason = "cannot use s3://models: it does not answer"
    with pytest.raises(RequestRefused, match="cannot be checked: cannot use s3://models"):
        await server.look_for_code()
    transition = await fed.wait_for_event("code", "following_held_up")
    assert "does not answer" in transition.reason
    assert server.facts.held_up == transition.reason
    peers.blocked_reason = ""
    await server.look_for_code()
    await fed.wait_for_event("code", "following_resumed")
    assert (server.facts.held_up, server.facts.rejected, server.facts.candidate) == ("", {}, new)


class TimeIsUp:
    """Ends the time for the start of a Flower server after the first refusal."""

    async def pause(self) -> None:
        raise TimeoutError


@pytest.mark.parametrize(
    ("reason", "passes"),
    [
        ("cannot use s3://models: it does not answer", True),
        ("models/1.safetensors is corrupt: restore it from a copy", False),
    ],
    ids=["unavailable", "damaged"],
)
async def test_a_run_that_a_store_blocks_is_repeated(
    reason: str,
    passes: bool,
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flower_server_client, "RetryBackoff", TimeIsUp)
    monkeypatch.setattr(training_run, "BLOCKED_RETRY_S", 0.1)
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    peers.blocked_reason, peers.is_transient = reason, passes
    with pytest.raises(RequestRefused, match=re.escape(reason)):
        await fed.bus.request(OpenRun(task=TASK, run=f"{TASK}-1", plan=PLAN), timeout_s=30)
    peers.blocked_reason = ""
    await fed.wait_until(lambda: len(peers.run_requests) == 2, "another run to be asked for")
    assert (server.facts.candidate, server.facts.rejected) == (new, {})


async def test_an_unavailable_repository_is_published_once(
    fed: FederationHarness, server: RolloutServer, peers: FakePeers, repository: Repository
) -> None:
    moved = repository.path.rename(repository.path.with_name("moved"))
    for _ in range(3):
        with pytest.raises(RequestRefused, match="check that it exists"):
            await server.look_for_code()
    await fed.wait_for_event("code", "following_held_up")
    moved.rename(repository.path)
    await server.look_for_code()
    await fed.wait_for_event("code", "following_resumed")
    assert fed.events_of("code") == ["started", "following_held_up", "following_resumed"]


async def test_a_commit_whose_signer_becomes_allowed_is_checked_again(
    fed: FederationHarness, server: RolloutServer, peers: FakePeers, repository: Repository, tmp_path: Path
) -> None:
    bob = make_signer("bob", tmp_path)
    new = repository.commit(REVISED_FILES, by=bob)
    assert "not from an allowed signer" in await server.look_for_code()
    assert (await server.look_for_code()).startswith("nothing new: it was rejected")
    with (tmp_path / "allowed_signers").open("a") as allowed:
        allowed.write(bob.allowed_signers_line())
    assert "is being rolled out to" in await server.look_for_code()
    assert (server.facts.candidate, server.facts.rejected, server.facts.not_signed) == (new, {}, ())


async def test_a_restart_rejects_an_unsigned_commit_silently(
    fed: FederationHarness, server: RolloutServer, peers: FakePeers, repository: Repository, tmp_path: Path
) -> None:
    repository.commit(REVISED_FILES, by=make_signer("bob", tmp_path))
    await server.look_for_code()
    await fed.wait_for_event("code", "code_rejected")
    await server.agent.restart()
    await fed.wait_for_message(CodePublished, times=2)
    await server.look_for_code()
    assert fed.events_of("code") == ["started", "code_rejected"]


# --- while another commit is rolled out ----------------------------------------------------------


async def test_a_bad_commit_in_a_rollout_does_not_stop_the_rollout(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    repository.commit({"tiny/__init__.py": "REVISION = 3\n"})
    assert "it is not signed" in await server.look_for_code()
    assert (await fed.wait_for_event("code", "code_rejected")).target == "rolling"
    assert server.facts.candidate == new


async def test_a_newer_commit_in_a_rollout_becomes_the_candidate(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    newer = repository.commit({"tiny/__init__.py": "REVISION = 3\n"}, by=ada)
    await server.look_for_code()
    await fed.wait_until(lambda: server.facts.candidate == newer)
    found = await fed.wait_for_event("code", "code_found", times=2)
    assert (found.source, found.target) == ("rolling", "rolling")


async def test_an_unavailable_repository_does_not_end_a_rollout(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
) -> None:
    new = await peers.prepare_candidate(server, REVISED_FILES, repository, ada)
    repository.path.rename(repository.path.with_name("moved"))
    with pytest.raises(RequestRefused, match="check that it exists"):
        await server.look_for_code()
    assert (await fed.wait_for_event("code", "following_held_up")).target == "rolling"
    assert server.facts.candidate == new


async def test_a_restart_without_its_code_version_deploys_its_own(
    fed: FederationHarness,
    server: RolloutServer,
    peers: FakePeers,
    repository: Repository,
    ada: CommitSigner,
    tmp_path: Path,
) -> None:
    old = repository.head
    await peers.roll_out_candidate(server, REVISED_FILES, repository, ada)
    await server.agent.kill()
    (tmp_path / "allowed_signers").write_text(make_signer("bob", tmp_path).allowed_signers_line())
    server.agent.start()
    assert "not from an allowed signer" in (await fed.wait_for_event("code", "code_read")).reason
    assert server.facts.code_version == old
