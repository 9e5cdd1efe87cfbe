"""Parse options: durations, key=value configurations, and overrides of a task's schedule."""

import json
import math
import re
import tomllib
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from fedbus.app.failures import CliError, ExitCode
from fedbus.contracts.scheduling import ScheduleOverrides, ScheduleTable
from fedbus.contracts.task.aggregation import AggregationMode, AggregationTable
from fedbus.contracts.task.run_config import InvalidOverride, check_overrides
from fedbus.contracts.task.task import Task

UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
PARTITION: Final = "partition-id"
PARTITIONS: Final = "num-partitions"
"""Keys of the node configuration by which an app finds its data partition."""
Scalar = bool | int | float | str

ModeOption = Annotated[
    AggregationMode | None,
    typer.Option(help="When the run aggregates: see docs/aggregation.md.", show_default="the task's"),
]
AggregationOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Override a key of the task's aggregation: buffer-size=5. Repeatable.", metavar="KEY=VALUE"
    ),
]


def parse_duration(text: str) -> float:
    """Convert ``90s``, ``10m``, ``2h`` or ``1d`` to seconds.

    Raises:
        CliError: *text* is not a positive duration.

    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|m|h|d)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise CliError(f"{text!r} is not a duration. Use 90s, 10m, 2h or 1d", ExitCode.USAGE)
    return float(match[1]) * UNITS[match[2]]


def parse_key_values(text: str) -> dict[str, Scalar]:
    """Parse ``lr=0.1 data='/my data'``, as in TOML, without commas, or a JSON object.

    Raises:
        CliError: *text* has neither format.

    """
    try:
        return _check_scalars(json.loads(text) if text.lstrip().startswith("{") else _parse_assignments(text))
    except ValueError as error:
        raise CliError(
            f"{text!r} is not a configuration ({error}). Use key=value pairs separated by spaces; quote text",
            ExitCode.USAGE,
        ) from None


def parse_run_config(text: str, task: Task) -> dict[str, Scalar]:
    """Parse a value of ``--run-config``, in a form of `parse_key_values`, for the runs of *task*.

    Raises:
        CliError: the form is wrong, *task* has no such key, or a value has another type or is not finite.

    """
    try:
        return check_overrides(task.run_config, parse_key_values(text))
    except InvalidOverride as error:
        raise CliError(f"--run-config: task {task.id}: {error}", ExitCode.USAGE) from None


def split_override(text: str, option: str) -> tuple[str, str]:
    """Split ``lr=0.1``, a value of *option*, into name and value.

    Raises:
        CliError: *text* does not have this form.

    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise CliError(
            f"{text!r} is not an override. Use name=value, for example {option} lr=0.1", ExitCode.USAGE
        )
    return name.strip(), value


def parse_override(text: str, option: str) -> tuple[str, Scalar]:
    """Parse ``lr=0.1``, a value of *option*: a number, a boolean or else a string.

    Raises:
        CliError: *text* does not have this form, or the number is not finite.

    """
    name, value = split_override(text, option)
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        if not math.isfinite(number):
            raise CliError(
                f"{option} {text}: the value is not finite. Use a number, or quotes for a text",
                ExitCode.USAGE,
            )
        return name, number
    return name, value.strip("'\"")


def parse_aggregation(mode: AggregationMode | None, values: list[str] | None) -> dict[str, Scalar]:
    """Return the overrides of ``[tool.fedbus.aggregation]``: *mode*, and *values* such as ``buffer-size=5``.

    Raises:
        CliError: a key is unknown, or a value is invalid.

    """
    overrides = dict(parse_override(text, "--aggregation") for text in values or [])
    if mode is not None:
        if (other := overrides.get("mode", mode)) != mode:
            raise CliError(
                f"--mode {mode} and --aggregation mode={other} conflict. Use one of them", ExitCode.USAGE
            )
        overrides["mode"] = mode.value
    try:
        AggregationTable.check_overrides(overrides)
    except ValueError as error:
        raise CliError(f"--aggregation: {error}", ExitCode.USAGE) from None
    return overrides


def apply_schedule_options(table: ScheduleTable, every: str | None, at_most: int | None) -> ScheduleTable:
    """Replace the keys of a task's schedule that the options set.

    Raises:
        CliError: the result is not a valid schedule.

    """
    try:
        return schedule_overrides(every, at_most).apply_to(table)
    except ValidationError as error:
        why = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise CliError(f"these options conflict with the task's schedule: {why}", ExitCode.USAGE) from None


def schedule_overrides(every: str | None, at_most: int | None) -> ScheduleOverrides:
    """Return the overrides that the options set.

    Raises:
        CliError: *every* is not a duration.

    """
    return ScheduleOverrides(None if every is None else parse_duration(every), at_most)


def parse_node_config(text: str) -> dict[str, Scalar]:
    """Parse the node configuration of a device.

    Raises:
        CliError: the format is wrong, or the partition does not exist.

    """
    config = parse_key_values(text)
    part, parts = config.get(PARTITION), config.get(PARTITIONS)
    if isinstance(part, int) and isinstance(parts, int) and not 0 <= part < parts:
        raise CliError(
            f"{PARTITION}={part} must be less than {PARTITIONS}={parts}. Set {PARTITIONS} to the number of clients; "
            "on Kubernetes change `replicas` in the overlay instead of running `kubectl scale`",
            ExitCode.USAGE,
        )
    return config


def check_unique_tasks(tasks: list[str]) -> None:
    """Check that no task id occurs twice."""
    if len(set(tasks)) < len(tasks):
        raise CliError(f"--task names a task more than once: {', '.join(tasks)}", ExitCode.USAGE)


def _parse_assignments(text: str) -> dict[str, object]:
    """Parse the values as TOML; a value that is not TOML is a string."""
    values: dict[str, object] = {}
    rest = text.strip()
    while rest:
        match = re.match(r"""([A-Za-z0-9_.-]+)\s*=\s*("[^"]*"|'[^']*'|\S+)\s*""", rest)
        if match is None:
            raise ValueError(f"at {rest!r}")
        values[match[1]] = _parse_value(match[2])
        rest = rest[match.end() :]
    return values


def _parse_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_scalars(config: object) -> dict[str, Scalar]:
    if not isinstance(config, dict):
        raise ValueError("the JSON is not an object")  # noqa: TRY004  # wrong input, not a wrong type in the program
    for key, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{key} is not a number, string or boolean")  # noqa: TRY004 - the caller catches it
    return config
