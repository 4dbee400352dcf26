"""Sentence embeddings of any BERT-like or sentence-transformers checkpoint, through transformers' `AutoModel`.

What a sentence-transformers checkpoint says of itself counts where no option says otherwise: pooling (`1_Pooling`), whether
vectors are normalised (`modules.json`), and where texts are cut (`sentence_bert_config.json`). One with layers behind the
pooling (`2_Dense`) is refused, because they would be left out.

Legend: B batch, T tokens, D features.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions, tokenizer_of
from featurestore.encoders.runtime import to_device, to_host

__all__ = ["Encoder", "Options"]

_UNBOUNDED = 1_000_000
"""A tokenizer that knows no limit says a far larger number."""


class Options(CheckpointOptions):
    """Batch 32: short texts gain little from more, and a long one pads fewer others."""

    batch_size: int = Field(default=32, ge=1, le=4096, description="texts per forward; part of the recipe")
    pooling: Literal["mean", "cls", "last"] | None = Field(
        default=None, description="over tokens; without it what the checkpoint says, else mean"
    )
    normalise: bool | None = Field(
        default=None, description="to length 1; without it what the checkpoint says, else yes"
    )
    dim: int | None = Field(
        default=None, ge=1, le=65_536, description="keep so many components, of a model trained for that (Matryoshka)"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, le=131_072, description="cut texts there; without it where the checkpoint does"
    )
    prompt: str = Field(default="", description="stands before each text, e.g. 'passage: '")
    query_prompt: str | None = Field(default=None, description="stands before a query instead, e.g. 'query: '")


class Encoder(CheckpointEncoder):
    """Values are str."""

    key = "hf-text"
    modalities = ("text",)
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._width = self.in_config("hidden_size", "d_model", "dim", "n_embd")
        self.dim = min(options.dim or self._width, self._width)
        if options.dim is not None and options.dim > self._width:
            raise self.unfit(f"option 'dim' = {options.dim} is more than the {self._width} components that it has")
        self.pooling, says_normalise, self._max_tokens = self._said()
        self.normalised = says_normalise if options.normalise is None else options.normalise

    def _said(self) -> tuple[str, bool, int | None]:
        """Pooling, whether vectors are normalised, and where texts are cut: of the options, else of the checkpoint."""
        modules = self._json("modules.json") or []
        kinds = [str(each.get("type", "")).rpartition(".")[2] for each in modules]
        if strange := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
            raise self.unfit(f"its modules.json has a {strange[0]} behind the model, which would be left out")
        pooling = self._pooling(
            next((each["path"] for each in modules if each["type"].endswith("Pooling")), "1_Pooling")
        )
        cut = self.options.max_tokens or (self._json("sentence_bert_config.json") or {}).get("max_seq_length")
        return self.options.pooling or pooling, not kinds or "Normalize" in kinds, cut

    def _pooling(self, folder: str) -> str:
        said = self._json(f"{folder}/config.json") if ".." not in folder else None
        modes = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
        }
        on = [name for name, value in (said or {}).items() if name.startswith("pooling_mode_") and value is True]
        if self.options.pooling is None and (len(on) > 1 or set(on) - modes.keys()):
            raise self.unfit(f"it pools by {', '.join(on)}; allowed: {', '.join(modes)}, or name option 'pooling'")
        return modes[on[0]] if on and on[0] in modes else "mean"

    def _json(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text("utf-8")) if path.is_file() else None
        except ValueError as error:
            raise self.unfit(f"its {name} is no JSON: {error}") from None

    def preprocessing(self) -> dict[str, Any]:
        """Return how texts are cut, pooled and scaled."""
        return {
            "max_tokens": self._max_tokens,
            "pooling": self.pooling,
            "normalise": self.normalised,
            "components": self.dim,
        }

    def decode(self, raw: bytes) -> str:
        """Decode strict UTF-8, behind the prompt."""
        return self.options.prompt + media.decode_text(raw)

    def decode_query(self, raw: bytes) -> str:
        """Decode strict UTF-8, behind the prompt of queries."""
        prompt = self.options.query_prompt
        return (self.options.prompt if prompt is None else prompt) + media.decode_text(raw)

    def length(self, value: str) -> int:
        """Return the number of characters, which tokens follow closely."""
        return len(value)

    def encode(self, values: Sequence[str]) -> NDArray[np.float32]:
        """Tokenize, run the network, pool over tokens, keep the first components, normalise."""
        import torch

        tokenizer, model, cut = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        tokens = tokenizer(list(values), padding=True, truncation=True, max_length=cut, return_tensors="pt")
        with torch.inference_mode():
            batch = {name: to_device(each) for name, each in tokens.items()}
            hidden_BTD = model(**batch).last_hidden_state
            pooled_BD = pool(hidden_BTD.float(), batch["attention_mask"], self.pooling)[:, : self.dim]
            if self.normalised:
                pooled_BD = torch.nn.functional.normalize(pooled_BD, dim=1)
            return to_host(pooled_BD)

    def _load(self) -> Any:
        tokenizer = tokenizer_of(self)
        model = self.model("AutoModel", unused=("pooler.",))
        return tokenizer, model, min(self._cuts(tokenizer, model))

    def _cuts(self, tokenizer: Any, model: Any) -> list[int]:
        """Numbers of tokens at which texts must be cut."""
        cuts = [self._max_tokens, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
        # RoBERTa's positions begin behind its padding token's.
        if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            cuts[2] = cuts[2] - 2 if cuts[2] else None
        return [each for each in cuts if each is not None and 0 < each < _UNBOUNDED] or [512]


def pool(hidden_BTD: Any, mask_BT: Any, pooling: str) -> Any:
    """One vector a text: the mean over its tokens, the first token's, or the last one's, on whichever side padding stands."""
    import torch

    if pooling == "mean":
        mask_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
    places_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
    if pooling == "cls":
        at_B = torch.where(mask_BT.bool(), places_BT, mask_BT.shape[1]).amin(1).clamp_max(mask_BT.shape[1] - 1)
    else:
        at_B = torch.where(mask_BT.bool(), places_BT, -1).amax(1).clamp_min(0)
    return hidden_BTD[torch.arange(len(at_B), device=at_B.device), at_B]
