"""The feature network (section 3): a residual U-Net with instance norm, a quarter of the image's resolution."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_shared.errors import UserError

SMALLEST_SIDE = 17  # below, the deepest map is one pixel wide: reflect padding and instance norm fail on it


class FeatureMaps(NamedTuple):
    """Maps for the coarse and the fine network; one and the same tensor where a single network renders."""

    coarse: Float[Tensor, "views coarse_channels h w"]
    fine: Float[Tensor, "views fine_channels h w"]


def refuse_small(images: Float[Tensor, "views 3 height width"], smallest: int) -> None:
    """Refuse images whose smaller side has fewer than `smallest` pixels.

    Raises:
        UserError: such images.

    """
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise UserError(
            f"source images need sides of at least {smallest} pixels for these features, got {width}x{height}"
        )


def conv3x3(inputs: int, outputs: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution with reflect padding."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias, padding_mode="reflect")


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift, no running statistics, eps 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "views channels h w"]) -> Float[Tensor, "views channels h w"]:
        """Each channel of each view to mean 0 and variance 1 over its pixels, then scaled and shifted."""
        # Group norm with one channel a group would be the same function; its backward is slower than this on CPUs.
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=1e-5)


class BasicBlock(nn.Module):
    """conv3x3, norm, ReLU, conv3x3, norm, plus a shortcut, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs, stride), InstanceNorm(outputs)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), InstanceNorm(outputs)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), InstanceNorm(outputs))

    def forward(self, x: Float[Tensor, "views inputs h w"]) -> Float[Tensor, "views outputs h2 w2"]:
        """The block's output."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class ConvNormELU(nn.Module):
    """conv3x3 with bias, norm, ELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = conv3x3(inputs, outputs, bias=True), InstanceNorm(outputs)

    def forward(self, x: Float[Tensor, "views inputs h w"]) -> Float[Tensor, "views outputs h w"]:
        """The layer's output."""
        return F.elu(self.norm(self.conv(x)))


def layer(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    """`blocks` basic blocks, the first of stride 2."""
    return nn.Sequential(BasicBlock(inputs, outputs, 2), *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


class ResUNet(nn.Module):
    """Feature maps of source images.

    Args:
        coarse_channels: features for the coarse network.
        fine_channels: features for the fine network.
        single_net: one set of maps for both, of `coarse_channels`.

    """

    def __init__(self, coarse_channels: int = 32, fine_channels: int = 32, *, single_net: bool = True) -> None:
        super().__init__()
        self.coarse_channels, self.single_net = coarse_channels, single_net
        out = coarse_channels if single_net else coarse_channels + fine_channels
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False, padding_mode="reflect")
        self.stem_norm = InstanceNorm(64)
        self.layer1, self.layer2, self.layer3 = layer(64, 64, 3), layer(64, 128, 4), layer(128, 256, 6)
        self.up3, self.merge3 = ConvNormELU(256, 128), ConvNormELU(256, 128)
        self.up2, self.merge2 = ConvNormELU(128, 64), ConvNormELU(128, out)
        self.head = nn.Conv2d(out, out, 1)

    def forward(self, images: Float[Tensor, "views 3 height width"]) -> FeatureMaps:
        """Maps of `4 ceil(H/16) x 4 ceil(W/16)` pixels; where 16 does not divide the size they are stretched a little.

        Args:
            images: in [0, 1], not normalised, each side at least 17.

        Raises:
            UserError: images too small.

        """
        refuse_small(images, SMALLEST_SIDE)
        x1 = self.layer1(F.relu(self.stem_norm(self.stem(images))))
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        x = self.merge3(join(self.up3(double(x3)), x2))
        x = self.head(self.merge2(join(self.up2(double(x)), x1)))
        return FeatureMaps(x, x) if self.single_net else FeatureMaps(*x.tensor_split([self.coarse_channels], 1))


def double(x: Float[Tensor, "views channels h w"]) -> Float[Tensor, "views channels h2 w2"]:
    """Twice the size, bilinear, corners aligned."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def join(
    up: Float[Tensor, "views channels h w"], skip: Float[Tensor, "views skip_channels h2 w2"]
) -> Float[Tensor, "views both h w"]:
    """[up, skip] along channels, the skip padded with zeros to the size of `up`, the smaller half left and above."""
    down, right = up.shape[2] - skip.shape[2], up.shape[3] - skip.shape[3]
    skip = F.pad(skip, (right // 2, right - right // 2, down // 2, down - down // 2))
    return torch.cat([up, skip], 1)
