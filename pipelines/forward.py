"""The model's forward on decoded values: vectors, and of the values that have none the reason."""

from typing import Any, NamedTuple

import numpy as np

from featurestore.encoders import BaseEncoder, contract
from featurestore.encoders.runtime import lacks_memory
from featurestore.errors import AlignmentError, BraidError, DecodeError, InputError

__all__ = ["Forwarded", "forward"]


class Forwarded(NamedTuple):
    """A vector of each value, or why it has none; and how often a batch was halved because it did not fit into memory."""

    vectors: list[np.ndarray | DecodeError]
    batches_halved: int = 0


def forward(encoder: BaseEncoder, values: list[Any]) -> Forwarded:
    """Vectors of decoded values; a batch that fails as a whole is halved until a value fails alone.

    So is one that memory does not hold, on a GPU or here; a value that it does not hold alone is `out_of_memory`. What else the
    model raises on a value alone, of whatever class, is that value's `encoder_error`.

    Raises:
        InputError: it raises on every one of the values, and on a plain one too: the encoder is at fault, not what it is given.
    """
    raised: list[str] = []
    made = _halved(encoder, values, raised)
    if values and len(raised) == len(values):
        _try_plain(encoder, raised[0])
    return made


def _halved(encoder: BaseEncoder, values: list[Any], raised: list[str]) -> Forwarded:
    """As `forward`; what the model raises on a value alone is told in `raised` too."""
    if not values:
        return Forwarded([])
    try:
        encoded = encoder.encode(values)
    except DecodeError as error:
        failed, short, told = error.with_traceback(None), False, ""
    except BraidError:
        raise
    except Exception as error:
        short, told = lacks_memory(error), _told(error)
        # Not the allocator's words: its figures are of the moment.
        failed = (
            DecodeError("out_of_memory", f"{encoder.key} needs more memory than there is for this value alone")
            if short
            else DecodeError("encoder_error", told)
        )
    else:
        return Forwarded(_vectors(encoder, encoded, len(values)))
    # Behind the handler: until it ends, the error holds what the forward had allocated.
    if len(values) == 1:
        raised += [told] if failed.reason == "encoder_error" and told else []
        return Forwarded([failed])
    half = len(values) // 2
    first, second = _halved(encoder, values[:half], raised), _halved(encoder, values[half:], raised)
    return Forwarded(first.vectors + second.vectors, first.batches_halved + second.batches_halved + short)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _try_plain(encoder: BaseEncoder, told: str) -> None:
    """Raises InputError where the model raises on one of the values that every encoder of its modality takes."""
    try:
        value = contract.decoded(encoder, contract.samples(encoder)[0])
    except Exception:
        # As a sensor's of other channels: then the failure budget alone is the guard.
        return
    try:
        encoder.encode([value])
    except BraidError:
        return
    except Exception as error:
        if lacks_memory(error):
            return
        raise InputError(
            f"encoder {encoder.key} ({encoder.source}) fails on every value of a batch, the first with {told!r}, and on a "
            f"plain {encoder.modality} too, with {_told(error)!r}: correct the encoder, or take a checkpoint that is whole"
        ) from error


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
