"""Every encoder as a Beam `ModelHandler`, for people's own RunInference pipelines.

    handler = as_model_handler("clip", {"checkpoint": "models/clip", "modality": "image"})
    vectors = images | RunInference(handler)                       # bytes -> float32 [dim], or a reason
    vectors = named | RunInference(KeyedModelHandler(handler))     # (key, bytes) -> (key, float32 [dim] or a reason)

Braid's own jobs encode whole shards instead (encode.py): there reading, decoding and the model overlap.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler
from numpy.typing import NDArray

from featurestore import encoders
from featurestore.encoders import BaseEncoder
from featurestore.errors import AlignmentError, DecodeError, InputError
from pipelines.forward import forward

__all__ = ["EncoderModelHandler", "as_model_handler"]


def as_model_handler(
    encoder: str | BaseEncoder, options: Mapping[str, Any] | None = None, large_model: bool = False
) -> "EncoderModelHandler":
    """An encoder for Beam's RunInference.

    Args:
        encoder: its key, or one that was made.
        options: of a key, what its `Options` allows.
        large_model: one copy of the weights on a machine, whatever the number of Beam's worker processes there. Decoded values
            then go to that copy by a socket of the machine that reads pickles (Beam's `MultiProcessShared`): not for a machine
            that others use too. Weights in safetensors that are computed with on a CPU as they are need no such copy: they are
            memory-mapped, and one in memory anyhow.

    Raises:
        InputError: no such encoder, or an option that it does not have or allow.
    """
    if isinstance(encoder, BaseEncoder):
        if options is not None:
            raise InputError(f"options {dict(options)} beside an encoder that is made: give them to encoders.find")
        made = encoder
    else:
        made = encoders.find(encoder, options)
    return EncoderModelHandler(made, large_model)


class Loaded(Protocol):
    """What `load_model` gives: its methods alone can be called, as it may be another process's."""

    def vectors(self, values: list[Any]) -> list[NDArray[np.float32] | DecodeError]:
        """Of decoded values."""


Raw = bytes | tuple[bytes | None, ...]
"""Of one value; of an encoder that reads several fields at once a value of each, None where it is missing."""


class EncoderModelHandler(ModelHandler[Raw, NDArray[np.float32] | str, Loaded]):
    """Raw bytes of one value -> its vector, float32 [dim], or the reason why it has none, as a quarantine gives it.

    A value that cannot be decoded, or that the model fails on, or whose vector is none (`nan_output`, `zero_output`), is alone
    in that: its batch goes on. Batches are of the encoder's `batch_size`, the last of a bundle smaller. Pickled, it is the
    encoder's name, options and fingerprint.

    Metrics, beside RunInference's own, in the namespace `encode <key>`: counter `rejected`.
    """

    def __init__(self, encoder: BaseEncoder, large_model: bool) -> None:
        super().__init__(min_batch_size=encoder.batch_size, max_batch_size=encoder.batch_size, large_model=large_model)
        self.key, self.fingerprint = encoder.key, encoder.fingerprint()
        self.options = encoder.options.model_dump(mode="json", exclude_unset=True)

    def load_model(self) -> Loaded:
        """Makes the encoder and loads its model.

        Raises:
            AlignmentError: its fingerprint is another one here than where the handler was made.
        """
        encoder = encoders.find(self.key, self.options)
        if (found := encoder.fingerprint()) != self.fingerprint:
            raise AlignmentError(
                f"encoder {self.key} has another fingerprint on this worker ({found[:16]}…) than where the pipeline was made "
                f"({self.fingerprint[:16]}…): install the same versions of its libraries and weights on both"
            )
        encoder.load()
        return _Loaded(encoder)

    def run_inference(
        self, batch: Sequence[Raw], model: Loaded, inference_args: dict[str, Any] | None = None
    ) -> list[NDArray[np.float32] | str]:
        """One outcome a value, in order."""
        decoder = _decoder(self.key, json.dumps(self.options, sort_keys=True))
        outcomes = list(_threads().map(partial(_decoded, decoder), batch))
        good = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, DecodeError)]
        for place, vector in zip(good, model.vectors([outcomes[place] for place in good]), strict=True):
            outcomes[place] = vector
        rejected = sum(isinstance(outcome, DecodeError) for outcome in outcomes)
        Metrics.counter(self.get_metrics_namespace(), "rejected").inc(rejected)
        return [outcome.reason if isinstance(outcome, DecodeError) else outcome for outcome in outcomes]

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """What an encoder does is its options."""
        if inference_args:
            raise InputError(
                f"inference_args {inference_args}: an encoder takes none; give options to as_model_handler"
            )

    def get_num_bytes(self, batch: Sequence[Raw]) -> int:
        """Of the raw values."""
        return sum(len(raw) for value in batch for raw in _raws(value) if raw is not None)

    def get_metrics_namespace(self) -> str:
        """One an encoder, so that two in a pipeline are told apart."""
        return f"encode {self.key}"


class _Loaded:
    def __init__(self, encoder: BaseEncoder) -> None:
        self._encoder = encoder

    def vectors(self, values: list[Any]) -> list[NDArray[np.float32] | DecodeError]:
        # A row of the batch's matrix would keep all of it.
        made = forward(self._encoder, values).vectors
        return [each if isinstance(each, DecodeError) else np.array(each, np.float32) for each in made]


def _raws(value: Raw) -> tuple[bytes | None, ...]:
    return value if isinstance(value, tuple) else (value,)


def _decoded(encoder: BaseEncoder, value: Raw) -> Any:
    raws = _raws(value)
    if len(raws) != len(encoder.reads) or not any(raw is not None for raw in raws):
        raise InputError(f"encoder {encoder.key} reads {encoder.modality}: give the bytes of each, and of one at least")
    try:
        return encoder.joined([None if raw is None else encoder.decode_field(raw, at) for at, raw in enumerate(raws)])
    except DecodeError as error:
        return error


@lru_cache(maxsize=16)
def _decoder(key: str, options: str) -> BaseEncoder:
    """An encoder to decode with, which needs no model: the one that has it may be in another process."""
    return encoders.find(key, json.loads(options))


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Of this process, whatever the number of handlers: a runner gives one batch at a time."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")
