"""A word with glibc: what was freed stays mapped, for the next chunk.

Every message passes through a few short-lived buffers of its own size. By default glibc gives
such memory back to the kernel at once, and the first touch of fresh pages costs more than all
the copying: sending took three times the CPU. Elsewhere than on glibc this does nothing.
"""

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
TRIM_THRESHOLD_BYTES = 64 * 1024**2
"""How much freed memory a process may keep: a few windows."""
MMAP_THRESHOLD_BYTES = 32 * 1024**2
"""The most that glibc takes; from here on (whole models) memory is given back when freed."""


@functools.cache
def configure_malloc() -> bool:
    """Ask once a process; says whether the allocator has agreed."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )
