"""The paper's architectures (section 3), by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from tenfold_bip.models.digits import DigitsCNN
from tenfold_bip.models.resnet import CifarResNet, SmallCifarResNet, imagenet_resnet
from tenfold_bip.models.vgg import VGG
from tenfold_bip.models.wideresnet import WideResNet
from tenfold_shared.errors import did_you_mean

__all__ = [
    "VGG",
    "CifarResNet",
    "DigitsCNN",
    "SmallCifarResNet",
    "WideResNet",
    "create_model",
    "imagenet_resnet",
    "model_names",
]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": DigitsCNN,
    "resnet20s": partial(SmallCifarResNet, (3, 3, 3)),
    "resnet32s": partial(SmallCifarResNet, (5, 5, 5)),
    "resnet44s": partial(SmallCifarResNet, (7, 7, 7)),
    "resnet56s": partial(SmallCifarResNet, (9, 9, 9)),
    "resnet18": partial(CifarResNet, (2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(CifarResNet, (3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(CifarResNet, (3, 4, 6, 3), bottleneck=True),
    "ResNet18": partial(imagenet_resnet, "resnet18"),
    "ResNet34": partial(imagenet_resnet, "resnet34"),
    "ResNet50": partial(imagenet_resnet, "resnet50"),
    "vgg11_bn": partial(VGG, "11", batch_norm=True),
    "vgg16_bn": partial(VGG, "16", batch_norm=True),
    "vgg16": partial(VGG, "16", batch_norm=False),
    "wrn_28_1": partial(WideResNet, 28, 1),
    "wrn_28_4": partial(WideResNet, 28, 4),
    "wrn_28_10": partial(WideResNet, 28, 10),
    "wrn_40_2": partial(WideResNet, 40, 2),
}


def model_names() -> list[str]:
    """Names that `create_model` knows."""
    return list(_BUILDERS)


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build an architecture by name, freshly initialised and dense.

    Lower-case ResNets take 32x32 or 64x64 pictures; `ResNet18/34/50` have the ImageNet stem; `digits_cnn` takes 8x8
    grey pictures. All others take three colours.

    Args:
        name: one of `model_names()`.
        num_classes: width of the head, at least 2.
        options: of the architecture: `legacy_sub_block` of the wide ResNets.

    Raises:
        ValueError: unknown name, or fewer than two classes.

    """
    if name not in _BUILDERS:
        hint = did_you_mean(name, _BUILDERS) or "."
        raise ValueError(f"Unknown architecture {name!r}: choose one of {', '.join(_BUILDERS)}{hint}")
    if num_classes < 2:
        raise ValueError(f"A classifier needs at least 2 classes, but num_classes is {num_classes}.")
    return _BUILDERS[name](num_classes=num_classes, **options)
