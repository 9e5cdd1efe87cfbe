"""What can go wrong with a blob, each with the one who must act."""

from fedbus.contracts.model import BlobRef


class BlobError(Exception):
    """A blob was not had; *ref* says which."""

    def __init__(self, ref: BlobRef, what: str) -> None:
        super().__init__(f"blob {ref.sha256[:12]} from {ref.holder} {what}")
        self.ref = ref


class BlobCorrupt(BlobError):
    """What the holder sends is not what the reference says. Nothing of it was kept."""

    def __init__(self, ref: BlobRef, what: str) -> None:
        super().__init__(ref, f"is corrupt: {what}; have it offered again")


class BlobUnavailable(BlobError):
    """The blob cannot be had now. *reason* says why, and what to do."""

    def __init__(self, ref: BlobRef, reason: str) -> None:
        super().__init__(ref, f"cannot be had: {reason}")
        self.reason = reason
