"""Gating networks: from a signal to its code of E coefficients and C biases (section 3)."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .networks import Activation, activation

GateKind = Literal["conv", "resnet", "codebook", "linear", "strided"]


def _check_image(images: Tensor, channels: int) -> Tensor:
    """[batch, height, width, channels] -> [batch, channels, height, width], the channels checked."""
    if images.shape[-1] != channels:
        raise ValueError(
            f"the gate was built for images of {channels} channels, got {images.shape[-1]} (channels last)"
        )
    return images.movedim(-1, 1)


class ConvGate(nn.Module):
    """n × [5×5 convolution, ReLU], sum over pixels, linear: the gate for images of any size (section 3).

    Args:
        in_channels: channels of an image.
        code_dim: E + C.
        hidden: width of the convolutions.
        layers: their number.

    """

    def __init__(self, in_channels: int, code_dim: int, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.in_channels = in_channels
        widths = [in_channels] + [hidden] * layers
        modules: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            modules += [nn.Conv2d(fan_in, fan_out, 5, padding=2), nn.ReLU()]
        self.convs = nn.Sequential(*modules)
        self.fc = nn.Linear(hidden, code_dim)

    def forward(self, images: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch code"]:
        """Codes of a batch of images."""
        return self.fc(self.convs(_check_image(images, self.in_channels)).sum(dim=(2, 3)))


class StridedGate(nn.Module):
    """Two 5×5 convolutions of stride 2 and a linear layer over what is left: the small gate of the miniature (section
    12).

    Args:
        in_channels: channels of an image.
        code_dim: E + C.
        size: (height, width) of the images; baked in.
        hidden: width of the second convolution; the first has half of it.

    """

    def __init__(self, in_channels: int, code_dim: int, size: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.size = tuple(size)
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, hidden // 2, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(hidden // 2, hidden, 5, stride=2, padding=2),
            nn.ReLU(),
        )
        pixels = ((self.size[0] + 3) // 4) * ((self.size[1] + 3) // 4)
        self.fc = nn.Linear(hidden * pixels, code_dim)

    def forward(self, images: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch code"]:
        """Codes of a batch of images; raises ValueError for another size."""
        _check_size(images, self.size)
        return self.fc(self.convs(_check_image(images, self.in_channels)).flatten(1))


class ResBlock(nn.Module):
    """``ReLU(x + F(x))`` with two 5×5 convolutions, each followed by a ReLU (section 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, width, 5, padding=2), nn.ReLU()
        )

    def forward(self, x: Float[Tensor, "batch width rows cols"]) -> Float[Tensor, "batch width rows cols"]:
        """Residual update."""
        return F.relu(x + self.convs(x))


class ResNetFeatures(nn.Module):
    """Convolutional part of the residual gate: one number a channel, the spatial weighting learned (section 3)."""

    def __init__(self, in_channels: int, pixels: int) -> None:
        super().__init__()
        self.conv_theta = nn.Conv2d(in_channels, 128, 3, padding=1)
        self.cnn = nn.Sequential(
            nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), *[ResBlock(256) for _ in range(4)], nn.Conv2d(256, 256, 1)
        )
        self.fc = nn.Linear(pixels, 1)

    def forward(self, images: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch 256"]:
        """Features before the last ReLU."""
        x = F.relu(self.cnn(F.relu(self.conv_theta(images))))
        return self.fc(x.flatten(2)).squeeze(-1)


class ResNetGate(nn.Module):
    """The gate of the CelebA configuration; square images of one size (section 3).

    Args:
        in_channels: channels of an image.
        code_dim: E + C.
        resolution: pixels along a side; baked into the weights.

    """

    def __init__(self, in_channels: int, code_dim: int, resolution: int) -> None:
        super().__init__()
        self.in_channels, self.resolution = in_channels, resolution
        self.convs = ResNetFeatures(in_channels, resolution**2)
        self.fc = nn.Linear(256, code_dim)

    def forward(self, images: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch code"]:
        """Codes of a batch of images; raises ValueError for another size."""
        _check_size(images, (self.resolution, self.resolution))
        return self.fc(F.relu(self.convs(_check_image(images, self.in_channels))))


class CodebookGate(nn.Module):
    """A table of codes, one a training signal, rows rescaled to norm <= 1 when they are looked up (section 3).

    The rescaling happens in place, before use, for the rows of the batch only, and counts the bias entries in the norm.

    Args:
        num_signals: rows of the table.
        code_dim: E + C.
        max_norm: largest Euclidean norm of a row in use.

    """

    def __init__(self, num_signals: int, code_dim: int, max_norm: float = 1.0) -> None:
        super().__init__()
        self.codebook = nn.Embedding(num_signals, code_dim, max_norm=max_norm)

    def forward(self, ids: Int[Tensor, " batch"]) -> Float[Tensor, "batch code"]:
        """Codes of the signals with these ids."""
        return self.codebook(ids)


class LinearGate(nn.Module):
    """Flattened signal times a matrix that starts at zero, without bias (section 3).

    Args:
        in_features: samples × channels of a signal.
        code_dim: E + C.

    """

    def __init__(self, in_features: int, code_dim: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(in_features, code_dim))

    def forward(self, images: Float[Tensor, "batch *spatial channels"]) -> Float[Tensor, "batch code"]:
        """Codes of a batch of signals; channels are flattened first. Raises ValueError for another size."""
        flat = images.movedim(-1, 1).flatten(1)
        if flat.shape[1] != self.w.shape[0]:
            raise ValueError(
                f"the gate was built for {self.w.shape[0]} numbers a signal (pixels × channels), got {flat.shape[1]}"
            )
        return flat @ self.w


class SetEncoder(nn.Module):
    """Mean over points of an MLP on [x; y], the activation also after the last layer (section 3).

    As a gate it takes any number of observations of a signal at any places.

    Args:
        in_dim: coordinates per point.
        out_dim: channels per point.
        width: width of the hidden layers.
        code_dim: width of the output.
        hidden_layers: layers between the first and the last.
        act_type: activation; with ReLU the weights are drawn by Kaiming's normal rule.

    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        width: int,
        code_dim: int,
        hidden_layers: int = 2,
        act_type: Activation = "relu",
    ) -> None:
        super().__init__()
        hidden = [nn.Sequential(nn.Linear(width, width), activation(act_type)) for _ in range(hidden_layers)]
        self.net = nn.Sequential(
            nn.Linear(in_dim + out_dim, width),
            activation(act_type),
            *hidden,
            nn.Linear(width, code_dim),
            activation(act_type),
        )
        if act_type == "relu":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.kaiming_normal_(module.weight)

    def forward(
        self,
        x: Float[Tensor, "batch points in_dim"],
        y: Float[Tensor, "batch points out_dim"],
        mask: Float[Tensor, "batch points 1"] | Bool[Tensor, "batch points 1"] | None = None,
    ) -> Float[Tensor, "batch code"]:
        """Codes from samples; ``mask`` is 1 for a sample that counts. A signal without any gives NaN."""
        per_point = self.net(torch.cat([x, y], dim=-1))
        if mask is None:
            return per_point.mean(dim=1)
        mask = mask.to(per_point.dtype)
        return (per_point * mask).sum(dim=1) / mask.sum(dim=1)


def _check_size(images: Tensor, size: tuple[int, ...]) -> None:
    if tuple(images.shape[1:3]) != size:
        raise ValueError(
            f"the gate was built for images of {size[0]}×{size[1]} pixels, got {images.shape[1]}×{images.shape[2]}; "
            "resize them, cut them into patches of that size, or fit codes without the gate"
        )
