"""video-frames: which pictures the encoder of images is given, and what becomes of their vectors."""

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurestore import encoders, video
from featurestore.encoders import contract
from featurestore.errors import DecodeError, InputError
from tests import videos
from tests.checkpoints import checkpoint

TIMES = [100 * number for number in range(16)]


def vit(folder: Path | None = None) -> dict[str, Any]:
    return {"image_encoder": "hf-image", "image_options": {"checkpoint": str(folder or checkpoint("vit"))}}


def found(**options: Any) -> Any:
    return encoders.find("video-frames", {**vit(), **options})


def encoded(raw: bytes, **options: Any) -> np.ndarray:
    encoder = found(**options)
    vector: np.ndarray = encoder.encode([encoder.decode(raw)])[0]
    return vector


def by_hand(raw: bytes, frames: int) -> np.ndarray:
    """The vectors of the frames, each written as a PNG and read as any picture is."""
    image = encoders.find("hf-image", vit()["image_options"])
    made = []
    for pixels in video.sample(raw, frames):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        made.append(image.encode([image.decode(buffer.getvalue())])[0])
    return np.stack(made)


def moving(backwards: bool = False) -> bytes:
    """A video that grows lighter, or darker."""
    drawn = [videos.grey(number) for number in range(16)]
    return videos.video(TIMES, "mkv", greys=drawn[::-1] if backwards else drawn)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("efficientnet-lite0", {}),
        ("hf-image", {"checkpoint": "vit"}),
        ("hf-image", {"checkpoint": "resnet"}),
        ("clip", {"checkpoint": "clip"}),
    ],
)
def test_a_picture_is_prepared_as_its_file_is_decoded(key: str, options: dict[str, str]) -> None:
    image = encoders.find(key, {name: str(checkpoint(kind)) for name, kind in options.items()})
    raw = contract.examples("image")[0]
    picture = Image.open(io.BytesIO(raw))
    assert np.array_equal(image.prepare(picture), image.decode(raw))
    assert np.array_equal(encoders.BaseEncoder.prepare(image, picture), image.decode(raw)), "what other encoders do"


@pytest.mark.parametrize("container", videos.CODECS)
def test_vectors_are_those_of_the_pictures_pooled(container: str) -> None:
    raw = videos.video(TIMES, container)
    alone = by_hand(raw, 8)
    np.testing.assert_allclose(encoded(raw), alone.mean(0), atol=1e-5)
    np.testing.assert_allclose(encoded(raw, pooling="max"), alone.max(0), atol=1e-5)


def test_a_pyramid_is_of_the_whole_its_halves_and_its_quarters() -> None:
    raw, alone = moving(), by_hand(moving(), 8)
    parts = [alone, alone[:4], alone[4:], alone[:2], alone[2:4], alone[4:6], alone[6:]]
    np.testing.assert_allclose(encoded(raw, pooling="pyramid"), np.concatenate([p.mean(0) for p in parts]), atol=1e-5)
    assert found(pooling="pyramid").dim == 7 * 32


def test_a_pyramid_tells_a_video_from_the_same_played_backwards_and_a_mean_does_not() -> None:
    mean = np.abs(encoded(moving()) - encoded(moving(backwards=True))).max()
    pyramid = np.abs(encoded(moving(), pooling="pyramid") - encoded(moving(backwards=True), pooling="pyramid")).max()
    assert 5 * mean < pyramid, (mean, pyramid)


def test_frames_that_make_no_quarters_are_refused() -> None:
    with pytest.raises(InputError, match=r"'frames' = 6 cannot be cut into quarters.*take a multiple of 4"):
        found(pooling="pyramid", frames=6)


def test_one_frame_stands_for_all() -> None:
    raw = videos.video([0], "mkv")
    np.testing.assert_allclose(encoded(raw), by_hand(raw, 1)[0], atol=1e-5)


def test_neither_the_batch_of_videos_nor_that_of_pictures_matters() -> None:
    raws = [videos.video(TIMES[:count], "mkv") for count in (1, 5, 16)]
    encoder = found(normalise=True)
    together = encoder.encode([encoder.decode(raw) for raw in raws])
    options = {**vit()["image_options"], "batch_size": 3}
    alone = [encoded(raw, normalise=True, image_options=options) for raw in raws]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_a_bad_video_fails_alone() -> None:
    encoder, whole = found(), videos.video(TIMES, "mkv")
    for bad, reason in ((whole[:-1], "decode_error"), (videos.sound(), "no_stream"), (b"", "empty")):
        with pytest.raises(DecodeError) as caught:
            encoder.decode(bad)
        assert caught.value.reason == reason
    assert len(encoder.decode(whole)) == 8


def test_the_fingerprint_is_of_the_encoder_of_images_wherever_its_weights_lie(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoint("vit"), elsewhere)
    before = found().fingerprint()
    assert found(**vit(elsewhere)).fingerprint() == before
    others = [
        found(frames=4),
        found(image_options={**vit()["image_options"], "pooling": "mean"}),
        found(**vit(checkpoint("dinov2"))),
        encoders.find("video-frames"),
    ]
    assert len({before, *(each.fingerprint() for each in others)}) == 5


def test_a_card_makes_the_same_encoder_again_and_imports_nobodys_class() -> None:
    encoder = found()
    assert encoders.find_as(encoder.card()).fingerprint() == encoder.fingerprint()
    for name in ("class", "class_"):
        card = {
            "key": "video-frames",
            "options": {"image_encoder": "torch"},
            "address": {"image_options": {name: "this:x"}},
        }
        with pytest.raises(InputError, match=r"made by 'this:x': import this before, if you trust it"):
            encoders.find_as(card)
        with pytest.raises(InputError, match=r"import this before"):
            encoders.find_as({"key": "torch", "options": {}, "address": {name: "this:x"}})
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"image_encoder": "log-mel"},
            r"'image_encoder' = 'log-mel' is no encoder of images; allowed: clip, efficientnet",
        ),
        ({"image_encoder": "video-frames"}, "is no encoder of images"),
        ({"image_options": {"chekpoint": "x"}}, r"encoder 'hf-image': .*did you mean 'checkpoint'"),
        ({"frames": 0}, r"'frames' = 0 is not allowed"),
    ],
)
def test_what_encodes_no_pictures_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        found(**options)


def test_the_tower_of_texts_is_refused() -> None:
    with pytest.raises(InputError, match="they make an encoder of text, not image"):
        encoders.find(
            "video-frames",
            {"image_encoder": "clip", "image_options": {"checkpoint": str(checkpoint("clip")), "modality": "text"}},
        )


def test_the_training_ended_when_that_of_the_encoder_of_images_did() -> None:
    options = vit()["image_options"] | {"trained_until": "2021-03-01"}
    encoder = found(image_options=options)
    assert encoder.card()["trained_until"] == "2021-03-01"
    assert encoder.fingerprint() == found().fingerprint()
    assert found().card()["trained_until"] is None
