"""Options that stand in the place of what a task says: of just that, and of nothing else."""

from pathlib import Path
from typing import Any

import pytest
from support.cli import FedbusCli
from support.federation import tiny_task

from fedbus.app.cli.options import apply_schedule_options
from fedbus.app.failures import CliError, ExitCode
from fedbus.contracts.scheduling import ScheduleTable

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


def test_at_most_leaves_the_rest_of_the_schedule_as_the_task_has_it() -> None:
    assert apply_schedule_options(make_table(**FULL_SCHEDULE), None, 3) == make_table(
        **{**FULL_SCHEDULE, "at-most": 3}
    )


def test_every_leaves_the_rest_of_the_schedule_as_the_task_has_it() -> None:
    own = {name: value for name, value in FULL_SCHEDULE.items() if name != "when"}
    assert apply_schedule_options(make_table(**own, **{"every-s": 9}), "90s", None) == make_table(
        **own, **{"every-s": 90}
    )


def test_without_options_the_schedule_is_the_tasks() -> None:
    assert apply_schedule_options(make_table(**FULL_SCHEDULE), None, None) == make_table(**FULL_SCHEDULE)


def test_every_beside_when_is_refused_with_what_to_write_instead() -> None:
    with pytest.raises(CliError, match=r"use only when = .* or every 90s") as caught:
        apply_schedule_options(make_table(**FULL_SCHEDULE), "90s", None)
    assert caught.value.code is ExitCode.USAGE


@pytest.mark.parametrize("command", [("up",), ("server", "up"), ("agent", "workflow-scheduler")])
async def test_a_command_with_every_says_so_before_anything_begins(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    task = Path(tiny_task(tmp_path).path)
    settings = task / "pyproject.toml"
    settings.write_text(f'{settings.read_text()}\n[tool.fedbus.schedule]\nwhen = "after other"\n')
    said = await FedbusCli(tmp_path / "home")(*command, "--task", str(task), "--every", "90s")
    assert (said.code, said.out) == (ExitCode.USAGE, "")
    assert 'when = "(after other) or every 90s"' in said.err
    assert said.err.count("\n") == 1
