"""The model's forward on decoded values: vectors, and of the values that have none the reason."""

from typing import Any

import numpy as np

from featurestore.encoders import BaseEncoder
from featurestore.errors import AlignmentError, DecodeError

__all__ = ["forward"]


def forward(encoder: BaseEncoder, values: list[Any]) -> list[np.ndarray | DecodeError]:
    """Vectors of decoded values; where a batch fails as a whole, each value is tried alone."""
    if not values:
        return []
    try:
        encoded = encoder.encode(values)
    except (RuntimeError, ValueError) as error:
        if len(values) == 1:
            return [DecodeError("encoder_error", str(error)[:500])]
        return [vector for value in values for vector in forward(encoder, [value])]
    if encoded.shape != (len(values), encoder.dim):
        raise AlignmentError(
            f"encoder {encoder.key} gave {encoded.shape} for {len(values)} values; {encoder.dim} values each are expected: the "
            "encoder is wrong"
        )
    finite = np.asarray(np.isfinite(encoded).all(axis=1))
    return [
        vector if ok else DecodeError("nan_output", f"{encoder.key} gave NaN or infinity")
        for vector, ok in zip(encoded, finite.tolist(), strict=True)
    ]
