"""What `braid plan` says that a run takes, against what the run then measures; and what it refuses before anything runs."""

import io
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from featurestore import indexes
from featurestore.errors import InputError, SpecError
from featurestore.identity import hash64
from featurestore.row_order import BY_ID, BY_SOURCE
from featurestore.store import FeatureStore
from jobs import forecast, metrics, preflight, sample, sizes
from jobs.run import Done, Runner
from jobs.show_plan import read_prices, show
from jobs.spec import load, parse
from pipelines.sources import SampleRef
from tests.conftest import Made
from tests.recordings import beeps, write_sound

SAMPLE = 24
"""Of 48."""
STAGES = ("shard", "encode", "align", "index", "fuse")


class Planned(NamedTuple):
    """The small corpus planned with a sample and run, in a store of its own."""

    spec: Path
    said: str
    done: list[Done]
    store: FeatureStore


def said_of(spec: Path, count: int | None = None, prices: dict[str, float] | None = None) -> str:
    out = io.StringIO()
    show(load(spec), Console(file=out, width=240), count, prices or {})
    return out.getvalue()


def anew(made: Made, folder: Path, *changes: tuple[str, str]) -> Path:
    """The small spec with a store that is not there yet."""
    text = made.spec.read_text().replace(str(made.store), str(folder / "store"))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "spec.yaml").write_text(text)
    return folder / "spec.yaml"


@pytest.fixture(scope="module")
def planned(small: Made, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    folder = tmp_path_factory.mktemp("preflight")
    spec = anew(small, folder)
    said = said_of(spec, SAMPLE, {"cpu": 3600.0})
    done = Runner(load(spec), Console(quiet=True)).run(STAGES[:-1])
    return Planned(spec, said, done, FeatureStore(folder / "store"))


def test_a_plan_says_what_needs_no_encoding_and_leaves_no_store(small: Made, tmp_path: Path) -> None:
    said = [line.split() for line in said_of(anew(small, tmp_path)).splitlines()]
    size = sum(path.stat().st_size for path in (small.corpus / "sounds").iterdir())
    table = {tuple(line[:2]): line[2:] for line in said[12:] if len(line) > 2}
    assert table["shard", "planted"][:2] == ["6", "48"]
    assert float(table["shard", "planted"][2]) * 1000 == pytest.approx(size, rel=0.1)
    assert table["encode", "loud"] == ["6", "48", "24.6", "kB", "128", "float32", "a", "row"]
    assert table["index", "heard"][:3] == ["96", "3.07", "kB"]
    assert table["index", "heard"][-4:] == ["Flat", "of", "8", "dimensions"]
    assert not (tmp_path / "store").exists()


def test_what_a_sample_says_is_within_a_quarter_of_what_the_run_measures(planned: Planned) -> None:
    assert len(planned.done) == 8
    for step in planned.done:
        assert step.predicted is not None, step
        assert step.written_bytes == pytest.approx(step.predicted["written_bytes"], rel=0.25), step
        assert step.read_bytes == pytest.approx(step.predicted["read_bytes"], rel=0.25), step
        if step.stage in ("shard", "encode"):
            assert (step.shards, step.rows) == (6, 48)
            assert step.predicted["rows"] == 48
            assert step.predicted["shards"] == 6
            assert step.predicted["seconds"] > 0
            assert step.span_s is not None
        if step.stage == "index":
            card = planned.store.card("index", step.name)
            assert card["rows"] == pytest.approx(step.predicted["rows"], rel=0.25)
            assert f"{card['factory']} of {card['dim']} dimensions" in planned.said


def test_a_label_that_none_of_the_sample_has_is_not_measured(small: Made, tmp_path: Path) -> None:
    made = small.copy_to(tmp_path / "copy")
    manifest = made.corpus / "manifest.jsonl"
    rows = sorted(map(json.loads, manifest.read_text().splitlines()), key=lambda row: hash64(row["id"]))
    rows[-1]["rare"] = "x"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = anew(made, tmp_path, ("[short], label: label", "[short], label: rare"))
    said_of(spec, SAMPLE)
    heard, other = (forecast.read(load(spec).store, "fuse", name) for name in ("heard", "other"))
    assert heard is not None
    assert other is not None
    assert "written_bytes" in heard["predicted"]
    assert "written_bytes" not in other["predicted"]


def test_what_a_training_set_takes_is_within_a_quarter_of_what_one_took(planned: Planned, small: Made) -> None:
    for name in ("heard", "other"):
        kept = forecast.read(planned.store.storage, "fuse", name)
        assert kept is not None
        made = small.open().snapshot.entries("training", name)
        assert sum(entry.bytes for entry in made) == pytest.approx(kept["predicted"]["written_bytes"], rel=0.25)
        assert "measured" not in kept


def test_both_are_kept_in_the_store_and_no_digest_holds_them(planned: Planned, small: Made, tmp_path: Path) -> None:
    for step in planned.done:
        kept = forecast.read(planned.store.storage, step.stage, step.name)
        assert kept is not None
        assert kept["predicted"] == step.predicted
        assert kept["measured"] == json.loads(json.dumps(step.measured()))
    named = {entry.path for entry in planned.store.snapshot.all()}
    assert not [path for path in named if path.startswith("forecasts")]
    own = [entry for entry in small.open().snapshot.all() if entry.kind != "training"]
    assert own == planned.store.snapshot.all()
    metrics.write(tmp_path / "run.json", planned.done)
    told = json.loads((tmp_path / "run.json").read_text())
    assert [step["predicted"] for step in told] == [step.predicted for step in planned.done]
    text = "\n".join(metrics.prometheus(planned.done))
    shard = planned.done[0]
    assert f'braid_job_written_bytes{{stage="shard",name="planted"}} {shard.written_bytes}' in text


def test_a_forecast_of_another_recipe_is_put_beside_nothing(planned: Planned, tmp_path: Path) -> None:
    store = planned.store.storage
    before = forecast.read(store, "encode", "loud")
    assert forecast.keep(store, "encode", "loud", "another", {"rows": 1}) is None
    assert forecast.keep(store, "encode", "nobody", "another", {"rows": 1}) is None
    assert forecast.read(store, "encode", "loud") == before


def test_hours_and_price_are_those_of_the_cores(planned: Planned) -> None:
    kept = {step.name: step.predicted for step in planned.done if step.stage in ("shard", "encode")}
    hours = sum(each["hours"] for each in kept.values() if each)
    assert f"{hours:.3g} core hours: {3600 * hours:.3g} at 3600 an hour" in planned.said
    loud = kept["loud"]
    assert loud is not None
    assert loud["hours"] * 3600 == pytest.approx(loud["seconds"] * preflight.cores())


def test_a_gpu_that_is_not_here_is_told(small: Made, tmp_path: Path) -> None:
    view = "timbre: {field: sound, encoder: mfcc"
    spec = anew(small, tmp_path, (view, view + ", resources: {accelerator: nvidia-l4}"))
    if preflight.runtime.device() != "cpu":
        pytest.skip("there is a GPU")
    said = said_of(spec, 8, {"nvidia-l4": 0.7})
    assert (
        "views.timbre: there is no nvidia-l4 here, so its time and its price are those of this machine's cores" in said
    )
    assert "core hours: no price is given" in said


# What is sampled


class Listed:
    """A source of nothing but references."""

    def __init__(self, order: str, references: list[SampleRef]) -> None:
        self.order, self._references = order, references

    def references(self) -> Iterator[SampleRef]:
        return iter(self._references)


def listed(count: int, size: int = 1) -> list[SampleRef]:
    return [SampleRef(f"s{number}", "g", "e", size, "file", number, 0) for number in range(count)]


@given(st.integers(1, 60), st.integers(1, 60), st.randoms(use_true_random=False))
def test_a_sample_is_the_same_whatever_the_order_of_the_source(count: int, wanted: int, chance: random.Random) -> None:
    references = listed(count)
    shuffled = chance.sample(references, count)
    found = sample.chosen(Listed(BY_ID, references), wanted)  # type: ignore[arg-type]
    assert found == sample.chosen(Listed(BY_ID, shuffled), wanted)  # type: ignore[arg-type]
    assert {each.id for each in found} == {each.id for each in sorted(references, key=lambda r: hash64(r.id))[:wanted]}


@given(st.integers(1, 400), st.integers(1, 90))
def test_of_a_source_that_is_read_by_stretches_a_sample_is_a_few_of_them(count: int, wanted: int) -> None:
    references = listed(count)
    found = sample.chosen(Listed(BY_SOURCE, references), wanted)  # type: ignore[arg-type]
    places = sorted(each.offset for each in found)
    assert len(set(places)) == len(places) <= wanted
    runs = 1 + sum(second != first + 1 for first, second in itertools.pairwise(places))
    assert runs <= sample.STRETCHES
    first = min(references, key=lambda each: hash64(each.id))
    assert first in found
    assert len(places) >= min(wanted, -(-wanted // sample.STRETCHES), count - first.offset)


def test_where_few_have_a_value_for_a_view_more_are_drawn(small: Made, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (small.corpus / "manifest.jsonl").read_text().splitlines()]
    kept = [row["id"] for row in rows if row["sound_path"]][::6]
    made = [row | {"sound_path": row["sound_path"] and str(small.corpus / row["sound_path"])} for row in rows]
    lines = [json.dumps(row if row["id"] in kept else row | {"sound_path": None}) + "\n" for row in made]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    spec = anew(small, tmp_path, (f"{small.corpus}/manifest.jsonl", f"{tmp_path}/few.jsonl, root: {small.corpus}"))
    said_of(spec, 12)
    size = sum((small.corpus / row["sound_path"]).stat().st_size for row in rows if row["id"] in kept)
    kept_forecast = forecast.read(load(spec).store, "encode", "loud")
    assert kept_forecast is not None
    assert kept_forecast["predicted"]["read_bytes"] == size


def test_of_large_values_fewer_are_sampled() -> None:
    source = Listed(BY_ID, listed(50, sample.MAX_BYTES // 3))
    assert len(sample.chosen(source, 20)) == 3  # type: ignore[arg-type]
    assert len(sample.chosen(Listed(BY_ID, listed(5, sample.MAX_BYTES * 2)), 20)) == 1  # type: ignore[arg-type]


# What cannot fit


def test_a_store_without_room_is_refused(small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = anew(small, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda folder: usage._replace(free=30_000))
    with pytest.raises(
        InputError, match=r"store\.uri .*/store: 39\.\d kB are to be written and 30 kB are free there; make"
    ):
        show(load(spec), Console(quiet=True), None, {})


def test_an_index_that_is_built_in_more_memory_than_there_is_is_refused(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "memory_bytes", lambda: 50_000)
    with pytest.raises(
        InputError, match=r"indexes\.heard: building it takes about \d\d\d kB, and this machine has 50 kB;"
    ):
        show(load(anew(small, tmp_path)), Console(quiet=True), None, {})
    elsewhere = anew(small, tmp_path, ("encoder: log-mel", "encoder: log-mel, resources: {workers: 4}"))
    show(load(elsewhere), Console(quiet=True), None, {})


def test_a_model_larger_than_its_workers_is_refused(small: Made, tmp_path: Path) -> None:
    text = "views:\n  words: {field: caption, encoder: minilm-l6, resources: {min_ram: 50MB}}\n"
    spec = anew(small, tmp_path, ("views:\n  loud", text + "  loud"))
    with pytest.raises(
        InputError,
        match=r"views\.words: the weights of its encoder have 91\.\d MB, and its resources\.min_ram is 50MB, 50 MB; take",
    ):
        show(load(spec), Console(quiet=True), None, {})


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("512MiB", 512 * 2**20), ("1TiB", 2**40)])
def test_memory_is_read_with_its_unit(text: str, size: int) -> None:
    assert sizes.ram_bytes(text) == size


def test_an_index_with_more_lists_than_its_rows_train_is_refused(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes.check_factory("IVF64,Flat", 39 * 64)
    indexes.check_factory("HNSW32,Flat", 1)
    monkeypatch.setattr(indexes, "choose_factory", lambda rows, dim, recall: "IVF4,Flat")
    told = (
        r"indexes\.heard: index IVF4,Flat trains 4 lists, which takes 156 rows, 39 a list; there are 96: take at most 2"
    )
    with pytest.raises(InputError, match=told):
        show(load(anew(small, tmp_path)), Console(quiet=True), None, {})


@pytest.mark.parametrize(
    ("factory", "rows", "dim"),
    [("Flat", 2000, 16), ("HNSW32,Flat", 2000, 16), ("IVF16,Flat", 2000, 16)],
)
def test_an_index_has_the_size_that_is_told(factory: str, rows: int, dim: int) -> None:
    import numpy as np

    vectors = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    made = len(indexes.serialise(indexes.build(vectors, factory, 0)))
    assert indexes.size(factory, rows, dim) == pytest.approx(made, rel=0.02)


def recordings(folder: Path, windows: str, field: str = "{modality: audio, from: sound}") -> Path:
    """A spec of one recording of 2 s of sound, its view log-mel."""
    write_sound(folder / "a.wav", beeps(2))
    (folder / "recordings.jsonl").write_text(json.dumps({"id": "a", "sound": "a.wav"}) + "\n")
    (folder / "spec.yaml").write_text(
        f"""\
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: talks
  source: {{type: streams, path: {folder}/recordings.jsonl, windows: {windows}}}
  fields: {{sound: {field}}}
views:
  loud: {{field: sound, encoder: log-mel}}
"""
    )
    return folder / "spec.yaml"


def test_windows_shorter_than_an_encoder_takes_are_refused(tmp_path: Path) -> None:
    spec = recordings(tmp_path, "{every: 50ms}")
    told = r"corpus\.source\.windows: of 0\.05 s, and views\.loud fills sounds shorter than 0\.064 s up with silence"
    with pytest.raises(InputError, match=told):
        show(load(spec), Console(quiet=True), None, {})
    said = said_of(recordings(tmp_path, "{every: 100ms}"), 8)
    assert "encode  loud" in said


def test_windows_that_hold_nothing_of_a_stream_are_refused(tmp_path: Path) -> None:
    spec = recordings(tmp_path, "{every: 500ms}")
    (tmp_path / "recordings.jsonl").write_text(json.dumps({"id": "a", "sound": None}) + "\n")
    told = (
        r"corpus\.source\.windows: none of 1 sampled window holds a value of sound \(1 absent\) for views\.loud; make"
    )
    with pytest.raises(InputError, match=told):
        show(load(spec), Console(quiet=True), 8, {})


# Prices


def test_prices_are_read_from_a_spec_or_a_file(small: Made, tmp_path: Path) -> None:
    for name, text in (("p.yaml", "nvidia-l4: 0.70\ncpu: 1\n"), ("p.json", '{"nvidia-l4": 0.7, "cpu": 1}')):
        (tmp_path / name).write_text(text)
        assert read_prices(tmp_path / name) == {"nvidia-l4": 0.7, "cpu": 1}
    spec = load(anew(small, tmp_path, ("version: 1\n", "version: 1\nprices: {cpu: 0.05}\n")))
    assert spec.prices == {"cpu": 0.05}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "cpu: cheap",
            r"p\.yaml: line 1: cpu: 'cheap' is wrong: write a number from 0, without quotes; write what an hour costs",
        ),
        ("a: 1\ncpu: -1", r"line 2: cpu: -1 is wrong: write a number from 0"),
        ("cpu: .nan", r"line 1: cpu: NaN is wrong: write a number from 0"),
        ("cpu: true", r"line 1: cpu: true is wrong: write a number from 0"),
        ("NVIDIA L4: 1", r"line 1: 'NVIDIA L4': 'NVIDIA L4' is not a name; allowed: small letters"),
        ("cpu: [", r"p\.yaml: line \d: .*not YAML"),
        ("[1]", "no mapping of keys"),
    ],
)
def test_prices_that_are_none_are_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=told):
        read_prices(tmp_path / "p.yaml")
    with pytest.raises(InputError, match=r"--prices .*none\.yaml: cannot be read: No such file"):
        read_prices(tmp_path / "none.yaml")


def test_prices_of_a_spec_that_are_none_are_told_by_line(small: Made) -> None:
    text = small.spec.read_text().replace("version: 1\n", "version: 1\nprices: {cpu: cheap}\n")
    with pytest.raises(
        SpecError, match=r"line 2: prices\.cpu: 'cheap' is wrong: write a number from 0, without quotes"
    ):
        parse(text, "spec.yaml")


def test_the_command_takes_a_sample_and_prices(planned: Planned, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from jobs import cli

    (tmp_path / "p.yaml").write_text("cpu: 0.05\n")
    monkeypatch.setattr(
        "sys.argv", ["braid", "plan", str(planned.spec), "--sample", "8", "--prices", str(tmp_path / "p.yaml")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "2 of 10 steps to run" in said
    assert "fuse" in said
