"""Pre-activation wide residual networks (section 3)."""

import math

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from tenfold_bip.models.resnet import conv3x3


class WideBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv plus shortcut; where the width changes, the shortcut starts at the activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """One residual update."""
        activated = relu(self.bn1(x))
        y = self.conv2(relu(self.bn2(self.conv1(activated))))
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class WideStage(nn.Module):
    """Blocks of one width."""

    def __init__(self, inputs: int, outputs: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = (WideBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """All blocks in turn."""
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-widen for 32x32 and 64x64 pictures.

    Args:
        depth: 6 n + 4 for n blocks a stage.
        widen: factor on the widths 16, 32, 64.
        num_classes: width of the head.
        legacy_sub_block: register `sub_block1`, a copy of the first stage that is never called, as the released
            networks do. Its weights take part in the global ranking and use up budget; the paper's counts include it.

    """

    def __init__(self, depth: int, widen: int, num_classes: int = 10, *, legacy_sub_block: bool = False) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = conv3x3(3, 16)
        self.block1 = WideStage(16, widths[0], blocks, 1)
        self.block2 = WideStage(widths[0], widths[1], blocks, 2)
        self.block3 = WideStage(widths[1], widths[2], blocks, 2)
        if legacy_sub_block:
            self.sub_block1 = WideStage(16, widths[0], blocks, 1)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(relu(self.bn1(x)).mean((2, 3)))
