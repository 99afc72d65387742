"""mip-NeRF as a baseline (section 8): one MLP asked about conical frustums; all levels of perturbation apply to it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_augnerf.cameras import Rays
from tenfold_augnerf.compositing import Composited, composite
from tenfold_augnerf.encoding import encode, encode_gaussian, encoded_size
from tenfold_augnerf.fields import MLP, Samples
from tenfold_augnerf.renderer import Renderer
from tenfold_augnerf.sampling import invert_cdf
from tenfold_shared.errors import UserError

COLOUR_PADDING = 0.001
WEIGHT_PADDING = 0.01
PIXEL_RADIUS = 2 / 12**0.5  # of the cone, in widths of a pixel


class MipNeRF(nn.Module):
    """Integrated encoding of Gaussians, the MLP of NeRF, softplus(raw - 1) densities, colours padded by 0.001.

    Args:
        depth: layers of the trunk.
        width: W.
        octaves: of the integrated encoding.
        view_octaves: of the directions' encoding.

    """

    extra_edges = 1

    def __init__(self, depth: int = 8, width: int = 256, octaves: int = 16, view_octaves: int = 4) -> None:
        super().__init__()
        self.width, self.octaves, self.view_octaves = width, octaves, view_octaves
        self.mlp = MLP(depth, width, 6 * octaves, encoded_size(3, view_octaves))

    def locate(self, rays: Rays, z: Float[Tensor, "rays edges"]) -> Samples:
        """Mean and variance (diagonal) of the frustum between every two edges.

        Raises:
            UserError: the rays have no radii.

        """
        if rays.radii is None:
            raise UserError("mip-NeRF needs the radii of the rays' cones: give Rays.radii")
        middle, half = (z[:, 1:] + z[:, :-1]) / 2, (z[:, 1:] - z[:, :-1]) / 2
        m2, h2 = middle.square(), half.square()
        denominator = 3 * m2 + h2
        along = middle + 2 * middle * h2 / denominator
        variance = h2 / 3 - 4 / 15 * h2.square() * (12 * m2 - h2) / denominator.square()
        across = rays.radii.square() * (m2 / 4 + 5 / 12 * h2 - 4 / 15 * h2.square() / denominator)
        directions = rays.directions[:, None]
        squared = directions.square()
        perpendicular = 1 - squared / squared.sum(-1, keepdim=True)
        spread = variance[..., None] * squared + across[..., None] * perpendicular
        return Samples(rays.origins[:, None] + along[..., None] * directions, spread)

    def encode(self, samples: Samples) -> Float[Tensor, "rays samples width"]:
        """Features of the Gaussians."""
        assert samples.spread is not None
        return self.mlp.trunk(encode_gaussian(samples.points, samples.spread, self.octaves))

    def heads(
        self, features: Float[Tensor, "rays samples width"], views: Float[Tensor, "*rays 3"]
    ) -> Float[Tensor, "rays samples 4"]:
        """Raw colours and densities."""
        return self.mlp.heads(features, encode(views, self.view_octaves))

    def activate(self, raw: Float[Tensor, "*batch 4"], noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Colours in [-0.001, 1.001] and densities."""
        sigma = raw[..., 3] if noise is None else raw[..., 3] + noise
        return raw[..., :3].sigmoid() * (1 + 2 * COLOUR_PADDING) - COLOUR_PADDING, F.softplus(sigma - 1)

    def compose(
        self,
        raw: Float[Tensor, "rays samples 4"],
        z: Float[Tensor, "rays edges"],
        directions: Float[Tensor, "rays 3"],
        *,
        white: bool,
        noise: Float[Tensor, "rays samples"] | None = None,
    ) -> Composited:
        """As NeRF composites, over the intervals' own lengths; depth is that of their middles."""
        colour, sigma = self.activate(raw.to(z.dtype), noise)
        lengths = (z[:, 1:] - z[:, :-1]) * directions.norm(dim=-1, keepdim=True)
        return composite(colour, sigma, lengths, (z[:, 1:] + z[:, :-1]) / 2, white=white)


class MipRenderer(Renderer):
    """Two passes of one `MipNeRF`: the fine one has N_f intervals of its own, and the coarse loss counts a tenth.

    Raises:
        UserError: rays in normalised device coordinates.

    """

    coarse_weight = 0.1
    fewest_coarse = 2

    def __init__(self, field: nn.Module, nerf_adv: nn.Module | None = None, **options: Any) -> None:
        super().__init__(field, None, nerf_adv, **options)
        if self.sampling.ndc is not None:
            raise UserError("the cones of mip-NeRF are those of world space: leave --data.ndc out")

    @property
    def fine_samples(self) -> int:
        """Intervals of the fine pass."""
        return self.sampling.fine

    def resample(self, z: Tensor, weights: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """New edges from weights that are widened to their neighbours' (maximum, then mean of two) and padded by 0.01."""
        padded = torch.cat([weights[:, :1], weights, weights[:, -1:]], -1).detach()
        peaks = torch.maximum(padded[:, :-1], padded[:, 1:])
        widened = (peaks[:, :-1] + peaks[:, 1:]) / 2 + WEIGHT_PADDING
        edges = invert_cdf(z.detach(), widened, self.sampling.fine + 1, uniform).sort(-1).values
        return edges, edges
