"""MFCC statistics of a sound: mean and standard deviation over time of its cepstral coefficients."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, EncoderOptions, mel

__all__ = ["Encoder", "Options"]

N_MELS = 128


class Options(EncoderOptions):
    """20 coefficients of 128 bands: librosa's defaults."""

    n_mfcc: int = Field(
        default=20, ge=1, le=N_MELS, description="coefficients; the vector has twice as many components"
    )


class Encoder(BaseEncoder):
    """Values are float32 [samples] at 16 kHz: cut at 30 s, zero-padded to one window of 64 ms."""

    key = "mfcc"
    modalities = ("audio",)
    licence = "Apache-2.0"
    source = "Davis and Mermelstein 1980; librosa 0.11's definition"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    shortest_s = mel.N_FFT / mel.SAMPLE_RATE
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.dim = 2 * options.n_mfcc

    def preprocessing(self) -> dict[str, Any]:
        """Return the spectrogram's constants and the number of its bands."""
        return {**mel.SPECTROGRAM, "n_mels": N_MELS, "dct": "type 2, orthonormal"}

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode, mix to mono, resample, cut or pad."""
        return mel.pad_to_window(media.decode_audio(raw, mel.SAMPLE_RATE, mel.MAX_SECONDS))

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Describe each sound by itself: no padding, so a batch changes nothing."""
        rows = [mel.statistics(mel.mfcc_TK(value, N_MELS, self.options.n_mfcc)) for value in values]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)
