"""A limit of how many tasks train at the same time on one device: one file for each slot, locked while one trains.

A device may run several tasks, in one process or in several; they share its directory. The kernel releases a lock
when its process ends, however it ends, so a slot is never lost.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class TrainingSlot:
    """A slot that is taken, until it is released."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Release the slot; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class TrainingSlots:
    """The *count* slots of a device, as files in *directory*."""

    def __init__(self, directory: Path, count: int) -> None:
        assert count >= 1
        self._directory = directory
        self.count = count

    def acquire(self, run: str) -> TrainingSlot | None:
        """Take a slot for *run*; None if all slots are taken. Does not wait for a slot."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for number in range(self.count):
            descriptor = os.open(self._slot_file(number), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, run.encode())
                return TrainingSlot(descriptor)
        return None

    def list_holders(self) -> list[str]:
        """List the runs that took the slots last."""
        found = []
        for number in range(self.count):
            with suppress(OSError):
                found.append(self._slot_file(number).read_text())
        return [run for run in found if run]

    def _slot_file(self, number: int) -> Path:
        return self._directory / f"slot-{number}"
