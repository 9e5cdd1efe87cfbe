"""Where errors end: each becomes one line that says what to do, and an exit code that scripts may rely on.

Whatever a command cannot deal with comes up here and is caught once. FEDBUS_DEBUG=1 shows
where it came from instead.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final, NoReturn

DEBUG: Final = "FEDBUS_DEBUG"


class Exit(IntEnum):
    """What an exit code means. Stable: scripts may rely on it."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NO_ANSWER = 4
    NOT_FOUND = 5
    MACHINE = 6
    DENIED = 7
    INTERRUPTED = 130


MEANINGS: Final = {
    Exit.OK: "done",
    Exit.FAILED: "refused, or failed; the line on standard error says why",
    Exit.USAGE: "the command, an option or a setting is not what it may be",
    Exit.UNREACHABLE: "no nats-server answers, or the connection was lost for good",
    Exit.NO_ANSWER: "the bus is there, but not the agent that would answer",
    Exit.NOT_FOUND: "no such run, client, task, file or federation",
    Exit.MACHINE: "this machine lacks something: a program, a free port, a directory that can be written",
    Exit.DENIED: "the bus will not have us, or we not it: credentials or certificate; to start again mends nothing",
    Exit.INTERRUPTED: "ended by Ctrl-C",
}


class Failure(Exception):
    """A command cannot do what it was asked; the text says what to do about it."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The file at *path* is written in here; raises Failure where it cannot be."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror or error}", Exit.MACHINE) from None


def edge(command: Callable[[], object]) -> NoReturn:
    """Run *command* and leave with its exit code. The only place that catches what nobody else could."""
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has enough: `fedbus events tail | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)
    except Exception as error:  # this is the edge
        if os.environ.get(DEBUG):
            raise
        line, code = told(error)
        print(f"fedbus: {line}", file=sys.stderr)
        sys.exit(code)
    sys.exit(Exit.OK)


def told(error: BaseException) -> tuple[str, Exit]:
    """*error* in one line, and the exit code for it."""
    if isinstance(error, BaseExceptionGroup):
        return _told_of_several([told(one) for one in error.exceptions])
    code = _code_of(error)
    if code is None:
        return (
            f"something unforeseen: {type(error).__name__}: {_one_line(error)}. {_HOW_TO_REPORT}",
            Exit.FAILED,
        )
    return _one_line(error), code


def _told_of_several(all_told: list[tuple[str, Exit]]) -> tuple[str, Exit]:
    """The first; but who is turned away meets with other errors on his way out, and those are not what matters."""
    return next((one for one in all_told if one[1] is Exit.DENIED), all_told[0])


_HOW_TO_REPORT: Final = f"Run it again with {DEBUG}=1 to see where, and please report it"


def _one_line(error: BaseException) -> str:
    """What it says, and nothing that a terminal would obey: it may be somebody else's reason."""
    from fedbus.app.terminal.output import printable  # noqa: PLC0415  # only who fails waits for it

    return printable(" ".join(str(error).split()))


def _code_of(error: BaseException) -> Exit | None:
    """The code for an error that somebody foresaw, or None. Looked up by what is loaded: to import is to wait."""
    if isinstance(error, Failure):
        return error.code
    for kind in type(error).__mro__:
        if (code := _CODES.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            return code
    return None


_CODES: Final = {
    "fedbus.app.settings.BadSetting": Exit.USAGE,
    "fedbus.contracts.identifiers.BadId": Exit.USAGE,
    "fedbus.contracts.envelope.Unreadable": Exit.FAILED,
    "fedbus.bus.errors.BusUnreachable": Exit.UNREACHABLE,
    "fedbus.bus.errors.BusClosed": Exit.UNREACHABLE,
    "fedbus.bus.errors.AccessDenied": Exit.DENIED,
    "fedbus.bus.errors.AccessUnusable": Exit.DENIED,
    "fedbus.contracts.credentials.NotCredentials": Exit.DENIED,
    "fedbus.bus.errors.NoAnswer": Exit.NO_ANSWER,
    "fedbus.bus.errors.NoFederation": Exit.NOT_FOUND,
    "fedbus.bus.errors.BusError": Exit.FAILED,
    "fedbus.bus.blobs.errors.BlobError": Exit.FAILED,
    "fedbus.stores.errors.StoreUnavailable": Exit.MACHINE,
    "fedbus.stores.errors.StoreError": Exit.FAILED,
    "fedbus.stores.models.signing.BadKey": Exit.USAGE,
    "fedbus.stores.models.signing.Unsigned": Exit.FAILED,
    "fedbus.stores.models.signing.WronglySigned": Exit.FAILED,
    "fedbus.stores.models.interface.ArtifactMissing": Exit.NOT_FOUND,
    "fedbus.stores.models.interface.VersionMissing": Exit.NOT_FOUND,
    "fedbus.stores.errors.UnknownStore": Exit.USAGE,
    "fedbus.stores.code.interface.BadCodeSource": Exit.USAGE,
    "fedbus.stores.code.interface.GitMissing": Exit.MACHINE,
    "fedbus.app.local.supervisor.EmbeddedError": Exit.MACHINE,
    "fedbus.learning.flower.task_code.BadTask": Exit.FAILED,
    "fedbus.agents.client_manager.agent.BootstrapFailed": Exit.FAILED,
    "fedbus.agents.common.child_process.ChildNotStarted": Exit.MACHINE,
    "fedbus.agents.flower_server.kubernetes.api.NotInACluster": Exit.MACHINE,
    "fedbus.agents.gateway.agent.CannotListen": Exit.MACHINE,
    "builtins.FileNotFoundError": Exit.NOT_FOUND,
    "builtins.PermissionError": Exit.MACHINE,
}
"""By name, so that asking for the code of an error imports nothing; a test says that each is there."""
