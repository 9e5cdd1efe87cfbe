"""Configure glibc malloc: keep freed pages mapped.

Every message passes through a few short-lived buffers of its own size. By default glibc returns such memory to the
kernel at once, and the page faults of new pages cost more than all the copying: sending took three times the CPU.
On systems without glibc this has no effect.
"""

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
TRIM_THRESHOLD_BYTES = 64 * 1024**2
"""Freed memory that a process keeps mapped: a few windows."""
MMAP_THRESHOLD_BYTES = 32 * 1024**2
"""The maximum of glibc; larger allocations (whole models) are returned to the kernel when freed."""


@functools.cache
def configure_malloc() -> bool:
    """Configure the allocator, once for each process; return whether it accepted the settings."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )
