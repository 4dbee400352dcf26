"""IDEFICS, an open model after Flamingo: images and texts in one prompt, in the order of the fields.

The prompt is the one that transformers' `IdeficsProcessor` writes: the beginning token, then each field, a text as it is and an
image as its token between two of `<fake_token_around_image>`. It is written here because that class fetches a text that is an
address from the network, and takes a text that has `<image>` in it for an image: here texts are texts, and these tokens are
taken out of them. Of a prompt that is too long the last tokens of its texts are cut, never those of an image. A missing field
is left out; where a prompt has no image, the model's gates are shut, as they are there.

The vector is the last layer's at the last token, which alone has seen all of the prompt.

Legend: B batch, T tokens, I images of a prompt, C channels, H height, W width, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, tokenizer_of
from featurestore.encoders.image_processors import ImageProcessor

if TYPE_CHECKING:
    from featurestore.encoders.joint import Options

__all__ = ["Idefics"]

IMAGE, AROUND = "<image>", "<fake_token_around_image>"


class Idefics:
    """A text is a str, an image float32 [C, H, W]."""

    def __init__(self, owner: CheckpointEncoder, options: "Options") -> None:
        self._owner = owner
        if {"video", "audio"} & {*options.modality.split("+")}:
            raise owner.unfit(f"it reads images and texts, not {options.modality}")
        self._processor = ImageProcessor(owner)
        self.dim = owner.in_config("hidden_size")

    def preprocessing(self) -> dict[str, Any]:
        """Return the processor's settings, how prompts are written and cut, and what is done without a field."""
        return {
            **self._processor.settings,
            "prompt": "the fields in order, as IdeficsProcessor writes it",
            "max_tokens": self._max_tokens,
            "cut": "the last tokens of texts",
            "without_field": "left out",
            "pooling": "last token",
        }

    @property
    def _max_tokens(self) -> int:
        return self._owner.in_config("max_position_embeddings")

    def weights(self) -> dict[str, Path]:
        """Return no more."""
        return {}

    def decode(self, raw: bytes, modality: str) -> Any:
        """Decode strict UTF-8, or an image, and let the checkpoint's processor do the rest."""
        if modality == "text":
            return media.decode_text(raw)
        return self._processor(media.decode_image(raw, smallest_side=self._processor.decode_side))

    def load(self) -> Any:
        """Return the tokenizer and the model."""
        tokenizer = tokenizer_of(self._owner)
        if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
            raise self._owner.unfit(f"its tokenizer has no {IMAGE}")
        return tokenizer, self._owner.model("AutoModel")

    def encode(self, loaded: Any, values: Sequence[tuple[Any, ...]]) -> Any:
        """Return the last token's, [B, D]."""
        import torch
        from transformers.models.idefics import processing_idefics as theirs

        tokenizer, model = loaded
        prompts = [prompt(tokenizer.bos_token, value) for value in values]
        tokens = tokenizer.pad({"input_ids": self._cut(tokenizer, prompts)}, return_tensors="pt")
        pixels_BICHW = self._pixels(values, model.config)
        images = pixels_BICHW.shape[1]
        latest_BT, _ = theirs.image_attention_mask_for_packed_input_ids(tokens["input_ids"], tokenizer, "pt")
        mask_BTI = theirs.incremental_to_binary_attention_mask(latest_BT, "pt", num_classes=images)
        output = model(
            **tokens.to(model.device),
            pixel_values=pixels_BICHW.to(model.device, model.dtype),
            image_attention_mask=mask_BTI.to(model.device),
            use_cache=False,
        )
        last_B = tokens["attention_mask"].sum(1) - 1
        return output.last_hidden_state[torch.arange(len(values), device=model.device), last_B]

    def _cut(self, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt, without the last ones of its texts where they are too many."""
        kept = {tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids([IMAGE, AROUND])}
        tokens: list[list[int]] = tokenizer(
            prompts, add_special_tokens=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        for place, each in enumerate(tokens):
            excess = max(0, len(each) - self._max_tokens)
            texts = [at for at, token in enumerate(each) if token not in kept]
            dropped = {*texts[max(0, len(texts) - excess) :]} if excess else set()
            tokens[place] = [token for at, token in enumerate(each) if at not in dropped]
        return tokens

    def _pixels(self, values: Sequence[tuple[Any, ...]], config: Any) -> Any:
        """[B, I, C, H, W]: the images of each, and zeros up to the most that one has, which is at least 1."""
        import torch

        images = [[part for part in value if isinstance(part, np.ndarray)] for value in values]
        side = config.vision_config.image_size
        given = next((each[0].shape for each in images if each), (config.vision_config.num_channels, side, side))
        pixels = np.zeros((len(values), max(1, *map(len, images)), *given), np.float32)
        for row, each in enumerate(images):
            for place, image in enumerate(each):
                pixels[row, place] = image
        return torch.from_numpy(pixels)


def prompt(beginning: str, value: Sequence[Any]) -> str:
    """What transformers' `IdeficsProcessor` writes of a sample's texts and images, None left out."""
    written, after_image = beginning, False
    for part in value:
        if isinstance(part, str):
            written += part.replace(AROUND, "").replace(IMAGE, "").strip(" ")
            after_image = False
        elif part is not None:
            written += IMAGE + AROUND if after_image else AROUND + IMAGE + AROUND
            after_image = True
    return written
