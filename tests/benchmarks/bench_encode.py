"""Encode end to end against what the cores can do: images per second of the Beam job over 1 / (F + D) per core.

F and D are CPU seconds per image of the bare forward and the bare decoding, measured in this process under the allocator
settings that the pipeline runs with. F is the best of batches 1 to 64 and both memory layouts: a slow F would make any
pipeline look good.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
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

IMAGES = 768
SIDE = 400
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3
BAR = 0.93


def bars() -> list[Bar]:
    """The bar of this area: EfficientNet-lite0 on JPEG."""
    tune_process()
    folder = Path(tempfile.mkdtemp(prefix="braid-bench-"))
    try:
        files = _images(folder)
        encoder = encoders.find("efficientnet-lite0")
        raw = [path.read_bytes() for path in files[:128]]
        forward, table = _forward_cpu_s(encoder, [encoder.decode(each) for each in raw])
        decode = min(_cpu_s(lambda: [encoder.decode(each) for each in raw]) for _ in range(ROUNDS)) / len(raw)
        rates = [_pipeline_rate(folder, files) for _ in range(ROUNDS)]
    finally:
        shutil.rmtree(folder)
    cores = len(os.sched_getaffinity(0))
    ideal = cores / (forward + decode)
    rate = statistics.median(rates)
    return [
        at_least(
            "encode",
            "efficientnet-lite0 end to end over F/(F+D)",
            rate / ideal,
            BAR,
            images_per_s=round(rate, 1),
            rounds=[round(each, 1) for each in rates],
            ideal_per_s=round(ideal, 1),
            cores=cores,
            forward_cpu_ms=round(forward * 1000, 2),
            decode_cpu_ms=round(decode * 1000, 2),
            bare_forward_per_s_per_core=table,
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


def _cpu_s(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _forward_cpu_s(encoder: Any, values: list[Any]) -> tuple[float, dict[str, float]]:
    """The least CPU seconds per image over batches and layouts, and images per CPU second of each."""
    import torch

    state = torch.load(next(iter(encoder.weights().values())), map_location="cpu", weights_only=True)
    table = {}
    for layout, memory in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        model = efficientnet_lite0.build(state).eval().to(memory_format=memory)
        for size in BATCHES:
            images = (
                torch.from_numpy(np.stack(values[:size])).permute(0, 3, 1, 2).float().contiguous(memory_format=memory)
            )
            table[f"{layout}, batch {size}"] = round(_forward_rate(model, images), 1)
    return 1 / max(table.values()), table


def _forward_rate(model: Any, images: Any) -> float:
    """Images per CPU second of one batch, the best of some rounds."""
    import torch

    repeats = max(1, 96 // len(images))

    def work() -> None:
        for _ in range(repeats):
            model(images)

    with torch.inference_mode():
        model(images)
        return repeats * len(images) / min(_cpu_s(work) for _ in range(ROUNDS))


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
