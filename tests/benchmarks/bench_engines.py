"""The local runner: what `--workers 2` gives, what Beam costs over a bare loop, how soon a command starts, what skew costs.

The corpus is long Vorbis sounds under log-mel: nine tenths of the work is decoding, so a shard takes one core for as long as
its sounds are long, and no memory bus or model is shared. Whatever else the machine did meanwhile stands in the detail:
`others_cores` is how many cores were busy with something that is not the command measured.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from rich.console import Console

from featurestore import encoders
from featurestore.catalog import Catalog
from featurestore.corpora import QUARANTINE
from featurestore.encoders.runtime import tune_process
from featurestore.row_order import BY_ID
from featurestore.storage import Storage
from featurestore.views import VIEW
from jobs import plan as planning
from jobs import spec as specs
from jobs.run import Runner
from pipelines import encode, encode_plan
from pipelines.cuts import Cut
from pipelines.runner import InFlight, Job, Scope, changes
from pipelines.sources import SampleRef
from pipelines.workers import Workers
from tests.benchmarks import Bar, at_least, at_most
from tests.planted import planted_spec, write_planted

CORES = sorted(os.sched_getaffinity(0))[:2]
ROUNDS, STARTS = 3, 5
RATE, LONG_S, SHORT_S, VARIANTS = 48_000, 30.0, 0.1, 16
SAMPLES, SHARD_ROWS = 600, 8
"""About 40 s of one core, so that what both have to start and to import is seen."""

OVERHEAD_SAMPLES = 300
SKEWED_SHARDS, SKEWED_ROWS = 31, 128
BRAID = Path(sys.executable).with_name("braid")
SPEC = """
version: 1
store: {{uri: {store}}}
corpus:
  name: sounds
  source: {{type: manifest, path: {manifest}}}
  columns: {{id: id}}
  fields: {{sound: {{modality: audio, from: sound}}}}
  shard_rows: {shard_rows}
views: {{sound: {{field: sound, encoder: log-mel}}}}
"""


def bars() -> list[Bar]:
    """The bars of this area that are about time on two cores."""
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    # A process inherits these two cores and no more, however many the machine has.
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        return [
            *_start(folder / "start"),
            *_two_workers(folder / "speed"),
            *_overhead(folder / "overhead"),
            *_skew(folder / "skew"),
        ]
    finally:
        os.sched_setaffinity(0, all_cores)
        shutil.rmtree(folder)


class Made(NamedTuple):
    """A corpus, its store with shards and no view, and the spec of a store."""

    manifest: Path
    store: Path
    shard_rows: int

    def spec_of(self, store: Path) -> str:
        return SPEC.format(store=store, manifest=self.manifest, shard_rows=self.shard_rows)


class Ran(NamedTuple):
    """A command's wall time, the CPU seconds of all its processes, and what the machine was busy with besides."""

    wall_s: float
    cpu_s: float
    others_cores: float


def _run(*command: str, cores: Sequence[int] = CORES) -> Ran:
    """Runs `braid` on some cores."""
    begun, busy, own = time.monotonic(), _busy_s(), _children_s()
    subprocess.run(
        [BRAID, *command],
        check=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    wall, cpu = time.monotonic() - begun, _children_s() - own
    return Ran(wall, cpu, max(0.0, (_busy_s() - busy - cpu) / wall))


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _busy_s() -> float:
    """CPU seconds that all of the machine's processes took: user, nice, system, interrupts, and what was stolen."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=10)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _start(folder: Path) -> list[Bar]:
    """What a person waits for: files in the page cache, a store of 160 samples, 3 views, 2 spaces, 2 indexes, a set."""
    write_planted(folder / "corpus")
    spec = folder / "spec.yaml"
    spec.write_text(planted_spec(folder / "corpus", folder / "store"))
    Runner(specs.load(spec), Console(quiet=True)).run()
    found = []
    for name, command, bar in (("braid --help", ["--help"], 0.5), ("braid plan", ["plan", str(spec)], 2.0)):
        _run(*command)
        load = os.getloadavg()[0]
        runs = sorted(_run(*command) for _ in range(STARTS))
        middle = runs[STARTS // 2]
        detail = {
            "best_s": round(runs[0].wall_s, 2),
            "cpu_s": round(min(run.cpu_s for run in runs), 2),
            "others_cores": round(middle.others_cores, 2),
            "load": load,
        }
        found.append(at_most("engines", f"{name}: seconds, median of {STARTS}", middle.wall_s, bar, **detail))
    return found


def _two_workers(folder: Path) -> list[Bar]:
    """One worker on one core against `--workers 2` on two: one decode thread each."""
    made = _sharded(folder, [LONG_S] * SAMPLES, SHARD_ROWS)
    load = os.getloadavg()[0]
    cases = {1: CORES[:1], 2: CORES}
    rounds: list[dict[int, tuple[float, Ran]]] = []
    for number in range(ROUNDS):
        ran = {}
        for workers, cores in cases.items():
            spec, store = _copy(made, folder / f"{number}-{workers}")
            took = _run("encode", str(spec), "--workers", str(workers), cores=cores)
            ran[workers] = _steady(store), took
            shutil.rmtree(store)
        rounds.append(ran)
    decode, forward = _decode_and_forward_s()
    detail = {
        "decode_share": round(decode / (decode + forward), 3),
        "decode_ms": round(decode * 1000, 1),
        "wall_s": [[round(each[workers][1].wall_s, 1) for workers in cases] for each in rounds],
        "cpu_s": [[round(each[workers][1].cpu_s, 1) for workers in cases] for each in rounds],
        "cores_used": [
            [round(each[workers][1].cpu_s / each[workers][1].wall_s, 2) for workers in cases] for each in rounds
        ],
        "others_cores": [[round(each[workers][1].others_cores, 2) for workers in cases] for each in rounds],
        "shards_per_s": [[round(each[workers][0], 2) for workers in cases] for each in rounds],
        "load": load,
    }
    detail["ideal_by_cpu"] = [round(2 * each[1][1].cpu_s / each[2][1].cpu_s, 2) for each in rounds]
    steady = [each[2][0] / each[1][0] for each in rounds]
    whole = [each[1][1].wall_s / each[2][1].wall_s for each in rounds]
    return [
        at_least(
            "engines", "--workers 2 over 1, steady", statistics.median(steady), 1.7, rounds=_rounded(steady), **detail
        ),
        at_least("engines", "--workers 2 over 1, with start-up", statistics.median(whole), 1.5, rounds=_rounded(whole)),
    ]


def _steady(store: Path) -> float:
    """Shards per second between the first shard that was done and the last."""
    done = sorted(path.stat().st_mtime for path in store.glob("views/*/*/*.parquet"))
    if len(done) != len(list(store.glob("corpora/*/*.tar"))):
        raise RuntimeError(f"{len(done)} shards were encoded")
    return (len(done) - 1) / (done[-1] - done[0])


def _decode_and_forward_s() -> tuple[float, float]:
    """CPU seconds a sound of decoding and of encoding what was decoded, by one thread."""
    encoder, raws = encoders.find("log-mel"), [_sound(LONG_S, variant) for variant in range(VARIANTS)]
    begun = time.thread_time()
    values = [encoder.decode(raw) for raw in raws]
    decoded = time.thread_time()
    with ThreadPoolExecutor(1) as pool:
        forward = pool.submit(_one_thread_s, lambda: encoder.encode(values)).result()
    return (decoded - begun) / VARIANTS, forward / VARIANTS


def _one_thread_s(work: Callable[[], Any]) -> float:
    import torch

    torch.set_num_threads(1)
    work()
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def _overhead(folder: Path) -> list[Bar]:
    """The encode job on Beam's local runner against the same calls in a bare loop and the same commit; both load the model."""
    made = _sharded(folder, [LONG_S] * OVERHEAD_SAMPLES, SHARD_ROWS)
    load, rounds = os.getloadavg()[0], []
    tune_process()  # imports torch
    for number in range(ROUNDS):
        took, digests = {}, set()
        for name, carry_out in (("bare", _bare), ("beam", _beam)):
            spec, store = _copy(made, folder / f"{number}-{name}")
            loaded = specs.load(spec)
            (planned,) = planning.view_plans(loaded)
            tasks = encode_plan.stale(Catalog(loaded.store).snapshot(), planned, {})
            begun, cpu = time.monotonic(), time.process_time()
            carry_out(loaded.store, planned, tasks)
            took[name] = time.monotonic() - begun, time.process_time() - cpu
            digests.add(Catalog(loaded.store).snapshot().digest())
            shutil.rmtree(store)
        if len(digests) > 1:
            raise RuntimeError("the bare loop published something else than the job")
        rounds.append(took)
    ratios = [each["bare"][0] / each["beam"][0] for each in rounds]
    return [
        at_least(
            "engines",
            "bare loop over Beam's local runner, encode",
            statistics.median(ratios),
            0.9,
            rounds=_rounded(ratios),
            cpu=_rounded([each["bare"][1] / each["beam"][1] for each in rounds]),
            bare_s=_rounded([each["bare"][0] for each in rounds]),
            beam_s=_rounded([each["beam"][0] for each in rounds]),
            shards=len(tasks),
            load=load,
        )
    ]


def _bare(storage: Storage, planned: encode_plan.ViewPlan, tasks: list[encode_plan.EncodeTask]) -> None:
    work = encode.EncodeWork(storage.to_json(), planned, Catalog(storage).snapshot().version)
    opened = work.open(len(CORES))
    with ThreadPoolExecutor(InFlight.SHARDS_IN_FLIGHT) as pool:
        results = list(pool.map(lambda task: work.do(opened, task), tasks))
    scopes = [
        Scope(VIEW, planned.name, planned.recipe),
        Scope(QUARANTINE, f"encode/{planned.name}", planned.recipe),
    ]
    Catalog(storage).commit(f"encode {planned.name}", changes(results, scopes, whole=False))


def _beam(storage: Storage, planned: encode_plan.ViewPlan, tasks: list[encode_plan.EncodeTask]) -> None:
    job = Job()
    encode.build(job, storage, planned, tasks, 0.0, Catalog(storage).snapshot().version)
    job.run()


def _skew(folder: Path) -> list[Bar]:
    """One shard of about 50 times the others' work, `--workers 2`: from the first shard's begin to the last one's end.

    The largest shard's own time is of the same run, so that whatever slows the machine meanwhile slows both.
    """
    made = _sharded(folder, _one_long_shard(), SKEWED_ROWS)
    load, alone = os.getloadavg()[0], _one_by_one(made, folder / "alone")
    rounds = []
    for number in range(ROUNDS):
        spec, store = _copy(made, folder / f"{number}")
        (done,) = Runner(specs.load(spec), Console(quiet=True), workers=2).run(("encode",))
        shutil.rmtree(store)
        span, longest = done.span_s or 0.0, done.longest_s or 0.0
        rounds.append((span / max(longest, sum(alone) / 2), span, longest))
    ratio, span, longest = sorted(rounds)[ROUNDS // 2]
    return [
        at_most(
            "engines",
            "skew: span over max(largest shard, work / 2), --workers 2",
            ratio,
            1.15,
            rounds=_rounded([each[0] for each in rounds]),
            span_s=round(span, 2),
            largest_s=round(longest, 2),
            largest_alone_s=round(alone[-1], 2),
            work_alone_s=round(sum(alone), 2),
            largest_over_median=round(alone[-1] / statistics.median(alone), 1),
            shards=len(alone),
            load=load,
        )
    ]


def _one_by_one(made: Made, folder: Path) -> list[float]:
    """Seconds of each shard, shortest first, in one worker process with nothing beside it."""
    spec, store = _copy(made, folder)
    loaded = specs.load(spec)
    (planned,) = planning.view_plans(loaded)
    snapshot = Catalog(loaded.store).snapshot()
    tasks = encode_plan.stale(snapshot, planned, {})
    work = encode.EncodeWork(loaded.store.to_json(), planned, snapshot.version)
    alone = Workers(work, processes=1, at_once=1, threads=1)
    seconds = []
    try:
        for task in tasks:
            begun = time.monotonic()
            alone.do(task)
            seconds.append(time.monotonic() - begun)
    finally:
        alone.close()
    shutil.rmtree(store)
    return sorted(seconds)


def _one_long_shard() -> list[float]:
    """Seconds of each sample's sound: long in one shard, by the pipeline's own cut; sounds are small, so it cuts by rows."""
    references = [
        SampleRef(_id(number), _id(number), "", 0, "", number, 0) for number in range(SKEWED_SHARDS * SKEWED_ROWS)
    ]
    shards = list(Cut(BY_ID, SKEWED_ROWS, 1).shards(references))
    long = {reference.id for reference in shards[SKEWED_SHARDS // 2]}
    return [LONG_S if _id(number) in long else SHORT_S for number in range(len(references))]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def _sharded(folder: Path, seconds: list[float], shard_rows: int) -> Made:
    """A store of sounds of these lengths, each a group of its own."""
    folder.mkdir(parents=True)
    for length in sorted(set(seconds)):
        for variant in range(VARIANTS):
            (folder / f"{length}-{variant}.ogg").write_bytes(_sound(length, variant))
    made = Made(folder / "manifest.jsonl", folder / "store", shard_rows)
    lines = [{"id": _id(each), "sound": f"{length}-{each % VARIANTS}.ogg"} for each, length in enumerate(seconds)]
    made.manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Runner(specs.parse(made.spec_of(made.store), "benchmark"), Console(quiet=True)).run(("shard",))
    return made


def _copy(made: Made, folder: Path) -> tuple[Path, Path]:
    """A spec and a store of its own. Files are linked: none of a store is ever changed."""
    spec, store = folder / "spec.yaml", folder / "store"
    shutil.copytree(made.store, store, copy_function=os.link)
    spec.write_text(made.spec_of(store))
    return spec, store


def _id(number: int) -> str:
    return f"s{number:05d}"


@lru_cache(maxsize=2 * VARIANTS)
def _sound(seconds: float, variant: int) -> bytes:
    """Vorbis, stereo: a wandering tone in noise."""
    random, t = np.random.default_rng(variant), np.arange(round(seconds * RATE)) / RATE
    tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * variant) * (t + 0.01 * np.sin(t)))
    out = io.BytesIO()
    soundfile.write(
        out, tone[:, None] + 0.05 * random.standard_normal((len(t), 2)), RATE, format="OGG", subtype="VORBIS"
    )
    return out.getvalue()
