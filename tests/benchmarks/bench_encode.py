"""Encode end to end against what the cores can do: images per second of the Beam job over cores / (F + D).

F and D are CPU seconds per image of the bare forward and the bare decoding, measured in this process under the allocator
settings that the pipeline runs with, on all the cores that it runs on (two busy cores are each a little slower than one
beside an idle one, which no pipeline can help; that figure is printed too). F is the best of batches 1 to 64 and both memory
layouts: a slow F would make any pipeline look good. Each round measures F, D and the job after each other, because a shared
machine's speed drifts; the value is the median of the rounds' ratios.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from featurestore import encoders
from featurestore.encoders import efficientnet_lite0
from featurestore.encoders.runtime import tune_process
from jobs import spec as specs
from jobs.run import Runner
from tests.benchmarks import Bar, at_least

CORES = len(os.sched_getaffinity(0))
IMAGES, SAMPLE, SIDE = 1024, 128, 400
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 5
BAR = 0.93


def bars() -> list[Bar]:
    """The bar of this area: EfficientNet-lite0 on JPEG."""
    tune_process()
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    try:
        files = _images(folder)
        raw = [path.read_bytes() for path in files[:SAMPLE]]
        encoder = encoders.find("efficientnet-lite0")
        forwards = _forwards([encoder.decode(each) for each in raw])
        by_case = {case: min(_cpu_s(work) for _ in range(2)) for case, work in forwards.items()}
        best = min(by_case, key=lambda case: by_case[case])
        alone = min(_cpu_s(forwards[best], threads=1) for _ in range(2))
        rounds = []
        for _ in range(ROUNDS):
            forward = _cpu_s(forwards[best])
            decode = _cpu_s(lambda: [encoder.decode(each) for each in raw])
            rate = _pipeline_rate(folder, files)
            rounds.append((rate * (forward + decode) / CORES, rate, forward, decode))
    finally:
        shutil.rmtree(folder)
    ratio, rate, forward, decode = sorted(rounds)[ROUNDS // 2]
    return [
        at_least(
            "encode",
            "efficientnet-lite0 end to end over F/(F+D)",
            ratio,
            BAR,
            images_per_s=round(rate, 1),
            forward_cpu_ms=round(forward * 1000, 2),
            decode_cpu_ms=round(decode * 1000, 2),
            bare_forward_per_s=round(CORES / forward, 1),
            cores=CORES,
            ratios=[round(each[0], 3) for each in rounds],
            best=best,
            forward_cpu_ms_by_case={case: round(spent * 1000, 2) for case, spent in by_case.items()},
            best_beside_an_idle_core_cpu_ms=round(alone * 1000, 2),
        )
    ]


def _images(folder: Path) -> list[Path]:
    """Photograph-like JPEGs: smooth colour fields with grain."""
    files = []
    for number in range(IMAGES):
        random = np.random.default_rng(number)
        small = random.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-12, 12, image.shape, dtype=np.int16)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        files.append(path)
    return files


def _forwards(values: list[Any]) -> dict[str, Callable[[], Any]]:
    """Per layout and batch: the bare model over all the values."""
    import torch

    (weights,) = encoders.find("efficientnet-lite0").weights().values()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    images = (torch.from_numpy(np.stack(values)).permute(0, 3, 1, 2).float() - 127) / 128

    def forward(model: Any, batches: Any) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    cases: dict[str, Callable[[], Any]] = {}
    for layout, memory in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        model = efficientnet_lite0.build(state).eval().to(memory_format=memory)
        for size in BATCHES:
            batches = [batch.contiguous(memory_format=memory) for batch in images.split(size)]
            cases[f"{layout}, batch {size}"] = lambda model=model, batches=batches: forward(model, batches)
    return cases


def _cpu_s(work: Callable[[], Any], threads: int = CORES) -> float:
    """CPU seconds per value of work over `SAMPLE` values, done by so many threads at once."""
    with ThreadPoolExecutor(threads) as pool:
        begun = time.process_time()
        list(pool.map(lambda _: work(), range(threads)))
        return (time.process_time() - begun) / threads / SAMPLE


def _pipeline_rate(folder: Path, files: list[Path]) -> float:
    """Images per second of the encode job, from its first shard's start to its last one's end, model loaded."""
    manifest, store = folder / "manifest.jsonl", folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    manifest.write_text("".join(json.dumps({"id": path.stem, "image": path.name}) + "\n" for path in files))
    text = f"""
version: 1
store: {{uri: {store}}}
corpus:
  name: bench
  source: {{type: manifest, path: {manifest}}}
  columns: {{id: id}}
  fields: {{image: {{modality: image, from: image}}}}
  shard_rows: 64
views: {{image: {{field: image, encoder: efficientnet-lite0}}}}
"""
    done = Runner(specs.parse(text, "benchmark"), Console(quiet=True)).run(("shard", "encode"))
    encode = next(step for step in done if step.stage == "encode")
    return encode.values / encode.span_s
