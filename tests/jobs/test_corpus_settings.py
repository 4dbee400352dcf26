"""What a spec says of a corpus, against what its source and the store hold: told before anything is written."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from featurestore.artefact import read_footer
from featurestore.errors import AlignmentError, BudgetExceeded, InputError, SpecError
from featurestore.ids import IDS
from featurestore.store import FeatureStore
from jobs import plan
from jobs import spec as specs
from jobs.report import field_counts, rejected
from jobs.run import Runner
from pipelines import fuse
from pipelines.sources import open_source
from tests.pipelines.tars import tar_of

SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: texts
  source: {{type: manifest, path: {folder}/manifest.jsonl}}
  columns: {{id: {id}, group: {group}}}
  fields: {{{field}: {{modality: text, from: {column}}}}}
  shard_rows: 4
"""
PLAIN = {"id": "id", "group": "album", "field": "title", "column": "title"}


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(count: int = 12, **more: Any) -> list[dict[str, Any]]:
    return [{"id": f"s{n:02}", "album": f"a{n % 5}", "title": f"title {n}"} | more for n in range(count)]


def run(folder: Path, **names: str) -> FeatureStore:
    spec = specs.parse(SPEC.format(folder=folder, **(PLAIN | names)), "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    return FeatureStore(spec.store)


@pytest.mark.parametrize("name", ["group", "etag", "shard", "row", "event_timestamp", "title"])
def test_a_kept_column_never_stands_for_one_of_braids(tmp_path: Path, name: str) -> None:
    """Else a column `group` would take the place of the mapped one, and splits would leak."""
    rows = [{"id": row["id"], "album": row["album"], "words": row["title"], name: "x"} for row in rows_of()]
    write(tmp_path, rows)
    with pytest.raises(InputError, match=rf"line 1: column '{name}' would be kept beside Braid's own"):
        run(tmp_path, column="words")
    assert not list((tmp_path / "store").rglob("*.tar"))


def test_an_id_column_that_is_not_the_id_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [row | {"key": f"k{row['id']}"} for row in rows_of()])
    with pytest.raises(InputError, match="column 'id' would be kept beside"):
        run(tmp_path, id="key")


def test_a_column_of_another_type_in_some_shards_is_read_as_text(tmp_path: Path) -> None:
    rows = rows_of()
    for number, row in enumerate(rows):
        row |= {"year": "unknown" if number == 3 else 1990, "size": 1.5 if number == 7 else 2, "note": None}
    rows[5]["note"] = 7
    write(tmp_path, rows)
    table = run(tmp_path).corpus("texts").to_arrow()
    by_id = {row["id"]: row for row in table.to_pylist()}
    assert (by_id["s03"]["year"], by_id["s04"]["year"]) == ("unknown", "1990")
    assert (by_id["s07"]["size"], by_id["s08"]["size"]) == (1.5, 2.0)
    assert [row["note"] for row in table.to_pylist()].count(7) == 1


@pytest.mark.parametrize(("name", "where"), [("group", "corpus.columns.group"), ("column", "corpus.fields.words.from")])
def test_a_column_that_no_line_has_is_told_before_anything_is_written(tmp_path: Path, name: str, where: str) -> None:
    write(tmp_path, rows_of())
    with pytest.raises(InputError, match=rf"{where}: 'albmu': no sample of .* has it; columns: album, id, title"):
        run(tmp_path, **({"field": "words"} | {name: "albmu"}))
    assert not list((tmp_path / "store").rglob("*.tar"))


SOURCES = {
    "rows.jsonl": "type: manifest",
    "rows.csv": "type: manifest",
    "rows.parquet": "type: manifest",
    "values.parquet": "type: parquet",
    "rows.tar": "type: webdataset",
    "albums": "type: folder",
    "cues.jsonl": "type: streams, windows: {per: words}",
}


def put_rows(path: Path) -> None:
    """Samples as a source of this name has them."""
    rows = rows_of(6, kind="sea", added="2026-01-01")
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tar":
        columns = [(f"{row['id']}.json", json.dumps(row).encode()) for row in rows]
        titles = [(f"{row['id']}.title", row["title"].encode()) for row in rows]
        path.write_bytes(tar_of([member for pair in zip(columns, titles, strict=True) for member in pair]))
    elif path.name == "albums":
        for row in rows:
            (path / row["album"]).mkdir(parents=True, exist_ok=True)
            (path / row["album"] / f"{row['id']}.txt").write_text(row["title"])
    else:
        if path.name == "cues.jsonl":
            path.with_name("cues.srt").write_text("1\n00:00:00,000 --> 00:00:03,000\nfirst\n")
            rows = [row | {"title": "cues.srt"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_tells_which_columns_the_corpus_will_have_and_groups_are_kept_as_they_are(
    tmp_path: Path, name: str
) -> None:
    put_rows(tmp_path / name)
    names = PLAIN | {"field": "words"} | ({"group": "folder", "column": "'{id}.txt'"} if name == "albums" else {})
    text = SPEC.format(folder=tmp_path, **names).replace("manifest.jsonl", name)
    text = text.replace("type: manifest", SOURCES[name])
    if name != "albums":
        text = text.replace("group: album}", "group: album, event_timestamp: added}")
    spec = specs.parse(text, "spec")
    source = open_source(plan.corpus_dict(spec))
    assert len(list(source.references())) == 6
    Runner(spec, Console(quiet=True)).run(("shard",))
    corpus = FeatureStore(spec.store).corpus("texts")
    table = corpus.to_arrow()
    assert source.kept() == {*fuse.columns(table, corpus)}
    assert ("title" in source.kept()) == (name == "rows.tar"), "a column that is read as a field is none"
    assert table[names["group"]].to_pylist() == table["group"].to_pylist()
    assert len({*table["group"].to_pylist()}) == 5


LEARNING = """
views:
  title: {{field: title, encoder: minilm-l6}}
training_sets:
  some: {{views: [title], label: {label}, splits: {{train: 1.0}}}}
"""


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (
            "added",
            "corpus.columns names it as event_timestamp, and so the corpus calls it: write label: event_timestamp",
        ),
        ("title", "it is read as field 'title', which is no column: name another one"),
        ("words", "it is read as field 'title', which is no column: name another one"),
        ("kidn", r"no sample of .*manifest\.jsonl has it"),
        *((good, None) for good in ("album", "group", "id", "kind", "event_timestamp")),
    ],
)
def test_a_label_that_the_corpus_will_not_have_is_told_before_anything_runs(
    tmp_path: Path, label: str, told: str | None
) -> None:
    write(tmp_path, [row | {"words": row.pop("title")} for row in rows_of(kind="sea", added="2026-01-01")])
    text = SPEC.format(folder=tmp_path, **(PLAIN | {"column": "words"})) + LEARNING.format(label=label)
    spec = specs.parse(text.replace("group: album}", "group: album, event_timestamp: added}"), "spec")
    snapshot = plan.open_catalog(spec.store)
    if told is None:
        assert plan.ingest(spec, snapshot).samples == 12
        return
    columns = "columns to learn: album, event_timestamp, group, id, kind"
    with pytest.raises(InputError, match=rf"^training_sets\.some\.label: '{label}': {told}; {columns}$"):
        plan.ingest(spec, snapshot)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"group": "title"}, r"corpus.columns: group changed since corpus 'texts' was stored"),
        ({"column": "album"}, r"corpus.fields: title changed since"),
        ({"field": "words"}, r"corpus.fields: title, words changed since"),
    ],
)
def test_a_corpus_section_that_changed_is_not_ignored(tmp_path: Path, change: dict[str, str], told: str) -> None:
    write(tmp_path, rows_of())
    store = run(tmp_path)
    with pytest.raises(InputError, match=told):
        run(tmp_path, **change)
    assert FeatureStore(store.storage).digest() == store.digest()


def test_an_address_with_a_password_is_neither_read_nor_kept(tmp_path: Path) -> None:
    address = "https://me:secret@127.0.0.1:9/title.txt"
    write(tmp_path, [*rows_of(11), {"id": "t", "album": "b", "title": address}])
    titles = {f"title {n}": f"{n}.txt" for n in range(11)}
    for title, name in titles.items():
        (tmp_path / name).write_text(title)
    manifest = tmp_path / "manifest.jsonl"
    for title, name in reversed(titles.items()):
        manifest.write_text(manifest.read_text().replace(f'"{title}"', f'"{name}"'))
    text = SPEC.format(folder=tmp_path, **PLAIN).replace("from: title", "from: title, read: file")
    with pytest.raises(
        BudgetExceeded, match=r"https://\*\*\*@127\.0\.0\.1:9/title\.txt: the address holds a name or a pas"
    ):
        Runner(specs.parse(text, "spec"), Console(quiet=True)).run(("shard",))
    spec = specs.parse(f"{text}  failure_budget: 50%\n", "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    store = FeatureStore(spec.store)
    (row,) = rejected(store, "texts")
    assert (row["id"], row["reason"]) == ("t", "unreadable")
    kept = f"{row} {store.corpus('texts').to_arrow().to_pylist()} {store.snapshot.all()}"
    assert "***@127.0.0.1" in kept
    assert "secret" not in kept


def test_a_spec_is_not_read_from_an_address_with_a_password() -> None:
    with pytest.raises(
        SpecError, match=r"^s3://\*\*\*@b/spec\.yaml: the address holds a name or a password; leave out all"
    ):
        specs.load("s3://k:secret@b/spec.yaml")


def test_an_empty_manifest_is_told_as_such(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(InputError, match="holds no samples"):
        run(tmp_path)


def test_the_budget_is_of_the_corpus_and_not_of_the_run(tmp_path: Path) -> None:
    """One bad value of 121 is within 1 %, also when it is the only one of its ingest."""
    write(tmp_path, rows_of(120))
    run(tmp_path)
    write(tmp_path, [*rows_of(120), {"id": "t", "album": "b", "title": "\udcff"}])
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes().replace(b"\\udcff", b"\xff"))
    store = run(tmp_path)
    assert field_counts(store, "texts") == {"title": {"present": 120, "missing": 0, "quarantined": 1}}

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "manifest.jsonl").write_bytes(manifest.read_bytes().splitlines(keepends=True)[-1])
    with pytest.raises(BudgetExceeded, match=r"1 of 1 values were rejected"):
        run(fresh)


def test_figures_that_do_not_add_up_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, rows_of())
    store = run(tmp_path)
    monkeypatch.setattr("jobs.report.rejected", lambda *_: [{"id": "nobody", "field": "title"}])
    with pytest.raises(AlignmentError, match="do not add up to 12 samples"):
        field_counts(store, "texts")


def test_a_damaged_tar_without_its_commit_is_not_taken_up(tmp_path: Path) -> None:
    """A kill between write and commit, and then a flipped bit: the shard is made again."""
    write(tmp_path, rows_of())
    whole = run(tmp_path).digest()
    for folder in ("catalog",):
        for path in sorted((tmp_path / "store" / folder).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    tar = next((tmp_path / "store").rglob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    assert run(tmp_path).digest() == whole
    rows = next(tar.parent.glob(f"{tar.name.rpartition('-')[0]}-*.parquet"))
    assert read_footer(rows.read_bytes())["media"][0].endswith(tar.name)
    assert tar.read_bytes()[600] == content[600] ^ 1


def test_a_file_that_was_only_touched_is_not_a_changed_sample(tmp_path: Path) -> None:
    """Copied or touched files have another time and the same bytes; other bytes of the same size are a change."""
    rows = [{"id": f"s{n}", "album": "a", "words": f"{n}.txt", "year": n, "tags": ["x", n]} for n in range(6)]
    for row in rows:
        (tmp_path / row["words"]).write_text(f"text of {row['id']}")
    write(tmp_path, rows)
    text = SPEC.format(folder=tmp_path, **(PLAIN | {"column": "words"})).replace(
        "from: words", "from: words, read: file"
    )

    def run_files() -> list[Any]:
        return Runner(specs.parse(text, "spec"), Console(quiet=True)).run(("shard",))

    assert len(run_files()) == 1
    before = FeatureStore(tmp_path / "store")
    for row in rows:
        os.utime(tmp_path / row["words"], (1, 1))
    # It is noted in the id index, once.
    assert len(run_files()) == 1
    assert run_files() == []
    after = FeatureStore(tmp_path / "store")
    assert {entry.kind for entry in set(after.snapshot.all()) ^ set(before.snapshot.all())} == {IDS}

    (tmp_path / "3.txt").write_text("text of s9")
    assert len(run_files()) == 1
    rows[3]["tags"] = ["y"]
    write(tmp_path, rows)
    assert len(run_files()) == 1
    assert FeatureStore(tmp_path / "store").corpus("texts").rows == 6


def test_a_value_that_no_view_decodes_is_decoded_when_it_is_sharded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "good.png").write_bytes(buffer.getvalue())
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    rows = [{"id": f"s{n}", "album": "a", "file": "cut.png" if n == 4 else "good.png"} for n in range(9)]
    write(tmp_path, rows)
    text = SPEC.format(folder=tmp_path, **(PLAIN | {"field": "image", "column": "file"}))
    text = text.replace("modality: text", "modality: image") + "  failure_budget: 20%\n"
    Runner(specs.parse(text, "spec"), Console(quiet=True)).run(("shard",))
    store = FeatureStore(tmp_path / "store")
    assert field_counts(store, "texts") == {"image": {"present": 8, "missing": 0, "quarantined": 1}}
    assert [(row["id"], row["stage"], row["reason"]) for row in rejected(store, "texts")] == [
        ("s4", "shard", "decode_error")
    ]


def test_planning_makes_no_store(tmp_path: Path) -> None:
    from featurestore.catalog import Catalog

    write(tmp_path, rows_of())
    spec = specs.parse(SPEC.format(folder=tmp_path, **PLAIN), "spec")
    assert [step.state for step in plan.steps(spec, Catalog(spec.store).peek())] == [plan.STALE]
    assert not (tmp_path / "store").exists()
