"""The MNIST example over Flower's own SuperLink and SuperNodes: the library `flower-superlink`."""

import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from support import NatsServer
from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.federation import FederationHarness, open_federation
from support.waiting import eventually

from fedbus.contracts.run import RunState
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.tasks.task_directory import read_task

MNIST = Path(__file__).parents[2] / "examples" / "mnist"
SMALL_TRAINING = {"max-samples": 64, "local-epochs": 1, "data": ""}
PROGRAMS = ("fedbus.learning.flower_superlink.child", "flower-superexec", "flwr-clientapp")


@pytest.fixture
async def fed(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FederationHarness]:
    """A federation of the MNIST example with the digits of scikit-learn, which need no download."""
    monkeypatch.delenv("FEDBUS_DATA_DIR", raising=False)
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1")
    shutil.copytree(MNIST, tmp_path / "mnist", ignore=shutil.ignore_patterns("__pycache__"))
    pyproject = tmp_path / "mnist" / "pyproject.toml"
    text = pyproject.read_text(encoding="utf-8")
    pyproject.write_text(text.replace('task = "mnist"', 'task = "mnist"\nlibrary = "flower-superlink"'))
    async with open_federation(nats.url, tmp_path, task=read_task(tmp_path / "mnist", open_library)) as fed:
        fed.override_plan(rounds=2, quorum=2, recruit_s=60, round_s=60)
        fed.clear_schedule()
        yield fed


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_run_over_a_superlink_is_a_run_like_any_other(fed: FederationHarness) -> None:
    async with run_all_agents(fed, clients=2):
        run = await start_run(fed, config=SMALL_TRAINING)
        facts = await wait_for_run_end(fed, run, within_s=200)
        assert fed.last_transition("run", run).target == RunState.FINISHED, fed.last_transition(
            "run", run
        ).reason
        assert [result.round for result in facts.rounds] == [0, 1, 2]
        assert facts.rounds[-1].participants == {"c1": 64, "c2": 64}
        assert not facts.rounds[-1].failures
        assert facts.rounds[-1].accuracy is not None
        assert set(facts.rounds[-1].figures) == {"c1", "c2"}
        await eventually(lambda: not find_programs())


@pytest.mark.fault
@pytest.mark.timeout(400)
async def test_a_run_whose_superlink_is_killed_is_recovered(fed: FederationHarness) -> None:
    async with run_all_agents(fed, clients=2):
        run = await start_run(fed, config=SMALL_TRAINING)
        await fed.wait_for_state("run", "running", run, within_s=90)
        await eventually(lambda: bool(find_programs("flwr-clientapp")), within_s=90)
        for process in find_programs("superlink"):
            process.send_signal(signal.SIGKILL)
        await fed.wait_for_state("run", "recovering", run, within_s=90)
        facts = await wait_for_run_end(fed, run, within_s=200)
        assert fed.last_transition("run", run).target == RunState.FINISHED
        assert facts.rounds[-1].participants == {"c1": 64, "c2": 64}


def find_programs(*names: str) -> list[psutil.Process]:
    """Return the descendants of this process that are programs of Flower with one of *names* in their command."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if any(Path(part).name in (names or PROGRAMS) for part in command):
            found.append(process)
    return found
