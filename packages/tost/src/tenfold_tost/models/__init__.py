"""The architectures of the paper and of the released code (section 3), by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from tenfold_shared.errors import did_you_mean
from tenfold_tost.models.digits import DigitsNet
from tenfold_tost.models.mobilenet import MobileNet
from tenfold_tost.models.resnet import CifarResNet
from tenfold_tost.models.thin import ThinResNet
from tenfold_tost.models.zoo import OptionAResNet, ZooResNet, ZooVGG

__all__ = [
    "CifarResNet",
    "DigitsNet",
    "MobileNet",
    "OptionAResNet",
    "ThinResNet",
    "ZooResNet",
    "ZooVGG",
    "create_model",
    "model_names",
    "normalizes_inside",
]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "digits_net": DigitsNet,
    "resnet18": partial(CifarResNet, (2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(CifarResNet, (3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(CifarResNet, (3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(CifarResNet, (3, 4, 23, 3), bottleneck=True),
    "resnet152": partial(CifarResNet, (3, 8, 36, 3), bottleneck=True),
    "oresnet20": partial(ThinResNet, 20),
    "oresnet32": partial(ThinResNet, 32),
    "oresnet44": partial(ThinResNet, 44),
    "oresnet56": partial(ThinResNet, 56),
    "oresnet104": partial(ThinResNet, 104),
    "oresnet110": partial(ThinResNet, 110),
    "mobilenet": MobileNet,
    "resnet20s": partial(OptionAResNet, 3),
    "resnet32s": partial(OptionAResNet, 5),
    "resnet44s": partial(OptionAResNet, 7),
    "resnet56s": partial(OptionAResNet, 9),
    "resnet110s": partial(OptionAResNet, 18),
    "zoo_resnet18": ZooResNet,
    "vgg16_bn": ZooVGG,
}


def model_names() -> list[str]:
    """Names that `create_model` knows."""
    return list(_BUILDERS)


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build an architecture by name, freshly initialised, dense, without ghosts.

    `resnet18` ... `resnet152` and `oresnet20` ... `oresnet110` (the paper's ResNet-32 and ResNet-104 are `oresnet32` and
    `oresnet104`) take normalised colour pictures, `digits_net` grey ones; `resnet20s` ... `resnet110s`, `zoo_resnet18`
    and `vgg16_bn` normalise inside and take pixels in [0, 1].

    Args:
        name: one of `model_names()`.
        num_classes: width of the head, at least 2.
        options: `activation` (a name of `activations.ACTIVATIONS`) in every network but the last three families.

    Raises:
        ValueError: unknown name, or fewer than two classes.

    """
    if name not in _BUILDERS:
        hint = did_you_mean(name, _BUILDERS) or "."
        raise ValueError(f"Unknown architecture {name!r}: choose one of {', '.join(_BUILDERS)}{hint}")
    if num_classes < 2:
        raise ValueError(f"A classifier needs at least 2 classes, but num_classes is {num_classes}.")
    return _BUILDERS[name](num_classes=num_classes, **options)


def normalizes_inside(model: nn.Module) -> bool:
    """Whether a network normalises its pictures itself, so that its inputs are pixels in [0, 1]."""
    return isinstance(model, OptionAResNet | ZooResNet | ZooVGG)
