"""hf-image against transformers itself, on the same checkpoint and the same bytes."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from featurestore import encoders
from featurestore.errors import InputError
from tests.checkpoints import checkpoint

KINDS = ["dinov2", "efficientnet", "resnet", "vit"]


def photograph(size: tuple[int, int], kind: str = "PNG", seed: int = 0) -> bytes:
    """Smooth fields of colour with grain."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(small, np.int16) + random.integers(-12, 12, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def found(kind: str, **options: Any) -> Any:
    return encoders.find("hf-image", {"checkpoint": str(checkpoint(kind)), **options})


def theirs(kind: str, raw: bytes) -> tuple[torch.Tensor, Any]:
    """The pixels and the output of transformers' own."""
    processor = AutoImageProcessor.from_pretrained(checkpoint(kind), backend="pil")
    pixels = processor(Image.open(io.BytesIO(raw)).convert("RGB"), return_tensors="pt")
    with torch.inference_mode():
        return pixels["pixel_values"], AutoModel.from_pretrained(checkpoint(kind))(**pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_transformers(kind: str) -> None:
    raw, encoder = photograph((300, 200)), found(kind)
    pixels, output = theirs(kind, raw)
    assert np.array_equal(encoder.decode(raw), pixels[0])
    hidden = output.last_hidden_state
    expected = output.pooler_output.flatten() if hidden.ndim == 4 else hidden[0, 0]
    np.testing.assert_allclose(encoder.encode([encoder.decode(raw)])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_decoded_small_is_the_same_picture(kind: str) -> None:
    raw = photograph((1600, 1200), "JPEG")
    ours, (pixels, _) = found(kind).decode(raw), theirs(kind, raw)
    std = np.array(AutoImageProcessor.from_pretrained(checkpoint(kind), backend="pil").image_std).reshape(3, 1, 1)
    assert np.abs((ours - pixels[0].numpy()) * std).mean() <= 2 / 255


def test_patches_are_averaged_without_the_class_token() -> None:
    raw, encoder = photograph((64, 64)), found("vit", pooling="mean")
    _, output = theirs("vit", raw)
    np.testing.assert_allclose(
        encoder.encode([encoder.decode(raw)])[0], output.last_hidden_state[0, 1:].mean(0), atol=1e-5
    )


def test_vectors_of_length_one_where_asked() -> None:
    encoder = found("resnet", normalise=True)
    assert encoder.normalised
    assert np.linalg.norm(encoder.encode([encoder.decode(photograph((64, 64)))])) == pytest.approx(1, abs=1e-6)


def test_bfloat16_is_close() -> None:
    raws = [photograph((64, 64), seed=seed) for seed in range(3)]
    exact, rough = (
        encoder.encode([encoder.decode(raw) for raw in raws])
        for encoder in (found("vit", normalise=True), found("vit", normalise=True, dtype="bfloat16"))
    )
    assert 0 < np.abs(exact - rough).max() < 1e-2


def test_a_class_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="a convolutional model has no class token; allowed: mean, pooled"):
        found("resnet", pooling="cls")


def test_a_checkpoint_without_an_image_processor_is_refused() -> None:
    with pytest.raises(InputError, match="says nothing of how images are prepared"):
        encoders.find("hf-image", {"checkpoint": str(checkpoint("bert"))})
