"""Makes what a federation begins with: its streams, the bucket of its models, and a task in a Git repository.

Runs once, when the bus and the S3 answer; what is there already stays as it is. The repository is the
MNIST example: commit to it (in the volume `author`), push, and the federation follows.
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
        await bucket.make()


def _patient(task: Path) -> dict[str, str]:
    """Its pyproject.toml with the time that containers need which all load torch at once, on one machine."""
    text = (task / "pyproject.toml").read_text(encoding="utf-8")
    patient, found = re.subn(r"^recruit-s *=.*$", f"recruit-s = {RECRUIT_S}", text, flags=re.MULTILINE)
    assert found == 1, "the example says how long a run waits for its clients"
    return {"pyproject.toml": patient}


def task_repository() -> None:
    """A bare repository that everybody reads, made of one that only its author has, with the key that signs."""
    if (CODE / "mnist.git").exists():
        return
    shutil.rmtree(AUTHOR / "mnist", ignore_errors=True)  # of a start that was cut off
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
