"""A person's own network for windows of sensors: a program of `torch.export` (`.pt2`) or TorchScript (`.pt`), as one file.

    exported = torch.export.export(model.eval(), (torch.zeros(2, 6, 128),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(exported, "gait.pt2")

    views: {gait: {field: imu, encoder: sensor-program, options: {program: gait.pt2, channels: 6, length: 128, dim: 64}}}

The program takes float32 [batch, channels, length], as 1-d convolutions do (`layout: time_first` for [batch, length, channels],
as recurrent and attention layers do), of any batch, and gives [batch, dim], or a tuple that begins with it. A window of another
number of readings is brought to `length` along straight lines between its readings; the first and the last stay.

**A program is code**: torch runs what its file says, and reading it may run more (torch.export evaluates expressions and
unpickles). So a spec's program is as trusted as the spec; that of a store's card is opened only where the environment variable
BRAID_PROGRAMS names it.

Legend: B windows, N readings, C channels.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, TrainedOptions, runtime
from featurestore.encoders.checkpoints import file_of
from featurestore.errors import DecodeError, InputError

__all__ = ["Encoder", "Options"]


class Options(TrainedOptions):
    """Which program, and the shapes that it was made for."""

    program: str = Field(
        pattern=r"\.pt2?$", description="a file of torch.export (.pt2) or TorchScript (.pt), also s3://…"
    )
    channels: int = Field(ge=1, le=1024, description="channels of every window")
    length: int = Field(ge=1, le=1_000_000, description="readings of a window that the program takes")
    dim: int = Field(ge=1, le=65_536, description="length of a vector that it gives")
    layout: Literal["channels_first", "time_first"] = Field(
        default="channels_first", description="[batch, channels, length] or [batch, length, channels]"
    )


class Encoder(BaseEncoder):
    """Values are float32 [length, C]."""

    key = "sensor-program"
    modalities = ("sensor",)
    licence = "its owner's"
    source = "a program of torch.export or TorchScript"
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "torch")
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.dim = options.dim
        self.path = file_of(options.program)

    def address(self) -> dict[str, Any]:
        """Say where the file is."""
        return {"program": self.options.program}

    def weights(self) -> dict[str, Path]:
        """Return the one file."""
        return {"program": self.path}

    def preprocessing(self) -> dict[str, Any]:
        """Return how a window comes to its length."""
        return {"resampled": "linear, ends kept"}

    def decode(self, raw: bytes) -> NDArray[np.float32]:
        """Decode readings and bring them to `length`; `unsupported_format` where they have another number of channels."""
        values_NC = media.decode_sensor(raw)
        length, channels = self.options.length, self.options.channels
        if values_NC.shape[1] != channels:
            raise DecodeError("unsupported_format", f"{values_NC.shape[1]} channels; this encoder was told {channels}")
        if len(values_NC) == length:
            return values_NC
        have, want = np.arange(len(values_NC)), np.linspace(0, len(values_NC) - 1, length)
        return np.stack([np.interp(want, have, each) for each in values_NC.T], axis=1).astype(np.float32)

    def encode(self, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Run the program on the windows of a batch at once."""
        program = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        return self._run(program, values)

    def _run(self, program: Any, values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        import torch

        windows = [each.T if self.options.layout == "channels_first" else each for each in values]
        with torch.inference_mode():
            made = program(runtime.to_device(runtime.stacked(windows)))
        made = made[0] if isinstance(made, tuple | list) else made
        if not isinstance(made, torch.Tensor) or made.shape != (len(values), self.dim):
            found = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise self._unfit(f"it gave {found} where [{len(values)}, {self.dim}] was due; correct options.dim")
        return runtime.to_host(made)

    def _load(self) -> Any:
        program = self._opened()
        window = np.zeros((self.options.length, self.options.channels), np.float32)
        try:
            # A program that was made for one batch size says so now, not at a shard's last batch.
            for batch in (1, 2):
                self._run(program, [window] * batch)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise self._unfit(
                f"it takes no {[batch, *(window.T if self.options.layout == 'channels_first' else window).shape]}: "
                f"{' '.join(str(error).split())[:300]}; correct options.channels, length and layout, and export it with a "
                "dynamic batch"
            ) from error
        return program

    def _opened(self) -> Any:
        import torch
        from torch.export.passes import move_to_device_pass

        try:
            if self.path.suffix == ".pt2":
                # The device that it was exported on is written into its operations.
                return move_to_device_pass(torch.export.load(self.path), runtime.device()).module()
            with warnings.catch_warnings():
                # TorchScript is deprecated; a program that somebody has is read as long as torch does.
                warnings.simplefilter("ignore", DeprecationWarning)
                return torch.jit.load(str(self.path), map_location=runtime.device()).eval()  # type: ignore[no-untyped-call]
        except Exception as error:
            # Its readers raise whatever parsing what is there raises.
            raise self._unfit(f"it cannot be read: {' '.join(str(error).split())[:300]}") from error

    def _unfit(self, why: str) -> InputError:
        return InputError(f"program {self.options.program!r} is none for encoder {self.key!r}: {why}")
