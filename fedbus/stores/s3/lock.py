"""A lock in a bucket, for an S3 that knows no conditional puts. It asks of it only what every S3 promises by now:
that whoever lists after a put sees what was put.

Each contender puts a claim of its own and then lists all claims. It has the lock if it sees
no other; else it takes its claim back and tries again, after a while of chance length. Two can not both
see nobody: each put its claim before it listed, so the later lister sees the other's.

A contender that died leaves its claim. It counts for *LEASE_S* by the server's clock, and nobody
works under the lock for longer than a third of that.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.s3.bucket import Bucket

LEASE_S: Final = 60.0
MAX_WORK_S: Final = LEASE_S / 3
MAX_WAIT_S: Final = 2 * LEASE_S
MAX_BACKOFF_S: Final = 1.0


@asynccontextmanager
async def hold_lock(bucket: Bucket, prefix: str) -> AsyncIterator[None]:
    """Nobody else is in such a block over *prefix* meanwhile; raises StoreUnavailable."""
    claim = f"{prefix}{uuid.uuid4().hex}"
    try:
        async with asyncio.timeout(MAX_WAIT_S):
            ends = await _acquire(bucket, prefix, claim)
        async with asyncio.timeout_at(ends):
            yield
    except TimeoutError:
        raise StoreUnavailable(
            str(bucket.address),
            "its lock was not to be had, or was held for too long",
            remedy="try again later",
        ) from None
    finally:
        await bucket.delete(claim)


async def _acquire(bucket: Bucket, prefix: str, claim: str) -> float:
    """Until when the lock is ours, on the loop's clock."""
    pause_s = 0.05
    while True:
        began = asyncio.get_running_loop().time()
        await bucket.write(claim, b"claim\n")
        if await _is_sole_claim(bucket, prefix, claim):
            return began + MAX_WORK_S
        await bucket.delete(claim)
        await asyncio.sleep(random.uniform(0.0, pause_s))  # noqa: S311 (jitter, not a secret)
        pause_s = min(MAX_BACKOFF_S, 2 * pause_s)


async def _is_sole_claim(bucket: Bucket, prefix: str, claim: str) -> bool:
    claims = await bucket.list_objects(prefix)
    ours = next((one for one in claims if one.key == claim), None)
    if ours is None:
        return False
    dead = ours.modified - timedelta(seconds=LEASE_S)
    return all(one.key == claim or one.modified < dead for one in claims)
