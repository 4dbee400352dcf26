"""joint against transformers itself, on the same checkpoints and the same values, with a field missing too."""

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    IdeficsProcessor,
    PerceiverForMultimodalAutoencoding,
)

from featurestore import encoders, media, video
from featurestore.encoders import contract
from featurestore.encoders.joint_perceiver import around
from featurestore.encoders.joint_regions import boxes
from featurestore.encoders.runtime import tune_process
from featurestore.errors import InputError
from tests.checkpoints import checkpoint

TEXTS = ("a red bird", "the long text of a black bird, green")
IMAGES = [contract.image("red", (200, 90)), contract.image("blue", (40, 300))]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    tune_process()


@cache
def own(kind: str) -> Any:
    """Transformers' own model."""
    return AutoModel.from_pretrained(checkpoint(kind))


@cache
def found(kind: str, modality: str = "image+text", images: str | None = None, dtype: str = "float32") -> Any:
    more = {"image_checkpoint": str(checkpoint(images))} if images else {}
    return encoders.find("joint", {"checkpoint": str(checkpoint(kind)), "modality": modality, "dtype": dtype, **more})


def encoded(encoder: Any, *samples: tuple[bytes | None, ...]) -> np.ndarray:
    """Raw values of samples, None for what is missing, as one batch."""
    values = [[raw and encoder.decode_field(raw, place) for place, raw in enumerate(sample)] for sample in samples]
    return np.asarray(encoder.encode([encoder.joined(value) for value in values]))


def opened(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw)).convert("RGB")


def features(kind: str, raw: bytes) -> torch.Tensor:
    """[1, R, D]: the last layer's patches, row by row, by transformers alone."""
    pixels = AutoImageProcessor.from_pretrained(checkpoint(kind), backend="pil")(opened(raw), return_tensors="pt")
    hidden = own(kind)(**pixels).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, 1:]


def regions(kind: str, images: str, raw: bytes | None, text: str) -> np.ndarray:
    """VisualBERT's or LXMERT's own vector of one sample."""
    tokens = AutoTokenizer.from_pretrained(checkpoint(kind))(text, return_tensors="pt")
    model = own(kind)
    with torch.inference_mode():
        seen = None if raw is None else features(images, raw)
        if kind == "visual-bert":
            visual = {} if seen is None else {"visual_embeds": seen}
            return np.asarray(model(**tokens, **visual).pooler_output[0])
        side = 1 if seen is None else round(seen.shape[1] ** 0.5)
        at = torch.arange(side * side)
        corner = torch.stack([at % side, at // side], 1) / side
        places = torch.cat([corner, corner + 1 / side], 1)[None]
        visual = {"visual_feats": torch.zeros(1, 1, 32), "visual_pos": torch.zeros(1, 1, 4)}
        if seen is not None:
            visual = {"visual_feats": seen, "visual_pos": places}
        return np.asarray(model(**tokens, **visual).pooled_output[0])


@pytest.mark.parametrize(
    ("kind", "images"), [("visual-bert", "vit"), ("visual-bert", "resnet"), ("lxmert", "vit"), ("lxmert", "resnet")]
)
def test_regions_give_the_vectors_of_transformers(kind: str, images: str) -> None:
    encoder = found(kind, images=images)
    raws = [(IMAGES[0], TEXTS[0]), (None, TEXTS[1]), (IMAGES[1], None), (IMAGES[1], TEXTS[1])]
    ours = encoded(encoder, *[(image, text and text.encode()) for image, text in raws])
    theirs = [regions(kind, images, image, text or "") for image, text in raws]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(encoded(encoder, (None, b"a bird"))[0], regions(kind, images, None, "a bird"), atol=1e-4)


def test_fields_may_stand_in_either_order() -> None:
    one, other = found("visual-bert", images="vit"), found("visual-bert", "text+image", "vit")
    assert np.array_equal(encoded(one, (IMAGES[0], b"a bird")), encoded(other, (b"a bird", IMAGES[0])))
    assert one.fingerprint() != other.fingerprint()


def test_boxes_are_those_of_the_cells_row_by_row() -> None:
    assert boxes(1, 2) == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert boxes(2, 1) == [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]


@pytest.mark.parametrize(
    "sample",
    [(IMAGES[0], "a red bird"), ("a red bird", IMAGES[0]), (IMAGES[0], IMAGES[1], "blue"), ("a bird",), (IMAGES[1],)],
)
def test_idefics_gives_the_vectors_of_transformers(sample: tuple[Any, ...]) -> None:
    folder = checkpoint("idefics")
    processor = IdeficsProcessor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
    )
    inputs = processor(text=[[opened(part) if isinstance(part, bytes) else part for part in sample]])
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        theirs = own("idefics")(**inputs).last_hidden_state[:, -1]
    missing = (None,) if len(sample) == 1 else ()
    modality = "+".join("image" if isinstance(part, bytes) else "text" for part in sample)
    other = {"image": "+text", "text": "+image"}.get(modality, "")
    raws = tuple(part.encode() if isinstance(part, str) else part for part in sample)
    # Beside a longer prompt and one of more images.
    encoder = found("idefics", modality + other)
    np.testing.assert_allclose(encoded(encoder, (*raws, *missing)), theirs, atol=1e-4)


@pytest.mark.parametrize("modality", ["image+text", "video+audio"])
def test_the_libraries_that_it_decodes_with_are_in_its_card(modality: str) -> None:
    kind = "idefics" if modality == "image+text" else "perceiver"
    libraries = found(kind, modality).card()["libraries"]
    assert ({"av", "soundfile", "soxr"} <= libraries.keys()) == (modality == "video+audio")
    assert {"pillow", "torch", "transformers"} <= libraries.keys()


def test_an_image_behind_a_text_that_is_too_long_is_seen() -> None:
    long = "a red bird of the long text " * 500
    text_first, around = found("idefics", "text+image"), found("idefics", "text+image+text")
    (one, other, none) = encoded(text_first, *[(long.encode(), image) for image in (IMAGES[0], IMAGES[1], None)])
    assert min(np.abs(one - other).max(), np.abs(one - none).max()) > 1e-3
    # The prompt is cut to 2048 tokens: one that begins it, and three of the image.
    words = "a red bird of the long text " * 292
    np.testing.assert_allclose(encoded(text_first, (words.encode(), IMAGES[0]))[0], one, atol=1e-5)
    one, other = encoded(around, *[(long.encode(), image, b"a bird") for image in IMAGES[:2]])
    assert np.abs(one - other).max() > 1e-3


def test_a_text_can_neither_name_an_image_nor_fetch_one() -> None:
    encoder = found("idefics")
    plain, named = encoded(encoder, (IMAGES[0], b"a bird")), encoded(encoder, (IMAGES[0], b"a <image>bird"))
    assert np.array_equal(plain, named)
    assert np.isfinite(encoded(encoder, (None, b"http://127.0.0.1:9/x.png"))).all()


def test_perceiver_gives_the_vectors_of_transformers() -> None:
    encoder = found("perceiver", "video+audio")
    film, sound = contract.examples("video")[0], contract.examples("audio")[1]
    folder = checkpoint("perceiver")
    model = PerceiverForMultimodalAutoencoding.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    frames = [processor(Image.fromarray(each), return_tensors="pt")["pixel_values"] for each in video.sample(film, 4)]
    heard = torch.from_numpy(around(media.decode_audio(sound, 16_000), 4, 640))[None, :, None]
    inputs = {"image": torch.cat(frames)[None], "audio": heard, "label": torch.zeros(1, 7)}
    masks = torch.ones(3, 160 + 64 + 1)
    masks[1, :160], masks[2, 160:-1] = 0, 0
    with torch.inference_mode():
        model.perceiver.decoder = None
        theirs = torch.cat([model.perceiver(inputs, attention_mask=each[None]).last_hidden_state for each in masks])
    ours = encoded(encoder, (film, sound), (film, None), (None, sound))
    np.testing.assert_allclose(ours, theirs.mean(1), atol=1e-4)
    np.testing.assert_allclose(encoded(encoder, (None, sound))[0], ours[2], atol=1e-5)


def test_of_a_sound_there_is_as_much_as_of_frames_around_their_times() -> None:
    samples = np.arange(1000, dtype=np.float32)
    assert np.array_equal(around(samples, 5, 200), samples)
    assert np.array_equal(around(samples[:7], 2, 5), [0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert np.array_equal(around(samples, 2, 4), [248, 249, 250, 251, 748, 749, 750, 751])


@pytest.mark.parametrize(
    ("kind", "modality", "images", "dtype", "told"),
    [
        (
            "lxmert",
            "image+text",
            None,
            "float32",
            "it reads regions of an image, 32 values each; name option 'image_checkpoint'",
        ),
        ("lxmert", "image+text", "efficientnet", "float32", "has patches of 128 values; a region of this one has 32"),
        (
            "visual-bert",
            "image+image",
            "vit",
            "float32",
            "it reads an image and a text, in either order, not image.image",
        ),
        ("idefics", "video+audio", None, "float32", "it reads images and texts, not video.audio"),
        ("perceiver", "image+text", None, "float32", "it reads a video and a sound, in either order, not image.text"),
        ("perceiver", "video+audio", None, "bfloat16", "option 'dtype' = 'bfloat16': transformers mixes it"),
        (
            "bert",
            "image+text",
            None,
            "float32",
            "its model_type is 'bert'; allowed: idefics, lxmert, perceiver, visual_bert",
        ),
        ("idefics", "image", None, "float32", "option 'modality' = 'image' is not allowed"),
    ],
)
def test_what_does_not_fit_is_told(kind: str, modality: str, images: str | None, dtype: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        found(kind, modality, images, dtype)


@pytest.mark.parametrize(("kind", "images"), [("visual-bert", "vit"), ("lxmert", "vit"), ("idefics", None)])
def test_bfloat16_is_near_float32(kind: str, images: str | None) -> None:
    samples = [(IMAGES[0], b"a red bird"), (None, b"a bird"), (IMAGES[1], None)]
    plain, half = (encoded(found(kind, images=images, dtype=each), *samples) for each in ("float32", "bfloat16"))
    cosines = (plain * half).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(half, axis=1)
    assert cosines.min() > 1 - 1e-2


def test_the_card_says_what_stands_for_regions_and_both_checkpoints_are_in_the_fingerprint() -> None:
    encoder = found("lxmert", images="vit")
    card = encoder.card()
    assert card["modality"] == "image+text"
    assert "no detector's" in card["preprocessing"]["regions"]
    assert {"model.safetensors", "image/model.safetensors"} <= set(card["weights"])
    assert str(checkpoint("vit")) not in str({**card, "address": {}})
    assert found("lxmert", images="dinov2").fingerprint() != encoder.fingerprint()
