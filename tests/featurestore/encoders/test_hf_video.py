"""hf-video against transformers itself, on the same checkpoint and the same frames."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, VideoMAEForVideoClassification, VideoMAEImageProcessorPil

from featurestore import encoders, video
from featurestore.encoders import contract
from featurestore.errors import DecodeError, InputError
from tests import videos
from tests.checkpoints import checkpoint

FRAMES = {"videomae": 4, "xclip": 8}
kinds = pytest.mark.parametrize("kind", FRAMES)


def found(kind: str | Path, **options: Any) -> Any:
    folder = checkpoint(kind) if isinstance(kind, str) else kind
    return encoders.find("hf-video", {"checkpoint": str(folder), **options})


def theirs(kind: str, raws: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels of all videos in one call, and the vectors, of transformers' own."""
    folder = checkpoint(kind)
    frames = [list(video.sample(raw, FRAMES[kind])) for raw in raws]
    pixels = VideoMAEImageProcessorPil.from_pretrained(folder)(frames, return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        if kind == "videomae":
            return pixels, model(pixel_values=pixels).last_hidden_state.mean(1)
        text = {"input_ids": torch.tensor([[2, 5, 3]] * len(raws)), "attention_mask": torch.ones(len(raws), 3)}
        # Whole, as it is trained: with texts, whose scores want videos of length 1.
        return pixels, model(pixel_values=pixels, **text).video_embeds


@kinds
def test_vectors_are_those_of_transformers(kind: str) -> None:
    raws = contract.examples("video")
    encoder = found(kind, normalise=kind == "xclip")
    values = [encoder.decode(raw) for raw in raws]
    pixels, vectors = theirs(kind, raws)
    assert np.array_equal(np.stack(values), pixels)
    np.testing.assert_allclose(encoder.encode(values), vectors, atol=1e-4, rtol=1e-4)
    assert encoder.dim == vectors.shape[1]


@kinds
def test_as_many_frames_are_taken_as_the_checkpoint_was_trained_on(kind: str) -> None:
    config = json.loads((checkpoint(kind) / "config.json").read_text())
    told = config.get("num_frames", config.get("vision_config", {}).get("num_frames"))
    assert told in (None, FRAMES[kind])
    encoder = found(kind)
    assert (
        encoder.frames
        == FRAMES[kind]
        == AutoModel.from_pretrained(checkpoint(kind)).config.to_dict().get("num_frames", 8)
    )
    assert encoder.decode(videos.video([0], "mkv")).shape == (FRAMES[kind], 3, 32, 32)


def test_a_checkpoint_with_a_head_is_read_without_it(tmp_path: Path) -> None:
    raw = contract.examples("video")[0]
    folder = tmp_path / "classifies"
    shutil.copytree(checkpoint("videomae"), folder)
    (folder / "model.safetensors").unlink()
    whole = VideoMAEForVideoClassification.from_pretrained(checkpoint("videomae"))
    whole.save_pretrained(folder)
    ours = found(folder)
    before = found("videomae")
    assert np.array_equal(ours.encode([ours.decode(raw)]), before.encode([before.decode(raw)]))


def test_the_order_of_frames_tells() -> None:
    for kind in FRAMES:
        encoder = found(kind, normalise=True)
        value = encoder.decode(contract.examples("video")[6])
        forth, back = encoder.encode([value, value[::-1]])
        assert np.abs(forth - back).max() > 3e-4, kind


def test_the_tower_of_texts_is_left_out_of_memory() -> None:
    assert {name for name, _ in found("xclip").load().named_children()} == {"vision_model", "visual_projection", "mit"}


@kinds
def test_a_bad_video_fails_alone(kind: str) -> None:
    whole = videos.video([0, 40, 80], "mkv")
    for bad, reason in ((whole[:-1], "decode_error"), (videos.sound(), "no_stream"), (b"", "empty")):
        with pytest.raises(DecodeError) as caught:
            found(kind).decode(bad)
        assert caught.value.reason == reason


def test_a_checkpoint_of_pictures_is_refused() -> None:
    with pytest.raises(InputError, match="its model_type is 'vit'; allowed: videomae, xclip"):
        found("vit")
