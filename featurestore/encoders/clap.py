"""Sounds and texts in one space, through the two towers of a CLAP checkpoint.

A view of a field of sounds runs the audio tower, one of texts the text tower; both from one checkpoint share a space without
any learning. A sound is cut at the length that the checkpoint takes (10 s), not at a random place as its extractor would.

Legend: B batch, D features.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.audio_processors import MIN_SECONDS, AudioProcessor
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions, tokenizer_of

__all__ = ["Encoder", "Options"]

TOWERS = {"audio": "audio_", "text": "text_"}
"""Beginnings of the names of a tower's parts."""
MAX_SECONDS = 3600.0


class Options(CheckpointOptions):
    """Batch 8: on a CPU more gains little."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="values per forward; part of the recipe")
    modality: Literal["audio", "text"] = Field(default="audio", description="the tower; a view's is that of its field")
    prompt: str = Field(default="", description="stands before each text, e.g. 'the sound of '")


class Encoder(CheckpointEncoder):
    """Values are features of sounds with their number of samples, str of texts; vectors have length 1."""

    key = "clap"
    modalities = ("audio", "text")
    libraries: ClassVar[tuple[str, ...]] = ("safetensors", "soundfile", "soxr", "tokenizers", "torch", "transformers")
    normalised = True
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

    def length(self, value: Any) -> int:
        """Return a text's number of characters; features of sounds are of one size."""
        return len(value) if isinstance(value, str) else 0

    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """Run one tower on a batch and normalise."""
        import torch

        model, tokenizer = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            if tokenizer is None:
                features = torch.from_numpy(np.stack([each for each, _ in values])).to(model.device, model.dtype)
                longer = torch.zeros((len(values), 1), dtype=torch.bool, device=model.device)
                output = model.get_audio_features(input_features=features, is_longer=longer)
            else:
                tokens = tokenizer(list(values), padding=True, truncation=True, return_tensors="pt").to(model.device)
                output = model.get_text_features(**tokens)
            vectors_BD = torch.nn.functional.normalize(output.pooler_output.float(), dim=1)
            vectors: NDArray[np.float32] = vectors_BD.cpu().numpy()
        return vectors

    def _load(self) -> Any:
        tokenizer = tokenizer_of(self) if self.options.modality == "text" else None
        model = self.model("AutoModel")
        (other,) = TOWERS.keys() - {self.options.modality}
        for name in [name for name, _ in model.named_children() if name.startswith(TOWERS[other])]:
            delattr(model, name)
        return model, tokenizer
