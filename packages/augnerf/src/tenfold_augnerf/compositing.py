"""Volume rendering along rays (section 2.1, item 4)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LAST_INTERVAL = 1e10
EMPTY = 1e-10


class Composited(NamedTuple):
    """What rays show.

    Attributes:
        rgb: Σ w c, plus what the weights leave over where the background is white.
        disparity: 1 / max(1e-10, depth / acc).
        acc: Σ w, the opacity.
        weights: w.
        depth: Σ w z, not divided by acc; 1e10 where acc <= 1e-10.

    """

    rgb: Float[Tensor, "rays 3"]
    disparity: Float[Tensor, "rays 1"]
    acc: Float[Tensor, "rays 1"]
    weights: Float[Tensor, "rays samples"]
    depth: Float[Tensor, "rays 1"]


def intervals(z: Float[Tensor, "rays samples"], directions: Float[Tensor, "rays 3"]) -> Float[Tensor, "rays samples"]:
    """Δ_i = z_{i+1} - z_i, the last one 1e10, times the length of the direction."""
    last = torch.full_like(z[:, :1], LAST_INTERVAL)
    return torch.cat([z[:, 1:] - z[:, :-1], last], -1) * directions.norm(dim=-1, keepdim=True)


def composite(
    colour: Float[Tensor, "rays samples 3"],
    sigma: Float[Tensor, "rays samples"],
    delta: Float[Tensor, "rays samples"],
    z: Float[Tensor, "rays samples"],
    *,
    white: bool,
) -> Composited:
    """α = 1 - exp(-σ Δ), T_i = Π_{j<i} (1 - α_j + 1e-10), w = α T.

    Args:
        colour: in [0, 1].
        sigma: densities, not negative.
        delta: interval lengths in world units.
        z: ray parameters, for the depth.
        white: composite on white instead of black.

    """
    alpha = 1 - torch.exp(-sigma * delta)
    passed = torch.cumprod(1 - alpha + 1e-10, -1)
    weights = alpha * torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], -1)
    rgb = (weights[..., None] * colour).sum(-2)
    acc = weights.sum(-1, keepdim=True)
    depth = (weights * z).sum(-1, keepdim=True)
    empty = acc <= EMPTY
    ratio = depth / torch.where(empty, torch.ones_like(acc), acc)
    disparity = 1 / torch.where(empty, torch.full_like(acc, LAST_INTERVAL), ratio).clamp(min=EMPTY)
    if white:
        rgb = rgb + (1 - acc)
    return Composited(rgb, disparity, acc, weights, depth.masked_fill(empty, LAST_INTERVAL))
