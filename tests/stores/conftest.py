"""Fixtures of store tests: one SeaweedFS with an empty prefix for each test, and code repositories."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository, create_repository, make_signer
from support.s3_server import run_seaweed

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRepository, open_code
from fedbus.stores.s3.bucket import Bucket, BucketAddress


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


@pytest.fixture
def s3(
    s3_server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> EmbeddedS3:
    """The S3, with its credentials in the environment, and an empty cache."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path_factory.mktemp("home")))
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_url(s3: EmbeddedS3) -> str:
    """An empty prefix in the S3."""
    return s3.store_url.replace("/models?", f"/{uuid.uuid4().hex}?")


@pytest.fixture
def bucket(s3: EmbeddedS3, s3_url: str) -> Bucket:
    """The bucket of `s3_url`, to read and to damage its objects."""
    return Bucket(BucketAddress.parse(s3_url))


# --- code -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mallory(tmp_path_factory: pytest.TempPathFactory) -> CommitSigner:
    """A developer whose key is not allowed."""
    return make_signer("mallory", tmp_path_factory.mktemp("mallory"))


@pytest.fixture
def repository(tmp_path: Path, ada: CommitSigner) -> Repository:
    """A repository with a task, in one commit signed by Ada."""
    return create_repository(tmp_path / "origin", by=ada)


@pytest.fixture
def code(tmp_path: Path, repository: Repository, signers: Path) -> CodeRepository:
    """The branch *main* of the repository, with Ada as allowed signer."""
    return open_code(f"{repository.url}@main", tmp_path / "home", open_library, signers=signers)
