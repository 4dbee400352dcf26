"""What the encode benchmarks share: values, checkpoints of true size, CPU time, and the rate of a whole job."""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os import sched_getaffinity
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from jobs.run import Runner
from jobs.spec import Spec, load

CORES = len(sched_getaffinity(0))
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "large",
    "old",
    "bird",
    "dog",
    "house",
    "tree",
    "in",
    "under",
    "near",
    "water",
    "of",
    "and",
)


def images(count: int, side: int = 400) -> Iterator[bytes]:
    """Photograph-like JPEGs: smooth colour fields with grain."""
    for number in range(count):
        random = np.random.default_rng(number)
        small = random.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-12, 12, image.shape, dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def captions(count: int) -> Iterator[bytes]:
    """Of 4 to 200 words, most of them short: lognormal with a median of 12, as captions off the web are."""
    random = np.random.default_rng(0)
    for length in np.clip(random.lognormal(np.log(12), 0.8, count), 4, 200).astype(int):
        yield " ".join(random.choice(WORDS, length)).encode()


def sounds(count: int, rate: int = 16_000) -> Iterator[bytes]:
    """OGG Vorbis of 1 to 3 s: a voice-like sum of harmonics that rises and falls."""
    import soundfile

    random = np.random.default_rng(0)
    for seconds in random.uniform(1, 3, count):
        time_N = np.arange(round(seconds * rate)) / rate
        pitch = random.uniform(90, 240) * (1 + 0.1 * np.sin(2 * np.pi * 3 * time_N))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        wave = sum(np.sin(each * phase) / each for each in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_N))
        buffer = io.BytesIO()
        soundfile.write(buffer, (0.2 * wave).astype(np.float32), rate, format="OGG", subtype="VORBIS")
        yield buffer.getvalue()


def vit_b32(folder: Path) -> Path:
    """A ViT-B/32, 88 million weights drawn at random, as transformers saves one."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    ViTModel(ViTConfig(patch_size=32)).save_pretrained(folder / "vit-b32")
    ViTImageProcessorPil().save_pretrained(folder / "vit-b32")
    return folder / "vit-b32"


def wav2vec2_base(folder: Path) -> Path:
    """A wav2vec 2.0 base, 94 million weights drawn at random, as transformers saves one."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    Wav2Vec2Model(Wav2Vec2Config()).save_pretrained(folder / "wav2vec2")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder / "wav2vec2")
    return folder / "wav2vec2"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is there while a benchmark runs."""
    folder = Path(mkdtemp(prefix="braid-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def cpu_s(work: Callable[[], Any], threads: int = CORES) -> float:
    """CPU seconds of a work that so many threads do at once, each the whole of it."""
    with ThreadPoolExecutor(threads) as pool:
        begun = time.process_time()
        list(pool.map(lambda _: work(), range(threads)))
        return (time.process_time() - begun) / threads


def sharded(
    folder: Path, raws: Sequence[bytes], modality: str, encoder: str, options: dict[str, Any], rows: int
) -> Spec:
    """A store of values in shards, and the spec that encodes them, which is `spec.yaml` of the folder."""
    ending = {"image": "jpg", "audio": "ogg", "text": "txt"}[modality]
    lines = []
    for number, raw in enumerate(raws):
        name = f"{number:05d}.{ending}"
        (folder / name).write_bytes(raw)
        lines.append(json.dumps({"id": f"{number:05d}", "value": name}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    read = ", read: file" if modality == "text" else ""
    (folder / "spec.yaml").write_text(f"""
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: bench
  source: {{type: manifest, path: {folder}/manifest.jsonl}}
  columns: {{id: id}}
  fields: {{value: {{modality: {modality}, from: value{read}}}}}
  shard_rows: {rows}
views: {{value: {{field: value, encoder: {encoder}, options: {json.dumps(options)}}}}}
""")
    spec = load(folder / "spec.yaml")
    Runner(spec, Console(quiet=True)).run(("shard",))
    return spec


def rate(spec: Spec) -> tuple[float, float]:
    """Values per second of the encode job, from its first shard's start to its last one's end, model loaded; and CPU seconds
    per value of the whole of it.
    """
    shutil.rmtree(Path(spec.store.root) / "views", ignore_errors=True)
    begun = time.process_time()
    (step,) = Runner(spec, Console(quiet=True)).run(("encode",))
    assert step.values is not None
    assert step.span_s is not None
    return step.values / step.span_s, (time.process_time() - begun) / step.values
