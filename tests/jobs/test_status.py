"""What `braid status` says while a job runs, before the first commit, after a kill and at the end; and the logs beside it."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pytest
from rich.console import Console

from featurestore.errors import StoreError
from featurestore.storage import Storage
from jobs.run import Runner
from jobs.spec import load
from jobs.status import Progress, Seen, Status, watch
from pipelines.encode_plan import EncodeTask
from pipelines.log import FIELDS
from pipelines.runner import InFlight, Job, Result
from tests.conftest import Made
from tests.planted import write_planted

BRAID = str(Path(sys.executable).with_name("braid"))
SAMPLES = 48
SPEC = """\
version: 1
store: {{uri: {store}}}
corpus:
  name: planted
  source: {{type: manifest, path: {corpus}/manifest.jsonl}}
  columns: {{id: id, group: group}}
  fields:
    caption: {{modality: text, from: caption}}
    sound: {{modality: audio, from: sound_path}}
  shard_rows: 1
  failure_budget: 30%
views:
  loud: {{field: sound, encoder: log-mel}}
  timbre: {{field: sound, encoder: mfcc}}
spaces:
  heard: {{views: [loud, timbre], method: cca, dim: 8}}
"""
BAD = {"left": [b"", b"not a sound", b"nor this"], "right": [b"neither"]}
"""Folder -> what stands in place of so many sounds."""


def plant(folder: Path) -> Path:
    """A corpus whose bad sounds lie in two folders of their own, one sample a shard; its spec."""
    manifest = write_planted(folder / "corpus", SAMPLES)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    with_sound = iter([row for row in rows if row["sound_path"]])
    for name, contents in BAD.items():
        (folder / "corpus" / name).mkdir()
        for number, content in enumerate(contents):
            row = next(with_sound)
            row["sound_path"] = f"{name}/{number}.wav"
            (folder / "corpus" / row["sound_path"]).write_bytes(content)
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.format(store=folder / "store", corpus=folder / "corpus"))
    return spec


class Story:
    """A run that is stopped while it shards and while it encodes, killed there, and gone on with by two workers."""

    def __init__(self, folder: Path) -> None:
        self.spec, self.store = plant(folder), folder / "store"
        self.bare, self.told = Status(Storage.of(str(self.store))), Status(Storage.of(str(self.store)), load(self.spec))
        watched = folder / "watched.txt"
        with watched.open("w") as file:
            watch = subprocess.Popen([BRAID, "status", str(self.spec), "--watch", "--every", "0.1"], stdout=file)
        while watch.poll() is None and "heard" not in watched.read_text():
            time.sleep(0.02)
        first = self._start("run", self.spec)
        try:
            self._stop(first, "corpora/planted/*.parquet")
            self.sharding = self._look()
            shutil.move(self.store / "catalog", self.store.with_name("aside"))
            self.without_catalog = self._look()
            shutil.move(self.store.with_name("aside"), self.store / "catalog")
            first.send_signal(signal.SIGCONT)
            self._stop(first, "views/loud/*/*.parquet")
            self.encoding = self._look()
        finally:
            first.kill()
        self.first_said = first.communicate()
        self.killed = self._look()
        self.told_of_kill = subprocess.run(
            [BRAID, "status", self.spec], capture_output=True, text=True, timeout=60
        ).stdout
        self.figures = folder / "run.prom"
        second = self._start("run", self.spec, "--workers", "2", "--log-json", "--metrics", self.figures)
        self.second_said = second.communicate(timeout=120)
        self.second_status = second.returncode
        self.end = self._look()
        self.watch_status = watch.wait(timeout=60)
        self.watched = watched.read_text()

    def _start(self, *args: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen([BRAID, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _stop(self, run: subprocess.Popen[str], pattern: str) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.store.glob(pattern))) < 6:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, run.pid, os.WSTOPPED | os.WNOWAIT)

    def _look(self) -> tuple[Seen, Seen, Counter[str]]:
        """What is said of the store, of the spec, and how many shards lie there by folder."""
        files = Counter(path.relative_to(self.store).parts[1] for path in self.store.glob("corpora/planted/*.parquet"))
        files += Counter(path.relative_to(self.store).parts[1] for path in self.store.glob("views/*/*/*.parquet"))
        return self.bare.look(), self.told.look(), files


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("story"))


def step(seen: Seen, name: str, stage: str = "") -> Progress:
    (found,) = [each for each in seen.steps if each.name == name and stage in each.stage]
    return found


@pytest.mark.parametrize("when", ["sharding", "without_catalog"])
def test_shards_that_lie_written_are_counted_before_the_first_commit(story: Story, when: str) -> None:
    bare, told, files = getattr(story, when)
    assert bare.version == told.version == (0 if when == "sharding" else -1)
    for seen in (bare, told):
        assert step(seen, "planted", "shard") == ("shard", "planted", 0, files["planted"], SAMPLES, "")
        assert not seen.complete
    assert 6 <= files["planted"] <= SAMPLES
    assert step(told, "loud") == ("encode", "loud", 0, 0, SAMPLES, "")
    assert str(step(told, "heard")) == "waits for loud, timbre"


@pytest.mark.parametrize("when", ["encoding", "killed"])
def test_a_view_says_what_is_written_and_not_committed_while_it_runs_and_after_a_kill(story: Story, when: str) -> None:
    bare, told, files = getattr(story, when)
    assert bare.version == told.version == 1
    for seen in (bare, told):
        assert step(seen, "planted", "shard") == ("shard", "planted", SAMPLES, 0, SAMPLES, "")
        assert step(seen, "loud") == ("encode", "loud", 0, files["loud"], SAMPLES, "")
    assert 6 <= files["loud"] <= SAMPLES


def test_after_a_kill_status_says_how_to_go_on(story: Story) -> None:
    written = story.killed[2]["loud"]
    assert (
        f"encode loud: {written} of {SAMPLES} shards written, not committed: if no run is at it now, continue with "
        f"`braid run {story.spec}` (on any runner)\n"
    ) in story.told_of_kill
    assert f"encode  loud     {written} of {SAMPLES} shards written, not committed\n" in story.told_of_kill


def test_at_the_end_all_is_committed_and_the_watch_ends(story: Story) -> None:
    bare, told, files = story.end
    assert files == {"planted": SAMPLES, "loud": SAMPLES, "timbre": SAMPLES}
    assert told.complete
    assert not bare.complete
    assert sorted(bare.steps) == sorted(told.steps)
    assert story.watch_status == 0
    lines = story.watched.splitlines()
    assert lines[0].endswith("store, nothing committed yet")
    assert "shard   planted  not planned yet" in lines
    assert lines[-1] == "all that the spec names is committed"
    assert len([line for line in lines if "loud" in line and "of 48 shards" in line]) >= 2
    assert f"encode  timbre   {SAMPLES} of {SAMPLES} shards committed" in lines


def test_rejected_values_are_counted_by_folder_and_reason_as_shares_of_those_tried(story: Story) -> None:
    rows = [json.loads(line) for line in (story.spec.parent / "corpus" / "manifest.jsonl").read_text().splitlines()]
    sounds = sum(row["sound_path"] is not None for row in rows)
    captions = sum(row["caption"] is not None for row in rows)
    for seen in story.end[:2]:
        found = {each.name: (each.counts, each.tried) for each in seen.rejections}
        bad = Counter({("sound", "decode_error", "left"): 2, ("sound", "decode_error", "right"): 1})
        assert found == {
            "planted": (Counter({("sound", "empty", "left"): 1}), sounds + captions),
            "loud": (bad, sounds - 1),
            "timbre": (bad, sounds - 1),
        }
        lines = "\n".join(seen.lines())
        assert (
            f"rejected by encode loud: 3 of {sounds - 1} values ({3 / (sounds - 1):.2%})\n"
            f"  sound, decode_error: 3 ({3 / (sounds - 1):.2%})\n"
            f"    from left: 2 ({2 / (sounds - 1):.2%})\n"
            f"    from right: 1 ({1 / (sounds - 1):.2%})\n"
        ) in lines
    (early,) = [each for each in story.killed[1].rejections if each.stage == "shard"]
    assert (early.counts.total(), early.tried) == (1, sounds + captions)
    for seen in story.encoding[:2]:
        assert all(each.tried is None for each in seen.rejections if each.stage == "encode"), (
            "not known before the commit"
        )


def test_a_shard_is_never_read(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    begin: dict[str, Callable[..., Any]] = {"read": Storage.read, "open": Storage.open}
    for name, original in begin.items():

        def spy(self: Storage, key: str, original: Callable[..., Any] = original) -> Any:
            read.append(key)
            return original(self, key)

        monkeypatch.setattr(Storage, name, spy)
    storage, listed = Storage.of(str(story.store)), []
    list_folder = Storage.list
    monkeypatch.setattr(Storage, "list", lambda self, key="": listed.append(key) or list_folder(self, key))
    Status(storage).look()
    assert Counter(listed) == {"corpora": 1, "views": 1, "quarantine": 1}
    assert {key.partition("/")[0] for key in read} == {"catalog", "quarantine"}
    again = Status(storage, load(story.spec))
    again.look()
    listed.clear()
    read.clear()
    again.look()
    assert max(Counter(listed).values()) == 1
    assert not [key for key in read if key.startswith(("corpora", "views", "quarantine"))], read


def test_a_run_says_nothing_more_than_before_without_log_json(story: Story) -> None:
    out, err = story.first_said
    assert err == ""
    begun, done, then = out.splitlines()
    assert (begun, then) == ("shard planted: started, 48 samples", "encode loud: started, 48 samples")
    assert re.fullmatch(r"shard planted: done in [\d.]+ s, [\d.,]+ samples/s", done)


def lines_of(err: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in err.splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "message", *FIELDS}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    return lines


def test_every_event_is_one_line_of_json_with_its_job_stage_and_shard(story: Story) -> None:
    assert story.second_status == 0, story.second_said
    assert "━" not in story.second_said[0]
    lines = lines_of(story.second_said[1])
    for job in ("encode loud", "encode timbre", "align heard"):
        own = [line for line in lines if line["job"] == job]
        events = [line["event"] for line in own]
        assert (events[0], events[-2:]) == ("job begin", ["commit", "job end"])
        assert {(line["stage"], line["name"]) for line in own} == {tuple(job.split())}
        shards = [line["shard"] for line in own if line["shard"]]
        assert len(shards) == len(set(shards)) == (0 if job == "align heard" else SAMPLES)
    done = [line for line in lines if line["job"] == "encode loud" and line["shard"]]
    counts = Counter(line["event"] for line in done if line["values"] or line["event"] == "shard adopted")
    assert 0 < counts["shard adopted"] <= story.killed[2]["loud"]
    (end,) = [line for line in lines if (line["job"], line["event"]) == ("encode loud", "job end")]
    assert end["values"] == sum(line["values"] for line in done) == counts["shard done"]
    assert end["rejected"] == sum(line["rejected"] for line in done) == 3
    assert all(line["level"] == "info" and line["seconds"] is not None for line in done)
    assert end["seconds"] > max(line["seconds"] for line in done)
    one = done[-1]
    assert one["message"].startswith(f"encode loud: {one['event']} {one['shard']}: {one['values']} values, ")


def test_an_error_is_a_line_of_json_too(story: Story, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    text = story.spec.read_text().replace(str(story.store), str(tmp_path / "store"))
    spec.write_text(text.replace("30%", "0%").replace("shard_rows: 1", "shard_rows: 8"))
    ended = subprocess.run([BRAID, "shard", spec, "--log-json"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    lines = lines_of(ended.stderr)
    assert [line["event"] for line in lines[-2:]] == ["job failed", None]
    assert [line["level"] for line in lines[-2:]] == ["error", "error"]
    assert "more than the failure budget of 0.00%" in lines[-1]["message"]
    spec.write_text(text.replace("mfcc", "mfc"))
    ended = subprocess.run([BRAID, "shard", spec, "--log-json"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "did you mean 'mfcc'" in lines_of(ended.stderr)[0]["message"]


SAMPLE = re.compile(
    r'(?P<metric>[a-z_]+)\{(?P<labels>(?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\} (?P<value>-?\d+(\.\d+)?(e[+-]\d+)?)'
)


def samples_of(text: str) -> Iterator[tuple[str, str, float]]:
    """(metric, job, value) of each sample of Prometheus's text format; fails where it is not that."""
    assert text.endswith("\n")
    metric = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            metric = line.split(" ")[2]
        elif line.startswith("#"):
            assert line == f"# TYPE {metric} gauge"
        else:
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found["metric"] == metric
            labels = dict(re.findall(r'([a-z]+)="([^"]*)"', found["labels"]))
            yield metric, f"{labels['stage']} {labels['name']}", float(found["value"])


def test_figures_of_a_run_in_the_text_format_of_prometheus(story: Story) -> None:
    samples = list(samples_of(story.figures.read_text()))
    keys = [(metric, job) for metric, job, _ in samples]
    assert len(keys) == len(set(keys))
    figures = {(metric, job): value for metric, job, value in samples}
    ends = {line["job"]: line for line in lines_of(story.second_said[1]) if line["event"] == "job end"}
    assert ends.keys() == {job for metric, job, _ in samples if metric == "braid_job_seconds"}
    for job in ("encode loud", "encode timbre"):
        assert figures["braid_job_values", job] == ends[job]["values"]
        assert figures["braid_job_rejected", job] == 3
        assert figures["braid_job_shards", job] == SAMPLES
        assert 0 < figures["braid_job_longest_shard_seconds", job] <= figures["braid_job_busy_seconds", job]
    assert not list(story.figures.parent.glob(".run.prom*"))


@pytest.fixture
def copy(small: Made, tmp_path: Path) -> Made:
    return small.copy_to(tmp_path)


def spec_status(copy: Made) -> Seen:
    return Status(Storage.of(str(copy.store)), load(copy.spec)).look()


def test_an_ingest_that_was_cut_off_before_the_source_changed_is_nothing_to_go_on_with(copy: Made) -> None:
    for path in (copy.store / "corpora" / "planted").rglob("*.parquet"):
        first = path.name.partition("-")[0]
        shutil.copy(path, path.with_name(path.name.replace(first, "0" * 12)))
    seen = spec_status(copy)
    assert seen.complete
    (shown,) = [each for each in Status(Storage.of(str(copy.store))).look().steps if each.stage == "shard"]
    assert shown == ("shard", "planted", 6, 6, 12, ""), "without a spec nobody can say"


def test_a_grown_corpus_shows_what_the_new_ingest_has_written(copy: Made) -> None:
    manifest = copy.corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    new = [row | {"id": f"new/{number}"} for number, row in enumerate(rows[:9])]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows + new))
    catalog = shutil.copytree(copy.store / "catalog", copy.store.with_name("before"))
    Runner(load(copy.spec), Console(quiet=True)).run(("shard",))
    grown = spec_status(copy)
    assert step(grown, "planted", "shard") == ("shard", "planted", 8, 0, 8, "")
    assert step(grown, "loud") == ("encode", "loud", 6, 0, 8, "")
    assert str(step(grown, "loud")) == "6 of 8 shards committed"
    assert str(step(grown, "heard", "fuse")) == "waits for loud, timbre"
    shutil.rmtree(copy.store / "catalog")
    shutil.move(catalog, copy.store / "catalog")
    for seen in (spec_status(copy), Status(Storage.of(str(copy.store))).look()):
        assert step(seen, "planted", "shard") == ("shard", "planted", 6, 2, 8, "")
        assert str(step(seen, "planted", "shard")) == "8 of 8 shards written, 6 of them committed"
        assert not seen.complete


def test_a_lost_file_and_another_option_are_seen(copy: Made) -> None:
    (copy.store / copy.open().view("short").files()[0]).unlink()
    seen = spec_status(copy)
    assert step(seen, "short") == ("encode", "short", 5, 0, 6, "")
    assert str(step(seen, "other", "index")) == "waits for other, short"
    copy.spec.write_text(copy.spec.read_text().replace("n_mfcc: 8", "n_mfcc: 7"))
    assert step(spec_status(copy), "short") == ("encode", "short", 0, 0, 6, "")
    Runner(load(copy.spec), Console(quiet=True)).run(("encode",))
    assert step(spec_status(copy), "short") == ("encode", "short", 6, 0, 6, "")
    shown = Status(Storage.of(str(copy.store))).look().steps
    assert [str(each) for each in shown if each.name.startswith("short (recipe ")] == [
        "5 of 6 shards written, not committed"
    ]


def test_on_a_terminal_the_same_lines_are_drawn_anew(copy: Made) -> None:
    screen = io.StringIO()
    storage = Storage.of(str(copy.store))
    watch(Status(storage, load(copy.spec)), Console(file=screen, force_terminal=True, width=120), 0.1)
    assert "all that the spec names is committed" in screen.getvalue()
    _, *again = screen.getvalue().split("encode  loud")
    assert all("\x1b[1A\x1b[2K" in each for each in again[:-1]), "what stands there is erased first"
    assert "\x1b[?25h" in again[-1], "the cursor is back"


class Fails(NamedTuple):
    def open(self, threads: int) -> None: ...

    def do(self, opened: None, task: EncodeTask) -> Result:
        raise StoreError("no room")


def test_a_shard_that_fails_is_told_with_its_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="braid")  # whatever a command line run in this process has set
    task = EncodeTask("0001-00000-00000", "", 0, "", "", "", "")
    with pytest.raises(StoreError, match="no room"):
        (
            Job().pipeline
            | beam.Create([(0, task)]).with_output_types(tuple[int, EncodeTask])
            | beam.GroupByKey()
            | beam.ParDo(InFlight("encode loud", Fails()))
        ).pipeline.run()
    (record,) = [each for each in caplog.records if each.name == "braid.encode"]
    assert record.levelname == "ERROR"
    assert re.fullmatch(r"encode loud: shard failed 0001-00000-00000: [\d.]+ s: no room", record.getMessage())
    told: dict[str, Any] = vars(record)["braid"]
    assert (told["job"], told["shard"], told["event"]) == ("encode loud", "0001-00000-00000", "shard failed")
