"""Files of samples with bytes changed, lost and added: each is read, or told; none ends the process or hangs it."""

import io
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import DecodeError, InputError
from pipelines.sources import open_source
from tests.pipelines.test_manifest_formats import KINDS
from tests.pipelines.test_parquet_source import BYTES_AND_PATH

COUNT = 60
MAX_SECONDS = 20


def parquet() -> bytes:
    cells = pa.array([{"bytes": bytes([n]) * 50, "path": None} for n in range(COUNT)], BYTES_AND_PATH)
    columns: dict[str, Any] = {
        "id": [f"s{n}" for n in range(COUNT)],
        "title": ["a", None] * (COUNT // 2),
        "cell": cells,
    }
    columns |= {name: pa.concat_arrays([array] * COUNT) for name, (array, _) in KINDS.items() if name != "kind"}
    made = io.BytesIO()
    pq.write_table(pa.table(columns), made, row_group_size=25)
    return made.getvalue()


FILES = {
    "m.csv": b"id,title,label\n" + b"".join(b's%d,"a ""b"",\nc",%d\n' % (n, n) for n in range(COUNT)),
    "m.jsonl": "".join(json.dumps({"id": f"s{n}", "title": f"é {n}"}) + "\n" for n in range(COUNT)).encode(),
    "m.parquet": parquet(),
    "values.parquet": parquet(),
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        # A Parquet file's end is where it says what is in it.
        at = rng.randrange(max(0, len(raw) - 3000), len(raw)) if rng.random() < 0.4 else rng.randrange(len(raw))
        how = rng.random()
        if how < 0.5:
            raw[at] = rng.randrange(256)
        elif how < 0.7:
            del raw[at : at + rng.randrange(1, 20)]
        elif how < 0.8:
            raw[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif how < 0.9:
            raw[at : at + 8] = b"\xff" * 8
        else:
            del raw[max(1, at) :]
        if len(raw) < 2:
            break
    return bytes(raw)


def outcome(path: Path) -> str:
    held = path.name == "values.parquet"
    field = {"modality": "image", "from": "cell"} if held else {"modality": "text", "from": "title"}
    source = open_source(
        {
            "source": {"type": "parquet" if held else "manifest", "path": [str(path)]},
            "columns": {"id": "id"},
            "fields": {"field": field | {"read": "inline"}},
        }
    )
    try:
        references = list(source.references())
        found = list(source.samples(references[::-1]))
        assert [each.id for each in found] == [each.id for each in references][::-1]
        for value in (each.values["field"] for each in found):
            if value is not None:
                value.fetch()
    except InputError as error:
        return "told" if path.name in str(error) else "told, but not where"
    except DecodeError:
        return "rejected"
    return "read"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_mutated_file_is_read_or_told(tmp_path: Path, name: str, count: int) -> None:
    rng, seen = random.Random(f"{name} {count}"), Counter[str]()
    path = tmp_path / name
    for _ in range(count):
        path.write_bytes(mutated(FILES[name], rng))
        begun = time.monotonic()
        seen[outcome(path)] += 1
        assert time.monotonic() - begun < MAX_SECONDS
    assert "told, but not where" not in seen
    assert seen["told"] > 0
    assert seen["read"] > 0
