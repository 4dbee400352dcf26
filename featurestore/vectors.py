"""How vectors are kept in Arrow and Parquet: the one module that knows.

On disk a vector column is required (no nulls) `FixedSizeList<float32 not null>`: pyarrow reads it 2 to 3 times as fast as
its default list type, DuckDB, Polars and HF `datasets` read it too, and pyarrow 25 cannot read back fixed-size lists with
null rows. A missing vector is a row of NaN beside `present = false`; `masked` hands it out as null without a copy.
"""

import numpy as np
import pyarrow as pa

from featurestore.errors import AlignmentError

CODEC_VERSION = 1
"""Part of every recipe: raise it when the layout of view files changes."""


def field(name: str, dim: int, dtype: str = "float32") -> pa.Field:
    """The Arrow field of a required vector column of `dim` float32 or float16 values."""
    return pa.field(name, _list_type(dim, pa.from_numpy_dtype(np.dtype(dtype))), nullable=False)


def column(array: np.ndarray) -> pa.FixedSizeListArray:
    """Wraps a C-contiguous [n, d] float32 or float16 array as a vector column, without copying."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=_list_type(array.shape[1], flat.type))


def matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The [n, d] array under a vector column; without copying where the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    dim = column.type.list_size
    values = column.flatten() if column.null_count == 0 else column.values[column.offset * dim :][: len(column) * dim]
    return np.asarray(values.to_numpy(zero_copy_only=True)).reshape(-1, dim)


def masked(column: pa.Array | pa.ChunkedArray, present: np.ndarray) -> pa.FixedSizeListArray:
    """The column with null where `present` [n] bool is false; the values are shared, not copied."""
    vectors = matrix(column)
    if len(vectors) != len(present):
        raise AlignmentError(f"{len(vectors)} vectors but {len(present)} presence flags; run `braid verify`")
    flat = pa.array(vectors.reshape(-1))
    list_type = pa.list_(pa.field("item", flat.type, nullable=True), vectors.shape[1])
    return pa.FixedSizeListArray.from_arrays(flat, type=list_type, mask=pa.array(~present))


def _list_type(dim: int, item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False), dim)
