"""clip and clap against transformers itself: both towers, one space."""

import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

from featurestore import encoders
from tests.checkpoints import checkpoint
from tests.featurestore.encoders.test_hf_image import photograph

TEXTS = ["a red bird", "x", "the long text of a black bird"]


def found(key: str, kind: str, modality: str, **options: Any) -> Any:
    return encoders.find_for(key, {"checkpoint": str(checkpoint(kind)), **options}, modality)


def unit(output: Any) -> np.ndarray:
    vectors: np.ndarray = torch.nn.functional.normalize(output.pooler_output, dim=1).numpy()
    return vectors


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_and_texts_are_those_of_the_whole_model(kind: str) -> None:
    model, folder = AutoModel.from_pretrained(checkpoint(kind)).eval(), checkpoint(kind)
    raws = [photograph((80, 60), seed=seed) for seed in range(3)]
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(
        [Image.open(io.BytesIO(raw)) for raw in raws], return_tensors="pt"
    )
    # As the authors of SigLIP say: padded to the end, always.
    padding = "max_length" if kind == "siglip" else True
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=padding, truncation=True, max_length=64, return_tensors="pt"
    )
    with torch.inference_mode():
        images, texts = unit(model.get_image_features(**pixels)), unit(model.get_text_features(**tokens))
    image, text = found("clip", kind, "image"), found("clip", kind, "text")
    np.testing.assert_allclose(image.encode([image.decode(raw) for raw in raws]), images, atol=1e-5)
    np.testing.assert_allclose(text.encode([text.decode(each.encode()) for each in TEXTS]), texts, atol=1e-5)
    assert image.dim == text.dim == images.shape[1]


@pytest.mark.parametrize(("key", "kind", "modality"), [("clip", "clip", "image"), ("clap", "clap", "audio")])
def test_a_tower_leaves_the_other_out_of_memory(key: str, kind: str, modality: str) -> None:
    whole = sum(each.numel() for each in AutoModel.from_pretrained(checkpoint(kind)).parameters())
    towers = [found(key, kind, each).load()[0] for each in (modality, "text")]
    assert sum(each.numel() for tower in towers for each in tower.parameters()) <= whole + 16


def sound(seconds: float, hertz: float = 440, rate: int = 48_000) -> bytes:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def test_sounds_are_those_of_the_whole_model_where_nothing_is_drawn() -> None:
    folder = checkpoint("clap")
    model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    raws = [sound(1.0), sound(2.0, 880)]
    waves = [soundfile.read(io.BytesIO(raw), dtype="float32")[0] for raw in raws]
    features = extractor(waves, sampling_rate=48_000, return_tensors="pt")["input_features"]
    with torch.inference_mode():
        theirs = unit(
            model.get_audio_features(input_features=features, is_longer=torch.zeros((2, 1), dtype=torch.bool))
        )
    encoder = found("clap", "clap", "audio")
    np.testing.assert_allclose(encoder.encode([encoder.decode(raw) for raw in raws]), theirs, atol=1e-5)


def test_a_long_sound_is_cut_at_the_same_place_each_time() -> None:
    encoder = found("clap", "clap", "audio")
    vectors = [encoder.encode([encoder.decode(raw)]) for raw in (sound(5.0), sound(5.0), sound(2.0))]
    assert np.array_equal(vectors[0], vectors[1])
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-4)


def test_texts_of_clap_are_those_of_the_whole_model() -> None:
    folder, encoder = checkpoint("clap"), found("clap", "clap", "text")
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = unit(AutoModel.from_pretrained(folder).get_text_features(**tokens))
    np.testing.assert_allclose(encoder.encode(TEXTS), theirs, atol=1e-5)


def test_a_prompt_stands_before_each_text() -> None:
    assert found("clip", "clip", "text", prompt="a photo of ").decode(b"a bird") == "a photo of a bird"
