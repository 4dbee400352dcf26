"""`braid retry-quarantined`: what is mended comes in at its place; nothing else is fetched, encoded or renumbered."""

import io
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console

from featurestore import artefact
from featurestore.catalog import Catalog, Change
from featurestore.corpora import MEDIA, QUARANTINE, ROWS
from featurestore.encoders import log_mel, mfcc
from featurestore.errors import AlignmentError, BudgetExceeded, InputError, NotFound
from featurestore.ids import IDS
from featurestore.store import FeatureStore
from featurestore.verify import verify
from featurestore.views import VIEW
from jobs import plan
from jobs.report import rejected
from jobs.retry import Retrier
from jobs.run import Runner
from jobs.spec import load
from pipelines import encode_plan
from pipelines import retry as pipeline
from pipelines.decode_apart import DecodeApart
from pipelines.sources.files import FileValue
from tests.conftest import Made, check_same
from tests.faults.deadly import SEGFAULT, set_deadly
from tests.planted import SHARD_ROWS, write_planted
from tests.processes import start

SAMPLES = 48


def spec_text(corpus: Path, store: Path, media: str = "copy", budget: str = "50%") -> str:
    return f"""\
version: 1
store: {{uri: {store}}}
corpus:
  name: planted
  source: {{type: manifest, path: {corpus}/manifest.jsonl}}
  columns: {{id: id, group: group, event_timestamp: added}}
  fields:
    caption: {{modality: text, from: caption}}
    sound: {{modality: audio, from: sound_path}}
  media: {media}
  shard_rows: {SHARD_ROWS}
  failure_budget: {budget}
views:
  loud: {{field: sound, encoder: log-mel, options: {{batch_size: 32}}}}
  timbre: {{field: sound, encoder: mfcc}}
spaces:
  heard: {{views: [loud, timbre], method: cca, dim: 8}}
"""


class Bad(NamedTuple):
    """Ids of samples with a bad value, and the files of all sounds."""

    missing: str
    empty: str
    broken: str
    latin: str
    never: str
    sounds: dict[str, Path]


def manifest(made: Made) -> list[dict[str, Any]]:
    raw = (made.corpus / "manifest.jsonl").read_bytes().decode("utf-8", "surrogateescape")
    return [json.loads(line) for line in raw.splitlines()]


def write(made: Made, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (made.corpus / "manifest.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))


def bad_of(made: Made) -> Bad:
    """Always the same samples."""
    rows = manifest(made)
    sounds = [row for row in rows if row["sound_path"]]
    picked = [sounds[number]["id"] for number in (3, 9, 15, 33)]
    paths = {row["id"]: made.corpus / row["sound_path"] for row in sounds}
    latin = next(row["id"] for row in rows[20:] if not row["sound_path"] and row["caption"])
    return Bad(picked[0], picked[1], picked[2], latin, picked[3], paths)


def planted(folder: Path, media: str = "copy") -> Made:
    """Spoilt before it was stored: one sound is not there, two are empty, one is no sound; a caption is Latin-1."""
    made = Made(folder / "corpus", folder / "spec.yaml", folder / "store")
    write_planted(made.corpus, SAMPLES)
    bad = bad_of(made)
    (folder / "good").mkdir()
    for sample_id in (bad.missing, bad.empty, bad.broken, bad.never):
        path = bad.sounds[sample_id]
        (folder / "good" / path.name).write_bytes(path.read_bytes())
        if sample_id == bad.missing:
            path.unlink()
        else:
            path.write_bytes(b"no sound at all" if sample_id == bad.broken else b"")
    rows = manifest(made)
    for row in rows:
        if row["id"] == bad.latin:
            row["caption"] = b"Caf\xe9".decode("utf-8", "surrogateescape")
    write(made, rows)
    made.spec.write_text(spec_text(made.corpus, made.store, media))
    run(made)
    return made


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    return planted(tmp_path_factory.mktemp("spoilt"))


@pytest.fixture
def copy(spoilt: Made, tmp_path: Path) -> Made:
    return spoilt.copy_to(tmp_path)


def mend(made: Made, spoilt: Made) -> Bad:
    """The missing sound, one of the empty ones and the caption are good now."""
    bad = bad_of(made)
    mend_of(made, spoilt, bad)
    return bad


def mend_of(made: Made, spoilt: Made, bad: Bad) -> None:
    for sample_id in (bad.missing, bad.empty):
        path = bad.sounds[sample_id]
        path.write_bytes((spoilt.spec.parent / "good" / path.name).read_bytes())
    rows = manifest(made)
    for row in rows:
        if row["id"] == bad.latin:
            row["caption"] = "Café"
    write(made, rows)


def run(made: Made, *stages: str) -> None:
    Runner(load(made.spec), Console(quiet=True)).run(stages or plan.STAGES)


def retry(made: Made, workers: int = 1) -> str:
    """What it says."""
    said = io.StringIO()
    Retrier(load(made.spec), Console(file=said, width=300), workers=workers).retry("spec.yaml")
    return said.getvalue()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Number of values that each encoder was given, in this process."""
    counts: Counter[str] = Counter()
    for module in (log_mel, mfcc):
        plain = module.Encoder.encode

        def encode(self: Any, values: Sequence[Any], plain: Any = plain, name: str = module.__name__) -> Any:
            counts[name.rpartition(".")[2]] += len(values)
            return plain(self, values)

        monkeypatch.setattr(module.Encoder, "encode", encode)
    return counts


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of the values that were fetched, in this process."""
    found: list[str] = []
    plain = FileValue.fetch

    def fetch(self: FileValue) -> bytes:
        found.append(self.source)
        return plain(self)

    monkeypatch.setattr(FileValue, "fetch", fetch)
    return found


def still(made: Made) -> dict[tuple[str, str], str]:
    return {(row["id"], row["stage"]): row["reason"] for row in rejected(made.open(), "planted")}


def states(made: Made) -> set[tuple[str, str]]:
    steps = plan.steps(load(made.spec), made.open().snapshot)
    return {(step.stage, step.state) for step in steps if step.stage in ("shard", "encode")}


FRESH = {("shard", plan.FRESH), ("encode", plan.FRESH)}


def check_others_as_they_were(before: FeatureStore, after: FeatureStore, came: dict[str, str]) -> None:
    """Ids, shards, rows and kept columns of all; values and vectors of all but what came in (id -> field)."""
    old, new = before.corpus("planted"), after.corpus("planted")
    assert [(e.shard, e.rows, e.ids_sha256) for e in old.shards] == [
        (e.shard, e.rows, e.ids_sha256) for e in new.shards
    ]
    drop = ["etag", *old.fields]
    assert new.to_arrow().drop_columns(drop).equals(old.to_arrow().drop_columns(drop))
    for entry in old.shards:
        for row, sample_id in enumerate(old.ids(entry.shard)):
            for field in old.fields:
                now, then = (each.value(entry.shard, row, field) for each in (new, old))
                assert (now == then) == (came.get(sample_id) != field), (sample_id, field)
    for name in before.views():
        one, other = before.view(name).to_arrow(), after.view(name).to_arrow()
        same = [row for row, each in enumerate(one["id"].to_pylist()) if came.get(each) != before.view(name).field]
        assert len(same) < len(one)
        assert one.take(same).equals(other.take(same))


def test_what_is_mended_comes_in_at_its_place_and_nothing_else_is_fetched_encoded_or_renumbered(
    copy: Made, spoilt: Made, encoded: Counter[str], fetched: list[str]
) -> None:
    before = copy.open()
    bad = mend(copy, spoilt)
    assert states(copy) == {("shard", plan.STALE), ("encode", plan.STALE)}
    fetched.clear()
    said = retry(copy)
    sounds = [str(bad.sounds[each].relative_to(copy.corpus)) for each in (bad.missing, bad.empty, bad.never)]
    assert sorted(fetched) == sorted(sounds)
    # One of each encoder's is the broken one: it does not reach the model.
    assert encoded == {"log_mel": 2, "mfcc": 2}
    store = copy.open()
    check_others_as_they_were(before, store, {bad.missing: "sound", bad.empty: "sound", bad.latin: "caption"})
    assert still(copy) == {(bad.never, "shard"): "empty", (bad.broken, "encode"): "decode_error"}
    for sample_id in (bad.missing, bad.empty):
        expected = log_mel.Encoder(log_mel.Options(batch_size=32))
        raw = (spoilt.spec.parent / "good" / bad.sounds[sample_id].name).read_bytes()
        (vector,) = store.view("loud").take([sample_id])["embedding"].to_pylist()
        assert np.array_equal(np.array(vector, np.float32), expected.encode([expected.decode(raw)])[0])
    corpus = store.corpus("planted")
    assert corpus.value(*corpus.locate(bad.latin), "caption") == "Café".encode()
    fetched.clear()
    assert states(copy) == FRESH
    assert fetched == [], "the store knows the etags that the samples have now"
    assert {finding.kind for finding in verify(store.storage).findings} == {"space"}
    assert "shard planted: 4 values tried, 3 in now, 1 in quarantine\n  sound, empty: 1\n" in said
    assert "encode loud: 3 values tried, 2 in now, 1 in quarantine\n  sound, decode_error: 1\n" in said
    assert said.endswith("are made from what came in by: braid run spec.yaml\n")
    encoded.clear()
    run(copy)
    assert verify(copy.open().storage).ok
    assert not encoded
    assert copy.open().corpus("planted").gone == {}


def test_only_shards_with_what_came_in_are_made_again_and_twice_is_once(copy: Made, spoilt: Made) -> None:
    before = copy.open().snapshot
    bad = mend(copy, spoilt)
    retry(copy)
    after = copy.open()
    corpus = after.corpus("planted")
    came = {corpus.locate(each)[0] for each in (bad.missing, bad.empty, bad.latin)}
    for kind, name in ((ROWS, "planted"), (MEDIA, "planted"), (VIEW, "loud")):
        old, new = ({e.shard: e for e in each.entries(kind, name)} for each in (before, after.snapshot))
        assert {shard for shard in old if old[shard] != new[shard]} == came, kind
    assert len(came) < len(corpus.shards)
    stored = after.storage.list()
    assert "Nothing came in: the store is as it was." in retry(copy)
    assert copy.open().version == after.version
    assert {
        key for key in copy.open().storage.list() if not key.startswith("corpora/planted/retries/")
    } <= stored.keys()


def test_two_workers_write_the_same_bytes(copy: Made, spoilt: Made, tmp_path: Path) -> None:
    other = spoilt.copy_to(tmp_path / "other")
    for each, workers in ((copy, 1), (other, 2)):
        mend(each, spoilt)
        for row in manifest(each):
            if row["sound_path"] and (each.corpus / row["sound_path"]).exists():
                os.utime(each.corpus / row["sound_path"], (1, 1))
        retry(each, workers)
    check_same(copy.open(), other.open())


def test_an_earlier_version_is_as_it_was(copy: Made, spoilt: Made) -> None:
    version = copy.open().version
    mend(copy, spoilt)
    retry(copy)
    check_same(copy.open(version), spoilt.open())
    assert verify(copy.open().storage, version).ok
    assert copy.open(version).view("loud").to_arrow().equals(spoilt.open().view("loud").to_arrow())


def test_what_nobody_mended_changes_nothing(copy: Made) -> None:
    before = copy.open()
    assert "Nothing came in" in retry(copy)
    check_same(copy.open(), before)
    assert copy.open().version == before.version


def test_nothing_in_quarantine_is_told(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    assert retry(copy) == "Nothing of planted is in quarantine: there is nothing to try again.\n"
    assert copy.open().version == small.open().version


def test_a_store_without_the_corpus_and_a_spec_of_other_fields_are_told(copy: Made, tmp_path: Path) -> None:
    copy.spec.write_text(copy.spec.read_text().replace("from: sound_path", "from: other"))
    with pytest.raises(InputError, match=r"corpus\.fields: sound changed since corpus 'planted' was stored"):
        retry(copy)
    copy.spec.write_text(spec_text(copy.corpus, tmp_path / "none"))
    with pytest.raises(NotFound, match="holds no Braid store"):
        retry(copy)


@pytest.mark.parametrize("what", ["column", "group", "value", "gone", "no value"])
def test_a_sample_that_changed_in_more_is_left_to_the_next_run(copy: Made, spoilt: Made, what: str) -> None:
    bad = mend(copy, spoilt)
    rows = manifest(copy)
    (row,) = [row for row in rows if row["id"] == bad.empty]
    change = {"column": {"label": "another"}, "group": {"group": "x"}, "value": {"caption": "Other."}}
    row |= change.get(what, {"sound_path": None})
    write(copy, [each for each in rows if what != "gone" or each is not row])
    said = retry(copy)
    assert "1 of them not tried: their samples are gone from the source, or changed in more" in said
    assert "shard planted: 3 values tried, 2 in now, 2 in quarantine" in said
    assert still(copy)[bad.empty, "shard"] == "empty"
    assert plan.steps(load(copy.spec), copy.open().snapshot)[0].why == (
        "samples: 1 gone" if what == "gone" else "samples: 1 changed"
    )
    run(copy)
    assert (bad.empty, "shard") not in still(copy)
    assert verify(copy.open().storage).ok


def test_another_reason_is_told_in_place_and_the_next_run_has_nothing_to_do(copy: Made) -> None:
    bad, before = bad_of(copy), copy.open().corpus("planted").to_arrow()["id"]
    bad.sounds[bad.missing].write_bytes(b"")
    assert "0 in now" in retry(copy)
    (row,) = [row for row in _all_quarantined(copy.open()) if row["id"] == bad.missing]
    assert row["reason"] == "empty"
    assert states(copy) == FRESH
    assert copy.open().corpus("planted").to_arrow()["id"] == before
    run(copy)
    assert verify(copy.open().storage).ok


def test_an_etag_as_it_was_needs_no_look_at_the_rest(
    copy: Made, spoilt: Made, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file whose rights were mended: the rejected value is fetched, and no other is compared."""
    monkeypatch.setattr(pipeline, "same", None)
    bad = bad_of(copy)
    path = bad.sounds[bad.empty]
    path.write_bytes(b"")
    os.utime(path, (spoilt.corpus / path.relative_to(copy.corpus)).stat()[7:9])
    plain = FileValue.fetch
    good = (spoilt.spec.parent / "good" / path.name).read_bytes()
    monkeypatch.setattr(FileValue, "fetch", lambda self: good if path.name in self.source else plain(self))
    monkeypatch.setattr(FileValue, "stat", _stat_of(copy, spoilt, FileValue.stat))
    retry(copy)
    assert (bad.empty, "shard") not in still(copy)


def _stat_of(copy: Made, spoilt: Made, plain: Any) -> Any:
    """As it was when the spoilt corpus was stored."""
    return lambda self: plain(self._replace(uri=self.uri.replace(str(copy.corpus), str(spoilt.corpus)), bounds=None))


def test_rows_that_are_gone_are_not_tried(copy: Made, spoilt: Made, encoded: Counter[str]) -> None:
    bad = bad_of(copy)
    rows = manifest(copy)
    write(copy, [row for row in rows if row["id"] not in (bad.missing, bad.broken)])
    run(copy, "shard", "encode")
    encoded.clear()
    mend_of(copy, spoilt, bad)
    said = retry(copy)
    assert "shard planted: 3 values tried, 2 in now, 1 in quarantine" in said
    assert encoded == {"log_mel": 1, "mfcc": 1}
    store = copy.open()
    assert verify(store.storage).findings == () or {f.kind for f in verify(store.storage).findings} == {"space"}
    names = [row["id"] for row in _all_quarantined(store)]
    assert bad.missing in names
    assert bad.broken in names
    assert states(copy) == FRESH


def _all_quarantined(store: FeatureStore) -> Iterator[dict[str, Any]]:
    for entry in store.snapshot.entries(QUARANTINE):
        yield from artefact.read_table(store.storage.read(entry.path)).to_pylist()


def test_a_decoder_that_can_read_it_now_takes_it_in_and_only_that(
    copy: Made, encoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of a library: the corpus is as it was, the views gain a vector."""
    before = copy.open()
    bad = bad_of(copy)
    monkeypatch.setattr(DecodeApart, "__call__", lambda self, *value: np.ones(8000, np.float32))
    said = retry(copy)
    assert "encode loud: 1 value tried, 1 in now, 0 in quarantine" in said
    assert encoded == {"log_mel": 1, "mfcc": 1}
    after = copy.open()
    for kind in (ROWS, MEDIA, IDS):
        assert after.snapshot.entries(kind, "planted") == before.snapshot.entries(kind, "planted")
    corpus = after.corpus("planted")
    shard, _ = corpus.locate(bad.broken)
    for view in map(after.view, after.views()):
        old, new = before.view(view.name).to_arrow(), view.to_arrow()
        at = old["id"].to_pylist().index(bad.broken)
        others = [each for each in range(len(old)) if each != at]
        assert old.take(others).equals(new.take(others))
        assert (old["present"][at].as_py(), new["present"][at].as_py()) == (False, True)
        (changed,) = [e.shard for e in view.entries() if e not in before.view(view.name).entries()]
        assert changed == shard
    assert states(copy) == FRESH
    assert {finding.kind for finding in verify(after.storage).findings} == {"space"}


def test_a_kill_9_between_the_commits_is_gone_on_with_by_run_which_copies(
    copy: Made, spoilt: Made, tmp_path: Path, encoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.open()
    bad = mend(copy, spoilt)
    (tmp_path / "kill").mkdir()
    (tmp_path / "kill" / "sitecustomize.py").write_text(
        "import os, signal\n"
        "from featurestore.catalog import Catalog\n"
        "commit = Catalog.commit\n"
        "def last(self, job, *args):\n"
        "    commit(self, job, *args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Catalog.commit = last\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "kill"), prepend=os.pathsep)
        with start("retry-quarantined", copy.spec) as killed:
            assert killed.wait(120) == -signal.SIGKILL, killed.stderr.read()
    assert copy.open().history()[0]["job"] == "retry planted"
    assert copy.open().version == before.version + 1
    run(copy)
    assert encoded == {"log_mel": 2, "mfcc": 2}
    check_others_as_they_were(before, copy.open(), {bad.missing: "sound", bad.empty: "sound", bad.latin: "caption"})
    assert verify(copy.open().storage).ok
    # And what `run` has made is what the command makes.
    other = spoilt.copy_to(tmp_path / "other")
    mend(other, spoilt)
    retry(other)
    assert copy.open().view("loud").to_arrow().equals(other.open().view("loud").to_arrow())


def test_a_value_that_kills_its_decoder_kills_no_worker_however_often_it_is_tried(
    copy: Made, spoilt: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = bad_of(copy)
    deadly = set_deadly(monkeypatch, tmp_path / "deadly", b"no sound at all", SEGFAULT)
    before = copy.open()
    for number in (1, 2):
        assert "Nothing came in" in retry(copy)
        # Of each view two processes, tried one after the other; this one, a worker too, has not decoded it.
        assert len((deadly / "struck").read_text().splitlines()) == 4 * number
    check_same(copy.open(), before)
    assert still(copy)[bad.broken, "encode"] == "decode_error"


def test_the_failure_budget_holds(copy: Made, spoilt: Made) -> None:
    copy.spec.write_text(copy.spec.read_text().replace("50%", "1%"))
    mend(copy, spoilt)
    version = copy.open().version
    with pytest.raises(BudgetExceeded, match=r"retry planted: 1 of \d+ values were rejected"):
        retry(copy)
    assert copy.open().version == version


def test_shards_that_another_job_took_out_meanwhile_are_not_brought_back(
    copy: Made, spoilt: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compaction does between the retry's beginning and its commit."""
    mend(copy, spoilt)
    plain = Catalog.commit

    def late(self: Catalog, job: str, *args: Any) -> int:
        monkeypatch.setattr(Catalog, "commit", plain)
        rows = tuple(self.snapshot().entries(ROWS, "planted"))
        plain(self, "compact planted", [Change(ROWS, "planted", "", (), frozenset(e.shard for e in rows))])
        return plain(self, job, *args)

    monkeypatch.setattr(Catalog, "commit", late)
    with pytest.raises(AlignmentError, match=r"another job took shard .* out of the store, .* run it again"):
        retry(copy)
    assert copy.open().history()[0]["job"] == "compact planted"


def test_a_damaged_file_of_a_view_is_not_copied_from(copy: Made, spoilt: Made, encoded: Counter[str]) -> None:
    mend(copy, spoilt)
    Retrier(load(copy.spec), Console(quiet=True))._retry_corpus(copy.open().snapshot)
    planned = plan.view_plans(load(copy.spec))[0]
    task = encode_plan.stale(copy.open().snapshot, planned, encode_plan.listed(copy.open().storage, planned))[0]
    assert task.earlier_path
    path = copy.store / task.earlier_path
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    encoded.clear()
    run(copy, "encode")
    assert encoded["log_mel"] > 2
    assert encoded["mfcc"] == 2
    assert {finding.kind for finding in verify(copy.open().storage).findings} == {"space"}
