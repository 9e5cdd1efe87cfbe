"""`fedbus model bucket`: create the S3 bucket of a model repository."""

from fedbus.app.bus_session import run_async
from fedbus.app.cli.commands.model.repository import Store, store_address
from fedbus.app.failures import CliError, ExitCode
from fedbus.stores.models.open import open_model_store


def bucket(*, store: Store = "") -> None:
    """Create the S3 bucket of a model repository; an existing bucket is not changed."""
    url = store_address(store)
    if not url.startswith("s3://"):
        raise CliError(
            f"{url} is not in S3 and needs no bucket. Name an S3 URL with --store s3://…", ExitCode.USAGE
        )
    open_model_store(url, "any")  # reports an invalid URL and missing packages
    from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415  # needs the extra

    address = BucketAddress.parse(url)
    run_async(Bucket(address).create_bucket())
    print(f"bucket {address.bucket} exists")
