import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore import artefact, vectors
from featurestore.errors import AlignmentError
from featurestore.storage import Storage

FOOTER = {"rows": 3, "kind": "x", "text": "ü"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.of(tmp_path / "store")


def table() -> pa.Table:
    columns = [
        pa.array([1, 2, 3]),
        vectors.column(np.arange(6, dtype=np.float32).reshape(3, 2)),
        pa.array([{"a": "x", "b": None}] * 3, pa.struct([("a", pa.string()), ("b", pa.int64())])),
        pa.array([b"12345678", None, b"abcdefgh"], pa.binary(8)),
    ]
    names = ["n", "embedding", "member", "digest"]
    fields = [pa.field(name, c.type, nullable=name != "embedding") for name, c in zip(names, columns, strict=True)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def test_a_placed_file_is_called_by_its_content(storage: Storage) -> None:
    placed = artefact.place_bytes(storage, b"hello", "cards/card", ".json")
    digest = hashlib.sha256(b"hello").hexdigest()
    assert placed == (f"cards/card-{digest[:8]}.json", 5, digest)
    assert artefact.is_named_for(placed.path, digest)
    assert not artefact.is_named_for(placed.path, digest[::-1])
    assert storage.read(placed.path) == b"hello"
    assert artefact.place_bytes(storage, b"hello", "cards/card", ".json") == placed
    assert artefact.place_bytes(storage, b"other", "cards/card", ".json").path != placed.path
    assert len(storage.list("cards")) == 2


def test_a_table_and_its_footer_come_back(storage: Storage) -> None:
    placed = artefact.place_table(storage, table(), "views/v", FOOTER)
    content = artefact.read_checked(storage, placed.path, placed.sha256)
    back = artefact.read_table(content)
    assert back.replace_schema_metadata(None).equals(table())
    assert back.schema.equals(table().schema)
    assert artefact.read_footer(content) == artefact.footer_of(back.schema) == FOOTER
    assert artefact.rows(content) == 3


def test_equal_tables_are_equal_bytes_however_they_are_chunked(storage: Storage) -> None:
    whole = artefact.place_table(storage, table(), "views/v", FOOTER)
    chunked = pa.concat_tables([table().slice(0, 1), table().slice(1)])
    assert artefact.place_table(storage, chunked, "views/v", dict(reversed(FOOTER.items()))) == whole
    assert artefact.place_table(storage, table(), "views/v", FOOTER | {"rows": 4}) != whole


def test_vectors_are_stored_plain_and_everything_else_compressed(storage: Storage) -> None:
    placed = artefact.place_table(storage, table(), "views/v", FOOTER)
    group = pq.read_metadata(pa.BufferReader(storage.read(placed.path))).row_group(0)
    found = {column.path_in_schema: column.compression for column in map(group.column, range(group.num_columns))}
    assert {path: codec for path, codec in found.items() if path.startswith("embedding")} == {
        next(path for path in found if path.startswith("embedding")): "UNCOMPRESSED"
    }
    assert {codec for path, codec in found.items() if not path.startswith("embedding")} == {"ZSTD"}


def test_a_table_of_no_rows_is_an_artefact_too(storage: Storage) -> None:
    placed = artefact.place_table(storage, table().slice(0, 0), "views/v", FOOTER)
    assert artefact.read_table(storage.read(placed.path)).schema.equals(table().schema)


def test_changed_bytes_are_not_read(storage: Storage) -> None:
    placed = artefact.place_table(storage, table(), "views/v", FOOTER)
    path = Path(storage.root) / placed.path
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(AlignmentError, match=r"sha256 .* where the catalog says .* delete it, and `braid run`"):
        artefact.read_checked(storage, placed.path, placed.sha256)
    path.unlink()
    with pytest.raises(AlignmentError, match="the catalog names this file, and it is gone"):
        artefact.read_checked(storage, placed.path, placed.sha256)


def test_a_page_whose_checksum_does_not_hold_is_not_read(storage: Storage) -> None:
    placed = artefact.place_table(storage, table(), "views/v", FOOTER)
    content = storage.read(placed.path)
    at = content.index(np.arange(6, dtype=np.float32).tobytes())
    with artefact.parsing("x"):
        artefact.read_table(content)
    with pytest.raises(AlignmentError, match=r"views/v: not a whole Parquet file .*CRC"), artefact.parsing("views/v"):
        artefact.read_table(content[:at] + b"\x01" + content[at + 1 :])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_bytes_that_are_no_parquet_are_named(content: bytes) -> None:
    with pytest.raises(AlignmentError, match="some/path: not a whole Parquet file"), artefact.parsing("some/path"):
        artefact.read_table(content)


@pytest.mark.parametrize("metadata", [None, {b"pandas": b"{}"}, {b"braid": b"[1]"}])
def test_a_parquet_file_that_is_not_braids_has_an_empty_footer(metadata: dict[bytes, bytes] | None) -> None:
    assert artefact.footer_of(pa.schema([pa.field("n", pa.int64())], metadata)) == {}
