"""Images and texts in one space, through the two towers of a CLIP or SigLIP checkpoint (also SigLIP 2, Chinese-CLIP and ALIGN).

A view of a field of images runs the image tower, one of texts the text tower; both from one checkpoint share a space without
any learning. The tower that is not asked for is not kept in memory.

Legend: B batch, C channels, H height, W width, D features.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions, tokenizer_of
from featurestore.encoders.image_processors import ImageProcessor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Encoder", "Options"]

TOWERS = {"image": ("vision_", "visual_"), "text": ("text_",)}
"""Beginnings of the names of a tower's parts."""


class Options(CheckpointOptions):
    """Batch 8: on a CPU more gains little."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="values per forward; part of the recipe")
    modality: Literal["image", "text"] = Field(default="image", description="the tower; a view's is that of its field")
    prompt: str = Field(default="", description="stands before each text, e.g. 'a photo of '")


class Encoder(CheckpointEncoder):
    """Values are float32 [C, H, W] of images, str of texts; vectors have length 1."""

    key = "clip"
    modalities = ("image", "text")
    libraries: ClassVar[tuple[str, ...]] = ("pillow", "safetensors", "tokenizers", "torch", "transformers")
    normalised = True
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.processor = ImageProcessor(self) if options.modality == "image" else None
        self.dim = self.in_config("projection_dim", "text_config.projection_size", "text_config.hidden_size")
        # SigLIP was trained on texts that are all of one length, and sees the padding.
        self._pads_to_end = str(self.config.get("model_type", "")).startswith("siglip")

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

    def length(self, value: Any) -> int:
        """Return a text's number of characters; images are of one size."""
        return len(value) if isinstance(value, str) else 0

    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """Run one tower on a batch and normalise."""
        import torch

        model, tokenizer = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            if tokenizer is None:
                images_BCHW = torch.from_numpy(np.stack(values)).to(model.device, model.dtype)
                output = model.get_image_features(pixel_values=images_BCHW)
            else:
                padding = "max_length" if self._pads_to_end else True
                tokens = tokenizer(
                    list(values), padding=padding, truncation=True, max_length=self._max_tokens, return_tensors="pt"
                )
                output = model.get_text_features(**tokens.to(model.device))
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
