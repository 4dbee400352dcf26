"""A value that kills the process which decodes it: the next attempt quarantines it, and nothing else is lost."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from featurestore import artefact, encoders
from featurestore.corpora import QUARANTINE
from featurestore.errors import BudgetExceeded, WorkerDied
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.verify import verify
from featurestore.views import VIEW
from jobs import plan
from jobs.report import rejected
from jobs.run import Runner
from jobs.spec import load
from pipelines import decode_apart, encode, encode_plan, shard_writer
from tests.conftest import Made
from tests.engines.dask_cluster import Cluster
from tests.faults.deadly import HANG, OUT_OF_MEMORY, SEGFAULT, deadly_folder, on_path, set_deadly, sound_of
from tests.planted import SHARD_ROWS
from tests.processes import Said, braid, start

BY_SEGFAULT = ("killed_decoder", "the decoder's process ended by SIGSEGV")


def sounds_spec(made: Made, folder: Path, budget: str = "5%") -> Path:
    """The small corpus with one view of it, `loud`, in a store that is still to be made."""
    spec = folder / "spec.yaml"
    spec.write_text(f"""\
version: 1
store: {{uri: {folder / "store"}}}
corpus:
  name: planted
  source: {{type: manifest, path: {made.corpus}/manifest.jsonl}}
  columns: {{id: id, group: group, event_timestamp: added}}
  fields:
    caption: {{modality: text, from: caption}}
    sound: {{modality: audio, from: sound_path}}
  shard_rows: {SHARD_ROWS}
  failure_budget: {budget}
views:
  loud: {{field: sound, encoder: log-mel, options: {{batch_size: 32}}}}
""")
    return spec


def run(spec: Path, workers: int = 1, *beam_args: str) -> None:
    Runner(load(spec), Console(quiet=True), beam_args, workers).run()


def braid_run(spec: Path, deadly: Path) -> Said:
    return braid("run", spec, env=on_path(deadly))


def check(small: Made, folder: Path, reason: tuple[str, str]) -> None:
    """The store is that of an undisturbed run but for the one value, and says so; no receipt is left."""
    whole, store = small.open(), FeatureStore(folder / "store")
    sample_id, shard, _ = sound_of(whole)
    assert store.storage.list("attempts") == {}
    (row,) = rejected(store, "planted")
    assert (row["id"], row["field"], row["stage"]) == (sample_id, "sound", "encode")
    assert (row["reason"], row["detail"]) == reason
    expected, found = whole.view("loud").to_arrow(), store.view("loud").to_arrow()
    at = expected["id"].to_pylist().index(sample_id)
    assert found["miss_reason"][at].as_py() == reason[0]
    assert found["embedding"][at].as_py() is None
    others = [each for each in range(len(expected)) if each != at]
    assert found.take(others).equals(expected.take(others))
    made, files = (
        {entry.shard: entry.sha256 for entry in each.snapshot.entries(VIEW, "loud")} for each in (whole, store)
    )
    assert {key for key in made if made[key] != files.get(key)} == {shard}
    assert verify(store.storage).ok


def test_a_run_that_a_value_killed_goes_on_without_it(small: Made, tmp_path: Path) -> None:
    _, shard, raw = sound_of(small.open())
    spec, deadly = sounds_spec(small, tmp_path), deadly_folder(tmp_path / "deadly", raw, SEGFAULT)
    first = braid_run(spec, deadly)
    assert first.status == -11, first
    left = Storage.of(tmp_path / "store").list("attempts")
    assert 1 <= len(left) <= 2
    assert any(key.startswith("attempts/encode/loud/") and key.endswith(f"/{shard}") for key in left)
    second = braid_run(spec, deadly)
    assert second.status == 0, second
    check(small, tmp_path, BY_SEGFAULT)


def test_a_value_that_kills_the_models_forward_is_quarantined_by_the_third_attempt(small: Made, tmp_path: Path) -> None:
    _, shard, raw = sound_of(small.open())
    decoded = encoders.find("log-mel").decode(raw).tobytes()
    spec, deadly = sounds_spec(small, tmp_path), deadly_folder(tmp_path / "deadly", decoded, SEGFAULT, forward=True)
    storage = Storage.of(tmp_path / "store")
    for receipts in (1, 2):
        assert braid_run(spec, deadly).status == -11
        own = [key for key in storage.list("attempts") if key.removesuffix(".again").endswith(f"/{shard}")]
        assert len(own) == receipts
    third = braid_run(spec, deadly)
    assert third.status == 0, third
    check(small, tmp_path, ("killed_encoder", "the encoder's process ended by SIGSEGV"))


def sounds_of_shards(small: Made, *places: int) -> dict[str, bytes]:
    """Id -> bytes of a sound in each of some shards, by their places in the order in which a job is given them."""
    store = small.open()
    corpus, by_shard = store.corpus("planted"), dict[str, tuple[str, bytes]]()
    for sample_id in store.view("loud").to_arrow()["id"].to_pylist():
        shard, row = corpus.locate(sample_id)
        if raw := corpus.value(shard, row, "sound"):
            by_shard[shard] = sample_id, raw
    (planned,) = [each for each in plan.view_plans(load(small.spec)) if each.name == "loud"]
    tasks = encode_plan.stale(store.snapshot, planned, {})
    return dict(by_shard[tasks[place].shard] for place in places)


@pytest.mark.parametrize(
    ("forward", "kills"),
    [pytest.param(False, 1, id="decoder"), pytest.param(True, 2, id="model", marks=pytest.mark.slow)],
)
def test_values_in_several_shards_of_a_bundle_cost_no_more_attempts_than_one(
    small: Made, tmp_path: Path, forward: bool, kills: int
) -> None:
    """Dataflow makes four. The second shard is begun long after the first one's end, and so is the third."""
    sounds = sounds_of_shards(small, 0, 3, 5)
    struck = [encoders.find("log-mel").decode(raw).tobytes() if forward else raw for raw in sounds.values()]
    deadly = deadly_folder(tmp_path / "deadly", struck, SEGFAULT, forward=forward)
    spec = sounds_spec(small, tmp_path, budget="10%")
    for _ in range(kills):
        assert braid_run(spec, deadly).status == -11
    last = braid_run(spec, deadly)
    assert last.status == 0, last
    store = FeatureStore(tmp_path / "store")
    reason = "killed_encoder" if forward else "killed_decoder"
    assert {(row["id"], row["reason"]) for row in rejected(store, "planted")} == {(key, reason) for key in sounds}
    assert store.storage.list("attempts") == {}
    assert verify(store.storage).ok


@pytest.mark.slow
def test_a_dask_job_goes_through_a_value_that_kills_the_forward(small: Made, tmp_path: Path) -> None:
    _, _, raw = sound_of(small.open())
    decoded = encoders.find("log-mel").decode(raw).tobytes()
    deadly = deadly_folder(tmp_path / "deadly", decoded, SEGFAULT, forward=True)
    spec = sounds_spec(small, tmp_path)
    with Cluster(tmp_path / "dask", env=on_path(deadly)) as cluster:
        for name in "abc":
            cluster.add_worker(name)
        run(spec, 1, "--runner=DaskRunner", f"--dask_client_address={cluster.address}")
    check(small, tmp_path, ("killed_encoder", "the encoder's process ended by SIGSEGV"))


def test_a_worker_that_a_value_killed_is_told_and_the_next_run_goes_on_without_it(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, raw = sound_of(small.open())
    set_deadly(monkeypatch, tmp_path / "deadly", raw, SEGFAULT)
    spec = sounds_spec(small, tmp_path, budget="1%")
    with pytest.raises(
        WorkerDied, match=r"a worker process ended by SIGSEGV while it was at shard [0-9a-f-]+; nothing"
    ):
        run(spec, workers=2)
    # Such a value counts as any other that was rejected.
    with pytest.raises(BudgetExceeded, match=r"1 of 36 values were rejected \(2\.78%\).*ended by SIGSEGV"):
        run(spec, workers=2)
    run(sounds_spec(small, tmp_path))
    check(small, tmp_path, BY_SEGFAULT)


def test_a_dask_job_goes_through_by_itself(small: Made, tmp_path: Path) -> None:
    _, _, raw = sound_of(small.open())
    deadly = deadly_folder(tmp_path / "deadly", raw, SEGFAULT)
    spec = sounds_spec(small, tmp_path)
    with Cluster(tmp_path / "dask", env=on_path(deadly)) as cluster:
        for name in "ab":
            cluster.add_worker(name)
        run(spec, 1, "--runner=DaskRunner", f"--dask_client_address={cluster.address}")
        ended = [process.poll() for process in cluster.workers.values()]
        assert sorted(ended, key=str) == [-11, None], cluster.logs()
    check(small, tmp_path, BY_SEGFAULT)


@pytest.mark.slow
def test_a_value_that_takes_all_memory_is_quarantined_by_the_next_run(small: Made, tmp_path: Path) -> None:
    _, _, raw = sound_of(small.open())
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, resource.RLIM_INFINITY))"
    deadly = deadly_folder(tmp_path / "deadly", raw, OUT_OF_MEMORY, limit)
    spec = sounds_spec(small, tmp_path)
    first = braid_run(spec, deadly)
    assert first.status == 1
    assert "MemoryError" in first.err
    second = braid_run(spec, deadly)
    assert second.status == 0, second
    killed = "the decoder's process ended by SIGKILL (the kernel does so where memory runs out)"
    check(small, tmp_path, ("killed_decoder", killed))


@pytest.mark.slow
def test_a_value_that_comes_to_no_end_is_quarantined_once_somebody_killed_the_run(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, raw = sound_of(small.open())
    deadly = set_deadly(monkeypatch, tmp_path / "deadly", raw, HANG)
    spec = sounds_spec(small, tmp_path)
    with start("run", spec) as first:
        while not (deadly / "struck").exists():
            assert first.poll() is None
        first.kill()
    monkeypatch.setattr(decode_apart, "TIMEOUT_S", 2.0)
    run(spec)
    check(small, tmp_path, ("decoder_timeout", "the decoder had come to no end after 2 s"))


def test_a_shard_left_by_a_killed_run_is_adopted_and_its_receipt_goes(small: Made, tmp_path: Path) -> None:
    """Killed after the last write, before the receipt was removed."""
    made = small.copy_to(tmp_path)
    store = made.open()
    entry = store.snapshot.entries(VIEW, "loud")[0]
    receipt = f"attempts/encode/loud/{entry.recipe}/{entry.shard}"
    files, before = store.storage.list("views"), store.digest()
    store.storage.touch(receipt)
    (planned,) = [each for each in plan.view_plans(load(made.spec)) if each.name == "loud"]
    worker = encode.ShardEncoder(store.storage, planned, threads=1, version=store.version)
    tasks = encode_plan.stale(store.snapshot, planned, {})
    (task,) = [each for each in tasks if each.shard == entry.shard]
    assert worker.encode(task).computed == 0
    assert store.storage.list("attempts") == {}
    assert (store.storage.list("views"), made.open().digest()) == (files, before)


@pytest.mark.parametrize("again", [False, True])
def test_a_sound_that_no_view_decodes_is_checked_apart_after_a_kill(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    sample_id, key, raw = sound_of(small.open())
    made = small.copy_to(tmp_path)
    storage = made.open().storage
    (cuts,) = storage.list("corpora/planted/plans")
    task = shard_writer.ShardTask(key, cuts, artefact.file_sha256(made.store / cuts), int(key.rpartition("-")[2]))
    corpus = plan.corpus_dict(load(made.spec)) | {"unviewed": ["sound"]}
    whole = {each[4]: each[7] for each in json.loads(shard_writer.ShardWriter(storage, corpus).write(task).entries)}
    for path in whole:
        storage.delete(path)
    set_deadly(monkeypatch, tmp_path / "deadly", raw, SEGFAULT)
    if again:
        storage.touch(f"attempts/shard/planted/{key}")
    result = shard_writer.ShardWriter(storage, corpus).write(task)
    entries = json.loads(result.entries)
    assert storage.list("attempts") == {}
    if not again:  # this process is spared: the same bytes as before
        assert {each[4]: each[7] for each in entries} == whole
        return
    assert result.rejected == 1
    (placed,) = [each for each in entries if each[0] == QUARANTINE]
    (row,) = artefact.read_table(storage.read(placed[4])).to_pylist()
    assert (row["id"], row["field"], row["stage"], row["reason"]) == (sample_id, "sound", "shard", "killed_decoder")
