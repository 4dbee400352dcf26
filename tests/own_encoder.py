"""A person's own encoder, as `torch` takes one."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np


class MeanColour:
    """Mean colour and size of an image."""

    modality, dim, version = "image", 4, "1"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def load(self) -> float:
        return self.scale

    def encode(self, model: float, values: Sequence[Any]) -> np.ndarray:
        rows = [[*(value.mean((0, 1)) / 255), sum(value.shape) / 100] for value in values]
        return np.array(rows, np.float32) * model


class Hungry:
    """Length and letters of a text; a GPU's memory holds `most` of them, and none that says `too_long`."""

    modality, dim, version = "text", 3, "1"

    def __init__(self, most: int, too_long: str = "") -> None:
        self.most, self.too_long = most, too_long
        self.asked: list[int] = []
        self.held = threading.local()

    def load(self) -> None:
        return None

    def encode(self, model: None, values: Sequence[str]) -> np.ndarray:
        import torch

        held = getattr(self.held, "by", lambda: None)
        assert held() is None, "what this thread's call before had allocated is still there"
        self.asked.append(len(values))
        activations = np.zeros(len(values))
        self.held.by = weakref.ref(activations)
        if len(values) > self.most or (self.too_long and any(self.too_long in value for value in values)):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(self.asked)}.00 GiB.")
        return np.array([[len(value), value.count("e"), 1] for value in values], np.float32)
