"""`fedbus provision key` and `complete`: on a device that keeps its own secret key."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.app.cli.commands.provision.common import check_free
from fedbus.app.provision.keys import Key, KeyType
from fedbus.app.provision.kit import complete_kit as completed


def key(
    *,
    out: Annotated[Path, typer.Option(help="Where the secret key goes; it stays on this device.")] = Path(
        "device.nk"
    ),
) -> None:
    """On a device: make its own key, and print the public one, which is all that leaves it."""
    made = Key.new(KeyType.USER)
    made.save(check_free(out))
    print(made.public)


def complete(
    kit: Annotated[Path, typer.Argument(help="The kit's folder.")],
    *,
    key: Annotated[Path, typer.Option(help="The device's own secret key.")] = Path("device.nk"),
) -> None:
    """On a device: put its own key to the kit that was made for it."""
    print(f"the kit of {completed(kit, Key.read(key))} is complete: set FEDBUS_KIT={kit}")
