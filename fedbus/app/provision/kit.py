"""The kit of a device or a user: a folder, or a tar file of it.

client.creds      JWT and key; without the key if the device has created its own
ca.pem            CA certificate
settings.env      URL of nats-server and the names of these files; read with FEDBUS_KIT=folder
allowed_signers   allowed signers of the task's commits, in the format of ssh-keygen
trusted_keys      public keys; only models signed by one of them are served
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
    """The contents of a kit."""

    creds: str
    ca: str
    settings: Mapping[str, str]
    allowed_signers: str = ""
    trusted_keys: str = ""

    @property
    def files(self) -> dict[str, str]:
        """Names and contents. An empty list of signers or keys is left out: it would deny all."""
        optional = {ALLOWED_SIGNERS: self.allowed_signers, TRUSTED_KEYS: self.trusted_keys}
        present = {name: text for name, text in optional.items() if text}
        names = {ALLOWED_SIGNERS: "FEDBUS_ALLOWED_SIGNERS", TRUSTED_KEYS: "FEDBUS_TRUSTED_KEYS"}
        lines = dict(self.settings) | {"FEDBUS_CREDS": CREDS, "FEDBUS_CA": CA}
        lines |= {names[name]: name for name in present}
        settings = "".join(f"{name}={value}\n" for name, value in lines.items())
        return {CREDS: self.creds, CA: self.ca, SETTINGS: settings, **present}

    def write(self, where: Path, *, replace: bool = False) -> None:
        """Write the kit into the folder *where*, or into the tar file *where*.

        Raises:
            CliError: *where* exists, and is not a kit that may be replaced.

        """
        if where.exists() and not (replace and is_kit(where)):
            raise CliError(f"{where} already exists. Choose another path with --out", ExitCode.USAGE)
        if where.suffix == ".tar":
            write_tar(where, self.files)
            return
        for name, text in self.files.items():
            write_file(where / name, text)


def is_kit(where: Path) -> bool:
    """Return whether *where* is a kit: a folder with settings, or a tar file."""
    return (where / SETTINGS).exists() or (where.suffix == ".tar" and where.is_file())


def complete_kit(folder: Path, key: Key) -> str:
    """Add the device's own *key* to the credentials in *folder*, and return their name.

    Raises:
        CliError: The credentials cannot be read, or are for another key.

    """
    path = folder / CREDS
    try:
        text = path.read_text()
        claims = parse_user(text)
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}", ExitCode.NOT_FOUND) from None
    except InvalidCredentials as error:
        raise CliError(f"{path}: {error}") from None
    if claims.sub != key.public:
        raise CliError(f"the kit is for the key {claims.sub}, not for this key, {key.public}", ExitCode.USAGE)
    write_secret(path, key.render_credentials(extract_jwt(text)))
    return claims.name


def pending_credentials(jwt: str) -> str:
    """Render credentials without the key, which the device adds."""
    return render_credentials(jwt, "")


def write_file(path: Path, text: str) -> None:
    if path.suffix in (".creds", ".key"):
        write_secret(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_tar(path: Path, files: Mapping[str, str]) -> None:
    """Write *files* as a tar file of mode 600."""
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
