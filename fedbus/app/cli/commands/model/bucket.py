"""`fedbus model bucket`: what a repository in an S3 stands in, made once by whoever may."""

from fedbus.app.bus_session import run_async
from fedbus.app.cli.commands.model.repository import Store, store_address
from fedbus.app.failures import CliError, ExitCode
from fedbus.stores.models.open import open_model_store


def bucket(*, store: Store = "") -> None:
    """Create the bucket of a repository in an S3; an existing bucket stays unchanged."""
    url = store_address(store)
    if not url.startswith("s3://"):
        raise CliError(
            f"{url} is in no S3, and needs no bucket: name one with --store s3://…", ExitCode.USAGE
        )
    open_model_store(url, "any")  # refuses what is no address, and says which packages are missing
    from fedbus.stores.s3.bucket import Bucket, BucketAddress  # noqa: PLC0415  # needs the extra

    address = BucketAddress.parse(url)
    run_async(Bucket(address).make())
    print(f"there is a bucket {address.bucket}")
