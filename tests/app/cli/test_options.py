"""Options that override single keys of a task's schedule."""

from pathlib import Path
from typing import Any

import pytest
from support.cli import FedbusCli
from support.federation import tiny_task

from fedbus.app.cli.options import apply_schedule_options, parse_aggregation
from fedbus.app.failures import CliError, ExitCode
from fedbus.contracts.scheduling import ScheduleTable
from fedbus.contracts.task.aggregation import AggregationMode

FULL_SCHEDULE = {
    "when": "labelled >= 5 on 1 clients",
    "timezone": "Europe/Berlin",
    "quiet": "hour in 22..6",
    "overlap": "skip",
    "missed": "all",
    "debounce-s": 3.0,
    "on-new-code": False,
    "at-most": 7,
}


def make_table(**keys: Any) -> ScheduleTable:
    return ScheduleTable.model_validate(keys)


def test_at_most_replaces_one_key_of_the_schedule() -> None:
    assert apply_schedule_options(make_table(**FULL_SCHEDULE), None, 3) == make_table(
        **{**FULL_SCHEDULE, "at-most": 3}
    )


def test_every_replaces_one_key_of_the_schedule() -> None:
    own = {name: value for name, value in FULL_SCHEDULE.items() if name != "when"}
    assert apply_schedule_options(make_table(**own, **{"every-s": 9}), "90s", None) == make_table(
        **own, **{"every-s": 90}
    )


def test_without_options_the_schedule_is_the_tasks() -> None:
    assert apply_schedule_options(make_table(**FULL_SCHEDULE), None, None) == make_table(**FULL_SCHEDULE)


def test_every_with_when_is_refused_with_the_fix() -> None:
    with pytest.raises(CliError, match=r"use only when = .* or every 90s") as caught:
        apply_schedule_options(make_table(**FULL_SCHEDULE), "90s", None)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize("command", [("up",), ("server", "up"), ("agent", "workflow-scheduler")])
async def test_a_conflicting_every_fails_before_the_start(tmp_path: Path, command: tuple[str, ...]) -> None:
    task = Path(tiny_task(tmp_path).path)
    settings = task / "pyproject.toml"
    settings.write_text(f'{settings.read_text()}\n[tool.fedbus.schedule]\nwhen = "after other"\n')
    result = await FedbusCli(tmp_path / "home")(*command, "--task", str(task), "--every", "90s")
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert 'when = "(after other) or every 90s"' in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("command", [("up",), ("server", "up"), ("agent", "workflow-scheduler")])
async def test_a_wrong_run_config_fails_before_the_start(tmp_path: Path, command: tuple[str, ...]) -> None:
    task = tiny_task(tmp_path).path
    result = await FedbusCli(tmp_path / "home")(*command, "--task", task, "--run-config", "slow-s=nan")
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    error = "--run-config: task tiny: `slow-s` = nan: use a finite number; the task has 0.0"
    assert result.err == f"fedbus: {error}\n"


def test_the_mode_and_its_keys_override_the_tasks() -> None:
    overrides = parse_aggregation(AggregationMode.DEADLINE, ["deadline-s=2.5", "late=drop"])
    assert overrides == {"mode": "deadline", "deadline-s": 2.5, "late": "drop"}
    assert parse_aggregation(None, None) == {}


@pytest.mark.parametrize(
    ("mode", "values", "reason"),
    [
        (AggregationMode.ASYNC, ["mode=sync"], "--mode async and --aggregation mode=sync conflict"),
        (None, ["bufer-size=3"], "`bufer-size` is not a key of"),
        (None, ["alpha=2"], "`alpha` = 2: Input should be less than or equal to 1"),
        (None, ["alpha"], "Use name=value, for example --aggregation"),
    ],
)
def test_an_invalid_aggregation_is_a_usage_error(
    mode: AggregationMode | None, values: list[str], reason: str
) -> None:
    with pytest.raises(CliError, match=reason) as error:
        parse_aggregation(mode, values)
    assert error.value.code == ExitCode.USAGE
