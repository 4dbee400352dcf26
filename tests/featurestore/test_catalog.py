import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from featurestore import catalog as catalog_module
from featurestore.catalog import Catalog, Change, Entry, Snapshot, lost
from featurestore.errors import InputError, NotFound, StoreError
from featurestore.storage import Storage


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    made = Catalog(Storage.of(tmp_path / "store"))
    made.create()
    return made


def entry(name: str, shard: str, recipe: str = "r1", kind: str = "view", rows: int = 1) -> Entry:
    return Entry(
        kind, name, recipe, shard, f"{kind}/{name}/{recipe}/{shard}", rows, 10, "ab", "cd", "ef", None, 5, "{}"
    )


def change(name: str, *shards: str, recipe: str = "r1", covers: frozenset[str] | None = None, rows: int = 1) -> Change:
    entries = tuple(entry(name, shard, recipe, rows=rows) for shard in shards)
    return Change("view", name, recipe, entries, covers)


def shards_of(catalog: Catalog, name: str, version: int | None = None) -> list[str]:
    return [each.shard for each in catalog.snapshot(version).entries("view", name)]


def test_a_commit_is_read_back_as_it_was_made(catalog: Catalog) -> None:
    lineage = json.dumps({"corpus": "c", "text": 'it\'s "quoted", ü'})
    made = Entry("view", "im'age", "r", "s", "p", 3, 4, "a", "b", "c", -1, None, lineage)
    version = catalog.commit("job", [Change("view", "im'age", "r", (made,))])
    assert catalog.snapshot(version).all() == [made]
    assert catalog.snapshot().entries("view", "im'age")[0].info() == json.loads(lineage)


def test_creating_twice_changes_nothing(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1")])
    catalog.create()
    assert shards_of(catalog, "a") == ["s1"]


def test_committing_the_same_twice_makes_one_version(catalog: Catalog) -> None:
    first = catalog.commit("job", [change("a", "s1", "s2")])
    assert catalog.commit("job", [change("a", "s2", "s1")]) == first
    assert len(catalog.history()) == 2


def test_entries_are_sorted_whatever_the_order_of_commits(catalog: Catalog) -> None:
    catalog.commit("job", [change("b", "s3", "s1"), change("a", "s2")])
    assert [each.key[1:] for each in catalog.snapshot().all()] == [
        ("a", "r1", "s2"),
        ("b", "r1", "s1"),
        ("b", "r1", "s3"),
    ]
    assert catalog.snapshot().names("view") == ["a", "b"]
    assert catalog.snapshot().entries("view", "b", "r2") == []


def test_a_change_replaces_what_it_covers_and_keeps_the_rest(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1", "s2", "s3"), change("other", "s1")])
    catalog.commit("job", [change("a", "s2", covers=frozenset({"s2", "s3"}), rows=7)])
    assert [(each.shard, each.rows) for each in catalog.snapshot().entries("view", "a")] == [("s1", 1), ("s2", 7)]
    assert shards_of(catalog, "other") == ["s1"]


def test_a_change_without_covers_is_all_there_is(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1", "s2")])
    catalog.commit("job", [change("a", "s2")])
    assert shards_of(catalog, "a") == ["s2"]


def test_another_recipe_takes_the_place_of_the_one_before(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1", "s2")])
    catalog.commit("job", [change("a", "s1", recipe="r2", covers=frozenset({"s1"}))])
    assert [each.recipe for each in catalog.snapshot().entries("view", "a")] == ["r2"]


def test_an_empty_change_takes_everything_away(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1")])
    catalog.commit("job", [Change("view", "a", "r1", ())])
    assert catalog.snapshot().all() == []


def test_a_version_stays_what_it_was(catalog: Catalog) -> None:
    first = catalog.commit("one", [change("a", "s1")])
    second = catalog.commit("two", [change("a", "s1", "s2")])
    assert shards_of(catalog, "a", first) == ["s1"]
    assert shards_of(catalog, "a", second) == ["s1", "s2"]
    assert [(each["job"], each["files"]) for each in catalog.history()] == [("two", 2), ("one", 1), ("create", 0)]


def test_the_digest_is_of_the_entries_alone(catalog: Catalog, tmp_path: Path) -> None:
    other = Catalog(Storage.of(tmp_path / "elsewhere"))
    other.create()
    catalog.commit("one", [change("a", "s1"), change("b", "s1")])
    other.commit("x", [change("b", "s1")])
    assert other.snapshot().digest() != catalog.snapshot().digest()
    other.commit("y", [change("a", "s1")])
    assert other.snapshot().digest() == catalog.snapshot().digest()


def test_no_commit_of_jobs_that_race_is_lost(catalog: Catalog) -> None:
    def job(number: int) -> None:
        own = Catalog(catalog.storage)
        own.commit(f"own {number}", [change(f"v{number}", "s1")])
        own.commit(f"shared {number}", [change("shared", f"s{number}", covers=frozenset({f"s{number}"}))])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, range(4)))
    assert catalog.snapshot().names("view") == ["shared", "v0", "v1", "v2", "v3"]
    assert shards_of(catalog, "shared") == ["s0", "s1", "s2", "s3"]
    assert len(catalog.history()) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        Change("view", "a", "r1", (entry("b", "s1"),)),
        Change("view", "a", "r1", (entry("a", "s1", "r2"),)),
        Change("view", "a", "r1", (entry("a", "s1"),), frozenset({"s2"})),
        Change("view", "a", "r1", (entry("a", "s1"), entry("a", "s1", rows=2))),
    ],
)
def test_a_change_that_contradicts_itself_is_refused(catalog: Catalog, wrong: Change) -> None:
    with pytest.raises(InputError, match="entries of others, of shards it does not cover, or one twice"):
        catalog.commit("job", [wrong])
    assert catalog.snapshot().all() == []


def test_a_store_or_version_that_is_not_there_is_named(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no Braid store"):
        Catalog(Storage.of(tmp_path / "nothing")).snapshot()
    assert not Catalog(Storage.of(tmp_path / "nothing")).exists()
    with pytest.raises(NotFound, match="has no version 7; it has 0 to 0"):
        catalog.snapshot(7)


def test_old_versions_are_kept_for_good(catalog: Catalog) -> None:
    from deltalake import DeltaTable

    settings = DeltaTable(str(Path(catalog.storage.root) / "catalog")).metadata().configuration
    assert settings["delta.enableExpiredLogCleanup"] == "false"
    assert settings["delta.logRetentionDuration"] == "interval 36500 days"


def test_entries_are_a_sequence_of_entries(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1", "s2", "s3")])
    entries = catalog.snapshot().entries("view", "a")
    expected = [entry("a", shard) for shard in ("s1", "s2", "s3")]
    assert entries == expected
    assert (entries[0], entries[-1], list(entries[1:])) == (expected[0], expected[-1], expected[1:])
    assert entries != expected[:2]
    assert entries != [*expected[:2], entry("a", "s3", rows=2)]
    assert [entries.find(shard) for shard in ("s0", "s2", "s9")] == [None, expected[1], None]
    with pytest.raises(IndexError):
        entries[3]


def test_the_order_of_rows_in_a_file_does_not_matter(catalog: Catalog) -> None:
    from deltalake import write_deltalake

    folder = str(Path(catalog.storage.root) / "catalog")
    for shards in (("s3", "s1"), ("s2", "s0")):
        rows = [entry("a", shard)._asdict() for shard in shards]
        write_deltalake(folder, pa.Table.from_pylist(rows, schema=catalog_module.SCHEMA), mode="append")
    snapshot = catalog.snapshot()
    assert [each.shard for each in snapshot.entries("view", "a")] == ["s0", "s1", "s2", "s3"]
    assert snapshot.entries("view", "a").find("s2") == entry("a", "s2")


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_names_share_files_and_may_be_longer_than_the_statistics_of_a_file_hold(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(catalog_module, "_KEPT_BYTES", kept_bytes)
    names = ["a" * 200 + end for end in ("", "b", "z")] + ["é" * 100, "b"]
    catalog.commit("one", [change(name, "s1", "s2") for name in names])
    catalog.commit("two", [Change("media", "é" * 100, "r1", (entry("é" * 100, "s1", kind="media"),))])
    snapshot = catalog.snapshot()
    assert snapshot.names("view") == sorted(names)
    assert all(snapshot.entries("view", name) == [entry(name, "s1"), entry(name, "s2")] for name in names)
    assert snapshot.entries("view") == [entry(name, shard) for name in sorted(names) for shard in ("s1", "s2")]
    assert snapshot.entries("media") == [entry("é" * 100, "s1", kind="media")]


def test_only_files_that_may_hold_a_name_are_read(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.commit("one", [change("a", "s1")])
    catalog.commit("two", [change("b", "s1")])
    snapshot, read = catalog.snapshot(), []
    monkeypatch.setattr(Storage, "read", lambda self, key, whole=Storage.read: read.append(key) or whole(self, key))
    assert snapshot.names("view") == ["a", "b"]
    assert (len(read), len(snapshot.entries("view", "b")), len(snapshot.entries("view", "b")), len(read)) == (
        0,
        1,
        1,
        1,
    )


def test_what_a_listing_lacks_or_has_with_another_size_is_lost(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1", "s2", "s3")])
    found = lost(catalog.snapshot().table("view", "a"), {"view/a/r1/s1": 10, "view/a/r1/s2": 11})
    assert found["shard"].to_pylist() == ["s2", "s3"]


def test_a_file_that_is_gone_is_told_when_it_is_read(catalog: Catalog) -> None:
    catalog.commit("job", [change("a", "s1")])
    snapshot: Snapshot = catalog.snapshot()
    for path in (Path(catalog.storage.root) / "catalog").glob("*.parquet"):
        path.unlink()
    with pytest.raises(StoreError, match=r"a file of the catalog is gone or damaged .* restore catalog/ from a copy"):
        snapshot.entries("view", "a")


def test_no_changes_make_no_version(catalog: Catalog) -> None:
    assert catalog.commit("job", []) == catalog.snapshot().version


def test_a_store_of_another_format_is_told_and_not_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(Storage.of(tmp_path))
    with monkeypatch.context() as older:
        older.setattr("featurestore.catalog._DESCRIPTION", "Braid store, format 0")
        catalog.create()
        assert catalog.snapshot().version == 0
    with pytest.raises(
        StoreError, match=r"says 'Braid store, format 0', this Braid reads 'Braid store, format 2': .* name another"
    ):
        catalog.snapshot()
