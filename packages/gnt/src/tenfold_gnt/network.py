"""The network that renders a batch of rays by attention alone (section 2.4), and its ablations (section 8)."""

from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.encoding import OCTAVES, encode
from tenfold_gnt.projection import ViewSamples
from tenfold_gnt.ray_transformer import RayAttention, RayBlock
from tenfold_gnt.seen_views import seen_views
from tenfold_gnt.view_transformer import DROPOUT, DotProductAttention, SubtractionAttention, ViewBlock

ENCODED = 3 * (1 + 2 * OCTAVES)  # 63 columns for a position, as many for a direction
ViewAttention = Literal["subtraction", "dot"]


class RenderedRays(NamedTuple):
    """What a network makes of rays.

    Attributes:
        rgb: colours, not clipped; beyond [0, 1] where the network says so.
        weights: of the samples: the ray attention of the nearest sample, or compositing weights; None if not asked for.
        view_weights: of the source views at every sample, from the last view block; None if not asked for.

    """

    rgb: Float[Tensor, "rays 3"]
    weights: Float[Tensor, "rays samples"] | None = None
    view_weights: Float[Tensor, "rays samples views"] | None = None


class GNT(nn.Module):
    """View transformers and ray transformers in alternation; the colour is a linear map of the mean token.

    Args:
        width: D of every token.
        depth: number of (view, ray) pairs of blocks: 4 for single scenes, 8 across scenes.
        feature_channels: C of the feature maps.
        dropout: in all blocks.
        position_every: positions and directions join the tokens after every n-th view block, from the first; 2 in the
            released code, 1 in the paper.
        double_projection: see `SubtractionAttention`.
        view_attention: "subtraction", or "dot" for the ablation.

    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 4,
        feature_channels: int = 32,
        dropout: float = DROPOUT,
        *,
        position_every: int = 2,
        double_projection: bool = True,
        view_attention: ViewAttention = "subtraction",
    ) -> None:
        super().__init__()
        if width % 8 or width < 8 or depth < 1:
            raise ValueError(f"the width must be a multiple of 8 and the depth at least 1, got {width} and {depth}")
        self.width, self.depth, self.feature_channels = width, depth, feature_channels
        self.position_every = position_every
        self.packs_views = view_attention == "subtraction"
        self.input_mlp = mlp(3 + feature_channels, width)

        def attention() -> nn.Module:
            if view_attention == "dot":
                return DotProductAttention(width, dropout)
            return SubtractionAttention(width, dropout, double_projection=double_projection)

        self.view_blocks = nn.ModuleList(ViewBlock(width, attention(), dropout) for _ in range(depth))
        self.position_mlps = nn.ModuleDict(
            {str(i): mlp(width + 2 * ENCODED, width) for i in range(0, depth, position_every)}
        )
        self.ray_blocks = nn.ModuleList(self.ray_block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_rgb = nn.Linear(width, 3)

    def ray_block(self, width: int, dropout: float) -> nn.Module:
        """What mixes the tokens of a ray between two view blocks."""
        return RayBlock(width, RayAttention(width, dropout), dropout)

    def forward(
        self,
        samples: ViewSamples,
        points: Float[Tensor, "rays samples 3"],
        directions: Float[Tensor, "rays 3"],
        *,
        return_weights: bool = False,
        return_view_weights: bool = False,
    ) -> RenderedRays:
        """Colours of rays.

        Args:
            samples: what the source views show at the points.
            points: sample points in the world, increasing in depth.
            directions: of the rays; normalised here.
            return_weights: read out the last ray block's attention.
            return_view_weights: read out the last view block's attention.

        """
        features = self.input_mlp(samples.rgb_feat)
        tokens = features.amax(2)
        encoded = encode(points), encode(F.normalize(directions, dim=-1))
        weights = view_weights = None
        seen = seen_views(features, samples.ray_diff, samples.mask) if self.packs_views else None
        for i in range(self.depth):
            last = i == self.depth - 1
            tokens, view_weights = self.view_blocks[i](
                tokens, features, samples.ray_diff, samples.mask, return_weights=last and return_view_weights, seen=seen
            )
            if str(i) in self.position_mlps:
                tokens = self._with_position(self.position_mlps[str(i)], tokens, *encoded)
            tokens, weights = self.ray_blocks[i](tokens, return_weights=last and return_weights)
        return self.read_out(tokens, weights, view_weights)

    def _with_position(self, position_mlp: nn.Module, tokens: Tensor, points: Tensor, directions: Tensor) -> Tensor:
        """MLP([t, posenc(p), posenc(d)]); the direction's share of the first layer is computed once a ray."""
        first, activation, second = cast(tuple[nn.Linear, nn.ReLU, nn.Linear], tuple(position_mlp.children()))
        of_token, of_point, of_direction = first.weight.split([self.width, ENCODED, ENCODED], 1)
        a_ray = F.linear(directions.to(tokens.dtype), of_direction, first.bias)
        hidden = F.linear(tokens, of_token) + F.linear(points.to(tokens.dtype), of_point) + a_ray[:, None]
        return second(activation(hidden))

    def read_out(self, tokens: Tensor, weights: Tensor | None, view_weights: Tensor | None) -> RenderedRays:
        """Rgb = Linear(mean over samples of LayerNorm(t)), without a sigmoid."""
        return RenderedRays(self.to_rgb(self.norm(tokens).mean(1)), weights, view_weights)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))


def parameter_count(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def depth_of(weights: Float[Tensor, "rays samples"], depths: Float[Tensor, "rays samples"]) -> Float[Tensor, " rays"]:
    """Σ w_i z_i."""
    return (weights * depths).sum(-1)


def confidence_of(weights: Float[Tensor, "rays samples"]) -> Float[Tensor, " rays"]:
    """1 - entropy of the weights over its maximum log S: 1 where one sample has all weight, 0 for uniform weights.

    Weights of compositing may sum to less than 1, on rays that meet little: the result is that share of it.
    """
    total = weights.sum(-1)
    share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)[..., None]
    entropy = -torch.xlogy(share, share).sum(-1)
    most = torch.log(torch.tensor(float(weights.shape[-1]), dtype=weights.dtype, device=weights.device))
    return (1 - entropy / most) * total.clamp(max=1)


def occlusion_of(view_weights: Float[Tensor, "rays samples views"]) -> Tensor:
    """For each ray the view that most samples attend to most, int64 [rays]: argmax over views, mode over samples."""
    return view_weights.argmax(-1).mode(-1).values
