"""The facts of a device that an eligibility rule may use. Only the facts that the rule uses are read."""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import psutil

from fedbus.agents.common.device_sensors import read_device
from fedbus.common import clock
from fedbus.domain.eligibility import IDLE_BELOW, clock_inputs
from fedbus.stores.captured.reader import RowCounts, read_row_counts
from fedbus.stores.errors import StoreError

CPU_SAMPLE_S: Final = 0.2
"""Over how long the load of the processors is measured, in seconds."""
CAPTURED_DATABASE: Final = "captured.db"

DeviceFacts = dict[str, float | None]


class ReadFacts(Protocol):
    """Reads facts of a device, as `read_device_facts` does."""

    def __call__(
        self,
        names: AbstractSet[str],
        directory: Path,
        model_file: Path | None,
        /,
        *,
        holdout_share: float,
    ) -> DeviceFacts: ...


def read_device_facts(
    names: AbstractSet[str], directory: Path, model_file: Path | None, *, holdout_share: float = 0.0
) -> DeviceFacts:
    """Return the facts by their *names*; None for a fact that this device cannot measure. Blocking.

    Args:
        names: Variables of an eligibility rule.
        directory: The directory of the task on the device.
        model_file: The model that is served.
        holdout_share: The share of the captured rows that are held out of training.

    """
    found: DeviceFacts = {}
    for group, read in _GROUPS.items():
        if names & group:
            found |= read(_FactSource(directory, model_file, holdout_share))
    return {name: found[name] for name in sorted(names)}


@dataclass(frozen=True)
class _FactSource:
    directory: Path
    model_file: Path | None
    holdout_share: float


def _read_rows(place: _FactSource) -> DeviceFacts:
    database, found = place.directory / CAPTURED_DATABASE, RowCounts(0, 0, 0)
    with suppress(StoreError):  # the database does not exist yet, or is just being created
        found = read_row_counts(database, place.holdout_share)
    return {"labelled": found.labelled, "unlabelled": found.unlabelled}


def _read_cpu(_: _FactSource) -> DeviceFacts:
    busy = psutil.cpu_percent(interval=CPU_SAMPLE_S)
    return {"cpu": busy, "idle": float(busy < IDLE_BELOW)}


def _read_sensors(place: _FactSource) -> DeviceFacts:
    reading = read_device(place.directory)
    return {
        "memory": reading.memory * 100,
        "disk": reading.disk * 100,
        "temperature": reading.temperature_c,
        "gpu": float(bool(reading.gpus)),
    }


def _read_battery(_: _FactSource) -> DeviceFacts:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return {"battery": None, "charging": None}
    return {"battery": float(battery.percent), "charging": float(bool(battery.power_plugged))}


def _read_clock(_: _FactSource) -> DeviceFacts:
    return dict(clock_inputs(clock.now().astimezone()))


def _read_model_age(place: _FactSource) -> DeviceFacts:
    """Return the age of the model's file, which a restart does not change."""
    if place.model_file is None or not place.model_file.exists():
        return {"model_age": None}
    return {"model_age": max(0.0, clock.time_s() - place.model_file.stat().st_mtime)}


_GROUPS: Final[Mapping[frozenset[str], Callable[[_FactSource], DeviceFacts]]] = {
    frozenset({"labelled", "unlabelled"}): _read_rows,
    frozenset({"cpu", "idle"}): _read_cpu,
    frozenset({"memory", "disk", "temperature", "gpu"}): _read_sensors,
    frozenset({"battery", "charging"}): _read_battery,
    frozenset({"hour", "weekday"}): _read_clock,
    frozenset({"model_age"}): _read_model_age,
}
"""Which facts are read together. Every variable of a rule is in one group."""
