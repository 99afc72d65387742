"""Coordinate networks: one signal each (the baselines), or the trunk and heads that all atoms share (sections 2.1 and
3).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .coordinates import FourierFeatures, Identity, PositionalEncoding, RadialBasis, num_octaves

Embedding = Literal["ffm", "pe", "Id", "rbf"]
Activation = Literal["relu", "sine"]
SINE_FREQUENCY = 30.0
"""Factor inside the sine of a SIREN layer (section 3)."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Shape of a coordinate network; the field names are those of the released configuration files."""

    in_dim: int = 2
    """coordinates per point: 2 for images and CT, 3 for shapes"""
    out_dim: int = 3
    """channels of a signal"""
    hidden_dim: int = 256
    """width d of the trunk"""
    num_layers: int = 4
    """linear layers, the last one (the head) included"""
    pos_emb: Embedding = "ffm"
    """embedding of the coordinates: Fourier features, positional encoding, none, radial basis"""
    ffm_map_size: int = 4096
    """width of the Fourier or radial embedding"""
    ffm_map_scale: float = 16.0
    """standard deviation of the Fourier frequencies"""
    num_freqs: int | None = None
    """octaves of the positional encoding (default: 10 in space, 4 in the plane)"""
    act_type: Activation = "relu"
    """activation of the trunk"""

    def __post_init__(self) -> None:
        """Refuse a network without a trunk, or without width."""
        if self.num_layers < 2:
            raise ValueError(f"num_layers must be at least 2 (a trunk layer and the head), got {self.num_layers}")
        for name in ("in_dim", "out_dim", "hidden_dim", "ffm_map_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_freqs is not None and self.num_freqs < 0:
            raise ValueError(f"num_freqs must not be negative, got {self.num_freqs}")
        if self.ffm_map_scale < 0:
            raise ValueError(f"ffm_map_scale, a standard deviation, must not be negative, got {self.ffm_map_scale}")


class Sine(nn.Module):
    """``sin(30 x)``."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Elementwise."""
        return torch.sin(SINE_FREQUENCY * x)


def activation(kind: Activation) -> nn.Module:
    """The module that stands after every linear layer but the last."""
    return nn.ReLU() if kind == "relu" else Sine()


def embedding(config: NetworkConfig) -> nn.Module:
    """The map from coordinates to the input of the first layer; it has an attribute ``out_dim``."""
    if config.pos_emb == "ffm":
        return FourierFeatures(config.in_dim, config.ffm_map_size, config.ffm_map_scale)
    if config.pos_emb == "pe":
        octaves = num_octaves(config.in_dim) if config.num_freqs is None else config.num_freqs
        return PositionalEncoding(config.in_dim, octaves)
    if config.pos_emb == "rbf":
        return RadialBasis(config.in_dim, config.ffm_map_size)
    return Identity(config.in_dim)


def init_layer(weight: Tensor, bias: Tensor, kind: Activation, *, first: bool) -> None:
    """Draw one layer in place; ``weight`` is [..., out, in] (section 3).

    ReLU: both U(±1/√fan_in). Sine: the first weight U(±1/fan_in), every other one, the head included,
    U(±√(6/fan_in)/30).
    """
    fan_in = weight.shape[-1]
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(bias, -bound, bound)
    if kind == "sine":
        bound = 1 / fan_in if first else math.sqrt(6 / fan_in) / SINE_FREQUENCY
    nn.init.uniform_(weight, -bound, bound)


def batched_mlp(
    weights: Sequence[Float[Tensor, "nets _ _"]],
    biases: Sequence[Float[Tensor, "nets _"]],
    x: Float[Tensor, "#nets points _"],
    act_type: Activation,
) -> Float[Tensor, "nets points out_dim"]:
    """Many networks of one shape side by side, one batched product a layer; ``x`` may be common to all of them."""
    act = activation(act_type)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(bias[:, None], x.expand(weight.shape[0], -1, -1), weight.mT)
        if i < len(weights) - 1:
            x = act(x)
    return x


def layer_widths(config: NetworkConfig, embedded: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer of a network on an embedding of that width."""
    widths = [embedded] + [config.hidden_dim] * (config.num_layers - 1) + [config.out_dim]
    return list(itertools.pairwise(widths))


def stacked_layers(config: NetworkConfig, embedded: int, count: int) -> tuple[nn.ParameterList, nn.ParameterList]:
    """Weights [count, out, in] and biases [count, out] of ``count`` networks of one shape, each drawn on its own."""
    weights, biases = nn.ParameterList(), nn.ParameterList()
    for i, (fan_in, fan_out) in enumerate(layer_widths(config, embedded)):
        weight, bias = torch.empty(count, fan_out, fan_in), torch.empty(count, fan_out)
        init_layer(weight, bias, config.act_type, first=i == 0)
        weights.append(nn.Parameter(weight))
        biases.append(nn.Parameter(bias))
    return weights, biases


class MLP(nn.Module):
    """Linear layers with an activation after all but the last; layer i is ``net[i][0]``, as in the released weights."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int, num_layers: int, act_type: Activation) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        layers = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            linear = nn.Linear(fan_in, fan_out)
            init_layer(linear.weight, linear.bias, act_type, first=i == 0)
            layers.append(nn.Sequential(linear) if i == num_layers - 1 else nn.Sequential(linear, activation(act_type)))
        self.net = nn.Sequential(*layers)

    @property
    def head(self) -> nn.Linear:
        """The last linear layer."""
        head = self.net[-1][0]  # type: ignore[index]
        assert isinstance(head, nn.Linear)
        return head

    def trunk(self, x: Float[Tensor, "*points width"]) -> Float[Tensor, "*points hidden"]:
        """Everything before the last linear layer."""
        for layer in list(self.net)[:-1]:
            x = layer(x)
        return x

    def forward(self, x: Float[Tensor, "*points width"]) -> Float[Tensor, "*points out_dim"]:
        """All layers."""
        return self.head(self.trunk(x))


class CoordinateNetwork(nn.Module):
    """Embedding and MLP: SIREN, Fourier-feature or positional-encoding network of one signal (section 3).

    State: ``map.B`` (Fourier features only), ``net.net.{i}.0.weight|bias``.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.map = embedding(config)
        self.net = MLP(self.map.out_dim, config.out_dim, config.hidden_dim, config.num_layers, config.act_type)  # type: ignore[arg-type]

    def features(self, coords: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points hidden"]:
        """Trunk output h(x)."""
        return self.trunk(self.map(coords))

    def trunk(self, embedded: Float[Tensor, "*points width"]) -> Float[Tensor, "*points hidden"]:
        """Trunk output from embedded coordinates, which a training loop on a fixed lattice computes once."""
        return self.net.trunk(embedded)

    def antipodal_trunk(self, embedded: Float[Tensor, "pairs width"]) -> Float[Tensor, "points hidden"]:
        """Trunk output at x and then, in the same order, at -x, from the Fourier features of x alone.

        Sines are odd and cosines even: the two halves of the first layer, by far the widest, serve both points.
        """
        first, act = self.net.net[0][0], activation(self.config.act_type)  # type: ignore[index]
        odd_weight, even_weight = first.weight.unflatten(1, (2, -1)).unbind(1)
        sines, cosines = embedded.chunk(2, dim=-1)
        odd, even = sines @ odd_weight.T, torch.addmm(first.bias, cosines, even_weight.T)
        x = act(torch.cat([even + odd, even - odd]))
        for layer in list(self.net.net)[1:-1]:
            x = layer(x)
        return x

    def forward(self, coords: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points out_dim"]:
        """Value of the signal at each coordinate."""
        return self.net(self.map(coords))

    def flops(self) -> int:
        """Multiply-adds and bias additions per coordinate, counted as the released code counts them (section 3)."""
        return embedding_flops(self.map) + sum(p.numel() for p in self.net.parameters())


def embedding_flops(module: nn.Module) -> int:
    """Multiply-adds of the embedding per coordinate (section 3); the sines themselves are not counted."""
    if isinstance(module, FourierFeatures):
        return module.B.numel()
    if isinstance(module, RadialBasis):
        raise ValueError("the released code defines no operation count for the radial basis embedding")
    return 0


def siren(in_dim: int = 2, out_dim: int = 3, hidden_dim: int = 256) -> CoordinateNetwork:
    """SIREN: sine activations on bare coordinates (section 3)."""
    return CoordinateNetwork(
        NetworkConfig(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim, pos_emb="Id", act_type="sine")
    )


def ffm(
    in_dim: int = 2, out_dim: int = 3, hidden_dim: int = 256, map_size: int = 4096, scale: float = 16.0
) -> CoordinateNetwork:
    """ReLU network on random Fourier features (section 3)."""
    return CoordinateNetwork(
        NetworkConfig(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim, ffm_map_size=map_size, ffm_map_scale=scale)
    )


def pe_mlp(in_dim: int = 2, out_dim: int = 3, hidden_dim: int = 256, num_freqs: int = 10) -> CoordinateNetwork:
    """ReLU network on the positional encoding (section 3)."""
    return CoordinateNetwork(
        NetworkConfig(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim, pos_emb="pe", num_freqs=num_freqs)
    )
