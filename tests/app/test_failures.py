"""The edge: every error that somebody foresaw has its exit code, and one line."""

import importlib
import subprocess
import sys

import pytest

from fedbus.app.failures import _CODES, MEANINGS, Exit, Failure, told
from fedbus.app.local.supervisor import PortTaken
from fedbus.bus.errors import BusUnreachable, NoAnswer, RequestRefused
from fedbus.contracts.identifiers import BadId
from fedbus.stores.models.signing import BadKey, Unsigned, WronglySigned


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Exit)


@pytest.mark.parametrize("name", _CODES)
def test_every_error_with_a_code_is_there(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), kind), Exception)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Failure("no"), Exit.FAILED),
        (Failure("not here", Exit.NOT_FOUND), Exit.NOT_FOUND),
        (BadId("client", "*"), Exit.USAGE),
        (BusUnreachable("nats://far", "refused"), Exit.UNREACHABLE),
        (NoAnswer("start_run", "workflow-scheduler", "nobody serves it"), Exit.NO_ANSWER),
        (RequestRefused("start_run", "one is running"), Exit.FAILED),
        (PortTaken(4222), Exit.MACHINE),
        (BadKey("fedbus.key holds no private key"), Exit.USAGE),
        (Unsigned("version 2 of mnist is not signed"), Exit.FAILED),
        (WronglySigned("version 2 of mnist is signed with another key"), Exit.FAILED),
        (FileNotFoundError(2, "No such file", "x"), Exit.NOT_FOUND),
    ],
)
def test_an_error_has_its_code_and_says_what_it_said(error: Exception, code: Exit) -> None:
    assert told(error) == (str(error), code)


def test_an_error_out_of_a_task_group_is_told_as_what_it_is() -> None:
    group = ExceptionGroup("unhandled", [ExceptionGroup("inner", [Failure("this", Exit.MACHINE)])])
    assert told(group) == ("this", Exit.MACHINE)


def test_what_nobody_foresaw_is_one_line_too_with_how_to_report_it() -> None:
    line, code = told(TypeError("two\nlines"))
    assert code is Exit.FAILED
    assert line.startswith("something unforeseen: TypeError: two lines. Run it again with FEDBUS_DEBUG=1")


def leave_with(command: str) -> "subprocess.CompletedProcess[str]":
    code = f"from fedbus.app.failures import *\ndef command():\n    {command}\nedge(command)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_process_leaves_with_the_code_and_the_line_alone() -> None:
    left = leave_with("raise Failure('no run r here', Exit.NOT_FOUND)")
    assert (left.returncode, left.stdout, left.stderr) == (5, "", "fedbus: no run r here\n")


def test_a_process_that_is_interrupted_says_nothing() -> None:
    left = leave_with("raise KeyboardInterrupt")
    assert (left.returncode, left.stdout, left.stderr) == (130, "", "")


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = (
        "from fedbus.app.failures import *\ndef command():\n    while True: print('x' * 1000)\nedge(command)"
    )
    piped = f'{sys.executable} -c "$CODE" | head -c 10; echo ${{PIPESTATUS[0]}}'
    left = subprocess.run(
        ["/bin/bash", "-c", piped],
        capture_output=True,
        text=True,
        check=False,
        env={"CODE": code, "PATH": "/usr/bin:/bin"},
    )
    assert left.stdout == "x" * 10 + "0\n"
    assert left.stderr == ""
