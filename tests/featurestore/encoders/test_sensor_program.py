"""sensor-program: the numbers are the network's own, and a program that does not fit says how."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featurestore import encoders
from featurestore.encoders import contract
from featurestore.errors import DecodeError, InputError
from tests.checkpoints import SIDE, checkpoint

SHAPES = {"channels": contract.CHANNELS, "length": SIDE, "dim": 8}


def found(program: str | Path, **options: Any) -> encoders.BaseEncoder:
    return encoders.find("sensor-program", {"program": str(program), **SHAPES, **options})


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values.astype("<f4"), allow_pickle=False)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["pt2", "pt"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_vectors_are_the_networks_own(ending: str, count: int) -> None:
    windows = np.random.default_rng(count).normal(size=(count, SIDE, 3)).astype(np.float32)
    encoder = found(checkpoint("program") / f"gait.{ending}")
    made = encoder.encode([encoder.decode(npy(window)) for window in windows])
    network = torch.export.load(checkpoint("program") / "gait.pt2").module()
    expected = network(torch.from_numpy(windows.transpose(0, 2, 1).copy()))
    np.testing.assert_allclose(made, expected.detach().numpy(), atol=1e-5)


def test_layouts_are_told_apart(tmp_path: Path) -> None:
    class Last(torch.nn.Module):
        def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return windows[:, -1, :], windows

    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Last(), (torch.zeros(2, 5, 3),), dynamic_shapes=dynamic)
    torch.export.save(exported, tmp_path / "last.pt2")
    encoder = found(tmp_path / "last.pt2", length=5, dim=3, layout="time_first")
    windows = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(encoder.encode(list(windows)), windows[:, -1])


def test_a_window_comes_to_its_length_along_straight_lines() -> None:
    encoder = found(checkpoint("program") / "gait.pt2", length=5)
    line = np.stack([np.linspace(0, 8, 9), np.linspace(3, 1, 9), np.full(9, 4.0)], axis=1)
    expected = np.stack([np.linspace(0, 8, 5), np.linspace(3, 1, 5), np.full(5, 4.0)], axis=1)
    np.testing.assert_allclose(encoder.decode(npy(line)), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.decode(npy(line[:1])), np.repeat(line[:1], 5, axis=0))
    with pytest.raises(DecodeError, match="2 channels; this encoder was told 3"):
        encoder.decode(npy(line[:, :2]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dim": 9}, r"it gave \[1, 8\] where \[1, 9\] was due; correct options.dim"),
        ({"channels": 4}, r"it takes no \[1, 4, 32\]: .*correct options.channels, length and layout"),
        ({"layout": "time_first"}, r"it takes no \[1, 32, 3\]"),
    ],
)
def test_shapes_that_are_not_the_programs_are_told_when_it_is_loaded(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        found(checkpoint("program") / "gait.pt2", **options).load()


def test_a_program_of_one_batch_size_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Flatten(), (torch.zeros(1, 3, SIDE),)), tmp_path / "one.pt2")
    with pytest.raises(InputError, match=r"it takes no \[2, 3, 32\]: .*dynamic batch"):
        found(tmp_path / "one.pt2", dim=3 * SIDE).load()


def test_what_is_no_program_or_not_there_is_told(tmp_path: Path) -> None:
    for ending in ("pt2", "pt"):
        (tmp_path / f"text.{ending}").write_text("not a program")
        with pytest.raises(
            InputError, match=rf"text.{ending}' is none for encoder 'sensor-program': it cannot be read"
        ):
            found(tmp_path / f"text.{ending}").load()
    with pytest.raises(InputError, match="no such file"):
        found(tmp_path / "gone.pt2")
    with pytest.raises(InputError, match="program"):
        found(tmp_path / "pickle.pkl")


def test_a_card_runs_no_program_that_nobody_trusts(monkeypatch: pytest.MonkeyPatch) -> None:
    program = str(checkpoint("program") / "gait.pt2")
    card = found(program).card()
    monkeypatch.setenv("BRAID_PROGRAMS", "other.pt2")
    with pytest.raises(InputError, match="which is code: put that into the environment variable BRAID_PROGRAMS"):
        encoders.find_as(card)
    monkeypatch.setenv("BRAID_PROGRAMS", f"other.pt2,{program}")
    assert encoders.find_as(card).fingerprint() == encoders.fingerprint_of(card)


def test_its_bytes_are_in_the_fingerprint_and_its_place_is_not(tmp_path: Path) -> None:
    program = checkpoint("program") / "gait.pt2"
    (tmp_path / "moved.pt2").write_bytes(program.read_bytes())
    assert found(tmp_path / "moved.pt2").fingerprint() == found(program).fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found(checkpoint("program") / "gait.pt").fingerprint() != found(program).fingerprint()
