"""Videos through a VideoMAE or X-CLIP checkpoint: as many frames as it was trained on, at equal distances in time.

Of VideoMAE the vector is the mean of its patches, in space and time; of X-CLIP the video's, in the space of its texts.
Preprocessing is the checkpoint's own processor of images, frame by frame, with Pillow behind it: its processor of videos would
want torchvision.

Legend: B batch, F frames, C channels, H height, W width, T patches, D features.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import video
from featurestore.encoders.checkpoints import CheckpointEncoder, CheckpointOptions
from featurestore.encoders.image_processors import ImageProcessor
from featurestore.encoders.runtime import stacked, to_device, to_host

__all__ = ["Encoder", "Options"]

FRAMES = {"videomae": 16, "xclip": 8}
"""Model type -> frames of a video, where config.json does not say: transformers writes no default of a part's."""

TEXT_TOWER = ("text_", "prompts_")
"""Beginnings of the names of its parts."""


class Options(CheckpointOptions):
    """Batch 2: of VideoMAE a video is 1568 patches."""

    batch_size: int = Field(default=2, ge=1, le=4096, description="videos per forward; part of the recipe")
    normalise: bool = Field(default=False, description="to length 1")


class Encoder(CheckpointEncoder):
    """Values are float32 [F, C, H, W], each frame as the checkpoint's processor gives it."""

    key = "hf-video"
    modalities = ("video",)
    libraries: ClassVar[tuple[str, ...]] = ("pillow", "safetensors", "torch", "transformers")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._kind = str(self.config.get("model_type"))
        if self._kind not in FRAMES:
            raise self.unfit(f"its model_type is {self._kind!r}; allowed: {', '.join(FRAMES)}")
        self.processor = ImageProcessor(self)
        self.normalised = options.normalise
        part = self.config if self._kind == "videomae" else self.config.get("vision_config") or {}
        self.frames = int(part.get("num_frames") or FRAMES[self._kind])
        self.dim = self.in_config("hidden_size" if self._kind == "videomae" else "projection_dim")

    def preprocessing(self) -> dict[str, Any]:
        """Return the processor's settings, which frames are taken, and how they become one vector."""
        return {
            **self.processor.settings,
            "frames": self.frames,
            "taken": "in the middle of equal stretches of time",
            "pooling": "mean of patches" if self._kind == "videomae" else "the model's own",
            "normalise": self.normalised,
        }

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode the frames, and let the checkpoint's processor do the rest."""
        from PIL import Image

        # One by one: a frame may be a hundred times as large as what is made of it.
        return np.stack([self.processor(Image.fromarray(pixels)) for pixels in video.sample(raw, self.frames)])

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the network on one batch and pool."""
        import torch

        model = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            videos_BFCHW = to_device(stacked(values), model.dtype)
            vectors_BD = self._pool(model, videos_BFCHW).float()
            if self.normalised:
                vectors_BD = torch.nn.functional.normalize(vectors_BD, dim=1)
            return to_host(vectors_BD)

    def _pool(self, model: Any, videos_BFCHW: Any) -> Any:
        if self._kind == "xclip":
            return model.get_video_features(pixel_values=videos_BFCHW).pooler_output
        patches_BTD = model(pixel_values=videos_BFCHW).last_hidden_state
        return patches_BTD.mean(1)

    def _load(self) -> Any:
        return self.model(
            "AutoModel", part=_of_videos, method="get_video_features" if self._kind == "xclip" else "forward"
        )


def _of_videos(model: Any) -> Any:
    for name in [name for name, _ in model.named_children() if name.startswith(TEXT_TOWER)]:
        delattr(model, name)
    return model
