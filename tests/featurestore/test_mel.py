"""The spectrogram's numbers are librosa's."""

import librosa
import numpy as np
import pytest

from featurestore.encoders import mel


def sound(seconds: float) -> np.ndarray:
    """A rising tone in noise, with a silent end: bands far above and below the 80 dB floor."""
    time = np.arange(round(seconds * mel.SAMPLE_RATE)) / mel.SAMPLE_RATE
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    wave = np.sin(2 * np.pi * (200 + 900 * time) * time) + noise
    return np.where(time < 0.8 * seconds, wave, 0.0).astype(np.float32)


@pytest.mark.parametrize("n_mels", [20, 64, 128])
def test_mel_filters_are_librosas(n_mels: int) -> None:
    expected = librosa.filters.mel(sr=mel.SAMPLE_RATE, n_fft=mel.N_FFT, n_mels=n_mels)
    np.testing.assert_allclose(mel.mel_filters_MF(n_mels), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("seconds", [0.064, 0.5, 2.0])
def test_log_mel_is_librosas(seconds: float) -> None:
    power = librosa.feature.melspectrogram(
        y=sound(seconds), sr=mel.SAMPLE_RATE, n_fft=mel.N_FFT, hop_length=mel.HOP, n_mels=64
    )
    expected = librosa.power_to_db(power)
    np.testing.assert_allclose(mel.log_mel_TM(sound(seconds), 64).numpy(), expected.T, atol=2e-3)


@pytest.mark.parametrize("seconds", [0.064, 0.5, 2.0])
def test_mfcc_is_librosas(seconds: float) -> None:
    expected = librosa.feature.mfcc(
        y=sound(seconds), sr=mel.SAMPLE_RATE, n_fft=mel.N_FFT, hop_length=mel.HOP, n_mfcc=20
    )
    np.testing.assert_allclose(mel.mfcc_TK(sound(seconds), 128, 20).numpy(), expected.T, atol=5e-3)


def test_statistics_are_mean_and_deviation_over_time() -> None:
    frames = mel.log_mel_TM(sound(1.0), 64)
    expected = np.concatenate([frames.numpy().mean(0), frames.numpy().std(0)])
    np.testing.assert_allclose(mel.statistics(frames), expected, rtol=1e-5, atol=1e-5)
