"""What can go wrong with a blob, each with the one who must act."""

from fedbus.contracts.model import BlobRef


class BlobCorrupt(Exception):
    """What *holder* sends is not what the reference says. Nothing of it was kept."""

    def __init__(self, ref: BlobRef, what: str) -> None:
        super().__init__(
            f"blob {ref.sha256[:12]} from {ref.holder} is corrupt: {what}; have it offered again"
        )
        self.ref = ref


class BlobUnavailable(Exception):
    """The blob cannot be had now. *reason* says why, and what to do."""

    def __init__(self, ref: BlobRef, reason: str) -> None:
        super().__init__(f"blob {ref.sha256[:12]} from {ref.holder} cannot be had: {reason}")
        self.ref = ref
        self.reason = reason
