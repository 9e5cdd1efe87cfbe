"""Every expected error has an exit code and is one line."""

import importlib
import subprocess
import sys

import pytest

from fedbus.app.failures import _EXIT_CODES, EXIT_CODE_TEXT, CliError, ExitCode, describe_error
from fedbus.app.local.supervisor import PortTaken
from fedbus.bus.errors import BusUnreachable, NoResponse, RequestRefused
from fedbus.contracts.identifiers import BadId
from fedbus.stores.models.signing import InvalidKey, SignatureInvalid, SignatureMissing


def test_every_exit_code_has_a_meaning() -> None:
    assert set(EXIT_CODE_TEXT) == set(ExitCode)


@pytest.mark.parametrize("name", _EXIT_CODES)
def test_every_class_in_the_table_exists(name: str) -> None:
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(module), kind)
    assert issubclass(found, Exception)
    assert found.__module__ == module, "it is defined in another module"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CliError("no"), ExitCode.FAILED),
        (CliError("not here", ExitCode.NOT_FOUND), ExitCode.NOT_FOUND),
        (BadId("client", "*"), ExitCode.USAGE),
        (BusUnreachable("nats://far", "refused"), ExitCode.UNREACHABLE),
        (NoResponse("start_run", "workflow-scheduler", "no agent serves it"), ExitCode.NO_ANSWER),
        (RequestRefused("start_run", "one is running"), ExitCode.FAILED),
        (PortTaken(4222), ExitCode.MACHINE),
        (InvalidKey("fedbus.key has no private key"), ExitCode.USAGE),
        (SignatureMissing("version 2 of mnist is not signed"), ExitCode.FAILED),
        (SignatureInvalid("version 2 of mnist is signed with another key"), ExitCode.FAILED),
        (FileNotFoundError(2, "No such file", "x"), ExitCode.NOT_FOUND),
    ],
)
def test_an_expected_error_keeps_its_message_and_has_a_code(error: Exception, code: ExitCode) -> None:
    assert describe_error(error) == (str(error), code)


def test_an_exception_group_is_described_by_its_error() -> None:
    group = ExceptionGroup("unhandled", [ExceptionGroup("inner", [CliError("this", ExitCode.MACHINE)])])
    assert describe_error(group) == ("this", ExitCode.MACHINE)


def test_an_unexpected_error_is_one_line_with_advice() -> None:
    line, code = describe_error(TypeError("two\nlines"))
    assert code is ExitCode.FAILED
    assert line.startswith(
        "unexpected error (TypeError): two lines. Run the command again with FEDBUS_DEBUG=1"
    )


def run_failing(command: str) -> "subprocess.CompletedProcess[str]":
    code = f"from fedbus.app.failures import *\ndef command():\n    {command}\nrun_cli(command)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_process_exits_with_the_code_and_one_line() -> None:
    result = run_failing("raise CliError('no run r here', ExitCode.NOT_FOUND)")
    assert (result.returncode, result.stdout, result.stderr) == (5, "", "fedbus: no run r here\n")


def test_an_interrupted_process_prints_nothing() -> None:
    result = run_failing("raise KeyboardInterrupt")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_a_closed_pipe_is_not_an_error() -> None:
    code = "from fedbus.app.failures import *\ndef command():\n    while True: print('x' * 1000)\nrun_cli(command)"
    piped = f'{sys.executable} -c "$CODE" | head -c 10; echo ${{PIPESTATUS[0]}}'
    result = subprocess.run(
        ["/bin/bash", "-c", piped],
        capture_output=True,
        text=True,
        check=False,
        env={"CODE": code, "PATH": "/usr/bin:/bin"},
    )
    assert result.stdout == "x" * 10 + "0\n"
    assert result.stderr == ""
