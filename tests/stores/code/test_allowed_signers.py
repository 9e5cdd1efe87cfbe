"""Which commits are believed, and that nothing of a repository is run to find out."""

import subprocess
import zlib
from pathlib import Path

import pytest
from support.git_repositories import CommitSigner, Repository

from fedbus.contracts.task.task import Task
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
    """A program that leaves a trace when it is run."""
    program = tmp_path / "spy"
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> "{tmp_path}/was-run"\nexit 0\n')
    program.chmod(0o755)
    return program


def has_run(spy: Path) -> bool:
    return spy.with_name("was-run").exists()


async def refusal(code: CodeRepository, version: str) -> str:
    """Why *version* is refused."""
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


async def test_a_commit_of_an_allowed_signer_is_believed(
    code: CodeRepository, repository: Repository
) -> None:
    assert code.requires_signatures
    assert (await code.load_task(repository.head)).code_version == repository.head


async def test_an_unsigned_commit_is_refused(code: CodeRepository, repository: Repository) -> None:
    assert "it is not signed" in await refusal(code, repository.commit())


async def test_a_strangers_commit_is_refused(
    code: CodeRepository, repository: Repository, mallory: CommitSigner
) -> None:
    assert "not from an allowed signer" in await refusal(code, repository.commit(by=mallory))


async def test_it_is_the_last_commit_that_is_verified(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    unsigned = repository.commit()
    assert (await code.load_task(repository.commit(by=ada))).code_version == repository.head
    assert "it is not signed" in await refusal(code, unsigned)


@pytest.mark.parametrize("what", ["message", "tree", "signature"])
async def test_a_forged_commit_is_refused(
    code: CodeRepository, repository: Repository, ada: CommitSigner, what: str
) -> None:
    """A signature is for one commit, and for no other."""
    signed = repository.git("cat-file", "commit", "HEAD")
    repository.commit({MODULE: "stolen = 1\n"})
    match what:
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
    assert "not from an allowed signer" in await refusal(code, sha)


async def test_a_signature_of_another_kind_does_not_count(
    code: CodeRepository, repository: Repository, spy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the owner of this machine has a gpg that says yes to everything."""
    everything = tmp_path / "gitconfig"
    everything.write_text(
        f'[gpg]\n program = {spy}\n[gpg "openpgp"]\n program = {spy}\n[gpg "ssh"]\n program = {spy}\n'
        f'[gpg "x509"]\n program = {spy}\n[core]\n hooksPath = {tmp_path}\n fsmonitor = {spy}\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(everything))
    for kind in ("PGP SIGNATURE", "SIGNED MESSAGE"):
        head, _, message = repository.git("cat-file", "commit", "HEAD").partition("\n\n")
        plain = head[: head.index("gpgsig")]
        forged = f"{plain}gpgsig -----BEGIN {kind}-----\n \n YQ==\n -----END {kind}-----\n\n{message}\n"
        sha = repository.git("hash-object", "-t", "commit", "-w", "--stdin", stdin=forged)
        repository.git("update-ref", "refs/heads/main", sha)
        assert "not an SSH signature" in await refusal(code, sha)
        repository.git("update-ref", "refs/heads/main", f"{sha}^{{commit}}")
    assert not has_run(spy)


async def test_without_signers_anything_on_the_ref_is_taken(repository: Repository, tmp_path: Path) -> None:
    code = open_code(repository.url, tmp_path / "home")
    assert not code.requires_signatures
    assert (await code.load_task(repository.commit())).code_version == repository.head


async def test_a_key_is_good_for_as_long_as_its_line_says(
    code: CodeRepository, repository: Repository, ada: CommitSigner, signers: Path
) -> None:
    allow(
        signers, ada.allowed_signers_line('namespaces="git",valid-after="20190101",valid-before="20200101"')
    )
    repository.git("checkout", "--quiet", "--orphan", "anew")
    then = repository.commit(by=ada, when="2019-06-01T00:00:00Z")
    now = repository.commit(by=ada)
    back = repository.commit(by=ada, when="2019-07-01T00:00:00Z")
    repository.git("branch", "--quiet", "-M", "main")
    assert (await code.load_task(then)).code_version == then
    assert "whose key was valid then" in await refusal(code, now)
    assert "its date is before that of its parent" in await refusal(code, back)


async def test_a_key_for_something_else_is_no_key_for_commits(
    code: CodeRepository, repository: Repository, ada: CommitSigner, signers: Path
) -> None:
    allow(signers, ada.allowed_signers_line('namespaces="file"'))
    assert "not from an allowed signer" in await refusal(code, repository.head)


async def test_who_is_trusted_no_longer_is_not_trusted_from_then_on(
    code: CodeRepository, repository: Repository, ada: CommitSigner, mallory: CommitSigner, signers: Path
) -> None:
    await code.load_task(repository.head)
    allow(signers, mallory.allowed_signers_line())
    assert "not from an allowed signer" in await refusal(code, repository.head)
    allow(signers, ada.allowed_signers_line())
    await code.load_task(repository.head)
    allow(signers.with_name(f"{signers.name}.revoked"), f"{ada.public}\n")  # or rather: revoke
    assert "not from an allowed signer" in await refusal(code, repository.head)


# --- what a repository would have us run ----------------------------------------------------------


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


async def test_nothing_that_a_repository_configures_is_run(
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


async def test_the_files_are_those_of_the_commit_whatever_git_was_told_to_show_instead(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    """``git replace``, here and there."""
    good = repository.head
    text = (repository.path / MODULE).read_text()
    bad = repository.commit({MODULE: f"{text}\nSTOLEN = 1\n"}, by=ada)
    repository.git("replace", good, bad)
    await code.fetch_latest()
    Repository(home_of(code) / "mirror.git").git("replace", good, bad)
    assert module_of(await code.load_task(good)) == text


async def test_an_object_that_was_tampered_with_is_fetched_anew(
    code: CodeRepository, repository: Repository
) -> None:
    version = await code.fetch_latest()
    text = (repository.path / MODULE).read_text()
    blob = repository.git("rev-parse", f"HEAD:{MODULE}")
    stored = loose_object_path(home_of(code) / "mirror.git", blob)
    stored.write_bytes(zlib.compress(b"blob %d\0%s" % (len(text), b"#" * len(text))))
    assert Repository(home_of(code) / "mirror.git").git("cat-file", "blob", blob).startswith("###")
    assert module_of(await code.load_task(version)) == text


def loose_object_path(mirror: Path, blob: str) -> Path:
    """The file that holds *blob*, now that no pack does."""
    for pack in (mirror / "objects" / "pack").glob("*.pack"):
        apart = pack.rename(mirror / pack.name)
        pack.with_suffix(".idx").unlink()
        with apart.open("rb") as objects:
            subprocess.run(["git", "-C", str(mirror), "unpack-objects", "-q"], stdin=objects, check=True)
    file = mirror / "objects" / blob[:2] / blob[2:]
    file.chmod(0o644)
    return file


async def test_a_submodule_is_refused(
    code: CodeRepository, repository: Repository, ada: CommitSigner
) -> None:
    repository.git("update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},library")
    repository.git("commit", "--quiet", "-m", "a submodule", by=ada)
    assert "library is a submodule" in await refusal(code, repository.head)


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
async def test_a_link_that_leads_out_of_the_task_is_refused(
    code: CodeRepository, repository: Repository, ada: CommitSigner, links: dict[str, str]
) -> None:
    for name, target in links.items():
        (repository.path / name).parent.mkdir(exist_ok=True)
        (repository.path / name).symlink_to(target)
    assert "is a link out of the task" in await refusal(code, repository.commit(by=ada))
    assert not (home_of(code) / repository.head).exists()


async def test_a_file_that_would_be_written_through_a_link_is_refused(
    code: CodeRepository, repository: Repository, ada: CommitSigner, tmp_path: Path
) -> None:
    """A tree with one name twice, which git itself would not make."""
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
    """The tree of the last commit, with *entries* beside; git does not look at what it is given here."""
    listing = repository.git("ls-tree", "HEAD")
    return repository.git("mktree", stdin="\n".join([listing, *entries, ""]))


# --- what this machine must have -------------------------------------------------------------------


def test_a_git_that_cannot_verify_is_told_before_anything_is_fetched(
    repository: Repository, tmp_path: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_version, "read_version", lambda: (2, 30))
    with pytest.raises(
        GitNotInstalled, match=r"git 2\.30 is too old; git 2\.34 or later is needed to verify SSH signatures"
    ):
        open_code(repository.url, tmp_path, signers=signers)
    assert open_code(repository.url, tmp_path).can_update


def test_a_machine_without_git_or_ssh_keygen_is_told_what_it_lacks(
    repository: Repository, tmp_path: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = subprocess.run(["which", "git"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GitNotInstalled, match="without git; install it"):
        open_code(repository.url, tmp_path)
    (tmp_path / "bin" / "git").symlink_to(where)
    with pytest.raises(GitNotInstalled, match="without ssh-keygen; install the OpenSSH"):
        open_code(repository.url, tmp_path, signers=signers)


@pytest.mark.parametrize("text", [None, "", "# nobody yet\n\n"])
def test_signers_that_name_nobody_are_a_mistake(
    repository: Repository, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "nobody"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidCodeSource, match="allowed signers"):
        open_code(repository.url, tmp_path, signers=file)
