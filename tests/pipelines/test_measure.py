"""Clocks that are measured: once a recording and job, by a worker, whatever shards its windows are in; never by planning."""

import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import Corpus
from featurestore.errors import DecodeError
from featurestore.storage import Storage
from featurestore.verify import verify
from pipelines import runner, shard
from pipelines.ingest import Ingest, Known, scan
from pipelines.measure import measuring
from pipelines.sources import open_source
from pipelines.sources.streams import Streams
from pipelines.synchronize import audio, container, recording, video
from pipelines.synchronize.clock_store import ClockStore
from pipelines.synchronize.clocks import Clock, Estimate, Weak
from tests.pipelines.test_graph import coders
from tests.pipelines.test_streams import quarantined, settings
from tests.recordings import beeps, frame_times, write_sound
from tests.recordings import video as write_video

SECONDS, WINDOWS, RECORDINGS = 16, 64, ("a", "b", "c")
FIELDS = """
    frame: {modality: image, from: video, tolerance: 50ms}
    sound: {modality: audio, from: sound, clock: {estimate: from frame}}
"""
DECODERS: list[tuple[Any, str]] = [
    (recording, "estimate"), (video, "brightness"), (audio, "loudness"), (video, "Frames"), (audio, "Clips"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings of 16 s, whose windows are in four shards each."""
    folder = tmp_path_factory.mktemp("recordings")
    write_video(folder / "v.mp4", frame_times(SECONDS))
    write_sound(folder / "s.wav", beeps(SECONDS, offset_s=0.1))
    for name in RECORDINGS:
        shutil.copy(folder / "v.mp4", folder / f"{name}.mp4")
        shutil.copy(folder / "s.wav", folder / f"{name}.wav")
    rows = [f'{{"id": "{name}", "video": "{name}.mp4", "sound": "{name}.wav"}}' for name in RECORDINGS]
    (folder / "recordings.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of its own, with the same times of change."""
    return Path(shutil.copytree(made, tmp_path / "recordings"))


def corpus_of(folder: Path) -> dict[str, Any]:
    corpus = settings(folder, FIELDS, "{every: 250ms}")
    return corpus | {"columns": corpus["columns"] | {"event_timestamp": None}, "shard_rows": 20}


def sharded(folder: Path, store: Path, workers: int = 1) -> Corpus:
    """The shard stage into a store, new or not."""
    corpus, catalog = corpus_of(folder), Catalog(Storage.of(store))
    catalog.create()
    snapshot = catalog.snapshot()
    ingest = scan(open_source(corpus), Known(snapshot, "talks"))
    job = runner.Job(workers=workers)
    shard.build(job, catalog.storage, corpus, ingest, snapshot.version)
    job.run()
    return Corpus(catalog.snapshot(), "talks")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often something is decoded, or measured."""
    counted: Counter[str] = Counter()
    for module, name in DECODERS:
        monkeypatch.setattr(module, name, _counting(getattr(module, name), name, counted))
    return counted


def _counting(real: Callable[..., Any], name: str, counted: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        counted[name] += 1
        return real(*args)

    return call


def offsets(corpus: Corpus) -> set[int | None]:
    return set(corpus.to_arrow()["sound_offset_ns"].to_pylist())


def test_a_clock_is_measured_once_a_recording_and_job(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    corpus = sharded(folder, tmp_path / "store")
    assert len(corpus.shards) >= 10, "more shards than recordings"
    assert {name: calls[name] for name in ("estimate", "brightness", "loudness")} == {
        "estimate": 3, "brightness": 3, "loudness": 3,
    }  # fmt: skip
    (offset,) = offsets(corpus)
    assert offset is not None
    assert abs(offset - 100e6) < 17e6
    assert len(corpus.storage.list("corpora/talks/clocks")) == 3
    assert verify(corpus.storage, level="rows").ok


def built(folder: Path, store: Path) -> runner.Job:
    """The shard job, not run."""
    job, storage = runner.Job(), Storage.of(store)
    shard.build(job, storage, corpus_of(folder), Ingest("0" * 12, 3 * WINDOWS, 1, 0, 0, 0), -1)
    return job


def test_no_shard_is_begun_before_all_is_measured(folder: Path, tmp_path: Path) -> None:
    """What groups the tasks of shards takes also what comes of measuring, and nothing comes of that."""
    parts = built(folder, tmp_path / "store").pipeline.to_runner_api().components
    leaves = [step for step in parts.transforms.values() if not step.subtransforms]
    made_by = {made: step for step in leaves for made in step.outputs.values()}

    (spread,) = (step for step in leaves if step.unique_name == "Shard/Spread")
    before, waiting = set(), [*spread.inputs.values()]
    while waiting:
        step = made_by[waiting.pop()]
        if step.unique_name not in before:
            before.add(step.unique_name)
            waiting += step.inputs.values()
    assert {"Shard/MeasureOnce/Measure", "Shard/PlanShards"} <= before


def test_what_is_measured_is_a_descriptor_and_never_pickled(folder: Path, tmp_path: Path) -> None:
    entering = coders(built(folder, tmp_path / "store"))
    assert entering["Shard/MeasureOnce/Group"] == "kv(varint,bytes)"
    assert entering["Shard/Spread"] == "kv(varint,row)"


def test_a_corpus_of_which_nothing_is_measured_has_no_such_step(folder: Path) -> None:
    given = settings(folder, FIELDS.replace("estimate: from frame", "offset: 1ms"), "{every: 250ms}")
    assert measuring(given) is None
    assert measuring(corpus_of(folder)) is not None


def test_planning_decodes_nothing(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    empty = Snapshot(Storage.of(tmp_path / "store"), [], -1)
    found = scan(open_source(corpus_of(folder)), Known(empty, "talks"))
    assert found.samples == 3 * WINDOWS
    assert calls == {}


def test_the_store_is_the_same_whatever_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    one, two = (sharded(folder, tmp_path / str(workers), workers) for workers in (1, 2))
    assert sorted(Catalog(one.storage).snapshot().all()) == sorted(Catalog(two.storage).snapshot().all())
    assert one.storage.list("corpora") == two.storage.list("corpora")


def test_a_job_that_goes_on_measures_nothing_again(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    first = sharded(folder, tmp_path / "first")
    (tmp_path / "second" / "corpora").mkdir(parents=True)
    shutil.copytree(tmp_path / "first" / "corpora" / "talks" / "clocks", tmp_path / "second/corpora/talks/clocks")
    measured = calls["estimate"]
    second = sharded(folder, tmp_path / "second")
    assert calls["estimate"] == measured
    assert sorted(Catalog(first.storage).snapshot().all()) == sorted(Catalog(second.storage).snapshot().all())


def test_every_shard_takes_the_clock_that_is_kept(folder: Path, tmp_path: Path, calls: Counter[str]) -> None:
    storage = Storage.of(tmp_path / "store")
    source = open_source({**corpus_of(folder), "name": "talks"})
    assert isinstance(source, Streams)
    kept = Estimate(Clock(123_000, 1.5), 7, 0.25, 9.5)
    for each in source.to_measure(source.references()):
        ClockStore(storage, "talks").put(source._clock_key(each), {"sound": kept})
    corpus = sharded(folder, tmp_path / "store")
    assert offsets(corpus) == {123_000}
    assert set(corpus.to_arrow()["sound_drift_ppm"].to_pylist()) == {1.5}
    assert calls["estimate"] == 0


def test_a_stream_that_breaks_is_decoded_once_for_its_clock_and_quarantined_in_every_window(
    folder: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    (folder / "b.wav").write_bytes(b"no sound" * 999)
    corpus = sharded(folder, tmp_path / "store")
    assert (calls["loudness"], calls["estimate"]) == (3, 2)
    rejected = quarantined(corpus.storage)
    assert {(sample_id.partition("/")[0], field) for sample_id, field in rejected} == {("b", "sound")}
    assert len(rejected) == WINDOWS
    assert all(each.startswith("decode_error: b.wav: ") for each in rejected.values())


def test_a_file_that_is_not_there_now_is_tried_again_by_who_reads_it(folder: Path, tmp_path: Path) -> None:
    (folder / "b.wav").unlink()
    corpus = sharded(folder, tmp_path / "store")
    assert len(corpus.storage.list("corpora/talks/clocks")) == 2
    assert all(each.startswith("unreadable: b.wav: ") for each in quarantined(corpus.storage).values())


def test_recordings_are_opened_ahead_each_file_once_and_their_windows_come_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f'{{"id": "r{n:02d}", "video": "a.mp4", "sound": "a.wav"}}' for n in range(24)]
    (folder / "recordings.jsonl").write_text("\n".join(rows) + "\n")
    real, lock, now, most, opened = container.header, threading.Lock(), 0, 0, 0

    def slow(*args: Any) -> Any:
        nonlocal now, most, opened
        with lock:
            now, opened = now + 1, opened + 1
            most = max(most, now)
        # The first takes longest.
        time.sleep(0.2 if opened < 3 else 0.01)
        with lock:
            now -= 1
        return real(*args)

    monkeypatch.setattr(container, "header", slow)
    ids = [reference.id for reference in open_source(corpus_of(folder)).references()]
    assert ids == [f"r{n:02d}/{number:07d}" for n in range(24) for number in range(WINDOWS)]
    assert opened == 2 * 24
    assert most >= 8


FOUND: dict[str, Estimate | DecodeError | Weak] = {
    "sound": Estimate(Clock(-1_000, 0.1 + 0.2), 3, math.inf, 12.3, 995_000_000),
    "motion": Estimate(Clock(1 << 61, -40.0), 0, 1e-9, 8.0),
    "noise": Weak("certainty 3.2; at least 8 is needed"),
    "broken": DecodeError("decode_error", "b.wav: damaged"),
}


def test_what_was_measured_is_kept_to_the_last_digit(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path / "store")
    ClockStore(storage, "talks").put("0123", FOUND)
    found = ClockStore(storage, "talks").get("0123")
    assert found is not None
    assert {name: (type(each), str(each)) for name, each in found.items()} == {
        name: (type(each), str(each)) for name, each in FOUND.items()
    }
    for key in ("012", "01234", "0124"):
        assert ClockStore(storage, "talks").get(key) is None
    assert ClockStore(storage, "other").get("0123") is None


def test_of_several_files_all_take_the_first_that_is_whole(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path / "store")
    for offset in range(4):
        ClockStore(storage, "talks").put("0123", {"sound": Estimate(Clock(offset), 0, 0.0, 9.0)})
    first, second, *_ = sorted((tmp_path / "store/corpora/talks/clocks").iterdir())
    expected = ClockStore(storage, "talks").get("0123")
    assert expected == ClockStore(storage, "talks").get("0123")
    content = second.read_text()
    first.write_text("cut")
    assert f'"offset_ns": {ClockStore(storage, "talks").get("0123")["sound"].clock.offset_ns}' in content  # type: ignore[index, union-attr]


def test_what_may_be_mended_is_not_kept(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path / "store")
    ClockStore(storage, "talks").put("0123", FOUND | {"gone": DecodeError("unreadable", "b.wav: 503")})
    assert storage.list() == {}
