"""The encode stage on a small corpus of sounds: what a shard of a view holds, and what a bad value does to its batch."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore import artefact, encoders, views
from featurestore.catalog import Catalog
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.encoders import runtime
from featurestore.encoders.contract import examples
from featurestore.errors import AlignmentError, BudgetExceeded, DecodeError
from featurestore.identity import input_digest, row_digest
from featurestore.storage import Storage
from featurestore.verify import verify
from featurestore.views import VIEW, View
from pipelines import encode, encode_plan
from pipelines.runner import Job
from tests.faults.stores import Broken, corpus_settings, encode_view, flip, shard_corpus

OPTIONS = {"n_mels": 8, "batch_size": 3}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    folder = tmp_path_factory.mktemp("encode")
    storage = Storage.of(folder / "store")
    shard_corpus(storage, corpus_settings(folder / "corpus", n=32))
    return storage


class Bench:
    """A copy of the store, with a worker for one view of it."""

    def __init__(self, sharded: Storage, folder: Path, threads: int = 2) -> None:
        self.broken = Broken(sharded, folder)
        self.storage = self.broken.storage
        self.plan = encode_plan.view_plan("sound", "planted", "sound", "log-mel", OPTIONS, "audio")
        self.threads = threads

    def tasks(self) -> list[encode_plan.EncodeTask]:
        listing = encode_plan.listed(self.storage, self.plan)
        return encode_plan.stale(Catalog(self.storage).snapshot(), self.plan, listing)

    def worker(self) -> encode.ShardEncoder:
        return encode.ShardEncoder(self.storage, self.plan, self.threads, Catalog(self.storage).snapshot().version)

    def path(self, key: str) -> Path:
        return Path(self.storage.root) / key

    def written(self, worker: encode.ShardEncoder | None = None) -> dict[str, str]:
        """Encodes what is stale; path -> sha256 of the files that the results name."""
        worker = worker or self.worker()
        entries = [entry for task in self.tasks() for entry in json.loads(worker.encode(task).entries)]
        return {entry[4]: entry[7] for entry in entries}

    def rows(self, task: encode_plan.EncodeTask, worker: encode.ShardEncoder) -> list[dict[str, Any]]:
        """The rows of one shard as a worker writes it."""
        entry = next(each for each in json.loads(worker.encode(task).entries) if each[0] == VIEW)
        return artefact.read_table(self.storage.read(entry[4])).to_pylist()


@pytest.fixture
def bench(sharded: Storage, tmp_path: Path) -> Bench:
    return Bench(sharded, tmp_path / "store")


def test_a_shard_holds_the_vector_of_each_sample_encoded_alone(bench: Bench) -> None:
    encoder = encoders.find("log-mel", OPTIONS)
    corpus = Corpus(Catalog(bench.storage).snapshot(), "planted")
    worker = bench.worker()
    for task in bench.tasks():
        rows = bench.rows(task, worker)
        assert len(rows) == task.rows
        for number, (sample_id, row) in enumerate(zip(corpus.ids(task.shard), rows, strict=True)):
            raw = corpus.value(task.shard, number, "sound")
            vector = np.array(row["embedding"], np.float32)
            if row["present"]:
                assert np.array_equal(vector, encoder.encode([encoder.decode(raw)])[0])
                assert row["input_digest"] == input_digest(raw)
            else:
                assert np.isnan(vector).all()
            assert row["row_digest"] == row_digest(sample_id, row["input_digest"], vector.tobytes())


def test_a_bad_value_goes_to_quarantine_and_its_batch_goes_on(bench: Bench) -> None:
    encode_view(bench.storage, "sound", "log-mel", OPTIONS)
    snapshot = Catalog(bench.storage).snapshot()
    (entry,) = snapshot.entries(QUARANTINE, "encode/sound")
    (row,) = artefact.read_table(bench.storage.read(entry.path)).to_pylist()
    assert (row["field"], row["stage"], row["reason"]) == ("sound", "encode", "decode_error")
    assert row["source"].startswith("sounds/")
    view = View(snapshot, "sound")
    (kept,) = view.take([row["id"]]).to_pylist()
    assert (kept["present"], kept["embedding"], kept["miss_reason"]) == (False, None, "decode_error")
    assert kept["input_digest"] is not None
    reasons = view.to_arrow(["miss_reason"])["miss_reason"].to_pylist()
    assert {reason for reason in reasons if reason} == {"decode_error", "empty", "absent"}
    assert verify(bench.storage).ok


@pytest.mark.parametrize("threads", [1, 5])
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    bench: Bench, sharded: Storage, tmp_path: Path, threads: int
) -> None:
    assert Bench(sharded, tmp_path / "other", threads).written() == bench.written()


def test_batches_hold_like_sizes_and_only_depend_on_the_values(bench: Bench) -> None:
    worker = bench.worker()
    sizes = [5, 900, 5, 40, 7, 900, 1]
    todo = [
        encode.Row(row, f"id{row}", (encode.Value("sound", 0, size, b"", "wav", None),))
        for row, size in enumerate(sizes)
    ]
    batches = worker._batches(todo)
    assert [[value.row for value in batch] for batch in batches] == [[6, 0, 2], [4, 3, 1], [5]]
    assert worker._batches(todo[::-1]) == batches
    assert worker._batches([]) == []


def test_a_finished_shard_is_adopted_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.written()
    monkeypatch.setattr(encode.ShardEncoder, "make", lambda *_: pytest.fail("encoded again"))
    assert bench.written() == first


@pytest.mark.parametrize("fault", ["empty", "short", "flipped vector", "flipped footer", "long"])
def test_a_damaged_orphan_is_not_adopted(bench: Bench, fault: str) -> None:
    first = bench.written()
    path = bench.path(next(key for key in first if key.startswith("views/")))
    content = path.read_bytes()
    changed = {
        "empty": b"",
        "short": content[: len(content) // 2],
        "flipped vector": flip(content, 200),
        "flipped footer": flip(content, len(content) - 40),
        "long": content + b"x",
    }[fault]
    path.write_bytes(changed)
    assert bench.written() == first
    assert path.read_bytes() == content


def test_an_orphan_of_other_rows_is_not_adopted(bench: Bench) -> None:
    tasks = bench.tasks()
    worker = bench.worker()
    worker.encode(tasks[0])
    made = bench.worker().adopt(tasks[0])
    assert made is not None
    for change in ({"sha256": "0" * 64}, {"ids_sha256": "0" * 64}, {"rows": tasks[0].rows + 1}):
        assert bench.worker().adopt(tasks[0]._replace(**change)) is None


def test_a_shard_is_stale_without_a_row_or_its_file_or_where_its_input_is_another(bench: Bench) -> None:
    everything = [task.shard for task in bench.tasks()]
    assert len(everything) == 5
    encode_view(bench.storage, "sound", "log-mel", OPTIONS)
    assert bench.tasks() == []
    gone, cut = (bench.path(bench.broken.entry(VIEW, "sound", position).path) for position in (1, 3))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    assert [task.shard for task in bench.tasks()] == [everything[1], everything[3]]
    rows = bench.broken.entry(ROWS, "planted", 0)
    bench.broken.commit(rows, rows._replace(sha256="0" * 64))
    assert [task.shard for task in bench.tasks()] == [everything[0], everything[1], everything[3]]
    other = encode_plan.view_plan("sound", "planted", "sound", "log-mel", OPTIONS | {"n_mels": 9}, "audio")
    assert len(encode_plan.stale(bench.broken.snapshot(), other, bench.storage.list("views"))) == 5


def test_the_largest_shard_is_the_first_to_do(bench: Bench) -> None:
    before = [task.shard for task in bench.tasks()]
    large = bench.broken.entry(MEDIA, "planted", 3)
    bench.broken.commit(large, large._replace(bytes=10**9))
    assert [task.shard for task in bench.tasks()] == [before[3], *before[:3], before[4]]


def encoding(worker: encode.ShardEncoder, monkeypatch: pytest.MonkeyPatch, change: Any) -> list[int]:
    """Puts `change` over what the encoder gives; returns the sizes of the batches that it was asked for."""
    asked: list[int] = []
    plain = worker.encoder.encode

    def changed(values: Sequence[Any]) -> np.ndarray:
        asked.append(len(values))
        return change(plain(values), values)

    monkeypatch.setattr(worker.encoder, "encode", changed)
    return asked


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_goes_to_quarantine_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    worker = bench.worker()

    def spoil(vectors: np.ndarray, _: Any) -> np.ndarray:
        vectors[-1, 2] = bad
        return vectors

    asked = encoding(worker, monkeypatch, spoil)
    task = bench.tasks()[-1]
    rows = bench.rows(task, worker)
    spoiled = [row for row in rows if row["miss_reason"] == "nan_output"]
    assert len(spoiled) == len(asked)
    assert all(np.isnan(row["embedding"]).all() and not row["present"] for row in spoiled)
    assert any(row["present"] for row in rows)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_vector_of_zeros_goes_to_quarantine_where_the_encoder_says_length_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, normalised: bool
) -> None:
    worker = bench.worker()

    def spoil(vectors: np.ndarray, _: Any) -> np.ndarray:
        vectors[-1] = 0
        return vectors

    asked = encoding(worker, monkeypatch, spoil)
    monkeypatch.setattr(worker.encoder, "normalised", normalised)
    rows = bench.rows(bench.tasks()[-1], worker)
    spoiled = [row for row in rows if row["miss_reason"] == "zero_output"]
    assert len(spoiled) == len(asked) * normalised
    assert all(np.isnan(row["embedding"]).all() and not row["present"] for row in spoiled)
    assert sum(not np.any(row["embedding"]) for row in rows) == len(asked) * (not normalised)


def test_a_value_that_the_encoder_refuses_keeps_its_reason_and_costs_few_calls(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bench.worker()
    values = [worker.encoder.decode(raw) for raw in examples("audio")]
    right = worker.encoder.encode(values)

    def refuse(vectors: np.ndarray, given: Sequence[Any]) -> np.ndarray:
        if any(value is values[2] for value in given):
            raise DecodeError("refused", "not this one")
        return vectors

    asked = encoding(worker, monkeypatch, refuse)
    made = worker._forward(values)
    assert str(made[2]) == "refused: not this one"
    for place in {*range(len(values))} - {2}:
        np.testing.assert_allclose(made[place], right[place], atol=1e-4)
    assert asked == [7, 3, 1, 2, 1, 1, 4]


@pytest.mark.parametrize("error", [RuntimeError("out of memory, or anything"), IndexError("index out of range")])
def test_a_value_that_the_model_fails_on_fails_alone(
    error: Exception, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bench.worker()
    task = bench.tasks()[-1]
    right = bench.rows(task, bench.worker())
    for path in bench.storage.list(encode_plan.folder(bench.plan)):
        bench.path(path).unlink()
    loudest = []

    def fail(vectors: np.ndarray, values: Sequence[Any]) -> np.ndarray:
        if any(vector.max() >= max(loudest) for vector in vectors):
            raise error
        return vectors

    loudest += [max(row["embedding"]) for row in right if row["present"]]
    encoding(worker, monkeypatch, fail)
    rows = bench.rows(task, worker)
    failed = [number for number, row in enumerate(rows) if row["miss_reason"] == "encoder_error"]
    assert len(failed) == 1
    same = [number for number in range(len(rows)) if rows[number]["row_digest"] == right[number]["row_digest"]]
    assert len(same) == len(rows) - 1


def test_an_encoder_that_gives_another_shape_stops_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bench.worker()
    encoding(worker, monkeypatch, lambda vectors, _: vectors[:-1])
    with pytest.raises(AlignmentError, match=r"encoder log-mel gave \(\d+, 16\) for \d+ values; 16 values each"):
        worker.encode(bench.tasks()[-1])


def test_a_value_that_is_not_the_one_that_was_stored_is_not_encoded(bench: Bench) -> None:
    task = bench.tasks()[-1]
    tar = bench.path(task.tar_path)
    content = tar.read_bytes()
    member = Corpus(Catalog(bench.storage).snapshot(), "planted").read(task.shard)["sound"].drop_null().to_pylist()[0]
    for at in (member["offset"] + 100, member["offset"] - 512):
        tar.write_bytes(flip(content, at))
        with pytest.raises(AlignmentError, match=r"the sound of '.*' \(row \d+ of its shard\) is not the value"):
            bench.worker().encode(task)


def test_rows_that_are_not_those_of_the_task_are_not_encoded(bench: Bench) -> None:
    task = bench.tasks()[0]
    for change in ({"sha256": "0" * 64}, {"ids_sha256": "0" * 64}, {"rows": task.rows + 1}):
        with pytest.raises(AlignmentError, match=r"sha256|ids are not|rows where"):
            bench.worker().encode(task._replace(**change))


def test_a_worker_with_another_encoder_than_the_plan_refuses(bench: Bench) -> None:
    wrong = bench.plan._replace(recipe=views.recipe("sound", "0" * 64))
    with pytest.raises(AlignmentError, match="has another fingerprint on this worker"):
        encode.ShardEncoder(bench.storage, wrong, threads=1, version=0)


def test_the_job_encodes_what_is_stale_in_one_commit(bench: Bench, sharded: Storage, tmp_path: Path) -> None:
    before = Catalog(bench.storage).snapshot().version
    job = Job()
    encode.build(job, bench.storage, bench.plan, bench.tasks(), 0.2, before)
    job.run()
    snapshot = Catalog(bench.storage).snapshot()
    assert snapshot.version == before + 1
    other = Bench(sharded, tmp_path / "other")
    encode_view(other.storage, "sound", "log-mel", OPTIONS)
    assert Catalog(other.storage).snapshot().digest() == snapshot.digest()
    assert {each.input_sha256 for each in snapshot.entries(VIEW, "sound")} == {
        each.sha256 for each in snapshot.entries(ROWS, "planted")
    }
    assert len(snapshot.entries(MEDIA, "planted")) == len(snapshot.entries(VIEW, "sound"))


def test_a_view_past_the_budget_publishes_nothing(bench: Bench) -> None:
    job, version = Job(), Catalog(bench.storage).snapshot().version
    encode.build(job, bench.storage, bench.plan, bench.tasks(), 0.0, version)
    with pytest.raises(BudgetExceeded, match=r"encode sound: 1 of \d+ values were rejected .* e\.g\. sound of '"):
        job.run()
    assert Catalog(bench.storage).snapshot().names(VIEW) == []


@pytest.mark.parametrize(("device", "most"), [("cuda", {1, 2}), ("cpu", {3, 4})])
def test_two_batches_at_most_are_on_a_gpu_and_one_a_thread_on_a_cpu(
    sharded: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, most: set[int]
) -> None:
    monkeypatch.setattr(runtime, "device", lambda: device)
    monkeypatch.setattr(runtime, "_streams", lambda count: [nullcontext()] * count)
    bench = Bench(sharded, tmp_path / "store", threads=4)
    worker = bench.worker()
    worker.load()
    plain, inside, seen = worker.encoder.encode, Counter[str](), []

    def counted(values: Sequence[Any]) -> Any:
        inside["now"] += 1
        seen.append(inside["now"])
        time.sleep(0.05)
        inside["now"] -= 1
        return plain(values)

    monkeypatch.setattr(worker.encoder, "encode", counted)
    worker.encoder.batch_size = 1
    worker.encode(bench.tasks()[0])
    assert max(seen) in most
