"""Whole runs: what is done again when something changed, and that nothing else is."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from featurestore.artefact import file_sha256
from featurestore.errors import StoreError
from featurestore.store import FeatureStore
from jobs import plan
from jobs.run import Runner
from jobs.spec import load
from pipelines.encode import ShardEncoder
from pipelines.shard_writer import ShardWriter
from tests.conftest import Made
from tests.planted import SHARD_ROWS

SHARDS = 6
STEPS = {
    ("shard", "planted"),
    ("encode", "loud"),
    ("encode", "timbre"),
    ("encode", "short"),
    ("align", "heard"),
    ("align", "other"),
    ("index", "heard"),
    ("index", "other"),
    ("fuse", "heard"),
    ("fuse", "other"),
}


def run(spec: Path, stages: tuple[str, ...] = plan.STAGES) -> tuple[set[tuple[str, str]], str]:
    """Which steps a run carried out, and what it printed."""
    out = io.StringIO()
    done = Runner(load(spec), Console(file=out, width=200)).run(stages)
    return {(step.stage, step.name) for step in done}, out.getvalue()


def not_fresh(spec: Path) -> dict[tuple[str, str], tuple[str, int, int]]:
    """What `braid plan` says is to be done: step -> (state, todo, total)."""
    loaded = load(spec)
    steps = plan.steps(loaded, plan.open_catalog(loaded.store))
    assert {(step.stage, step.name) for step in steps} == STEPS
    return {(step.stage, step.name): step[2:5] for step in steps if step.state != plan.FRESH}


def content(store: Path) -> dict[str, str]:
    """Every file that the store's newest version names -> sha256 of what lies there."""
    return {entry.path: file_sha256(store / entry.path) for entry in FeatureStore(store).snapshot.all()}


def lines(made: Made) -> list[str]:
    return (made.corpus / "manifest.jsonl").read_text().splitlines()


def write_lines(made: Made, rows: list[str]) -> None:
    (made.corpus / "manifest.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def copy(small: Made, tmp_path: Path) -> Made:
    return small.copy_to(tmp_path)


def test_a_second_run_computes_nothing_and_says_so(small: Made) -> None:
    version = small.open().version
    assert not_fresh(small.spec) == {}
    done, printed = run(small.spec)
    assert done == set()
    assert "Everything is fresh: nothing was computed." in printed
    assert small.open().version == version


@pytest.mark.parametrize("harm", ["deleted", "emptied", "cut short"])
def test_a_lost_shard_of_a_view_is_remade_with_the_same_bytes_and_nothing_else_is(copy: Made, harm: str) -> None:
    before, version = content(copy.store), copy.open().version
    lost = copy.store / copy.open().view("loud").files()[2]
    if harm == "deleted":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[: 0 if harm == "emptied" else -100])
    assert not_fresh(copy.spec) == {
        ("encode", "loud"): ("stale", 1, SHARDS),
        ("align", "heard"): ("pending", 1, 1),
        ("index", "heard"): ("pending", 1, 1),
        ("fuse", "heard"): ("pending", 1, 1),
    }
    assert run(copy.spec)[0] == {("encode", "loud")}
    assert content(copy.store) == before
    assert copy.open().version == version
    assert not_fresh(copy.spec) == {}


def test_a_changed_option_makes_exactly_what_depends_on_it_stale(copy: Made) -> None:
    copy.spec.write_text(copy.spec.read_text().replace("batch_size: 32", "batch_size: 4"))
    depends = {("encode", "loud"), ("align", "heard"), ("index", "heard"), ("fuse", "heard")}
    stale = not_fresh(copy.spec)
    assert stale.keys() == depends
    assert {state for state, _, _ in stale.values()} == {"stale"}
    assert stale["encode", "loud"] == ("stale", SHARDS, SHARDS)
    others = copy.open().view("timbre").files()
    done, _ = run(copy.spec)
    # The bytes of the vectors do not change with this encoder's batches, but the recipe in the files does.
    assert done == depends
    assert copy.open().view("timbre").files() == others
    assert copy.open().view("loud").encoder["options"]["batch_size"] == 4


def test_going_back_to_an_earlier_option_takes_up_what_it_made(copy: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, text = copy.open().digest(), copy.spec.read_text()
    copy.spec.write_text(text.replace("batch_size: 32", "batch_size: 4"))
    run(copy.spec, ("encode",))
    assert copy.open().digest() != digest
    copy.spec.write_text(text)
    monkeypatch.setattr(ShardEncoder, "make", None)
    run(copy.spec, ("encode",))
    assert copy.open().digest() == digest
    assert not_fresh(copy.spec) == {}


def test_a_file_that_changed_while_no_catalog_named_it_is_not_taken_up(copy: Made) -> None:
    digest, text = copy.open().digest(), copy.spec.read_text()
    spoiled = copy.store / copy.open().view("loud").files()[2]
    copy.spec.write_text(text.replace("batch_size: 32", "batch_size: 4"))
    run(copy.spec, ("encode",))
    raw = bytearray(spoiled.read_bytes())
    raw[len(raw) // 3] ^= 1
    spoiled.write_bytes(raw)
    copy.spec.write_text(text)
    run(copy.spec, ("encode",))
    assert copy.open().digest() == digest
    assert len(copy.open().view("loud").to_arrow()) == SHARDS * SHARD_ROWS


def test_new_samples_add_shards_and_leave_the_old_ones(copy: Made) -> None:
    before = content(copy.store)
    stamps = {path: (copy.store / path).stat().st_mtime_ns for path in before}
    rows = [json.loads(line) for line in lines(copy)]
    new = [row | {"id": f"new/{number}"} for number, row in enumerate(rows[:9])]
    write_lines(copy, [json.dumps(row) for row in new + rows])
    stale = not_fresh(copy.spec)
    assert stale.keys() == STEPS
    assert stale["shard", "planted"] == ("stale", 9, 57)
    assert {state for state, _, _ in stale.values()} == {"stale"}
    out = Runner(load(copy.spec), Console(quiet=True)).run()
    assert {(step.stage, step.name) for step in out} == STEPS
    sounds = sum(row["sound_path"] is not None for row in new)
    assert {step.values for step in out if step.stage == "encode"} == {sounds}
    store = copy.open()
    assert store.corpus("planted").rows == 57
    assert len(store.corpus("planted").shards) == SHARDS + 2
    kept = {entry.path for kind in ("corpus", "media", "ids", "view") for entry in store.snapshot.entries(kind)}
    old = {path for path in before if path.startswith(("corpora/", "views/"))}
    assert old < kept
    assert all((copy.store / path).stat().st_mtime_ns == stamps[path] for path in old)
    assert not_fresh(copy.spec) == {}


def test_the_same_input_in_another_folder_and_order_gives_the_same_store(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    shutil.rmtree(copy.store)
    write_lines(copy, lines(copy)[::-1])
    assert run(copy.spec)[0] == STEPS
    assert content(copy.store) == content(small.store)
    assert copy.open().digest() == small.open().digest()


def test_a_run_without_its_commits_takes_up_every_file_that_lies_there(
    copy: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: sha256 for path, sha256 in content(copy.store).items() if path.startswith(("corpora/", "views/"))}
    shutil.rmtree(copy.store / "catalog")
    monkeypatch.setattr(ShardWriter, "_make", None)
    monkeypatch.setattr(ShardEncoder, "make", None)
    assert run(copy.spec, ("shard", "encode"))[0] == {step for step in STEPS if step[0] in ("shard", "encode")}
    assert content(copy.store) == before


def test_a_run_tells_a_raw_file_that_is_gone_as_the_plan_does(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    next(iter(sorted((copy.store / "corpora").rglob("*.tar")))).unlink()
    with pytest.raises(StoreError, match=r"corpus 'planted': 1 file gone or of another size, e\.g\. corpora/planted/"):
        Runner(load(copy.spec), Console(quiet=True)).run()
