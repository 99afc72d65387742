"""The miniature's network, and any backbone of torchvision."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_cilqud.models.incremental import IncrementalNet
from tenfold_shared.errors import UserError


class SmallNet(IncrementalNet):
    """Three convolutions and a hidden layer for small images of `size` (height, width); features are 4 x width behind a
    ReLU (section 12).
    """

    def __init__(
        self,
        classes_per_task: int,
        tasks: int,
        *,
        width: int = 16,
        in_channels: int = 1,
        size: tuple[int, ...] = (8, 8),
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ):
        super().__init__(classes_per_task, tasks, mean, std)
        rows, columns = ((side + 3) // 4 for side in size)  # two strides of 2, each rounded up
        layers: list[nn.Module] = []
        for channels, out, stride in ((in_channels, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        hidden = nn.Linear(4 * width * rows * columns, 4 * width)
        self.backbone = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU())
        self.add_heads(4 * width)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features [b, 4 width]."""
        return self.backbone(x)


class TorchvisionNet(IncrementalNet):
    """Any classifier of torchvision: what it gives its last linear layer is the feature."""

    def __init__(
        self,
        name: str,
        classes_per_task: int,
        tasks: int,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ):
        super().__init__(classes_per_task, tasks, mean, std)
        try:
            from torchvision import models  # noqa: PLC0415 - slow, and seldom needed
        except ImportError as error:
            raise UserError(f"--arch {name} is torchvision's: install tenfold-shared[images]") from error
        if name not in models.list_models(module=models):  # those of detection and segmentation would fetch weights
            raise UserError(f"--arch {name}: neither an architecture of this package nor a classifier of torchvision")
        self.backbone = models.get_model(name, weights=None)
        linear = [(path, module) for path, module in self.backbone.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"--arch {name} ends with no linear layer, in front of which its features would be")
        path, last = linear[-1]
        parent, _, own = path.rpartition(".")
        setattr(self.backbone.get_submodule(parent), own, nn.Identity())
        self.add_heads(last.in_features)

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """What the last linear layer was given; a grey image is the same in the three channels."""
        return self.backbone(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)
