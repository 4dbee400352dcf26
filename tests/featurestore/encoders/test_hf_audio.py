"""hf-audio against transformers itself, one sound at a time and without padding."""

import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel

from featurestore import encoders
from featurestore.errors import InputError
from tests.checkpoints import checkpoint
from tests.featurestore.encoders.test_towers import sound

RAWS = [sound(1.0, 440, 16_000), sound(0.4, 880, 16_000), sound(2.1, 220, 16_000)]


def found(kind: str, **options: Any) -> Any:
    return encoders.find("hf-audio", {"checkpoint": str(checkpoint(kind)), **options})


def theirs(kind: str, raw: bytes) -> np.ndarray:
    folder = checkpoint(kind)
    model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32")
    features = extractor(wave, sampling_rate=rate, return_tensors="pt")
    with torch.inference_mode():
        if kind == "whisper":
            frames = -(-len(wave) // 320)
            return model.encoder(features["input_features"]).last_hidden_state[0, :frames].mean(0).numpy()
        output = model(features["input_values"])
        return (output.pooler_output[0] if kind == "ast" else output.last_hidden_state[0].mean(0)).numpy()


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize("kind", ["ast", "hubert", "wav2vec2", "whisper"])
def test_vectors_of_a_batch_are_those_of_each_sound_alone(kind: str) -> None:
    encoder = found(kind)
    vectors = encoder.encode([encoder.decode(raw) for raw in RAWS])
    np.testing.assert_allclose(vectors, np.stack([theirs(kind, raw) for raw in RAWS]), rtol=1e-4, atol=1e-4)


def test_sounds_are_cut_where_the_option_or_the_checkpoint_says() -> None:
    assert found("wav2vec2", max_seconds=0.5).decode(RAWS[0])[1] == 8_000
    assert found("whisper", max_seconds=60).processor.max_seconds == 30


@pytest.mark.parametrize("kind", ["hubert", "whisper"])
def test_bfloat16_is_close(kind: str) -> None:
    exact, rough = (
        encoder.encode([encoder.decode(raw) for raw in RAWS])
        for encoder in (found(kind, normalise=True), found(kind, normalise=True, dtype="bfloat16"))
    )
    assert 0 < np.abs(exact - rough).max() < 2e-2


def test_a_checkpoint_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="it is a 'bert'; allowed: wav2vec2, hubert"):
        encoders.find("hf-audio", {"checkpoint": str(checkpoint("bert"))})
