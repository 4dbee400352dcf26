"""Images through any vision checkpoint of transformers' `AutoModel`: ResNet, EfficientNet, ViT, DINO and others.

Preprocessing is the checkpoint's own processor with Pillow behind it. What it would resize is decoded at no less than twice
that size (`media.decode_image`), so a JPEG is not decoded at full size only to be made small.

Legend: B batch, C channels, H height, W width, T patches with the class token, D features.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions
from featurestore.encoders.image_processors import ImageProcessor
from featurestore.encoders.runtime import stacked, to_device, to_host

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Encoder", "Options"]


class Options(CheckpointOptions):
    """Batch 8: on a CPU more gains little."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="images per forward; part of the recipe")
    pooling: Literal["cls", "mean", "pooled"] | None = Field(
        default=None,
        description="cls: the class token; mean: of the patches; pooled: the model's own; without it pooled for a "
        "convolutional model, else cls",
    )
    normalise: bool = Field(default=False, description="to length 1")


class Encoder(CheckpointEncoder):
    """Values are float32 [C, H, W], as the checkpoint's processor gives them."""

    key = "hf-image"
    modalities = ("image",)
    libraries: ClassVar[tuple[str, ...]] = ("pillow", "safetensors", "torch", "transformers")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.processor = ImageProcessor(self)
        self.normalised = options.normalise
        self._is_convolutional = "num_attention_heads" not in self.config
        self.pooling = options.pooling or ("pooled" if self._is_convolutional else "cls")
        if self._is_convolutional and self.pooling == "cls":
            raise self.unfit(
                "option 'pooling' = 'cls': a convolutional model has no class token; allowed: mean, pooled"
            )
        self.dim = self.in_config("hidden_dim", "hidden_size", "hidden_sizes")

    def preprocessing(self) -> dict[str, Any]:
        """Return the processor's settings, and how patches become one vector."""
        return {**self.processor.settings, "pooling": self.pooling, "normalise": self.normalised}

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode, and let the checkpoint's processor do the rest."""
        return self.prepare(media.decode_image(raw, smallest_side=self.processor.decode_side))

    def prepare(self, image: "Image.Image") -> NDArray[np.float32]:
        """Let the checkpoint's processor do it all."""
        return self.processor(image)

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the network on one batch and pool."""
        import torch

        self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            vectors_BD = self._pool(self._run(values)).float()
            if self.normalised:
                vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=1)
            return to_host(vectors_BD)

    def patches(self, values: Sequence[NDArray[np.float32]]) -> tuple[Any, tuple[int, int]]:
        """Run the network on one batch: [B, T, D] of its patches or cells, row by row, and the number of rows and columns."""
        hidden = self._run(values).last_hidden_state
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2), (hidden.shape[2], hidden.shape[3])
        side = self.in_config("patch_size")
        shape = values[0].shape[-2] // side, values[0].shape[-1] // side
        if hidden.shape[1] - 1 != shape[0] * shape[1]:
            raise self.unfit(
                f"its {hidden.shape[1]} places are no grid of patches of {side} pixels behind a class token"
            )
        return hidden[:, 1:], shape

    def _run(self, values: Sequence[NDArray[np.float32]]) -> Any:
        import torch

        model = self.load()
        images_BCHW = to_device(stacked(values), model.dtype)
        if self._is_convolutional:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return model(pixel_values=images_BCHW)

    def _pool(self, output: Any) -> Any:
        if self.pooling == "pooled":
            if output.pooler_output is None:
                raise self.unfit("it has no pooled output; allowed for option 'pooling': cls, mean")
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.pooling == "cls" else hidden[:, 1:].mean(1)

    def _load(self) -> Any:
        unused = () if self.pooling == "pooled" else ("pooler.",)
        return self.model("AutoModel", unused, channels_last=self._is_convolutional)
