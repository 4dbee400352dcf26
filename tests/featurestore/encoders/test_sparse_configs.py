"""Checkpoints whose config.json leaves out what transformers has a default of, as those of the hub do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from featurestore import encoders
from featurestore.encoders import BaseEncoder, contract
from featurestore.errors import InputError
from tests.checkpoints import checkpoint

CASES = [
    ("clap", "clap", {"modality": "text"}),
    ("clap", "clap", {"modality": "audio"}),
    ("clip", "clip", {"modality": "image"}),
    ("clip", "clip", {"modality": "text"}),
    ("clip", "siglip", {"modality": "image"}),
    ("clip", "siglip", {"modality": "text"}),
    *[("hf-audio", kind, {}) for kind in ("ast", "hubert", "wav2vec2", "whisper")],
    *[("hf-image", kind, {}) for kind in ("dinov2", "efficientnet", "resnet", "vit")],
    ("hf-text", "bert", {}),
    *[("hf-video", kind, {}) for kind in ("videomae", "xclip")],
    ("joint", "idefics", {}),
    ("joint", "perceiver", {"modality": "video+audio"}),
]


def without_defaults(written: dict[str, Any], config: Any) -> dict[str, Any]:
    """A config.json without each key that says what the class takes anyway."""
    defaults = json.loads(type(config)().to_json_string(use_diff=False))
    kept = {
        name: without_defaults(value, getattr(config, name))
        if isinstance(value, dict) and hasattr(getattr(config, name, None), "model_type")
        else value
        for name, value in written.items()
    }
    return {name: value for name, value in kept.items() if name == "model_type" or value != defaults.get(name, ...)}


def vectors(encoder: BaseEncoder) -> np.ndarray:
    return encoder.encode([contract.decoded(encoder, each) for each in contract.samples(encoder)])


@pytest.mark.parametrize(("key", "kind", "options"), CASES)
def test_what_a_config_leaves_out_changes_no_vector(
    key: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = encoders.find(key, {"checkpoint": str(checkpoint(kind)), **options})
    folder = Path(shutil.copytree(checkpoint(kind), tmp_path / kind))
    written = json.loads((folder / "config.json").read_text())
    sparse = without_defaults(written, AutoConfig.from_pretrained(folder))
    assert len(json.dumps(sparse)) < len(json.dumps(written))
    (folder / "config.json").write_text(json.dumps(sparse))
    left = encoders.find(key, {"checkpoint": str(folder), **options})
    assert (left.dim, left.preprocessing()) == (whole.dim, whole.preprocessing())
    assert np.array_equal(vectors(left), vectors(whole))


def stated(folder: Path, kind: str, **config: Any) -> Path:
    """A checkpoint as far as it can be told without its weights."""
    folder.mkdir()
    shutil.copy(checkpoint(kind) / "preprocessor_config.json", folder)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_like_that_of_siglip_on_the_hub_is_understood(tmp_path: Path) -> None:
    # google/siglip-base-patch16-224
    parts = {f"{part}_config": {"model_type": f"siglip_{part}_model"} for part in ("text", "vision")}
    folder = stated(tmp_path / "siglip", "siglip", architectures=["SiglipModel"], model_type="siglip", **parts)
    text = encoders.find("clip", {"checkpoint": str(folder), "modality": "text"})
    assert text.dim == encoders.find("clip", {"checkpoint": str(folder)}).dim == 768
    assert text.preprocessing()["max_tokens"] == 64


def test_what_one_setting_leaves_out_is_not_what_another_says(tmp_path: Path) -> None:
    folder = stated(tmp_path / "clip", "clip", model_type="clip", text_config={"hidden_size": 640})
    assert encoders.find("clip", {"checkpoint": str(folder)}).dim == 512


def test_an_attention_model_is_no_convolutional_one_though_it_does_not_say_its_heads(tmp_path: Path) -> None:
    folder = stated(tmp_path / "vit", "vit", model_type="vit")
    encoder = encoders.find("hf-image", {"checkpoint": str(folder)})
    assert (encoder.dim, encoder.preprocessing()["pooling"]) == (768, "cls")


@pytest.mark.parametrize("config", [{}, {"model_type": "no_such"}, {"model_type": "bert", "hidden_size": "many"}])
def test_a_config_that_transformers_cannot_read_is_told(config: dict[str, Any], tmp_path: Path) -> None:
    folder = stated(tmp_path / "bert", "vit", **config)
    with pytest.raises(InputError, match=r"is none for encoder 'hf-text': its config\.json"):
        encoders.find("hf-text", {"checkpoint": str(folder)})
