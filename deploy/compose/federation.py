"""Create the streams of a federation, the bucket of its models, and a task in a Git repository.

Runs once, when the bus and the S3 are ready; existing ones stay unchanged. The repository is the
MNIST example: commit to it (in the volume `author`), push, and the federation follows it.
"""

import asyncio
import os
import re
import shutil
import subprocess
from pathlib import Path

from fedbus.app.settings import Settings
from fedbus.bus.bus import Bus, Identity
from fedbus.stores.code.demo_repository import DemoRepository
from fedbus.stores.s3.bucket import Bucket, BucketAddress

EXAMPLE = Path("/opt/fedbus-examples/mnist")
AUTHOR, CODE, TRUST = Path("/author"), Path("/code"), Path("/trust")
RECRUIT_S = 180


async def streams_and_bucket(settings: Settings) -> None:
    who = Identity(settings.fed, "server-manager")
    async with Bus.connect(settings.nats_url, who, access=settings.access) as bus:
        await bus.create_streams()
    bucket = Bucket(BucketAddress.parse(settings.store_url))
    async with bucket.open():
        await bucket.create_bucket()


def _patient(task: Path) -> dict[str, str]:
    """The pyproject.toml of *task* with enough recruiting time for containers that all load torch at once."""
    text = (task / "pyproject.toml").read_text(encoding="utf-8")
    patient, found = re.subn(r"^recruit-s *=.*$", f"recruit-s = {RECRUIT_S}", text, flags=re.MULTILINE)
    assert found == 1, "the pyproject.toml of the example has no recruit-s"
    return {"pyproject.toml": patient}


def task_repository() -> None:
    """Create a bare repository for all agents from the repository of the author, which has the signing key."""
    if (CODE / "mnist.git").exists():
        return
    shutil.rmtree(AUTHOR / "mnist", ignore_errors=True)  # left by an interrupted start
    authored = DemoRepository.create(AUTHOR / "mnist", EXAMPLE)
    assert authored.allowed_signers is not None
    authored.commit("More time for three clients on one machine to join", _patient(authored.directory))
    shutil.copyfile(authored.allowed_signers, TRUST / "allowed_signers")
    part = CODE / f".mnist-{os.getpid()}.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", authored.directory, part], check=True)
    part.rename(CODE / "mnist.git")
    subprocess.run(
        ["git", "-C", authored.directory, "remote", "add", "origin", CODE / "mnist.git"], check=True
    )


asyncio.run(streams_and_bucket(Settings.from_environment()))
task_repository()
