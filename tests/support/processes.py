"""The processes of a test. One may end at any moment, also while a test looks at it."""

from pathlib import Path

import psutil

from support.fork_server import FORKED_COMMANDS


def child_processes(work: str) -> list[psutil.Process]:
    """The child processes of this one that do *work*: ``server``, ``trainer`` or ``init``."""
    return [one for one in psutil.Process().children() if is_agent_child(one, work)]


def is_agent_child(process: psutil.Process, work: str) -> bool:
    """Whether *process* is a child process of an agent that does *work*."""
    return command_of(process)[-2:] == ["child", work]


def command_of(process: psutil.Process) -> list[str]:
    """The command line of *process*; empty when it has ended."""
    try:
        return FORKED_COMMANDS.get(process.pid) or process.cmdline()
    except psutil.Error:
        return []


def descendants_of(pid: int) -> list[psutil.Process]:
    """All processes below *pid*; none when that one has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def is_running(process: psutil.Process | int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        one = psutil.Process(process) if isinstance(process, int) else process
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(home: Path) -> list[psutil.Process]:
    """The processes, other than this one, whose environment names *home*."""
    own = psutil.Process()
    return [one for one in psutil.process_iter() if one != own and _names(one, home) and is_running(one)]


def _names(process: psutil.Process, home: Path) -> bool:
    try:
        return any(str(home) in value for value in process.environ().values())
    except psutil.Error:
        return False
