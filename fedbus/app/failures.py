"""The exit codes of commands, and the one place that turns an exception into one line and an exit code.

With FEDBUS_DEBUG=1 the traceback is shown instead.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final, NoReturn

from fedbus.app.terminal.plain import printable

DEBUG: Final = "FEDBUS_DEBUG"


class ExitCode(IntEnum):
    """The exit codes. They do not change: scripts may rely on them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NO_ANSWER = 4
    NOT_FOUND = 5
    MACHINE = 6
    DENIED = 7
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_CODE_TEXT: Final = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "request rejected or command failed; standard error has the reason",
    ExitCode.USAGE: "invalid command, option or setting",
    ExitCode.UNREACHABLE: "nats-server unreachable, or connection closed",
    ExitCode.NO_ANSWER: "connected to NATS, but the agent did not respond",
    ExitCode.NOT_FOUND: "no such run, client, task, file or federation",
    ExitCode.MACHINE: "missing on this machine: a program, a free port or a writable directory",
    ExitCode.DENIED: "authentication or TLS verification failed; restarting will not help",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.TERMINATED: "ended by SIGTERM",
}


class CliError(Exception):
    """A command failed; the message has the cause and what to do."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while the block writes *path* into a CliError."""
    try:
        yield
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror or error}", ExitCode.MACHINE) from None


def run_cli(command: Callable[[], object]) -> NoReturn:
    """Run *command* and exit with its code. No other place catches all exceptions."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has ended: `fedbus events tail | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.OK)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        line, code = describe_error(error)
        print(f"fedbus: {line}", file=sys.stderr)
        sys.exit(code)
    sys.exit(ExitCode.OK)


def describe_error(error: BaseException) -> tuple[str, ExitCode]:
    """Describe *error* in one line, with its exit code."""
    if isinstance(error, BaseExceptionGroup):
        return _describe_group([describe_error(one) for one in error.exceptions])
    code = _exit_code_of(error)
    if code is None:
        return (
            f"unexpected error ({type(error).__name__}): {_one_line(error)}. {_HOW_TO_REPORT}",
            ExitCode.FAILED,
        )
    return _one_line(error), code


def _describe_group(descriptions: list[tuple[str, ExitCode]]) -> tuple[str, ExitCode]:
    """Prefer a denied access: it is the cause of the other errors of its group."""
    return next((one for one in descriptions if one[1] is ExitCode.DENIED), descriptions[0])


_HOW_TO_REPORT: Final = f"Run the command again with {DEBUG}=1 for the traceback, and report it"


def _one_line(error: BaseException) -> str:
    """Return the message in one line, without control characters: the text may come from another machine."""
    return printable(" ".join(str(error).split()))


def _exit_code_of(error: BaseException) -> ExitCode | None:
    """Return the code of an expected error, or None. Looked up by name, so that nothing is imported."""
    if isinstance(error, CliError):
        return error.code
    for kind in type(error).__mro__:
        if (code := _EXIT_CODES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return code
    return None


_EXIT_CODES: Final = {
    "fedbus.app.settings.InvalidSetting": ExitCode.USAGE,
    "fedbus.contracts.identifiers.BadId": ExitCode.USAGE,
    "fedbus.contracts.envelope.DecodeError": ExitCode.FAILED,
    "fedbus.bus.errors.BusUnreachable": ExitCode.UNREACHABLE,
    "fedbus.bus.errors.BusClosed": ExitCode.UNREACHABLE,
    "fedbus.bus.errors.AccessDenied": ExitCode.DENIED,
    "fedbus.bus.errors.InvalidCredentialsFile": ExitCode.DENIED,
    "fedbus.contracts.credentials.InvalidCredentials": ExitCode.DENIED,
    "fedbus.bus.errors.NoResponse": ExitCode.NO_ANSWER,
    "fedbus.bus.errors.FederationNotFound": ExitCode.NOT_FOUND,
    "fedbus.bus.errors.BusError": ExitCode.FAILED,
    "fedbus.bus.blobs.errors.BlobError": ExitCode.FAILED,
    "fedbus.stores.errors.StoreUnavailable": ExitCode.MACHINE,
    "fedbus.stores.errors.StoreError": ExitCode.FAILED,
    "fedbus.stores.models.signing.InvalidKey": ExitCode.USAGE,
    "fedbus.stores.models.signing.SignatureMissing": ExitCode.FAILED,
    "fedbus.stores.models.signing.SignatureInvalid": ExitCode.FAILED,
    "fedbus.stores.models.interface.ArtifactMissing": ExitCode.NOT_FOUND,
    "fedbus.stores.models.interface.VersionMissing": ExitCode.NOT_FOUND,
    "fedbus.stores.errors.UnknownStore": ExitCode.USAGE,
    "fedbus.stores.code.interface.InvalidCodeSource": ExitCode.USAGE,
    "fedbus.stores.code.interface.GitNotInstalled": ExitCode.MACHINE,
    "fedbus.app.local.supervisor.EmbeddedError": ExitCode.MACHINE,
    "fedbus.learning.library.BadTask": ExitCode.FAILED,
    "fedbus.learning.data.errors.DataError": ExitCode.FAILED,
    "fedbus.learning.data.errors.DataNotFound": ExitCode.NOT_FOUND,
    "fedbus.learning.data.errors.DataPackageMissing": ExitCode.MACHINE,
    "fedbus.learning.data.errors.InvalidPartitioning": ExitCode.USAGE,
    "fedbus.learning.library.TrainingFailed": ExitCode.FAILED,
    "fedbus.learning.weights.BadWeights": ExitCode.FAILED,
    "fedbus.contracts.task.app.LibraryUnusable": ExitCode.MACHINE,
    "fedbus.simulation.settings.BadSettings": ExitCode.USAGE,
    "fedbus.simulation.engine.EngineFailed": ExitCode.MACHINE,
    "fedbus.simulation.profiles.errors.ProfileMissing": ExitCode.NOT_FOUND,
    "fedbus.simulation.profiles.errors.ProfileError": ExitCode.USAGE,
    "fedbus.agents.client_manager.agent.BootstrapFailed": ExitCode.FAILED,
    "fedbus.agents.common.child_process.ChildNotStarted": ExitCode.MACHINE,
    "fedbus.agents.flower_server.kubernetes.api.NotInACluster": ExitCode.MACHINE,
    "fedbus.agents.gateway.agent.GatewayBindError": ExitCode.MACHINE,
    "fedbus.simulation.experiments.errors.InvalidExperiment": ExitCode.USAGE,
    "fedbus.simulation.experiments.errors.ExperimentDataMissing": ExitCode.NOT_FOUND,
    "fedbus.simulation.experiments.errors.ExperimentFailed": ExitCode.FAILED,
    "builtins.FileNotFoundError": ExitCode.NOT_FOUND,
    "builtins.PermissionError": ExitCode.MACHINE,
}
"""By name, so that the lookup imports nothing. A test checks that each class exists."""
