"""IBRNet: features weighed by visibility, attention along the ray for density, colours blended from the sources."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.baselines.volume import composite
from tenfold_gnt.network import RenderedRays
from tenfold_gnt.projection import ViewSamples

HIDDEN = 16
HEADS, KEY = 4, 4


class IBRNet(nn.Module):
    """The rendering network of IBRNet; its feature network is the same `ResUNet`.

    Args:
        feature_channels: C of the feature maps.
        samples: samples a ray for which the position code over sample indices is kept; for more it is made anew.

    """

    code: Tensor

    def __init__(self, feature_channels: int = 32, samples: int = 256) -> None:
        super().__init__()
        width = 3 + feature_channels
        self.width = 64
        self.anti_alias = nn.Parameter(torch.tensor(0.2))
        self.direction = nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, width), nn.ELU())
        self.base = nn.Sequential(nn.Linear(3 * width, 64), nn.ELU(), nn.Linear(64, 32), nn.ELU())
        self.visibility = nn.Sequential(nn.Linear(32, 32), nn.ELU(), nn.Linear(32, 33), nn.ELU())
        self.visibility2 = nn.Sequential(nn.Linear(32, 32), nn.ELU(), nn.Linear(32, 1), nn.Sigmoid())
        self.geometry = nn.Sequential(nn.Linear(65, 64), nn.ELU(), nn.Linear(64, HIDDEN), nn.ELU())
        self.attention = SampleAttention()
        self.density = nn.Sequential(nn.Linear(HIDDEN, 16), nn.ELU(), nn.Linear(16, 1), nn.ReLU())
        self.blending = nn.Sequential(nn.Linear(37, 16), nn.ELU(), nn.Linear(16, 8), nn.ELU(), nn.Linear(8, 1))
        self.register_buffer("code", sinusoid(samples, HIDDEN), persistent=False)

    def forward(
        self,
        samples: ViewSamples,
        points: Float[Tensor, "rays samples 3"],
        directions: Float[Tensor, "rays 3"],
        *,
        return_weights: bool = False,
        return_view_weights: bool = False,
    ) -> RenderedRays:
        """Colours of rays; weights are those of the compositing, view weights those of the colour blending."""
        rgb_feat, ray_diff, mask = samples
        count = mask.sum(2)
        own = rgb_feat + self.direction(ray_diff)
        closeness = torch.exp(self.anti_alias.abs() * (ray_diff[..., 3:] - 1))
        weight = (closeness - closeness.amin(2, keepdim=True)) * mask
        weight = weight / (weight.sum(2, keepdim=True) + 1e-8)
        statistics = torch.cat(moments(own, weight), -1).expand(-1, -1, own.shape[2], -1)
        x = self.base(torch.cat([statistics, own], -1))
        residual, visible = self.visibility(x * weight).split([32, 1], -1)
        visible = visible.sigmoid() * mask
        x = x + residual
        visible = self.visibility2(x * visible) * mask
        weight = visible / (visible.sum(2, keepdim=True) + 1e-8)
        mean, variance = moments(x, weight)
        pooled = torch.cat([mean.squeeze(2), variance.squeeze(2), weight.mean(2)], -1)
        tokens = self.geometry(pooled)
        code = self.code if tokens.shape[1] <= len(self.code) else sinusoid(tokens.shape[1], HIDDEN)
        tokens = self.attention(tokens + code[: tokens.shape[1]].to(tokens), (count > 1).squeeze(-1))
        sigma = self.density(tokens).masked_fill(count < 1, 0.0)
        logits = self.blending(torch.cat([x, visible, ray_diff], -1)).masked_fill(mask == 0, -1e9)
        blend = logits.softmax(2)
        rays = composite((rgb_feat[..., :3] * blend).sum(2), sigma.squeeze(-1), (count > 1).squeeze(-1))
        return RenderedRays(
            rays.rgb, rays.weights if return_weights else None, blend.squeeze(-1) if return_view_weights else None
        )


def moments(
    x: Float[Tensor, "rays samples views channels"], weight: Float[Tensor, "rays samples views 1"]
) -> tuple[Float[Tensor, "rays samples 1 channels"], Float[Tensor, "rays samples 1 channels"]]:
    """Weighted mean and variance over views."""
    mean = (x * weight).sum(2, keepdim=True)
    return mean, (weight * (x - mean) ** 2).sum(2, keepdim=True)


def sinusoid(samples: int, width: int) -> Float[Tensor, "samples width"]:
    """Sin and cos of index / 10000^(2i / width), alternating."""
    index = torch.arange(samples, dtype=torch.float64)[:, None]
    angle = index / 10_000 ** (2 * (torch.arange(width) // 2) / width)
    even = torch.arange(width) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()


class SampleAttention(nn.Module):
    """4-head attention along the ray, post-norm; samples that at most one view sees attend to all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HEADS * KEY, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * KEY, HIDDEN, bias=False)
        self.norm = nn.LayerNorm(HIDDEN, eps=1e-6)

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """Attended tokens [rays, samples, 16]; `observed` [rays, samples] marks samples that two views or more see."""
        query, key, value = (
            part(x).unflatten(-1, (HEADS, KEY)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        logits = (query @ key.transpose(-1, -2) / KEY**0.5).masked_fill(~observed[:, None, :, None], -1e9)
        attended = (logits.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        return self.norm(x + F.dropout(self.out(attended), 0.1, self.training))
