"""Wide residual networks of the soft-neuron and skip folders of the release (section 3): widths 64 to 512, 3x3 stem."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_tost.activations import activation as make_activation


class BasicBlock(nn.Module):
    """conv-BN-act-conv-BN plus shortcut, act; one activation module in both places."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)
        self.act = make_activation(activation)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width, plus shortcut, act."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, activation: str = "relu") -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)
        self.act = make_activation(activation)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        return self.act(self.bn3(self.conv3(y)) + self.shortcut(x))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Identity (an empty sequence), or a 1x1 convolution with BN where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class CifarResNet(nn.Module):
    """resnet18, 34, 50, 101, 152 for 32x32 and 64x64 pictures.

    Args:
        blocks: residual blocks in each of the four stages.
        num_classes: width of the head.
        activation: its name.
        bottleneck: bottleneck blocks instead of basic ones.

    """

    def __init__(
        self, blocks: Sequence[int], num_classes: int = 10, activation: str = "relu", *, bottleneck: bool = False
    ) -> None:
        super().__init__()
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), 1):
            layers: list[nn.Module] = []
            for i in range(count):
                layers.append(block(inputs, width, 2 if stage > 1 and i == 0 else 1, activation))
                inputs = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, num_classes)
        self.act = make_activation(activation)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.act(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))
