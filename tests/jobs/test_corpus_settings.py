"""What a spec says of a corpus, against what its source and the store hold: told before anything is written."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from featurestore.artefact import read_footer
from featurestore.errors import AlignmentError, BudgetExceeded, InputError
from featurestore.ids import IDS
from featurestore.store import FeatureStore
from jobs import plan
from jobs import spec as specs
from jobs.report import field_counts, rejected
from jobs.run import Runner

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
