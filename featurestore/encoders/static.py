"""Static tables of token vectors, as Model2Vec distils them: a text is the weighted mean of its tokens' vectors.

A checkpoint is a folder with `tokenizer.json`, `config.json` and a `model.safetensors` that holds `embeddings`, and in later
versions `weights` (one a token) and `mapping` (token -> row, where tokens share rows).

Legend: V tokens, R rows, D features.
Source: https://github.com/MinishLab/model2vec (format, mean over known tokens, cut at 512 tokens).
"""

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import TrainedOptions
from featurestore.encoders.checkpoints import CheckpointEncoder

__all__ = ["Encoder", "Options"]

_HEADER_BYTES = 8


class Options(TrainedOptions):
    """Batch 256: a lookup, not a network."""

    batch_size: int = Field(default=256, ge=1, le=4096, description="texts at once; part of the recipe")
    checkpoint: str = Field(min_length=1, description="a folder, s3://…, gs://…, or a hub id, with safetensors")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit of a hub id")
    max_tokens: int = Field(default=512, ge=1, le=1_000_000, description="cut texts there")
    normalise: bool | None = Field(
        default=None, description="to length 1; without it what the checkpoint says, else yes"
    )


class Encoder(CheckpointEncoder):
    """Values are str; one of which no token is known has a vector of NaN, which no view keeps."""

    key = "static"
    modalities = ("text",)
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "safetensors", "tokenizers")
    options: Options  # type: ignore[assignment]

    def __init__(self, options: Options) -> None:
        super().__init__(options)  # type: ignore[arg-type]
        if not (self.folder / "tokenizer.json").is_file():
            raise self.unfit("it has no tokenizer.json")
        said = self.config.get("normalize", True)
        self.normalised = bool(said) if options.normalise is None else options.normalise
        self.dim = self._dim()

    def _dim(self) -> int:
        """From the header of the table's file, which safetensors begin with: its length, and JSON."""
        with (self.folder / "model.safetensors").open("rb") as file:
            size = int.from_bytes(file.read(_HEADER_BYTES), "little")
            try:
                shape = json.loads(file.read(min(size, 1 << 20)))["embeddings"]["shape"]
                return int(shape[1])
            except (ValueError, LookupError, TypeError):
                raise self.unfit("its model.safetensors holds no table 'embeddings'") from None

    def preprocessing(self) -> dict[str, Any]:
        """Return how tokens are cut and averaged."""
        return {
            "pooling": "mean over known tokens",
            "max_tokens": self.options.max_tokens,
            "normalise": self.normalised,
        }

    def decode(self, raw: bytes) -> str:
        """Decode strict UTF-8."""
        return media.decode_text(raw)

    def length(self, value: str) -> int:
        """Return the number of characters, which tokens follow closely."""
        return len(value)

    def encode(self, values: Sequence[str]) -> NDArray[np.float32]:
        """Look the tokens up and average."""
        tokenizer, unknown, table_RD, weights_V, rows_V = self.load()
        vectors = np.full((len(values), self.dim), np.nan, np.float32)
        for row, text in enumerate(tokenizer.encode_batch(list(values), add_special_tokens=False)):
            tokens = np.array([each for each in text.ids[: self.options.max_tokens] if each != unknown], np.int64)
            if len(tokens):
                vectors[row] = (table_RD[rows_V[tokens]] * weights_V[tokens, None]).mean(0, dtype=np.float64)
        if self.normalised:
            with np.errstate(invalid="ignore", divide="ignore"):
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _load(self) -> Any:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            tensors = load_file(self.folder / "model.safetensors")
        except Exception as error:
            # tokenizers raises bare Exceptions.
            raise self.unfit(" ".join(str(error).split())[:300]) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        table_RD = tensors["embeddings"].astype(np.float32)
        tokens = len(tensors.get("mapping", tensors.get("weights", table_RD)))
        rows_V = tensors["mapping"].astype(np.int64) if "mapping" in tensors else np.arange(tokens)
        weights_V = tensors["weights"].astype(np.float32) if "weights" in tensors else np.ones(tokens, np.float32)
        largest = tokenizer.get_vocab_size(with_added_tokens=True)
        if len(rows_V) < largest or len(weights_V) < largest or not 0 <= rows_V.min() <= rows_V.max() < len(table_RD):
            raise self.unfit(
                f"its tokenizer has {largest} tokens, its tables are of {len(rows_V)} and {len(table_RD)} rows"
            )
        unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
        return tokenizer, tokenizer.token_to_id(unknown) if unknown else None, table_RD, weights_V, rows_V
