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
from fedbus.contracts.expressions.eligibility_rule import Leaf, rule
from fedbus.contracts.expressions.parser import leaves
from fedbus.contracts.task.task import TaskTable
from fedbus.domain.eligibility import IDLE_BELOW, clock_facts, why_not
from fedbus.stores.captured.reader import Shares, shares
from fedbus.stores.errors import StoreError

CPU_S: Final = 0.2
"""How long the processors are watched to say how busy they are."""
CAPTURED: Final = "captured.db"

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Ineligible:
    """The rule does not hold: the part that fails, in words, and the figures it was tried with."""

    reason: str
    facts: dict[str, float]

    @property
    def shape(self) -> str:
        """What fails, without its figures: who is as ineligible as before need not say so again."""
        return re.sub(r"\d+(?:\.\d+)?", "#", self.reason)


async def ineligible(table: TaskTable, directory: Path, model_file: Path | None) -> Ineligible | None:
    """Why this device may not take part now, or None. *directory*: where it keeps what is its own in the task."""
    if table.eligibility.rule is None:
        return None
    read = rule(table.eligibility.rule)
    asked: list[Leaf] = leaves(read)
    words = {leaf.name for leaf in asked}
    facts = await asyncio.to_thread(
        device_facts, words, directory, model_file, holdout_share=table.capture.holdout_share
    )
    if (reason := why_not(read, facts)) is None:
        return None
    return Ineligible(reason, {name: value for name, value in facts.items() if value is not None})


def device_facts(
    words: set[str], directory: Path, model_file: Path | None, *, holdout_share: float = 0.0
) -> Figures:
    """What is so on this device, of all that *words* name; None where it has no such thing. Blocking."""
    found: Figures = {}
    for of_group, read in _GROUPS.items():
        if words & of_group:
            found |= read(_Place(directory, model_file, holdout_share))
    return {word: found[word] for word in sorted(words)}


@dataclass(frozen=True)
class _Place:
    directory: Path
    model_file: Path | None
    holdout_share: float


def _rows(place: _Place) -> Figures:
    database, found = place.directory / CAPTURED, Shares(0, 0, 0)
    with suppress(StoreError):  # it is not there, or just being made
        found = shares(database, place.holdout_share)
    return {"labelled": found.labelled, "unlabelled": found.unlabelled}


def _processors(_: _Place) -> Figures:
    busy = psutil.cpu_percent(interval=CPU_S)
    return {"cpu": busy, "idle": float(busy < IDLE_BELOW)}


def _instruments(place: _Place) -> Figures:
    reading = read_device(place.directory)
    return {
        "memory": reading.memory * 100,
        "disk": reading.disk * 100,
        "temperature": reading.temperature_c,
        "gpu": float(bool(reading.gpus)),
    }


def _battery(_: _Place) -> Figures:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return {"battery": None, "charging": None}
    return {"battery": float(battery.percent), "charging": float(bool(battery.power_plugged))}


def _clock(_: _Place) -> Figures:
    return dict(clock_facts(datetime.now().astimezone()))


def _model(place: _Place) -> Figures:
    """A model came when its file was written: that outlives a restart."""
    if place.model_file is None or not place.model_file.exists():
        return {"model_age": None}
    return {"model_age": max(0.0, time.time() - place.model_file.stat().st_mtime)}


_GROUPS: Final[Mapping[frozenset[str], Callable[[_Place], Figures]]] = {
    frozenset({"labelled", "unlabelled"}): _rows,
    frozenset({"cpu", "idle"}): _processors,
    frozenset({"memory", "disk", "temperature", "gpu"}): _instruments,
    frozenset({"battery", "charging"}): _battery,
    frozenset({"hour", "weekday"}): _clock,
    frozenset({"model_age"}): _model,
}
"""What is read together. Every word of a rule is in one of these."""
