"""`fedbus simulate`: rounds, results, resume, interruption and published models, as a user calls it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import eventually
from support.cli import FedbusCli
from support.processes import descendants_of

from fedbus.agents.common.child_process import ChildProcess
from fedbus.app.failures import ExitCode
from fedbus.app.simulate.results_folder import SimulationRecord
from fedbus.stores.trackers.local import read_rounds

PYPROJECT = """
[project]
name = "tiny"

[tool.fedbus]
task = "tiny"
library = "functions"
functions = "tiny_sim.functions"
rounds = 3

[tool.fedbus.config]
pause-s = 0.0
raises = -1
"""

FUNCTIONS = """
import time

import numpy as np

def load(partition_id):
    return partition_id

def initial(config):
    return {"w": np.zeros(3, np.float32)}

def train(weights, data, config):
    if data == config["raises"]:
        raise ValueError("no data")
    time.sleep(config["pause-s"])
    weights["w"] += 1
    return weights, {"train_loss": 1.0 / config["server-round"]}, 10

def evaluate(weights, data, config):
    return {"eval_loss": 10.0 - float(weights["w"][0]), "eval_accuracy": 0.5}, 10
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    package = tmp_path / "task" / "tiny_sim"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "functions.py").write_text(FUNCTIONS)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    return str(package.parent)


@pytest.fixture
def fedbus(tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "home")


def results(tmp_path: Path, name: str = "tiny-sim-1") -> Path:
    return tmp_path / "home" / "simulations" / name


def read_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


async def test_rounds_and_a_summary_are_printed(fedbus: FedbusCli, task: str, tmp_path: Path) -> None:
    done = await fedbus("simulate", task, "--clients", "6", "--cohort", "2", "--set", "raises=-2")
    assert done.code == ExitCode.OK, done.err
    head, *rounds, end, trained, where, next_step = [
        line for line in done.out.splitlines() if "peak memory" not in line
    ]

    assert head.startswith("tiny-sim-1: 6 clients, cohort 2, 3 rounds, ")
    assert [line.split("  ")[1:4] for line in rounds] == [
        [f"round {number}", f"loss {10 - number:.4f}", "accuracy 50.00%"] for number in (1, 2, 3)
    ]
    assert end.startswith("tiny-sim-1 finished: 3 rounds in ")
    assert "6 client updates" in trained
    assert where.split() == ["results", str(results(tmp_path))]
    assert "fedbus trace tiny-sim-1" in next_step
    assert len(read_rounds(results(tmp_path), "tiny")) == 3


async def test_the_trace_of_a_simulation_is_drawn(fedbus: FedbusCli, task: str) -> None:
    await fedbus("simulate", task, "--clients", "120", "--rounds", "1", "--workers", "1")
    drawn = await fedbus("trace", "tiny-sim-1", "--width", "120")
    lines = drawn.out.splitlines()

    assert drawn.code == ExitCode.OK, drawn.err
    assert lines[0].startswith("tiny-sim-1 finished after ")
    assert any(line.strip().startswith("train: 120 clients") for line in lines)
    assert sum(line.strip().startswith("train  ") for line in lines) == 8
    assert lines[-1].startswith("round 1 took ")


@pytest.mark.slow
async def test_json_has_one_line_for_each_round_and_the_end(
    fedbus: FedbusCli, task: str, tmp_path: Path
) -> None:
    done = await fedbus("simulate", task, "--rounds", "2", "--json", "--out", str(tmp_path / "mine"))
    *rounds, end = read_lines(done.out)

    assert [(one["round"], one["loss"], one["clients"]) for one in rounds] == [(1, 9.0, 10), (2, 8.0, 10)]
    assert (end["simulation"], end["state"], end["rounds"]) == ("mine", "finished", 2)
    assert end["results"] == str(tmp_path / "mine")


@pytest.mark.slow
async def test_a_client_that_raises_is_named(fedbus: FedbusCli, task: str) -> None:
    done = await fedbus("simulate", task, "--clients", "3", "--rounds", "1", "--set", "raises=1")

    assert done.code == ExitCode.OK
    assert "2 clients  1 failed: client-0001: " in done.out
    assert "ValueError: no data" in done.out


@pytest.mark.slow
async def test_clients_that_all_raise_end_it_with_the_reason(fedbus: FedbusCli, task: str) -> None:
    failed = await fedbus("simulate", task, "--clients", "1", "--set", "raises=0")

    assert failed.code == ExitCode.FAILED
    assert failed.err.startswith("fedbus: no client could train in round 1: client-0000: ")
    assert len(failed.err.splitlines()) == 1


def let_all_clients_fail(task: str) -> None:
    Path(task, "tiny_sim", "functions.py").write_text(FUNCTIONS.replace('data == config["raises"]', "True"))


def add_to_pyproject(task: str, table: str) -> None:
    with Path(task, "pyproject.toml").open("a") as file:
        file.write(table)


@pytest.mark.slow
async def test_a_run_of_cohorts_without_an_update_fails(fedbus: FedbusCli, task: str, tmp_path: Path) -> None:
    let_all_clients_fail(task)
    options = ("--clients", "9", "--cohort", "2", "--rounds", "2")
    failed = await fedbus("simulate", task, *options)
    again = await fedbus("simulate", task, "--resume")
    more = await fedbus("simulate", task, "--resume", "--rounds", "3")

    assert [one.code for one in (failed, again, more)] == [ExitCode.FAILED] * 3
    assert "fedbus: no client could train in any round: client-000" in failed.err
    assert "ValueError: no data" in failed.err
    assert "failed too: client-000" in failed.err
    assert (
        SimulationRecord.model_validate_json((results(tmp_path) / "config.json").read_text()).state
        == "failed"
    )
    assert "tiny-sim-1 has failed and has no more rounds: no client could train" in again.err
    assert "fedbus: no client could train in any round: " in more.err


@pytest.mark.slow
async def test_the_folder_of_the_results_gives_the_name(fedbus: FedbusCli, task: str, tmp_path: Path) -> None:
    add_to_pyproject(task, '[tool.fedbus.aggregation]\nmode = "buffered"\n')
    out = str(tmp_path / "Out Dir_2")
    done = await fedbus("simulate", task, "--clients", "3", "--rounds", "1", "--out", out)
    unnamed = await fedbus("simulate", task, "--out", str(tmp_path / "___"))

    assert done.code == ExitCode.OK, done.err
    assert done.out.startswith("out-dir-2: 3 clients, 1 round, mode buffered, ")
    assert unnamed.code == ExitCode.USAGE
    assert "--out " in unnamed.err


@pytest.mark.slow
async def test_the_summary_of_a_profile_names_both_clocks(fedbus: FedbusCli, task: str) -> None:
    options = ("--clients", "3", "--rounds", "1", "--profile", "mobile")
    done = await fedbus("simulate", task, *options)

    assert done.code == ExitCode.OK, done.err
    assert " of real time" in done.out
    assert " client updates a second of virtual time" in done.out


@pytest.mark.slow
async def test_results_that_cannot_be_written_end_it_with_the_reason(
    fedbus: FedbusCli, task: str, tmp_path: Path
) -> None:
    """As on a full disk, and not as an error of the app."""
    out = tmp_path / "out"
    replace_folder_in_training(task, out / "checkpoints")
    failed = await fedbus("simulate", task, "--clients", "1", "--rounds", "1", "--out", str(out))

    assert failed.code == ExitCode.MACHINE
    assert failed.err.startswith(f"fedbus: cannot write the results in {out}: ")
    assert failed.err.endswith("--resume\n")
    assert SimulationRecord.model_validate_json((out / "config.json").read_text()).state == "failed"


def replace_folder_in_training(task: str, folder: Path) -> None:
    """Let the training of *task* replace *folder* by a file, so that no file in it can be written."""
    header = "def train(weights, data, config):\n"
    lines = (
        f'    import pathlib\n    pathlib.Path("{folder}").rmdir()\n    pathlib.Path("{folder}").touch()\n'
    )
    Path(task, "tiny_sim", "functions.py").write_text(FUNCTIONS.replace(header, header + lines))


@pytest.mark.slow
async def test_a_finished_simulation_continues_with_more_rounds(
    fedbus: FedbusCli, task: str, tmp_path: Path
) -> None:
    await fedbus("simulate", task, "--clients", "4", "--rounds", "1")
    more = await fedbus("simulate", task, "--resume", "--rounds", "3", "--json")
    other = await fedbus("simulate", task, "--resume", "--clients", "5")

    assert [one["round"] for one in read_lines(more.out)[:-1]] == [2, 3]
    assert read_lines(more.out)[-1]["rounds"] == 3
    assert read_lines(more.out)[-1]["loss"] == 7.0
    assert [one["round"] for one in read_rounds(results(tmp_path), "tiny")] == [1, 2, 3]
    assert other.code == ExitCode.USAGE
    assert "clients: 4, now 5" in other.err


@pytest.mark.slow
async def test_a_published_model_is_the_first_version(fedbus: FedbusCli, task: str, tmp_path: Path) -> None:
    store = str(tmp_path / "models")
    done = await fedbus("simulate", task, "--seed", "7", "--publish", "--store", store, "--json")
    shown = await fedbus("model", "show", "--store", store, "--json")
    child = await fedbus("simulate", task, "--from", "champion", "--publish", "--store", store, "--json")

    assert read_lines(done.out)[-1]["published"]["champion"] is True
    assert (shown.facts["version"], shown.facts["simulation"]["seed"]) == (1, 7)
    assert [one["loss"] for one in read_lines(child.out)[:-1]] == [6.0, 5.0, 4.0]
    assert read_lines(child.out)[-1]["published"]["version"] == 2


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--clients", "0"), ExitCode.USAGE, "Invalid value for '--clients': 0 is not in the range x>=1"),
        (("--clients", "2", "--cohort", "3"), ExitCode.USAGE, "the cohort has 3 clients (limit 2"),
        (("--partition", "dirichlet:x", "--data", "."), ExitCode.USAGE, "--partition: "),
        (("--data", "no"), ExitCode.NOT_FOUND, "/no (--data) does not exist"),
        (("--resume",), ExitCode.NOT_FOUND, "there is no simulation of tiny in "),
        (("--tracker", "nothing"), ExitCode.FAILED, "unknown tracker 'nothing'; installed: "),
        (("--profile", "no.yaml"), ExitCode.NOT_FOUND, "no.yaml"),
        (("--set", "lr"), ExitCode.USAGE, "'lr' is not an override. Use name=value"),
        (
            ("--set", "pause=1"),
            ExitCode.USAGE,
            "--set: the run configuration of the task has no key `pause`: did you",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
async def test_bad_options_are_one_line(
    fedbus: FedbusCli, task: str, tmp_path: Path, words: tuple[str, ...], code: ExitCode, text: str
) -> None:
    failed = await fedbus("simulate", task, *words)

    assert text in failed.err
    assert failed.code == code
    assert len(failed.err.splitlines()) == 1 or "Usage:" in failed.err
    assert not results(tmp_path).exists()


# --- interruption -----------------------------------------------------------------------------


@asynccontextmanager
async def simulating(task: str, home: Path, output: list[str], *words: str) -> AsyncIterator[ChildProcess]:
    """Run a simulation in a process, until its first round has ended."""
    command = (sys.executable, "-m", "fedbus.app.cli.main", "simulate", task, "--rounds", "1000", *words)
    async with ChildProcess(
        "simulate", *command, environment={"FEDBUS_HOME": str(home)}, output=output.append
    ) as process:
        await eventually(lambda: any("round 1 " in line for line in output), within_s=60)
        yield process


def has_no_process(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


async def end_of(process: ChildProcess) -> int:
    async with asyncio.timeout(20):
        return await process.wait()


@pytest.mark.slow
async def test_ctrl_c_ends_it_and_names_the_command_to_continue(
    fedbus: FedbusCli, task: str, tmp_path: Path
) -> None:
    output: list[str] = []
    async with simulating(task, tmp_path / "home", output, "--set", "pause-s=0.1") as process:
        started = descendants_of(process.pid)
        os.kill(process.pid, signal.SIGINT)
        code = await end_of(process)
    await eventually(lambda: has_no_process(started), within_s=10)
    again = await fedbus("simulate", task, "--resume", "--json", "--rounds", "1000", "--set", "pause-s=0.0")

    assert started
    assert code == ExitCode.INTERRUPTED
    assert output[-1].endswith(f"To continue: fedbus simulate {task} --out {results(tmp_path)} --resume")
    assert not any("Traceback" in line for line in output)
    assert again.code == ExitCode.USAGE
    assert 'overrides: {"pause-s": 0.1}, now {"pause-s": 0.0}' in again.err


@pytest.mark.slow
async def test_sigterm_ends_it_with_the_exit_code_of_a_shell(task: str, tmp_path: Path) -> None:
    output: list[str] = []
    async with simulating(task, tmp_path / "home", output, "--set", "pause-s=0.1") as process:
        os.kill(process.pid, signal.SIGTERM)
        code = await end_of(process)

    assert (code, ExitCode.TERMINATED.value) == (143, 143)
    assert "To continue: " in output[-1]


@pytest.mark.slow
async def test_a_second_ctrl_c_kills_it(task: str, tmp_path: Path) -> None:
    output: list[str] = []
    async with simulating(task, tmp_path / "home", output) as process:
        started = descendants_of(process.pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
        code = await end_of(process)
    await eventually(lambda: has_no_process(started), within_s=10)

    assert code in (128 + signal.SIGTERM, ExitCode.INTERRUPTED)


@pytest.mark.slow
async def test_a_killed_simulation_continues(fedbus: FedbusCli, task: str, tmp_path: Path) -> None:
    output: list[str] = []
    async with simulating(task, tmp_path / "home", output, "--set", "pause-s=0.05") as process:
        started = descendants_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        await end_of(process)
    await eventually(lambda: has_no_process(started), within_s=10)
    (record,) = [json.loads((results(tmp_path) / "config.json").read_text())]
    lines = (results(tmp_path) / "rounds.jsonl").read_text().splitlines()
    done = len(lines)
    config = {**record["config"], "rounds": done + 2}
    (results(tmp_path) / "config.json").write_text(json.dumps({**record, "config": config}))
    resumed = await fedbus("simulate", task, "--resume", "--json")

    assert record["state"] == "running"
    assert [one["round"] for one in read_lines(resumed.out)[:-1]] == [done + 1, done + 2]
    assert read_lines(resumed.out)[-1]["loss"] == 10.0 - (done + 2)


# --- the fleet under virtual time -------------------------------------------------------------


async def test_a_fleet_is_simulated_under_virtual_time(fedbus: FedbusCli, task: str, tmp_path: Path) -> None:
    options = ("--fleet", "--clients", "6", "--cohort", "3", "--duration", "5m", "--every", "2m")
    done = await fedbus("simulate", task, *options, "--out", str(tmp_path / "fleet"), "--json")
    transitions = (tmp_path / "fleet" / "transitions.jsonl").read_text().splitlines()

    assert done.code == ExitCode.OK, done.err
    assert (done.facts["clients"], done.facts["simulated_s"]) == (6, 300)
    assert {run["state"] for run in done.facts["runs"][:-1]} == {"finished"}
    assert len(transitions) == sum(done.facts["transitions"].values())
    assert json.loads((tmp_path / "fleet" / "summary.json").read_text()) == done.facts


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--fleet", "--publish"), "--fleet does not train, so it is not possible with --publish"),
        (("--fleet", "--engine", "ray"), "--fleet does not train, so it is not possible with --engine"),
        (("--duration", "1h"), "add --fleet for --duration"),
        (("--fleet", "--duration", "soon"), "'soon' is not a duration"),
        (("--fleet", "--clients", "2", "--cohort", "3"), "the cohort has 3 clients (limit 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
async def test_bad_options_of_a_fleet_are_one_line(
    fedbus: FedbusCli, task: str, words: tuple[str, ...], text: str
) -> None:
    failed = await fedbus("simulate", task, *words)

    assert (failed.code, len(failed.err.splitlines())) == (ExitCode.USAGE, 1)
    assert text in failed.err
