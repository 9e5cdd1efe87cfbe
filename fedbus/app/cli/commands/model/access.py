"""`fedbus model access`: public or private read access to the models in an S3 bucket."""

from enum import StrEnum
from typing import Annotated

import typer

from fedbus.app.bus_session import run_async
from fedbus.app.cli.commands.model.repository import STORE_TIMEOUT_S, Store, store_address
from fedbus.app.failures import CliError, ExitCode
from fedbus.app.terminal import output
from fedbus.app.terminal.plain import print_json
from fedbus.stores.models.open import open_model_store


class AccessMode(StrEnum):
    PUBLIC = "public"
    PRIVATE = "private"


def access(
    mode: Annotated[
        AccessMode | None,
        typer.Argument(help="public or private.", show_default="show the current access"),
    ] = None,
    *,
    store: Store = "",
    json: output.JsonOption = False,
) -> None:
    """Allow or forbid reading models in S3 without a key, or show the current access.

    Public access allows reading only: no listing, no writing. Other rules of the bucket policy are kept.
    """
    url = store_address(store)
    if not url.startswith("s3://"):
        raise CliError(
            f"{url} is a directory. Its file permissions control access; this command is for s3:// URLs",
            ExitCode.USAGE,
        )
    open_model_store(url, "any")  # reports an invalid URL and missing packages
    from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415  # needs the extra
    from fedbus.stores.s3.public_access import is_public, set_public  # noqa: PLC0415 - needs the extra

    bucket = Bucket(BucketAddress.parse(url), patience_s=STORE_TIMEOUT_S)

    async def change() -> bool:
        async with bucket.open():
            if mode is not None:
                await set_public(bucket, public=mode is AccessMode.PUBLIC)
            return await is_public(bucket)

    public = run_async(change())
    if json:
        print_json({"store": url, "access": AccessMode.PUBLIC if public else AccessMode.PRIVATE})
    elif public:
        typer.echo(f"public: models in {bucket.address} can be read without a key, but not listed or written")
    else:
        typer.echo(f"private: models in {bucket.address} can only be read with a key")
