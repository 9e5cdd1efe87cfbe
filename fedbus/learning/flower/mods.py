"""Mods of a Flower ClientApp that compress its updates.

    from fedbus.learning.flower.mods import int8

    app = ClientApp(mods=[int8()])

Strategies need no change: the server side decodes an update before a strategy gets it. Put the mod first, so that it
runs after the others. ``[tool.fedbus.compression]`` does the same without a change of the app.

Under Flower's own simulation (``flwr run``), the arrays have the loss of the encoding and the size of float32.
"""

from typing import Final

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedbus.contracts.round_messages import is_training
from fedbus.learning.compression import Bf16, Encoding, Int8, TopK
from fedbus.learning.flower.compressed_records import compress_records, copy_array_records
from fedbus.learning.flower.private_api import KEY_CLIPPING_NORM, SECAGG_CONFIGS

__all__ = ["bf16", "compression_mod", "int8", "top_k"]

_SECAGG_ADVICE: Final = (
    "updates cannot be compressed with secure aggregation, which sums masked integers. Remove the compression"
)
_CLIPPING_ADVICE: Final = (
    "updates cannot be compressed with clipping on the client: the encoded update may exceed the clipping norm, on "
    "which the noise depends. Clip on the server, with DifferentialPrivacyServerSideFixedClipping or …AdaptiveClipping"
)


def bf16() -> Mod:
    """Return a mod that sends updates as bfloat16: half the bytes of float32."""
    return compression_mod(Bf16())


def int8(*, error_feedback: bool = True) -> Mod:
    """Return a mod that sends updates as 8-bit integers with one scale for each array: a quarter of float32."""
    return compression_mod(Int8(error_feedback=error_feedback))


def top_k(share: float = 0.01, *, error_feedback: bool = True) -> Mod:
    """Return a mod that sends the *share* of each array's changes with the largest magnitude: ``2 · share`` of float32.

    Without *error_feedback* the client forgets the changes that it does not send.
    """
    return compression_mod(TopK(share=share, error_feedback=error_feedback))


def compression_mod(encoding: Encoding) -> Mod:
    """Return a mod that compresses the replies to training messages. It keeps its state in ``context.state``."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not is_training(message.metadata.message_type):
            return call_next(message, context)
        if SECAGG_CONFIGS in message.content:
            raise ValueError(_SECAGG_ADVICE)
        if any(KEY_CLIPPING_NORM in record for record in message.content.config_records.values()):
            raise ValueError(_CLIPPING_ADVICE)
        sent = copy_array_records(message.content)  # the app may change its message
        reply = call_next(message, context)
        if not reply.has_error():
            compress_records(reply.content, sent, context.state, encoding)
        return reply

    return mod
