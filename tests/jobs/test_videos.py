"""Videos from each plain source to vectors: the same ones, and a damaged one in quarantine."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from featurestore import encoders
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import init
from jobs import spec as specs
from jobs.report import rejected
from jobs.run import Runner
from tests import videos
from tests.checkpoints import checkpoint

WHOLE = {f"v{count}": videos.video([100 * each for each in range(count)], "mp4") for count in (1, 4, 9)}
VALUES = {**WHOLE, "cut": WHOLE["v9"][:-1]}


def _folder(path: Path) -> str:
    for name, raw in VALUES.items():
        (path / f"{name}.mp4").write_bytes(raw)
    return f'source: {{type: folder, path: "{path}"}}\n  fields: {{clip: {{modality: video, from: "{{id}}.mp4"}}}}'


def _manifest(path: Path) -> str:
    _folder(path)
    rows = [json.dumps({"id": name, "file": f"{name}.mp4"}) + "\n" for name in VALUES]
    (path / "m.jsonl").write_text("".join(rows))
    return f'source: {{type: manifest, path: "{path}/m.jsonl"}}\n  fields: {{clip: {{modality: video, from: file}}}}'


def _webdataset(path: Path) -> str:
    with tarfile.open(path / "00000.tar", "w") as tar:
        for name, raw in VALUES.items():
            member = tarfile.TarInfo(f"{name}.mp4")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return f'source: {{type: webdataset, path: "{path}/00000.tar"}}\n  fields: {{clip: {{modality: video, from: mp4}}}}'


def _parquet(path: Path) -> str:
    pq.write_table(pa.table({"id": list(VALUES), "raw": list(VALUES.values())}), path / "v.parquet")
    return f'source: {{type: parquet, path: "{path}/v.parquet"}}\n  fields: {{clip: {{modality: video, from: raw}}}}'


@pytest.mark.parametrize("written", [_folder, _manifest, _webdataset, _parquet])
def test_each_source_gives_the_same_vectors_and_the_cut_one_is_told(
    written: Callable[[Path], str], tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    options = {"image_encoder": "hf-image", "image_options": {"checkpoint": str(checkpoint("vit"))}, "frames": 4}
    text = (
        f"version: 1\nstore: {{uri: {tmp_path}/store}}\ncorpus:\n  name: clips\n  {written(tmp_path / 'corpus')}\n"
        f"  failure_budget: 100%\nviews: {{clip: {{field: clip, encoder: video-frames, options: {json.dumps(options)}}}}}\n"
    )
    Runner(specs.parse(text, "spec.yaml"), Console(quiet=True)).run(("shard", "encode"), None)
    store = FeatureStore(tmp_path / "store")
    rows = store.view("clip").take(list(WHOLE))
    encoder = encoders.find("video-frames", options)
    expected = encoder.encode([encoder.decode(raw) for raw in WHOLE.values()])
    made = np.stack([np.asarray(each) for each in rows["embedding"].to_pylist()])
    np.testing.assert_allclose(made, expected, atol=1e-4)
    ((row),) = rejected(store, "clips")
    assert (row["id"], row["field"], row["reason"]) == ("cut", "clip", "decode_error")
    assert not verify(store.storage).findings


def test_a_folder_of_videos_and_texts_is_guessed_with_a_view_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for name, raw in WHOLE.items():
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(raw)
        (tmp_path / "clips" / f"{name}.txt").write_text(f"the text of {name}")
    output, _ = init.write(str(tmp_path / "clips"), None)
    tree = yaml.safe_load(output.read_text())
    assert tree["corpus"]["fields"]["video"] == {"modality": "video", "from": "{id}.mp4"}
    assert tree["views"]["video"] == {"field": "video", "encoder": "video-frames"}
    specs.load(output)
