"""Interval-free alpha compositing, and GNT with it in place of the ray transformer: the direct test of the claim."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.network import GNT, RenderedRays

LEAST_SAMPLES = 8


class Composited(NamedTuple):
    """Colours and weights of composited rays; depth is Σ w z; valid rays have more than 8 samples that a view sees."""

    rgb: Float[Tensor, "rays 3"]
    weights: Float[Tensor, "rays samples"]
    alpha: Float[Tensor, "rays samples"]
    valid: Bool[Tensor, " rays"] | None


def composite(
    rgb: Float[Tensor, "rays samples 3"],
    sigma: Float[Tensor, "rays samples"],
    seen: Bool[Tensor, "rays samples"] | None = None,
    *,
    white: bool = False,
) -> Composited:
    """α = 1 - exp(-σ), T = Π_{j<i} (1 - α_j + 1e-10), w = α T, colour Σ w c.

    Args:
        rgb: of the samples.
        sigma: densities times interval, not negative: no interval length enters.
        seen: samples that enough views see, for the validity of rays.
        white: add white where the weights leave something over.

    """
    alpha = 1 - torch.exp(-sigma)
    passed = torch.cumprod(1 - alpha + 1e-10, -1)
    weights = alpha * torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], -1)
    colour = (weights[..., None] * rgb).sum(1)
    if white:
        colour = colour + (1 - weights.sum(-1, keepdim=True))
    return Composited(colour, weights, alpha, None if seen is None else seen.sum(-1) > LEAST_SAMPLES)


class NoRayMixing(nn.Module):
    """Stands where the ray blocks are: tokens of a ray do not meet."""

    def forward(self, tokens: Tensor, *, return_weights: bool = False) -> tuple[Tensor, None]:
        """The tokens as they are."""
        return tokens, None


class VolumeRenderedGNT(GNT):
    """GNT without ray transformers: every sample gets a colour and a density, composited on white.

    The arm "volren": per sample LayerNorm, Linear(D, 4); colour by a sigmoid, density by softplus(· - 1). `options` are
    the keyword arguments of `GNT`.
    """

    def __init__(
        self, width: int = 64, depth: int = 4, feature_channels: int = 32, dropout: float = 0.1, **options: Any
    ) -> None:
        super().__init__(width, depth, feature_channels, dropout, **options)
        self.to_rgb = nn.Linear(width, 4)

    def ray_block(self, width: int, dropout: float) -> nn.Module:
        """None."""
        return NoRayMixing()

    def read_out(self, tokens: Tensor, weights: Tensor | None, view_weights: Tensor | None) -> RenderedRays:
        """Composited colours; the weights are those of the compositing."""
        raw = self.to_rgb(self.norm(tokens))
        rays = composite(raw[..., :3].sigmoid(), F.softplus(raw[..., 3] - 1), white=True)
        return RenderedRays(rays.rgb, rays.weights, view_weights)
