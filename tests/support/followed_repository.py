"""The tiny task in a Git repository from which agents load its code."""

import shutil
from dataclasses import replace
from pathlib import Path

from fedbus.contracts.code import CodeData
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code.open import open_code
from support.federation import TINY_TASK, FederationHarness
from support.git_repositories import CommitSigner, Repository


async def follow_repository(fed: FederationHarness, by: CommitSigner, directory: Path) -> Repository:
    """Create a repository in *directory* with one commit, and configure *fed* to load its task from there."""
    repository = create_tiny_repository(directory / "repository", by=by)
    signers = directory / "allowed_signers"
    signers.write_text(by.allowed_signers_line())
    code = open_code(f"{repository.url}@main", fed.config.home, open_library, signers=signers)
    fed.config = replace(fed.config, code=code, task=await code.load_task(await code.fetch_latest()))
    return repository


def create_tiny_repository(path: Path, by: CommitSigner) -> Repository:
    """Create a repository of the tiny task, with one signed commit."""
    shutil.copytree(TINY_TASK, path, ignore=shutil.ignore_patterns("__pycache__"))
    repository = Repository(path)
    repository.git("init", "--quiet", "--initial-branch=main")
    repository.commit(subject="the task", by=by)
    return repository


def code_facts(fed: FederationHarness) -> CodeData:
    facts = fed.last_transition("code").facts
    assert isinstance(facts, CodeData)
    return facts
