"""A person's own encoder: found, tried, and not imported because a store says so."""

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from featurestore import encoders
from featurestore.encoders import contract
from featurestore.errors import InputError
from jobs.check_encoder import check_encoder
from tests.processes import braid

SOURCE = '''
import numpy as np
import torch


class Mean:
    """Mean colour and size."""

    modality, dim, version = "image", 4, "1"

    def __init__(self, scale=1.0):
        self.scale = scale

    def load(self):
        return torch.tensor([self.scale] * 4)

    def encode(self, model, values):
        rows = [[*(value.mean((0, 1)) / 255), sum(value.shape) / 100] for value in values]
        return torch.tensor(np.array(rows, np.float32)) * model


class Mixes(Mean):
    """A value's vector depends on its neighbours."""

    def encode(self, model, values):
        made = super().encode(model, values)
        return made - made.mean(0)


class Swaps(Mean):
    def encode(self, model, values):
        return super().encode(model, values).flip(0)


class Short(Mean):
    dim = 3


class Both(Mean):
    modality, dim = "image+text", 5

    def encode(self, model, values):
        texts = torch.tensor([[float(len(text or ""))] for _, text in values])
        images = [np.zeros((1, 1, 3)) if image is None else image for image, _ in values]
        return torch.cat([super().encode(model, images), texts], 1)


class Films:
    modality, dim = "video", 3

    def load(self):
        return None

    def encode(self, model, values):
        from featurestore import video

        frames = [np.stack(list(video.sample(value, 2))) for value in values]
        return np.array([[each.std(), each.mean(), len(value)] for each, value in zip(frames, values, strict=True)])


class Trained(Mean):
    def __init__(self, until):
        super().__init__()
        self.trained_until = until


class Lazy:
    modality = "image"
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_birds.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_birds"
    sys.modules.pop("own_birds", None)


def tried(tmp_path: Path, cls: str, *more: str) -> Any:
    return braid("check-encoder", f"own_birds:{cls}", *more, env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"})


def test_a_class_says_when_its_training_ended(module: str) -> None:
    def made(cls: str, **arguments: str) -> Any:
        return encoders.find("torch", {"class": f"{module}:{cls}", "arguments": arguments})

    assert made("Mean").card()["trained_until"] is None
    assert made("Trained", until="2021-03-01").card()["trained_until"] == "2021-03-01"
    with pytest.raises(InputError, match=r"trained_until 'soon' is no day; allowed: YYYY-MM-DD, or None"):
        made("Trained", until="soon")


def test_a_class_that_keeps_all_promises_passes(module: str, tmp_path: Path) -> None:
    said = tried(tmp_path, "Mean", "--arguments", '{"scale": 2}')
    assert said.status == 0, said.err
    assert "own_birds:Mean: image, 4 components, 7 values" in said.out
    assert said.out.count("  yes  ") == 5


def test_a_class_that_takes_videos_is_tried_on_some(module: str, tmp_path: Path) -> None:
    said = tried(tmp_path, "Films")
    assert said.status == 0, said.out + said.err
    assert "own_birds:Films: video, 3 components, 7 values" in said.out


def test_a_class_may_read_several_fields_at_once(module: str) -> None:
    encoder = encoders.find_for("torch", {"class": "own_birds:Both"}, "image+text")
    with Console(quiet=True) as console:
        assert check_encoder("own_birds:Both", {}, [], console)
        image, text = contract.image("red", (9, 9)), b"a bird"
        assert check_encoder("own_birds:Both", {}, [image, text], console)
        with pytest.raises(InputError, match=r"3 values: own_birds:Both reads image.text, so give 2 for each sample"):
            check_encoder("own_birds:Both", {}, [image, text, image], console)
    without = encoder.encode([encoder.joined([None, encoder.decode_field(text, 1)]), encoder.decode(image)])
    assert without[:, 4].tolist() == [6, 0]


@pytest.mark.parametrize(
    ("cls", "broken"),
    [
        ("Mixes", "no   a batch of one is a batch of many, in order: value"),
        ("Swaps", "no   a batch of one is a batch of many, in order: value"),
        ("Short", "no   shape and dtype: (7, 4) for 7 values"),
    ],
)
def test_a_broken_promise_is_named(module: str, tmp_path: Path, cls: str, broken: str) -> None:
    said = tried(tmp_path, cls)
    assert said.status == 1
    assert broken in said.out


def test_what_lacks_something_is_told(module: str, tmp_path: Path) -> None:
    said = tried(tmp_path, "Lazy")
    assert said.status == 2
    assert "(modality 'image', dim None) lacks one of: modality (one of audio, image" in said.err
    assert "cannot be made: No module named 'no_such'" in braid("check-encoder", "no_such:Mean").err


def test_the_module_and_the_arguments_are_in_the_fingerprint(module: str, tmp_path: Path) -> None:
    def fingerprint(**arguments: Any) -> str:
        return encoders.find("torch", {"class": "own_birds:Mean", "arguments": arguments}).fingerprint()

    before = fingerprint()
    assert fingerprint(scale=2.0) != before
    (tmp_path / "own_birds.py").write_text(SOURCE + "\n# another byte\n")
    assert fingerprint() != before


def test_a_card_imports_nothing(module: str) -> None:
    card = {"key": "torch", "options": {"class": "own_birds:Mean", "arguments": {}}, "address": {}}
    with pytest.raises(InputError, match="was made by 'own_birds:Mean': import own_birds before, if you trust it"):
        encoders.find_as(card)
    assert "own_birds" not in sys.modules
    __import__("own_birds")
    assert encoders.find_as(card).dim == 4
