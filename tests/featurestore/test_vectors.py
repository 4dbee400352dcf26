import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featurestore import vectors
from featurestore.errors import AlignmentError

MATRICES = st.sampled_from([np.float32, np.float16]).flatmap(
    lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(0, 6), st.integers(1, 5)))
)


@given(MATRICES)
def test_a_matrix_goes_through_a_column_bit_by_bit(matrix: np.ndarray) -> None:
    back = vectors.matrix(vectors.column(matrix))
    assert back.dtype == matrix.dtype
    assert back.shape == matrix.shape
    assert back.tobytes() == matrix.tobytes()


@given(MATRICES, st.data())
def test_a_slice_of_a_column_is_the_slice_of_the_matrix(matrix: np.ndarray, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(matrix)))
    length = data.draw(st.integers(0, len(matrix) - start))
    piece = vectors.column(matrix).slice(start, length)
    assert vectors.matrix(piece).tobytes() == matrix[start : start + length].tobytes()
    present = np.arange(length) % 2 == 0
    masked = vectors.masked(piece, present)
    assert masked.is_valid().to_pylist() == present.tolist()
    assert vectors.matrix(masked).tobytes() == matrix[start : start + length].tobytes()


def test_a_column_shares_the_memory_of_its_matrix() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    column = vectors.column(matrix)
    assert np.shares_memory(vectors.matrix(column), matrix)
    assert np.shares_memory(vectors.matrix(vectors.masked(column, np.array([True, False, True]))), matrix)


def test_a_matrix_of_another_memory_order_is_stored_by_rows() -> None:
    matrix = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert vectors.column(matrix).to_pylist() == [[0, 1, 2], [3, 4, 5]]


def test_columns_of_several_chunks_are_one_matrix() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(6, 2)
    chunks = pa.chunked_array([vectors.column(matrix[:2]), vectors.column(matrix[2:5]), vectors.column(matrix[5:])])
    assert np.array_equal(vectors.matrix(chunks), matrix)


def test_a_column_is_required_and_parquet_keeps_that(tmp_path) -> None:
    matrix = np.full((2, 3), np.nan, np.float32)
    matrix[0] = 1
    schema = pa.schema([vectors.field("embedding", 3)])
    table = pa.Table.from_arrays([vectors.column(matrix)], schema=schema)
    pq.write_table(table, tmp_path / "x.parquet")
    back = pq.read_table(tmp_path / "x.parquet")
    assert back.schema.equals(schema)
    assert not back.schema.field("embedding").nullable
    assert not back.schema.field("embedding").type.value_field.nullable
    assert vectors.matrix(back["embedding"]).tobytes() == matrix.tobytes()


def test_missing_vectors_are_null_and_nothing_else_is() -> None:
    matrix = np.array([[1, 2], [np.nan, np.nan], [5, 6]], np.float32)
    masked = vectors.masked(vectors.column(matrix), np.array([True, False, True]))
    assert masked.to_pylist() == [[1, 2], None, [5, 6]]
    assert masked.type.value_type == pa.float32()


def test_flags_of_another_length_are_refused() -> None:
    with pytest.raises(AlignmentError, match="2 vectors but 3 presence flags"):
        vectors.masked(vectors.column(np.zeros((2, 2), np.float32)), np.array([True, False, True]))
