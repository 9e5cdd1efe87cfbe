"""`fedbus model bucket`: what a repository in an S3 stands in, made once by whoever may."""

from fedbus.app.cli.commands.model.repository import Store, address_of
from fedbus.app.failures import Exit, Failure


def bucket(*, store: Store = "") -> None:
    """Make the bucket of a repository in an S3; one that is there stays as it is."""
    from fedbus.app.bus_session import now
    from fedbus.stores.models.open import open_store

    url = address_of(store)
    if not url.startswith("s3://"):
        raise Failure(f"{url} is in no S3, and needs no bucket: name one with --store s3://…", Exit.USAGE)
    open_store(url, "any")  # refuses what is no address, and says which packages are missing
    from fedbus.stores.s3.bucket import Address, Bucket

    address = Address.parse(url)
    now(Bucket(address).make())
    print(f"there is a bucket {address.bucket}")
