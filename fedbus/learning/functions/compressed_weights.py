"""Compressed updates of the library `functions`: encoded after ``train``, decoded before the aggregation.

A compressed array travels as a vector of bytes under its name. ``encodings`` in the values of the reply has the
encoding of each compressed array.
"""

from typing import Any, Final

import numpy as np

from fedbus.learning.compression import BadEncoding, Encoding, apply_update, encode_update, is_compressible
from fedbus.learning.functions.message_codec import BadContent
from fedbus.learning.functions.updates import Weights

ENCODINGS_KEY: Final = "encodings"


class UpdateCompressor:
    """The encoder of one client, with the errors of its last update."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.errors: Weights = {}
        """The error of each array, for error feedback."""

    def encode(self, weights: Weights, reference: Weights) -> tuple[Weights, dict[str, str]]:
        """Return the arrays to send for *weights*, trained from *reference*, and the encodings of those that have one.

        Arrays without a counterpart of the same shape in *reference*, and arrays of other types than float, stay as
        they are.

        Raises:
            BadEncoding: a value is beyond float32, or NaN.

        """
        sent, encodings, errors = dict(weights), {}, {}
        for name, array in weights.items():
            base = reference.get(name)
            if (
                base is None
                or base.shape != array.shape
                or not (is_compressible(array) and is_compressible(base))
            ):
                continue
            try:
                update = encode_update(self._encoding, array, base, self.errors.get(name))
            except BadEncoding as error:
                raise BadEncoding(f"cannot compress {name!r}: {error}") from None
            sent[name] = np.frombuffer(update.data, np.uint8)
            encodings[name] = self._encoding.name
            errors[name] = update.error
        if self._encoding.error_feedback:
            self.errors = errors
        return sent, encodings


def decode_weights(weights: Weights, encodings: Any, reference: Weights) -> Weights:
    """Return the trained weights of an untrusted reply: *weights*, of which those in *encodings* are compressed.

    Raises:
        BadContent: an array does not fit to that of *reference*, or gives a NaN or infinity.

    """
    if encodings is None:
        return weights
    if not isinstance(encodings, dict):
        raise BadContent(
            f"{ENCODINGS_KEY!r} of the reply is a {type(encodings).__name__} instead of an object"
        )
    decoded = dict(weights)
    for name, encoding in encodings.items():
        data, base = weights.get(name), reference.get(name)
        if data is None or base is None:
            raise BadContent(f"{name!r} is compressed, but there is no such array")
        if data.dtype != np.uint8 or data.ndim != 1:
            raise BadContent(
                f"{name!r} is compressed, but it is {data.dtype}{list(data.shape)} instead of bytes"
            )
        try:
            decoded[name] = apply_update(str(encoding), data.data, base)
        except BadEncoding as error:
            raise BadContent(f"compressed array {name!r}: {error}") from None
    return decoded
