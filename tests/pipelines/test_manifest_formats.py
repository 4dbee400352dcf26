"""Manifests in CSV, TSV and Parquet: the same samples as in JSON Lines, and what is wrong told by its place."""

import codecs
import csv
import datetime
import decimal
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from featurestore.errors import InputError
from featurestore.store import FeatureStore
from featurestore.times import timestamp_ns
from jobs import spec as specs
from jobs.run import Runner
from pipelines.sources import Sample, Source, open_source, text_rows
from tests.planted import write_planted

HEAD = b"id,title,label\n"


def source_of(path: Path, field: str = "title", **columns: str) -> Source:
    fields = {"title": {"modality": "text", "from": field, "read": "inline"}}
    spec = {"source": {"type": "manifest", "path": [str(path)]}, "columns": {"id": "id", **columns}, "fields": fields}
    return open_source(spec)


def written(folder: Path, content: bytes, name: str = "m.csv") -> Source:
    (folder / name).write_bytes(content)
    return source_of(folder / name)


def samples(source: Source) -> list[Sample]:
    """In another order than they stand in, as a shard reads them."""
    found = list(source.references())
    return list(source.samples(found[::-1]))[::-1]


def titles(source: Source) -> dict[str, bytes | None]:
    return {each.id: value.fetch() if (value := each.values["title"]) else None for each in samples(source)}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_rows_are_called_by_their_place_where_they_have_no_ids(tmp_path: Path, ending: str) -> None:
    rows = [{"title": f"title {n % 3}", "label": "x"} for n in range(5)]
    for name in ("a", "b/c"):
        path = tmp_path / f"d/{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif ending == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("title,label\n" + "".join(f"{row['title']},{row['label']}\n" for row in rows))
    found = source_of(tmp_path / f"d/**/*.{ending}", id="__row__")
    ids = [each.id for each in found.references()]
    places = {"parquet": range(5), "jsonl": range(0, 175, 35), "csv": range(12, 62, 10)}[ending]
    assert ids == [f"{name}.{ending}#{place}" for name in ("a", "b/c") for place in places]
    assert found.columns() == {"__row__", "title", "label"}
    assert [(each.id, value.fetch()) for each in samples(found) if (value := each.values["title"])] == [
        (sample_id, f"title {n % 5 % 3}".encode()) for n, sample_id in enumerate(ids)
    ]
    # No more files in the folder change them, nor does its place.
    one = source_of(tmp_path / f"d/*.{ending}", id="__row__")
    assert [each.id for each in one.references()] == ids[:5]
    assert [each.id for each in source_of(tmp_path / f"d/a.{ending}", id="__row__").references()] == ids[:5]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_cells_in_quotes_hold_delimiters_quotes_and_line_ends(tmp_path: Path, mark: bytes, newline: bytes) -> None:
    lines = [b"id,title,label", b's0,"one', b'two, ""three""",x', b"", b"s1,plain,", b's2,"",007']
    source = written(tmp_path, mark + newline.join(lines))
    assert titles(source) == {"s0": b"one" + newline + b'two, "three"', "s1": b"plain", "s2": None}
    assert [each.columns for each in samples(source)] == [{"label": "x"}, {"label": None}, {"label": "007"}]
    places = [source.place(reference) for reference in source.references()]
    assert places == [f"{tmp_path}/m.csv, line {line}" for line in (2, 5, 6)]


def test_tabs_part_the_cells_of_a_tsv(tmp_path: Path) -> None:
    assert titles(written(tmp_path, b"id\ttitle\ns0\ta, b\ns1\t\n", "m.tsv")) == {"s0": b"a, b", "s1": None}


cells = st.lists(
    st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), max_size=12)] * 2), min_size=1, max_size=8
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells, st.sampled_from([",", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_what_pythons_writer_wrote_is_read_again(
    tmp_path: Path, rows: list[tuple[str, str]], delimiter: str, newline: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL).writerows(
        [("id", "title", "more"), *((f"s{number}", *row) for number, row in enumerate(rows))]
    )
    source = written(tmp_path, text.getvalue().encode(), "m.csv" if delimiter == "," else "m.tsv")
    assert list(titles(source).values()) == [title.encode() or None for title, _ in rows]
    assert [each.columns["more"] for each in samples(source)] == [more or None for _, more in rows]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            HEAD + b"s0,a,b\ns1,a\n",
            r"m\.csv, line 3: 2 cells under 3 columns \(id, title, label\); give every row as many",
        ),
        (HEAD + b's0,"a\nb",c\n\ns1,a,b,c\n', r"line 5: 4 cells under 3 columns"),
        (HEAD + b's0,"a\nb","c\ns1,a,b\n', r"line 3: the quote that begins here is never closed"),
        (HEAD + b's0,"a""\ns1,a,b\n', r"line 2: the quote that begins here is never closed"),
        (HEAD + b's0,"a" b,c\n', r"line 2: no row of cells: ',' expected after '\"'; write a cell that holds a quote"),
        (HEAD + b"s0,a\rb,c\n", r"line 2: no row of cells: new-line character seen in unquoted field"),
        (b"\xacid,title\ns0\n", r"line 2: 1 cells under 2 columns \(\?id, title\); give"),
        (HEAD + b",a,b\n", r"line 2: id None is not a non-empty text"),
        (b"id,title,id\ns0,a,b\n", r"line 1: column 'id' stands twice; rename one"),
        (codecs.BOM_UTF16_LE + "id,title\ns0,a\n".encode("utf-16-le"), r"line 1: .*save the file as UTF-8"),
        ("id,title\ns0,a\n".encode("utf-16-be"), r"line 1: .*save the file as UTF-8"),
    ],
)
def test_what_is_no_row_is_told_by_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(InputError, match=told):
        list(written(tmp_path, content).references())


def test_a_row_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_ROW_BYTES", 4096)
    with pytest.raises(InputError, match=r"line 3: longer than .* bytes; put large texts in files"):
        list(written(tmp_path, HEAD + b"s0,a,b\ns1," + b"a" * 5000 + b",b\n").references())
    with pytest.raises(InputError, match=r"line 2: the quote that begins here is never closed"):
        list(written(tmp_path, HEAD + b's0,"a,b\n' + b"s1,a,b\n" * 1000).references())


def test_a_cell_may_be_larger_than_pythons_own_limit(tmp_path: Path) -> None:
    large = b"x" * (csv.field_size_limit(131_072) and 200_000)
    assert titles(written(tmp_path, HEAD + b"s0," + large + b",b\n")) == {"s0": large}


def test_bytes_that_are_no_text_spoil_only_their_value(tmp_path: Path) -> None:
    (found,) = samples(written(tmp_path, HEAD + b"s0,Caf\xe9,Caf\xe9\n"))
    assert found.columns == {"label": "Caf\ufffd"}
    assert found.values["title"] is not None
    assert found.values["title"].fetch() == b"Caf\xe9"


def test_an_etag_changes_with_its_row_and_with_a_columns_name_alone(tmp_path: Path) -> None:
    def etags(content: bytes) -> dict[str, str]:
        return {each.id: each.etag for each in written(tmp_path, content).references()}

    before = etags(HEAD + b"s0,a,x\ns1,b,y\n")
    assert etags(HEAD.replace(b"\n", b"\r\n") + b"\r\ns1,b,y\r\ns0,a,x") == before
    after = etags(HEAD + b"s0,a,z\ns1,b,y\n")
    assert (after["s0"] != before["s0"], after["s1"]) == (True, before["s1"])
    assert etags(b"id,title,kind\ns1,b,y\n")["s1"] != before["s1"]


@pytest.mark.parametrize("after", [b"s9,a,b\n", b's0,"a\n', b"s0,a\n", b""])
def test_a_row_that_changed_since_planning_is_told(tmp_path: Path, after: bytes) -> None:
    source = written(tmp_path, HEAD + b"s0,a,b\n")
    references = list(source.references())
    (tmp_path / "m.csv").write_bytes(HEAD + after)
    with pytest.raises(InputError, match=r"m\.csv, byte 15: found '.*' where planning saw 's0': the source changed"):
        list(source.samples(references))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("m.csv.gz", r"m\.csv\.gz: compressed manifests are not read, .*; unpack it, or convert it to Parquet"),
        ("m.jsonl.zst", r"compressed manifests are not read"),
        ("m.txt", r"m\.txt: '\.txt' does not say what this manifest is; allowed: \.jsonl, .*\.csv, \.tsv, \.parquet"),
        ("m", r"/m: 'no ending' does not say"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        list(written(tmp_path, b"", name).references())


def test_a_time_in_a_cell_may_be_nanoseconds() -> None:
    assert timestamp_ns("1700000000000000001", "x") == 1_700_000_000_000_000_001
    assert timestamp_ns("20260131", "x") == timestamp_ns("2026-01-31", "x")


# Parquet.

WHEN = datetime.datetime(2026, 1, 31, 12, 0, 0, 250_000)
NS = 1_769_860_800_250_000_000
KINDS: dict[str, tuple[pa.Array, Any]] = {
    "s": (pa.array([WHEN.replace(microsecond=0)], pa.timestamp("s")), "2026-01-31T12:00:00.000"),  # stored as ms
    "ms": (pa.array([WHEN], pa.timestamp("ms", "Europe/Berlin")), "2026-01-31T12:00:00.250Z"),
    "us": (pa.array([WHEN], pa.timestamp("us", "+03:00")), "2026-01-31T12:00:00.250000Z"),
    "ns": (pa.array([NS + 1], pa.timestamp("ns")), "2026-01-31T12:00:00.250000001"),
    "date": (pa.array([WHEN.date()]), "2026-01-31"),
    "time": (pa.array([WHEN.time()], pa.time64("us")), "12:00:00.250000"),
    "lasts": (pa.array([1500], pa.duration("ms")), "1500ms"),
    "price": (pa.array([decimal.Decimal("1.10")], pa.decimal128(9, 2)), "1.10"),
    "kind": (pa.array(["x"]).dictionary_encode(), "x"),
    "large": (pa.array(["x"], pa.large_string()), "x"),
    "half": (pa.array([1.5], pa.float16()), 1.5),
    "big": (pa.array([1 << 63], pa.uint64()), 1 << 63),
    "true": (pa.array([True]), True),
    "words": (pa.array([["a", None]]), ["a", None]),
    "box": (pa.array([{"x": 1, "seen": WHEN.date()}]), {"x": 1, "seen": "2026-01-31"}),
    "tags": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [["a", 1]]),
    "null": (pa.nulls(1), None),
}


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "m.parquet", **options)
    return folder / "m.parquet"


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_kept_as_what_json_has(tmp_path: Path, kind: str) -> None:
    array, expected = KINDS[kind]
    path = parquet(tmp_path, {"id": ["s0"], "title": ["a"], "kept": array})
    (found,) = samples(source_of(path))
    assert found.columns == {"kept": expected}
    assert json.loads(json.dumps(expected)) == expected
    assert type(found.columns["kept"]) is type(expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (KINDS["s"][0], NS // 10**9 * 10**9),
        (KINDS["ms"][0], NS),
        (KINDS["us"][0], NS),
        (KINDS["ns"][0], NS + 1),
        (KINDS["date"][0], NS // 10**9 * 10**9 - 12 * 3600 * 10**9),
        (pa.array([NS]), NS),
        (pa.array(["2026-01-31T13:00:00.25+01:00"]), NS),
        (pa.array([None], pa.timestamp("s")), None),
    ],
)
def test_a_column_of_times_is_nanoseconds(tmp_path: Path, array: pa.Array, expected: int | None) -> None:
    path = parquet(tmp_path, {"id": ["s0"], "title": ["a"], "added": array})
    (found,) = samples(source_of(path, event_timestamp="added"))
    assert found.columns == {"event_timestamp": expected}


def test_a_time_out_of_the_range_of_nanoseconds_is_told(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"id": ["s0"], "title": ["a"], "added": pa.array([10**11], pa.timestamp("s"))})
    with pytest.raises(InputError, match=r"m\.parquet: .*out of bounds"):
        list(source_of(path, event_timestamp="added").references())


def test_whole_numbers_are_ids_and_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"id": [7, 8], "title": ["a", "b"], "album": pa.array([1, None], pa.uint8())})
    assert [(each.id, each.group) for each in source_of(path, group="album").references()] == [("7", "1"), ("8", "8")]


def test_columns_of_bytes_are_left_out(tmp_path: Path) -> None:
    nested = pa.array([[{"bytes": b"x"}]])
    path = parquet(tmp_path, {"id": ["s0"], "title": ["a"], "png": [b"x"], "views": nested, "n": [1]})
    assert [each.columns for each in samples(source_of(path))] == [{"n": 1}]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"id": [0.5], "title": ["a"]}, r"m\.parquet: column 'id' \(corpus\.columns\) is double; allowed: string"),
        ({"id": ["s0"], "title": [b"a"]}, r"m\.parquet: column 'title' is binary; .*say `type: parquet`"),
        ({"id": [None], "title": ["a"]}, r"m\.parquet, row 1: id None is not a non-empty text"),
        ({"key": ["s0"], "title": ["a"]}, r"m\.parquet, row 1: id None"),
        (
            {"id": ["s0"], "title": ["a"], "kept": pa.array([[NS + 1]], pa.list_(pa.timestamp("ns")))},
            r"m\.parquet: .* a value of list.* cannot be kept as JSON",
        ),
    ],
)
def test_a_column_of_a_wrong_type_is_told(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        list(source_of(parquet(tmp_path, columns)).references())


def test_a_column_that_stands_twice_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["s0"])] * 2, names=["id", "id"]), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=r"m\.parquet: column 'id' stands twice; rename one"):
        list(source_of(tmp_path / "m.parquet").references())


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "page"])
def test_a_broken_file_is_told_by_its_name(tmp_path: Path, spoil: str) -> None:
    path = parquet(tmp_path, {"id": [f"s{n}" for n in range(5000)], "title": ["a"] * 5000})
    raw = path.read_bytes()
    page = raw[:4] + b"\xff" * 200 + raw[204:]
    path.write_bytes({"cut": raw[:-100], "empty": b"", "text": b"id,title\ns0,a\n", "page": page}[spoil])
    with pytest.raises(InputError, match=rf"{path}: no Parquet file, or one that is cut off or broken: "):
        list(source_of(path).references())


def test_texts_of_a_file_that_are_no_texts_spoil_only_their_value(tmp_path: Path) -> None:
    broken = pa.array([b"Caf\xe9", b"b"]).view(pa.string())
    path = parquet(tmp_path, {"id": ["s0", "s1"], "title": broken, "label": broken})
    assert titles(source_of(path)) == {"s0": b"Caf\xe9", "s1": b"b"}
    assert [each.columns["label"] for each in samples(source_of(path))] == ["Caf\ufffd", "b"]


def test_only_row_groups_that_hold_a_wanted_row_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(
        tmp_path, {"id": [f"s{n}" for n in range(40)], "title": [f"t{n}" for n in range(40)]}, row_group_size=4
    )
    source, read = source_of(path), list[int]()
    references = list(source.references())
    iter_batches = pq.ParquetFile.iter_batches

    def counted(file: pq.ParquetFile, rows: int, groups: list[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
        read.extend(groups)
        yield from iter_batches(file, rows, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    wanted = [references[number] for number in (38, 5, 36, 7, 5)]
    assert [each.id for each in source.samples(wanted)] == ["s38", "s5", "s36", "s7", "s5"]
    assert read == [1, 9]


def test_the_same_rows_have_the_same_etags_however_they_are_grouped(tmp_path: Path) -> None:
    columns = {"id": [f"s{n}" for n in range(40)], "title": ["a"] * 40}
    first = {each.id: each.etag for each in source_of(parquet(tmp_path, columns)).references()}
    columns = {name: values[::-1] for name, values in columns.items()}
    again = {each.id: each.etag for each in source_of(parquet(tmp_path, columns, row_group_size=7)).references()}
    assert again == first
    assert len({*first.values()}) == 40


def test_a_file_that_is_shorter_than_when_planned_is_told(tmp_path: Path) -> None:
    source = source_of(parquet(tmp_path, {"id": ["s0", "s1"], "title": ["a", "b"]}))
    references = list(source.references())
    parquet(tmp_path, {"id": ["s0"], "title": ["a"]})
    with pytest.raises(InputError, match=r"m\.parquet, row 2: found '' where planning saw 's1': the source changed"):
        list(source.samples(references))


# All of them.

SPEC = """
version: 1
store: {{uri: {store}}}
corpus:
  name: planted
  source: {{type: {kind}, path: {path}}}
  columns: {{id: id, group: group, event_timestamp: added}}
  fields:
    caption: {{modality: text, from: caption}}
    image: {{modality: image, from: {image}}}
    sound: {{modality: audio, from: {sound}}}
  shard_rows: 8
"""
NAMES = ("id", "group", "label", "added", "caption", "image_path", "sound_path")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureStore]:
    """The planted corpus from a manifest of each format, and from Parquet that holds the values."""
    folder = tmp_path_factory.mktemp("formats")
    manifest = write_planted(folder, 48)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for name, delimiter in (("m.csv", ","), ("m.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows(
                [NAMES, *([row.get(name) for name in NAMES] for row in rows)]
            )
    columns = {name: [row.get(name) for row in rows] for name in NAMES}
    pq.write_table(pa.table(columns), folder / "m.parquet", row_group_size=10)
    values = {
        name: [(folder / path).read_bytes() if path else None for path in columns.pop(f"{name}_path")]
        for name in ("image", "sound")
    }
    values["sound"] = [raw and {"bytes": raw, "path": "sound.ogg"} for raw in values["sound"]]
    pq.write_table(pa.table(columns | values), folder / "values.parquet", row_group_size=10)
    found = {}
    for path in (manifest, *(folder / name for name in ("m.csv", "m.tsv", "m.parquet", "values.parquet"))):
        held = path.name == "values.parquet"
        names = {"image": "image", "sound": "sound"} if held else {"image": "image_path", "sound": "sound_path"}
        kind = "parquet" if held else "manifest"
        spec = specs.parse(
            SPEC.format(store=folder / path.name.replace(".", "-"), kind=kind, path=path, **names), "spec"
        )
        Runner(spec, Console(quiet=True)).run(("shard",))
        found[path.name] = FeatureStore(spec.store)
    return found


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.parquet", "values.parquet"])
def test_a_corpus_is_the_same_from_every_format(stores: dict[str, FeatureStore], name: str) -> None:
    def rows(store: FeatureStore) -> dict[str, Any]:
        table = store.corpus("planted").to_arrow()
        fields = ("caption", "image", "sound")
        return {
            row["id"]: [row["group"], row["label"], row["event_timestamp"]]
            + [(row[field]["present"], row[field]["digest"], row[field]["miss_reason"]) for field in fields]
            for row in table.to_pylist()
        }

    expected = rows(stores["manifest.jsonl"])
    assert rows(stores[name]) == expected
    assert len(expected) == 48
    present = [field[0] for row in expected.values() for field in row[3:]]
    assert 100 < sum(present) < len(present)
