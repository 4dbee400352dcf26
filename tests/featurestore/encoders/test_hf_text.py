"""hf-text against transformers and sentence-transformers themselves, on the same checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from featurestore import encoders
from featurestore.errors import InputError
from tests.checkpoints import checkpoint

TEXTS = ["a red bird", "x", "the long text of a black bird . the long text of a black bird"]


def found(folder: Path | None = None, **options: Any) -> Any:
    return encoders.find("hf-text", {"checkpoint": str(folder or checkpoint("bert")), **options})


def hidden(text: str) -> torch.Tensor:
    folder = checkpoint("bert")
    tokens = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0]


@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [("mean", lambda each: each.mean(0)), ("cls", lambda each: each[0]), ("last", lambda each: each[-1])],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_vectors_are_those_of_the_bare_model(pooling: str, pooled: Any, side: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": side}))
    vectors = found(folder, pooling=pooling, normalise=False).encode(TEXTS)
    np.testing.assert_allclose(vectors, torch.stack([pooled(hidden(text)) for text in TEXTS]), atol=1e-5)


def test_bfloat16_is_close_and_float32_comes_out() -> None:
    exact, rough = (found(dtype=dtype).encode(TEXTS) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 1e-2
    assert found().fingerprint() != found(dtype="bfloat16").fingerprint()


def test_fewer_components_are_the_first_and_of_length_one() -> None:
    whole, short = found(normalise=False).encode(TEXTS), found(dim=8).encode(TEXTS)
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    assert found(dim=8).dim == 8
    with pytest.raises(InputError, match="'dim' = 33 is more than the 32 components"):
        found(dim=33)


def test_a_query_has_a_prompt_of_its_own() -> None:
    encoder = found(prompt="passage: ", query_prompt="query: ")
    assert encoder.decode(b"a bird") == "passage: a bird"
    assert encoder.decode_query(b"a bird") == "query: a bird"
    assert found(prompt="of ").decode_query(b"a bird") == "of a bird"


def test_texts_are_cut_where_the_model_ends_or_the_option_says() -> None:
    long = "a " * 500
    np.testing.assert_allclose(found().encode([long]), found().encode(["a " * 62]), atol=1e-6)
    np.testing.assert_allclose(found(max_tokens=4).encode([long]), found().encode(["a a"]), atol=1e-6)


def sentence_transformer(folder: Path, pooling: str, *modules: str) -> Path:
    """Beside a checkpoint what sentence-transformers says of one."""
    kinds = ["Transformer", "Pooling", *modules]
    paths = ["", *(f"{place + 1}_{kind}" for place, kind in enumerate(kinds[1:]))]
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, pooling: True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8, "do_lower_case": False}))
    return folder


@pytest.mark.parametrize("pooling", ["pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"])
@pytest.mark.parametrize("modules", [(), ("Normalize",)])
def test_vectors_are_those_of_sentence_transformers(pooling: str, modules: tuple[str, ...], tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    folder = sentence_transformer(Path(shutil.copytree(checkpoint("bert"), tmp_path / "st")), pooling, *modules)
    (folder / "2_Normalize").mkdir()
    theirs = sentences.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    ours = found(folder)
    np.testing.assert_allclose(ours.encode(TEXTS), theirs, atol=1e-5)
    assert ours.normalised == bool(modules)


def test_layers_behind_the_pooling_are_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "st"))
    sentence_transformer(folder, "pooling_mode_cls_token", "Dense")
    with pytest.raises(InputError, match=r"modules\.json has a Dense behind the model"):
        found(folder)


def test_a_pooling_of_two_kinds_is_refused_until_one_is_named(tmp_path: Path) -> None:
    folder = sentence_transformer(Path(shutil.copytree(checkpoint("bert"), tmp_path / "st")), "pooling_mode_max_tokens")
    with pytest.raises(InputError, match=r"it pools by max_tokens; allowed: .* or name option 'pooling'"):
        found(folder)
    assert found(folder, pooling="mean").pooling == "mean"


def said(folder: Path, name: str, **settings: Any) -> None:
    (folder / name).write_text(json.dumps(settings))


@pytest.fixture
def st(tmp_path: Path) -> Path:
    return sentence_transformer(Path(shutil.copytree(checkpoint("bert"), tmp_path / "st")), "pooling_mode_mean_tokens")


@pytest.mark.parametrize(
    ("mode", "pooling"), [("cls", "cls"), ("mean", "mean"), ("lasttoken", "last"), (["cls"], "cls")]
)
def test_pooling_is_read_as_sentence_transformers_6_writes_it(st: Path, mode: Any, pooling: str) -> None:
    said(st, "1_Pooling/config.json", embedding_dimension=32, pooling_mode=mode, include_prompt=True)
    assert found(st).pooling == pooling
    expected = found(pooling=pooling, normalise=False, max_tokens=8).encode(TEXTS)
    np.testing.assert_allclose(found(st).encode(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["max", "weightedmean", "mean_sqrt_len_tokens", ["mean", "max"], ["mean", "cls"], 3])
def test_another_pooling_of_sentence_transformers_6_is_never_the_mean(st: Path, mode: Any) -> None:
    said(st, "1_Pooling/config.json", embedding_dimension=32, pooling_mode=mode)
    with pytest.raises(InputError, match=r"it pools by .*; allowed: mean, cls, lasttoken, or name option 'pooling'"):
        found(st)
    assert found(st, pooling="cls").pooling == "cls"


def test_a_pooling_whose_settings_are_missing_is_never_the_mean(st: Path) -> None:
    (st / "1_Pooling" / "config.json").unlink()
    with pytest.raises(
        InputError, match=r"names a pooling and 1_Pooling/config.json is missing; name option 'pooling'"
    ):
        found(st)
    assert found(st, pooling="mean").pooling == "mean"


def test_modules_without_a_pooling_want_one_named(st: Path) -> None:
    (st / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}]))
    with pytest.raises(InputError, match=r"modules\.json names no pooling; name option 'pooling'"):
        found(st)


@pytest.mark.parametrize("path", ["../other", "a/b", "/etc", ".hidden"])
def test_a_folder_that_is_no_plain_name_is_refused(st: Path, path: str) -> None:
    (st / "modules.json").write_text(json.dumps([{"path": path, "type": "sentence_transformers.models.Pooling"}]))
    with pytest.raises(InputError, match=r"it names the folder .* allowed: a plain name"):
        found(st)


def test_what_pooling_says_is_in_the_fingerprint(st: Path) -> None:
    before = found(st, pooling="mean").fingerprint()
    assert "1_Pooling/config.json" in found(st).card()["weights"]
    said(st, "1_Pooling/config.json", embedding_dimension=32, pooling_mode="cls")
    assert found(st, pooling="mean").fingerprint() != before


def test_prompts_are_those_of_the_checkpoint_where_no_option_says_otherwise(st: Path) -> None:
    name, prompts = "config_sentence_transformers.json", {"query": "query: ", "other": "of ", "document": ""}
    said(st, name, prompts=prompts, default_prompt_name=None)
    assert (found(st).decode(b"a"), found(st).decode_query(b"a")) == ("a", "query: a")
    said(st, name, prompts={"other": "of "}, default_prompt_name="other")
    assert (found(st).decode(b"a"), found(st).decode_query(b"a")) == ("of a", "of a")
    said(st, name, prompts=prompts | {"passage": "passage: "}, default_prompt_name="other")
    assert (found(st).decode(b"a"), found(st).decode_query(b"a")) == ("passage: a", "query: a")
    assert (found(st, prompt="").decode(b"a"), found(st, prompt="").decode_query(b"a")) == ("a", "a")
    assert found(st).fingerprint() != found(st, prompt="").fingerprint()
    said(st, name, prompts=prompts, default_prompt_name="lost")
    with pytest.raises(InputError, match="has no prompt of the name 'lost'"):
        found(st)


def test_a_prompt_that_is_not_pooled_is_refused_until_pooling_is_named(st: Path) -> None:
    said(st, "1_Pooling/config.json", pooling_mode="mean", include_prompt=False)
    assert found(st).pooling == "mean"  # no prompt, nothing to leave out
    with pytest.raises(InputError, match=r"leaves the prompt out of what it pools \(include_prompt: false\)"):
        found(st, prompt="of ")
    assert found(st, prompt="of ", pooling="mean").decode(b"a") == "of a"


def test_texts_are_made_small_letters_where_the_checkpoint_says_so(st: Path) -> None:
    tokenizer = json.loads((st / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (st / "tokenizer.json").write_text(json.dumps(tokenizer))
    with_capitals, small = ["A RED Bird"], ["a red bird"]
    assert np.abs(found(st).encode(with_capitals) - found(st).encode(small)).max() > 1e-2
    said(st, "sentence_bert_config.json", max_seq_length=8, do_lower_case=True)
    assert np.array_equal(found(st).encode(with_capitals), found(st).encode(small))


@pytest.mark.parametrize(
    "settings",
    [
        {"transformer_task": "fill-mask"},
        {"module_output_name": "scores"},
        {"processing_kwargs": {"text": {"padding": 1}}},
    ],
)
def test_another_task_is_refused(st: Path, settings: dict[str, Any]) -> None:
    said(st, "sentence_bert_config.json", **settings)
    with pytest.raises(InputError, match=f"its {next(iter(settings))} "):
        found(st)


@pytest.mark.parametrize("version", ["old", "new"])
def test_queries_and_values_are_those_of_sentence_transformers(st: Path, version: str) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    prompts = {"query": "query : ", "document": "passage : "}
    said(st, "config_sentence_transformers.json", prompts=prompts, default_prompt_name=None)
    said(st, "sentence_bert_config.json", max_seq_length=8, do_lower_case=True)
    if version == "new":
        said(st, "1_Pooling/config.json", embedding_dimension=32, pooling_mode="lasttoken", include_prompt=True)
    theirs, ours = sentences.SentenceTransformer(str(st), device="cpu"), found(st)
    raw = [text.upper().encode() for text in TEXTS]
    words = [text.upper() for text in TEXTS]
    np.testing.assert_allclose(
        ours.encode([ours.decode(each) for each in raw]), theirs.encode_document(words), atol=1e-5
    )
    queries = ours.encode([ours.decode_query(each) for each in raw])
    np.testing.assert_allclose(queries, theirs.encode_query(words), atol=1e-5)
