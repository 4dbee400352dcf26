"""Images through any vision checkpoint of transformers' `AutoModel`: ResNet, EfficientNet, ViT, DINO and others.

Preprocessing is the checkpoint's own processor with Pillow behind it. What it would resize is decoded at no less than six
times that size (`image_processors.SCALED_DECODING`), so a large JPEG is not decoded at full size only to be made small.

A checkpoint is tried when it is loaded: one whose vectors are random, as those of a masked autoencoder (`vit_mae`) are, which
hides other patches at each call, is refused.

Legend: B batch, C channels, H height, W width, T patches with the tokens before them, D features.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions
from featurestore.encoders.image_processors import ImageProcessor
from featurestore.encoders.runtime import lacks_memory, stacked, to_device, to_host
from featurestore.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Encoder", "Options"]

TOKENS = {
    **dict.fromkeys(("hiera", "ijepa", "siglip_vision_model", "swin", "swinv2"), 0),
    **dict.fromkeys(
        ("beit", "clip_vision_model", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit"), 1
    ),
    **dict.fromkeys(("mlcd_vision_model", "vit", "vit_mae", "vit_msn"), 1),
    "deit": 2,
}
"""Model type whose output is patches, row by row -> tokens before them, without registers; the first is the class token."""

REGISTERS = ("dinov2_with_registers", "dinov3_vit")
"""Model types with `num_register_tokens` behind the class token."""

RANDOM = 1e-2
"""Of a vector's length: by more, two of one image in batches of one size differ where a model is random alone."""


class Options(CheckpointOptions):
    """Batch 8: on a CPU more gains little."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="images per forward; part of the recipe")
    pooling: Literal["cls", "mean", "pooled"] | None = Field(
        default=None,
        description="cls: the class token; mean: of the patches or cells; pooled: the model's own; without it cls where "
        "there is a class token, else pooled",
    )
    normalise: bool = Field(default=False, description="to length 1")


class Encoder(CheckpointEncoder):
    """Values are float32 [C, H, W], as the checkpoint's processor gives them."""

    key = "hf-image"
    modalities = ("image",)
    libraries: ClassVar[tuple[str, ...]] = ("safetensors", "torch", "transformers")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.processor = ImageProcessor(self)
        self.normalised = options.normalise
        kind = str(self.config.get("model_type"))
        self._prefix = TOKENS.get(kind)
        if kind in REGISTERS:
            self._prefix = TOKENS[kind] + int(self.setting("num_register_tokens"))
        self.pooling = options.pooling or ("cls" if self._prefix else "pooled")
        if self.pooling == "cls" and not self._prefix:
            known = ", ".join(sorted(name for name, tokens in TOKENS.items() if tokens))
            raise self.unfit(
                f"option 'pooling' = 'cls': no class token is known of a {kind!r}, as of {known}; allowed: mean, pooled"
            )
        self.dim = self.in_config("hidden_dim", "hidden_size", "hidden_sizes")

    def preprocessing(self) -> dict[str, Any]:
        """Return the processor's settings, and how patches become one vector."""
        tokens = {"tokens_before_patches": self._prefix} if self.pooling == "mean" else {}
        return {**self.processor.settings, "pooling": self.pooling, **tokens, "normalise": self.normalised}

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode, and let the checkpoint's processor do the rest."""
        return self.prepare(media.decode_image(raw, smallest_side=self.processor.decode_side))

    def prepare(self, image: "Image.Image") -> NDArray[np.float32]:
        """Let the checkpoint's processor do it all."""
        return self.processor(image)

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the network on one batch and pool."""
        model = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        return self._vectors(model, values)

    def _vectors(self, model: Any, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            vectors_BD = self._pool(self._run(model, values)).float()
            if self.normalised:
                vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=1)
            return to_host(vectors_BD)

    def patches(self, values: Sequence[NDArray[np.float32]]) -> tuple[Any, tuple[int, int]]:
        """Run the network on one batch: [B, T, D] of its patches or cells, row by row, and the number of rows and columns."""
        hidden = self._run(self.load(), values).last_hidden_state
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2), (hidden.shape[2], hidden.shape[3])
        patches = self._patches(hidden)
        side = self.in_config("patch_size")
        shape = values[0].shape[-2] // side, values[0].shape[-1] // side
        if patches.shape[1] != shape[0] * shape[1]:
            raise self.unfit(
                f"its {hidden.shape[1]} places are no grid of patches of {side} pixels behind {self._prefix} other tokens"
            )
        return patches, shape

    def _run(self, model: Any, values: Sequence[NDArray[np.float32]]) -> Any:
        import torch

        images_BCHW = to_device(stacked(values), model.dtype)
        if self._prefix is None:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return model(pixel_values=images_BCHW)

    def _pool(self, output: Any) -> Any:
        if self.pooling == "pooled":
            if getattr(output, "pooler_output", None) is None:
                raise self.unfit("it has no pooled output; allowed for option 'pooling': cls, mean")
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        return hidden.mean((2, 3)) if hidden.ndim == 4 else self._patches(hidden).mean(1)

    def _patches(self, hidden_BTD: Any) -> Any:
        if self._prefix is None:
            raise self.unfit(
                f"of a {self.config.get('model_type')!r} it is not known where its patches begin, as it is of "
                f"{', '.join(sorted(TOKENS))}; allowed for option 'pooling': pooled"
            )
        return hidden_BTD[:, self._prefix :]

    def _load(self) -> Any:
        unused = () if self.pooling == "pooled" else ("pooler.",)
        model = self.model("AutoModel", unused, channels_last=self._prefix is None)
        self._try(model)
        return model

    def _try(self, model: Any) -> None:
        """Encode one image several times. InputError where that cannot be, or its vectors are not the same."""
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        # A compiled model is compiled for the batch that it will have.
        batch = [self.prepare(Image.fromarray(noise))] * max(2, self.batch_size if self.options.compiled else 2)
        try:
            made = np.concatenate([self._vectors(model, batch) for _ in range(2)])
        except InputError:
            raise
        except Exception as error:
            if lacks_memory(error):
                raise
            told = " ".join(str(error).split())[:300]
            raise self.unfit(f"it cannot encode an image: {type(error).__name__}: {told}") from error
        if made.shape[1:] != (self.dim,):
            raise self.unfit(f"its vectors are of {made.shape[1:]} components and its config.json says {self.dim}")
        if (apart := float(np.linalg.norm(made - made[0], axis=1).max())) > RANDOM * np.linalg.norm(made[0]):
            raise self.unfit(
                f"it gives one image other vectors each time, {apart:.3g} apart: it is random, as one that masks patches; "
                "take a checkpoint that is for features"
            )
