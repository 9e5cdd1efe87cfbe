"""`fedbus model access`: whether anybody may read the models of an S3 without a key."""

from enum import StrEnum
from typing import Annotated

import typer

from fedbus.app.bus_session import run_async
from fedbus.app.cli.commands.model.repository import STORE_TIMEOUT_S, Store, store_address
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json


class AccessMode(StrEnum):
    PUBLIC = "public"
    PRIVATE = "private"


def access(
    who: Annotated[
        AccessMode | None,
        typer.Argument(help="public or private.", show_default="show the current access"),
    ] = None,
    *,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Make the models of an S3 readable without a key, or only with one; or show the current access.

    Public access allows reading only: no listing, no writing. Other rules of the bucket policy stay.
    """
    from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415  # needs the extra
    from fedbus.stores.s3.public_access import is_public, set_public  # noqa: PLC0415

    url = store_address(store)
    if not url.startswith("s3://"):
        raise CliError(
            f"{url} is a directory: who may read it is said by its files' permissions; this is for s3:// addresses",
            ExitCode.USAGE,
        )
    bucket = Bucket(BucketAddress.parse(url), patience_s=STORE_TIMEOUT_S)

    async def change() -> bool:
        async with bucket.open():
            if who is not None:
                await set_public(bucket, public=who is AccessMode.PUBLIC)
            return await is_public(bucket)

    public = run_async(change())
    if json:
        print_json({"store": url, "access": AccessMode.PUBLIC if public else AccessMode.PRIVATE})
    elif public:
        typer.echo(
            f"anybody who reaches {bucket.address} may read its models; to list and to write takes a key"
        )
    else:
        typer.echo(f"only who has a key may read the models of {bucket.address}")
