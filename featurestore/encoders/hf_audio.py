"""Sounds through any audio checkpoint of transformers' `AutoModel`: wav2vec 2.0, HuBERT, Whisper's encoder, AST.

A vector is the mean over the frames that the sound fills (AST: its own pooled output). Padding changes no vector: models that
take a mask are given one; a wav2vec 2.0 or HuBERT whose first normalisation runs over time (`feat_extract_norm: group`) would
see zeros behind a sound, so only sounds of one length share its forward.

Legend: B batch, N samples, T frames, D features.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore.encoders.audio_processors import MIN_SECONDS, AudioProcessor
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions
from featurestore.encoders.runtime import stacked, to_device, to_host

__all__ = ["Encoder", "Options"]

WAVES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer")
"""Types of models that take samples."""
POOLED = ("audio-spectrogram-transformer",)
WHISPER_STRIDE = 2
"""Frames of a spectrogram for one of Whisper's encoder (its second convolution)."""


class Options(CheckpointOptions):
    """Batch 8, of sounds of like length."""

    batch_size: int = Field(default=8, ge=1, le=4096, description="sounds per forward; part of the recipe")
    max_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="where a sound is cut; a checkpoint may cut earlier"
    )
    normalise: bool = Field(default=False, description="to length 1")


class Encoder(CheckpointEncoder):
    """Values are float32 features of the checkpoint's extractor, and the number of samples that they are of."""

    key = "hf-audio"
    modalities = ("audio",)
    libraries: ClassVar[tuple[str, ...]] = ("safetensors", "torch", "transformers")
    shortest_s = MIN_SECONDS
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._type = str(self.config.get("model_type"))
        if self._type not in (*WAVES, *POOLED, "whisper"):
            raise self.unfit(f"it is a {self._type!r}; allowed: {', '.join((*WAVES, *POOLED, 'whisper'))}")
        self.processor = AudioProcessor(self, options.max_seconds)
        self.normalised = options.normalise
        self.dim = self.in_config("d_model", "hidden_size")
        self._is_masked = self._type in WAVES and self.setting("feat_extract_norm") != "group"

    def preprocessing(self) -> dict[str, Any]:
        """Return the extractor's settings, and how frames become one vector."""
        pooling = "the model's own" if self._type in POOLED else "mean over the sound's frames"
        return {**self.processor.settings, "pooling": pooling, "normalise": self.normalised}

    def decode(self, raw: bytes) -> tuple[NDArray[np.float32], int]:
        """Decode, and let the checkpoint's extractor do the rest."""
        return self.processor(raw)

    def length(self, value: tuple[NDArray[np.float32], int]) -> int:
        """Return the number of samples, where features grow with them."""
        return value[1] if self._type in WAVES else 0

    def encode(self, values: Sequence[tuple[NDArray[np.float32], int]]) -> NDArray[np.float32]:
        """Run the network and average over frames, then normalise where asked."""
        import torch

        model = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            if self._type in WAVES:
                vectors_BD = self._waves(model, values)
            else:
                features = to_device(stacked([each for each, _ in values]), model.dtype)
                vectors_BD = self._spectrograms(model, features, [samples for _, samples in values])
            vectors_BD = vectors_BD.float()
            if self.normalised:
                vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=1)
            return to_host(vectors_BD)

    def _waves(self, model: Any, values: Sequence[tuple[NDArray[np.float32], int]]) -> Any:
        import torch

        lengths = [len(wave) for wave, _ in values]
        order = sorted(range(len(values)), key=lengths.__getitem__)
        together = (
            [order] if self._is_masked else [list(own) for _, own in itertools.groupby(order, lengths.__getitem__)]
        )
        rows: dict[int, Any] = {}
        for own in together:
            longest = max(lengths[each] for each in own)
            waves = [np.pad(values[each][0], (0, longest - lengths[each])) for each in own]
            waves_BN = to_device(stacked(waves), model.dtype)
            ends_B = to_device(torch.tensor([lengths[each] for each in own]))
            mask_BN = (torch.arange(longest, device=model.device) < ends_B[:, None]).long()
            hidden_BTD = model(waves_BN, attention_mask=mask_BN if self._is_masked else None).last_hidden_state
            frames_B = model._get_feat_extract_output_lengths(ends_B).clamp_min(1)
            rows |= dict(zip(own, _mean(hidden_BTD.float(), frames_B), strict=True))
        return torch.stack([rows[each] for each in range(len(values))])

    def _spectrograms(self, model: Any, features: Any, samples: list[int]) -> Any:
        import torch

        if self._type in POOLED:
            return model(features).pooler_output
        hidden_BTD = model(features).last_hidden_state
        hop = int(self.processor.settings["feature_extractor"].get("hop_length", 160)) * WHISPER_STRIDE
        frames = [min(hidden_BTD.shape[1], -(-each // hop)) for each in samples]
        return _mean(hidden_BTD.float(), to_device(torch.tensor(frames)))

    def _load(self) -> Any:
        def part(model: Any) -> Any:
            return model.get_encoder() if self._type == "whisper" else model

        # What only training uses may be missing.
        return self.model("AutoModel", unused=("masked_spec_embed",), part=part)


def _mean(hidden_BTD: Any, frames_B: Any) -> Any:
    """The mean over the first frames of each."""
    import torch

    mask_BT1 = (torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < frames_B[:, None]).unsqueeze(-1)
    return (hidden_BTD * mask_BT1).sum(1) / frames_B[:, None]
