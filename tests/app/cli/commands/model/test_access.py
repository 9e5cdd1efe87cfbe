"""`fedbus model access` on a real S3 server, read by a client without a key."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from support.cli import FedbusCli
from support.s3_server import run_seaweed
from typer.testing import CliRunner

from fedbus.app.cli.main import app
from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.stores.errors import StoreDenied, UnknownStore
from fedbus.stores.s3.bucket import Bucket, BucketAddress

OTHERS = {
    "Sid": "Others",
    "Effect": "Allow",
    "Principal": "*",
    "Action": ["s3:GetObject"],
    "Resource": ["arn:aws:s3:::fedbus/leaflets/*"],
}
"""A statement that fedbus did not write."""
BY_HAND = OTHERS | {"Sid": "ByHand", "Resource": ["arn:aws:s3:::fedbus/models/*"]}
"""The statement that earlier documentation recommended."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


@pytest.fixture
async def bucket(s3: EmbeddedS3) -> Bucket:
    """The bucket with a model, another object and no policy."""
    bucket = Bucket(BucketAddress.parse(s3.store_url), credentials=s3.credentials)
    await bucket.set_policy(None)
    await bucket.write("models/tiny/latest", b"a model")
    await bucket.write("elsewhere/secret", b"a secret")
    return bucket


@pytest.fixture
def fedbus(s3: EmbeddedS3, tmp_path: Path) -> FedbusCli:
    return FedbusCli(tmp_path / "person", FEDBUS_STORE=s3.store_url, **s3.environment)


@pytest.fixture
def anonymous_bucket(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A client without a key."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "FEDBUS_S3_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Bucket(BucketAddress.parse(s3.store_url))


async def policy(bucket: Bucket) -> list[str]:
    """The ids of the statements of the policy."""
    found = await bucket.read_policy()
    return [one["Sid"] for one in json.loads(found)["Statement"]] if found else []


async def test_public_models_can_be_read_but_not_listed_or_written(
    fedbus: FedbusCli, s3: EmbeddedS3, bucket: Bucket, anonymous_bucket: Bucket
) -> None:
    assert (await fedbus("model", "access", "--json")).facts["access"] == "private"
    result = await fedbus("model", "access", "public")
    assert (result.code, result.out.split(" can ")[0]) == (0, f"public: models in {bucket.address}")
    page = await asyncio.to_thread(urlopen, f"{s3.endpoint}/fedbus/models/tiny/latest")
    assert page.read() == b"a model"
    for attempt in (
        anonymous_bucket.read("elsewhere/secret"),
        anonymous_bucket.list_objects("models/"),
        anonymous_bucket.write("models/tiny/latest", b"another"),
    ):
        with pytest.raises(StoreDenied):
            await attempt
    assert (await fedbus("model", "access", "--json")).facts["access"] == "public"

    assert (await fedbus("model", "access", "private")).out.startswith("private: ")
    with pytest.raises(StoreDenied):
        await anonymous_bucket.read("models/tiny/latest")
    assert await bucket.read_policy() is None


async def test_other_statements_of_the_policy_are_kept(fedbus: FedbusCli, bucket: Bucket) -> None:
    await bucket.set_policy(json.dumps({"Version": "2012-10-17", "Statement": [OTHERS]}))
    for who, ours in (("public", 1), ("public", 1), ("private", 0), ("private", 0)):
        assert (await fedbus("model", "access", who)).code == 0
        names = await policy(bucket)
        assert "Others" in names
        assert len(names) == 1 + ours


async def test_private_removes_an_equal_statement_written_by_hand(fedbus: FedbusCli, bucket: Bucket) -> None:
    await bucket.set_policy(json.dumps({"Version": "2012-10-17", "Statement": [OTHERS, BY_HAND]}))
    assert (await fedbus("model", "access", "--json")).facts["access"] == "public"
    assert (await fedbus("model", "access", "private", "--json")).facts["access"] == "private"
    assert await policy(bucket) == ["Others"]


async def test_a_denied_change_names_the_missing_permission(fedbus: FedbusCli, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    result = await fedbus("model", "access", "public", FEDBUS_S3_CREDENTIALS=str(tmp_path / "wrong"))
    assert result.code != 0
    assert " denied: " in result.err
    assert "s3:PutBucketPolicy" in result.err


async def test_access_of_a_directory_is_a_usage_error(fedbus: FedbusCli, tmp_path: Path) -> None:
    result = await fedbus("model", "access", "public", "--store", str(tmp_path))
    assert (result.code, "file permissions" in result.err) == (2, True)


@pytest.mark.parametrize("command", ["access", "bucket"])
def test_without_the_s3_extra_the_error_names_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedbus.stores.models.s3", None)
    error = CliRunner().invoke(app, ["model", command, "--store", "s3://models/fedbus"]).exception
    assert isinstance(error, UnknownStore)
    assert "pip install 'fedbus[s3]'" in str(error)
