"""What every encoder promises, checked on each that there is: with its real weights, or with a small checkpoint of each
architecture that people name, made here and loaded as any other is."""

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurestore import encoders
from featurestore.encoders import BaseEncoder, contract
from featurestore.encoders.runtime import tune_process
from featurestore.errors import InputError
from tests import videos
from tests.checkpoints import SIDE, checkpoint
from tests.embeddings_server import EmbeddingsServer, serving

# Encoder, the kind of checkpoint (tests/checkpoints.py) that it is given, and the modality, where it takes several.
CASES = [
    "clap/clap/audio",
    "clap/clap/text",
    "clip/clip/image",
    "clip/clip/text",
    "clip/siglip/image",
    "clip/siglip/text",
    "efficientnet-lite0",
    "hf-audio/ast",
    "hf-audio/hubert",
    "hf-audio/wav2vec2",
    "hf-audio/whisper",
    "hf-image/dinov2",
    "hf-image/efficientnet",
    "hf-image/resnet",
    "hf-image/vit",
    "hf-text/bert",
    "hf-video/videomae",
    "hf-video/xclip",
    "joint/idefics/image+text",
    "joint/lxmert/image+text",
    "joint/perceiver/video+audio",
    "joint/visual-bert/text+image",
    "log-mel",
    "mfcc",
    "minilm-l6",
    "remote/server/image",
    "remote/server/text",
    "sensor",
    "sensor-program/program",
    "static/table",
    "torch",
    "video-frames/vit",
    "word-vectors/words",
]
every = pytest.mark.parametrize("case", CASES)
# An option of each encoder with a value that is not its default.
OTHER_OPTION: dict[str, dict[str, Any]] = {
    "clap": {"prompt": "the sound of "},
    "clip": {"prompt": "a photo of "},
    "efficientnet-lite0": {"batch_size": 9},
    "hf-audio": {"max_seconds": 5.0},
    "hf-image": {"normalise": True},
    "hf-text": {"pooling": "cls"},
    "hf-video": {"normalise": True},
    "joint": {"normalise": True},
    "log-mel": {"n_mels": 32},
    "mfcc": {"n_mfcc": 13},
    "minilm-l6": {"batch_size": 9},
    "remote": {"version": "2"},
    "sensor": {"bands": 4},
    "sensor-program": {"batch_size": 9},
    "static": {"normalise": True},
    "torch": {"arguments": {"scale": 2.0}},
    "video-frames": {"pooling": "max"},
    "word-vectors": {"pooling": "sif"},
}


_HELD = ExitStack()


def key_of(case: str) -> str:
    return case.partition("/")[0]


def options(case: str) -> dict[str, Any]:
    kind, _, modality = case.partition("/")[2].partition("/")
    if kind == "server":
        return {"endpoint": server().endpoint, "model": "m", "dim": 16, "modality": modality}
    if key_of(case) == "sensor":
        return {"channels": contract.CHANNELS}
    if key_of(case) == "sensor-program":
        program = str(checkpoint(kind) / "gait.pt2")
        return {"program": program, "channels": contract.CHANNELS, "length": SIDE, "dim": 8}
    if key_of(case) == "torch":
        return {"class": "tests.own_encoder:MeanColour"}
    if key_of(case) == "word-vectors":
        return {"vectors": str(checkpoint(kind) / "words.txt")}
    if key_of(case) == "video-frames":
        return {"image_encoder": "hf-image", "image_options": {"checkpoint": str(checkpoint(kind))}}
    if kind in ("lxmert", "visual-bert"):
        images = {"image_checkpoint": str(checkpoint("vit" if kind == "lxmert" else "resnet"))}
        return {"checkpoint": str(checkpoint(kind)), "modality": modality} | images
    return ({"checkpoint": str(checkpoint(kind))} if kind else {}) | ({"modality": modality} if modality else {})


def found(case: str, **more: Any) -> BaseEncoder:
    return encoders.find(key_of(case), options(case) | more)


@cache
def server() -> EmbeddingsServer:
    """Of all tests here."""
    return _HELD.enter_context(serving())


@pytest.fixture(scope="module", autouse=True)
def _ending() -> Iterator[None]:
    with _HELD:
        yield


@cache
def loaded(case: str) -> BaseEncoder:
    tune_process()
    return found(case)


# The emptiest value of each modality that is still valid.
PLAINEST = {
    "text": b"a",
    "image": contract.image("white", (64, 64)),
    "audio": contract.sound(0, 1),
    "video": videos.video([0], "mkv"),
    "sensor": contract.readings(1, contract.CHANNELS),
}


@cache
def decoded(case: str) -> list[Any]:
    return [contract.decoded(loaded(case), sample) for sample in contract.samples(loaded(case))]


def test_every_file_is_found_by_its_name() -> None:
    assert sorted({key_of(case) for case in CASES}) == sorted(OTHER_OPTION) == encoders.keys()


@every
@pytest.mark.parametrize("promise", contract.CHECKS)
def test_every_promise_is_kept(case: str, promise: str) -> None:
    assert list(contract.CHECKS[promise](loaded(case), decoded(case))) == []


@every
def test_same_values_give_the_same_bytes_twice_and_in_threads(case: str) -> None:
    encoder, values = found(case), decoded(case)
    with ThreadPoolExecutor(4) as pool:
        # The first calls race for loading the model.
        results = [future.result().tobytes() for future in [pool.submit(encoder.encode, values) for _ in range(4)]]
    assert set(results) == {loaded(case).encode(values).tobytes()}


@every
def test_the_plainest_value_gives_a_finite_vector(case: str) -> None:
    encoder = loaded(case)
    plainest = contract.decoded(encoder, [PLAINEST[modality] for modality in encoder.reads])
    assert np.isfinite(encoder.encode([plainest])).all()


@every
def test_vectors_are_of_length_one_where_it_says_so(case: str) -> None:
    lengths = np.linalg.norm(loaded(case).encode(decoded(case)), axis=1)
    assert np.allclose(lengths, 1.0, atol=1e-5) == loaded(case).normalised


@every
def test_length_grows_with_the_value_or_is_zero(case: str) -> None:
    encoder = loaded(case)
    lengths = [encoder.length(value) for value in decoded(case)]
    assert all(length >= 0 for length in lengths)
    if encoder.modality == "text":
        assert max(lengths) == lengths[-1]


@every
def test_fingerprint_changes_with_an_option_and_with_nothing_else(case: str) -> None:
    fingerprint = found(case).fingerprint()
    assert len(bytes.fromhex(fingerprint)) == 32
    assert loaded(case).fingerprint() == fingerprint
    assert found(case, **OTHER_OPTION[key_of(case)]).fingerprint() != fingerprint


@every
def test_fingerprint_changes_with_a_library_and_with_preprocessing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = found(case)
    before = encoder.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(type(encoder), "preprocessing", lambda self: {"other": 1})
        assert encoder.fingerprint() != before
    monkeypatch.setattr(encoders, "_version", lambda name: "0.0")
    assert (encoder.fingerprint() != before) == bool(encoder.card()["libraries"])


@every
def test_what_a_value_is_decoded_with_is_among_the_libraries(case: str) -> None:
    decoders = {"image": {"pillow"}, "video": {"av"}, "audio": {"soundfile", "soxr"}}
    needed = set().union(*(decoders.get(modality, set()) for modality in loaded(case).reads))
    assert needed <= loaded(case).card()["libraries"].keys()


@pytest.mark.parametrize("key", ["efficientnet-lite0", "minilm-l6"])
def test_fingerprint_changes_with_one_byte_of_the_weights(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    encoder = encoders.find(key)
    name, path = max(encoder.weights().items(), key=lambda item: item[1].stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    before, files = encoder.fingerprint(), {**encoder.weights(), name: tmp_path / name}
    monkeypatch.setattr(encoder, "weights", lambda: files)
    assert encoder.fingerprint() != before


def test_fingerprints_are_those_of_another_process_and_import_no_torch() -> None:
    script = (
        "import json, sys; from featurestore import encoders;"
        "cases = json.loads(sys.argv[1]);"
        "print(json.dumps([{c: encoders.find(*each).fingerprint() for c, each in cases.items()},"
        " sorted({'torch', 'transformers', 'PIL', 'soundfile', 'httpx2'} & set(sys.modules))]))"
    )
    cases = json.dumps({case: (key_of(case), options(case)) for case in CASES})
    done = subprocess.run([sys.executable, "-c", script, cases], capture_output=True, text=True, check=True)
    fingerprints, imported = json.loads(done.stdout)
    assert imported == []
    assert fingerprints == {case: found(case).fingerprint() for case in CASES}


@every
def test_card_says_what_the_vectors_are(case: str) -> None:
    encoder = found(case, **OTHER_OPTION[key_of(case)])
    card = encoder.card()
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert card["key"] == key_of(case)
    assert card["dim"] == encoder.dim
    assert card["modality"] in encoders.modalities(key_of(case))
    assert card["options"].items() >= OTHER_OPTION[key_of(case)].items()
    assert card["licence"] in ("Apache-2.0", "the checkpoint's", "its owner's", "the file's")
    assert set(card) >= {"dtype", "normalised", "source", "preprocessing", "weights", "libraries"}
    assert card["trained_until"] is None


@every
def test_when_the_training_ended_is_in_the_card_and_not_in_the_fingerprint(case: str) -> None:
    if not issubclass(type(found(case).options), encoders.TrainedOptions):
        pytest.skip("its weights, where it has any, are its own")
    encoder = found(case, trained_until="2021-03-01")
    card = json.loads(json.dumps(encoder.card()))
    assert card["trained_until"] == "2021-03-01"
    assert encoder.fingerprint() == found(case).fingerprint() == encoders.fingerprint_of(card)
    with pytest.raises(InputError, match=r"option 'trained_until' = 'soon' is not allowed; .*trained_until \(string"):
        found(case, trained_until="soon")


def test_an_unknown_key_names_the_nearest_and_all() -> None:
    with pytest.raises(
        InputError, match=r"'minilm' does not exist; did you mean 'minilm-l6'\? allowed: clap, clip, efficient"
    ):
        encoders.find("minilm")


@pytest.mark.parametrize("shared", ["checkpoints", "mel", "runtime", "../media", "log_mel"])
def test_what_encoders_share_is_no_encoder(shared: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        encoders.find(shared)


@every
def test_an_unknown_option_names_what_is_allowed(case: str) -> None:
    told = r"option 'bach_size' = 3 does not exist \(did you mean 'batch_size'\?\); allowed: .*batch_size \("
    with pytest.raises(InputError, match=f"encoder '{key_of(case)}': {told}"):
        found(case, bach_size=3)


@every
@pytest.mark.parametrize("size", [0, -1, "many", math.nan])
def test_a_batch_size_out_of_range_is_refused(case: str, size: Any) -> None:
    told = rf"option 'batch_size' = {size!r} is not allowed; allowed: .*batch_size \(integer from 1 to 4096"
    with pytest.raises(InputError, match=f"^encoder '{key_of(case)}': {told}"):
        found(case, batch_size=size)


def test_efficientnet_features_are_those_of_the_package_its_weights_were_made_for() -> None:
    # efficientnet_lite_pytorch 0.1.0: EfficientNet.from_name("efficientnet-lite0") with the same checkpoint,
    # extract_features((pixels - 127) / 128).mean((2, 3)); its six largest features and the sum of all.
    y, x, channel = np.mgrid[0:224, 0:224, 0:3]
    pixels = ((3 * x + 5 * y + 40 * channel) % 256).astype(np.uint8)
    (features,) = loaded("efficientnet-lite0").encode([pixels])
    expected = [4.76534, 4.13834, 4.04776, 4.0104, 3.56031, 3.5434]
    np.testing.assert_allclose(features[[113, 897, 287, 1056, 400, 1263]], expected, atol=1e-4)
    assert features.sum() == pytest.approx(203.51373, abs=5e-3)


def test_minilm_vectors_are_those_of_sentence_transformers() -> None:
    # sentence-transformers 6.2.0 on the same folder: encode(text)[:4].
    texts = {
        "a red bird": [0.03832, 0.02635, -0.071966, 0.044936],
        "Zwei Katzen.": [-0.021476, 0.101972, 0.01833, 0.000068],
        "a long text " * 200: [-0.030637, -0.046781, 0.044385, -0.039942],
    }
    vectors = loaded("minilm-l6").encode(list(texts))
    np.testing.assert_allclose(vectors[:, :4], list(texts.values()), atol=1e-5)


def test_the_whole_image_is_kept_and_centred_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 100), "black").save(buffer, "PNG")
    pixels = loaded("efficientnet-lite0").decode(buffer.getvalue())
    rows = np.flatnonzero((pixels == 0).all(axis=(1, 2)))
    assert (rows[0], rows[-1], len(rows)) == (84, 139, 56)
    assert (pixels[[0, 83, 140, 223]] == 255).all()


@pytest.mark.parametrize("key", ["log-mel", "mfcc"])
def test_sound_is_cut_at_thirty_seconds(key: str) -> None:
    encoder = loaded(key)
    thirty, longer = contract.sound(440, 30), contract.sound(440, 31)
    assert np.array_equal(encoder.encode([encoder.decode(longer)]), encoder.encode([encoder.decode(thirty)]))
