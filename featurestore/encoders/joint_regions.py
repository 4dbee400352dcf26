"""VisualBERT and LXMERT: a text beside regions of an image.

Both were trained on regions that a detector had cut out: a vector of each, and for LXMERT its box. There is no detector here.
What they are given in their place is the grid of a vision checkpoint, `image_checkpoint`: the last layer's vector of each
patch or cell, row by row, and for LXMERT the cell's own box (left, top, right, bottom, the image 0 to 1). Grids instead of
regions are known to do as well where the model is trained on them (Jiang et al. 2020, 'In Defense of Grid Features'); a
published checkpoint was not, so one that was trained further on such a grid is meant, and the card says what was fed. Widths
must agree; nothing is projected or padded.

A missing text is an empty one. A missing image is masked in VisualBERT, whose attention then is over the text alone; LXMERT
cannot go without regions and reads zeros, in boxes of zeros.

Legend: B batch, P those that have an image, R regions, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore import media
from featurestore.encoders import NO_NUMBERS, hf_image
from featurestore.encoders.checkpoints import CheckpointEncoder, tokenizer_of

if TYPE_CHECKING:
    from featurestore.encoders.joint import Options

__all__ = ["Regions"]

WIDTH = {"visual_bert": "visual_embedding_dim", "lxmert": "visual_feat_dim"}
"""Model type -> the setting that says how long a region's vector is."""


class Regions:
    """A text is a str, an image what the encoder of images takes."""

    def __init__(self, owner: CheckpointEncoder, options: "Options") -> None:
        self._owner, self._is_lxmert = owner, owner.config["model_type"] == "lxmert"
        reads = options.modality.split("+")
        if sorted(reads) != ["image", "text"]:
            raise owner.unfit(f"it reads an image and a text, in either order, not {options.modality}")
        self._image, self._text = reads.index("image"), reads.index("text")
        width = owner.in_config(WIDTH[owner.config["model_type"]])
        if options.image_checkpoint is None:
            raise owner.unfit(
                f"it reads regions of an image, {width} values each; name option 'image_checkpoint': a vision checkpoint "
                "whose patches are such"
            )
        self.images = hf_image.Encoder(
            hf_image.Options(checkpoint=options.image_checkpoint, dtype=options.dtype, pooling="mean")
        )
        if self.images.dim != width:
            raise owner.unfit(
                f"option 'image_checkpoint' = {options.image_checkpoint!r} has patches of {self.images.dim} values; a region "
                f"of this one has {width}"
            )
        self.dim = owner.in_config("hidden_size")

    def preprocessing(self) -> dict[str, Any]:
        """Return what stands for regions, and for what is missing."""
        boxes = {"boxes": "left, top, right, bottom of each cell, from 0 to 1"} if self._is_lxmert else {}
        return {
            "regions": "every patch or cell of the last layer of the encoder of images, row by row; no detector's",
            **boxes,
            "image": {
                name: value for name, value in self.images.card().items() if name not in (*NO_NUMBERS, "weights")
            },
            "max_tokens": self._max_tokens,
            "without_image": "regions and boxes of zeros" if self._is_lxmert else "masked",
            "without_text": "an empty text",
            "pooling": "the model's own",
        }

    @property
    def _max_tokens(self) -> int:
        return self._owner.in_config("max_position_embeddings")

    def weights(self) -> dict[str, Path]:
        """Return the files of the encoder of images."""
        return {f"image/{name}": path for name, path in self.images.weights().items()}

    def decode(self, raw: bytes, modality: str) -> Any:
        """Decode strict UTF-8, or an image as its encoder does."""
        return media.decode_text(raw) if modality == "text" else self.images.decode(raw)

    def load(self) -> Any:
        """Return the tokenizer and both models."""
        tokenizer = tokenizer_of(self._owner)
        self.images.load()
        return tokenizer, self._owner.model("AutoModel")

    def encode(self, loaded: Any, values: Sequence[tuple[Any, ...]]) -> Any:
        """Return the pooled output, [B, D]."""
        tokenizer, model = loaded
        texts = [value[self._text] or "" for value in values]
        length = min(self._max_tokens, tokenizer.model_max_length)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        there = [place for place, value in enumerate(values) if value[self._image] is not None]
        patches_PRD, shape = (
            self.images.patches([values[place][self._image] for place in there]) if there else (None, (1, 1))
        )
        feed = self._lxmert if self._is_lxmert else self._visual_bert
        visual = feed(model, len(values), there, patches_PRD, shape)
        output = model(**tokens.to(model.device), **visual)
        return output.pooled_output if self._is_lxmert else output.pooler_output

    def _visual_bert(self, model: Any, size: int, there: list[int], patches_PRD: Any, _: Any) -> dict[str, Any]:
        if patches_PRD is None:
            return {}
        mask_BR = patches_PRD.new_zeros(size, patches_PRD.shape[1])
        mask_BR[there] = 1
        return {"visual_embeds": _spread(patches_PRD, size, there), "visual_attention_mask": mask_BR}

    def _lxmert(
        self, model: Any, size: int, there: list[int], patches_PRD: Any, shape: tuple[int, int]
    ) -> dict[str, Any]:
        import torch

        if patches_PRD is None:
            zeros = torch.zeros(size, 1, model.config.visual_feat_dim, dtype=model.dtype, device=model.device)
            return {"visual_feats": zeros, "visual_pos": zeros[..., :4]}
        boxes_PR4 = torch.tensor(boxes(*shape), dtype=model.dtype, device=model.device).expand(len(there), -1, -1)
        return {"visual_feats": _spread(patches_PRD, size, there), "visual_pos": _spread(boxes_PR4, size, there)}


def _spread(given: Any, size: int, there: list[int]) -> Any:
    """[P, …] -> [B, …], zeros where there is nothing."""
    spread = given.new_zeros(size, *given.shape[1:])
    spread[there] = given
    return spread


def boxes(rows: int, columns: int) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each cell of a grid, row by row, in an image from 0 to 1."""
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]
