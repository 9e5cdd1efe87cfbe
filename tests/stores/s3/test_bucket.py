"""The clients of a bucket in a real S3."""

import pytest

from fedbus.stores.s3.bucket import Bucket


async def test_a_closed_client_is_opened_again(bucket: Bucket) -> None:
    async with bucket.open() as first, bucket.open() as concurrent:
        assert await bucket.list_objects("nothing") == []
    async with bucket.open() as second:
        assert await bucket.list_objects("nothing") == []
    assert second is first is concurrent


async def test_a_client_that_failed_to_close_is_not_opened_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        async with bucket.open() as first:
            monkeypatch.setattr(first, "__aexit__", fail)
    await first.close()
    async with bucket.open() as second:
        assert await bucket.list_objects("nothing") == []
    assert second is not first
