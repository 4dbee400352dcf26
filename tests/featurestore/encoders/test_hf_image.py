"""hf-image against transformers itself, on the same checkpoint and the same bytes."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from featurestore import encoders, media
from featurestore.errors import InputError
from tests.checkpoints import SIDE, TINY, checkpoint, drawn

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


def drawing(kind: str, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]: what a photograph is like, noise, or blocks of a few pixels as those of letters."""
    random = np.random.default_rng(0)
    if kind == "photograph":
        return np.asarray(Image.open(io.BytesIO(photograph((width, height), "BMP"))))
    if kind == "noise":
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    block, colours = (int(kind.partition(" ")[2]), 3 if kind.startswith("coloured") else 1)
    cells = random.integers(0, 2, (-(-height // block), -(-width // block), colours), dtype=np.uint8) * 255
    return np.kron(cells, np.ones((block, block, 3 // colours), np.uint8))[:height, :width]


@pytest.fixture(
    params=["CLIPImageProcessorPil", "ViTImageProcessorPil", "ConvNextImageProcessorPil", "SiglipImageProcessorPil"]
)
def real_size(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A processor as of the hub: 224 pixels, bicubic or bilinear, cropped or not."""
    folder = Path(shutil.copytree(checkpoint("vit"), tmp_path / "vit"))
    getattr(transformers, request.param)().save_pretrained(folder)
    return encoders.find("hf-image", {"checkpoint": str(folder)})


@pytest.mark.parametrize("kind", ["photograph", "noise", "black 3", "black 6", "black 10", "coloured 6"])
def test_a_jpeg_decoded_small_is_the_same_picture(kind: str, real_size: Any) -> None:
    # The smallest that is decoded at half its size: of larger ones more is left.
    side = 2 * real_size.processor.decode_side
    buffer = io.BytesIO()
    Image.fromarray(drawing(kind, side * 5 // 4, side)).save(buffer, "JPEG", quality=90)
    small = media.decode_image(buffer.getvalue(), smallest_side=real_size.processor.decode_side)
    assert small.height == side // 2
    std = np.array(real_size.processor.own["image_std"], np.float32).reshape(3, 1, 1)
    whole = real_size.prepare(media.decode_image(buffer.getvalue()))
    assert np.abs((real_size.decode(buffer.getvalue()) - whole) * std).mean() <= 2 / 255


def test_the_nearest_pixel_is_that_of_the_whole_picture(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("vit"), tmp_path / "vit"))
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=0).save_pretrained(folder)
    raw, encoder = photograph((1600, 1200), "JPEG"), encoders.find("hf-image", {"checkpoint": str(folder)})
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")(Image.open(io.BytesIO(raw)), return_tensors="np")
    assert np.array_equal(encoder.decode(raw), own["pixel_values"][0])


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
    with pytest.raises(InputError, match=r"no class token is known of a 'resnet', as .*; allowed: mean, pooled"):
        found("resnet", pooling="cls")


def saved(folder: Path, kind: str, **settings: Any) -> Path:
    """A checkpoint of another architecture, of 16 patches."""
    config = AutoConfig.for_model(kind, **{**TINY, "image_size": SIDE, "patch_size": 8, **settings})
    drawn(AutoModel.from_config(config)).save_pretrained(folder)
    shutil.copy(checkpoint("vit") / "preprocessor_config.json", folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "tokens"),
    [
        ("beit", {}, 1),
        ("clip_vision_model", {}, 1),
        ("deit", {}, 2),
        ("dinov2_with_registers", {"num_register_tokens": 3}, 4),
        ("dinov3_vit", {"num_register_tokens": 2}, 3),
        ("ijepa", {}, 0),
        ("siglip_vision_model", {}, 0),
        ("vit_msn", {}, 1),
    ],
)
def test_the_mean_is_of_the_patches_alone(kind: str, settings: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    folder = str(saved(tmp_path / kind, kind, **settings))
    encoder: Any = encoders.find("hf-image", {"checkpoint": folder, "pooling": "mean"})
    values = [encoder.decode(photograph((64, 64)))]
    with torch.inference_mode():
        (hidden,) = AutoModel.from_pretrained(folder)(torch.from_numpy(np.stack(values))).last_hidden_state
    assert len(hidden) == 16 + tokens
    np.testing.assert_allclose(encoder.encode(values)[0], hidden[tokens:].mean(0), atol=1e-5)
    np.testing.assert_allclose(encoder.patches(values)[0][0], hidden[tokens:], atol=1e-5)
    named = encoders.find("hf-image", {"checkpoint": folder}).preprocessing()["pooling"]
    assert named == ("cls" if tokens else "pooled")


def test_siglip_has_no_class_token(tmp_path: Path) -> None:
    folder = saved(tmp_path / "siglip", "siglip_vision_model")
    with pytest.raises(InputError, match="no class token is known of a 'siglip_vision_model'"):
        encoders.find("hf-image", {"checkpoint": str(folder), "pooling": "cls"})


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_model_that_masks_at_random_is_refused_when_it_is_loaded(pooling: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "mae", "vit_mae", decoder_num_attention_heads=4, decoder_hidden_size=32)
    with pytest.raises(InputError, match=r"gives one image other vectors each time, .* apart: it is random"):
        encoders.find("hf-image", {"checkpoint": str(folder), "pooling": pooling}).load()


def test_where_patches_begin_is_not_guessed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "yolos", "yolos", num_detection_tokens=5, image_size=[SIDE, SIDE])
    encoder = encoders.find("hf-image", {"checkpoint": str(folder), "pooling": "mean"})
    with pytest.raises(InputError, match=r"not known where its patches begin, .*'pooling': pooled"):
        encoder.load()


def test_a_model_that_cannot_encode_an_image_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("clip"), tmp_path / "clip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(InputError, match="is none for encoder 'hf-image': it cannot encode an image: ValueError"):
        encoders.find("hf-image", {"checkpoint": str(folder)}).load()


def test_a_checkpoint_without_an_image_processor_is_refused() -> None:
    with pytest.raises(InputError, match="says nothing of how images are prepared"):
        encoders.find("hf-image", {"checkpoint": str(checkpoint("bert"))})
