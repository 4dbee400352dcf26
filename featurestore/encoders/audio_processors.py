"""Checkpoints' own feature extractors of sound: what encoders of sounds share.

Each sound is prepared by itself, in the thread that decodes it. Some extractors draw at random (CLAP cuts a long sound where a
random number says, and marks one of a batch as long): a sound is cut at the extractor's length before it, and nothing is
left to draw.
"""

import json
import threading
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, silent

__all__ = ["MIN_SECONDS", "AudioProcessor"]

FILES = ("preprocessor_config.json", "processor_config.json")
MIN_SECONDS = 0.05
"""A shorter sound is filled up with zeros: of less than a frame no network makes anything."""


class AudioProcessor:
    """Bytes of a sound to features, as a checkpoint's extractor makes them. Loaded with the first sound; safe in threads.

    Attributes:
        settings: what the checkpoint says of it.
        sample_rate: Hz.
        max_seconds: where a sound is cut.
    """

    def __init__(self, owner: CheckpointEncoder, max_seconds: float) -> None:
        self._owner, self._lock = owner, threading.Lock()
        self._extractor: Any = None
        told = next(
            (json.loads(path.read_text("utf-8")) for path in map(owner.folder.joinpath, FILES) if path.is_file()), None
        )
        if told is None:
            raise owner.unfit(f"it says nothing of how sounds are prepared: it lacks {FILES[0]}")
        own = told.get("feature_extractor", told)
        if not isinstance(own.get("sampling_rate"), int) or own["sampling_rate"] < 1:
            raise owner.unfit("its feature extractor states no sampling_rate")
        self.sample_rate: int = own["sampling_rate"]
        longest = own.get("max_length_s") or own.get("chunk_length") or max_seconds
        self.max_seconds = float(min(max_seconds, longest))
        self.settings: dict[str, Any] = {
            "feature_extractor": own,
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

    def _loaded(self) -> Any:
        with self._lock:
            if self._extractor is None:
                from transformers import AutoFeatureExtractor

                with silent(), warnings.catch_warnings():
                    # AST's own 128 mel bands are one more than its frequencies fill.
                    warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
                    try:
                        self._extractor = AutoFeatureExtractor.from_pretrained(
                            self._owner.folder, local_files_only=True, trust_remote_code=False
                        )
                    except (OSError, ValueError, KeyError, ImportError) as error:
                        told = " ".join(str(error).split())[:300]
                        raise self._owner.unfit(f"its feature extractor: {told}") from error
            return self._extractor
