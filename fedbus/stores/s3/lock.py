"""A lock in a bucket, for an S3 without conditional puts. It needs only that a listing after a put shows the object.

Each contender writes a claim of its own and then lists all claims. It has the lock if it sees no other claim;
otherwise it deletes its claim and retries with backoff. Two contenders cannot both see no other claim: each wrote
its claim before it listed, so the later listing shows both.

A contender that dies leaves its claim. The claim counts for `LEASE_S` by the server's clock, and no holder works
under the lock for longer than a third of that.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from fedbus.common.retry import RetryBackoff
from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.s3.bucket import Bucket

LEASE_S: Final = 60.0
MAX_WORK_S: Final = LEASE_S / 3
MAX_WAIT_S: Final = 2 * LEASE_S
MIN_BACKOFF_S: Final = 0.05
MAX_BACKOFF_S: Final = 1.0


@asynccontextmanager
async def hold_lock(bucket: Bucket, prefix: str) -> AsyncIterator[None]:
    """Hold the lock under *prefix* while the block runs. Raises StoreUnavailable."""
    claim = f"{prefix}{uuid.uuid4().hex}"
    try:
        async with asyncio.timeout(MAX_WAIT_S):
            deadline = await _acquire(bucket, prefix, claim)
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise StoreUnavailable(
            str(bucket.address),
            f"the lock was not free within {MAX_WAIT_S:g} s, or was held for more than {MAX_WORK_S:g} s",
            remedy="retry later",
        ) from None
    finally:
        await bucket.delete(claim)


async def _acquire(bucket: Bucket, prefix: str, claim: str) -> float:
    """Acquire the lock. Returns the deadline for the work under it, by the clock of the event loop."""
    backoff = RetryBackoff(first_s=MIN_BACKOFF_S, max_s=MAX_BACKOFF_S)
    while True:
        start = asyncio.get_running_loop().time()
        await bucket.write(claim, b"claim\n")
        if await _is_sole_claim(bucket, prefix, claim):
            return start + MAX_WORK_S
        await bucket.delete(claim)
        await backoff.pause()


async def _is_sole_claim(bucket: Bucket, prefix: str, claim: str) -> bool:
    claims = await bucket.list_objects(prefix)
    own = next((info for info in claims if info.key == claim), None)
    if own is None:
        return False
    expired_before = own.modified - timedelta(seconds=LEASE_S)
    return all(info.key == claim or info.modified < expired_before for info in claims)
