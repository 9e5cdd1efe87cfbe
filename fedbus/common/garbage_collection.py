"""Rare collections of garbage, where a process allocates many objects that stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rare_garbage_collections() -> Iterator[None]:
    """Collect garbage rarely during the block. One thread of a process at a time may be in such a block.

    An import of torch takes a quarter less time, and a fleet of 10,000 simulated clients is millions of objects.
    """
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
