"""A corpus whose source changes: what is new, changed and gone, what is made again for it, and what readers hand out."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from rich.console import Console

from featurestore.corpora import ROWS, read_rows
from featurestore.errors import AlignmentError, DecodeError, InputError, NotFound
from featurestore.ids import IDS, Ids
from featurestore.tombstones import TOMBSTONES
from featurestore.verify import verify
from featurestore.views import VIEW
from jobs import plan
from jobs.compact import compact
from jobs.run import Runner
from jobs.spec import load
from pipelines import ingest, shard
from pipelines.ingest import same, scan
from pipelines.runner import Job
from pipelines.sources.files import FileValue
from tests.conftest import Made, check_same


def manifest(made: Made) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.corpus / "manifest.jsonl").read_text().splitlines()]


def write(made: Made, rows: list[dict[str, Any]]) -> None:
    (made.corpus / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(made: Made, *stages: str, workers: int = 1) -> list[tuple[str, str, int | None]]:
    done = Runner(load(made.spec), Console(quiet=True), workers=workers).run(stages or plan.STAGES)
    return [(step.stage, step.name, step.values) for step in done]


def shard_step(made: Made) -> plan.Step:
    return plan.steps(load(made.spec), made.open().snapshot)[0]


TOLD = "1 touched: `braid run` compares them once"
GONE, CHANGED, TOUCHED = 4, 9, 12
"""Lines of the manifest: taken out; another caption; a sound's file touched."""


@pytest.fixture(scope="module")
def changed(small: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The small store after its source changed: 1 gone, 1 changed, 1 only touched, 2 new. Read only."""
    copy = small.copy_to(tmp_path_factory.mktemp("changed"))
    change(copy)
    run(copy)
    return copy


def change(copy: Made) -> None:
    rows = manifest(copy)
    sounds = [row for row in rows if row["sound_path"]]
    rows[CHANGED]["caption"] = "Something else."
    os.utime(copy.corpus / rows[TOUCHED]["sound_path"], (1, 1))
    more = [{"id": f"more/{n}", "group": f"m{n}", "label": "ring", "caption": f"New {n}."} for n in range(2)]
    more[0]["sound_path"] = sounds[0]["sound_path"]
    write(copy, [*rows[:GONE], *rows[GONE + 1 :], *more])


def ids_of(small: Made) -> tuple[str, str]:
    rows = manifest(small)
    return rows[GONE]["id"], rows[CHANGED]["id"]


def test_the_plan_says_what_is_new_changed_and_gone_and_what_follows(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    change(copy)
    steps = plan.steps(load(copy.spec), copy.open().snapshot)
    assert (steps[0].state, steps[0].todo, steps[0].why) == (
        plan.STALE,
        3,
        f"samples: 2 new, 1 changed, 1 gone; {TOLD}",
    )
    assert {step.state for step in steps} == {plan.STALE}
    assert shard_step(small).why == "48 samples stored"


def test_old_shards_are_left_alone_and_only_new_ones_are_encoded(small: Made, changed: Made) -> None:
    before, after = small.open().snapshot, changed.open().snapshot
    for kind in (ROWS, VIEW):
        assert set(before.entries(kind)) < set(after.entries(kind)), kind
    # Of the id index only the etag of what was touched is another.
    was, now = Ids(before, "planted"), Ids(after, "planted")
    there = now.find(was.hash)
    assert (was.rows == now.rows[there]).all()
    assert (was.etag != now.etag[there]).sum() == 1
    assert [entry.rows for entry in after.entries(TOMBSTONES, "planted")] == [2]
    assert [*verify(changed.open().storage).findings] == []
    assert shard_step(changed).why == "49 samples stored"
    assert run(changed) == []


def test_readers_hand_out_what_is_there_now(small: Made, changed: Made) -> None:
    gone, other = ids_of(small)
    store = changed.open()
    corpus = store.corpus("planted")
    table = corpus.to_arrow()
    names = table["id"].to_pylist()
    assert corpus.rows == len(table) == 49 == len(set(names))
    assert gone not in names
    assert pc.sum(pc.equal(table["id"], other)).as_py() == 1
    assert corpus.value(*corpus.locate(other), "caption") == b"Something else."
    for view in map(store.view, store.views()):
        assert view.rows == 49
        assert view.to_arrow()["id"].to_pylist() == names
        assert sum(len(batch) for batch in view.scanner()) == 49
        matrix, present = view.matrix()
        assert len(matrix) == len(present) == 49
        assert view.take(range(49))["id"].to_pylist() == names
        assert view.take([other, names[0]])["id"].to_pylist() == [other, names[0]]
        with pytest.raises(
            NotFound, match=f"no sample '{gone}' in version .* any more: it was taken out of the source"
        ):
            view.take([gone])
        with pytest.raises(NotFound, match="rows 0 to 48"):
            view.take([49])
    rows = store.index("heard")._table
    assert gone not in rows["id"].to_pylist()
    train = store.training_set("heard")
    assert gone not in [sample for split in train.splits for sample in train.to_arrow(split)["id"].to_pylist()]


def test_what_was_only_touched_is_compared_by_one_run_and_by_none_after_it(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = small.copy_to(tmp_path / "one"), small.copy_to(tmp_path / "two")
    compared: list[str] = []

    def counted(*given: Any, **more: Any) -> bool:
        compared.append(given[2].id)
        return same(*given, **more)

    monkeypatch.setattr(ingest, "same", counted)
    for made in (one, two):
        sounds = {row["id"]: row["sound_path"] for row in manifest(made) if row["sound_path"]}
        for path in sounds.values():
            os.utime(made.corpus / path, (1, 1))
    touched = sorted(sounds)
    told = f"48 samples stored; {len(touched)} touched: `braid run` compares them once"
    assert (shard_step(one).state, shard_step(one).why) == (plan.FRESH, told)
    compared.clear()
    assert [stage for stage, *_ in run(one)] == ["shard"]
    assert sorted(compared) == touched
    compared.clear()
    assert run(one) == []
    assert shard_step(one).why == "48 samples stored"
    assert compared == []
    before, after = small.open().snapshot, one.open().snapshot
    assert after.version == before.version + 1
    assert {entry.kind for entry in set(before.all()) ^ set(after.all())} == {IDS}
    assert verify(one.open().storage).ok
    run(two, workers=2)
    check_same(one.open(), two.open())
    # Neither an ingest nor a compaction goes back to what the rows have.
    write(one, manifest(one)[:-1])
    compared.clear()
    run(one, "shard")
    compact(load(one.spec), Console(quiet=True))
    assert not one.open().corpus("planted").gone
    assert shard_step(one).why == "47 samples stored"
    assert compared == []
    assert not [each for each in verify(one.open().storage).findings if each.kind in (IDS, ROWS)]


def test_what_could_not_be_read_when_it_was_compared_is_compared_again(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = small.copy_to(tmp_path)
    one, other = [copy.corpus / row["sound_path"] for row in manifest(copy) if row["sound_path"]][:2]
    one.write_bytes(other.read_bytes())
    plain = FileValue.fetch

    def away(value: FileValue) -> bytes:
        raise DecodeError("unreadable", value.source)

    with monkeypatch.context() as patch:
        patch.setattr(FileValue, "fetch", away)
        assert shard_step(copy).why == "48 samples stored"
        assert run(copy) == []
        # Nor is it in the way of what is new; what else was touched is noted.
        touched = next(row["sound_path"] for row in reversed(manifest(copy)) if row["sound_path"])
        os.utime(copy.corpus / touched, (1, 1))
        write(copy, [*manifest(copy), {"id": "more", "group": "more", "label": "ring", "caption": "One more."}])
        patch.setattr(FileValue, "fetch", lambda value: away(value) if value.uri.endswith(one.name) else plain(value))
        assert shard_step(copy).why == f"samples: 1 new; {TOLD}"
        run(copy, "shard")
        assert copy.open().corpus("planted").rows == 49
        assert shard_step(copy).why == "49 samples stored"
    assert shard_step(copy).why == "samples: 1 changed"
    run(copy, "shard")
    assert shard_step(copy).why == "49 samples stored"


def test_rows_that_are_compared_with_are_not_held(small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = small.copy_to(tmp_path)
    for path in (copy.corpus / "sounds").iterdir():
        os.utime(path, (1, 1))
    held: list[weakref.ref[Any]] = []
    most = 0

    def watched(*given: Any) -> Any:
        nonlocal most
        most = max(most, 1 + sum(each() is not None for each in held))
        held.append(weakref.ref(rows := read_rows(*given)))
        return rows

    monkeypatch.setattr(ingest, "read_rows", watched)
    known = ingest.Known(copy.open().snapshot, "planted")
    assert plan.ingest(load(copy.spec), copy.open().snapshot, known).touched > 8
    assert len(held) == 6
    assert most <= 2


def test_another_job_that_renewed_the_same_index_meanwhile_is_not_undone(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    sounds = sorted((copy.corpus / "sounds").iterdir())
    os.utime(sounds[0], (1, 1))
    spec, snapshot = load(copy.spec), copy.open().snapshot
    known = ingest.Known(snapshot, "planted")
    found = plan.ingest(spec, snapshot, known)
    os.utime(sounds[1], (1, 1))
    run(copy, "shard")
    job = Job()
    renewed = shard.renew(spec.store, "planted", known)
    shard.build(job, spec.store, plan.corpus_dict(spec), found, snapshot.version, renewed)
    with pytest.raises(AlignmentError, match=r"or made it again, since .* nothing was published; run it again"):
        job.run()
    assert shard_step(copy).why == "48 samples stored"


def test_an_earlier_version_still_has_what_is_gone(small: Made, changed: Made) -> None:
    gone, other = ids_of(small)
    version = len(small.open().history()) - 1
    old = changed.open(version)
    assert old.corpus("planted").rows == 48
    assert old.view("loud").take([gone, other])["id"].to_pylist() == [gone, other]
    check_same(old, small.open())


def test_an_index_older_than_the_tombstones_passes_over_what_is_gone(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    rows = manifest(copy)
    gone = next(row["id"] for row in rows if row["sound_path"])
    vector = np.ones(8)
    assert gone in [hit.id for hit in small.open().search("heard", vector=vector, k=99)]
    write(copy, [row for row in rows if row["id"] != gone])
    run(copy, "shard")
    found = copy.open().search("heard", vector=vector, k=99)
    assert [hit.id for hit in found] == [
        hit.id for hit in small.open().search("heard", vector=vector, k=99) if hit.id != gone
    ]


@pytest.mark.parametrize("what", ["file", "column"])
def test_a_changed_file_or_column_is_a_changed_sample(small: Made, tmp_path: Path, what: str) -> None:
    copy = small.copy_to(tmp_path)
    rows = manifest(copy)
    with_sound = [row for row in rows if row["sound_path"]]
    if what == "file":
        other = (copy.corpus / with_sound[1]["sound_path"]).read_bytes()
        (copy.corpus / with_sound[0]["sound_path"]).write_bytes(other)
    else:
        with_sound[0]["label"] = "another"
        write(copy, rows)
    assert shard_step(copy).why == "samples: 1 changed"
    run(copy, "shard", "encode")
    store, changed = copy.open(), with_sound[0]["id"]
    (embedding,) = store.view("loud").take([changed])["embedding"].to_pylist()
    expected = small.open().view("loud").take([with_sound[1 if what == "file" else 0]["id"]])["embedding"].to_pylist()
    assert embedding == pytest.approx(expected[0], abs=1e-4)
    table = store.corpus("planted").to_arrow()
    label = table.filter(pc.equal(table["id"], changed))["label"].to_pylist()
    assert label == [with_sound[0]["label"]]


def test_two_workers_write_the_same_bytes(small: Made, changed: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    change(copy)
    run(copy, workers=2)
    check_same(copy.open(), changed.open())


def test_a_sample_that_comes_back_is_there_again(small: Made, changed: Made, tmp_path: Path) -> None:
    copy = changed.copy_to(tmp_path)
    gone, other = ids_of(small)
    write(copy, manifest(small))
    assert shard_step(copy).why == "samples: 1 new, 1 changed, 2 gone"
    run(copy)
    assert copy.open().view("loud").take([gone, other])["id"].to_pylist() == [gone, other]
    assert copy.open().corpus("planted").rows == 48
    assert sorted(copy.open().corpus("planted").to_arrow()["id"].to_pylist()) == sorted(
        r["id"] for r in manifest(small)
    )
    # Once more out and in: the same ids and etags as before are not the same ingest.
    rows = manifest(copy)
    write(copy, [row for row in rows if row["id"] != gone])
    run(copy, "shard")
    write(copy, rows)
    run(copy, "shard")
    assert copy.open().corpus("planted").rows == 48
    assert verify(copy.open().storage, level="rows").ok or run(copy)
    assert verify(copy.open().storage).ok


def test_nothing_but_gone_samples_is_an_ingest_too(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    write(copy, manifest(copy)[:-1])
    assert (shard_step(copy).state, shard_step(copy).todo, shard_step(copy).why) == (plan.STALE, 0, "samples: 1 gone")
    encodes = [step.state for step in plan.steps(load(copy.spec), copy.open().snapshot) if step.stage == "encode"]
    assert encodes == [plan.FRESH] * 3
    assert [stage for stage, *_ in run(copy)] == ["shard", "align", "align", "index", "index", "fuse", "fuse"]
    assert verify(copy.open().storage).ok


def test_a_source_that_changes_between_plan_and_tombstones_is_an_error(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = small.copy_to(tmp_path)
    rows = manifest(copy)
    write(copy, rows[:-1])
    scanned = scan

    def late(source: Any, known: Any) -> Any:
        found = scanned(source, known)
        write(copy, rows[:-2])
        return found

    monkeypatch.setattr(plan, "scan", late)
    with pytest.raises(InputError, match=r"2 samples are gone or changed where planning saw 1: .* run it again"):
        run(copy, "shard")
    assert copy.open().corpus("planted").rows == 48


def test_a_broken_id_index_or_tombstone_is_found(changed: Made, tmp_path: Path) -> None:
    copy = changed.copy_to(tmp_path)
    store = copy.open()
    for kind in (IDS, TOMBSTONES):
        entry = store.snapshot.entries(kind, "planted")[0]
        path = copy.store / entry.path
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + b"x" + whole[-8:])
        assert any(finding.kind == kind for finding in verify(store.storage).findings), kind
        path.unlink()
        assert [f.kind for f in verify(store.storage, level="footers").findings if f.kind == kind] == [kind]
        path.write_bytes(whole)
    assert verify(store.storage).ok
