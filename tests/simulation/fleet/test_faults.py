"""Fleets with random faults: every lifecycle invariant holds, and the fleet recovers.

`make faults` runs 1,000 seeds. ``FLEET_SEED=7`` runs one seed, ``FLEET_SEEDS=50`` the first 50.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.fleet_fault_run import END_OF_FAULTS_S, run_with_faults
from support.fleet_faults import SERVER_SIDE, Fault, FaultKind, plan_faults

from fedbus.contracts.task.task import Task

TESTS = Path(__file__).parents[2]
TINY_TASK = TESTS / "support" / "tiny_task"
SEEDS_AT_ONCE = 5
"""Seeds of one test, so that several workers share them."""
SEEDS = int(os.environ.get("FLEET_SEEDS", "20"))
DIGEST_OF_A_SEED = """
import sys
from pathlib import Path
from fedbus.learning.installed_libraries import open_library
from support.fleet_fault_run import run_with_faults
from fedbus.stores.tasks.task_directory import read_task

task = read_task(Path(sys.argv[1]), open_library, version="1" * 40)
print(run_with_faults(task, 13, clients=8).log_sha256)
"""
CHOSEN = os.environ.get("FLEET_SEED")
STARTS = [int(CHOSEN)] if CHOSEN else range(0, SEEDS, SEEDS_AT_ONCE)


@pytest.mark.fault
@pytest.mark.timeout(1200)  # each seed takes about 2 s of CPU time
@pytest.mark.parametrize("first", STARTS)
def test_every_invariant_holds_under_random_faults(task: Task, first: int) -> None:
    seeds = [first] if CHOSEN else range(first, min(SEEDS, first + SEEDS_AT_ONCE))
    results = [run_with_faults(task, seed) for seed in seeds]
    assert not any(one.violations for one in results), "\n\n".join(
        one.describe() for one in results if one.violations
    )


@pytest.mark.parametrize("seed", [11])
def test_a_small_fleet_survives_its_faults(task: Task, seed: int) -> None:
    result = run_with_faults(task, seed, clients=5)
    assert not result.violations, result.describe()


FAST_KINDS = {FaultKind.SCHEDULER_DISCONNECTED}
"""Those that have found a fault which random seeds did not find: they run with `make test`."""
KINDS = [pytest.param(kind, marks=[] if kind in FAST_KINDS else [pytest.mark.fault]) for kind in FaultKind]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_is_survived_at_each_moment_of_a_run(task: Task, kind: FaultKind) -> None:
    faults = [
        Fault(
            kind, 6.0 + 8.1 * number, 2.0 + number, "" if kind in SERVER_SIDE else f"client-000{number % 4}"
        )
        for number in range(20)
    ]
    result = run_with_faults(task, 0, clients=4, faults=faults)
    assert not result.violations, result.describe()


@pytest.mark.fault
def test_a_seed_with_faults_reproduces_its_log(task: Task) -> None:
    first, second = (run_with_faults(task, 5, clients=3) for _ in range(2))
    assert first.log_sha256 == second.log_sha256


@pytest.mark.fault
def test_a_log_does_not_depend_on_the_order_of_sets() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", DIGEST_OF_A_SEED, str(TINY_TASK)],
            cwd=TESTS,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


def test_planned_faults_are_those_of_the_seed_and_end_in_time() -> None:
    clients = ["client-0000", "client-0001"]
    plans = [plan_faults(seed, clients, count=30, first_s=5, last_s=180) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert all(fault.at_s + fault.lasts_s <= END_OF_FAULTS_S for fault in plans[0])
    assert {fault.client for fault in plans[0]} == {"", *clients}
