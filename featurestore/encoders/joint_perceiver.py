"""Perceiver: a video and its sound, through a checkpoint of transformers' `PerceiverForMultimodalAutoencoding`.

Its inputs are so many frames, so many samples of sound for each frame, and a class that is always masked. It was trained on
stretches of 0.64 s: 16 frames at 25 a second, 1920 samples each. Of a longer video the frames are in the middle of equal
stretches of time, as of any encoder of videos here, and of a sound as many samples around the middle of each of as many
stretches; both are all there is of 0.64 s. A shorter sound is filled up with silence.

A missing field is masked: the latents do not attend to it. The vector is the mean of the latents; what decodes them is not run.

Legend: B batch, F frames, S samples of a frame, C channels, H height, W width, N inputs, L latents, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore import media, video
from featurestore.encoders.checkpoints import CheckpointEncoder
from featurestore.encoders.image_processors import ImageProcessor

if TYPE_CHECKING:
    from featurestore.encoders.joint import Options

__all__ = ["Perceiver", "around"]

FRAMES_A_SECOND = 25
"""What it was trained at."""

CELL = 4
"""Pixels of a patch's side, fixed in transformers."""

Floats = NDArray[np.float32]


class Perceiver:
    """A video is float32 [F, C, H, W], a sound float32 [F S, 1]."""

    def __init__(self, owner: CheckpointEncoder, options: "Options") -> None:
        self._owner = owner
        reads = options.modality.split("+")
        if sorted(reads) != ["audio", "video"]:
            raise owner.unfit(f"it reads a video and a sound, in either order, not {options.modality}")
        if options.dtype != "float32":
            raise owner.unfit(
                f"option 'dtype' = {options.dtype!r}: transformers mixes it with float32; allowed: float32"
            )
        self._video, self._audio = reads.index("video"), reads.index("audio")
        self._processor = ImageProcessor(owner)
        self._frames, self._samples = owner.in_config("num_frames"), owner.in_config("audio_samples_per_frame")
        self.dim = owner.in_config("d_latents")

    def preprocessing(self) -> dict[str, Any]:
        """Return the processor's settings, what is taken of each field, and what is done without it."""
        return {
            **self._processor.settings,
            "frames": self._frames,
            "samples_of_a_frame": self._samples,
            "sample_rate": self._rate,
            "taken": "in the middle of equal stretches of time",
            "without_field": "masked",
            "label": "masked",
            "pooling": "mean of latents",
        }

    @property
    def _rate(self) -> int:
        return FRAMES_A_SECOND * self._samples

    def weights(self) -> dict[str, Path]:
        """Return no more."""
        return {}

    def decode(self, raw: bytes, modality: str) -> Floats:
        """Decode the frames, each as the checkpoint's processor gives it, or the samples that go with them."""
        from PIL import Image

        if modality == "audio":
            return around(media.decode_audio(raw, self._rate), self._frames, self._samples)[:, None]
        return np.stack([self._processor(Image.fromarray(pixels)) for pixels in video.sample(raw, self._frames)])

    def load(self) -> Any:
        """Return the model, without what decodes its latents."""
        model = self._owner.model("PerceiverForMultimodalAutoencoding")
        model.perceiver.decoder = None
        return model

    def encode(self, model: Any, values: Sequence[tuple[Any, ...]]) -> Any:
        """Return the mean of the latents, [B, D]."""
        import torch

        sounds_BN1, heard_B = _stacked([value[self._audio] for value in values], (self._frames * self._samples, 1))
        videos_BFCHW, seen_B = _stacked([value[self._video] for value in values], (self._frames, 3, CELL, CELL))
        labels = torch.zeros(len(values), model.config.num_labels)
        patches = self._frames * (videos_BFCHW.shape[-2] // CELL) * (videos_BFCHW.shape[-1] // CELL)
        # In transformers' order, which is that of the names: audio, image, label.
        counts = (sounds_BN1.shape[1] // model.config.samples_per_patch, patches, 1)
        there = (heard_B, seen_B, torch.ones(len(values)))
        mask_BN = torch.cat([each[:, None].expand(-1, n) for each, n in zip(there, counts, strict=True)], 1)
        inputs = {"audio": sounds_BN1, "image": videos_BFCHW, "label": labels}
        output = model(
            inputs={name: each.to(model.device) for name, each in inputs.items()},
            attention_mask=mask_BN.to(model.device),
            output_hidden_states=True,
        )
        return output.hidden_states[-1].mean(1)


def _stacked(given: list[Floats | None], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """[B, …] with zeros where there is nothing, of a shape where nothing is there at all; and float32 [B], 1 where there is."""
    import torch

    there = [each for each in given if each is not None]
    zeros = np.zeros(there[0].shape if there else shape, np.float32)
    stacked = np.stack([zeros if each is None else each for each in given])
    return torch.from_numpy(stacked), torch.tensor([float(each is not None) for each in given])


def around(samples: Floats, pieces: int, length: int) -> Floats:
    """float32 [pieces length]: `length` samples around the middle of each of `pieces` equal stretches; silence behind fewer."""
    if len(samples) <= pieces * length:
        return np.pad(samples, (0, pieces * length - len(samples)))
    starts = [(2 * piece + 1) * len(samples) // (2 * pieces) - length // 2 for piece in range(pieces)]
    return np.concatenate([samples[start : start + length] for start in starts])
