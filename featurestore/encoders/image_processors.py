"""Checkpoints' own image processors, with Pillow behind them: what encoders of images share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.checkpoints import CheckpointEncoder
from featurestore.encoders.processors import Processor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageProcessor"]


class ImageProcessor(Processor):
    """An image to float32 [C, H, W], as a checkpoint's processor does it.

    Attributes:
        settings: what the checkpoint says of it, and what runs it.
        decode_side: pixels, the side at which a JPEG is decoded at least; None: at its full size.
    """

    values, name, auto, how = "images", "image_processor", "AutoImageProcessor", {"backend": "pil"}

    def __init__(self, owner: CheckpointEncoder) -> None:
        super().__init__(owner)
        self.settings: dict[str, Any] = {"image_processor": self.own, "backend": "pil"}
        self.decode_side = _twice(self.own.get("size")) if self.own.get("do_resize", True) else None

    def __call__(self, image: "Image.Image") -> NDArray[np.float32]:
        """float32 [C, H, W] of an RGB image."""
        made = self._loaded()(image, return_tensors="np")
        # IDEFICS's gives the pixels themselves.
        pixels: NDArray[np.float32] = np.asarray(
            made["pixel_values"] if isinstance(made, Mapping) else made, np.float32
        )
        # A processor of videos takes it for a video of one frame, and gives one dimension more.
        return pixels.reshape(pixels.shape[-3:])


def _twice(size: Any) -> int | None:
    """Twice the larger side that images are resized to, so that the filter still has what it needs."""
    sides = [size] if isinstance(size, int) else [each for each in (size or {}).values() if isinstance(each, int)]
    return 2 * max(sides) if sides else None
