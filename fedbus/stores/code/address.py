"""The address of a code repository, in pip's form:

    git+https://host/org/repository@main#subdirectory=examples/mnist
    git+ssh://git@host/org/repository.git
    git+file:///srv/git/task.git@stable

``@`` names a branch, a tag or a full SHA; left out, it is the branch that the repository itself has
as its first (HEAD). Credentials never stand in an address: git's own helpers have them.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from fedbus.stores.code.interface import InvalidCodeSource

PREFIX: Final = "git+"
_SAFE_SCHEMES: Final = ("https", "ssh", "file")
_UNENCRYPTED_SCHEMES: Final = ("http", "git")
"""Whoever sits on the wire can say anything here, so that only a signature tells whose a commit is."""

_SHA: Final = re.compile(r"[0-9a-f]{40}")
_REF: Final = re.compile(r"(?!.*(?:\.\.|//|@\{|\.lock(?:/|$)))[A-Za-z0-9_][A-Za-z0-9_./+=@-]*(?<![./])")


@dataclass(frozen=True)
class CodeAddress:
    """Where a task's code comes from."""

    url: str
    """For git; without credentials."""
    ref: str
    """A branch, a tag or a full SHA; empty: the repository's HEAD."""
    subdirectory: str
    """Where in the repository the task is; empty: at its root."""

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def pinned(self) -> bool:
        """Whether it names one commit, which never moves."""
        return is_sha(self.ref)

    @property
    def key(self) -> str:
        """A name for its directory: readable, and different for each address."""
        name = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(urlsplit(self.url).path).stem.lower()).strip("-")
        digest = hashlib.sha256(f"{self.url}\0{self.ref}\0{self.subdirectory}".encode()).hexdigest()
        return f"{name or 'code'}-{digest[:12]}"

    def __str__(self) -> str:
        below = f" {self.subdirectory}/" if self.subdirectory else ""
        return f"{self.url} {self.ref or 'HEAD'}{below}"


def is_address(where: str) -> bool:
    """Whether *where* means a repository rather than a directory."""
    return "://" in where or where.startswith(PREFIX)


def is_sha(text: str) -> bool:
    """Whether *text* is a whole commit SHA."""
    return _SHA.fullmatch(text) is not None


def parse_address(where: str, *, signed: bool) -> CodeAddress:
    """The address that *where* spells; raises BadCodeSource. *signed*: whether commits will be verified."""
    if not where.startswith(PREFIX):
        raise InvalidCodeSource(
            f"{where!r} is no address of a Git repository: write git+https://host/repository@main"
        )
    try:
        parts = urlsplit(where.removeprefix(PREFIX))
        _ = parts.port
    except ValueError as error:
        raise InvalidCodeSource(f"{_redact_credentials(where)} is no address: {error}") from None
    _check_scheme(parts.scheme, signed=signed)
    _check_authority(parts.scheme, parts.netloc)
    if parts.query:
        raise InvalidCodeSource(
            f"{_redact_credentials(where)} has a query, which no address of a repository has"
        )
    path, at, ref = parts.path.rpartition("@")
    if not at:
        path, ref = parts.path, ""
    elif not (path and _REF.fullmatch(ref)):
        raise InvalidCodeSource(f"{ref!r} can be no branch or tag: write …@main")
    if not path.strip("/"):
        raise InvalidCodeSource(
            f"{_redact_credentials(where)} names no repository: write git+https://host/repository"
        )
    return CodeAddress(f"{parts.scheme}://{parts.netloc}{path}", ref, _subdirectory(parts.fragment))


def _check_scheme(scheme: str, *, signed: bool) -> None:
    if scheme in _SAFE_SCHEMES or (scheme in _UNENCRYPTED_SCHEMES and signed):
        return
    if scheme in _UNENCRYPTED_SCHEMES:
        raise InvalidCodeSource(
            f"git+{scheme}:// says nothing of who answers: use git+https:// or git+ssh://, or give allowed signers"
        )
    raise InvalidCodeSource(
        f"git+{scheme}:// is not understood: use {', '.join(f'git+{one}://' for one in _SAFE_SCHEMES)}"
    )


def _check_authority(scheme: str, authority: str) -> None:
    user, _, host = authority.rpartition("@")
    if ":" in user or (user and scheme != "ssh"):
        raise InvalidCodeSource(
            f"credentials do not belong in the address of {host}: git's credential helper, or an ssh key, has them"
        )
    if scheme == "file" and authority:
        raise InvalidCodeSource(
            "a file on another host cannot be opened: write git+file:///path, with three slashes"
        )
    if scheme != "file" and not re.fullmatch(r"[A-Za-z0-9\[][A-Za-z0-9.:\[\]_-]*", host):
        raise InvalidCodeSource(f"{host!r} is no host: write git+{scheme}://host/repository")
    if user and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", user):
        raise InvalidCodeSource(f"{user!r} is no user name")


def _subdirectory(fragment: str) -> str:
    wishes = dict(parse_qsl(fragment, keep_blank_values=True))
    given = wishes.pop("subdirectory", "")
    if wishes:
        raise InvalidCodeSource(f"#{fragment} is not understood: write #subdirectory=path/of/the/task")
    if fragment and (not given or not all(_is_name(part) for part in given.strip("/").split("/"))):
        raise InvalidCodeSource(f"#{fragment} is no directory inside the repository")
    return given.strip("/")


def _is_name(part: str) -> bool:
    return bool(part) and part not in {".", ".."} and part.lower() != ".git" and "\\" not in part


def _redact_credentials(where: str) -> str:
    return re.sub(r"//[^/@]*@", "//", where)
