"""Radiance fields (section 3): where samples are, features at them, raw colour and density, compositing.

Anything with the four methods of `Field` can be augmented: the three levels of perturbation act between them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_augnerf.cameras import Rays
from tenfold_augnerf.compositing import Composited, composite, intervals
from tenfold_augnerf.encoding import encode, encoded_size
from tenfold_augnerf.trunk import trunk

SKIP = 4  # γ(x) is concatenated after this layer's ReLU


class Samples(NamedTuple):
    """Where a field is asked: points, and their variances where samples have an extent."""

    points: Float[Tensor, "rays samples 3"]
    spread: Float[Tensor, "rays samples 3"] | None = None


class Field(Protocol):
    """What the renderer and the perturbations need of a radiance field."""

    width: int
    """Size W of the features that level 2 perturbs."""
    extra_edges: int
    """How many more ray parameters than samples there are: 0 for points, 1 for intervals between edges."""

    def locate(self, rays: Rays, z: Tensor) -> Samples:
        """Samples [rays, S] at ray parameters z [rays, S + extra_edges]."""
        raise NotImplementedError

    def encode(self, samples: Samples) -> Tensor:
        """Features [rays, S, W]: the trunk's output after its last ReLU."""
        raise NotImplementedError

    def heads(self, features: Tensor, views: Tensor) -> Tensor:
        """Raw (r, g, b, σ) [rays, S, 4] of features and unit view directions [rays, 3] (or [rays, S, 3])."""
        raise NotImplementedError

    def compose(self, raw: Tensor, z: Tensor, directions: Tensor, *, white: bool, noise: Tensor | None) -> Composited:
        """What the rays show; `noise` [rays, S] is added to the raw density."""
        raise NotImplementedError


class MLP(nn.Module):
    """D layers of W with [γ(x), h] after layer 4, then the heads; named as the released state dicts are.

    Raises:
        ValueError: 5 layers, with which the skip would come after the last one.

    """

    def __init__(self, depth: int, width: int, points: int, directions: int, skips: Sequence[int] = (SKIP,)) -> None:
        super().__init__()
        if depth - 1 in skips or depth < 1:
            raise ValueError(
                f"a trunk of {depth} layers has no layer after the skip at {list(skips)}: take another depth"
            )
        self.width, self.points, self.directions, self.skips = width, points, directions, tuple(skips)
        self.pts_linears = nn.ModuleList(
            nn.Linear(points if i == 0 else width + points * (i - 1 in self.skips), width) for i in range(depth)
        )
        if directions:
            self.alpha_linear = nn.Linear(width, 1)
            self.feature_linear = nn.Linear(width, width)
            self.views_linears = nn.ModuleList([nn.Linear(width + directions, width // 2)])
            self.rgb_linear = nn.Linear(width // 2, 3)
        else:
            self.output_linear = nn.Linear(width, 4)

    def trunk(self, encoded: Float[Tensor, "*batch points"]) -> Float[Tensor, "*batch width"]:
        """h, after the last ReLU."""
        return trunk(encoded, list(self.pts_linears.parameters()))

    def heads(
        self, h: Float[Tensor, "*batch width"], views: Float[Tensor, "*rays directions"] | None
    ) -> Float[Tensor, "*batch 4"]:
        """Raw colours and densities; encoded `views` are one a ray or one a sample.

        No activation stands between the feature layer and the view layer, so their weights are multiplied first:
        one product of [W, W/2] a sample instead of [W, W] and [W + directions, W/2]; and a ray's direction passes its
        part of the view layer once, not once a sample.
        """
        if views is None or not self.directions:
            return self.output_linear(h)
        view = self.views_linears[0]
        assert isinstance(view, nn.Linear)
        from_features, from_views = view.weight[:, : self.width], view.weight[:, self.width :]
        fused = from_features @ self.feature_linear.weight
        bias = F.linear(self.feature_linear.bias, from_features, view.bias)
        towards = F.linear(views, from_views, bias)
        if towards.ndim < h.ndim:
            towards = towards.unsqueeze(-2)
        colour = self.rgb_linear(F.relu(F.linear(h, fused) + towards, inplace=True))
        return torch.cat([colour, self.alpha_linear(h)], -1)


class NeRF(nn.Module):
    """The field of section 3: encoding, MLP, ReLU density, sigmoid colour.

    Args:
        depth: D, layers of the trunk.
        width: W; 256 in NeRF, 512 in the released Aug-NeRF.
        octaves: L of the points' encoding.
        view_octaves: L of the directions'.
        viewdirs: whether colour depends on the direction.
        use_embed: False leaves points and directions as they are.
        conv_embed: a convolution over three neighbouring samples on both encodings.
        density: "relu", or "softplus" of raw - 1, which cannot die.
        skips: layers after which the encoded point comes in again.

    """

    extra_edges = 0

    def __init__(
        self,
        depth: int = 8,
        width: int = 256,
        octaves: int = 10,
        view_octaves: int = 4,
        *,
        viewdirs: bool = True,
        use_embed: bool = True,
        conv_embed: bool = False,
        density: Literal["relu", "softplus"] = "relu",
        skips: Sequence[int] = (SKIP,),
    ) -> None:
        super().__init__()
        self.width, self.viewdirs, self.density = width, viewdirs, density
        self.octaves, self.view_octaves = (octaves, view_octaves) if use_embed else (0, 0)
        points, directions = encoded_size(3, self.octaves), encoded_size(3, self.view_octaves) * viewdirs
        self.mlp = MLP(depth, width, points, directions, skips)
        self.conv_embed = nn.Conv1d(points, points, 3, padding=1) if conv_embed else None
        self.conv_embeddirs = nn.Conv1d(directions, directions, 3, padding=1) if conv_embed and viewdirs else None

    def locate(self, rays: Rays, z: Float[Tensor, "rays samples"]) -> Samples:
        """The points o + z d."""
        return Samples(rays.origins[:, None] + z[..., None] * rays.directions[:, None])

    def encode(self, samples: Samples) -> Float[Tensor, "rays samples width"]:
        """H of the points."""
        return self.mlp.trunk(_along(self.conv_embed, encode(samples.points, self.octaves)))

    def heads(
        self, features: Float[Tensor, "rays samples width"], views: Float[Tensor, "*rays 3"]
    ) -> Float[Tensor, "rays samples 4"]:
        """Raw colours and densities."""
        if not self.viewdirs:
            return self.mlp.heads(features, None)
        towards = encode(views, self.view_octaves)
        if self.conv_embeddirs is not None:
            per_sample = towards if towards.ndim == 3 else towards[:, None].expand(-1, features.shape[1], -1)
            towards = _along(self.conv_embeddirs, per_sample)
        return self.mlp.heads(features, towards)

    def activate(self, raw: Float[Tensor, "*batch 4"], noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Colours in [0, 1] and densities."""
        sigma = raw[..., 3] if noise is None else raw[..., 3] + noise
        return raw[..., :3].sigmoid(), F.relu(sigma) if self.density == "relu" else F.softplus(sigma - 1)

    def compose(
        self,
        raw: Float[Tensor, "rays samples 4"],
        z: Float[Tensor, "rays samples"],
        directions: Float[Tensor, "rays 3"],
        *,
        white: bool,
        noise: Float[Tensor, "rays samples"] | None = None,
    ) -> Composited:
        """Section 2.1, item 4; in the precision of z, since half precision overflows on the last interval."""
        colour, sigma = self.activate(raw.to(z.dtype), noise)
        return composite(colour, sigma, intervals(z, directions), z, white=white)

    def forward(self, points: Tensor, views: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Raw [rays, S, 4] at points; `perturbation` [rays, S, W] is added to the features."""
        features = self.encode(Samples(points))
        return self.heads(features if perturbation is None else features + perturbation, views)


def _along(convolution: nn.Conv1d | None, x: Float[Tensor, "rays samples size"]) -> Float[Tensor, "rays samples size"]:
    return x if convolution is None else convolution(x.transpose(1, 2)).transpose(1, 2)
