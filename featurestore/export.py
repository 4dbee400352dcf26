"""Views leave as WebDataset shards: the corpus's own shards and order, vectors as `<key>.<view>.npy`."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from featurestore import vectors
from featurestore.arguments import several
from featurestore.corpora import Corpus, member_name
from featurestore.errors import InputError, StoreError
from featurestore.identity import tar_key
from featurestore.store import FeatureStore
from featurestore.views import View, last_whole

FORMATS = ("webdataset",)


def export_webdataset(store: FeatureStore, views: Sequence[str], out: Path, raw: bool = False) -> list[Path]:
    """Writes one tar per corpus shard, samples adjacent and in the corpus's order; equal stores give equal bytes.

    While the corpus grows, these are the shards that the views cover. A sample has `<key>.json` (id, group and the corpus's
    columns), `<key>.<view>.npy` (float32 [dim], pickle-free) for each view where its value is present (a missing vector is a
    missing member, never zeros) and, with `raw`, its raw fields as they are, `<key>.<field>.<ext>`. One that is a .npy file
    itself, as a sensor's readings are (float32 [N, C]), is `<key>.<field>.raw.npy`, so that a view may have its field's name.

    Raises:
        InputError: no view, views of different corpora, or a folder that holds files already or cannot be made.
        StoreError: views that cover different shards, because not all of them are encoded yet.
    """
    if not views:
        raise InputError(f"name at least one view; the store has: {', '.join(store.views()) or 'none'}")
    opened = [store.view(name) for name in dict.fromkeys(several("views", views))]
    corpora = {view.corpus.name for view in opened}
    if len(corpora) != 1:
        raise InputError(
            f"views {', '.join(views)} are of {len(corpora)} corpora ({', '.join(sorted(corpora))}); one is needed"
        )
    corpus, shards = opened[0].corpus, opened[0].shards
    if not all(view.shards.table["shard"].equals(shards.table["shard"]) for view in opened):
        fewest = min(opened, key=lambda view: len(view.shards))
        raise StoreError(
            f"the views cover different shards; {fewest.behind()}{last_whole(store.snapshot, [*dict.fromkeys(views)])}"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made a folder ({error.strerror}); name a new folder") from error
    if any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder")
    written = []
    for number, shard in enumerate(shards):
        path = out / f"{corpus.name}-{number:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in _members(corpus, opened, shard.shard, raw):
                add_member(tar, name, content)
        written.append(path)
    return written


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a member with no time, owner or mode of its own."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def npy(vector: np.ndarray) -> bytes:
    """The .npy bytes of an array of numbers."""
    buffer = io.BytesIO()
    np.save(buffer, vector, allow_pickle=False)
    return buffer.getvalue()


def _members(corpus: Corpus, views: Sequence[View], shard: str, raw: bool) -> Iterator[tuple[str, bytes]]:
    rows = corpus.read(shard)
    tables = {view.name: view.read(shard) for view in views}
    matrices = {name: vectors.matrix(table["embedding"]) for name, table in tables.items()}
    present = {name: np.asarray(table["present"]) for name, table in tables.items()}
    columns = corpus.columns(shard)
    for row, about in ((row, columns[row]) for row in corpus.live_rows(shard).tolist()):
        yield f"{tar_key(about['id'])}.json", json.dumps(about, sort_keys=True, ensure_ascii=False).encode()
        for name, matrix in matrices.items():
            if present[name][row]:
                yield f"{tar_key(about['id'])}.{name}.npy", npy(matrix[row])
        for field in corpus.fields if raw else ():
            value = corpus.value(shard, row, field)
            if value is not None:
                ext = rows[field][row].as_py()["ext"]
                # No view's name has a dot, so none is that of this member.
                yield member_name(about["id"], field, "raw.npy" if ext == "npy" else ext), value
