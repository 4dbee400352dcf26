"""Sentence embeddings of any BERT-like or sentence-transformers checkpoint, through transformers' `AutoModel`.

What a sentence-transformers checkpoint says of itself counts where no option says otherwise: pooling (`1_Pooling`, as its
versions before and since 6 write it), whether vectors are normalised (`modules.json`), where texts are cut and whether they are
made small letters (`sentence_bert_config.json`), and what stands before them (`config_sentence_transformers.json`): before a
value what its `encode_document` takes, else its default prompt; before a query what `encode_query` takes, else the default.
What is said and not done here is refused: layers behind the pooling (`2_Dense`), other kinds of pooling, a prompt that is not
pooled, another task.

Legend: B batch, T tokens, D features.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders.checkpoints import (
    MODULES,
    CheckpointEncoder,
    CheckpointOptions,
    Module,
    modules_of,
    tokenizer_of,
)
from featurestore.encoders.runtime import to_device, to_host

__all__ = ["Encoder", "Options"]

_UNBOUNDED = 1_000_000
"""A tokenizer that knows no limit says a far larger number."""

POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""What sentence-transformers says, and what is done here."""

_DOCUMENT, _QUERY = ("document", "passage", "corpus"), ("query",)
"""Names of the prompts that its `encode_document` and `encode_query` look for, in order."""


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
    prompt: str | None = Field(
        default=None, description="stands before each text, e.g. 'passage: '; without it what the checkpoint says"
    )
    query_prompt: str | None = Field(
        default=None,
        description="stands before a query instead, e.g. 'query: '; without it option 'prompt', else what the checkpoint says",
    )


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
        self._transformer = self._settings("sentence_*_config.json")
        self._max_tokens = options.max_tokens or self._transformer.get("max_seq_length")
        self._prompt, self._query_prompt = self._prompts()
        self.pooling, self.normalised = self._said()
        if options.normalise is not None:
            self.normalised = options.normalise
        self._refuse_tasks()

    def _said(self) -> tuple[str, bool]:
        """Pooling, of the option, else of the checkpoint; and whether that says that vectors are normalised."""
        listed = self.folder / MODULES
        if not listed.is_file():
            modules = [Module("Transformer", ""), Module("Pooling", "1_Pooling"), Module("Normalize", "")]
        else:
            try:
                modules = modules_of(listed.read_bytes())
            except ValueError as error:
                raise self.unfit(f"its {MODULES}: {error}") from None
        kinds = [each.kind for each in modules]
        if strange := sorted({*kinds} - {"Transformer", "Pooling", "Normalize"}):
            raise self.unfit(f"its {MODULES} has a {strange[0]} behind the model, which would be left out")
        pooling = self.options.pooling
        if pooling is None:
            pools = next((each for each in modules if each.kind == "Pooling"), None)
            if pools is None:
                raise self.unfit(f"its {MODULES} names no pooling; name option 'pooling'")
            pooling = self._pooling(pools, needed=listed.is_file())
        return pooling, "Normalize" in kinds

    def _pooling(self, module: Module, needed: bool) -> Literal["mean", "cls", "last"]:
        said = self._settings(module.settings)
        if needed and not said:
            raise self.unfit(f"its {MODULES} names a pooling and {module.settings} is missing; name option 'pooling'")
        named = said.get("pooling_mode")
        if named is None:
            # As versions before 6 write it: of none that is true theirs is the mean.
            old = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
            prefix = "pooling_mode_"
            on = [name.removeprefix(prefix) for name, value in said.items() if name.startswith(prefix) and value]
            modes = [old.get(name, name) for name in on] or ["mean"]
        else:
            modes = named if isinstance(named, list) else [named]
        if len(modes) != 1 or modes[0] not in POOLING:
            raise self.unfit(
                f"it pools by {', '.join(map(str, modes))}; allowed: {', '.join(POOLING)}, or name option 'pooling'"
            )
        if said.get("include_prompt") is False and (self._prompt or self._query_prompt):
            raise self.unfit(
                "it leaves the prompt out of what it pools (include_prompt: false), which is not done here: name option "
                "'pooling' to pool all, or set options 'prompt' and 'query_prompt' to ''"
            )
        return cast(Literal["mean", "cls", "last"], POOLING[modes[0]])

    def _prompts(self) -> tuple[str, str]:
        """What stands before a text, and before a query."""
        name = "config_sentence_transformers.json"
        said = self._settings(name)
        prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
        if not isinstance(prompts, dict) or (default is not None and default not in prompts):
            raise self.unfit(f"its {name} has no prompt of the name {default!r}, its default_prompt_name")
        both = [
            next((str(prompts[each]) for each in (*names, default) if prompts.get(each)), "")
            for names in (_DOCUMENT, _QUERY)
        ]
        own, query = self.options.prompt, self.options.query_prompt
        if query is None:
            query = both[1] if own is None else own
        return both[0] if own is None else own, query

    def _refuse_tasks(self) -> None:
        """Raise InputError where the checkpoint is for something else than vectors of tokens."""
        for name, done in (("transformer_task", "feature-extraction"), ("module_output_name", "token_embeddings")):
            if (said := self._transformer.get(name, done)) != done:
                raise self.unfit(f"its {name} is {said!r}; allowed: {done}")
        if said := self._transformer.get("processing_kwargs"):
            raise self.unfit(f"its processing_kwargs {said} would be left out; take a checkpoint without")

    def _settings(self, pattern: str) -> dict[str, Any]:
        """Of the first file of that name; nothing where there is none. InputError where it is no JSON object."""
        for path in sorted(self.folder.glob(pattern)):
            try:
                said = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise self.unfit(f"its {path.name} is no JSON: {error}") from None
            if not isinstance(said, dict):
                raise self.unfit(f"its {path.name} is no JSON object")
            return said
        return {}

    def preprocessing(self) -> dict[str, Any]:
        """Return what stands before texts, and how they are cut, pooled and scaled."""
        return {
            "prompt": self._prompt,
            "query_prompt": self._query_prompt,
            "small_letters": bool(self._transformer.get("do_lower_case")),
            "max_tokens": self._max_tokens,
            "pooling": self.pooling,
            "normalise": self.normalised,
            "components": self.dim,
        }

    def decode(self, raw: bytes) -> str:
        """Decode strict UTF-8, behind the prompt."""
        return self._prompt + media.decode_text(raw)

    def decode_query(self, raw: bytes) -> str:
        """Decode strict UTF-8, behind the prompt of queries."""
        return self._query_prompt + media.decode_text(raw)

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
        if self._transformer.get("do_lower_case"):
            self._make_small(tokenizer)
        model = self.model("AutoModel", unused=("pooler.",))
        return tokenizer, model, min(self._cuts(tokenizer, model))

    def _make_small(self, tokenizer: Any) -> None:
        from tokenizers import normalizers

        if not tokenizer.is_fast:
            raise self.unfit(
                "its do_lower_case is not done here with a tokenizer that is not of the tokenizers library"
            )
        own = tokenizer.backend_tokenizer.normalizer
        made = [normalizers.Lowercase(), *([] if own is None else [own])]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(made)

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
