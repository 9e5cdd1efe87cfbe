"""A payload in memory that worker processes map: written once, read by all of them, never copied again."""

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Final

from fedbus.simulation.engine import EngineFailed

OUT_OF_SPACE: Final = {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EMFILE, errno.ENFILE}


def write_shared(buffers: Sequence[memoryview]) -> int:
    """Write *buffers* one after the other into memory, and return its file descriptor.

    The memory has no name, so that nothing is left when the processes end, and needs no space in ``/dev/shm``. If the
    system has no memory left for it, or no such memory, a file in the directory for temporary files is used.

    Raises:
        EngineFailed: there is no space in either.

    """
    size = sum(map(len, buffers))
    try:
        return _write(_create_in_memory(), buffers, size)
    except OSError as error:
        if error.errno not in OUT_OF_SPACE and error.errno != errno.ENOSYS:
            raise
        reason = error
    directory = tempfile.gettempdir()
    try:
        return _write(_create_file(directory), buffers, size)
    except OSError as error:
        raise EngineFailed(
            f"no space for a message of {size / 1024**2:,.1f} MiB that all workers read: in memory: {reason.strerror}; "
            f"in {directory}: {error.strerror}. Free memory, or set TMPDIR to a directory with more space"
        ) from None


def map_shared(descriptor: int) -> memoryview:
    """Map the memory, without write access, and close *descriptor*. The mapping ends with the last view of it."""
    try:
        size = os.fstat(descriptor).st_size
        return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    finally:
        os.close(descriptor)


def _create_in_memory() -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, "this system has no memfd_create")
    return os.memfd_create("fedbus-payload", os.MFD_CLOEXEC)


def _create_file(directory: str) -> int:
    descriptor, path = tempfile.mkstemp(prefix="fedbus-payload-", dir=directory)
    os.unlink(path)  # noqa: PTH108 - no Path is needed
    return descriptor


def _write(descriptor: int, buffers: Sequence[memoryview], size: int) -> int:
    """Write *buffers* to *descriptor*. It is closed if that fails."""
    try:
        if size:
            os.posix_fallocate(
                descriptor, 0, size
            )  # without it, a later access would end the process with SIGBUS
        for buffer in buffers:
            view = buffer
            while view:
                view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
