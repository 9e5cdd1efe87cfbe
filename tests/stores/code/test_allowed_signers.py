"""Signatures of commits, which are verified without running code of the repository."""

import subprocess
import zlib
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository

from fedbus.contracts.task.task import Task
from fedbus.learning.installed_libraries import open_library
from fedbus.stores.code import git_repository
from fedbus.stores.code.open import (
    CodeRejected,
    CodeRepository,
    GitNotInstalled,
    InvalidCodeSource,
    open_code,
)
from fedbus.stores.tasks import git_version

MODULE = "moons_app/task.py"


@pytest.fixture
def spy(tmp_path: Path) -> Path:
    """A program that records its calls."""
    program = tmp_path / "spy"
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> "{tmp_path}/was-run"\nexit 0\n')
    program.chmod(0o755)
    return program


def has_run(spy: Path) -> bool:
    return spy.with_name("was-run").exists()


async def rejection_reason(code: CodeRepository, version: str) -> str:
    """Load *version*, and return why it is rejected."""
    with pytest.raises(CodeRejected) as rejected:
        await code.load_task(version)
    assert "\n" not in str(rejected.value)
    return rejected.value.reason


def allow(signers: Path, text: str) -> None:
    signers.write_text(text)


def module_of(task: Task) -> str:
    return Path(task.path, MODULE).read_text()


def home_of(code: CodeRepository) -> Path:
    assert isinstance(code, git_repository.GitCodeRepository)
    return code.home


# --- signatures ---------------------------------------------------------------------------------


async def test_a_commit_of_an_allowed_signer_is_accepted(
    code: CodeRepository, repository: Repository
) -> None:
    assert code.requires_signatures
    assert (await code.load_task(repository.head)).code_version == repository.head


async def test_an_unsigned_commit_is_rejected(code: CodeRepository, repository: Repository) -> None:
    assert "it is not signed" in await rejection_reason(code, repository.commit())


async def test_a_commit_of_another_signer_is_rejected(
    code: CodeRepository, repository: Repository, mallory: CommitSigner
) -> None:
    assert "not from an allowed signer" in await rejection_reason(code, repository.commit(by=mallory))


async def test_only_the_commit_itself_is_verified(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    unsigned = repository.commit()
    assert (await code.load_task(repository.commit(by=ada))).code_version == repository.head
    assert "it is not signed" in await rejection_reason(code, unsigned)


@pytest.mark.parametrize("part", ["message", "tree", "signature"])
async def test_a_forged_commit_is_rejected(
    code: CodeRepository, repository: Repository, ada: CommitSigner, part: str
) -> None:
    """A signature is valid for one commit only."""
    signed = repository.git("cat-file", "commit", "HEAD")
    repository.commit({MODULE: "stolen = 1\n"})
    match part:
        case "message":
            forged = f"{signed} indeed\n"
        case "tree":
            forged = signed.replace(signed.split()[1], repository.git("rev-parse", "HEAD^{tree}"), 1) + "\n"
        case _:
            forged = signed.replace("gpgsig -----BEGIN SSH", "gpgsig -----BEGIN SSH", 1).replace(
                "\n U", "\n V", 1
            )
            assert forged != signed
    sha = repository.git("hash-object", "-t", "commit", "-w", "--stdin", "--literally", stdin=forged)
    repository.git("update-ref", "refs/heads/main", sha)
    assert "not from an allowed signer" in await rejection_reason(code, sha)


async def test_a_signature_of_another_type_is_rejected(
    code: CodeRepository, repository: Repository, spy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the user has configured a gpg program that accepts every signature."""
    gitconfig = tmp_path / "gitconfig"
    gitconfig.write_text(
        f'[gpg]\n program = {spy}\n[gpg "openpgp"]\n program = {spy}\n[gpg "ssh"]\n program = {spy}\n'
        f'[gpg "x509"]\n program = {spy}\n[core]\n hooksPath = {tmp_path}\n fsmonitor = {spy}\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(gitconfig))
    for kind in ("PGP SIGNATURE", "SIGNED MESSAGE"):
        head, _, message = repository.git("cat-file", "commit", "HEAD").partition("\n\n")
        plain = head[: head.index("gpgsig")]
        forged = f"{plain}gpgsig -----BEGIN {kind}-----\n \n YQ==\n -----END {kind}-----\n\n{message}\n"
        sha = repository.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=forged)
        repository.git("update-ref", "refs/heads/main", sha)
        assert "not an SSH signature" in await rejection_reason(code, sha)
        repository.git("update-ref", "refs/heads/main", f"{sha}^{{commit}}")
    assert not has_run(spy)


async def test_without_signers_every_commit_of_the_ref_is_accepted(
    repository: Repository, tmp_path: Path
) -> None:
    code = open_code(repository.url, tmp_path / "home", open_library)
    assert not code.requires_signatures
    assert (await code.load_task(repository.commit())).code_version == repository.head


async def test_a_key_is_valid_in_the_period_of_its_line(
    code: CodeRepository, repository: Repository, ada: CommitSigner, signers: Path
) -> None:
    allow(
        signers, ada.allowed_signers_line('namespaces="git",valid-after="20190101",valid-before="20200101"')
    )
    repository.git("checkout", "--quiet", "--orphan", "new")
    valid = repository.commit(by=ada, when="2019-06-01T00:00:00Z")
    expired = repository.commit(by=ada)
    backdated = repository.commit(by=ada, when="2019-07-01T00:00:00Z")
    repository.git("branch", "--quiet", "-M", "main")
    assert (await code.load_task(valid)).code_version == valid
    assert "whose key was valid then" in await rejection_reason(code, expired)
    assert "its date is before that of its parent" in await rejection_reason(code, backdated)


async def test_a_key_for_another_namespace_is_not_valid_for_commits(
    code: CodeRepository, repository: Repository, ada: CommitSigner, signers: Path
) -> None:
    allow(signers, ada.allowed_signers_line('namespaces="file"'))
    assert "not from an allowed signer" in await rejection_reason(code, repository.head)


async def test_a_removed_or_revoked_key_is_invalid_at_once(
    code: CodeRepository, repository: Repository, ada: CommitSigner, mallory: CommitSigner, signers: Path
) -> None:
    await code.load_task(repository.head)
    allow(signers, mallory.allowed_signers_line())
    assert "not from an allowed signer" in await rejection_reason(code, repository.head)
    allow(signers, ada.allowed_signers_line())
    await code.load_task(repository.head)
    allow(signers.with_name(f"{signers.name}.revoked"), f"{ada.public}\n")  # a revocation
    assert "not from an allowed signer" in await rejection_reason(code, repository.head)


# --- programs that a repository configures --------------------------------------------------------


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n$Format:%H$ $Id$\n"
ATTRIBUTES = "* filter=spy ident export-subst text eol=crlf working-tree-encoding=UTF-16\n"
HOOKS = ("post-checkout", "post-upload-pack", "reference-transaction", "post-index-change", "pre-auto-gc")
PROGRAMS = (
    "core.fsmonitor",
    "filter.spy.clean",
    "filter.spy.smudge",
    "filter.spy.process",
    "core.alternateRefsCommand",
    "uploadpack.packObjectsHook",
    "core.sshCommand",
    "core.askPass",
    "gpg.ssh.program",
    "gpg.ssh.allowedSignersFile",
    "credential.helper",
)


async def test_no_program_that_a_repository_configures_is_run(
    code: CodeRepository, repository: Repository, ada: CommitSigner, spy: Path
) -> None:
    repository.commit({"weights.bin": LFS}, by=ada)
    attributes = repository.git("hash-object", "-w", "--stdin", "--no-filters", stdin=ATTRIBUTES)
    repository.git("update-index", "--add", "--cacheinfo", f"100644,{attributes},.gitattributes")
    repository.git("commit", "--quiet", "-m", "attributes", by=ada)
    (repository.path / ".gitattributes").write_text(ATTRIBUTES)
    for key in PROGRAMS:
        repository.git("config", key, str(spy))
    for hook in HOOKS:
        (repository.path / ".git" / "hooks" / hook).symlink_to(spy)
    task = await code.load_task(await code.fetch_latest())
    await code.list_commits()
    await code.prune([task.code_version])
    assert (Path(task.path) / "weights.bin").read_text() == LFS
    assert not has_run(spy)


async def test_replace_refs_have_no_effect_on_the_files(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    """``git replace`` in the remote repository and in the mirror."""
    good = repository.head
    text = (repository.path / MODULE).read_text()
    bad = repository.commit({MODULE: f"{text}\nSTOLEN = 1\n"}, by=ada)
    repository.git("replace", good, bad)
    await code.fetch_latest()
    Repository(home_of(code) / "mirror.git").git("replace", good, bad)
    assert module_of(await code.load_task(good)) == text


async def test_a_corrupt_object_is_fetched_again(code: CodeRepository, repository: Repository) -> None:
    version = await code.fetch_latest()
    text = (repository.path / MODULE).read_text()
    blob = repository.git("rev-parse", f"HEAD:{MODULE}")
    stored = loose_object_path(home_of(code) / "mirror.git", blob)
    stored.write_bytes(zlib.compress(b"blob %d\0%s" % (len(text), b"#" * len(text))))
    assert Repository(home_of(code) / "mirror.git").git("cat-file", "blob", blob).startswith("###")
    assert module_of(await code.load_task(version)) == text


def loose_object_path(mirror: Path, blob: str) -> Path:
    """Unpack all objects, and return the file of *blob*."""
    for pack in (mirror / "objects" / "pack").glob("*.pack"):
        moved = pack.rename(mirror / pack.name)
        pack.with_suffix(".idx").unlink()
        with moved.open("rb") as objects:
            subprocess.run(["git", "-C", str(mirror), "unpack-objects", "-q"], stdin=objects, check=True)
    file = mirror / "objects" / blob[:2] / blob[2:]
    file.chmod(0o644)
    return file


async def test_a_submodule_is_rejected(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    repository.git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},library")
    repository.git("commit", "--quiet", "-m", "a submodule", by=ada)
    assert "library is a submodule" in await rejection_reason(code, repository.head)


@pytest.mark.parametrize(
    "links",
    [
        {"data": "/etc/passwd"},
        {"data": "../../outside"},
        {"moons_app/data": "../../.."},
        {"here": ".", "sub/up": "../..", "sub/out": "../here/sub/up/../.."},
        {"loop": "loop"},
    ],
)
async def test_a_link_out_of_the_task_is_rejected(
    code: CodeRepository, repository: Repository, ada: CommitSigner, links: dict[str, str]
) -> None:
    for name, target in links.items():
        (repository.path / name).parent.mkdir(exist_ok=True)
        (repository.path / name).symlink_to(target)
    assert "is a link out of the task" in await rejection_reason(code, repository.commit(by=ada))
    assert not (home_of(code) / repository.head).exists()


async def test_a_file_is_not_written_through_a_link(
    code: CodeRepository, repository: Repository, ada: CommitSigner, tmp_path: Path
) -> None:
    """A tree with a duplicate name, which git itself does not create."""
    link = repository.git("hash-object", "-w", "--stdin", stdin=str(tmp_path))
    tree = with_entries(
        repository,
        f"120000 blob {link}\tout",
        f"040000 tree {repository.git('rev-parse', 'HEAD:moons_app')}\tout",
    )
    commit = repository.git("commit-tree", "-S", tree, "-p", "HEAD", "-m", "twice", by=ada)
    repository.git("update-ref", "refs/heads/main", commit)
    with pytest.raises(Exception, match=r"duplicate|twice|fsck|cannot use"):
        await code.load_task(commit)
    assert not (tmp_path / "__init__.py").exists()


def with_entries(repository: Repository, *entries: str) -> str:
    """Create the tree of the last commit with additional *entries*, which git does not check."""
    listing = repository.git("ls-tree", "HEAD")
    return repository.git("mktree", stdin="\n".join([listing, *entries, ""]))


# --- required programs -----------------------------------------------------------------------------


def test_a_git_version_without_ssh_signatures_is_rejected(
    repository: Repository, tmp_path: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_version, "read_version", lambda: (2, 30))
    with pytest.raises(
        GitNotInstalled, match=r"git 2\.30 is too old; git 2\.34 or later is needed to verify SSH signatures"
    ):
        open_code(repository.url, tmp_path, open_library, signers=signers)
    assert open_code(repository.url, tmp_path, open_library).can_update


def test_a_missing_git_or_ssh_keygen_is_reported(
    repository: Repository, tmp_path: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = subprocess.run(["which", "git"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GitNotInstalled, match="without git; install it"):
        open_code(repository.url, tmp_path, open_library)
    (tmp_path / "bin" / "git").symlink_to(git)
    with pytest.raises(GitNotInstalled, match="without ssh-keygen; install the OpenSSH"):
        open_code(repository.url, tmp_path, open_library, signers=signers)


@pytest.mark.parametrize("text", [None, "", "# none yet\n\n"])
def test_a_file_without_signers_is_rejected(repository: Repository, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "signers"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidCodeSource, match="allowed signers"):
        open_code(repository.url, tmp_path, open_library, signers=file)
