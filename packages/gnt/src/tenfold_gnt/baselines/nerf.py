"""NeRF as a baseline for single scenes: it has no sources, only positions and directions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.encoding import encode
from tenfold_gnt.network import RenderedRays
from tenfold_gnt.projection import ViewSamples

POINT_OCTAVES, DIRECTION_OCTAVES = 10, 4
LAST_INTERVAL = 1e10
START_BIAS = 0.1  # of the density


class NeRF(nn.Module):
    """8 layers of 256 with the point again at layer 5, a view branch of 128; composited with interval lengths.

    Train it with Adam at 5e-4, decayed exponentially by 0.1 over 250,000 steps, 64 + 128 samples. It takes the arguments
    of `GNT` and does not look at the source views. The density's bias starts at 0.1: from PyTorch's own start the
    density of many a network is zero everywhere, and stays so, since no gradient passes.

    Args:
        width: of the trunk.
        depth: of the trunk.
        skip: index of the layer that gets the encoded point again.
        white: background.

    """

    def __init__(self, width: int = 256, depth: int = 8, skip: int = 5, *, white: bool = True) -> None:
        super().__init__()
        self.width, self.skip, self.white = width, skip, white
        point, direction = 3 * (1 + 2 * POINT_OCTAVES), 3 * (1 + 2 * DIRECTION_OCTAVES)
        self.trunk = nn.ModuleList(
            nn.Linear(point if i == 0 else width + point * (i == skip), width) for i in range(depth)
        )
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        nn.init.constant_(self.density.bias, START_BIAS)
        self.view, self.colour = nn.Linear(width + direction, width // 2), nn.Linear(width // 2, 3)

    def forward(
        self,
        samples: ViewSamples,
        points: Float[Tensor, "rays samples 3"],
        directions: Float[Tensor, "rays 3"],
        *,
        return_weights: bool = False,
        return_view_weights: bool = False,
    ) -> RenderedRays:
        """Colours of rays, and the compositing weights."""
        encoded = encode(points, POINT_OCTAVES)
        x = encoded
        for i, linear in enumerate(self.trunk):
            x = F.relu(linear(torch.cat([encoded, x], -1) if i == self.skip else x))
        sigma = F.relu(self.density(x)).squeeze(-1)
        towards = encode(F.normalize(directions, dim=-1), DIRECTION_OCTAVES)[:, None].expand(-1, points.shape[1], -1)
        rgb = self.colour(F.relu(self.view(torch.cat([self.feature(x), towards], -1)))).sigmoid()
        steps = (points[:, 1:] - points[:, :-1]).norm(dim=-1)
        steps = torch.cat([steps, torch.full_like(steps[:, :1], LAST_INTERVAL)], -1)
        alpha = 1 - torch.exp(-sigma * steps)
        passed = torch.cumprod(1 - alpha + 1e-10, -1)
        weights = alpha * torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], -1)
        colour = (weights[..., None] * rgb).sum(1)
        if self.white:
            colour = colour + (1 - weights.sum(-1, keepdim=True))
        return RenderedRays(colour, weights if return_weights else None)
