"""`fedbus verify`, as a person or a script uses it: what a real federation left behind, and the same tampered with.

The federation ran once, with real agents, processes and git; each test has a copy of what it left, and a
nats-server of its own on the copied log.
"""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import NatsServer, eventually, nats_server
from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.cli import CliResult, FedbusCli
from support.federation import FED, TASK, open_federation
from support.followed_repository import follow_repository
from support.git_repositories import make_signer
from support.processes import child_processes
from support.terminal import open_terminal

from fedbus.bus.bus import Bus, Identity
from fedbus.bus.streams import events_stream
from fedbus.contracts import subjects
from fedbus.contracts.client import RoundReply
from fedbus.contracts.run import StopRun
from fedbus.learning import weights
from fedbus.stores.models.signing import ModelSigner, TrustedKeys, generate_key

RUN = f"{TASK}-2"
STOPPED = f"{TASK}-3"
ABOUT = [
    *("run", "manifest", "weights", "architecture", "signature", "began with", "made from", "configuration"),
    *("code", "clients", "updates"),
]


@dataclass
class FinishedFederation:
    """The streams, models and keys of a federation that has ended, and a command line."""

    directory: Path
    nats: NatsServer
    fedbus: FedbusCli

    @property
    def models(self) -> Path:
        return self.directory / "home" / "models" / TASK

    async def verify(self, *words: str, run: str = RUN) -> CliResult:
        return await self.fedbus("verify", run, *words)

    async def findings(self, run: str = RUN) -> tuple[int, dict[str, tuple[str, str]]]:
        """The exit code, and the outcome and message of each check."""
        result = await self.verify("--json", run=run)
        return result.code, {one["about"]: (one["fit"], one["says"]) for one in result.facts["findings"]}

    def manifest(self, version: int) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.models / "versions" / f"{version}.json").read_text())
        return facts

    def rewrite(self, version: int, **changes: object) -> None:
        path = self.models / "versions" / f"{version}.json"
        path.write_text(json.dumps(self.manifest(version) | changes))


@pytest.fixture(scope="module")
def recorded_federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two clients with signed code and models, and a third run that was stopped."""
    directory = tmp_path_factory.mktemp("recorded")
    asyncio.run(_run_federation(directory))
    return directory


async def _run_federation(directory: Path) -> None:
    (directory / "nats").mkdir()
    generate_key(directory / "fedbus.key")
    async with nats_server(directory / "nats") as nats, open_federation(nats.url, directory) as fed:
        await follow_repository(fed, make_signer("ada", directory), directory)
        trusted = TrustedKeys.load(directory / "fedbus.key.pub")
        fed.config = replace(fed.config, signer=ModelSigner.load(directory / "fedbus.key"), trusted=trusted)
        async with run_all_agents(fed):
            await wait_for_run_end(fed, await start_run(fed))
            await wait_for_run_end(fed, await start_run(fed, config={"pause-s": 0.01}))
            stopped = await start_run(fed, quorum=2, config={"pause-s": 30.0})
            await fed.wait_for_state("run", "running", stopped)
            await fed.bus.request(StopRun(task=TASK, run=stopped, reason="enough of it"))
            await wait_for_run_end(fed, stopped)
            await eventually(_is_idle)


def _is_idle() -> bool:
    return not child_processes("trainer") and not child_processes("server")


@pytest.fixture
async def finished_federation(recorded_federation: Path, tmp_path: Path) -> AsyncIterator[FinishedFederation]:
    directory = tmp_path / "finished"
    shutil.copytree(recorded_federation, directory, symlinks=True)
    async with nats_server(directory / "nats") as nats:
        fedbus = FedbusCli(
            tmp_path / "person",
            FEDBUS_NATS_URL=nats.url,
            FEDBUS_FEDERATION=FED,
            FEDBUS_STORE=str(directory / "home" / "models"),
            FEDBUS_TRUSTED_KEYS=str(directory / "fedbus.key.pub"),
            FEDBUS_ALLOWED_SIGNERS=str(directory / "allowed_signers"),
        )
        yield FinishedFederation(directory, nats, fedbus)


# --- all checks match ---------------------------------------------------------------------------


async def test_all_checks_of_an_unchanged_run_match(
    finished_federation: FinishedFederation,
) -> None:
    result = await finished_federation.verify("--json")
    assert result.code == 0, result.err
    facts = result.facts
    assert [(one["about"], one["fit"]) for one in facts["findings"]] == [(one, "fits") for one in ABOUT]
    assert (facts["sound"], facts["state"], facts["standing"]) == (True, "finished", "champion")
    assert facts["manifest"]["sha256"] == finished_federation.manifest(3)["sha256"]
    assert facts["made_from"] == [2, 1]
    assert facts["plan"]["config"] == {"pause-s": 0.01}
    assert facts["code_version"] == finished_federation.manifest(3)["code_version"]
    assert [one["participants"] for one in facts["rounds"]] == [{}, *[{"c1": 10, "c2": 20}] * 2]
    assert len(facts["trace_id"]) == 32


async def test_each_update_is_listed_with_its_digest(finished_federation: FinishedFederation) -> None:
    updates = (await finished_federation.verify("--json")).facts["updates"]
    assert sorted((one["round"], one["client"]) for one in updates) == [
        *((1, "c1"), (1, "c2")),
        *((2, "c1"), (2, "c2")),
    ]
    assert all(len(one["sha256"]) == 64 and one["size_bytes"] > 0 for one in updates)
    result = await finished_federation.verify()
    assert all(one["sha256"][:12] in result.out for one in updates)


async def test_progress_is_shown_on_a_terminal_only(
    finished_federation: FinishedFederation,
) -> None:
    async with open_terminal(
        "verify", RUN, environment=finished_federation.fedbus.environment, columns=120
    ) as shown:
        async with asyncio.timeout(60):
            await shown.process.wait()
        await eventually(lambda: "verifying tiny-2: code" in shown.raw)
    assert re.search(r"reading the messages of tiny-2 reply of c\d in round \d", shown.raw)
    assert (await finished_federation.verify()).err == ""


async def test_the_report_has_one_line_per_check(finished_federation: FinishedFederation) -> None:
    result = await finished_federation.verify()
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0].startswith(f"{RUN} finished ")
    assert lines[0].endswith("version 3, champion")
    assert [line.split("  ")[1].strip()[0] for line in lines[1 : 1 + len(ABOUT)]] == ["✓"] * len(ABOUT)
    assert "v2, v1, the first of lineage 1" in result.out
    assert "c1 (10), c2 (20)" in result.out


# --- mismatches ------------------------------------------------------------------------------


def other_bytes(finished_federation: FinishedFederation) -> None:
    (finished_federation.models / f"{finished_federation.manifest(3)['sha256']}.safetensors").write_bytes(
        b"other bytes"
    )


def no_bytes(finished_federation: FinishedFederation) -> None:
    (finished_federation.models / f"{finished_federation.manifest(3)['sha256']}.safetensors").unlink()


def other_beginning(finished_federation: FinishedFederation) -> None:
    (finished_federation.models / f"{finished_federation.manifest(2)['sha256']}.safetensors").write_bytes(
        b"other bytes"
    )


def better_metrics(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, metrics={"loss": 0.001})


def other_participants(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, participants={"c1": 10, "c9": 20})


def no_signature(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, seal=None)


def other_configuration(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, config={"pause-s": 5.0})


def other_code(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, code_version="f" * 40)


def other_model(finished_federation: FinishedFederation) -> None:
    """Replace weights and manifest together, so that only the log contradicts them."""
    made = weights.save({"weight": np.ones((2, 2), np.float32)}, finished_federation.directory / "made")
    (finished_federation.directory / "made").rename(finished_federation.models / f"{made.sha256}.safetensors")
    finished_federation.rewrite(3, **made.model_dump(include={"sha256", "size_bytes", "architecture"}))


def other_architecture(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, architecture="0" * 64)


def other_parent(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(3, parent=1)


def parent_gone(finished_federation: FinishedFederation) -> None:
    (finished_federation.models / "versions" / "1.json").unlink()


def parent_changed(finished_federation: FinishedFederation) -> None:
    finished_federation.rewrite(2, metrics={"loss": 0.001})


def parent_unreadable(finished_federation: FinishedFederation) -> None:
    (finished_federation.models / "versions" / "2.json").write_text("{")


def version_unreadable(finished_federation: FinishedFederation) -> None:
    (finished_federation.models / "versions" / "3.json").write_text("{")


def signer_gone(finished_federation: FinishedFederation) -> None:
    make_signer("mallory", finished_federation.directory)
    (finished_federation.directory / "allowed_signers").write_text(
        f"mallory@example.org {(finished_federation.directory / 'mallory.pub').read_text()}"
    )


@pytest.mark.parametrize(
    ("spoil", "about", "message"),
    [
        (other_bytes, "weights", "is corrupt: its bytes have digest"),
        (no_bytes, "weights", "holds no artifact"),
        (other_beginning, "began with", "v2; "),
        (other_beginning, "began with", "is corrupt: its bytes have digest"),
        (better_metrics, "manifest", "the manifest and the log differ in accuracy, loss"),
        (better_metrics, "signature", "was changed after it was signed"),
        (other_participants, "manifest", "names c1, c9 as clients of the last round, the log c1, c2"),
        (no_signature, "signature", "is not signed"),
        (other_configuration, "configuration", "pause-s is 0.01 in the run's plan and 5.0 in the manifest"),
        (other_code, "code", "the run was trained with"),
        (other_model, "manifest", "as the run's result, the manifest"),
        (other_architecture, "architecture", f"the manifest names {'0' * 64}"),
        (other_parent, "made from", "the run started from version 2, the manifest names 1"),
        (parent_gone, "made from", "version 1, the parent of version 2, does not exist"),
        (parent_changed, "made from", "the manifest of version 2 of tiny was changed after it was signed"),
        (parent_unreadable, "made from", "version 2, the parent of version 3, does not exist"),
        (version_unreadable, "manifest", "3.json is corrupt"),
        (signer_gone, "code", "its signature is not from an allowed signer"),
    ],
)
async def test_a_mismatch_is_named_and_the_exit_code_is_1(
    finished_federation: FinishedFederation,
    spoil: Callable[[FinishedFederation], None],
    about: str,
    message: str,
) -> None:
    spoil(finished_federation)
    code, found = await finished_federation.findings()
    assert code == 1
    assert found[about][0] == "does not fit"
    assert message in found[about][1]


async def test_a_mismatch_is_one_line_on_standard_error(
    finished_federation: FinishedFederation,
) -> None:
    other_bytes(finished_federation)
    result = await finished_federation.verify()
    assert result.code == 1
    assert result.err.startswith("fedbus: weights: ")
    assert result.err.count("\n") == 1
    assert "✗  weights" in result.out


async def test_a_client_without_a_stored_update_is_named(finished_federation: FinishedFederation) -> None:
    async with Bus.connect(finished_federation.nats.url, Identity(FED, "test")) as bus:
        stream, wanted = events_stream(FED), subjects.wildcard_for(FED, RoundReply, client="c1")
        async with bus.read_stream(stream, [wanted], whole=True) as replies:
            async for seen in replies:
                reply = seen.message
                if isinstance(reply, RoundReply) and (reply.run, reply.round) == (RUN, 2):
                    assert await bus._js.delete_msg(stream, seen.sequence)
                    break
    code, found = await finished_federation.findings()
    assert code == 1
    assert found["updates"] == ("does not fit", "the log has no update of c1 in round 2")


async def test_a_run_without_a_version_shows_how_it_ended(finished_federation: FinishedFederation) -> None:
    code, found = await finished_federation.findings(run=STOPPED)
    assert code == 1
    assert found["manifest"] == ("does not fit", "the run made no version, it is cancelled: enough of it")


async def test_an_unknown_run_is_one_line_and_code_5(
    finished_federation: FinishedFederation,
) -> None:
    result = await finished_federation.verify(run="tiny-99")
    assert (result.code, result.out) == (5, "")
    assert result.err == "fedbus: no run tiny-99 in federation test: see fedbus run ls\n"


# --- what cannot be checked -----------------------------------------------------------------------


async def test_without_keys_signatures_are_not_checked(
    finished_federation: FinishedFederation,
) -> None:
    del finished_federation.fedbus.environment["FEDBUS_TRUSTED_KEYS"]
    del finished_federation.fedbus.environment["FEDBUS_ALLOWED_SIGNERS"]
    code, found = await finished_federation.findings()
    assert code == 0
    assert found["signature"][0] == "not checked"
    assert "FEDBUS_TRUSTED_KEYS" in found["signature"][1]
    assert found["code"][0] == "not checked"
    assert "FEDBUS_ALLOWED_SIGNERS" in found["code"][1]


async def test_expired_updates_are_reported_as_not_checked(
    finished_federation: FinishedFederation,
) -> None:
    async with Bus.connect(finished_federation.nats.url, Identity(FED, "test")) as bus:
        await bus._js.purge_stream(events_stream(FED))
    code, found = await finished_federation.findings()
    assert code == 0
    assert found["updates"][0] == "not checked"
    assert "the log has 0; it starts at" in found["updates"][1]
    assert found["manifest"][0] == "fits"  # the lifecycle stream keeps its messages longer


async def test_an_unavailable_code_repository_is_not_checked(
    finished_federation: FinishedFederation,
) -> None:
    result = await finished_federation.verify(
        "--json", "--repo", f"git+file://{finished_federation.directory}/nowhere@main"
    )
    found = {one["about"]: one for one in result.facts["findings"]}
    assert result.code == 0
    assert found["code"]["fit"] == "not checked"
    assert "nowhere" in found["code"]["says"]


async def test_an_invalid_code_repository_is_a_usage_error(
    finished_federation: FinishedFederation,
) -> None:
    result = await finished_federation.verify("--repo", "gopher://somewhere")
    assert result.code == 2
    assert result.err.count("\n") == 1
