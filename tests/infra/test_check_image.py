"""infra/docker/check_image.py, the last step of an image's build, as far as a checkout can carry it out."""

import importlib.util
from types import ModuleType

import pytest

from featurestore import encoders
from tests.infra.dockerfile import ROOT


@pytest.fixture(scope="module")
def check_image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_image", ROOT / "infra" / "docker" / "check_image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python_is_whole(check_image: ModuleType) -> None:
    check_image.check_python()


def test_every_encoder_that_needs_no_option_is_loaded(
    check_image: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_image.check_weights()
    loaded = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert loaded == ["efficientnet-lite0", "log-mel", "mfcc", "minilm-l6", "video-frames"]
    assert set(loaded) < set(encoders.keys())


def test_an_image_that_would_ask_a_hub_is_refused(check_image: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(AssertionError, match="HF_HUB_OFFLINE is not set"):
        check_image.check_weights()


def test_the_wrong_build_of_torch_is_refused_with_its_mend(
    check_image: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check_image.check_torch("gpu")
    with pytest.raises(SystemExit, match=r"is the CUDA build; pass --build-arg TORCH_WHEELS=…"):
        check_image.check_torch("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    check_image.check_torch("cpu")
    with pytest.raises(AssertionError, match="is built without CUDA"):
        check_image.check_torch("gpu")
