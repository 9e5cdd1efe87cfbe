"""Credentials for S3: where they come from, and the reasons that users read if they are invalid."""

from pathlib import Path

import pytest
from support.model_versions import WEIGHTS, digest
from support.s3_models import open_s3_store, publish_two_versions

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.stores.errors import StoreDenied
from fedbus.stores.s3.client import _session


async def test_a_wrong_secret_is_denied_and_not_repeated_in_the_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await publish_two_versions(s3_url)
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = AKIA\naws_secret_access_key = hush\n")
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(credentials))
    store = open_s3_store(s3_url)
    for attempt in (
        store.prepare,
        store.read_latest,
        store.list_versions,
        lambda: store.local_path(digest(WEIGHTS)),
    ):
        with pytest.raises(StoreDenied, match=r"denied: .*; check the credentials") as denied:
            await attempt()
        assert "hush" not in repr(denied.value)


async def test_missing_credentials_are_reported(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDBUS_S3_CREDENTIALS")
    with pytest.raises(StoreDenied, match="there are no credentials; set AWS_ACCESS_KEY_ID"):
        await open_s3_store(s3_url).read_latest()


async def test_credentials_come_from_the_sources_of_the_aws_tools(
    s3_url: str, s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key, secret = (line.partition(" = ")[2] for line in s3.credentials.read_text().splitlines())
    monkeypatch.delenv("FEDBUS_S3_CREDENTIALS")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    _session.cache_clear()  # the session caches credentials
    try:
        await open_s3_store(s3_url).prepare()
    finally:
        _session.cache_clear()


@pytest.mark.parametrize(
    ("settings", "reason", "with_file"),
    [
        ({"AWS_PROFILE": "no-such-profile"}, "no-such-profile", False),
        ({"AWS_PROFILE": "no-such-profile"}, "no-such-profile", True),
        ({"AWS_ACCESS_KEY_ID": "AKIA"}, "Partial credentials", False),
    ],
)
async def test_invalid_aws_settings_are_reported(
    settings: dict[str, str], reason: str, with_file: bool, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_file:
        monkeypatch.delenv("FEDBUS_S3_CREDENTIALS")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    _session.cache_clear()
    try:
        with pytest.raises(StoreDenied, match=f"{reason}.*; correct the AWS settings"):
            await open_s3_store(s3_url).read_latest()
    finally:
        _session.cache_clear()


@pytest.mark.parametrize("content", [None, "", "nonsense", "[default]\naws_access_key_id = AKIA\n"])
async def test_an_invalid_credentials_file_is_named(
    content: str | None, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(tmp_path / "keys"))
    with pytest.raises(StoreDenied, match=rf"{tmp_path}/keys denied: .*write the lines \[default\]"):
        await open_s3_store(s3_url).read_latest()


async def test_new_credentials_are_used_by_the_next_call(
    s3: EmbeddedS3, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = await publish_two_versions(s3_url)
    file, valid = tmp_path / "credentials", s3.credentials.read_text()
    file.write_text(valid.replace("aws_secret_access_key = ", "aws_secret_access_key = wrong"))
    monkeypatch.setenv("FEDBUS_S3_CREDENTIALS", str(file))
    with pytest.raises(StoreDenied):
        await store.read_latest()
    file.write_text(valid)
    assert await store.read_latest() is not None
