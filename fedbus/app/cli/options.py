"""How options are written: lengths of time, configurations as Flower writes them, and what stands in a task's place."""

import json
import re
import tomllib
from typing import Final

from pydantic import ValidationError

from fedbus.app.failures import CliError, ExitCode
from fedbus.contracts.scheduling import ScheduleOverrides, ScheduleTable

UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
PARTITION: Final = "partition-id"
PARTITIONS: Final = "num-partitions"
"""How Flower's apps are told which part of the data is theirs, and of how many."""
Scalar = bool | int | float | str


def parse_duration(text: str) -> float:
    """``90s``, ``10m``, ``2h`` or ``1d`` in seconds; raises Failure."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|m|h|d)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise CliError(f"{text!r} is not a length of time: write 90s, 10m, 2h or 1d", ExitCode.USAGE)
    return float(found[1]) * UNITS[found[2]]


def parse_key_values(text: str) -> dict[str, Scalar]:
    """A configuration: ``lr=0.1 data='/my data'`` as Flower's ``--run-config`` has it, or a JSON object.

    Raises Failure.
    """
    try:
        return _check_scalars(json.loads(text) if text.lstrip().startswith("{") else _parse_assignments(text))
    except ValueError as error:
        raise CliError(
            f"{text!r} is not a configuration: write key=value, separated by spaces; text in quotes ({error})",
            ExitCode.USAGE,
        ) from None


def apply_schedule_options(own: ScheduleTable, every: str | None, at_most: int | None) -> ScheduleTable:
    """A task's *own* schedule with what the options say in the place of just these keys. Raises Failure."""
    try:
        return schedule_overrides(every, at_most).over(own)
    except ValidationError as error:
        why = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise CliError(f"these options do not go with the task's schedule: {why}", ExitCode.USAGE) from None


def schedule_overrides(every: str | None, at_most: int | None) -> ScheduleOverrides:
    """What the options put in the place of a task's schedule. Raises Failure."""
    return ScheduleOverrides(None if every is None else parse_duration(every), at_most)


def parse_node_config(text: str) -> dict[str, Scalar]:
    """A device's configuration; raises Failure, also where its part of the data is none of those there are."""
    found = parse_key_values(text)
    part, parts = found.get(PARTITION), found.get(PARTITIONS)
    if isinstance(part, int) and isinstance(parts, int) and not 0 <= part < parts:
        raise CliError(
            f"{PARTITION}={part} is none of {PARTITIONS}={parts}: they count from 0, so set {PARTITIONS} to how many "
            "clients there are; on Kubernetes by the overlay's `replicas`, and not by `kubectl scale`",
            ExitCode.USAGE,
        )
    return found


def check_unique_tasks(tasks: list[str]) -> None:
    """Check that no task id occurs twice."""
    if len(set(tasks)) < len(tasks):
        raise CliError(f"each task can be given once: {', '.join(tasks)}", ExitCode.USAGE)


def _parse_assignments(text: str) -> dict[str, object]:
    """Values are TOML; a bare word is taken as text."""
    found: dict[str, object] = {}
    rest = text.strip()
    while rest:
        match = re.match(r"""([A-Za-z0-9_.-]+)\s*=\s*("[^"]*"|'[^']*'|\S+)\s*""", rest)
        if match is None:
            raise ValueError(f"at {rest!r}")
        found[match[1]] = _parse_value(match[2])
        rest = rest[match.end() :]
    return found


def _parse_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_scalars(found: object) -> dict[str, Scalar]:
    if not isinstance(found, dict):
        raise ValueError("not a table of values")  # noqa: TRY004 (a wrong text, not a wrong type of ours)
    for key, value in found.items():
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{key} is neither a number, a text nor true or false")  # noqa: TRY004
    return found
