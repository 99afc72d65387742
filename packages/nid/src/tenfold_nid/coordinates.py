"""Coordinates of a sampled signal and the maps that lift them before the first layer (section 2.6)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def lattice(
    shape: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "points dims"]:
    """Sample positions of a regular grid in [-1, 1]^m, end points included (section 2.6).

    Args:
        shape: samples per axis, e.g. (height, width) or (depth, height, width).
        device: where the result lies.
        dtype: floating type of the result; the arithmetic is float32, as released.

    Returns:
        One row a sample in C order; column j is the position along axis j. An axis of one sample sits at -1.

    Raises:
        ValueError: an axis has no samples.

    """
    if not shape or min(shape) < 1:
        raise ValueError(f"a lattice needs at least one sample along every axis, got shape {tuple(shape)}")
    axes = [torch.arange(n, dtype=torch.float32) / max(n - 1, 1) * 2 - 1 for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return grid.reshape(-1, len(shape)).to(device=device, dtype=dtype)


class FourierFeatures(nn.Module):
    """``γ(x) = [sin(Bx), cos(Bx)]`` with a fixed Gaussian B, without a factor 2π (section 2.6).

    Args:
        in_dim: coordinates per point.
        map_size: width of the output (even).
        scale: standard deviation of the entries of B.

    Raises:
        ValueError: ``map_size`` is odd.

    """

    B: Tensor

    def __init__(self, in_dim: int, map_size: int, scale: float) -> None:
        super().__init__()
        if map_size % 2:
            raise ValueError(f"ffm_map_size must be even (half sines, half cosines), got {map_size}")
        self.out_dim = map_size
        self.register_buffer("B", torch.randn(map_size // 2, in_dim) * scale)

    def forward(self, x: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points width"]:
        """Sines of all frequencies, then cosines of all frequencies."""
        phase = x @ self.B.T
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PositionalEncoding(nn.Module):
    """``[x, sin(2^i π x_j), cos(2^i π x_j)]``, frequencies outermost, sine and cosine of one angle adjacent (section
    2.6).

    Args:
        in_dim: coordinates per point.
        num_freqs: number of octaves.

    """

    frequencies: Tensor

    def __init__(self, in_dim: int, num_freqs: int) -> None:
        super().__init__()
        self.out_dim = in_dim * (1 + 2 * num_freqs)
        frequencies = 2.0 ** torch.arange(num_freqs, dtype=torch.float64) * math.pi
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points width"]:
        """The coordinates themselves, then the octaves from coarse to fine."""
        angles = x[..., None, :] * self.frequencies.to(x.dtype)[:, None]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1)
        return torch.cat([x, waves.flatten(start_dim=-3)], dim=-1)


def num_octaves(in_dim: int, size: Sequence[int] | None = None) -> int:
    """Octaves of the positional encoding: 10 for shapes, 4 for images, or up to the Nyquist rate of ``size`` (section
    2.6).
    """
    if in_dim == 3:
        return 10
    if size is None:
        return 4
    return max(1, int(math.log2(min(size) / 4)))


class RadialBasis(nn.Module):
    """``exp(-(σ_c ‖x - c‖)²)`` around learnable centres c drawn from U(-1, 1) (section 2.6).

    Args:
        in_dim: coordinates per point.
        map_size: number of centres.
        sigma: initial inverse width of every bump.

    """

    def __init__(self, in_dim: int, map_size: int, sigma: float = 10.0) -> None:
        super().__init__()
        self.out_dim = map_size
        self.centres = nn.Parameter(torch.rand(map_size, in_dim) * 2 - 1)
        self.sigma = nn.Parameter(torch.full((map_size,), sigma))

    def forward(self, x: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points width"]:
        """One bump a centre; the distance is squared without a root, so its gradient is finite at the centre."""
        squared = (x[..., None, :] - self.centres).square().sum(dim=-1)
        return torch.exp(-self.sigma.square() * squared)


class Identity(nn.Module):
    """No embedding: what a SIREN takes.

    Args:
        in_dim: coordinates per point.

    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.out_dim = in_dim

    def forward(self, x: Float[Tensor, "*points in_dim"]) -> Float[Tensor, "*points in_dim"]:
        """The coordinates as they are."""
        return x
