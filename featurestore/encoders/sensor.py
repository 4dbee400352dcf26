"""Windows of sensors: statistics and spectra of each channel.

Per channel: mean, standard deviation, minimum, quartiles, maximum, root mean square, skewness, kurtosis, slope (of a straight
line, from the window's beginning to its end), share of steps that cross the mean; of the periodogram (mean taken away, Hann
window) its entropy, its centroid and the logarithm of its power; then the shares of that power in `bands` bands of equal width
from 0 to half the sampling rate. What a constant channel has no figure for is 0, and its power is `FLOOR`. A channel is
constant where it strays from its mean by less than float32 resolves of its values, whatever its unit: teslas are 1e-5.

Legend: N readings, C channels, F frequencies, K features of a channel.
Source: the features of the UCI HAR data set (Anguita et al. 2013), by name; Welch's periodogram of one segment.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, EncoderOptions
from featurestore.errors import DecodeError

__all__ = ["STATISTICS", "Encoder", "Options"]

STATISTICS = (
    *("mean", "std", "min", "q25", "median", "q75", "max", "rms", "skewness", "kurtosis", "slope", "crossings"),
    *("entropy", "centroid", "log_power"),
)
FLOOR = 1e-38
"""About the least that float32 holds in full."""
RESOLUTION = 2.0**-23


class Options(EncoderOptions):
    """Bands 8: an eighth of the frequencies each."""

    channels: int = Field(ge=1, le=1024, description="channels of every window")
    bands: int = Field(default=8, ge=1, le=256, description="bands of the spectrum")


class Encoder(BaseEncoder):
    """Values are float32 [N, C]."""

    key = "sensor"
    modalities = ("sensor",)
    licence = "Apache-2.0"
    source = "Anguita et al. 2013; Welch 1967"
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.dim = options.channels * (len(STATISTICS) + options.bands)

    def preprocessing(self) -> dict[str, Any]:
        """Return the features of a channel, in order; channels follow each other."""
        return {
            "features": [*STATISTICS, *(f"band{each}" for each in range(self.options.bands))],
            "window": "hann, periodic",
            "constant": f"deviates by less than {RESOLUTION} of the largest",
        }

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode readings; `unsupported_format` where they have another number of channels."""
        values = media.decode_sensor(raw)
        if values.shape[1] != self.options.channels:
            raise DecodeError(
                "unsupported_format", f"{values.shape[1]} channels; this encoder was told {self.options.channels}"
            )
        return values

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Describe each window by itself."""
        rows = [_features_CK(value.astype(np.float64), self.options.bands).ravel() for value in values]
        return np.stack(rows).astype(np.float32) if rows else np.empty((0, self.dim), np.float32)


def _features_CK(values_NC: NDArray[np.float64], bands: int) -> NDArray[np.float64]:
    mean_C, std_C = values_NC.mean(0), values_NC.std(0)
    varies_C = std_C > RESOLUTION * np.abs(values_NC).max(0)
    centred_NC = np.where(varies_C, values_NC - mean_C, 0.0)
    z_NC = np.divide(centred_NC, std_C, out=np.zeros_like(centred_NC), where=varies_C)
    time_N = np.linspace(-0.5, 0.5, len(values_NC)) if len(values_NC) > 1 else np.zeros(1)
    slope_C = (time_N @ centred_NC) / max((time_N**2).sum(), FLOOR)
    crossings_C = (np.diff(np.signbit(centred_NC), axis=0).mean(0)) if len(values_NC) > 1 else np.zeros_like(mean_C)
    quantiles = np.quantile(values_NC, (0, 0.25, 0.5, 0.75, 1), axis=0)
    own = [mean_C, std_C, *quantiles, np.sqrt((values_NC**2).mean(0)), (z_NC**3).mean(0), (z_NC**4).mean(0)]
    return np.stack([*own, slope_C, crossings_C, *_spectrum(centred_NC, bands)], axis=1)


def _spectrum(centred_NC: NDArray[np.float64], bands: int) -> list[NDArray[np.float64]]:
    """Entropy, centroid and log power of each channel, then the share of each band."""
    count = len(centred_NC)
    window_N1 = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(count) / count))[:, None]
    power_FC = np.abs(np.fft.rfft(centred_NC * window_N1, axis=0)) ** 2 / count
    total_C = power_FC.sum(0)
    share_FC = np.divide(power_FC, total_C, out=np.zeros_like(power_FC), where=total_C > 0)
    # 0 is the mean, 1 half the sampling rate.
    frequency_F = np.arange(len(power_FC)) / max(count / 2, 1)
    band_F = np.minimum((frequency_F * bands).astype(int), bands - 1)
    shares = [share_FC[band_F == band].sum(0) for band in range(bands)]
    entropy_C = -sum(share * np.log(np.maximum(share, FLOOR)) for share in shares)
    return [np.asarray(entropy_C), frequency_F @ share_FC, np.log(np.maximum(total_C, FLOOR)), *shares]
