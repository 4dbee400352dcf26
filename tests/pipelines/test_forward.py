"""What a model raises, of whatever class: on one value it is that value's, on all of them the encoder's."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from featurestore import encoders
from featurestore.encoders import BaseEncoder
from featurestore.errors import DecodeError, InputError, StoreError
from pipelines.forward import forward
from pipelines.model_handler import as_model_handler
from tests.checkpoints import checkpoint


class Letters:
    """Length and place of the first letter of a text; a letter that it does not know is a KeyError."""

    modality, dim = "text", 2

    def __init__(self, letters: str = "abcdefghijklmnopqrstuvwxyz") -> None:
        self.places = {letter: place for place, letter in enumerate(letters)}

    def load(self) -> None:
        return None

    def encode(self, model: None, values: Sequence[str]) -> np.ndarray:
        return np.array([[len(value), self.places[value[0]]] for value in values], np.float32)


def letters(**arguments: Any) -> BaseEncoder:
    return encoders.find("torch", {"class": "tests.pipelines.test_forward:Letters", "arguments": arguments})


def reasons(made: Sequence[Any]) -> list[str]:
    return [str(each) if isinstance(each, DecodeError) else "" for each in made]


@pytest.fixture
def one_token_too_many(tmp_path: Path) -> BaseEncoder:
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    return encoders.find("hf-text", {"checkpoint": str(folder)})


def test_a_token_beyond_the_vocabulary_fails_alone(one_token_too_many: BaseEncoder) -> None:
    texts = ["a red bird", "the zebra", "x", "a black bird"]
    made = forward(one_token_too_many, texts).vectors
    told = reasons(made)
    assert told[1].startswith("encoder_error: IndexError: index out of range")
    assert [told[place] for place in (0, 2, 3)] == [""] * 3
    right = one_token_too_many.encode([texts[place] for place in (0, 2, 3)])
    np.testing.assert_allclose(np.stack([made[place] for place in (0, 2, 3)]), right, atol=1e-5)
    # A batch of such alone is no fault of the encoder, as a plain text shows.
    assert all(reasons(forward(one_token_too_many, ["zebra", "a zebra"]).vectors))


def test_what_a_persons_own_class_raises_on_a_value_is_that_values() -> None:
    assert reasons(forward(letters(), ["ab", "9", "b"]).vectors) == ["", "encoder_error: KeyError: '9'", ""]
    assert reasons(forward(letters(), ["9"]).vectors) == ["encoder_error: KeyError: '9'"]


@pytest.mark.parametrize("texts", [["ab", "cd", "e"], ["ab"]])
def test_what_is_raised_on_every_value_and_on_a_plain_one_ends_the_job(texts: list[str]) -> None:
    told = r"encoder torch \(tests.*Letters\) fails on every value of a batch, .* \"KeyError: 'a'\", and on a plain text too"
    with pytest.raises(InputError, match=told):
        forward(letters(letters=""), texts)
    handler = as_model_handler(letters(letters=""))
    with pytest.raises(InputError, match=told):
        handler.run_inference([text.encode() for text in texts], handler.load_model())


def test_a_model_handler_rejects_one_value() -> None:
    handler = as_model_handler(letters())
    made = handler.run_inference([b"ab", b"9", b"b"], handler.load_model())
    assert [each if isinstance(each, str) else "" for each in made] == ["", "encoder_error", ""]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), StoreError("it cannot be read now")])
def test_what_is_no_fault_of_a_value_passes_through(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: None, values: Sequence[str]) -> np.ndarray:
        raise error

    encoder: Any = letters()
    monkeypatch.setattr(encoder._own, "encode", interrupted)
    with pytest.raises(type(error)):
        forward(encoder, ["a", "b"])
