"""sensor: each feature on a signal whose figure is known."""

import io

import numpy as np
import pytest

from featurestore import encoders
from featurestore.encoders.sensor import STATISTICS
from featurestore.errors import DecodeError


def described(values: np.ndarray, bands: int = 8) -> dict[str, float]:
    encoder = encoders.find("sensor", {"channels": 1, "bands": bands})
    (row,) = encoder.encode([values.astype(np.float32).reshape(-1, 1)])
    return dict(zip([*STATISTICS, *(f"band{each}" for each in range(bands))], row.tolist(), strict=True))


def test_a_sine_has_its_power_in_its_band_and_the_figures_of_a_sine() -> None:
    count = 800
    found = described(3 + 2 * np.sin(2 * np.pi * 0.15 * np.arange(count)))  # 0.15 of the rate: 0.3 of its half
    assert found["mean"] == pytest.approx(3, abs=1e-3)
    assert found["std"] == pytest.approx(2 / np.sqrt(2), abs=1e-3)
    assert found["rms"] == pytest.approx(np.sqrt(9 + 2), abs=1e-3)
    assert found["kurtosis"] == pytest.approx(1.5, abs=1e-2)
    assert found["crossings"] == pytest.approx(0.3, abs=5e-3)
    assert found["centroid"] == pytest.approx(0.3, abs=5e-3)
    assert found["band2"] == pytest.approx(1, abs=1e-2)


def test_a_straight_line_has_its_slope_and_noise_fills_all_bands() -> None:
    assert described(np.linspace(1, 5, 101))["slope"] == pytest.approx(4, abs=1e-4)
    found = described(np.random.default_rng(0).normal(size=20_000))
    assert [found[f"band{each}"] for each in range(8)] == pytest.approx([1 / 8] * 8, abs=0.01)


def test_another_unit_moves_the_scale_and_nothing_else() -> None:
    wave = 3 + np.sin(2 * np.pi * 5 * np.arange(128) / 128) + 0.1 * np.random.default_rng(0).normal(size=128)
    plain, small = described(wave), described(1e-9 * wave)
    scaled = ("mean", "std", "min", "q25", "median", "q75", "max", "rms", "slope")
    for name, value in plain.items():
        if name == "log_power":
            assert small[name] == pytest.approx(value - 2 * np.log(1e9), rel=1e-4)
        else:
            assert small[name] == pytest.approx(value * (1e-9 if name in scaled else 1), rel=1e-3, abs=1e-12)
    assert plain["band0"] > 0.5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_constant_or_a_short_window_has_finite_figures(count: int) -> None:
    found = described(np.full(count, 7.0))
    assert np.isfinite(list(found.values())).all()
    assert (found["mean"], found["std"], found["slope"]) == (7, 0, 0)


def test_channels_follow_each_other_and_do_not_mix() -> None:
    values = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    encoder = encoders.find("sensor", {"channels": 2})
    (both,) = encoder.encode([values])
    alone = [encoders.find("sensor", {"channels": 1}).encode([values[:, [each]]])[0] for each in (0, 1)]
    np.testing.assert_allclose(both, np.concatenate(alone), rtol=1e-5, atol=1e-6)


def test_another_number_of_channels_is_rejected() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 2), "<f4"), allow_pickle=False)
    with pytest.raises(DecodeError, match="2 channels; this encoder was told 3"):
        encoders.find("sensor", {"channels": 3}).decode(buffer.getvalue())
