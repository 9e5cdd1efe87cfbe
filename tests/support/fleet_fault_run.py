"""One fleet with random faults from a seed: inject, let it settle, check every invariant."""

import asyncio
from dataclasses import dataclass
from typing import Final

from fedbus.contracts.task.task import Task
from fedbus.simulation.fleet.fleet import SimulatedFleet, open_runner
from fedbus.simulation.fleet.settings import FleetSettings
from fedbus.simulation.fleet.transition_log import TransitionLog
from support.fleet_faults import MAX_FAULT_S, Fault, FaultInjector, plan_faults
from support.fleet_invariants import InvariantChecker

CLIENTS: Final = 20
FAULTS: Final = 12
FIRST_FAULT_S: Final = 5.0
LAST_FAULT_S: Final = 180.0
END_OF_FAULTS_S: Final = LAST_FAULT_S + MAX_FAULT_S
SETTLE_S: Final = 250.0
"""Longer than every wait, with restarts: bootstrap twice 60 s, apply 120 s, the limit of a run 160 s."""
REST_S: Final = 100.0
"""The time for one more run."""
BOOTSTRAP_S: Final = 60.0


@dataclass(frozen=True)
class FaultRun:
    """The result of one seed."""

    seed: int
    faults: list[Fault]
    violations: list[str]
    runs: dict[str, str]
    transitions: int
    log_sha256: str

    def describe(self) -> str:
        """Describe the violations, the faults, and how to run this seed again."""
        return "\n".join(
            [
                f"seed {self.seed}: {len(self.violations)} violations",
                *(f"  {one}" for one in self.violations),
                "the faults:",
                *(f"  {one}" for one in self.faults),
                f"run it again: FLEET_SEED={self.seed} pytest -m fault tests/simulation/fleet/test_faults.py",
            ]
        )


def run_with_faults(
    task: Task, seed: int, *, clients: int = CLIENTS, faults: list[Fault] | None = None
) -> FaultRun:
    """Simulate a fleet of *task* with random faults, or with *faults*, and check the invariants."""
    settings = FleetSettings(
        task=task,
        clients=clients,
        seed=seed,
        duration_s=END_OF_FAULTS_S + SETTLE_S + REST_S,
        rounds=2,
        quorum=max(1, clients * 2 // 5),
        recruit_s=20.0,
        round_s=20.0,
        every_s=45.0,
        start_within_s=10.0,
        train_s=4.0,
        load_s=1.0,
        bootstrap_s=BOOTSTRAP_S,
        schedulers=2,
    )
    planned = (
        plan_faults(seed, settings.client_names, count=FAULTS, first_s=FIRST_FAULT_S, last_s=LAST_FAULT_S)
        if faults is None
        else faults
    )
    with open_runner(settings) as runner:
        return runner.run(_run(settings, planned))


async def _run(settings: FleetSettings, faults: list[Fault]) -> FaultRun:
    checker, log = InvariantChecker(faults), TransitionLog()
    async with SimulatedFleet.open(settings, [checker.on_stored, log.on_stored]) as fleet:
        fleet.start()
        FaultInjector(fleet, faults).start()
        await asyncio.sleep(settings.duration_s)
        start_s = settings.starts_at.timestamp()
        checker.check_end(
            now_s=start_s + settings.duration_s,
            settled_since_s=start_s + END_OF_FAULTS_S,
            agents=fleet.agents,
        )
    return FaultRun(
        settings.seed,
        faults,
        checker.violations,
        checker.runs,
        sum(log.transitions.values()),
        log.sha256,
    )
