"""The files of a training set: its rows as Parquet, and as WebDataset tars.

Columns of a training set, per sample: `id`, `group`, `label`, `split`, `fold` (int8; -1 outside train), `weight`
(float32), and per view `<view>` (its embedding), `<view>_present` (bool), `<view>_miss_reason` (text, null where
present) and `<view>_pred` (log-probabilities of the classes by heads that never saw the sample's group); and `row_digest`,
which binds all of them.
A missing embedding is NaN beside `present = false`.
"""

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featurestore import vectors
from featurestore.errors import InputError
from featurestore.export import add_member, npy
from featurestore.identity import tar_key

__all__ = ["ROW_DIGEST", "row_digests", "training_table", "views_of", "write_split"]

ROW_DIGEST = "row_digest"
SCALARS = ("id", "group", "label", "split", "fold", "weight")


def training_table(
    scalars: Mapping[str, Any],
    embeddings: Mapping[str, NDArray[Any]],
    miss_reasons: Mapping[str, Sequence[str | None]],
    log_probs: Mapping[str, NDArray[np.float32]],
) -> pa.Table:
    """Builds the rows of a training set; see the module for the columns.

    Args:
        scalars: `id`, `group`, `label`, `split`, `fold`, `weight`, [n] each.
        embeddings: per view [n, D] float32 or float16; rows of NaN are missing.
        miss_reasons: per view [n]; None exactly where present.
        log_probs: per view [n, K] float32.

    Raises:
        InputError: a scalar column lacks, two columns have one name, or presence and miss reasons disagree.
    """
    types = {"fold": pa.int8(), "weight": pa.float32()}
    lacking = [name for name in SCALARS if name not in scalars]
    if lacking:
        raise InputError(f"columns {', '.join(lacking)} are lacking; a training set has {', '.join(SCALARS)}")
    columns = {name: pa.array(scalars[name], types.get(name, pa.string())) for name in SCALARS}
    for view, array in embeddings.items():
        present = ~np.isnan(array).all(axis=1)
        reasons = pa.array(miss_reasons[view], pa.string())
        wrong = np.flatnonzero(present != reasons.is_null().to_numpy(zero_copy_only=False))
        if len(wrong):
            raise InputError(
                f"view {view}: sample {columns['id'][int(wrong[0])]} is {'' if present[wrong[0]] else 'not '}present "
                f"but its miss reason is {reasons[int(wrong[0])].as_py()!r} ({len(wrong)} such rows)"
            )
        added = {
            view: vectors.column(array),
            f"{view}_present": pa.array(present),
            f"{view}_miss_reason": reasons,
            f"{view}_pred": vectors.column(log_probs[view]),
        }
        if taken := sorted(set(added) & set(columns)):
            raise InputError(f"view {view}: a training set has a column {taken[0]!r} already; rename the view")
        columns |= added
    fields = [pa.field(name, c.type, nullable=name.endswith("_miss_reason")) for name, c in columns.items()]
    table = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))
    return table.append_column(
        pa.field(ROW_DIGEST, pa.string(), nullable=False), pa.array(row_digests(table), pa.string())
    )


def row_digests(table: pa.Table) -> list[str]:
    """Per row, 16 hex digits over everything else that stands in it: what moved to another row after it was made shows."""
    rest = table.drop_columns([ROW_DIGEST]) if ROW_DIGEST in table.column_names else table
    vector_columns = [name for name in rest.column_names if pa.types.is_fixed_size_list(rest.schema.field(name).type)]
    arrays = [vectors.matrix(rest[name]) for name in vector_columns]
    digests = []
    for row, record in enumerate(rest.drop_columns(vector_columns).to_pylist()):
        digest = sha256(json.dumps(record, sort_keys=True).encode())
        for array in arrays:
            digest.update(array[row].tobytes())
        digests.append(digest.hexdigest()[:16])
    return digests


def views_of(schema: pa.Schema) -> list[str]:
    """The views of a training set, in the order of its columns."""
    return [name.removesuffix("_present") for name in schema.names if name.endswith("_present")]


def write_split(rows: pa.Table, folder: Path, split: str, rows_per_file: int) -> list[Path]:
    """Writes one split as `<split>-00000.parquet` and `<split>-00000.tar` and so on; equal numbers hold equal rows.

    The order is the table's. A file is written aside and renamed, so a name that exists is whole; writing the same
    rows again gives the same bytes. A split without rows is one empty file of each kind. In a tar, a sample is
    `<key>.json` (the scalars, presence and miss reasons), and for each view `<key>.<view>.npy`, only where it is
    present, and `<key>.<view>_pred.npy`; `identity.tar_key` makes the key, the id is in the JSON.

    Returns:
        The files, in the order in which they were written.

    Raises:
        InputError: rows of another split, or fewer than one row a file.
    """
    if rows_per_file < 1:
        raise InputError(f"{rows_per_file} rows per file; at least 1")
    others = set(rows["split"].unique().to_pylist()) - {split}
    if others:
        raise InputError(f"rows of split {', '.join(sorted(others))} among those of {split}; filter the table first")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, start in enumerate(range(0, max(rows.num_rows, 1), rows_per_file)):
        part = rows.slice(start, rows_per_file)
        for suffix, write in (("parquet", _write_parquet), ("tar", _write_tar)):
            path = folder / f"{split}-{number:05d}.{suffix}"
            aside = path.with_name(f".{path.name}.part")
            write(part, aside)
            os.replace(aside, path)
            written.append(path)
    return written


def _write_parquet(rows: pa.Table, path: Path) -> None:
    # Embeddings neither compress nor repeat: trying costs time on both sides.
    repeats = [name for name in rows.column_names if not pa.types.is_fixed_size_list(rows.schema.field(name).type)]
    encoding = {name: "zstd" if name in repeats else "none" for name in rows.column_names}
    pq.write_table(rows, path, use_dictionary=repeats, compression=encoding, row_group_size=max(rows.num_rows, 1))


def _write_tar(rows: pa.Table, path: Path) -> None:
    views = views_of(rows.schema)
    arrays = {view: (vectors.matrix(rows[view]), vectors.matrix(rows[f"{view}_pred"])) for view in views}
    vector_columns = {*views, *(f"{view}_pred" for view in views)}
    records = rows.select([name for name in rows.column_names if name not in vector_columns]).to_pylist()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for row, record in enumerate(records):
            members = {"json": json.dumps(record, sort_keys=True, ensure_ascii=False).encode()}
            for view, (embeddings, log_probs) in arrays.items():
                if record[f"{view}_present"]:
                    members[f"{view}.npy"] = npy(embeddings[row])
                members[f"{view}_pred.npy"] = npy(log_probs[row])
            for name, content in sorted(members.items()):
                add_member(tar, f"{tar_key(record['id'])}.{name}", content)
