"""Two towers of one checkpoint, one of texts and one of another modality, in one space: what CLIP and CLAP share.

A view runs the tower of its field's modality. The other is not kept in memory.

Legend: B batch, D features.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions, tokenizer_of
from featurestore.encoders.runtime import to_device, to_host

__all__ = ["TowerEncoder", "TowerOptions"]


class TowerOptions(CheckpointOptions):
    """Batch 8: on a CPU more gains little."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="values per forward; part of the recipe")
    modality: str
    prompt: str = Field(default="", description="stands before each text, e.g. 'a photo of '")


class TowerEncoder(CheckpointEncoder):
    """Values are str of texts, and of the other modality what its processor gives; vectors have length 1."""

    towers: ClassVar[dict[str, tuple[str, ...]]]
    """Modality -> beginnings of the names of its tower's parts."""
    normalised = True
    options: TowerOptions

    def length(self, value: Any) -> int:
        """Return a text's number of characters; other values are of one size."""
        return len(value) if isinstance(value, str) else 0

    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """Run one tower on a batch and normalise."""
        import torch

        model, tokenizer = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            if tokenizer is None:
                output = self._features(model, values)
            else:
                tokens = tokenizer(list(values), truncation=True, return_tensors="pt", **self._padding())
                output = model.get_text_features(**{name: to_device(each) for name, each in tokens.items()})
            return to_host(torch.nn.functional.normalize(output.pooler_output.float(), dim=1))

    @abstractmethod
    def _features(self, model: Any, values: Sequence[Any]) -> Any:
        """What the tower that is not of texts gives for a batch."""

    @abstractmethod
    def _padding(self) -> dict[str, Any]:
        """How the tokenizer pads and cuts."""

    def _load(self) -> Any:
        tokenizer = tokenizer_of(self) if self.options.modality == "text" else None
        return self.model("AutoModel", part=self._own, method=f"get_{self.options.modality}_features"), tokenizer

    def _own(self, model: Any) -> Any:
        (other,) = self.towers.keys() - {self.options.modality}
        for name in [name for name, _ in model.named_children() if name.startswith(self.towers[other])]:
            delattr(model, name)
        return model
