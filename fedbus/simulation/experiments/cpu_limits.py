"""Limits of the CPU time of processes on this machine, by cgroups (version 2 or 1).

A limit is a directory of the cgroup file system; a process that writes its id to the directory's list of processes
gets at most that share of one core. https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
"""

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CGROUPS: Final = Path("/sys/fs/cgroup")
PERIOD_US: Final = 20_000
"""The period of a quota. A short one makes the limit act on short trainings too."""
REMOVAL_S: Final = 2.0
"""Time for the processes in a group to leave it, before its directory is removed."""


def assign_cores(shares: Sequence[float], cores: Sequence[int]) -> list[int] | None:
    """Return a core for each share, so that the shares of no core are more than 1; None if that is not possible.

    The largest share goes first, to the core with the most time left.
    """
    left = dict.fromkeys(cores, 1.0)
    chosen = [-1] * len(shares)
    for number in sorted(range(len(shares)), key=lambda one: -shares[one]):
        core = max(left, key=left.__getitem__, default=-1)
        if core < 0 or left[core] < shares[number]:
            return None
        left[core] -= shares[number]
        chosen[number] = core
    return chosen


class LimitsUnavailable(Exception):
    """This process may not limit CPU time. The text is the reason."""


@dataclass(frozen=True)
class CpuGroups:
    """Groups of processes with a limit of their CPU time."""

    version: int
    """The version of cgroups."""
    parent: Path
    directories: Mapping[str, Path]

    @property
    def default(self) -> str:
        """The file of the group without a limit."""
        return str(self.parent / "cgroup.procs")

    @property
    def process_lists(self) -> dict[str, str]:
        """The file of each group that takes the ids of processes."""
        return {name: str(directory / "cgroup.procs") for name, directory in self.directories.items()}


@contextmanager
def limit_cpu(shares: Mapping[str, float]) -> Iterator[CpuGroups]:
    """Create a group for each name in *shares* with at most this share of one core; remove them at the end.

    Raises:
        LimitsUnavailable: this process may not create groups, or the machine has no cgroups.

    """
    parent, version = find_parent()
    prefix = f"fedbus-{os.getpid()}-{secrets.token_hex(2)}"
    directories: dict[str, Path] = {}
    try:
        for name, share in shares.items():
            directory = parent / f"{prefix}-{name}"
            directory.mkdir()
            directories[name] = directory
            _set_quota(directory, version, share)
        yield CpuGroups(version, parent, directories)
    except OSError as error:
        if len(directories) == len(shares):
            raise
        raise LimitsUnavailable(f"cannot create a cgroup in {parent}: {error.strerror or error}") from error
    finally:
        for directory in directories.values():
            _remove(directory)


def find_parent(root: Path = CGROUPS) -> tuple[Path, int]:
    """Return the directory in which this process may create groups, and the version of cgroups.

    Raises:
        LimitsUnavailable: there is none.

    """
    for controller in (root / "cpu", root / "cpu,cpuacct"):
        if (controller / "cpu.cfs_quota_us").exists() or (controller / "cgroup.procs").exists():
            _require_writable(controller)
            return controller, 1
    controllers = root / "cgroup.controllers"
    if controllers.exists():
        if "cpu" not in controllers.read_text(encoding="ascii").split():
            raise LimitsUnavailable("the CPU controller of cgroups is not available to this process")
        _require_writable(root)
        enabled = root / "cgroup.subtree_control"
        if "cpu" not in enabled.read_text(encoding="ascii").split():
            try:
                enabled.write_text("+cpu", encoding="ascii")
            except OSError as error:
                raise LimitsUnavailable(
                    f"cannot enable the CPU controller in {enabled}: {error.strerror}"
                ) from error
        return root, 2
    raise LimitsUnavailable("this machine has no cgroups")


def _require_writable(directory: Path) -> None:
    if not os.access(directory, os.W_OK):
        raise LimitsUnavailable(f"no permission to create a cgroup in {directory}")


def _set_quota(directory: Path, version: int, share: float) -> None:
    quota = max(1000, round(share * PERIOD_US))
    if version == 1:
        (directory / "cpu.cfs_period_us").write_text(str(PERIOD_US), encoding="ascii")
        (directory / "cpu.cfs_quota_us").write_text(str(quota), encoding="ascii")
    else:
        (directory / "cpu.max").write_text(f"{quota} {PERIOD_US}", encoding="ascii")


def _remove(directory: Path) -> None:
    """Remove a group, as soon as it has no process."""
    deadline = time.monotonic() + REMOVAL_S
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        else:
            return
