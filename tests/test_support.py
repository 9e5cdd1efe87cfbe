"""The test support: waiting for a condition, which failures CI repeats, and processes."""

import re
from importlib.util import find_spec

import psutil
import pytest
from support import ConditionNotMet, eventually
from support.cli import PRELOADED
from support.processes import child_processes, command_of, is_running


async def test_a_condition_that_stays_false_times_out() -> None:
    with pytest.raises(ConditionNotMet, match=r"^Condition not met within 0\.05 s$"):
        await eventually(lambda: False, within_s=0.05)


async def test_a_timeout_error_of_the_condition_is_raised() -> None:
    def condition() -> bool:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match=r"^of its own$"):
        await eventually(condition)


def test_only_a_condition_not_met_is_repeated(pytestconfig: pytest.Config) -> None:
    (pattern,) = pytestconfig.getini("only_rerun")
    assert is_repeated(pattern, ConditionNotMet(20, "the end of tiny-1"))
    assert not is_repeated(pattern, TimeoutError())
    assert not is_repeated(pattern, AssertionError("Condition not met within 20 s"))


def is_repeated(pattern: str, error: Exception) -> bool:
    """Whether pytest-rerunfailures repeats a test that fails with *error*."""
    return re.search(pattern, f"{type(error).__name__}: {error}") is not None


def test_all_preloaded_modules_exist() -> None:
    """The fork server of multiprocessing ignores modules that it cannot import."""
    assert [name for name in PRELOADED if find_spec(name) is None] == []


def test_a_process_that_has_just_ended_has_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_no_such_process(self: psutil.Process) -> list[str]:
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "cmdline", raise_no_such_process)
    monkeypatch.setattr(psutil.Process, "status", raise_no_such_process)
    assert command_of(psutil.Process()) == []
    assert not is_running(psutil.Process())
    assert child_processes("trainer") == []
