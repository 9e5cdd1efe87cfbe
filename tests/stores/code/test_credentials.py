"""A repository with authentication: git uses the credentials of the user, for fetches only."""

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.git_repositories import Repository
from support.waiting import eventually

from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import CodeRepository, CodeUnavailable, open_code

SECRET = "s3cr3t"
Configure = Callable[[str], object]


class PasswordProtectedHandler(SimpleHTTPRequestHandler):
    """Serves the files of a repository with HTTP basic authentication."""

    def send_head(self) -> Any:
        expected = "Basic " + base64.b64encode(f"fedbus:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") == expected:
            return super().send_head()
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="git"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def protected_url(repository: Repository) -> Iterator[str]:
    """The address of the repository, which needs a password."""
    repository.git("update-server-info")

    def handler(*args: Any) -> PasswordProtectedHandler:
        return PasswordProtectedHandler(*args, directory=str(repository.path))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"git+http://127.0.0.1:{server.server_address[1]}/.git@main"
        server.shutdown()
        thread.join()


@pytest.fixture
def code(protected_url: str, tmp_path: Path, signers: Path) -> CodeRepository:
    return open_code(protected_url, tmp_path / "home", open_library, signers=signers)


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """A function that writes the git configuration of the user, which is empty at first."""
    file = tmp_path / "gitconfig"
    file.touch()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(file))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    return file.write_text


@pytest.fixture
def helper(tmp_path: Path) -> str:
    """A credential helper that returns the password."""
    program = tmp_path / "helper"
    program.write_text(f"#!/bin/sh\necho username=fedbus\necho password={SECRET}\n")
    program.chmod(0o755)
    return str(program)


async def test_without_credentials_the_repository_is_unavailable(
    code: CodeRepository, configure: Configure
) -> None:
    with pytest.raises(CodeUnavailable, match="this machine has access"):
        await code.fetch_latest()


async def test_the_credential_helper_of_the_user_is_used(
    code: CodeRepository, repository: Repository, configure: Configure, helper: str
) -> None:
    configure(f"[credential]\n helper = {helper}\n")
    version = await code.fetch_latest()
    assert version == repository.head
    assert (await code.load_task(version)).code_version == version


async def test_a_helper_can_be_set_in_the_environment(
    code: CodeRepository,
    repository: Repository,
    configure: Configure,
    helper: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "credential.helper")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", helper)
    assert await code.fetch_latest() == repository.head


async def test_a_process_of_a_helper_does_not_block_the_next_fetch(
    code: CodeRepository, repository: Repository, configure: Configure, tmp_path: Path
) -> None:
    """Git's credential cache stays as a process, which would hold the lock of the fetch that started it."""
    pid = tmp_path / "pid"
    answer = f"echo username=fedbus; echo password={SECRET}"
    configure(f'[credential]\n helper = "!f() {{ sleep 600 >/dev/null & echo $! > {pid}; {answer}; }}; f"\n')
    assert await code.fetch_latest() == repository.head
    assert await code.fetch_latest() == repository.head
    await eventually(lambda: not psutil.pid_exists(int(pid.read_text())))


async def test_a_secret_in_the_output_of_git_is_redacted(
    code: CodeRepository, repository: Repository, configure: Configure
) -> None:
    """If the user rewrites URLs to ones with a password, the message of git contains it."""
    address = code.source.split(" ", maxsplit=1)[0]
    configure(f'[url "http://fedbus:{SECRET}@127.0.0.1:1/"]\n insteadOf = {address}\n')
    with pytest.raises(CodeUnavailable) as error:
        await code.fetch_latest()
    assert SECRET not in str(error.value)


async def test_the_cause_of_a_failed_connection_is_reported(tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # a port without a listener
        address = f"git+ssh://git@127.0.0.1:{bound.getsockname()[1]}/x.git"
        with pytest.raises(CodeUnavailable, match="Connection refused"):
            await open_code(address, tmp_path, open_library).fetch_latest()
