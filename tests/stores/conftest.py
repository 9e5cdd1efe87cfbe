"""What the tests of stores share: one SeaweedFS, with a place of its own for each test; repositories of code."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository, create_repository, make_signer
from support.s3_server import run_seaweed

from fedbus.app.local.seaweedfs import EmbeddedS3
from fedbus.stores.code.open import CodeRepository, open_code


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as s3:
        yield s3


@pytest.fixture
def s3(
    s3_server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> EmbeddedS3:
    """The S3, with its key in the environment and a cache of the test's own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("FEDBUS_HOME", str(tmp_path_factory.mktemp("home")))
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_url(s3: EmbeddedS3) -> str:
    """A place in it where nothing is."""
    return s3.store_url.replace("/models?", f"/{uuid.uuid4().hex}?")


# --- code -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mallory(tmp_path_factory: pytest.TempPathFactory) -> CommitSigner:
    """Somebody with a key that nobody allows."""
    return make_signer("mallory", tmp_path_factory.mktemp("mallory"))


@pytest.fixture
def repository(tmp_path: Path, ada: CommitSigner) -> Repository:
    """A repository with a task, in one commit of Ada's."""
    return create_repository(tmp_path / "origin", by=ada)


@pytest.fixture
def code(tmp_path: Path, repository: Repository, signers: Path) -> CodeRepository:
    """Its branch *main*, followed by whoever believes Ada."""
    return open_code(f"{repository.url}@main", tmp_path / "home", signers=signers)
