"""Exceptions of blob transfers."""

from fedbus.contracts.model import BlobRef


class BlobError(Exception):
    """The transfer of the blob *ref* failed."""

    def __init__(self, ref: BlobRef, what: str) -> None:
        super().__init__(f"blob {ref.sha256[:12]} from {ref.holder} {what}")
        self.ref = ref


class BlobCorrupt(BlobError):
    """The sender sends content that does not match the reference; nothing was stored."""

    def __init__(self, ref: BlobRef, what: str) -> None:
        super().__init__(ref, f"is corrupt: {what}; the sender must offer it again")


class BlobUnavailable(BlobError):
    """The blob is not available now; *reason* contains the cause and the remedy."""

    def __init__(self, ref: BlobRef, reason: str) -> None:
        super().__init__(ref, f"is unavailable: {reason}")
        self.reason = reason
