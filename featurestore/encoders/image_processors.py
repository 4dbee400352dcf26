"""Checkpoints' own image processors, with Pillow behind them: what encoders of images share.

What most of them do (resize, crop the middle, scale and shift the components) is done here in one pass, in about half of their
time, with the same bits: a component is one of 256, and what becomes of each is the processor's own answer. A processor for
which that gives anything else, tried when it is loaded, does its work itself.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.checkpoints import CheckpointEncoder
from featurestore.encoders.processors import Processor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageProcessor"]

SCALED_DECODING = 6
"""Times the side that an image is resized to: no smaller may a JPEG be decoded, so that its pixels, once they are resized, are
on average within 2/255 of those of the whole picture. Measured at 224, bicubic and bilinear: at most 1.5 for blocks of 6 pixels
in random colours, 0.7 for blocks in black and white, 0.3 for noise and for photographs. At 4 times it is 2.5, at twice 5."""

TRIED = ((90, 61), (61, 90), (640, 480), (300, 900))
"""Sizes of the images that it is tried on."""


class ImageProcessor(Processor):
    """An image to float32 [C, H, W], as a checkpoint's processor does it.

    Attributes:
        settings: what the checkpoint says of it, and what runs it.
        decode_side: pixels, the side at which a JPEG is decoded at least; None: at its full size.
    """

    values, name, auto, how = "images", "image_processor", "AutoImageProcessor", {"backend": "pil"}

    def __init__(self, owner: CheckpointEncoder) -> None:
        super().__init__(owner)
        self._steps: _Steps | None = None
        # The nearest pixel, filter 0, is another one in a smaller picture; the filter of one that is silent is not known here.
        averages = bool(self.own.get("resample")) and self.own.get("do_resize", True)
        self.decode_side = _decode_side(self.own.get("size")) if averages else None
        self.settings: dict[str, Any] = {"image_processor": self.own, "backend": "pil", "jpeg_side": self.decode_side}

    def __call__(self, image: "Image.Image") -> NDArray[np.float32]:
        """float32 [C, H, W] of an RGB image."""
        processor = self._loaded()
        made = None if self._steps is None else self._steps.run(image)
        return _of_its_own(processor, image) if made is None else made

    def _read(self) -> Any:
        processor = super()._read()
        steps = _steps_of(processor)
        self._steps = steps if steps is not None and _is_same(steps, processor) else None
        return processor


class _Steps(NamedTuple):
    """Resize to (height, width), or the shortest edge to (edge,); crop the middle to (height, width); look components up."""

    size: tuple[int, ...]
    resample: int
    crop: tuple[int, ...] | None
    table: NDArray[np.float32]
    """[C, 256]."""

    def run(self, image: "Image.Image") -> NDArray[np.float32] | None:
        """float32 [C, H, W], or None where the image would have to be padded."""
        from PIL import Image

        height, width = self._resized(*image.size)
        image = image.resize((width, height), Image.Resampling(self.resample))
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if top < 0 or left < 0:
                return None
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels_HWC = np.asarray(image)
        made = np.empty((3, *pixels_HWC.shape[:2]), np.float32)
        for channel, own in enumerate(self.table):
            np.take(own, pixels_HWC[..., channel], out=made[channel], mode="clip")
        return made

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width that an image is resized to."""
        if len(self.size) == 2:
            return self.size[0], self.size[1]
        (edge,) = self.size
        longer = int(edge * max(width, height) / min(width, height))
        return (edge, longer) if height <= width else (longer, edge)


def _steps_of(processor: Any) -> _Steps | None:
    """What a processor says that it does; None where it says something else, or not enough."""
    from PIL import Image

    size = getattr(processor, "size", None)
    sides = _sides(size, "height", "width") or _sides(size, "shortest_edge")
    crops = bool(getattr(processor, "do_center_crop", False))
    crop = _sides(getattr(processor, "crop_size", None), "height", "width") if crops else None
    if not getattr(processor, "do_resize", False) or sides is None or (crops and crop is None):
        return None
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    table = _of_its_own(processor, every, do_resize=False, do_center_crop=False)
    if table.shape != (3, 16, 16):
        return None
    return _Steps(sides, int(processor.resample), crop, table.reshape(3, 256))


def _sides(size: Any, *names: str) -> tuple[int, ...] | None:
    found = [getattr(size, name, None) or 0 for name in names]
    return tuple(found) if all(found) else None


def _is_same(steps: _Steps, processor: Any) -> bool:
    """Whether the steps give what the processor gives, bit for bit."""
    from PIL import Image

    random = np.random.default_rng(0)
    for width, height in TRIED:
        coarse = Image.fromarray(random.integers(0, 256, (7, 5, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.NEAREST)
        made = steps.run(image)
        if made is None or not np.array_equal(made, _of_its_own(processor, image)):
            return False
    return True


def _of_its_own(processor: Any, image: "Image.Image", **how: Any) -> NDArray[np.float32]:
    made = processor(image, return_tensors="np", **how)
    # IDEFICS's gives the pixels themselves.
    pixels: NDArray[np.float32] = np.asarray(made["pixel_values"] if isinstance(made, Mapping) else made, np.float32)
    # A processor of videos takes it for a video of one frame, and gives one dimension more.
    return pixels.reshape(pixels.shape[-3:])


def _decode_side(size: Any) -> int | None:
    sides = [size] if isinstance(size, int) else [each for each in (size or {}).values() if isinstance(each, int)]
    return SCALED_DECODING * max(sides) if sides else None
