"""Checkpoints' own image processors, with Pillow behind them: what encoders of images share."""

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.checkpoints import CheckpointEncoder, silent

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageProcessor"]

FILES = ("preprocessor_config.json", "processor_config.json")


class ImageProcessor:
    """An image to float32 [C, H, W], as a checkpoint's processor does it. Loaded with the first image; safe in threads.

    Attributes:
        settings: what the checkpoint says of it.
        decode_side: pixels, the side at which a JPEG is decoded at least; None: at its full size.
    """

    def __init__(self, owner: CheckpointEncoder) -> None:
        self._owner, self._lock = owner, threading.Lock()
        self._process: Any = None
        told = next(
            (json.loads(path.read_text("utf-8")) for path in map(owner.folder.joinpath, FILES) if path.is_file()), None
        )
        if told is None:
            raise owner.unfit(f"it says nothing of how images are prepared: it lacks {FILES[0]}")
        own = told.get("image_processor", told)
        self.settings: dict[str, Any] = {"image_processor": own, "backend": "pil"}
        self.decode_side = _twice(own.get("size")) if own.get("do_resize", True) else None

    def __call__(self, image: "Image.Image") -> NDArray[np.float32]:
        """float32 [C, H, W] of an RGB image."""
        made = self._loaded()(image, return_tensors="np")
        # IDEFICS's gives the pixels themselves.
        pixels: NDArray[np.float32] = np.asarray(
            made["pixel_values"] if isinstance(made, Mapping) else made, np.float32
        )
        # A processor of videos takes it for a video of one frame, and gives one dimension more.
        return pixels.reshape(pixels.shape[-3:])

    def _loaded(self) -> Any:
        with self._lock:
            if self._process is None:
                from transformers import AutoImageProcessor

                with silent():
                    try:
                        self._process = AutoImageProcessor.from_pretrained(
                            self._owner.folder, backend="pil", local_files_only=True, trust_remote_code=False
                        )
                    except (OSError, ValueError, KeyError, ImportError) as error:
                        raise self._owner.unfit(f"its image processor: {' '.join(str(error).split())[:300]}") from error
            return self._process


def _twice(size: Any) -> int | None:
    """Twice the larger side that images are resized to, so that the filter still has what it needs."""
    sides = [size] if isinstance(size, int) else [each for each in (size or {}).values() if isinstance(each, int)]
    return 2 * max(sides) if sides else None
