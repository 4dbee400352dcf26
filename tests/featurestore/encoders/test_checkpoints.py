"""Where checkpoints lie, what of them is refused, and that their place changes no number."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from featurestore import encoders
from featurestore.encoders import checkpoints
from featurestore.errors import InputError
from tests.checkpoints import checkpoint
from tests.featurestore.encoders.test_hf_text import sentence_transformer
from tests.loopback_s3 import loopback_s3


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))


def test_the_place_of_a_checkpoint_is_in_the_card_and_not_in_the_fingerprint(bert: Path) -> None:
    here, there = (encoders.find("hf-text", {"checkpoint": str(each)}) for each in (checkpoint("bert"), bert))
    assert here.fingerprint() == there.fingerprint()
    assert there.card()["address"] == {"checkpoint": str(bert), "revision": None}
    again = encoders.find_as(json.loads(json.dumps(there.card())))
    assert again.fingerprint() == there.fingerprint()


def test_when_the_training_ended_comes_back_with_the_card(bert: Path) -> None:
    encoder = encoders.find("hf-text", {"checkpoint": str(bert), "trained_until": "2021-03-01"})
    assert encoders.find_as(json.loads(json.dumps(encoder.card()))).trained_until == "2021-03-01"


def test_a_byte_of_a_tokenizer_changes_the_fingerprint(bert: Path) -> None:
    before = encoders.find("hf-text", {"checkpoint": str(bert)}).fingerprint()
    path = bert / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert encoders.find("hf-text", {"checkpoint": str(bert)}).fingerprint() != before


def _weights(bert: Path, change: Any) -> None:
    path = bert / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda each: each.pop(KEY), rf"lacks 1 weights: {KEY}"),
        (
            lambda each: each.update({KEY.replace("1", "7"): each[KEY]}),
            r"beyond its architecture 1 weights: encoder\.layer\.7",
        ),
        (lambda each: each.update({KEY: each[KEY][:8].copy()}), r"another shape|size mismatch"),
    ],
)
def test_weights_that_are_not_those_of_the_architecture_are_refused(bert: Path, change: Any, told: str) -> None:
    _weights(bert, change)
    with pytest.raises(InputError, match=f"is none for encoder 'hf-text': .*({told})"):
        encoders.find("hf-text", {"checkpoint": str(bert)}).load()


def test_a_head_that_is_not_computed_with_is_no_mistake(bert: Path) -> None:
    _weights(
        bert, lambda each: (each.update({"cls.predictions.bias": each[KEY][0].copy()}), each.pop("pooler.dense.weight"))
    )
    encoder = encoders.find("hf-text", {"checkpoint": str(bert)})
    assert encoder.encode(["a red bird"]).shape == (1, 32)


def test_a_pickle_is_never_loaded(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has only pytorch_model.bin, which is a pickle .* save it with safetensors"):
        encoders.find("hf-text", {"checkpoint": str(bert)})


def test_weights_that_are_cut_are_told(bert: Path) -> None:
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="none for encoder 'hf-text'"):
        encoders.find("hf-text", {"checkpoint": str(bert)}).load()


@pytest.mark.parametrize("content", ["[]", "{", '{"hidden_size": 0}'])
def test_a_config_that_says_nothing_is_told(bert: Path, content: str) -> None:
    (bert / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        encoders.find("hf-text", {"checkpoint": str(bert)})


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("no/such/folder", "no such folder; name one, s3://"),
        ("no-such-name", "the hub does not give it"),
        ("ftp://x/y", "cannot be listed|needs a package"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(address: str, told: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=told):
        encoders.find("hf-text", {"checkpoint": address})


def test_without_a_checkpoint_an_option_is_missing() -> None:
    with pytest.raises(
        InputError, match=r"option 'checkpoint' is missing; allowed: .*checkpoint \(string, needed: a folder"
    ):
        encoders.find("hf-text")


def test_a_checkpoint_on_s3_is_fetched_once_and_anew_when_it_changes(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    sentence_transformer(bert, "pooling_mode_cls_token")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with loopback_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        client = fsspec.filesystem("s3", endpoint_url=endpoint)
        client.mkdir("models")
        client.put(str(bert), "models/bert", recursive=True)
        found: Any = encoders.find("hf-text", {"checkpoint": "s3://models/bert"})
        assert found.pooling == "cls"
        assert found.fingerprint() == encoders.find("hf-text", {"checkpoint": str(bert)}).fingerprint()
        checkpoints._fetched.cache_clear()
        monkeypatch.setattr(type(client), "get_file", None)  # a second fetch would fail
        assert encoders.find("hf-text", {"checkpoint": "s3://models/bert"}).fingerprint() == found.fingerprint()
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        checkpoints._fetched.cache_clear()
        client.pipe_file("models/bert/tokenizer.json", (bert / "tokenizer.json").read_bytes() + b" ")
        assert encoders.find("hf-text", {"checkpoint": "s3://models/bert"}).fingerprint() != found.fingerprint()
        client.rm("models/bert/1_Pooling/config.json")
        checkpoints._fetched.cache_clear()
        with pytest.raises(InputError, match=r"1_Pooling/config\.json is missing"):
            encoders.find("hf-text", {"checkpoint": "s3://models/bert"})


def test_the_hub_is_asked_for_the_settings_of_modules_too() -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = [f"*{ending}" for ending in checkpoints.READ]
    assert list(filter_repo_objects(["1_Pooling/config.json", "pytorch_model.bin"], allow_patterns=asked)) == [
        "1_Pooling/config.json"
    ]
