"""Whether this device may take part, by its task's rule: reads what the rule asks for, and says why not.

Only what the rule speaks of is read, in a thread. The figures stay on the device but for those,
which go with the reason.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import psutil

from fedbus.agents.common.device_sensors import read_device
from fedbus.contracts.expressions.eligibility_rule import Predicate, parse_rule
from fedbus.contracts.expressions.parser import leaves
from fedbus.contracts.task.task import TaskTable
from fedbus.domain.eligibility import IDLE_BELOW, clock_inputs, unmet_reason
from fedbus.stores.captured.reader import RowCounts, read_row_counts
from fedbus.stores.errors import StoreError

CPU_SAMPLE_S: Final = 0.2
"""How long the processors are watched to say how busy they are."""
CAPTURED_DATABASE: Final = "captured.db"

DeviceFacts = dict[str, float | None]


@dataclass(frozen=True)
class Ineligible:
    """The rule does not hold: the part that fails, in words, and the figures it was tried with."""

    reason: str
    facts: dict[str, float]

    @property
    def shape(self) -> str:
        """What fails, without its figures: who is as ineligible as before need not say so again."""
        return re.sub(r"\d+(?:\.\d+)?", "#", self.reason)


async def check_eligibility(table: TaskTable, directory: Path, model_file: Path | None) -> Ineligible | None:
    """Why this device may not take part now, or None. *directory*: where it keeps what is its own in the task."""
    if table.eligibility.rule is None:
        return None
    read = parse_rule(table.eligibility.rule)
    asked: list[Predicate] = leaves(read)
    words = {leaf.name for leaf in asked}
    facts = await asyncio.to_thread(
        read_device_facts, words, directory, model_file, holdout_share=table.capture.holdout_share
    )
    if (reason := unmet_reason(read, facts)) is None:
        return None
    return Ineligible(reason, {name: value for name, value in facts.items() if value is not None})


def read_device_facts(
    words: set[str], directory: Path, model_file: Path | None, *, holdout_share: float = 0.0
) -> DeviceFacts:
    """What is so on this device, of all that *words* name; None where it has no such thing. Blocking."""
    found: DeviceFacts = {}
    for of_group, read in _GROUPS.items():
        if words & of_group:
            found |= read(_FactSource(directory, model_file, holdout_share))
    return {word: found[word] for word in sorted(words)}


@dataclass(frozen=True)
class _FactSource:
    directory: Path
    model_file: Path | None
    holdout_share: float


def _read_rows(place: _FactSource) -> DeviceFacts:
    database, found = place.directory / CAPTURED_DATABASE, RowCounts(0, 0, 0)
    with suppress(StoreError):  # it is not there, or just being made
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
    return dict(clock_inputs(datetime.now().astimezone()))


def _read_model_age(place: _FactSource) -> DeviceFacts:
    """A model came when its file was written: that outlives a restart."""
    if place.model_file is None or not place.model_file.exists():
        return {"model_age": None}
    return {"model_age": max(0.0, time.time() - place.model_file.stat().st_mtime)}


_GROUPS: Final[Mapping[frozenset[str], Callable[[_FactSource], DeviceFacts]]] = {
    frozenset({"labelled", "unlabelled"}): _read_rows,
    frozenset({"cpu", "idle"}): _read_cpu,
    frozenset({"memory", "disk", "temperature", "gpu"}): _read_sensors,
    frozenset({"battery", "charging"}): _read_battery,
    frozenset({"hour", "weekday"}): _read_clock,
    frozenset({"model_age"}): _read_model_age,
}
"""What is read together. Every word of a rule is in one of these."""
