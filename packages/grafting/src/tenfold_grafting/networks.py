"""The paper's architectures (section 3) and the verification networks of the same data, by name.

Plain networks are `nn.Sequential`, whose keys count every module, as in the released checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from tenfold_shared.errors import UserError, did_you_mean

Value = Tensor | fx.Proxy
"""What flows through a network: tensors, or stand-ins for them while `graph.trace` reads its operations."""


class Residual(nn.Module):
    """ReLU(conv2(ReLU(conv1(x))) + shortcut(x)); the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride))
        self.relu2 = nn.ReLU()

    def forward(self, x: Value) -> Value:
        """The block's output [batch, outputs, h / stride, w / stride]."""
        return self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network: conv1, groups of blocks, two linear layers.

    Args:
        stem: channels after the first convolution (stride 2).
        groups: for each group, the channels and strides of its blocks.
        features: values that the last block gives.
        classes: width of the head.

    """

    def __init__(self, stem: int, groups: Sequence[Sequence[tuple[int, int]]], features: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 2, 1)
        self.relu1 = nn.ReLU()
        width = stem
        self.groups = len(groups)
        for number, blocks in enumerate(groups, 1):
            layers = []
            for channels, stride in blocks:
                layers.append(Residual(width, channels, stride))
                width = channels
            self.add_module(f"layer{number}", nn.Sequential(*layers))
        self.flatten = nn.Flatten()
        self.linear1 = nn.Linear(features, 100)
        self.relu2 = nn.ReLU()
        self.linear2 = nn.Linear(100, classes)

    def forward(self, x: Value) -> Value:
        """Logits [batch, classes] of images [batch, 3, 32, 32]."""
        x = self.relu1(self.conv1(x))
        for number in range(1, self.groups + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear2(self.relu2(self.linear1(self.flatten(x))))


def cnn_b(classes: int = 10) -> nn.Sequential:
    """CNN-B for CIFAR-10, with its asymmetric padding."""
    return nn.Sequential(
        nn.ZeroPad2d((1, 2, 1, 2)),
        nn.Conv2d(3, 32, 5, 2),
        nn.ReLU(),
        nn.Conv2d(32, 128, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8192, 250),
        nn.ReLU(),
        nn.Linear(250, classes),
    )


def conv_big(channels: int = 3, size: int = 32, batch_norm: bool = False, classes: int = 10) -> nn.Sequential:
    """ConvBig: four convolutions and three linear layers."""
    layers: list[nn.Module] = []

    def block(layer: nn.Module, width: int, norm: type[nn.Module]) -> None:
        layers.append(layer)
        if batch_norm:
            layers.append(norm(width))
        layers.append(nn.ReLU())

    for inputs, outputs, kernel, stride in ((channels, 32, 3, 1), (32, 32, 4, 2), (32, 64, 3, 1), (64, 64, 4, 2)):
        block(nn.Conv2d(inputs, outputs, kernel, stride, 1), outputs, nn.BatchNorm2d)
    layers.append(nn.Flatten())
    block(nn.Linear(64 * (size // 4) ** 2, 512), 512, nn.BatchNorm1d)
    block(nn.Linear(512, 512), 512, nn.BatchNorm1d)
    layers.append(nn.Linear(512, classes))
    return nn.Sequential(*layers)


def mlp(inputs: int, width: int, hidden: int, batch_norm: bool = False, classes: int = 10) -> nn.Sequential:
    """Hidden linear layers of one width, and a linear head."""
    layers: list[nn.Module] = [nn.Flatten()]
    for number in range(hidden):
        layers.append(nn.Linear(inputs if number == 0 else width, width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn_17m(batch_norm: bool = False, classes: int = 10) -> nn.Sequential:
    """The network of 17 million parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride, 1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
    layers += [nn.Flatten(), nn.Linear(32768, 512)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(512))
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(512, classes))


def cnn_a(channels: int = 3, size: int = 32, classes: int = 10) -> nn.Sequential:
    """CNN-A: two convolutions with stride 2 and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (size // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def oval_deep(classes: int = 10) -> nn.Sequential:
    """The deep network of the OVAL set."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def oval_base(classes: int = 10) -> nn.Sequential:
    """The base network of the OVAL set."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def digits_cnn(classes: int = 10) -> nn.Sequential:
    """The miniature's network, for grey images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def resnet4b(classes: int = 10) -> ResNet:
    """Four blocks of 32 channels."""
    return ResNet(16, [[(32, 2), (32, 1)], [(32, 2), (32, 1)]], 512, classes)


def resnet2b(classes: int = 10) -> ResNet:
    """Two blocks of 16 channels."""
    return ResNet(8, [[(16, 2), (16, 1)]], 1024, classes)


class Architecture(NamedTuple):
    """A network by name: its maker, and the shape of an input."""

    make: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    options: dict[str, Any]


CIFAR, MNIST = (3, 32, 32), (1, 28, 28)
ARCHITECTURES: dict[str, Architecture] = {
    "digits_cnn": Architecture(digits_cnn, (1, 8, 8), {}),
    "cnn_b": Architecture(cnn_b, CIFAR, {}),
    "conv_big": Architecture(conv_big, CIFAR, {}),
    "conv_big_mnist": Architecture(conv_big, MNIST, {"channels": 1, "size": 28}),
    "conv_big_mnist_bn": Architecture(conv_big, MNIST, {"channels": 1, "size": 28, "batch_norm": True}),
    "mnist_8x200": Architecture(mlp, MNIST, {"inputs": 784, "width": 200, "hidden": 7}),
    "mnist_8x200_bn": Architecture(mlp, MNIST, {"inputs": 784, "width": 200, "hidden": 7, "batch_norm": True}),
    "resnet4b": Architecture(resnet4b, CIFAR, {}),
    "resnet2b": Architecture(resnet2b, CIFAR, {}),
    "cnn_17m": Architecture(cnn_17m, CIFAR, {}),
    "cnn_17m_bn": Architecture(cnn_17m, CIFAR, {"batch_norm": True}),
    "cnn_a": Architecture(cnn_a, CIFAR, {}),
    "cnn_a_mnist": Architecture(cnn_a, MNIST, {"channels": 1, "size": 28}),
    "oval_base": Architecture(oval_base, CIFAR, {}),
    "oval_wide": Architecture(cnn_a, CIFAR, {}),
    "oval_deep": Architecture(oval_deep, CIFAR, {}),
}


def network_names() -> list[str]:
    """Names that `create_network` knows."""
    return list(ARCHITECTURES)


def architecture(name: str) -> Architecture:
    """An entry of the table.

    Raises:
        UserError: unknown name.

    """
    if name not in ARCHITECTURES:
        hint = did_you_mean(name, ARCHITECTURES)
        raise UserError(f"there is no architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}{hint}")
    return ARCHITECTURES[name]


def create_network(name: str, classes: int = 10) -> nn.Module:
    """Build a network by name, freshly initialised, without normalisation.

    Raises:
        UserError: unknown name.

    """
    entry = architecture(name)
    return entry.make(classes=classes, **entry.options)


def from_layers(layers: Sequence[Sequence[Any]]) -> nn.Sequential:
    """A sequential network of a list such as ``[["conv", 3, 16, 4, 2, 1], ["relu"], ["flatten"], ["linear", 9, 10]]``.

    Raises:
        UserError: a layer of an unknown kind, or without its sizes.

    """
    kinds: dict[str, Callable[..., nn.Module]] = {
        "conv": nn.Conv2d,
        "relu": nn.ReLU,
        "flatten": nn.Flatten,
        "linear": nn.Linear,
    }
    for kind, *_ in layers:
        if kind not in kinds:
            raise UserError(f"a layer of the network is {kind!r}: it is one of {', '.join(kinds)}")
    try:
        return nn.Sequential(*(kinds[kind](*sizes) for kind, *sizes in layers))
    except TypeError as error:
        raise UserError(f"a layer of the network lacks its sizes, or has too many: {error}") from error
