"""Word vectors of Word2Vec, GloVe and fastText: a text is the mean of its words' vectors, or their SIF-weighted mean.

Files are Word2Vec's text and binary formats, GloVe's text (which has no header) and fastText's `.vec`, each also as `.gz`.
Other programs' own files (gensim's `.kv`, which is a pickle, fastText's `.bin` with its subwords) are refused.

SIF (Arora, Liang and Ma 2017) weighs a word by a / (a + p). Files carry no counts, but their words stand by falling count: p is
Zipf's 1 / (rank H). The common component that it takes away is that of the table itself, weighted so: it does not change with
the texts that share a batch.

Legend: V words, D features.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, TrainedOptions
from featurestore.encoders.checkpoints import file_of
from featurestore.errors import InputError

__all__ = ["Encoder", "Options"]

SIF_A = 1e-3
MAX_WORDS = 20_000_000
MAX_DIM = 4096
MAX_LINE_BYTES = 1 << 20
_FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Options(TrainedOptions):
    """Batch 256: a lookup, not a network."""

    batch_size: int = Field(default=256, ge=1, le=4096, description="texts at once; part of the recipe")
    vectors: str = Field(
        min_length=1, description="a file of Word2Vec, GloVe or fastText (.vec), here, s3://… or gs://…"
    )
    pooling: Literal["mean", "sif"] = Field(default="mean", description="of a text's words")
    normalise: bool = Field(default=True, description="to length 1")


class _Header(NamedTuple):
    """What the beginning of a file says: words (-1: not said), components, whether rows are binary, and where they begin."""

    words: int
    dim: int
    is_binary: bool
    start: int


class Encoder(BaseEncoder):
    """Values are lists of words; one of which no word is known has a vector of NaN, which no view keeps."""

    key = "word-vectors"
    modalities = ("text",)
    licence = "the file's"
    source = "a file of word vectors"
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.path = file_of(options.vectors)
        self._header = _header(self.path)
        self.dim, self.normalised = self._header.dim, options.normalise

    def address(self) -> dict[str, Any]:
        """Say where the file is."""
        return {"vectors": self.options.vectors}

    def weights(self) -> dict[str, Path]:
        """Return the one file."""
        return {"vectors": self.path}

    def preprocessing(self) -> dict[str, Any]:
        """Return how words are cut, looked up and weighed."""
        return {"words": _WORD.pattern, "looked_up": "as it stands, else in small letters", "sif_a": SIF_A}

    def decode(self, raw: bytes) -> list[str]:
        """Decode strict UTF-8 and cut it into words."""
        return _WORD.findall(media.decode_text(raw))

    def length(self, value: list[str]) -> int:
        """Return the number of words."""
        return len(value)

    def encode(self, values: Sequence[list[str]]) -> NDArray[np.float32]:
        """Look the words up and average."""
        places, table_VD, weights_V, common_D = self.load()
        vectors = np.full((len(values), self.dim), np.nan, np.float32)
        for row, words in enumerate(values):
            known = [place for word in words if (place := places.get(word, places.get(word.lower()))) is not None]
            if known:
                vectors[row] = (table_VD[known] * weights_V[known, None]).mean(0, dtype=np.float64)
        if common_D is not None:
            vectors -= (vectors @ common_D)[:, None] * common_D
        if self.normalised:
            with np.errstate(invalid="ignore"):
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def _load(self) -> tuple[dict[str, int], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]:
        places: dict[str, int] = {}
        rows: list[NDArray[np.float32]] = []
        for word, vector in _rows(self.path, self._header):
            if word not in places:
                places[word] = len(rows)
                rows.append(vector)
        if not rows:
            raise _wrong(self.path, "it holds no words")
        table_VD = np.stack(rows)
        if not np.isfinite(table_VD).all():
            raise _wrong(self.path, "some of its components are not finite")
        if self.options.pooling == "mean":
            return places, table_VD, np.ones(len(rows), np.float32), None
        ranks_V = np.arange(1, len(rows) + 1)
        frequency_V = 1 / (ranks_V * (1 / ranks_V).sum())
        weights_V = (SIF_A / (SIF_A + frequency_V)).astype(np.float32)
        return places, table_VD, weights_V, _common(table_VD * (weights_V * frequency_V)[:, None])


def _common(weighted_VD: NDArray[np.float32]) -> NDArray[np.float32]:
    """The direction of length 1 that most of the weighted table lies along."""
    moments_DD = weighted_VD.astype(np.float64).T @ weighted_VD
    found: NDArray[np.float32] = np.linalg.eigh(moments_DD)[1][:, -1].astype(np.float32)
    return found


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _header(path: Path) -> _Header:
    """Raises InputError where the file's first line is of none of the formats."""
    try:
        with _open(path) as file:
            first = file.readline(MAX_LINE_BYTES)
            second = file.read(4096)
    except (OSError, EOFError) as error:
        raise _wrong(path, f"it cannot be read: {error}") from error
    if first.startswith(_FASTTEXT_MAGIC) or first[:1] == b"\x80":
        raise _wrong(path, "it is a program's own format (fastText's .bin, or a pickle)")
    fields = first.split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        words, dim = map(int, fields)
        # A row of text has a number behind its word; four bytes of a float hardly ever are one.
        is_binary = not re.match(rb"[^ ]+ -?[\d.]+(?:[eE][-+]?\d+)?[ \n]", second)
        found = _Header(words, dim, is_binary, len(first))
    else:
        found = _Header(-1, len(fields) - 1, False, 0)
    if not 1 <= found.dim <= MAX_DIM or found.words > MAX_WORDS:
        raise _wrong(path, f"its first line is {first[:40]!r}")
    return found


def _rows(path: Path, header: _Header) -> Iterator[tuple[str, NDArray[np.float32]]]:
    try:
        with _open(path) as file:
            file.read(header.start)
            yield from _binary(path, file, header) if header.is_binary else _text(path, file, header)
    except (OSError, EOFError, zlib.error) as error:
        raise _wrong(path, f"it cannot be read to its end: {error}") from error


def _text(path: Path, file: IO[bytes], header: _Header) -> Iterator[tuple[str, NDArray[np.float32]]]:
    number = first = int(bool(header.start))
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), first + 1):
        # A word may hold spaces, as GloVe's 840B has them: components are the last ones.
        parts = line.rstrip().rsplit(b" ", header.dim)
        try:
            vector = np.array(parts[1:], np.float32)
        except ValueError:
            vector = np.empty(0, np.float32)
        if len(vector) != header.dim or number > MAX_WORDS:
            raise _wrong(path, f"line {number} is no word with {header.dim} numbers: {line[:40]!r}")
        yield parts[0].decode("utf-8", "replace"), vector
    if (found := number - first) < header.words:
        raise _wrong(path, f"it ends behind word {found} of the {header.words} that its first line says")


def _binary(path: Path, file: IO[bytes], header: _Header) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for number in range(header.words):
        word = bytearray()
        while (letter := file.read(1)) not in (b" ", b"") and len(word) < MAX_LINE_BYTES:
            word += letter.lstrip(b"\n")
        raw = file.read(4 * header.dim)
        if len(raw) < 4 * header.dim:
            raise _wrong(path, f"it ends in word {number + 1} of {header.words}")
        yield word.decode("utf-8", "replace"), np.frombuffer(raw, "<f4").copy()


def _wrong(path: Path, why: str) -> InputError:
    return InputError(
        f"{path.name} is no file of word vectors: {why}; allowed: Word2Vec's text or binary format, GloVe's text, "
        "fastText's .vec, each also as .gz"
    )
