"""Weights that are converted once on a machine: the numbers of a model converted as it is loaded, mapped by every process."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import ViTConfig, ViTModel

from featurestore import encoders
from featurestore.encoders import contract, converted
from featurestore.errors import InputError
from tests.checkpoints import checkpoint
from tests.contract.test_encoders import CASES, found, loaded

QUICK = ("clip/clip/text", "hf-audio/wav2vec2", "hf-image/resnet")
KINDS = [
    pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in CASES
    if case.startswith(("clap", "clip", "hf-"))
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "braid" / "converted"


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is converted."""
    done: list[Path] = []
    plain = converted._place
    monkeypatch.setattr(converted, "_place", lambda save, target: done.append(target) or plain(save, target))
    return done


def vectors(encoder: encoders.BaseEncoder) -> np.ndarray:
    return encoder.encode([encoder.decode(raw) for raw in contract.examples(encoder.modality)[:3]])


@pytest.mark.parametrize("case", KINDS)
def test_a_copy_in_another_dtype_gives_the_same_bytes(case: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vectors(found(case, dtype="bfloat16"))
    (folder,) = (each for each in cache.iterdir() if each.is_dir())
    assert not converted.differs(folder, "bfloat16")
    again = vectors(found(case, dtype="bfloat16"))
    monkeypatch.setattr(converted, "differs", lambda folder, dtype: False)
    direct = vectors(found(case, dtype="bfloat16"))
    assert made.tobytes() == again.tobytes() == direct.tobytes()
    whole = vectors(loaded(case))
    assert 0 < np.linalg.norm(made - whole) / np.linalg.norm(whole) < 0.05


def test_a_checkpoint_of_the_dtype_is_mapped_as_it_is(cache: Path) -> None:
    encoders.find("hf-image", {"checkpoint": str(checkpoint("vit"))}).load()
    assert not cache.exists()
    assert converted.differs(checkpoint("vit"), "bfloat16")
    assert not converted.differs(checkpoint("vit"), "float32")


def test_where_nothing_can_be_written_the_process_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert vectors(found("hf-image/vit", dtype="bfloat16")).shape == (3, 32)


@pytest.mark.usefixtures("cache")
def test_of_several_at_once_one_converts(saved: list[Path]) -> None:
    options = {"checkpoint": str(checkpoint("bert")), "dtype": "float16"}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: encoders.find("hf-text", options).load(), range(4)))
    assert len(saved) == 1
    # Transformers sets it while it loads; what is made without a dtype would be float16 ever after.
    assert torch.get_default_dtype() == torch.float32


def test_a_checkpoint_that_is_not_whole_is_told_and_not_converted(cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "bert"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights: encoder\.layer\.1"):
        encoders.find("hf-text", {"checkpoint": str(folder), "dtype": "bfloat16"}).load()
    assert not [each for each in cache.iterdir() if each.is_dir()]


PRIVATE = """
import re, sys
from pathlib import Path
from featurestore import encoders
from featurestore.encoders.runtime import tune_process

def anonymous():
    return int(re.search(r"^Anonymous:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])

import transformers.models.vit.modeling_vit
tune_process()
encoder = encoders.find("hf-image", {"checkpoint": sys.argv[1], "dtype": "bfloat16"})
before = anonymous()
encoder.load()
sum(int(each.view(-1)[:1].float()) * 0 for each in encoder.load().parameters())
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="of Linux alone")
def test_a_process_holds_no_copy_of_its_own(cache: Path, tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(hidden_size=768, num_hidden_layers=6, patch_size=32))
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    weights_kib = sum(each.numel() * 2 for each in model.parameters()) >> 10

    def private_kib() -> int:
        done = subprocess.run(
            [sys.executable, "-c", PRIVATE, str(tmp_path / "vit")], capture_output=True, text=True, check=True
        )
        (last,) = re.findall(r"^\d+$", done.stdout, re.MULTILINE)
        return int(last)

    assert private_kib() < weights_kib / 4
