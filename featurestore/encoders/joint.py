"""Several fields of a sample at once through one model that reads them together: VisualBERT, LXMERT, Perceiver and IDEFICS.

    views: {both: {fields: [image, caption], encoder: joint, options: {checkpoint: models/idefics}}}

What a checkpoint reads is its architecture's, and so is what it is given for a field that a sample has not:

| `model_type` | reads | for an image (video) | for a text (sound) | the vector |
|---|---|---|---|---|
| `visual_bert` | an image and a text | masked | an empty text | the model's pooled one |
| `lxmert` | an image and a text | regions of zeros, in boxes of zeros | an empty text | the model's pooled one |
| `perceiver` | a video and a sound | masked | masked | the mean of the latents |
| `idefics` | images and texts, in the fields' order | left out of the prompt | left out of the prompt | the last token's |

More of each in joint_regions.py, joint_perceiver.py and joint_idefics.py. A query to such a view is a sample with one field.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions
from featurestore.encoders.joint_idefics import Idefics
from featurestore.encoders.joint_perceiver import Perceiver
from featurestore.encoders.joint_regions import Regions

__all__ = ["Encoder", "Options"]

FAMILIES: dict[str, Any] = {"idefics": Idefics, "lxmert": Regions, "perceiver": Perceiver, "visual_bert": Regions}
"""Model type -> what knows its inputs."""

_SEVERAL = r"(image|text)(\+(image|text))+|video\+audio|audio\+video"


class Options(CheckpointOptions):
    """Batch 4: of IDEFICS, a picture is 257 patches before its first token."""

    batch_size: int = Field(default=4, ge=1, le=4096, description="samples per forward; part of the recipe")
    modality: str = Field(
        default="image+text",
        pattern=f"^({_SEVERAL})$",
        description="of each field in order; a view's are those of its fields",
    )
    image_checkpoint: str | None = Field(
        default=None,
        min_length=1,
        description="of VisualBERT and LXMERT: a vision checkpoint whose patches they read as regions",
    )
    normalise: bool = Field(default=False, description="to length 1")


class Encoder(CheckpointEncoder):
    """Values are tuples of what its fields were decoded to, None for each that is missing."""

    key = "joint"
    modalities = ("image+text", "text+image", "video+audio", "audio+video")
    libraries: ClassVar[tuple[str, ...]] = ("pillow", "safetensors", "tokenizers", "torch", "transformers")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        kind = str(self.config.get("model_type"))
        if kind not in FAMILIES:
            raise self.unfit(f"its model_type is {kind!r}; allowed: {', '.join(FAMILIES)}")
        self._family = FAMILIES[kind](self, options)
        self.dim, self.normalised = self._family.dim, options.normalise

    @classmethod
    def takes(cls, modality: str) -> bool:
        """Images and texts, in any order and number; or a video and a sound."""
        return re.fullmatch(_SEVERAL, modality) is not None

    def preprocessing(self) -> dict[str, Any]:
        """Return what is fed for each field, what for one that is missing, and how a vector is made."""
        return {**self._family.preprocessing(), "normalise": self.normalised}

    def weights(self) -> dict[str, Path]:
        """Return every file of the checkpoint that is read, and of that of images."""
        own: dict[str, Path] = self._family.weights()
        return super().weights() | own

    def address(self) -> dict[str, Any]:
        """Say where the checkpoints are."""
        return {**super().address(), "image_checkpoint": self.options.image_checkpoint}

    def decode(self, raw: bytes) -> Any:
        """Make a sample that has its first field alone."""
        return self.joined([self.decode_field(raw, 0), *[None] * (len(self.reads) - 1)])

    def decode_field(self, raw: bytes, place: int = 0) -> Any:
        """Decode a field as the model takes it, by its modality."""
        return self._family.decode(raw, self.reads[place])

    def joined(self, parts: Sequence[Any]) -> tuple[Any, ...]:
        """Keep what there is."""
        return tuple(parts)

    def encode(self, values: Sequence[tuple[Any, ...]]) -> NDArray[np.float32]:
        """Run the network on one batch of samples."""
        import torch

        loaded = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            vectors_BD = self._family.encode(loaded, values).float()
            if self.normalised:
                vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=1)
            vectors: NDArray[np.float32] = vectors_BD.cpu().numpy()
        return vectors

    def _load(self) -> Any:
        return self._family.load()
