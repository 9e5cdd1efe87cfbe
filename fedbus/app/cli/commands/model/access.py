"""`fedbus model access`: whether anybody may read the models of an S3 without a key."""

from enum import StrEnum
from typing import Annotated

import typer

from fedbus.app.cli.commands.model.repository import PATIENCE_S, Store, address_of
from fedbus.app.failures import Exit, Failure
from fedbus.app.terminal import output


class Who(StrEnum):
    PUBLIC = "public"
    PRIVATE = "private"


def access(
    who: Annotated[
        Who | None, typer.Argument(help="public or private.", show_default="tell which it is now")
    ] = None,
    *,
    store: Store = "",
    json: output.AsJson = False,
) -> None:
    """Let anybody read the models of an S3, or only who has a key; or tell which is so.

    Reading is all that anybody may then: no listing, no writing. Other rules of the bucket's policy stay.
    """
    from fedbus.app.bus_session import now
    from fedbus.stores.s3.bucket import Address, Bucket
    from fedbus.stores.s3.public_access import is_public, set_public

    url = address_of(store)
    if not url.startswith("s3://"):
        raise Failure(
            f"{url} is a directory: who may read it is said by its files' permissions; this is for s3:// addresses",
            Exit.USAGE,
        )
    bucket = Bucket(Address.parse(url), patience_s=PATIENCE_S)

    async def change() -> bool:
        async with bucket.open():
            if who is not None:
                await set_public(bucket, public=who is Who.PUBLIC)
            return await is_public(bucket)

    public = now(change())
    if json:
        output.as_json({"store": url, "access": Who.PUBLIC if public else Who.PRIVATE})
    elif public:
        typer.echo(
            f"anybody who reaches {bucket.address} may read its models; to list and to write takes a key"
        )
    else:
        typer.echo(f"only who has a key may read the models of {bucket.address}")
