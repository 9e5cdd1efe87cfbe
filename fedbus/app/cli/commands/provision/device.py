"""`fedbus provision key` and `complete`: for a device that creates its own private key."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.cli.commands.provision.common import check_free
from fedbus.app.provision.keys import Key, KeyType
from fedbus.app.provision.kit import complete_kit


def key(
    *,
    out: Annotated[
        Path, typer.Option(help="Write the private key to this file; it stays on this device.")
    ] = Path("device.nk"),
) -> None:
    """On a device: create a key pair and print the public key."""
    pair = Key.generate(KeyType.USER)
    pair.save(check_free(out))
    print(pair.public)


def complete(
    kit: Annotated[Path, typer.Argument(help="The kit's folder.")],
    *,
    key: Annotated[Path, typer.Option(help="File of the device's private key.")] = Path("device.nk"),
) -> None:
    """On a device: add its private key to its kit."""
    client = complete_kit(kit, Key.load(key))
    print(f"the kit of {client} is complete. Set FEDBUS_KIT={kit}")
