"""The lock object, for an S3 without conditional puts."""

import pytest
from support.s3_models import key

from fedbus.stores.errors import StoreUnavailable
from fedbus.stores.s3 import lock
from fedbus.stores.s3.bucket import Bucket, BucketAddress


async def test_a_lock_that_is_not_released_is_unavailable(
    s3_url: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lock.hold_lock(bucket, key(s3_url, "lock/")):
        monkeypatch.setattr(lock, "MAX_WAIT_S", 0.3)
        with pytest.raises(StoreUnavailable, match=r"the lock was not free within 0\.3 s"):
            async with lock.hold_lock(Bucket(BucketAddress.parse(s3_url)), key(s3_url, "lock/")):
                pytest.fail("two at once")
