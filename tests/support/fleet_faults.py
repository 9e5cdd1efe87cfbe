"""Faults of a simulated fleet: planned from a seed, injected at their times, and ended after their durations."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from fedbus.common import clock
from fedbus.simulation.fleet.agents import SupervisedAgent
from fedbus.simulation.fleet.bus import FleetBus
from fedbus.simulation.fleet.fleet import SimulatedFleet

MAX_FAULT_S: Final = 60.0
LATE_S: Final = 3.0
"""A late message is late by no more than this."""
LOST_SHARE: Final = 0.3
"""The share of acknowledgements that get lost."""
SLOWDOWN: Final = 8.0


class FaultKind(StrEnum):
    """What happens. Those of the server side concern all clients."""

    DEVICE_LOST = "device_lost"
    """All agents of a device end at once; it starts again after the fault."""
    AGENT_CRASH = "agent_crash"
    """One agent of a device is killed, and started again after the fault."""
    DISCONNECTED = "disconnected"
    """A device has no network."""
    LATE_MESSAGES = "late_messages"
    """Messages to a device arrive up to `LATE_S` late, in their order."""
    LOST_ACKNOWLEDGEMENTS = "lost_acknowledgements"
    """Some answers of JetStream to a device get lost."""
    SLOW = "slow"
    """Trainings of a device take `SLOWDOWN` times as long."""
    TRAINER_CRASH = "trainer_crash"
    """The trainer of a device is killed."""
    TRAINING_FAILS = "training_fails"
    """The trainings of a device raise an error."""
    CODE_NOT_LOADED = "code_not_loaded"
    """The trainer of a device cannot load the task's code."""
    MODEL_REFUSED = "model_refused"
    """The inference agent of a device refuses new models."""
    INFERENCE_MUTE = "inference_mute"
    """The inference agent of a device does not answer."""
    DOWNLOAD_FAILS = "download_fails"
    """A device cannot download models."""
    SERVER_MANAGER_RESTART = "server_manager_restart"
    SCHEDULER_RESTART = "scheduler_restart"
    SCHEDULER_DISCONNECTED = "scheduler_disconnected"
    """One workflow scheduler has no network; another one leads meanwhile."""
    FLOWER_SERVER_RESTART = "flower_server_restart"
    SESSION_LOST = "session_lost"
    """The process of the run's server session is killed."""
    APP_NOT_LOADED = "app_not_loaded"
    """Server sessions cannot load the app."""
    NATS_RESTART = "nats_restart"
    """All connections are lost, and return after the fault."""


SERVER_SIDE: Final = frozenset(
    {
        FaultKind.SERVER_MANAGER_RESTART,
        FaultKind.SCHEDULER_RESTART,
        FaultKind.SCHEDULER_DISCONNECTED,
        FaultKind.FLOWER_SERVER_RESTART,
        FaultKind.SESSION_LOST,
        FaultKind.APP_NOT_LOADED,
        FaultKind.NATS_RESTART,
    }
)


@dataclass(frozen=True)
class Fault:
    """One fault, in virtual seconds since the start."""

    kind: FaultKind
    at_s: float
    lasts_s: float
    client: str = ""
    """The client that it concerns; empty if it is one of the server side."""

    def __str__(self) -> str:
        where = f" of {self.client}" if self.client else ""
        return f"{self.at_s:6.1f} s: {self.kind}{where} for {self.lasts_s:.1f} s"


def plan_faults(
    seed: int, clients: list[str], *, count: int, first_s: float, last_s: float, server_share: float = 0.25
) -> list[Fault]:
    """Choose *count* faults at random times between *first_s* and *last_s*, in the order of their times."""
    choice = random.Random(f"faults {seed}")
    of_devices = sorted(set(FaultKind) - SERVER_SIDE)
    faults = []
    for _ in range(count):
        is_server_side = choice.random() < server_share
        kind = choice.choice(sorted(SERVER_SIDE) if is_server_side else of_devices)
        at_s = choice.uniform(first_s, last_s)
        lasts_s = choice.uniform(0.1, 20.0 if is_server_side else MAX_FAULT_S)
        faults.append(Fault(kind, at_s, lasts_s, "" if is_server_side else choice.choice(clients)))
    return sorted(faults, key=lambda fault: fault.at_s)


class FaultInjector:
    """Injects *faults* into *fleet*."""

    def __init__(self, fleet: SimulatedFleet, faults: Iterable[Fault]) -> None:
        self._fleet = fleet
        self._faults = list(faults)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to inject the faults at their times."""
        loop = asyncio.get_running_loop()
        for fault in self._faults:
            loop.call_at(fault.at_s, self._spawn, self._inject(fault))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _inject(self, fault: Fault) -> None:
        end = await self._begin(fault)
        await asyncio.sleep(fault.lasts_s)
        if end is not None:
            end()

    async def _begin(self, fault: Fault) -> Callable[[], None] | None:
        """Begin *fault*, and return what ends it."""
        fleet = self._fleet
        match fault.kind:
            case FaultKind.SERVER_MANAGER_RESTART:
                return await _kill(fleet.server_manager)
            case FaultKind.SCHEDULER_RESTART:
                return await _kill(_choose(fleet.schedulers, fault))
            case FaultKind.SCHEDULER_DISCONNECTED:
                scheduler = _choose(fleet.schedulers, fault)
                scheduler.set_linked(is_linked=False)
                return lambda: scheduler.set_linked(is_linked=True)
            case FaultKind.FLOWER_SERVER_RESTART:
                return await _kill(fleet.flower_server)
            case FaultKind.SESSION_LOST:
                fleet.launcher.crash("was killed")
                return None
            case FaultKind.APP_NOT_LOADED:
                return _set(fleet.launcher.faults, "load_error", "ImportError: a fault of the simulation")
            case FaultKind.NATS_RESTART:
                fleet.server.stop()
                return fleet.server.start
            case _:
                return await self._begin_on_device(fault)

    async def _begin_on_device(self, fault: Fault) -> Callable[[], None] | None:  # noqa: PLR0911, PLR0912 - one a kind
        device = self._fleet.devices[fault.client]
        match fault.kind:
            case FaultKind.DEVICE_LOST:
                await device.crash()
                return device.start
            case FaultKind.AGENT_CRASH:
                return await _kill(_choose(device.agents, fault))
            case FaultKind.DISCONNECTED:
                device.set_linked(is_linked=False)
                return lambda: device.set_linked(is_linked=True)
            case FaultKind.LATE_MESSAGES:
                return _set_on(_buses_of(device.agents), "delay", lambda: clock.uniform(0.0, LATE_S))
            case FaultKind.LOST_ACKNOWLEDGEMENTS:
                return _set_on(
                    _buses_of(device.agents), "loses_answer", lambda: clock.uniform(0.0, 1.0) < LOST_SHARE
                )
            case FaultKind.SLOW:
                return _set(device.trainer.faults, "slowdown", SLOWDOWN)
            case FaultKind.TRAINER_CRASH:
                device.trainer.crash("was killed")
                return None
            case FaultKind.TRAINING_FAILS:
                return _set(device.trainer.faults, "training_error", "ValueError: a fault of the simulation")
            case FaultKind.CODE_NOT_LOADED:
                return _set(device.trainer.faults, "load_error", "ImportError: a fault of the simulation")
            case FaultKind.MODEL_REFUSED:
                return _set(device.faults, "refusal", "a fault of the simulation")
            case FaultKind.INFERENCE_MUTE:
                return _set(device.faults, "is_mute", True)
            case FaultKind.DOWNLOAD_FAILS:
                return _set(device.faults, "download_error", "a fault of the simulation")
            case _:
                raise AssertionError(fault.kind)


def _choose(agents: Sequence[SupervisedAgent], fault: Fault) -> SupervisedAgent:
    return agents[int(fault.at_s * 1000) % len(agents)]


async def _kill(agent: SupervisedAgent) -> Callable[[], None]:
    await agent.crash()
    return agent.start


def _set(target: object, name: str, value: object) -> Callable[[], None]:
    """Set an attribute, and return what sets its default again: two faults of one kind may overlap."""
    setattr(target, name, value)
    return lambda: setattr(target, name, getattr(type(target), name))


def _buses_of(agents: Iterable[SupervisedAgent]) -> list[FleetBus]:
    return [bus for agent in agents for bus in agent.buses]


def _set_on(buses: list[FleetBus], name: str, value: object) -> Callable[[], None]:
    for bus in buses:
        setattr(bus.connection, name, value)

    def restore() -> None:
        for bus in buses:
            setattr(bus.connection, name, None)

    return restore
