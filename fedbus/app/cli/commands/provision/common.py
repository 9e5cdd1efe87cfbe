"""Options, checks and printed instructions that the commands of `fedbus provision` share."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.provision.federation import Federation
from fedbus.app.settings import Settings

TrustFolder = Annotated[
    Path | None,
    typer.Option("--trust", help="Folder with the keys of the federation.", show_default="FEDBUS_HOME/trust"),
]


Days = Annotated[float, typer.Option(min=0, help="Validity of the credentials in days; 0: no expiry.")]


Out = Annotated[
    Path | None,
    typer.Option(help="Write the kit to this folder, or to a file NAME.tar.", show_default="kits/ID"),
]


PublicKey = Annotated[
    str,
    typer.Option(
        help="Public key of the device (U…), from `fedbus provision key`. Its private key stays on the device."
    ),
]


Host = Annotated[
    list[str] | None,
    typer.Option(
        help="Host name or IP address of nats-server. Repeatable.", show_default="localhost, 127.0.0.1"
    ),
]


def trust_folder(folder: Path | None) -> Path:
    return (folder or Settings.from_environment().home / "trust").absolute()


def open_federation(folder: Path | None) -> Federation:
    return Federation.open(trust_folder(folder))


def check_free(path: Path) -> Path:
    if path.exists():
        raise CliError(f"{path} already exists. Move it, or choose another path with --out", ExitCode.USAGE)
    return path


def print_kit_steps(name: str, path: Path, use: str, *, needs_key: bool) -> None:
    """Print how to install the kit; *use* is the command to run with it."""
    print(f"the kit of {name} is {path}. It contains a private key: copy it over an encrypted channel")
    folder = path.stem if path.suffix == ".tar" else path.name
    unpacked = f"tar xf {path.name} && " if path.suffix == ".tar" else ""
    start = "on the device, in the folder of the copy:"
    if needs_key:
        print(f"{start} {unpacked}fedbus provision complete {folder} --key device.nk")
    else:
        print(f"{start} {unpacked}FEDBUS_KIT={folder} {use}")


def print_site_steps(name: str, path: Path, federation: Federation) -> None:
    """Print how to install the leaf node of a site."""
    site = federation.registry.sites[name]
    print(f"the folder of site {name} is {path}. It contains private keys: copy it over an encrypted channel")
    print(f"start the leaf node:  nats-server -c {Path(site.directory) / 'leaf.conf'}")
    client = site.clients[0]
    print(
        f"start a client:       FEDBUS_KIT={client} FEDBUS_NATS_URL=tls://{site.hosts[0]}:{site.port} "
        f"fedbus client up {client}"
    )
