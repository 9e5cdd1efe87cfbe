"""What somebody is given to take part: a folder, or the same as one tar file.

client.creds      who it is, and the key that proves it; without the key where the device made its own
ca.pem            whose certificates it believes
settings.env      where the bus is, and the names of the files beside it; FEDBUS_KIT=folder reads it
allowed_signers   who may sign a task's commits, as ssh-keygen knows it
trusted_keys      whose models are served
"""

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.provision.keys import SECRET_MODE, Key, render_credentials, write_secret
from fedbus.contracts.credentials import InvalidCredentials, extract_jwt, parse_user

CREDS: Final = "client.creds"
CA: Final = "ca.pem"
SETTINGS: Final = "settings.env"
ALLOWED_SIGNERS: Final = "allowed_signers"
TRUSTED_KEYS: Final = "trusted_keys"
READABLE_MODE: Final = 0o644


@dataclass(frozen=True)
class Kit:
    """What goes into one."""

    creds: str
    ca: str
    settings: Mapping[str, str]
    allowed_signers: str = ""
    trusted: str = ""

    @property
    def files(self) -> dict[str, str]:
        """Their names and contents; what would be empty is left out, for an empty list is another thing than none."""
        optional = {ALLOWED_SIGNERS: self.allowed_signers, TRUSTED_KEYS: self.trusted}
        given = {name: text for name, text in optional.items() if text}
        names = {ALLOWED_SIGNERS: "FEDBUS_ALLOWED_SIGNERS", TRUSTED_KEYS: "FEDBUS_TRUSTED_KEYS"}
        lines = dict(self.settings) | {"FEDBUS_CREDS": CREDS, "FEDBUS_CA": CA}
        lines |= {names[name]: name for name in given}
        settings = "".join(f"{name}={value}\n" for name, value in lines.items())
        return {CREDS: self.creds, CA: self.ca, SETTINGS: settings, **given}

    def write(self, where: Path, *, anew: bool = False) -> None:
        """Into the folder *where*, or the tar file of that name.

        Raises Failure where there is one, unless it is a kit that is written *anew*.
        """
        if where.exists() and not (anew and is_kit(where)):
            raise CliError(f"{where} is there already: name another place with --out", ExitCode.USAGE)
        if where.suffix == ".tar":
            write_tar(where, self.files)
            return
        for name, text in self.files.items():
            write_file(where / name, text)


def is_kit(where: Path) -> bool:
    """Whether a kit was written to *where*."""
    return (where / SETTINGS).exists() or (where.suffix == ".tar" and where.is_file())


def complete_kit(folder: Path, key: Key) -> str:
    """Put the device's own *key* to the credentials in *folder*; whose they are. Raises Failure."""
    path = folder / CREDS
    try:
        text = path.read_text()
        claims = parse_user(text)
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}", ExitCode.NOT_FOUND) from None
    except InvalidCredentials as error:
        raise CliError(f"{path}: {error}") from None
    if claims.sub != key.public:
        raise CliError(f"the kit is for the key {claims.sub}, and this is {key.public}", ExitCode.USAGE)
    write_secret(path, key.credentials(extract_jwt(text)))
    return claims.name


def pending_credentials(jwt: str) -> str:
    """Credentials that wait for the device's own key."""
    return render_credentials(jwt, "")


def write_file(path: Path, text: str) -> None:
    if path.suffix in (".creds", ".key"):
        write_secret(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_tar(path: Path, files: Mapping[str, str]) -> None:
    """All *files* as one, itself as secret as what is in it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{path.stem}/{name}")
            entry.size = len(text.encode())
            entry.mode = SECRET_MODE if name.endswith((".creds", ".key")) else READABLE_MODE
            tar.addfile(entry, io.BytesIO(text.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(SECRET_MODE)
    path.write_bytes(packed.getvalue())
