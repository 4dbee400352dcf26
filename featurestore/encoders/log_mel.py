"""Log-mel statistics of a sound: mean and standard deviation over time of its mel bands in decibels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, EncoderOptions, mel

__all__ = ["Encoder", "Options"]


class Options(EncoderOptions):
    """64 bands are what audio networks take at 16 kHz."""

    n_mels: int = Field(default=64, ge=8, le=128, description="mel bands; the vector has twice as many components")


class Encoder(BaseEncoder):
    """Values are float32 [samples] at 16 kHz: cut at 30 s, zero-padded to one window of 64 ms."""

    key = "log-mel"
    modalities = ("audio",)
    licence = "Apache-2.0"
    source = "Slaney 1998, Auditory Toolbox; librosa 0.11's definition"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    shortest_s = mel.N_FFT / mel.SAMPLE_RATE
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.dim = 2 * options.n_mels

    def preprocessing(self) -> dict[str, Any]:
        """Return the spectrogram's constants."""
        return dict(mel.SPECTROGRAM)

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode, mix to mono, resample, cut or pad."""
        return mel.pad_to_window(media.decode_audio(raw, mel.SAMPLE_RATE, mel.MAX_SECONDS))

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Describe each sound by itself: no padding, so a batch changes nothing."""
        rows = [mel.statistics(mel.log_mel_TM(value, self.options.n_mels)) for value in values]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)
