"""The architectures at full size (section 3)."""

import pytest
import torch
from torch import nn

from tenfold_tost import create_model, model_names
from tenfold_tost.models import ThinResNet, normalizes_inside


def convolution_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("arch", "classes", "parameters", "convolutions"),
    [
        ("resnet18", 10, 11_173_962, 11_159_232),
        ("resnet18", 100, 11_220_132, 11_159_232),
        ("resnet34", 100, 21_328_292, 21_259_968),
        ("resnet50", 10, 23_520_842, 23_447_232),
        ("oresnet20", 10, 272_474, 270_256),
        ("oresnet32", 100, 472_756, 463_792),
        ("oresnet56", 10, 869_530, 853_936),
        ("oresnet104", 100, 1_634_548, 1_585_072),
        ("resnet20s", 10, 269_722, 267_696),
        ("zoo_resnet18", 10, 11_173_962, 11_159_232),
        ("vgg16_bn", 100, 14_774_436, 14_710_464),
        ("digits_net", 10, 35_354, 34_704),
    ],
)
def test_sizes(arch: str, classes: int, parameters: int, convolutions: int) -> None:
    with torch.device("meta"):
        model = create_model(arch, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert convolution_weights(model) == convolutions


@pytest.mark.parametrize("arch", model_names())
def test_every_network_takes_its_pictures(arch: str) -> None:
    """Shapes only, at 32 and at 64 pixels: nothing is computed."""
    with torch.device("meta"):
        model = create_model(arch, 7)
        for size in (32, 64) if arch != "digits_net" else (8,):
            channels = 1 if arch == "digits_net" else 3
            assert model(torch.empty(2, channels, size, size)).shape == (2, 7)


def test_names_and_layouts() -> None:
    keys = list(create_model("resnet50").state_dict())
    assert keys[0] == "conv1.weight"
    assert {"layer1.0.conv3.weight", "layer1.0.shortcut.0.weight", "fc.bias"} <= set(keys)
    assert next(iter(create_model("resnet20s").state_dict())) == "normalize.mean"
    assert list(create_model("vgg16_bn").state_dict())[-1] == "normalize.std"
    assert "layer2.0.downsample.0.weight" in create_model("oresnet20").state_dict()
    assert normalizes_inside(create_model("vgg16_bn"))
    assert not normalizes_inside(create_model("oresnet20"))


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(ValueError, match=r"resnet81.*did you mean 'resnet18'"):
        create_model("resnet81")
    with pytest.raises(ValueError, match="2 classes"):
        create_model("resnet18", 1)
    with pytest.raises(ValueError, match="6 n"):
        ThinResNet(21)
