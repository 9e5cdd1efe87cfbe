"""What the commands of `fedbus provision` share."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.failures import CliError, ExitCode
from fedbus.app.provision.federation import Federation
from fedbus.app.settings import Settings

TrustFolder = Annotated[
    Path | None,
    typer.Option("--trust", help="The folder with the federation's keys.", show_default="FEDBUS_HOME/trust"),
]


Days = Annotated[
    float, typer.Option(min=0, help="How long the credentials are good; 0: until they are revoked.")
]


Out = Annotated[
    Path | None,
    typer.Option(help="Where the kit goes: a folder, or a file NAME.tar.", show_default="kits/ID"),
]


PublicKey = Annotated[
    str, typer.Option(help="The device's own public key (U…): then the secret one never leaves the device.")
]


Host = Annotated[
    list[str] | None, typer.Option(help="A name or address by which the server is reached; may be repeated.")
]


def trust_folder(given: Path | None) -> Path:
    return (given or Settings.from_environment().home / "trust").absolute()


def open_federation(given: Path | None) -> Federation:
    return Federation.open(trust_folder(given))


def check_free(path: Path) -> Path:
    if path.exists():
        raise CliError(
            f"{path} is there already: move it away, or name another place with --out", ExitCode.USAGE
        )
    return path


def print_kit_steps(name: str, where: Path, use: str, *, waits: bool) -> None:
    print(f"the kit of {name} is {where}: bring it there by a way that nobody else reads, for it is secret")
    folder = where.stem if where.suffix == ".tar" else where.name
    unpacked = f"tar xf {where.name} && " if where.suffix == ".tar" else ""
    there = "there, in the folder where you put it:"
    if waits:
        print(f"{there} {unpacked}fedbus provision complete {folder} --key device.nk")
    else:
        print(f"{there} {unpacked}FEDBUS_KIT={folder} {use}")


def print_site_steps(name: str, where: Path, federation: Federation) -> None:
    site = federation.record.sites[name]
    print(
        f"the folder of site {name} is {where}: bring it there by a way that nobody else reads, for it is secret"
    )
    print(f"start it there:  nats-server -c {Path(site.directory) / 'leaf.conf'}")
    client = site.clients[0]
    print(
        f"its devices:     FEDBUS_KIT={client} FEDBUS_NATS_URL=tls://{site.hosts[0]}:{site.port} "
        f"fedbus client up {client}"
    )
