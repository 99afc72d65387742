"""MobileNet for small pictures: named in the paper, not in its code, so the layout is ours (section 3)."""

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_tost.activations import activation as make_activation

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
HALVING = (1, 3, 5, 11)  # the blocks with stride 2


class MobileNet(nn.Module):
    """MobileNetV1: a stem of 32 channels and thirteen depthwise-separable blocks.

    Args:
        num_classes: width of the head.
        activation: its name.

    """

    def __init__(self, num_classes: int = 10, activation: str = "relu") -> None:
        super().__init__()
        layers = self._unit(3, 32, 3, 1, 1, activation)
        inputs = 32
        for i, width in enumerate(WIDTHS):
            layers += self._unit(inputs, inputs, 3, 2 if i in HALVING else 1, inputs, activation)
            layers += self._unit(inputs, width, 1, 1, 1, activation)
            inputs = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)

    @staticmethod
    def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: str) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), make_activation(activation)]

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.fc(self.features(x).mean((2, 3)))
