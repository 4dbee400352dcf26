"""What crosses Beam is descriptors, coded as rows or bytes: never a value, a vector or a pickle."""

import dataclasses
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.coders import registry
from apache_beam.metrics import Metrics
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.test_pipeline import TestPipeline as CheckedPipeline
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from featurestore.catalog import Catalog, Entry
from featurestore.corpora import QUARANTINE
from featurestore.errors import AlignmentError, BudgetExceeded
from featurestore.identity import MAX_ID_BYTES
from featurestore.storage import Storage
from featurestore.verify import verify
from featurestore.views import VIEW
from jobs.run import Runner
from jobs.spec import load
from pipelines import fuse
from pipelines.reference_blocks import MAX_BLOCK_BYTES, packed, unpacked
from pipelines.runner import Commit, Job, Result, Scope, keyed, listed, listed_in_file, result
from pipelines.sources import SampleRef
from tests.conftest import Made, small_spec
from tests.planted import SHARD_ROWS, write_planted

MAX_ELEMENT_BYTES = 2 << 10
SAMPLES = 48


@dataclasses.dataclass
class Crossing:
    """One PCollection that crossed a shuffle: its coder, and the size of its elements as that coder writes them."""

    step: str
    coder: str  # as the pipeline's proto names it, e.g. kv(varint,row)
    largest: int
    count: int


class _Shuffles(PipelineVisitor):
    """Collects what enters a GroupByKey: the one transform of ours that shuffles."""

    def __init__(self) -> None:
        self.found: list[tuple[str, beam.PCollection]] = []

    def visit_transform(self, node: AppliedPTransform) -> None:
        if isinstance(node.transform, beam.GroupByKey):
            self.found += [(node.full_label, entering) for entering in node.inputs]


class _Measure(beam.DoFn):
    def __init__(self, label: str, coder: Any) -> None:
        self._label, self._coder = label, coder

    def process(self, element: Any) -> None:
        Metrics.distribution("element bytes", self._label).update(len(self._coder.encode(element)))


def coders(job: Job) -> dict[str, str]:
    """Step -> coder of what enters it, in the pipeline as a runner gets it."""
    parts = job.pipeline.to_runner_api().components

    def named(coder: str) -> str:
        inner = [named(each) for each in parts.coders[coder].component_coder_ids]
        urn = parts.coders[coder].spec.urn.removeprefix("beam:coder:").partition(":")[0]
        return f"{urn}({','.join(inner)})" if inner else urn

    return {
        step.unique_name: named(parts.pcollections[entering].coder_id)
        for step in parts.transforms.values()
        for entering in step.inputs.values()
    }


def measured(job: Job, run: Any, crossings: list[Crossing]) -> Any:
    """Runs a job with a measuring step on every PCollection that crosses a shuffle."""
    shuffles, coded = _Shuffles(), coders(job)
    job.pipeline.visit(shuffles)
    for number, (step, entering) in enumerate(shuffles.found):
        coder = registry.get_coder(entering.element_type)
        entering | f"Measure {number}" >> beam.ParDo(_Measure(step, coder))
    outcome = run(job)
    sizes = outcome.metrics().query(beam.metrics.MetricsFilter().with_namespace("element bytes"))["distributions"]
    for found in sizes:
        step = found.key.metric.name
        crossings.append(Crossing(step, coded[step], found.committed.max, found.committed.count))
    assert len(sizes) == len(shuffles.found), "a PCollection that crosses a shuffle was not measured"
    return outcome


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Crossing]]:
    """What crossed shuffles while every stage ran: name of the stage -> crossings."""
    folder, run = tmp_path_factory.mktemp("graph"), Job.run
    write_planted(folder / "corpus", SAMPLES)
    (folder / "spec.yaml").write_text(small_spec(folder / "corpus", folder / "store"))
    found: dict[str, list[Crossing]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("shard", "encode", "align", "index", "fuse"):
            crossings = found.setdefault(stage, [])
            patch.setattr(Job, "run", lambda job, to=crossings: measured(job, run, to))
            Runner(load(folder / "spec.yaml"), Console(quiet=True)).run([stage])
    return found


def test_every_stage_crosses_a_shuffle_and_was_measured(stages: dict[str, list[Crossing]]) -> None:
    shards = SAMPLES // SHARD_ROWS
    assert [each.count for each in stages["shard"][1:]] == [shards, shards]
    assert 1 <= stages["shard"][0].count < SAMPLES, "references, some in a block"
    assert {each.count for each in stages["encode"]} == {shards}
    for stage in ("align", "index", "fuse"):
        assert {each.count for each in stages[stage]} == {1}, stage


def test_nothing_larger_than_a_descriptor_crosses_a_shuffle(stages: dict[str, list[Crossing]]) -> None:
    crossings = [each for found in stages.values() for each in found]
    assert max(crossings, key=lambda each: each.largest).largest <= MAX_ELEMENT_BYTES, crossings


def test_results_with_the_longest_lineage_are_descriptors_too(made: Made) -> None:
    """Of the encoders with weights, whose cards are the longest."""
    coder = registry.get_coder(Result)
    snapshot = made.open().snapshot
    told = f"image of {'x' * 1024!r}: broken " * 10
    sizes = {
        name: max(len(coder.encode(result(entry.shard, [entry], 8, 8, told))) for entry in snapshot.entries(VIEW, name))
        for name in snapshot.names(VIEW)
    }
    assert max(sizes.values()) <= MAX_ELEMENT_BYTES, sizes


def test_a_training_set_is_a_descriptor_however_many_files_it_has(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row a file: what a million rows are in files of 10,000."""
    made = small.copy_to(tmp_path)
    monkeypatch.setattr(fuse, "ROWS_PER_FILE", 1)
    made.spec.write_text(
        made.spec.read_text().replace("  heard: {views: [loud, timbre], l", "  rows: {views: [short], l")
    )
    crossings: list[Crossing] = []
    run = Job.run
    monkeypatch.setattr(Job, "run", lambda job: measured(job, run, crossings))
    Runner(load(made.spec), Console(quiet=True)).run(["fuse"])
    store = made.open()
    files = store.snapshot.entries("training", "rows")
    assert len(files) == 2 * SAMPLES + 1
    assert [each.count for each in crossings] == [1]
    assert crossings[0].largest <= 400, crossings
    assert not verify(store.storage).findings


def test_entries_in_a_file_are_the_same_entries_and_none_of_another_file(tmp_path: Path) -> None:
    storage, (given,) = Storage.of(tmp_path), results((10, 0))
    away = listed_in_file(storage, given, "training/t/b")
    assert away == listed_in_file(storage, given, "training/t/b"), "the same in every attempt"
    assert listed(storage, away) == listed(storage, given) == given
    (file,) = storage.list("training")
    (tmp_path / file).write_text("[]")
    with pytest.raises(AlignmentError, match="the file was changed after it was written"):
        listed(storage, away)


def test_what_crosses_a_shuffle_is_coded_in_rows_or_bytes_and_never_pickled(stages: dict[str, list[Crossing]]) -> None:
    for found in stages.values():
        for crossing in found:
            references = crossing.step == "Shard/GroupByRange"
            assert crossing.coder == f"kv(varint,{'bytes' if references else 'row'})", crossing


odd_texts = st.text(min_size=1, max_size=MAX_ID_BYTES // 4)
drawn_references = st.builds(
    SampleRef, odd_texts, odd_texts, st.just("0123456789abcdef"), st.integers(0, 1 << 40),
    st.text(st.characters(), min_size=1, max_size=60), st.integers(0, 1 << 50), st.integers(0, 1 << 30),
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), drawn_references)))
def test_references_cross_in_blocks_as_they_are(given: list[tuple[int, SampleRef]]) -> None:
    blocks = list(packed(given))
    for number in range(4):
        mine = [reference for each, reference in given if each == number]
        assert list(unpacked(block for each, block in blocks if each == number)) == mine
    assert max((len(block) for _, block in blocks), default=0) <= 2 * MAX_BLOCK_BYTES


def test_a_block_holds_many_references_and_is_a_descriptor() -> None:
    given = [
        (number % 7, SampleRef(f"id-{number:012}", "g", hex(number), 9, "s3://a/b", 9, 9)) for number in range(5000)
    ]
    blocks = list(packed(given))
    assert len(blocks) < 5000 / 20
    assert max(len(block) for _, block in blocks) <= MAX_ELEMENT_BYTES
    assert len(list(unpacked(block for _, block in blocks))) == 5000


def results(*counts: tuple[int, int]) -> list[Result]:
    """Results of shards a, b, …, each with one entry of view v, and (tried, rejected)."""
    made = []
    for shard, (tried, rejected) in zip("abcdefgh", counts, strict=False):
        entry = Entry(VIEW, "v", "r", shard, f"views/v/r/{shard}", 1, 2, "3", "4", "5", None, None, "{}")
        made.append(result(shard, [entry], tried, rejected, f"image of '{shard}': broken" if rejected else ""))
    return made


def commit(
    store: Path, given: list[Result], versions: list[int], budget: float = 0.01, rows: int | None = None
) -> None:
    scopes = [Scope(VIEW, "v", "r"), Scope(QUARANTINE, "encode/v", "r")]
    rows = len(given) if rows is None else rows  # one each
    with CheckedPipeline(runner=FnApiRunner()) as pipeline:
        made = (
            pipeline
            | beam.Create([keyed(each) for each in given]).with_output_types(tuple[int, Result])
            | Commit(Storage.of(store), "j", scopes, budget, rows)
        )
        assert_that(made, equal_to(versions))


def test_commit_publishes_all_results_at_once_and_twice_is_once(tmp_path: Path) -> None:
    catalog = Catalog(Storage.of(tmp_path))
    catalog.create()
    commit(tmp_path, results((10, 0), (10, 0), (10, 0)), [1])
    commit(tmp_path, list(reversed(results((10, 0), (10, 0), (10, 0)))), [1])
    assert [entry.shard for entry in catalog.snapshot().entries(VIEW, "v")] == ["a", "b", "c"]
    assert [each["job"] for each in catalog.history()] == ["j", "create"]


def test_commit_takes_a_shard_once_where_a_bundle_was_done_twice(tmp_path: Path) -> None:
    catalog = Catalog(Storage.of(tmp_path))
    catalog.create()
    given = results((10, 0), (10, 1))
    remade = given[0]._replace(entries=given[0].entries.replace("views/v/r/a", "views/v/r/a2"))
    commit(tmp_path, [*given, remade, given[1]], [1], budget=0.05, rows=2)
    assert [entry.path for entry in catalog.snapshot().entries(VIEW, "v")] == ["views/v/r/a", "views/v/r/b"]


@pytest.mark.parametrize("rows", [2, 4])
def test_commit_publishes_nothing_where_results_are_lost_or_too_many(tmp_path: Path, rows: int) -> None:
    catalog = Catalog(Storage.of(tmp_path))
    catalog.create()
    told = f"j: 3 rows in 3 shards reached the commit, {rows} were planned: .* nothing was published"
    with pytest.raises(AlignmentError, match=told):
        commit(tmp_path, results((10, 0), (10, 0), (10, 0)), [], rows=rows)
    assert catalog.snapshot().version == 0


def test_commit_of_some_shards_leaves_the_others(tmp_path: Path) -> None:
    catalog = Catalog(Storage.of(tmp_path))
    catalog.create()
    commit(tmp_path, results((10, 0), (10, 0), (10, 0)), [1])
    again = results((10, 0))[0]
    remade = again._replace(entries=again.entries.replace("views/v/r/a", "views/v/r/a2"))
    commit(tmp_path, [remade], [2])
    assert [entry.path for entry in catalog.snapshot().entries(VIEW, "v")] == [
        "views/v/r/a2",
        "views/v/r/b",
        "views/v/r/c",
    ]


def test_commit_past_the_budget_publishes_nothing_and_says_how_to_raise_it(tmp_path: Path) -> None:
    catalog = Catalog(Storage.of(tmp_path))
    catalog.create()
    told = (
        r"j: 2 of 20 values were rejected \(10\.00%\), more than the failure budget of 9\.00%; e\.g\. image of 'b': broken"
        r".* raise corpus\.failure_budget in the spec above 10\.00%"
    )
    with pytest.raises(BudgetExceeded, match=told):
        commit(tmp_path, results((10, 0), (10, 2)), [], budget=0.09)
    assert catalog.snapshot().version == 0
    commit(tmp_path, results((10, 0), (10, 2)), [1], budget=0.1)
