"""The model's forward on decoded values: vectors, and of the values that have none the reason."""

from typing import Any

import numpy as np

from featurestore.encoders import BaseEncoder
from featurestore.errors import AlignmentError, DecodeError

__all__ = ["forward"]


def forward(encoder: BaseEncoder, values: list[Any]) -> list[np.ndarray | DecodeError]:
    """Vectors of decoded values; a batch that fails as a whole is halved until a value fails alone."""
    if not values:
        return []
    try:
        encoded = encoder.encode(values)
    except (DecodeError, RuntimeError, ValueError) as error:
        if len(values) == 1:
            return [error if isinstance(error, DecodeError) else DecodeError("encoder_error", str(error)[:500])]
        half = len(values) // 2
        return forward(encoder, values[:half]) + forward(encoder, values[half:])
    if encoded.shape != (len(values), encoder.dim):
        raise AlignmentError(
            f"encoder {encoder.key} gave {encoded.shape} for {len(values)} values; {encoder.dim} values each are expected: the "
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
