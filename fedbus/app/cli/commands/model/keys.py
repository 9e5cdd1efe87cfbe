"""`fedbus model keygen`: the key pair that signs models."""

from pathlib import Path
from typing import Annotated

import typer

from fedbus.stores.models.signing import generate_key


def keygen(
    path: Annotated[
        Path,
        typer.Argument(help="File of the private key; the public key is written to the same path with .pub."),
    ] = Path("fedbus.key"),
) -> None:
    """Create the key pair that signs models."""
    public = generate_key(path)
    typer.echo(f"on the server only:  FEDBUS_SIGNING_KEY={path}")
    typer.echo(f"on each device:      FEDBUS_TRUSTED_KEYS={public}")
