"""Mel spectrograms in torch, as librosa defines them: what `log-mel` and `mfcc` are made of.

Legend: N samples, F frequency bins, T frames, M mel bands, K cepstral coefficients.
Source: Slaney, Auditory Toolbox (1998), mel scale and area normalisation; the figures are librosa 0.11's
`feature.melspectrogram`, `power_to_db` and `feature.mfcc` with centred, zero-padded frames.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["SPECTROGRAM", "log_mel_TM", "mel_filters_MF", "mfcc_TK", "pad_to_window", "statistics"]

SAMPLE_RATE = 16_000
N_FFT = 1024
HOP = 256
# Longer audio is cut here: the first half minute says what a sound is.
MAX_SECONDS = 30.0
FLOOR_POWER = 1e-10
RANGE_DB = 80.0
SPECTROGRAM = {
    "sample_rate": SAMPLE_RATE,
    "n_fft": N_FFT,
    "hop": HOP,
    "window": "hann, periodic",
    "mel": "slaney",
    "floor_power": FLOOR_POWER,
    "range_db": RANGE_DB,
    "max_seconds": MAX_SECONDS,
    "resampler": "soxr HQ",
    "statistics": "mean, population standard deviation over frames",
}


def pad_to_window(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Append zeros to audio that is shorter than one window."""
    return np.pad(samples, (0, max(0, N_FFT - len(samples))))


def log_mel_TM(samples: NDArray[np.float32], n_mels: int) -> "torch.Tensor":
    """Compute the mel power spectrogram in decibels, no more than 80 dB below its loudest point.

    Args:
        samples: float32 [N] at 16 kHz.
        n_mels: M.

    Returns:
        float32 [T, M], dB relative to a power of 1.
    """
    import torch

    with torch.inference_mode():
        spectrum_FT = torch.stft(
            torch.from_numpy(samples),
            N_FFT,
            HOP,
            window=torch.hann_window(N_FFT),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        filters_MF = torch.from_numpy(mel_filters_MF(n_mels))
        power_MT = filters_MF @ (spectrum_FT.real.square() + spectrum_FT.imag.square())
        decibel_MT = 10.0 * power_MT.clamp_min(FLOOR_POWER).log10()
        return decibel_MT.clamp_min(decibel_MT.max() - RANGE_DB).T


def mfcc_TK(samples: NDArray[np.float32], n_mels: int, n_mfcc: int) -> "torch.Tensor":
    """Compute mel-frequency cepstral coefficients: the orthonormal DCT-II of the log-mel bands, lowest first.

    Returns:
        float32 [T, K].
    """
    import torch

    return log_mel_TM(samples, n_mels) @ torch.from_numpy(_dct_MK(n_mels, n_mfcc))


def statistics(frames: "torch.Tensor") -> NDArray[np.float32]:
    """Return mean and population standard deviation over the frames of [T, X], as float32 [2 X]."""
    import torch

    with torch.inference_mode():
        result: NDArray[np.float32] = torch.cat([frames.mean(0), frames.std(0, correction=0)]).numpy()
        return result


@lru_cache(maxsize=8)
def mel_filters_MF(n_mels: int) -> NDArray[np.float32]:
    """Return triangular filters of equal area, evenly spaced on Slaney's mel scale from 0 Hz to half the rate."""
    bins_F = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(SAMPLE_RATE / 2), n_mels + 2))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins_F - low) / (centre - low)
    falling = (high - bins_F) / (high - centre)
    return (np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)).astype(np.float32)


# Slaney's scale: linear below 1 kHz (15 mel), then 27 steps for each factor of 6.4.
_HZ_PER_MEL, _KNEE_HZ, _KNEE_MEL, _LOG_STEP = 200.0 / 3.0, 1000.0, 15.0, math.log(6.4) / 27.0


def _hz_to_mel(hertz: float) -> float:
    return hertz / _HZ_PER_MEL if hertz < _KNEE_HZ else _KNEE_MEL + math.log(hertz / _KNEE_HZ) / _LOG_STEP


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < _KNEE_MEL, mel * _HZ_PER_MEL, _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)))


@lru_cache(maxsize=8)
def _dct_MK(n_mels: int, n_mfcc: int) -> NDArray[np.float32]:
    band, order = np.arange(n_mels)[:, None], np.arange(n_mfcc)[None, :]
    basis: NDArray[np.float64] = np.cos(np.pi / n_mels * (band + 0.5) * order) * math.sqrt(2.0 / n_mels)
    basis[:, 0] /= math.sqrt(2.0)
    cosines: NDArray[np.float32] = basis.astype(np.float32)
    return cosines
