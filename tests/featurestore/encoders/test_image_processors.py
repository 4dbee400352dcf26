"""Images are prepared in one pass as the checkpoint's own processor prepares them, or by itself where that differs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from featurestore import encoders
from tests.checkpoints import checkpoint

SIZES = ((1, 1), (1, 40), (33, 31), (97, 64), (64, 97), (500, 20))


def processor_of(folder: Path) -> Any:
    return encoders.find("hf-image", {"checkpoint": str(folder)}).processor  # type: ignore[attr-defined]


def drawn(size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(sum(size))
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def check_same(folder: Path, processor: Any) -> None:
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for size in SIZES:
        made = processor(drawn(size))
        assert made.dtype == np.float32
        assert made.flags.c_contiguous
        assert np.array_equal(made, own(drawn(size), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize(
    ("kind", "in_one_pass"), [("vit", True), ("dinov2", True), ("resnet", False), ("efficientnet", True)]
)
def test_components_are_those_of_the_checkpoints_own(kind: str, in_one_pass: bool) -> None:
    processor = processor_of(checkpoint(kind))
    check_same(checkpoint(kind), processor)
    assert (processor._steps is not None) == in_one_pass


@pytest.mark.parametrize(
    ("change", "in_one_pass"),
    [
        ({"do_normalize": False}, True),
        ({"do_rescale": False, "image_mean": [9, 99, 127], "image_std": [50, 60, 70]}, True),
        ({"do_resize": False, "do_center_crop": False}, False),
        ({"crop_size": {"height": 48, "width": 20}}, False),
    ],
)
def test_whatever_the_checkpoint_says(change: dict[str, Any], in_one_pass: bool, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("dinov2"), tmp_path / "dinov2"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    processor = processor_of(folder)
    check_same(folder, processor)
    assert (processor._steps is not None) == in_one_pass
