"""Pre-activation ResNets with the CIFAR stem (section 3): no norm after the stem, none before pooling.

So the features are signed and unbounded.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_cilqud.models.incremental import IncrementalNet

STRIDES = (1, 2, 2, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind its norm and ReLU; the shortcut branches off behind the first ReLU."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = _shortcut(channels, width, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """The block's output; the shortcut takes the activated input where it has a convolution, else the input."""
        activated = self.bn1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(self.bn2(self.conv1(activated)).relu()) + shortcut


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width, each behind its norm and ReLU."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = _shortcut(channels, 4 * width, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """The block's output."""
        activated = self.bn1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv2(self.bn2(self.conv1(activated)).relu())
        return self.conv3(self.bn3(out).relu()) + shortcut


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False))


class PreActResNet(IncrementalNet):
    """conv1, four stages of pre-activation blocks, global average pooling, two rows of heads."""

    def __init__(
        self,
        classes_per_task: int,
        tasks: int,
        *,
        width: int = 64,
        block: Literal["basic", "bottleneck"] = "basic",
        blocks: Sequence[int] = (2, 2, 2, 2),
        in_channels: int = 3,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ):
        super().__init__(classes_per_task, tasks, mean, std)
        kind = BasicBlock if block == "basic" else Bottleneck
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        channels = width
        for stage, (count, stride) in enumerate(zip(blocks, STRIDES, strict=True)):
            layers = []
            for position in range(count):
                layers.append(kind(channels, width << stage, stride if position == 0 else 1))
                channels = (width << stage) * kind.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.add_heads(channels)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Pooled features [b, 8 width (x4 for bottlenecks)]."""
        x = self.conv1(x)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))
