"""The processes of a test. A process may end at any moment, so no function here fails if it does."""

from pathlib import Path

import psutil

from support.fork_server import FORKED_COMMANDS


def child_processes(name: str) -> list[psutil.Process]:
    """The children of this process with the entry module *name*: ``server``, ``trainer`` or ``init``."""
    return [one for one in psutil.Process().children() if is_agent_child(one, name)]


def is_agent_child(process: psutil.Process, name: str) -> bool:
    """Whether *process* is a child process of an agent with the entry module *name*."""
    return command_of(process)[-2:] == ["child", name]


def command_of(process: psutil.Process) -> list[str]:
    """The command line of *process*; empty if it has ended."""
    try:
        return FORKED_COMMANDS.get(process.pid) or process.cmdline()
    except psutil.Error:
        return []


def descendants_of(pid: int) -> list[psutil.Process]:
    """All descendants of *pid*; none if it has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_running(process: psutil.Process | int) -> bool:
    """Whether the process runs and is not a zombie."""
    try:
        one = psutil.Process(process) if isinstance(process, int) else process
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(home: Path) -> list[psutil.Process]:
    """The processes, other than this one, whose environment has the path *home*."""
    own = psutil.Process()
    return [one for one in psutil.process_iter() if one != own and _names(one, home) and is_running(one)]


def _names(process: psutil.Process, home: Path) -> bool:
    try:
        return any(str(home) in value for value in process.environ().values())
    except psutil.Error:
        return False
