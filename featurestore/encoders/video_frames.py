"""Videos through any encoder of images: frames at equal distances in time, each encoded as a picture, pooled into one vector.

`pyramid` keeps something of the order in time: the means over the whole, its halves and its quarters, one behind the other
(Lazebnik et al. 2006, along time). It has no weights to learn.

Legend: N videos, F frames of a video, D features of a picture.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import video
from featurestore.encoders import NO_NUMBERS, BaseEncoder, EncoderOptions, find_for, keys, modalities
from featurestore.errors import InputError

__all__ = ["Encoder", "Options"]

STRETCHES = (1, 2, 4)

Floats = NDArray[np.float32]


class Options(EncoderOptions):
    """Batch 4: 32 pictures are at hand, which are given to the encoder of images in batches of its own size."""

    batch_size: int = Field(default=4, ge=1, le=4096, description="videos that are decoded at once; part of the recipe")
    image_encoder: str = Field(default="efficientnet-lite0", description="the key of an encoder of images")
    image_options: dict[str, Any] = Field(default={}, description="what it is made with")
    frames: int = Field(default=8, ge=1, le=1024, description="frames of each video")
    pooling: Literal["mean", "max", "pyramid"] = Field(
        default="mean",
        description="over the frames; pyramid: the means of the whole, its halves and quarters, one behind the other",
    )
    normalise: bool = Field(default=False, description="to length 1")


class Encoder(BaseEncoder):
    """Values are lists of F values of the encoder of images."""

    key = "video-frames"
    modalities = ("video",)
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "pillow")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.image = _image_encoder(options)
        if options.pooling == "pyramid" and options.frames % STRETCHES[-1]:
            raise InputError(
                f"encoder {self.key!r}: option 'frames' = {options.frames} cannot be cut into quarters, as pooling 'pyramid' "
                f"wants; take a multiple of {STRETCHES[-1]}"
            )
        self.dim = self.image.dim * (sum(STRETCHES) if options.pooling == "pyramid" else 1)
        self.normalised = options.normalise
        self.licence, self.source = self.image.licence, self.image.source

    @property
    def trained_until(self) -> str | None:
        """As the encoder of images."""
        return self.image.trained_until

    def preprocessing(self) -> dict[str, Any]:
        """Return which frames are taken, and the card of the encoder of images."""
        image = {name: value for name, value in self.image.card().items() if name not in NO_NUMBERS}
        return {"frames": "in the middle of equal stretches of time", "stretches": list(STRETCHES), "image": image}

    def address(self) -> dict[str, Any]:
        """Return the options of the encoder of images: those that change a number are in its card."""
        return {"image_options": self.options.image_options}

    def decode(self, raw: bytes) -> list[Any]:
        """Decode the frames, and prepare each as the encoder of images does a picture."""
        from PIL import Image

        # One by one: a frame may be a hundred times as large as what is made of it.
        return [self.image.prepare(Image.fromarray(pixels)) for pixels in video.sample(raw, self.options.frames)]

    def encode(self, values: Sequence[list[Any]]) -> Floats:
        """Encode the frames of all videos, in batches of the size that the encoder of images was given, and pool."""
        self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        pictures = [picture for value in values for picture in value]
        size = self.image.batch_size
        made = [self.image.encode(pictures[at : at + size]) for at in range(0, len(pictures), size)]
        frames_NFD = np.concatenate(made).reshape(len(values), self.options.frames, self.image.dim)
        vectors = POOLS[self.options.pooling](frames_NFD)
        if self.normalised:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _load(self) -> Any:
        return self.image.load()


def _image_encoder(options: Options) -> BaseEncoder:
    able = [key for key in keys() if key != Encoder.key and "image" in modalities(key)]
    if options.image_encoder not in able:
        raise InputError(
            f"encoder {Encoder.key!r}: option 'image_encoder' = {options.image_encoder!r} is no encoder of images; "
            f"allowed: {', '.join(able)}"
        )
    made = find_for(options.image_encoder, options.image_options, "image")
    if made.modality != "image":
        raise InputError(
            f"encoder {Encoder.key!r}: option 'image_options': they make an encoder of {made.modality}, not image"
        )
    return made


def _pyramid(frames_NFD: Floats) -> Floats:
    """[N, 7 D]: the mean of the whole, then of each half, then of each quarter."""
    parts = [part for count in STRETCHES for part in np.split(frames_NFD, count, axis=1)]
    return np.concatenate([part.mean(1) for part in parts], axis=1)


POOLS: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda frames_NFD: frames_NFD.mean(1),
    "max": lambda frames_NFD: frames_NFD.max(1),
    "pyramid": _pyramid,
}
"""[N, F, D] -> one vector a video."""
