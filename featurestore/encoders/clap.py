"""Sounds and texts in one space, through the two towers of a CLAP checkpoint.

A view of a field of sounds runs the audio tower, one of texts the text tower; both from one checkpoint share a space without
any learning. A sound is cut at the length that the checkpoint takes (10 s), not at a random place as its extractor would.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.audio_processors import MIN_SECONDS, AudioProcessor
from featurestore.encoders.runtime import stacked, to_device
from featurestore.encoders.towers import TowerEncoder, TowerOptions

__all__ = ["Encoder", "Options"]

MAX_SECONDS = 3600.0


class Options(TowerOptions):
    """Batch 8: on a CPU more gains little."""

    modality: Literal["audio", "text"] = Field(default="audio", description="the tower; a view's is that of its field")


class Encoder(TowerEncoder):
    """Values are features of sounds with their number of samples, str of texts; vectors have length 1."""

    key = "clap"
    modalities = ("audio", "text")
    towers: ClassVar[dict[str, tuple[str, ...]]] = {"audio": ("audio_",), "text": ("text_",)}
    libraries: ClassVar[tuple[str, ...]] = ("safetensors", "tokenizers", "torch", "transformers")
    shortest_s = MIN_SECONDS
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.processor = AudioProcessor(self, MAX_SECONDS) if options.modality == "audio" else None
        self.dim = self.in_config("projection_dim")

    def preprocessing(self) -> dict[str, Any]:
        """Return what the tower does to its values."""
        return {**(self.processor.settings if self.processor else {"padding": "longest"}), "normalise": True}

    def decode(self, raw: bytes) -> Any:
        """Decode a sound and let the checkpoint's extractor do the rest; or strict UTF-8, behind the prompt."""
        return self.options.prompt + media.decode_text(raw) if self.processor is None else self.processor(raw)

    def _features(self, model: Any, values: Sequence[tuple[NDArray[np.float32], int]]) -> Any:
        import torch

        features = to_device(stacked([each for each, _ in values]), model.dtype)
        longer = torch.zeros((len(values), 1), dtype=torch.bool, device=model.device)
        return model.get_audio_features(input_features=features, is_longer=longer)

    def _padding(self) -> dict[str, Any]:
        return {"padding": True}
