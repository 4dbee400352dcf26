"""What runs on a GPU gives what a CPU gives, and how values come to it and vectors back: by the same code on either."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from featurestore.encoders import BaseEncoder, contract, runtime
from tests.contract.test_encoders import CASES, found

MODELS = [
    case
    for case in CASES
    if case.partition("/")[0] in ("clap", "clip", "efficientnet-lite0", "minilm-l6") or "hf-" in case
]
HALF = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


def vectors(encoder: BaseEncoder) -> np.ndarray:
    return encoder.encode([encoder.decode(raw) for raw in contract.examples(encoder.modality)[:5]])


@pytest.fixture
def cpu_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Everything is on the CPU until this patch is undone."""
    runtime.tune_process()
    monkeypatch.setattr(runtime, "device", lambda: "cpu")
    yield monkeypatch
    runtime.device.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", MODELS)
def test_a_gpu_gives_what_a_cpu_gives(case: str, dtype: str, cpu_first: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {} if case in ("efficientnet-lite0", "minilm-l6") else {"dtype": dtype}
    if dtype != "float32" and not options:
        pytest.skip("it has one dtype")
    expected = vectors(found(case))
    cpu_first.undo()
    assert runtime.device() == "cuda"
    encoder = found(case, **options)
    turns = runtime.turns()

    def encode(_: int) -> np.ndarray:
        with turns():
            return vectors(encoder)

    encoder.load()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(encode, range(8)))
    assert {each.tobytes() for each in made} == {made[0].tobytes()}, "the same bytes on either stream"
    off = np.linalg.norm(made[0] - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert off.max() < HALF[dtype]


@pytest.mark.gpu
def test_a_gpu_is_waited_for_by_an_event_and_from_pinned_memory() -> None:
    batch = runtime.stacked([np.arange(6, dtype=np.float32)] * 3)
    assert batch.is_pinned()
    there = runtime.to_device(batch, torch.bfloat16)
    assert (there.device.type, there.dtype) == ("cuda", torch.bfloat16)
    assert np.array_equal(runtime.to_host(there), batch.numpy())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_values_come_to_the_device_and_back_as_they_are(dtype: Any) -> None:
    arrays = [np.arange(start, start + 12).reshape(3, 4).astype(dtype) for start in range(5)]
    there = runtime.to_device(runtime.stacked(arrays))
    assert there.numpy().dtype == dtype
    back = runtime.to_host(there)
    assert back.dtype == np.float32
    assert np.array_equal(back, np.stack(arrays))
    assert runtime.to_device(runtime.stacked(arrays), torch.bfloat16).dtype == torch.bfloat16


def test_on_a_cpu_nobody_waits_for_a_turn() -> None:
    assert runtime.turns() is nullcontext


def test_a_turn_is_given_back_whatever_happens_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "device", lambda: "cuda")
    monkeypatch.setattr(runtime, "_streams", lambda count: [nullcontext(each) for each in range(count)])
    turns = runtime.turns()
    for _ in range(3 * runtime.ON_GPU):
        with pytest.raises(RuntimeError, match="out of it"), turns():
            raise RuntimeError("out of it")


@pytest.mark.parametrize("case", ["hf-image/resnet", "efficientnet-lite0"])
def test_convolutions_lie_channels_last(case: str) -> None:
    convolutions = [each for each in found(case).load().modules() if isinstance(each, torch.nn.Conv2d)]
    assert convolutions
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in convolutions)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["clip/clip/image", "hf-text/bert", "hf-audio/whisper"])
def test_what_the_encoder_calls_is_compiled_and_gives_the_same(case: str) -> None:
    compiled = torch._dynamo.utils.counters["frames"]
    before = compiled["ok"]
    made = vectors(found(case, compiled=True))
    assert compiled["ok"] > before
    np.testing.assert_allclose(made, vectors(found(case)), atol=1e-5)
