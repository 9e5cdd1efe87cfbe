"""`fedbus model keygen`: the key that models are signed with."""

from pathlib import Path
from typing import Annotated

import typer


def keygen(
    path: Annotated[
        Path, typer.Argument(help="Where to; the public part is written beside it, as .pub.")
    ] = Path("fedbus.key"),
) -> None:
    """Make a key that the server signs its models with."""
    from fedbus.stores.models.signing import generate_key

    public = generate_key(path)
    typer.echo(f"the server's, and nobody else's:  FEDBUS_SIGNING_KEY={path}")
    typer.echo(f"the devices':                     FEDBUS_TRUSTED_KEYS={public}")
