"""The address of a code repository, in the format of pip:

    git+https://host/org/repository@main#subdirectory=examples/mnist
    git+ssh://git@host/org/repository.git
    git+file:///srv/git/task.git@stable

``@`` names a branch, a tag or a full SHA; without it, the HEAD of the repository is followed. An address never holds
credentials; the credential helpers of git have them.
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
"""Without authentication of the server; allowed only with signature verification."""

_SHA: Final = re.compile(r"[0-9a-f]{40}")
_REF: Final = re.compile(r"(?!.*(?:\.\.|//|@\{|\.lock(?:/|$)))[A-Za-z0-9_][A-Za-z0-9_./+=@-]*(?<![./])")


@dataclass(frozen=True)
class CodeAddress:
    """A Git repository, a ref and a directory in it."""

    url: str
    """The URL for git, without credentials."""
    ref: str
    """A branch, a tag or a full SHA; empty for HEAD."""
    subdirectory: str
    """The directory of the task in the repository; empty for the root."""

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def is_pinned(self) -> bool:
        """Whether the ref is a commit and never moves."""
        return is_sha(self.ref)

    @property
    def directory_name(self) -> str:
        """A readable directory name, unique for each address."""
        name = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(urlsplit(self.url).path).stem.lower()).strip("-")
        digest = hashlib.sha256(f"{self.url}\0{self.ref}\0{self.subdirectory}".encode()).hexdigest()
        return f"{name or 'code'}-{digest[:12]}"

    def __str__(self) -> str:
        directory = f" {self.subdirectory}/" if self.subdirectory else ""
        return f"{self.url} {self.ref or 'HEAD'}{directory}"


def is_address(source: str) -> bool:
    """Return whether *source* is a repository address and not a directory."""
    return "://" in source or source.startswith(PREFIX)


def is_sha(text: str) -> bool:
    """Return whether *text* is a full commit SHA."""
    return _SHA.fullmatch(text) is not None


def parse_address(source: str, *, signed: bool) -> CodeAddress:
    """Parse *source*. *signed* is True if commits are verified. Raises InvalidCodeSource."""
    if not source.startswith(PREFIX):
        raise InvalidCodeSource(
            f"{source!r} is not the address of a Git repository; write git+https://host/repository@main"
        )
    try:
        parts = urlsplit(source.removeprefix(PREFIX))
        _ = parts.port
    except ValueError as error:
        raise InvalidCodeSource(f"invalid address {_redact_credentials(source)}: {error}") from None
    _check_scheme(parts.scheme, signed=signed)
    _check_authority(parts.scheme, parts.netloc)
    if parts.query:
        raise InvalidCodeSource(f"the address {_redact_credentials(source)} must not have a query")
    path, at, ref = parts.path.rpartition("@")
    if not at:
        path, ref = parts.path, ""
    elif not (path and _REF.fullmatch(ref)):
        raise InvalidCodeSource(f"invalid branch or tag {ref!r}; write …@main")
    if not path.strip("/"):
        raise InvalidCodeSource(
            f"{_redact_credentials(source)} names no repository; write git+https://host/repository"
        )
    return CodeAddress(f"{parts.scheme}://{parts.netloc}{path}", ref, _subdirectory(parts.fragment))


def _check_scheme(scheme: str, *, signed: bool) -> None:
    if scheme in _SAFE_SCHEMES or (scheme in _UNENCRYPTED_SCHEMES and signed):
        return
    if scheme in _UNENCRYPTED_SCHEMES:
        raise InvalidCodeSource(
            f"git+{scheme}:// does not authenticate the server; use git+https:// or git+ssh://, or give allowed signers"
        )
    raise InvalidCodeSource(
        f"unknown scheme git+{scheme}://; use {', '.join(f'git+{safe}://' for safe in _SAFE_SCHEMES)}"
    )


def _check_authority(scheme: str, authority: str) -> None:
    user, _, host = authority.rpartition("@")
    if ":" in user or (user and scheme != "ssh"):
        raise InvalidCodeSource(
            f"the address of {host} must not hold credentials; use a credential helper of git or an SSH key"
        )
    if scheme == "file" and authority:
        raise InvalidCodeSource("a file URL must not have a host; write git+file:///path, with three slashes")
    if scheme != "file" and not re.fullmatch(r"[A-Za-z0-9\[][A-Za-z0-9.:\[\]_-]*", host):
        raise InvalidCodeSource(f"invalid host {host!r}; write git+{scheme}://host/repository")
    if user and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", user):
        raise InvalidCodeSource(f"invalid user name {user!r}")


def _subdirectory(fragment: str) -> str:
    parameters = dict(parse_qsl(fragment, keep_blank_values=True))
    subdirectory = parameters.pop("subdirectory", "")
    if parameters:
        raise InvalidCodeSource(f"invalid fragment #{fragment}; write #subdirectory=path/of/the/task")
    names = subdirectory.strip("/").split("/")
    if fragment and (not subdirectory or not all(map(_is_name, names))):
        raise InvalidCodeSource(f"#{fragment} is not a directory inside the repository")
    return subdirectory.strip("/")


def _is_name(part: str) -> bool:
    return bool(part) and part not in {".", ".."} and part.lower() != ".git" and "\\" not in part


def _redact_credentials(source: str) -> str:
    return re.sub(r"//[^/@]*@", "//", source)
