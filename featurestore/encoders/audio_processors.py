"""Checkpoints' own feature extractors of sound: what encoders of sounds share.

Each sound is prepared by itself, in the thread that decodes it. Some extractors draw at random (CLAP cuts a long sound where a
random number says, and marks one of a batch as long): a sound is cut at the extractor's length before it, and nothing is
left to draw.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, silent
from featurestore.encoders.processors import Processor

__all__ = ["MIN_SECONDS", "AudioProcessor"]

MIN_SECONDS = 0.05
"""A shorter sound is filled up with zeros: of less than a frame no network makes anything."""


class AudioProcessor(Processor):
    """Bytes of a sound to features, as a checkpoint's extractor makes them.

    Attributes:
        settings: what the checkpoint says of it, and what is done before.
        sample_rate: Hz.
        max_seconds: where a sound is cut.
    """

    values, name, auto = "sounds", "feature_extractor", "AutoFeatureExtractor"

    def __init__(self, owner: CheckpointEncoder, max_seconds: float) -> None:
        super().__init__(owner)
        if not isinstance(self.own.get("sampling_rate"), int) or self.own["sampling_rate"] < 1:
            raise owner.unfit("its feature extractor states no sampling_rate")
        self.sample_rate: int = self.own["sampling_rate"]
        longest = self.own.get("max_length_s") or self.own.get("chunk_length") or max_seconds
        self.max_seconds = float(min(max_seconds, longest))
        self.settings: dict[str, Any] = {
            "feature_extractor": self.own,
            "max_seconds": self.max_seconds,
            "resampler": "soxr HQ",
        }

    def __call__(self, raw: bytes) -> tuple[NDArray[np.float32], int]:
        """The features, float32 of the extractor's shape, and how many samples they are of.

        Raises:
            DecodeError: the bytes are no sound.
        """
        samples = media.decode_audio(raw, self.sample_rate, self.max_seconds)
        samples = samples[: round(self.max_seconds * self.sample_rate)]
        samples = np.pad(samples, (0, max(0, round(MIN_SECONDS * self.sample_rate) - len(samples))))
        with silent():
            made = self._loaded()(samples, sampling_rate=self.sample_rate, return_tensors="np")
        name = next(each for each in ("input_values", "input_features") if each in made)
        features: NDArray[np.float32] = np.asarray(made[name][0], np.float32)
        return features, len(samples)

    def _read(self) -> Any:
        with warnings.catch_warnings():
            # AST's own 128 mel bands are one more than its frequencies fill.
            warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
            return super()._read()
