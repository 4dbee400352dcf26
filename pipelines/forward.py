"""The model's forward on decoded values: vectors, and of the values that have none the reason."""

from typing import Any, NamedTuple

import numpy as np

from featurestore.encoders import BaseEncoder
from featurestore.encoders.runtime import lacks_memory
from featurestore.errors import AlignmentError, DecodeError

__all__ = ["Forwarded", "forward"]


class Forwarded(NamedTuple):
    """A vector of each value, or why it has none; and how often a batch was halved because it did not fit into memory."""

    vectors: list[np.ndarray | DecodeError]
    batches_halved: int = 0


def forward(encoder: BaseEncoder, values: list[Any]) -> Forwarded:
    """Vectors of decoded values; a batch that fails as a whole is halved until a value fails alone.

    So is one that memory does not hold, on a GPU or here; a value that it does not hold alone is `out_of_memory`.
    """
    if not values:
        return Forwarded([])
    try:
        encoded = encoder.encode(values)
    except (DecodeError, MemoryError, RuntimeError, ValueError) as error:
        failed, short = _reason(encoder, error), lacks_memory(error)
    else:
        return Forwarded(_vectors(encoder, encoded, len(values)))
    # Behind the handler: until it ends, the error holds what the forward had allocated.
    if len(values) == 1:
        return Forwarded([failed])
    half = len(values) // 2
    first, second = forward(encoder, values[:half]), forward(encoder, values[half:])
    return Forwarded(first.vectors + second.vectors, first.batches_halved + second.batches_halved + short)


def _reason(encoder: BaseEncoder, error: Exception) -> DecodeError:
    if isinstance(error, DecodeError):
        return error.with_traceback(None)
    if lacks_memory(error):
        # Not the allocator's words: its figures are of the moment.
        return DecodeError("out_of_memory", f"{encoder.key} needs more memory than there is for this value alone")
    return DecodeError("encoder_error", str(error)[:500])


def _vectors(encoder: BaseEncoder, encoded: np.ndarray, count: int) -> list[np.ndarray | DecodeError]:
    if encoded.shape != (count, encoder.dim):
        raise AlignmentError(
            f"encoder {encoder.key} gave {encoded.shape} for {count} values; {encoder.dim} values each are expected: the "
            "encoder is wrong"
        )
    finite = np.asarray(np.isfinite(encoded).all(axis=1))
    # Of length 1 it says, and has no direction: it would be near nothing, or near all.
    zero = np.asarray(~encoded.any(axis=1) & encoder.normalised)
    return [
        DecodeError("nan_output", f"{encoder.key} gave NaN or infinity")
        if not whole
        else DecodeError("zero_output", f"{encoder.key} gave a vector of zeros")
        if void
        else vector
        for vector, whole, void in zip(encoded, finite.tolist(), zero.tolist(), strict=True)
    ]
