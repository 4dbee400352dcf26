"""Images and texts in one space, through the two towers of a CLIP or SigLIP checkpoint (also SigLIP 2, Chinese-CLIP and ALIGN).

A view of a field of images runs the image tower, one of texts the text tower; both from one checkpoint share a space without
any learning.

Legend: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.image_processors import ImageProcessor
from featurestore.encoders.runtime import stacked, to_device
from featurestore.encoders.towers import TowerEncoder, TowerOptions

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Encoder", "Options"]


class Options(TowerOptions):
    """Batch 8: on a CPU more gains little."""

    modality: Literal["image", "text"] = Field(default="image", description="the tower; a view's is that of its field")


class Encoder(TowerEncoder):
    """Values are float32 [C, H, W] of images, str of texts; vectors have length 1."""

    key = "clip"
    modalities = ("image", "text")
    towers: ClassVar[dict[str, tuple[str, ...]]] = {"image": ("vision_", "visual_"), "text": ("text_",)}
    libraries: ClassVar[tuple[str, ...]] = ("safetensors", "tokenizers", "torch", "transformers")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.processor = ImageProcessor(self) if options.modality == "image" else None
        is_siglip = str(self.config.get("model_type", "")).startswith("siglip")
        # SigLIP's projection_size is its hidden_size where it is not said; of the others one tells nothing of the other.
        sizes = ("text_config.projection_size", "text_config.hidden_size") if is_siglip else ("projection_dim",)
        self.dim = self.in_config(*sizes)
        # SigLIP was trained on texts that are all of one length, and sees the padding.
        self._pads_to_end = is_siglip

    def preprocessing(self) -> dict[str, Any]:
        """Return what the tower does to its values."""
        if self.processor is not None:
            return {**self.processor.settings, "normalise": True}
        return {
            "padding": "max_length" if self._pads_to_end else "longest",
            "max_tokens": self._max_tokens,
            "normalise": True,
        }

    @property
    def _max_tokens(self) -> int:
        return self.in_config("text_config.max_position_embeddings")

    def decode(self, raw: bytes) -> Any:
        """Decode an image and let the checkpoint's processor do the rest; or strict UTF-8, behind the prompt."""
        if self.processor is None:
            return self.options.prompt + media.decode_text(raw)
        return self.prepare(media.decode_image(raw, smallest_side=self.processor.decode_side))

    def prepare(self, image: "Image.Image") -> NDArray[np.float32]:
        """Let the checkpoint's processor do it all."""
        assert self.processor is not None, "the tower of texts takes no picture"
        return self.processor(image)

    def _features(self, model: Any, values: Sequence[NDArray[np.float32]]) -> Any:
        return model.get_image_features(pixel_values=to_device(stacked(values), model.dtype))

    def _padding(self) -> dict[str, Any]:
        return {"padding": "max_length" if self._pads_to_end else True, "max_length": self._max_tokens}
