"""word-vectors and static: formats as they are in the wild, and pooling against figures worked out by hand."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from featurestore import encoders
from featurestore.errors import InputError
from tests.checkpoints import word_pieces

WORDS = {"the": [1.0, 0.0, 0.5], "bird": [0.0, 2.0, 1.0], "red": [3.0, -1.0, 0.0], "New York": [0.5, 0.5, 0.5]}


def text_file(path: Path, header: bool = True) -> Path:
    lines = [f"{word} {' '.join(map(str, vector))}" for word, vector in WORDS.items()]
    path.write_text("\n".join([f"{len(WORDS)} 3"] * header + lines) + "\n")
    return path


def binary_file(path: Path) -> Path:
    rows = [
        word.encode() + b" " + np.array(vector, "<f4").tobytes() + b"\n"
        for word, vector in WORDS.items()
        if " " not in word
    ]
    path.write_bytes(f"{len(rows)} 3\n".encode() + b"".join(rows))
    return path


def packed_file(path: Path) -> Path:
    path.write_bytes(gzip.compress(text_file(path.with_suffix(".plain")).read_bytes(), mtime=0))
    return path


def found(path: Path, **options: Any) -> Any:
    return encoders.find("word-vectors", {"vectors": str(path), "normalise": False, **options})


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: text_file(folder / "word2vec.txt"),
        lambda folder: text_file(folder / "glove.txt", header=False),
        lambda folder: binary_file(folder / "word2vec.bin"),
        lambda folder: packed_file(folder / "fasttext.vec.gz"),
    ],
)
def test_a_text_is_the_mean_of_its_known_words_in_every_format(write: Any, tmp_path: Path) -> None:
    encoder = found(write(tmp_path))
    vectors = encoder.encode([encoder.decode(text) for text in (b"the Bird, the", b"red!", b"nothing known")])
    np.testing.assert_allclose(vectors[:2], [[2 / 3, 2 / 3, 2 / 3], WORDS["red"]], rtol=1e-6)
    assert np.isnan(vectors[2]).all()
    assert encoder.dim == 3


def test_sif_weighs_rare_words_more_and_takes_the_common_direction_away(tmp_path: Path) -> None:
    encoder = found(text_file(tmp_path / "v.txt"), pooling="sif")
    ranks = np.arange(1, 5)
    frequency = 1 / ranks / (1 / ranks).sum()
    weights = 1e-3 / (1e-3 + frequency)
    table = np.array(list(WORDS.values()))
    common = np.linalg.svd(table * (weights * frequency)[:, None])[2][0]
    mean = (table[0] * weights[0] + table[1] * weights[1]) / 2
    (vector,) = encoder.encode([["the", "bird"]])
    np.testing.assert_allclose(vector, mean - (mean @ common) * common, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps({"the": [1.0]}), "a program's own format"),
        ((793712314).to_bytes(4, "little") + bytes(100), "a program's own format"),
        (b"2 3\nthe 1 2 3\nbird 1 2\n", "line 3 is no word with 3 numbers: b'bird 1 2"),
        (b"the\n", "its first line is"),
        (b"", "its first line is"),
        (b"1 3\nthe 1 nan 3\n", "not finite"),
        (b"5 3\nthe \x00\x00\x80?\x00\x00\x80?\x00\x00\x80?\n", "it ends in word 2 of 5"),
    ],
)
def test_a_file_of_another_kind_is_told(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"vectors.txt is no file of word vectors: .*{told}"):
        found(path).load()


@pytest.mark.parametrize("header", ["5 3\n", "3 3\n"])
def test_a_text_file_that_ends_before_its_header_says_is_refused(header: str, tmp_path: Path) -> None:
    (tmp_path / "cut.vec").write_text(header + "a 1 2 3\nbird 4 5 6\n")
    with pytest.raises(
        InputError, match=rf"cut\.vec is no file .*: it ends behind word 2 of the {header[0]} that its first"
    ):
        found(tmp_path / "cut.vec").load()


def test_a_compressed_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"word{number} {number}.{number * 7919 % 997} 1 2\n" for number in range(20_000))
    whole = gzip.compress(f"20000 3\n{rows}".encode())
    (tmp_path / "cut.vec.gz").write_bytes(whole[:-2000])
    with pytest.raises(
        InputError, match=r"cut\.vec\.gz is no file .*: it cannot be read to its end: Compressed file ended"
    ):
        found(tmp_path / "cut.vec.gz").load()


def static(folder: Path, **tensors: np.ndarray) -> Path:
    folder.mkdir()
    word_pieces().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"normalize": False}))
    tokens = len(word_pieces())
    table = np.random.default_rng(0).normal(size=(tokens, 16)).astype(np.float32)
    save_file({"embeddings": table, **tensors}, folder / "model.safetensors")
    return folder


def test_a_static_table_is_averaged_over_known_tokens(tmp_path: Path) -> None:
    folder = static(tmp_path / "plain")
    encoder = encoders.find("static", {"checkpoint": str(folder)})
    tokenizer = word_pieces()
    from safetensors.numpy import load_file

    table = load_file(folder / "model.safetensors")["embeddings"]
    ids = tokenizer("a red bird", add_special_tokens=False)["input_ids"]
    vectors = encoder.encode(["a red bird 🐸", "🐸"])
    np.testing.assert_allclose(vectors[0], table[ids].mean(0), rtol=1e-5)
    assert np.isnan(vectors[1]).all()


def test_weights_and_shared_rows_of_a_static_table_count(tmp_path: Path) -> None:
    tokens = len(word_pieces())
    mapping, weights = np.zeros(tokens, np.int64), np.full(tokens, 2.0, np.float32)
    encoder = encoders.find(
        "static", {"checkpoint": str(static(tmp_path / "shared", mapping=mapping, weights=weights))}
    )
    from safetensors.numpy import load_file

    table = load_file(tmp_path / "shared" / "model.safetensors")["embeddings"]
    np.testing.assert_allclose(encoder.encode(["a red bird"])[0], 2 * table[0], rtol=1e-5)


def test_a_static_table_that_its_tokenizer_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = static(tmp_path / "short", mapping=np.zeros(3, np.int64))
    with pytest.raises(InputError, match=r"its tokenizer has .* tokens, its tables are of 3"):
        encoders.find("static", {"checkpoint": str(folder)}).load()
